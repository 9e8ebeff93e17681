"""The hub, against a server of our own on this machine: what is fetched, and each way it fails."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from helpers import tiny
from helpers.hub_server import TOKEN, Hub
from runtime.paths import ROOT

OLD, NEW = "a" * 40, "b" * 40
NOT_READ = {"pytorch_model.bin": b"x" * 50, "model.gguf": b"x" * 50, "evil.py": b"x = 1",
            "original/consolidated.00.pth": b"x" * 50}
CALL = "from runtime import console, hub; console.run(lambda: print(hub.snapshot(*{args!r})))"


@pytest.fixture(scope="module")
def contents(tmp_path_factory) -> dict[str, dict[str, bytes]]:
    """Two versions of a model, by commit."""
    root = tmp_path_factory.mktemp("contents")
    return {commit: {f.name: f.read_bytes() for f in
                     tiny.folder(root / commit, "llama32", seed, max_position_embeddings=64)
                     .iterdir()} | NOT_READ for seed, commit in enumerate((OLD, NEW))}


@pytest.fixture
def hub(contents):
    """The server, with one model under many names."""
    model = {"main": OLD, "v1": OLD, **contents}
    names = ("name", "gated", "private", "slow", "broken", "down")
    text = "\n".join(tiny.SENTENCES).encode()
    hub = Hub({**{f"models/org/{x}": dict(model) for x in names},
               "datasets/org/text": {"main": OLD, OLD: {
                   "kin/a.txt": text, "kin/b.txt": text + b"\nBindi", "eng/a.txt": b"no",
                   "README.md": b"no"}}})
    yield hub
    hub.close()


def run(hub: Hub | None, home: Path, *args: str, **more: str) -> subprocess.CompletedProcess:
    """A command in a process of its own: the hub's library reads its settings when imported."""
    env = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
    env |= {"HF_HOME": str(home), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "",
            "HF_ENDPOINT": hub.url if hub else "http://127.0.0.1:9", "HF_HUB_DISABLE_XET": "1",
            "PYTHONPATH": str(ROOT), **more}
    return subprocess.run([sys.executable, *args], capture_output=True, text=True, env=env,
                          cwd=home.parent, timeout=120)


def snapshot(hub: Hub | None, home: Path, repo: str, revision: str | None = None,
             **more: str) -> subprocess.CompletedProcess:
    patterns = ["*.json", "*.safetensors", "tokenizer.model"]
    return run(hub, home, "-c", CALL.format(args=(repo, revision, patterns)), **more)


def test_only_what_is_read_is_fetched_and_the_folder_is_the_commit(hub, contents, tmp_path):
    done = snapshot(hub, tmp_path / "home", "org/name")
    assert done.returncode == 0, done.stderr
    folder = Path(done.stdout.strip())
    assert folder.name == OLD and {f.name for f in folder.iterdir()} == \
        {k for k in contents[OLD] if k not in NOT_READ}
    assert all((folder / k).read_bytes() == v for k, v in contents[OLD].items()
               if k not in NOT_READ)
    assert not hub.files() & set(NOT_READ)
    before = len(hub.files())
    hub.asked.clear()
    assert snapshot(hub, tmp_path / "home", "org/name").stdout == done.stdout
    assert before and not hub.files(), "the second time nothing is fetched again"


def test_a_revision_is_a_branch_a_tag_or_a_commit_and_main_may_move(hub, tmp_path):
    home = tmp_path / "home"
    for revision, commit in (("v1", OLD), (NEW, NEW), (None, OLD)):
        assert Path(snapshot(hub, home, "org/name", revision).stdout.strip()).name == commit
    hub.repositories["models/org/name"]["main"] = NEW
    assert Path(snapshot(hub, home, "org/name").stdout.strip()).name == NEW


FAILURES = {  # repository, revision, environment, exit code, what is said
    "no such repository": ("org/nothing", None, {}, 3, "not a public repository"),
    "no such repository, with a token": ("org/nothing", None, {"HF_TOKEN": TOKEN}, 3,
                                         "not a repository that your token can read"),
    "private": ("org/private", None, {}, 3, "hf auth login"),
    "a wrong token": ("org/private", None, {"HF_TOKEN": "hf_wrong"}, 3, "your token can read"),
    "gated": ("org/gated", None, {"HF_TOKEN": TOKEN}, 3, "accept its licence on http://127.0.0.1"),
    "no such revision": ("org/name", "v9", {}, 3, "has no revision 'v9'"),
    "no such commit": ("org/name", "c" * 40, {}, 3, "has no revision"),
    "the server is down": ("org/down", None, {}, 3, "answers 503"),
    "offline": ("org/name", None, {"HF_HUB_OFFLINE": "1"}, 3, "hf download org/name"),
    "no name": ("org/na..me--", None, {}, 3, "not a valid repository name"),
}


@pytest.mark.parametrize("name", FAILURES)
def test_each_way_to_fail_is_one_line_of_its_own_and_never_shows_the_token(hub, tmp_path, name):
    repo, revision, env, code, says = FAILURES[name]
    done = snapshot(hub, tmp_path / "home", repo, revision, **env)
    assert done.returncode == code and says in done.stderr, done.stderr
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: model ") and repo in lines[0]
    assert TOKEN not in done.stderr + done.stdout and "hf_wrong" not in done.stderr


def test_a_private_repository_opens_with_its_token(hub, tmp_path):
    done = snapshot(hub, tmp_path / "home", "org/private", HF_TOKEN=TOKEN)
    assert done.returncode == 0 and TOKEN not in done.stderr + done.stdout


def test_nobody_there_is_said_within_half_a_minute_and_a_cache_is_used_if_there_is_one(
        hub, tmp_path):
    home = tmp_path / "home"
    alone = snapshot(None, home, "org/name")
    assert alone.returncode == 3 and "does not answer" in alone.stderr
    assert snapshot(hub, home, "org/name").returncode == 0
    for url, more in ((None, {}), (hub, {"HF_HUB_OFFLINE": "1"})):
        done = snapshot(url, home, "org/name", **more)
        assert done.returncode == 0 and Path(done.stdout.strip()).name == OLD
        assert f"using the cached commit {OLD}" in done.stderr
    pinned = snapshot(None, home, "org/name", OLD)
    assert pinned.returncode == 0, "a commit is found without a name"


def test_what_broke_off_comes_whole_in_the_end(hub, contents, tmp_path):
    home = tmp_path / "home"
    for _ in range(4):  # the library may try again itself, or say so and be run again
        done = snapshot(hub, home, "org/broken")
        if done.returncode == 0:
            break
        assert done.returncode == 3 and len(done.stderr.strip().splitlines()) == 1
    folder = Path(done.stdout.strip())
    assert hub.broken and (folder / "model.safetensors").read_bytes() == \
        contents[OLD]["model.safetensors"]


def test_a_slow_hub_is_waited_for(hub, tmp_path):
    assert snapshot(hub, tmp_path / "home", "org/slow").returncode == 0


def test_a_run_from_the_hub_is_pinned_and_its_data_may_come_from_there_too(hub, tmp_path):
    home, out = tmp_path / "home", tmp_path / "out"
    flags = ["--seq-len", "16", "--rows", "2", "--steps", "2", "--dtype", "fp32", "--device", "cpu"]
    done = run(hub, home, str(ROOT / "train.py"), "--model", "org/name", "--data",
               "hf:org/text/kin/*.txt", "--out", str(out), *flags)
    assert done.returncode == 0, done.stderr
    about = json.loads((out / "run.json").read_text())
    assert about["model_commit"] == OLD
    assert f'model = "org/name@{OLD}"' in (out / "settings.toml").read_text()
    bin, = (out / "bins").iterdir()
    meta = json.loads((bin / "meta.json").read_text())
    assert [Path(x["path"]).name for x in meta["sources"]] == ["a.txt", "b.txt"]
    assert "eng/a.txt" not in hub.files() and "README.md" not in hub.files()
    hub.repositories["models/org/name"]["main"] = NEW
    hub.asked.clear()
    again = run(hub, home, str(ROOT / "train.py"), "--resume", "--out", str(out))
    assert again.returncode == 0 and "nothing to do" in again.stderr, again.stderr
    other = run(hub, home, str(ROOT / "train.py"), "--resume", "--out", str(out), "--model",
                f"org/name@{NEW}")
    assert other.returncode == 2 and "a resumed run cannot change" in other.stderr
    kept = out / "settings.toml"  # and by a changed file
    kept.write_text(kept.read_text().replace(OLD, NEW))
    moved = run(hub, home, str(ROOT / "train.py"), "--resume", "--out", str(out))
    assert moved.returncode == 3 and "holds other weights than those" in moved.stderr


def test_data_that_is_not_there_is_one_line(hub, tmp_path):
    for spec, code, says in (("hf:org/text/swa/*.txt", 3, "matches 'swa/*.txt'"),
                             ("hf:org/none/a.txt", 3, "dataset 'org/none'"),
                             ("hf:org", 2, "hf:org/name/glob"),
                             ("hf:org/text/../x", 2, "hf:org/name/glob")):
        done = run(hub, tmp_path / "home", str(ROOT / "prepare.py"), "text", spec, "--tokenizer",
                   str(tmp_path), "--out", str(tmp_path / "bin"))
        said = [x for x in done.stderr.splitlines() if x.startswith("error: ")]
        assert done.returncode in (code, 3) and len(said) == 1
        if "no tokenizer" not in said[0]:
            assert done.returncode == code and says in said[0], said


def test_a_local_folder_asks_nobody(hub, tmp_path):
    tiny.folder(tmp_path / "model", "llama32", max_position_embeddings=64)
    (tmp_path / "kin.txt").write_text("\n".join(tiny.SENTENCES))
    patch = tmp_path / "patch"
    patch.mkdir()
    (patch / "sitecustomize.py").write_text(
        "import socket\n"
        "def no(*a, **k): raise SystemExit('a socket was opened')\n"
        "socket.socket.connect = socket.getaddrinfo = no\n")
    done = run(hub, tmp_path / "home", str(ROOT / "train.py"), "--model", str(tmp_path / "model"),
               "--data", str(tmp_path / "kin.txt"), "--out", str(tmp_path / "out"), "--seq-len",
               "16", "--rows", "2", "--steps", "2", "--device", "cpu",
               PYTHONPATH=f"{patch}:{ROOT}")
    assert done.returncode == 0, done.stderr
    assert hub.asked == []
