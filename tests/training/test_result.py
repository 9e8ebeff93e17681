"""What the end of a run needs is found before step 1, whatever lies in the model's folder."""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from checkpoints.huggingface import load_model
from helpers import fork, tiny
from helpers.train_runs import make_workspace


@pytest.fixture(scope="module")
def workspace(tmp_path_factory) -> Path:
    return make_workspace(tmp_path_factory.mktemp("result"))


def text(name: str, content: str | bytes) -> Callable[[Path, Path], object]:
    """Write a file of the model's folder."""
    content = content.encode() if isinstance(content, str) else content
    return lambda model, out: (model / name).write_bytes(content)


def link(name: str, target: str, content: str = "text") -> Callable[[Path, Path], object]:
    """Make a file of the model's folder a link: to another name in it, or out of it."""
    def act(model: Path, out: Path) -> None:
        path = model / target
        if not path.exists() and not target.startswith("/") and "missing" not in target:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(content)
        (model / name).unlink(missing_ok=True)
        (model / name).symlink_to(target)

    return act


def moved(name: str, target: str) -> Callable[[Path, Path], object]:
    """Move a file of the model's folder, and leave a link to it."""
    def act(model: Path, out: Path) -> None:
        (model / target).parent.mkdir(parents=True, exist_ok=True)
        (model / name).rename(model / target)
        (model / name).symlink_to(target)

    return act


def folder(name: str) -> Callable[[Path, Path], object]:
    """A folder where a file is expected."""
    def act(model: Path, out: Path) -> None:
        (model / name).unlink(missing_ok=True)
        (model / name).mkdir()
        (model / name / "x").write_text("x")

    return act


def fifo(name: str) -> Callable[[Path, Path], object]:
    """A FIFO, which would wait for a writer for ever."""
    def act(model: Path, out: Path) -> None:
        (model / name).unlink(missing_ok=True)
        os.mkfifo(model / name)

    return act


def in_out(make: Callable[[Path], object]) -> Callable[[Path, Path], object]:
    """Something that lies in the run's folder before the run."""
    def act(model: Path, out: Path) -> None:
        out.mkdir()
        make(out)

    return act


def foreign_model(out: Path) -> None:
    (out / "model").mkdir()
    (out / "model/my-notes.txt").write_text("do not lose me")


FINISHES = {
    "a licence with blanks and brackets": text("LICENSE (1).txt", "text"),
    "a licence with a name in another script": text("LICENSE-ibyangombwa ñ 中", "text"),
    "a licence with a long name": text("LICENSE" + "x" * 240, "text"),
    "a notice that is not UTF-8": text("NOTICE", b"\xff\xfe\x00"),
    "a folder of licences": folder("LICENSES"),
    "an empty licence": text("LICENSE", ""),
    "a tokenizer behind a link in the folder": moved("tokenizer.model", "files/tokenizer.model"),
    "weights behind a link in the folder": moved("model.safetensors", "blobs/abc"),
    "a link to a link": lambda model, out: (moved("tokenizer.model", "a")(model, out),
                                            moved("a", "b")(model, out)),
    "a licence behind a link in the folder": link("LICENSE", "files/LICENSE"),
    "a prompt of another program": text("prompt.json", '{"unknown": [1, {"x": null}]}'),
    "an empty generation config": text("generation_config.json", "{}"),
    "a config with Windows line ends": lambda model, out: (model / "config.json").write_bytes(
        (model / "config.json").read_bytes().replace(b"\n", b"\r\n")),
    "a template that nobody uses": text("chat_template.jinja", "{% broken"),
    "an empty template": text("chat_template.jinja", ""),
    "a folder for a README": folder("README.md"),
    "a FIFO that belongs to no model": fifo("pipe"),
    "a dangling link that belongs to no model": link("notes.txt", "missing"),
    "an old model of a run": in_out(lambda out: (
        (out / "model").mkdir(), (out / "model/config.json").write_text("{}"))),
}
REFUSED = {
    "a tokenizer behind a link out of the folder": lambda model, out: (
        (model.parent / "outside").mkdir(exist_ok=True),
        moved("tokenizer.model", f"../outside/{model.name}.model")(model, out)),
    "a licence behind a link to a device": link("LICENSE", "/dev/zero"),
    "a licence behind a link to another file of the system": link("LICENSE", "/etc/hostname"),
    "a licence that is a dangling link": link("LICENSE", "missing"),
    "a licence of 5 MB": text("LICENSE", b"x" * (5 << 20)),
    "a FIFO for a licence": fifo("LICENSE"),
    "a FIFO for a prompt": fifo("prompt.json"),
    "a FIFO for a template": fifo("chat_template.jinja"),
    "a prompt that is not JSON": text("prompt.json", '{"chat": '),
    "a prompt that is a list": text("prompt.json", "[]"),
    "a prompt with another kind of template": text("prompt.json", '{"chat": 3}'),
    "a prompt with a broken template": text("prompt.json", json.dumps({"chat": "{% broken"})),
    "a prompt with a template that ends nothing": text(
        "prompt.json", json.dumps({"chat": "{{ raise_exception('no') }}"})),
    "a folder for a prompt": folder("prompt.json"),
    "a folder for a tokenizer config": folder("tokenizer_config.json"),
    "a folder for a generation config": folder("generation_config.json"),
    "a generation config that is not JSON": text("generation_config.json", "{"),
    "a licence with a line break in its name": text("LICENSE\nx", "text"),
    "a foreign file in the old model": in_out(foreign_model),
    "a file in place of the model's folder": in_out(lambda out: (out / "model").write_text("x")),
    "a dangling link in place of the model's folder": in_out(
        lambda out: (out / "model").symlink_to("missing/there")),
    **{f"a folder in place of {name}": in_out(lambda out, name=name: (out / name).mkdir())
       for name in ("report.html", "samples.txt", "odd_steps.jsonl", "run.json", "settings.toml")},
    **{f"a file in place of {name}": in_out(lambda out, name=name: (out / name).write_text("x"))
       for name in ("checkpoints", "best")},
    "a report that is a link in a circle": in_out(
        lambda out: (out / "report.html").symlink_to("report.html")),
}
QUICK = ["a licence with blanks and brackets", "a link to a link", "a folder of licences",
         "a FIFO for a prompt", "a tokenizer behind a link out of the folder",
         "a prompt with a broken template", "a foreign file in the old model",
         "a licence that is a dangling link", "a folder in place of report.html"]


def cases() -> list:
    """Every kind for all weights and for LoRA; the quick ones in turn, the others marked slow."""
    found = []
    for name in (*FINISHES, *REFUSED):
        for tune in ("full", "lora"):
            quick = name in QUICK and tune == ("full", "lora")[QUICK.index(name) % 2]
            found.append(pytest.param(name, tune, marks=[] if quick else [pytest.mark.slow]))
    return found


def run(workspace: Path, model: Path, out: Path, tune: str, log: Path, steps: int = 2) -> int:
    """The exit code of a short run in a forked child; its stderr goes to `log`."""
    words = ["--model", str(model), "--data", f"{workspace}/kin", "--out", str(out), "--tune", tune,
             "--seq-len", "32", "--rows", "2", "--steps", str(steps), "--lr", "1e-3", "--dtype",
             "fp32", "--device", "cpu", "--hold-out", "0"]
    [code] = fork.ends([fork.child(fork.train(*words), log)])
    return code


@pytest.mark.parametrize(("name", "tune"), cases())
def test_a_run_finishes_or_is_refused_before_step_1(workspace, tmp_path, name, tune):
    model, out, log = tmp_path / "model", tmp_path / "out", tmp_path / "log"
    tiny.folder(model, "llama32", max_position_embeddings=64)
    (FINISHES | REFUSED)[name](model, out)
    code = run(workspace, model, out, tune, log)
    message = log.read_text()
    assert "Traceback" not in message
    leftovers = [x.name for x in out.iterdir() if x.name.startswith((".tmp", ".del"))]
    assert leftovers == [], message
    if name in FINISHES:
        assert code == 0, message
        loaded, tokenizer = load_model(out / "model")
        assert tokenizer.encode("amazi") and loaded.config.vocab_size == tiny.V
        return
    assert code in (2, 3, 5), message
    assert len([x for x in message.splitlines() if x.startswith("error")]) == 1, message
    assert not (out / "metrics.jsonl").exists(), "a step was trained"


def test_a_missing_package_of_the_report_is_named_before_step_1(workspace, tmp_path):
    out, log = tmp_path / "out", tmp_path / "log"
    train = fork.train("--model", f"{workspace}/tied", "--data", f"{workspace}/kin", "--out",
                       str(out), "--seq-len", "32", "--rows", "2", "--steps", "2", "--device",
                       "cpu", "--hold-out", "0")

    def train_without_matplotlib() -> object:
        sys.modules["matplotlib"] = None  # in this child alone
        return train()

    assert fork.ends([fork.child(train_without_matplotlib, log)]) == [2], log.read_text()
    assert "needs the package matplotlib, which is not installed" in log.read_text()
    assert not (out / "metrics.jsonl").exists()


def test_the_result_does_not_need_the_base_folder_during_the_run(workspace, tmp_path):
    model, out, log = tmp_path / "model", tmp_path / "out", tmp_path / "log"
    tiny.folder(model, "llama32", max_position_embeddings=64)
    (model / "LICENSE").write_text("text")
    words = ["--model", str(model), "--data", f"{workspace}/kin", "--out", str(out), "--seq-len",
             "32", "--rows", "2", "--steps", "40", "--lr", "1e-3", "--dtype", "fp32", "--device",
             "cpu", "--hold-out", "0"]
    pid = fork.child(fork.train(*words), log)
    deadline = time.monotonic() + 60
    while not (out / "metrics.jsonl").exists():
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.01)
    shutil.rmtree(model)
    assert fork.ends([pid]) == [0], log.read_text()
    assert (out / "model/LICENSE").read_text() == "text"
    load_model(out / "model")
