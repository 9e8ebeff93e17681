"""Every recipe runs by its own file, with only model, data and sizes replaced; docs name it."""

from __future__ import annotations

import ast
import json
import re
import tomllib
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest

import train
from helpers import tiny
from preparation.bin_writer import BinWriter
from preparation.text import prepare_text
from runtime import flags as config
from runtime.paths import ROOT
from tokenization.document import Document
from tokenization.tokenizer import Tokenizer
from training.settings import Settings

RECIPES = sorted((ROOT / "recipes").glob("*.toml"), key=lambda r: r.stem)
NAMED = """alma-1-monolingual alma-2-parallel alma-2-parallel-lora alma-r llammas-1-cpt
llammas-2-instruct llammas-mt wikipedia-lora afriquellm-cpt chinese-llama-lora uccix-mt
qlora-8b-one-gpu t4-1b full-1b-24gb""".split()
SIZES = {"seq_len": "48", "rows": "2", "tokens_per_step": "192", "steps": "2", "lora_rank": "8"}


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A tiny model, and a bin under each name that a recipe uses."""
    root = tmp_path_factory.mktemp("recipes")
    tiny.folder(root / "model", "llama2", max_position_embeddings=64)
    (root / "text.txt").write_text("\n".join(f"{x} {i}" for i in range(9) for x in tiny.SENTENCES))
    tok = Tokenizer.open(root / "model")
    draw = np.random.default_rng(0)
    for name in {x for r in RECIPES for x in names(r)}:
        kind = "mt" if name in ("mt", "mt-chat") else "pairs" if name == "pairs" else \
            "chat" if name.startswith("alpaca") else "text"
        if kind == "text":
            prepare_text([str(root / "text.txt")], root / "model", root / name)
            continue
        writer = BinWriter(root / name, tok.fingerprint, tok.vocab_size, kind)
        for _ in range(80):
            ids = [1, *draw.integers(3, tiny.V, 14).tolist(), 2]
            writer.add(Document(ids, [False] * 6 + [True] * 10, 20))
        writer.close({"documents": {}}, [])
    return root


def names(recipe: Path) -> list[str]:
    """The bins of a recipe, without folder and weight."""
    return [re.sub(r"^bins/|:[\d.]+$", "", x) for x in tomllib.loads(recipe.read_text())["data"]]


def test_all_recipes_are_there_and_say_where_they_come_from():
    assert sorted(NAMED) == [r.stem for r in RECIPES]
    for recipe in RECIPES:
        head = re.match(r"(?:#.*\n)+", recipe.read_text())[0]
        told = "Ours:" in head or "Source: none" in head
        assert told or ("Same as the source:" in head and "Changed:" in head), recipe.name


def test_every_setting_of_a_recipe_is_one_that_the_code_reads():
    """`s.NAME` or `settings.NAME` in train.py or in training/, but for settings.py itself. (A
    recipe that sets anything else is refused when it is read.)"""
    read = set()
    for path in (ROOT / "train.py", *(ROOT / "training").glob("*.py")):
        if path.name == "settings.py":
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
                of = node.value
                name = of.id if isinstance(of, ast.Name) else getattr(of, "attr", "")
                if name in ("s", "settings"):
                    read.add(node.attr)
    assert not {f.name for f in fields(Settings)} - read


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda r: r.stem)
def test_a_recipe_runs_by_its_own_file_with_only_model_data_and_sizes_replaced(
        recipe, place, tmp_path):
    own = tomllib.loads(recipe.read_text())
    assert set(own) <= {f.name for f in fields(Settings)}
    flags = ["--model", f"{place}/model", "--out", f"{tmp_path}/out", "--device", "cpu", "--data",
             *(x.replace("bins/", f"{place}/") for x in own["data"])]
    full = own.get("tune", "full") == "full"
    sizes = list(SIZES.items())
    if full:
        sizes.pop()  # the rank
    for name, size in sizes:
        flags += [f"--{name.replace('_', '-')}", size]
    flags += ["--train-layers", "1"] if "train_layers" in own else []
    s, origins = config.read(Settings, [str(recipe), *flags], "train.py")
    for name, value in own.items():  # what is not replaced is what the recipe says
        if name not in (*SIZES, "model", "data", "out", "train_layers"):
            assert getattr(s, name) == value and origins[name] == str(recipe)
    assert train.train(s, origins) == 0
    lines = [json.loads(x) for x in (tmp_path / "out/metrics.jsonl").read_text().splitlines()]
    assert [x["step"] for x in lines if "loss" in x] == [1, 2]
    assert all(np.isfinite(x["loss"]) for x in lines if "loss" in x)
    if "best" in own:  # as ALMA chooses
        assert own["best"] in names(recipe) and list((tmp_path / "out/best").glob("step-*"))
    adapter = (tmp_path / "out/model/adapter_config.json").exists()
    assert adapter != full


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda r: r.stem)
def test_a_recipe_is_in_the_docs_and_its_data_too(recipe):
    assert recipe.stem in (ROOT / "docs/recipes.md").read_text()
    told = (ROOT / "docs/data.md").read_text()
    for name in names(recipe):
        assert f"`bins/{name}`" in told, name
