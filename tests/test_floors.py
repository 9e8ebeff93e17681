"""The shape of the project: imports only go down, modules stay short, and nothing unpickles."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FLOORS = {
    "train": 12, "sample": 12, "eval": 12, "prepare": 12, "export": 12,
    "plan": 11,
    "run": 10,  # what stands around the loop
    "guards": 9, "looks": 9,
    "tasks": 8, "ask": 8,
    "generate": 7, "overlap": 7,
    "pairs": 7,
    "sources": 6, "examples": 6, "checkpoint": 6, "card": 6, "sheet": 6, "beam": 6,
    "watch": 6,
    "weights": 5, "memory": 5, "corpus": 5, "decode": 5, "judge": 5, "preference": 5,
    "model": 4, "metrics": 4, "fp8": 4, "int8": 4,
    "layers": 3, "loss": 3, "chat": 3, "optim": 3, "words": 3,
    "lora": 2, "data": 2, "sampling": 2, "tokenizer": 2, "ranks": 2, "report": 2,
    "suites": 2, "shards": 2,
    "config": 1, "flags": 1, "attention": 1, "families": 1, "hub": 1, "nf4": 1,
    "web": 1,  # strangers at the door: it knows no model, only a function that answers
    "log": 0, "ahead": 0, "threads": 0,
}
COMMANDS = {name for name, floor in FLOORS.items() if floor == 12}
KNOW_KINYARWANDA = {"prepare", "train", "suites", "judge"}  # train: the demo
FOREIGN = {"safetensors", "sentencepiece", "tokenizers", "huggingface_hub", "tyro", "rich",
           "jinja2", "matplotlib", "pyarrow", "bitsandbytes", "sacrebleu"}


def imports(path: Path) -> set[str]:
    """Top names of everything a file imports, wherever in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {a.name.split(".")[0] for a in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add((node.module or "").split(".")[0])
    return found


def shipped() -> list[Path]:
    return [*ROOT.glob("*.py"), *ROOT.glob("kinyarwanda/*.py"), *ROOT.glob("bench/*.py")]


def test_every_module_has_a_floor():
    assert {p.stem for p in ROOT.glob("*.py")} == set(FLOORS)


@pytest.mark.parametrize("name", FLOORS)
def test_imports_only_go_down(name):
    for other in imports(ROOT / f"{name}.py") & set(FLOORS):
        assert other not in COMMANDS, f"{name} imports the command {other}"
        assert FLOORS[other] < FLOORS[name], f"{name} imports {other}"
    assert "kinyarwanda" not in imports(ROOT / f"{name}.py") or name in KNOW_KINYARWANDA


@pytest.mark.parametrize("path", shipped(), ids=lambda p: str(p.relative_to(ROOT)))
def test_modules_are_short_and_open_with_an_essay(path):
    assert len(path.read_text().splitlines()) <= 450
    assert ast.get_docstring(ast.parse(path.read_text()))


@pytest.mark.parametrize("path", shipped(), ids=lambda p: str(p.relative_to(ROOT)))
def test_nothing_unpickles_or_runs_text(path):
    text = path.read_text()
    for word in (r"\bpickle\b", r"torch\.load\b", r"(?<![.\w])eval\(", r"(?<![.\w])exec\(",
                 "trust_remote_code=True"):
        assert not re.search(word, text), f"{path.name}: {word}"


def test_each_foreign_library_has_one_home():
    homes: dict[str, set[str]] = {}
    for path in ROOT.glob("*.py"):
        for name in imports(path) & FOREIGN:
            homes.setdefault(name, set()).add(path.stem)
    # safetensors: headers, weights in folders, adapters, resume points; tyro: its flags, and its
    # mark for positional ones; pyarrow: parquet files, and the cutting of many texts
    shared = {"safetensors": {"weights", "shards", "lora", "checkpoint", "export"},
              "tyro": {"config", "prepare"}, "jinja2": {"report", "chat", "suites", "sheet"},
              "pyarrow": {"corpus", "suites", "words"}, "bitsandbytes": {"nf4", "optim"},
              "huggingface_hub": {"weights", "hub", "export"}}
    for name, where in homes.items():
        assert len(where) == 1 or where <= shared.get(name, set()), f"{name} in {sorted(where)}"
