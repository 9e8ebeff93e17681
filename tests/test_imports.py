"""Imports go one way, nothing is unpickled, and every file says what it is."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from runtime.paths import ROOT, source_files

# A package or root module needs only what stands in an earlier line; those of one line do not
# import each other.
ORDER = [
    ["runtime"],
    ["languages", "layers", "tokenization", "data"],
    ["model", "lora"],
    ["preparation", "checkpoints"],
    ["inference"],
    ["evaluation"],
    ["synthesis", "vocabulary", "serving", "reports"],
    ["training"],
    ["train", "sample", "eval", "prepare", "export"],
]
LEVEL = {name: level for level, names in enumerate(ORDER) for name in names}
UNSAFE = (r"\bpickle\b", r"torch\.load\b", r"(?<![.\w])eval\(", r"(?<![.\w])exec\(",
          "trust_remote_code=True")


def imported(source: str) -> set[str]:
    """Top names of everything that a file imports, wherever in it."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add((node.module or "").split(".")[0])
    return names


def wrong_imports(home: str, source: str) -> list[str]:
    """Packages and root modules that a file of `home` must not import, but does."""
    ours = imported(source) & set(LEVEL) - {home}
    return sorted(name for name in ours if LEVEL[name] >= LEVEL[home])


def home_of(path: Path) -> str:
    """The package of a file, or its own name if it stands at the root."""
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


@pytest.mark.parametrize("path", source_files(), ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_go_one_way(path):
    assert wrong_imports(home_of(path), path.read_text(encoding="utf-8")) == []


def test_an_import_that_goes_back_is_found():
    assert wrong_imports("layers", "def f():\n    from training.settings import Settings") \
        == ["training"]
    assert wrong_imports("train", "import sample") == ["sample"]


def test_the_root_holds_the_eight_files_of_the_design():
    assert sorted(p.name for p in ROOT.glob("*.py")) == [
        "data.py", "eval.py", "export.py", "lora.py", "model.py", "prepare.py", "sample.py",
        "train.py"]


@pytest.mark.parametrize("path", [*source_files(), *ROOT.glob("bench/*.py")],
                         ids=lambda p: str(p.relative_to(ROOT)))
def test_every_file_says_what_it_is_and_nothing_is_unpickled(path):
    text = path.read_text(encoding="utf-8")
    assert ast.get_docstring(ast.parse(text))
    assert [word for word in UNSAFE if re.search(word, text)] == []
