"""The same run on one rank or two, by DDP or FSDP2, cut and resumed on other numbers of ranks: real
processes that talk by gloo."""

from __future__ import annotations

import dataclasses
import json
import random
from collections.abc import Callable
from pathlib import Path

import matplotlib.pyplot  # noqa: F401  # what every child would else import
import pytest
import torch
import torch.distributed.fsdp
from safetensors.torch import load_file

import corpus
import fork
import log
import tiny
import train

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """Tiny models, tied and not, two texts of unequal size, and their bins."""
    root = tmp_path_factory.mktemp("ranks")
    for name, shape in (("tied", "llama32"), ("untied", "biases")):
        tiny.folder(root / name, shape, max_position_embeddings=64)
    draw = random.Random(0)
    for name, n in (("kin", 60), ("eng", 30)):
        lines = [" ".join(draw.choice(tiny.SENTENCES) for _ in range(draw.randint(1, 4))) + f" {i}"
                 for i in range(n)]
        (root / f"{name}.txt").write_text("\n".join(lines) + "\n")
        corpus.prepare([str(root / f"{name}.txt")], root / "tied", root / name)
    return root


def settings(place: Path, out: str, **changes) -> train.Settings:
    """Two sources, three micro-batches of one row a rank on two ranks, rows of cut documents."""
    return train.Settings(**{
        "model": str(place / "tied"), "data": [f"{place}/kin:3", f"{place}/eng:1"],
        "out": str(place / out), "seq_len": 32, "rows": 1, "tokens_per_step": 192, "lr": 1e-3,
        "hold_out": 0.05, "eval_tokens": 60, "prompts": ["Umwana"], "eval_every": 1000,
        "dtype": "fp32", "device": "cpu", "steps": 20, "rank_timeout": 60.0, **changes})


def action(s: train.Settings, during: Callable[[train.Run], object] = id):
    """What a rank does: the run, as the command would, or going on with one. `during` is called as
    each step begins, with run.step steps done."""

    def run() -> int:
        real = train.Run.seed

        def seed(self: train.Run) -> None:
            during(self)
            real(self)

        train.Run.seed = seed  # in this child alone
        read = (lambda: train.read_settings(["--resume", "--out", s.out])) if s.resume else (
            lambda: (s, dict.fromkeys((f.name for f in dataclasses.fields(s)), "default")))
        return log.run(lambda: train.train(*read()))

    return run


def run(s: train.Settings, world: int = 1, codes: set[int] = frozenset({0}),
        during: Callable[[train.Run], object] = id, **env: str) -> str:
    """Train on so many ranks, check how they end, and give what they said."""
    said = Path(s.out).with_name(f"said-{Path(s.out).name}")
    found = fork.ends(fork.together(world, action(s, during), said, **env))
    text = "".join(f.read_text() for f in sorted(said.parent.glob(f"{said.name}-*")))
    assert set(found) <= codes, (found, text[-3000:])
    return text


def losses(out: Path) -> dict[int, float]:
    lines = [json.loads(x) for x in (out / "metrics.jsonl").read_text().splitlines()]
    steps = [x["step"] for x in lines if "loss" in x]
    assert steps == list(range(1, len(steps) + 1)), "each step stands once, in order"
    return {x["step"]: x["loss"] for x in lines if "loss" in x}


def result(out: Path) -> dict[str, torch.Tensor]:
    (file,) = (out / "model").glob("*.safetensors")
    return load_file(file)


TUNES = {
    "full, tied": {},
    "full, untied, biases": {"model": "untied"},
    "some layers": {"model": "untied", "train_layers": ["1"], "train_embeddings": True},
    "LoRA": {"tune": "lora", "lora_rank": 4},
    "DoRA with embeddings and norms": {"tune": "lora", "dora": True, "lora_rank": 4,
                                       "train_embeddings": True, "train_norms": True},
    "QLoRA": {"tune": "qlora", "lora_rank": 4},
    "recomputed": {"recompute": True},
}


@pytest.mark.parametrize("tune", TUNES)
def test_twenty_steps_are_the_same_on_one_rank_and_on_two_by_ddp_and_fsdp(place, tune):
    changes = dict(TUNES[tune])
    if "model" in changes:
        changes["model"] = str(place / changes["model"])
    out = {how: f"{tune}-{how}" for how in ("none", "ddp", "fsdp")}
    for how, name in out.items():
        run(settings(place, name, shard=how, **changes), world=1 if how == "none" else 2)
    one = losses(place / out["none"])
    assert len(one) == 20 and one[20] < one[1]
    for how in ("ddp", "fsdp"):
        two = losses(place / out[how])
        assert all(two[k] == pytest.approx(one[k], rel=1e-5) for k in one), how
        a, b = result(place / out["none"]), result(place / out[how])
        assert a.keys() == b.keys()
        for name in a:
            torch.testing.assert_close(a[name], b[name], atol=1e-5, rtol=1e-5)
        bpb = [[json.loads(x)["bits_per_byte"] for x in
                (place / name / "metrics.jsonl").read_text().splitlines() if "bits_per" in x]
               for name in (out["none"], out[how])]
        for x, y in zip(*bpb, strict=True):
            assert x == pytest.approx(y, rel=1e-4)
