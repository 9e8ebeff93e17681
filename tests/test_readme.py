"""What the README tells people to type works, and the demo shows what it promises."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys

import pytest

import eval as eval_command
import export
import prepare
import sample
from runtime import flags
from runtime.paths import ROOT
from training.settings import Settings

SETTINGS = {"train.py": Settings, "sample.py": sample.Settings,
            "eval.py": eval_command.Settings,
            **{f"prepare.py {name}": cls for name, (cls, _) in prepare.COMMANDS.items()},
            **{f"export.py {name}": cls for name, cls in export.COMMANDS.items()}}


def commands() -> list[tuple[str, list[str]]]:
    """Every `python X.py ...` of the README's and the docs' shell blocks: (program, arguments)."""
    found = []
    for page in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))):
        for block in re.findall(r"```bash\n(.*?)```", page.read_text(), re.S):
            for part in re.split(r"\n|&&", block.replace("\\\n", " ")):
                if re.match(r"\s*python \w+\.py ", part):
                    _, name, *rest = shlex.split(part, comments=True)
                    name += f" {rest.pop(0)}" if name in ("prepare.py", "export.py") else ""
                    found.append((name, rest))
    return found


def test_there_are_commands_to_check():
    assert {"train.py", "sample.py", "eval.py"} <= {name for name, _ in commands()}


@pytest.mark.parametrize("name, args", commands(), ids=lambda x: str(x)[:60])
def test_every_command_in_the_pages_has_flags_that_exist(name, args):
    args = [a for a in args if not a.startswith("$")]
    flags.read(SETTINGS[name], args, name)


def test_ci_runs_exactly_the_test_command_of_the_readme():
    text, ci = ((ROOT / file).read_text() for file in ("README.md", ".ci/run"))
    line = re.search(r"^pip install -r requirements-dev.txt && .*$", text, re.M)
    assert line and line.group() == "pip install -r requirements-dev.txt && pytest"
    assert "grep -m1 '^pip install -r requirements-dev.txt && ' README.md" in ci


def test_the_map_names_every_file_and_folder_of_the_root():
    tree = (ROOT / "README.md").read_text().split("## The code")[1].split("```")[1]
    named = re.findall(r"(?:^|(?<=/ ))[a-z]+(?:\.py|/)(?= |$)", tree, re.M)
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True,
                             check=True).stdout.splitlines()
    folders = {f"{file.split('/')[0]}/" for file in tracked if "/" in file} - {".ci/"}
    assert sorted(named) == sorted({p.name for p in ROOT.glob("*.py")} | folders)


def test_every_file_that_the_map_names_is_in_its_package():
    tree = (ROOT / "README.md").read_text().split("## The code")[1].split("```")[1]
    for package, files in re.findall(r"^([a-z]+)/ +(.*)$", tree, re.M):
        for file in re.findall(r"\w+\.py", files):
            assert (ROOT / package / file).exists() or (ROOT / file).exists(), f"{package}/{file}"


def test_the_readme_is_short_and_its_reading_list_too():
    lines = (ROOT / "README.md").read_text().splitlines()
    assert len(lines) < 200
    files = ["train.py", "model.py", "data.py", "layers/cross_entropy.py", "lora.py"]
    assert all(f"`{file}`" in "\n".join(lines) for file in files)
    assert sum(len((ROOT / file).read_text().splitlines()) for file in files) < 2000


def python(*args: str) -> subprocess.CompletedProcess:
    """One of the programs, in the project's folder, without a GPU."""
    return subprocess.run([sys.executable, *args], capture_output=True, text=True, cwd=ROOT,
                          timeout=1500, env={**os.environ, "CUDA_VISIBLE_DEVICES": ""})


@pytest.mark.slow
def test_the_demo_learns_kinyarwanda_and_keeps_english(tmp_path):
    """A plain run, as a newcomer's: Kinyarwanda falls by over 40 %, English rises less than 5 %."""
    done = python("train.py", "--mode", "cpt", "--out", str(tmp_path / "run"))
    assert done.returncode == 0, done.stderr[-2000:]
    change = {lang: float(re.search(rf"^{lang} .*?([+-][\d.]+)%", done.stdout, re.M)[1])
              for lang in ("Kinyarwanda", "English")}
    assert change["Kinyarwanda"] < -40 and change["English"] < 5, done.stdout
    assert done.stdout.count("before:") == done.stdout.count("after: ") == 3
    assert "demo" in done.stderr
    for file in ("model/model.safetensors", "report.html", "metrics.jsonl", "samples.txt",
                 "settings.toml"):
        assert (tmp_path / "run" / file).exists()
    again = python("sample.py", "--model", str(tmp_path / "run/model"), "--prompt", "Umugabo",
                   "--max-new-tokens", "8")  # the next command it names
    assert again.returncode == 0 and again.stdout.startswith("Umugabo"), again.stderr
