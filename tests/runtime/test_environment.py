"""A run gives the same losses whatever surrounds it: flags of Python, locale, umask, odd paths."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from helpers import tiny
from runtime.paths import ROOT

ENV = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
SURROUNDINGS = {  # flags of Python, environment, umask, the folder it runs in
    "optimised": (["-O"], {}, 0o022, "here"),
    "warnings are errors": (["-W", "error"], {}, 0o022, "here"),
    "another hash seed": ([], {"PYTHONHASHSEED": "12345"}, 0o022, "here"),
    "an ASCII locale": ([], {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}, 0o022,
                        "here"),
    "a private umask": ([], {}, 0o077, "here"),
    "an open umask": ([], {}, 0o000, "here"),
    "an odd path": ([], {}, 0o022, "ahandi hantu h'ishyamba é\n2"),
}


def losses(place: Path, flags: list[str], env: dict[str, str], umask: int) -> list[str]:
    """Losses of a short run, digit for digit, in a folder that is made for it."""
    place.mkdir()
    tiny.folder(place / "model", "llama32", max_position_embeddings=64)
    lines = [f"{s} é’ {i}" for i in range(12) for s in tiny.SENTENCES]
    (place / "kin.txt").write_text("\n".join(lines), encoding="utf-8")
    done = subprocess.run(
        [sys.executable, *flags, str(ROOT / "train.py"), "--model", "model", "--data", "kin.txt",
         "--out", "out", "--seq-len", "32", "--rows", "2", "--steps", "4", "--dtype", "fp32",
         "--device", "cpu"], cwd=place, env={**ENV, **env}, umask=umask, capture_output=True)
    said = done.stderr.decode(errors="replace")
    assert done.returncode == 0, said[-2000:]
    mode = (place / "out/model/model.safetensors").stat().st_mode & 0o777
    assert mode == 0o666 & ~umask
    found = [json.loads(x) for x in
             (place / "out/metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    assert "\n-- " in (place / "out/samples.txt").read_text(encoding="utf-8")
    return [repr(x["loss"]) for x in found if "loss" in x]


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> list[str]:
    return losses(tmp_path_factory.mktemp("plain") / "here", [], {}, 0o022)


@pytest.mark.parametrize("name", SURROUNDINGS)
def test_the_losses_are_the_same_in_other_surroundings(name, plain, tmp_path):
    flags, env, umask, folder = SURROUNDINGS[name]
    assert losses(tmp_path / folder, flags, env, umask) == plain and len(plain) == 4


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc is told what to keep")
def test_on_a_cpu_freed_memory_is_kept_for_the_next_step_unless_the_environment_says_otherwise():
    code = """if True:
        import resource, torch
        from runtime.distributed import Distributed
        Distributed.start("cpu")
        def faults():
            return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        for big in (24 << 20, 48 << 20):  # bytes: kept, and given back
            for _ in range(16):  # until the heap has grown as far as it does
                torch.ones(big, dtype=torch.uint8)
            before = faults()
            for _ in range(8):
                torch.ones(big, dtype=torch.uint8)
            print((faults() - before) * 4096 / big / 8)
    """
    said = {name: [float(x) for x in subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, text=True,
        env={**{k: v for k, v in ENV.items() if not k.startswith("MALLOC_")}, **more}
        ).stdout.split()]
        for name, more in (("ours", {}), ("theirs", {"MALLOC_MMAP_THRESHOLD_": "1048576"}))}
    assert said["ours"][0] < 0.1 and said["ours"][1] > 0.9  # shares of the pages that came anew
    assert said["theirs"][0] > 0.9


FIRST = """
import os, runpy, sys

class Seen:
    def find_spec(self, name, *_):
        if name == "torch":
            print(os.environ.get("GOMP_SPINCOUNT"), flush=True)
            os._exit(0)

sys.meta_path.insert(0, Seen())
sys.argv = sys.argv[1:]
sys.path.insert(0, os.getcwd())
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.parametrize("command", ["train.py", "sample.py --model x --prompt y", "eval.py",
                                     "export.py check --model x"])
@pytest.mark.parametrize("env, spins", [
    ({}, "1000"), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "active"}, "None")])
def test_threads_are_told_how_to_wait_before_torch_is_loaded(command, env, spins):
    """libgomp reads it once; what a user has set stands."""
    plain = {k: v for k, v in ENV.items() if k not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    done = subprocess.run(
        [sys.executable, "-c", FIRST, *command.split()],
        cwd=ROOT,
        env={**plain, **env},
        capture_output=True,
        text=True,
    )
    assert done.stdout.strip() == spins, done.stderr
