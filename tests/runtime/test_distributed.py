"""The same run on one rank or two, by DDP or FSDP2, cut and resumed on other numbers of ranks: real
processes that talk by gloo."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import os
import random
import re
import signal
import time
from collections.abc import Callable
from pathlib import Path

import jinja2  # noqa: F401  # what every child would else import
import matplotlib.pyplot  # noqa: F401
import pytest
import torch
import torch.distributed as dist
import torch.distributed.fsdp
import tyro  # noqa: F401
from safetensors.torch import load_file

import train
from helpers import fork, tiny
from preparation import text as corpus
from preparation.bin_writer import BinWriter
from runtime import console as log
from runtime.distributed import Ranks
from tokenization.document import Document
from tokenization.tokenizer import Tokenizer
from training import run as life

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
        again = ["--resume", "--out", s.out, *([] if s.shard == "auto" else ["--shard", s.shard])]
        read = (lambda: train.read_settings(again)) if s.resume else (
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


def assert_equal(one: Path, two: Path, steps: int = 20) -> None:
    """That two runs have the same losses at every step and end with the same weights, to 1e-5."""
    a, b = losses(one), losses(two)
    assert all(b[k] == pytest.approx(a[k], rel=1e-5) for k in a) and len(a) == len(b) == steps
    a, b = result(one), result(two)
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], atol=1e-5, rtol=1e-5)


TUNES = {
    "full, tied": {},
    "full, untied, biases": {"model": "untied"},
    "some layers": {"model": "untied", "train_layers": ["1"], "train_embeddings": True},
    "LoRA": {"tune": "lora", "lora_rank": 4},
    "DoRA with embeddings and norms": {"tune": "lora", "dora": True, "lora_rank": 4,
                                       "train_embeddings": True, "train_norms": True},
    "QLoRA": {"tune": "qlora", "lora_rank": 4},
    "recomputed": {"recompute": True},
    "norms and gates made again": {"recompute_light": True, "tune": "lora", "lora_rank": 4},
    "averaged": {"model": "untied", "ema": 0.9, "label_smoothing": 0.1, "best": "kin",
                 "eval_every": 5},
}


ALWAYS = ("full, tied", "DoRA with embeddings and norms", "QLoRA")


@pytest.mark.parametrize("tune", [
    x if x in ALWAYS else pytest.param(x, marks=pytest.mark.slow) for x in TUNES])
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
        assert_equal(place / out["none"], place / out[how])
        bpb = [[json.loads(x)["bits_per_byte"] for x in
                (place / name / "metrics.jsonl").read_text().splitlines() if "bits_per" in x]
               for name in (out["none"], out[how])]
        for x, y in zip(*bpb, strict=True):
            assert x == pytest.approx(y, rel=1e-4)


KINDS = {"sft": "chat", "mt": "mt", "dpo": "pairs", "cpo": "pairs"}  # cpt is above
WHAT = {"full": {}, "LoRA": {"tune": "lora", "lora_rank": 4},
        "DoRA": {"tune": "lora", "lora_rank": 4, "dora": True},
        "QLoRA": {"tune": "qlora", "lora_rank": 4},
        "LoRA with embeddings": {"tune": "lora", "lora_rank": 4, "train_embeddings": True}}
BOTH = [("sft", "full"), ("dpo", "LoRA with embeddings")]  # dpo, full: with a kept reference


@pytest.fixture(scope="module")
def answers(place) -> dict[str, list[str]]:
    """Two bins of each kind whose documents are asked and answered: short ones of uneven masks."""
    tokenizer = Tokenizer.open(place / "tied")
    draw, found = random.Random(2), {}
    for kind in set(KINDS.values()):
        found[kind] = [f"{place}/bin-{kind}-a:3", f"{place}/bin-{kind}-b:1"]
        for name, n in (("a", 80), ("b", 40)):
            writer = BinWriter(place / f"bin-{kind}-{name}", tokenizer.fingerprint,
                               tokenizer.vocab_size, kind)
            for _ in range(n):
                asked, told = ([draw.randrange(3, tiny.V) for _ in range(draw.randint(2, 7))]
                               for _ in range(2))
                writer.add(Document([1, *asked, *told, 2], [False] * (1 + len(asked))
                                    + [True] * (1 + len(told)), len(told)))
            writer.close({}, [])
    return found


@pytest.mark.parametrize("mode,tune", [
    x if x in BOTH else pytest.param(*x, marks=pytest.mark.slow)
    for x in itertools.product(KINDS, WHAT)])
def test_every_mode_is_the_same_on_one_rank_and_on_two(place, answers, mode, tune):
    changes = {**WHAT[tune], "mode": mode, "data": answers[KINDS[mode]], "hold_out": 0.0}
    one, *others = ("none", "ddp", "fsdp")
    for how in (one, *others):
        run(settings(place, f"{mode}-{tune}-{how}", shard=how, **changes), 1 if how == one else 2)
    for how in others:
        assert_equal(place / f"{mode}-{tune}-{one}", place / f"{mode}-{tune}-{how}")


@pytest.mark.parametrize("tune", ["full", pytest.param("LoRA with embeddings",
                                                       marks=pytest.mark.slow)])
def test_gradients_that_meet_after_every_micro_batch_are_the_same(place, tune, monkeypatch):
    """As they do by fsdp where whole ones would be too much to keep."""
    run(settings(place, f"seldom-{tune}", **WHAT[tune]))
    monkeypatch.setattr(life.shares, "meets_often", lambda *_: True)

    def often(run: train.Run) -> None:
        assert run.ranks.often and run.micro_batches == 3

    run(settings(place, f"often-{tune}", shard="fsdp", **WHAT[tune]), 2, during=often)
    assert_equal(place / f"seldom-{tune}", place / f"often-{tune}")


def test_gradients_meet_often_where_often_would_fill_a_tenth_of_a_gpu(place):
    model = tiny.ours(tiny.peer("biases"), "biases")
    cut = sum(p.numel() for n, p in model.named_parameters() if p.dim() == 2)
    assert not life.shares.meets_often(model, 40.1 * cut / 2**30)
    assert life.shares.meets_often(model, 39.9 * cut / 2**30)


def stop_at(step: int, rank: int = 0, number: int = signal.SIGTERM) -> Callable[[train.Run], None]:
    """Send one rank a signal while it takes that step."""

    def during(run: train.Run) -> None:
        if run.step == step - 1 and run.ranks.rank == rank:
            os.kill(os.getpid(), number)

    return during


def noting(place: Path, name: str) -> Callable[[train.Run], None]:
    """Write down, by step, a hash of every row that any rank trains on."""

    def during(run: train.Run) -> None:
        if "next" in vars(run.loader):
            return
        draw = run.loader.next

        def noted():
            batch = draw()
            with open(place / f"rows-{name}", "a") as file:
                for i in range(len(batch.tokens)):
                    row = [getattr(batch, x)[i].numpy().tobytes()
                           for x in ("tokens", "targets", "doc", "pos")]
                    digest = hashlib.sha256(b"".join(row)).hexdigest()
                    file.write(f"{run.step + 1} {digest}\n")
            return batch

        run.loader.next = noted

    return during


@pytest.mark.parametrize("how", [pytest.param("ddp", marks=pytest.mark.slow), "fsdp"])
def test_bf16_weights_are_rounded_alike_by_one_rank_and_by_two(place, how):
    """Bit for bit, also where two ranks are cut and one goes on: a sum of two gradients is the same
    in any order, nothing is clipped, and what a number is rounded by depends on its place."""
    changes = {"steps": 12, "optimizer": "adamw-bf16", "dtype": "bf16", "tokens_per_step": 64,
               "clip": 1e9, "model": str(place / "untied")}
    if not (place / "narrow").exists():
        run(settings(place, "narrow", **changes))
    run(settings(place, f"narrow-{how}", shard=how, **changes), world=2)
    cut = f"narrow-{how}-cut"
    run(settings(place, cut, shard=how, **changes), world=2, codes={143}, during=stop_at(7))
    run(settings(place, cut, resume=True, shard="none"))
    one = result(place / "narrow")
    assert len(losses(place / "narrow")) == 12
    for name in (f"narrow-{how}", cut):
        assert losses(place / name) == pytest.approx(losses(place / "narrow"), rel=1e-6)
        two = result(place / name)
        assert one.keys() == two.keys() and all(torch.equal(one[k], two[k]) for k in one)


@pytest.mark.parametrize("how,worlds", [
    ("fsdp", (1, 2, 1)), ("fsdp", (2, 4, 2)), *(pytest.param(*x, marks=pytest.mark.slow) for x in (
        ("ddp", (1, 2, 1)), ("ddp", (2, 4, 2)), ("fsdp", (3, 1, 4)), ("ddp", (4, 3, 2))))])
def test_thirty_steps_are_ten_on_some_ranks_ten_on_others_and_ten_on_some(place, how, worlds):
    """The same rows by hash, the same losses and weights as one rank undisturbed."""
    def rows(name: str) -> list[str]:
        return sorted((place / f"rows-{name}").read_text().splitlines())

    def both(a, b):
        return lambda run: (a(run), b(run))

    changes = {"steps": 30, "tune": "lora", "dora": True, "lora_rank": 4, "train_embeddings": True,
               "seq_len": 16}  # twelve rows a step
    if not (place / "thirty").exists():
        run(settings(place, "thirty", **changes), during=noting(place, "thirty"))
    out = f"thirty-{how}-{worlds}"
    for i, world in enumerate(worlds):
        s = settings(place, out, **changes, resume=i > 0, shard=how if world > 1 else "none")
        cut = [stop_at(10), stop_at(20, rank=min(1, world - 1)), id][i]
        said = run(s, world, {143 if i < 2 else 0}, during=both(noting(place, out), cut))
        assert i == 0 or f"resumed from {place}/{out}/checkpoints/step-0000{i}0" in said
    assert rows(out) == rows("thirty")
    assert_equal(place / "thirty", place / out, steps=30)
    if worlds[0] == 1:
        one, cut = losses(place / "thirty"), losses(place / out)
        assert [cut[k] for k in range(1, 11)] == [one[k] for k in range(1, 11)], "bit for bit"


@pytest.mark.parametrize("how", ["ddp", "fsdp"])
def test_two_ranks_cut_and_resumed_equal_two_that_were_not_bit_for_bit(place, how):
    changes = {"steps": 12, "tune": "lora", "lora_dropout": 0.2, "shard": how,
               "train_embeddings": True, "ema": 0.9, "best": "kin", "eval_every": 5}
    run(settings(place, f"uncut-{how}", **changes), world=2)
    run(settings(place, f"cut-{how}", **changes), world=2, codes={143}, during=stop_at(7))
    run(settings(place, f"cut-{how}", resume=True), world=2)
    assert losses(place / f"cut-{how}") == losses(place / f"uncut-{how}")
    a, b = result(place / f"cut-{how}"), result(place / f"uncut-{how}")
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize("how", ["ddp", "fsdp"])
def test_no_rank_writes_more_than_its_part(place, how):
    run(settings(place, f"parts-{how}", steps=2, shard=how), world=2)
    folder = place / f"parts-{how}/checkpoints/step-000002"
    sizes = [sum(f.stat().st_size for f in folder.glob(f"*-{rank}.safetensors")) for rank in (0, 1)]
    assert max(sizes) < 0.62 * sum(sizes)


def poison(step: int, rank: int, value: float = float("nan"),
           steps: int = 1) -> Callable[[train.Run], None]:
    """Spoil the last micro-batch's loss on one rank, in so many steps from that one on."""

    def during(run: train.Run) -> None:
        if run.ranks.rank != rank or hasattr(run, "calls"):
            return
        run.calls, objective = 0, train.NLL.total

        def total(model, batch):
            run.calls += 1
            bad = step <= run.step + 1 < step + steps and run.calls % run.micro_batches == 0
            return objective(model, batch) * (value if bad else 1.0)

        object.__setattr__(train.NLL, "total", total)

    return during


def poison_gradient(step: int, rank: int) -> Callable[[train.Run], None]:
    """Spoil one number of one gradient on one rank, in one step; every loss is as it should be."""

    def spoiled(gradient):
        gradient = gradient.clone()
        gradient[3] = float("inf")
        return gradient

    def during(run: train.Run) -> None:
        if run.step == step - 1 and run.ranks.rank == rank:
            run.hook = run.model.model.norm.weight.register_hook(spoiled)
        elif hasattr(run, "hook"):
            run.hook.remove()

    return during


def unmoved(step: int, poison: Callable[[train.Run], None]) -> Callable[[train.Run], None]:
    """Besides, assert on every rank that this step changes no bit of the weights."""

    def during(run: train.Run) -> None:
        poison(run)
        held = [life.shares.rows(p.detach())[1].clone() for p in run.model.parameters()]
        if run.step == step - 1:
            run.as_they_were = held
        elif run.step == step:
            assert all(map(torch.equal, held, run.as_they_were))
        elif run.step == step + 1:
            assert not all(map(torch.equal, held, run.as_they_were))

    return during


@pytest.mark.parametrize("how,what", [
    ("ddp", float("nan")), ("fsdp", float("inf")), ("fsdp", "a gradient"),
    pytest.param("ddp", "a gradient", marks=pytest.mark.slow)])
def test_a_step_that_is_not_finite_on_one_rank_moves_no_rank(place, how, what):
    name, loss = f"bad-{how}-{what}", what != "a gradient"
    spoil = poison(3, rank=1, value=what) if loss else poison_gradient(3, rank=1)
    run(settings(place, name, steps=5, shard=how), world=2, during=unmoved(3, spoil))
    lines = [json.loads(x) for x in (place / name / "metrics.jsonl").read_text().splitlines()]
    skipped = {x["step"]: x["skipped"] for x in lines if "loss" in x and x["loss"] is None}
    assert skipped == {3: 1}
    odd = [json.loads(x) for x in (place / name / "odd_steps.jsonl").read_text().splitlines()]
    assert [(x["step"], x["what"]) for x in odd] == [(3, "not finite")]
    named = sum(map(len, odd[0]["documents"].values()))
    assert 0 < named < (30 if loss else 60), "those of one rank's rows, or of the step's"


def test_three_bad_steps_in_a_row_end_all_ranks_with_4_and_what_was_saved_stands(place):
    said = run(settings(place, "worse", steps=9), world=2, codes={4},
               during=poison(3, rank=1, steps=3))
    assert "three steps in a row were not finite" in said
    assert len((place / "worse/odd_steps.jsonl").read_text().splitlines()) == 3
    assert "resumed from" in run(settings(place, "worse", resume=True), world=2)
    assert len(losses(place / "worse")) == 9


@pytest.mark.slow
def test_products_in_bf16_and_fp16_are_the_same_by_fsdp_as_by_ddp(place):
    """What is gathered in the dtype of products is what one rank would cast to it."""
    for dtype in ("bf16", "fp16"):
        for how in ("ddp", "fsdp"):
            run(settings(place, f"{dtype}-{how}", shard=how, dtype=dtype, steps=8), world=2)
        a, b = losses(place / f"{dtype}-ddp"), losses(place / f"{dtype}-fsdp")
        assert all(b[k] == pytest.approx(a[k], rel=1e-4) for k in a)
        x, y = result(place / f"{dtype}-ddp"), result(place / f"{dtype}-fsdp")
        assert {t.dtype for t in y.values()} == {torch.float32}
        for name in x:  # AdamW moves by the rate whatever the gradient's size: a sign may differ
            assert (x[name] - y[name]).abs().mean() < 2e-4


@pytest.mark.slow
def test_compiled_blocks_are_the_same_on_two_ranks(place):
    run(settings(place, "not-compiled", steps=4))
    for how in ("ddp", "fsdp"):
        run(settings(place, f"compiled-{how}", steps=4, shard=how, compile=True), world=2)
        a, b = losses(place / "not-compiled"), losses(place / f"compiled-{how}")
        assert all(b[k] == pytest.approx(a[k], rel=1e-5) for k in a)


def test_gradients_are_those_of_torchs_own_data_parallel(place):
    """Bucket by bucket, with a parameter that only one rank uses: our sum is DDP's mean by two."""
    from torch.nn.parallel import DistributedDataParallel

    def both() -> int:
        ranks = Ranks.start("cpu", 30)
        x = torch.randn(4, 8, generator=torch.Generator().manual_seed(ranks.rank))
        grads = []
        for ours in (True, False):
            torch.manual_seed(0)
            model = torch.nn.ModuleList(torch.nn.Linear(8, 8) for _ in range(5))
            model.forward = lambda x, m=model: m[4](m[2](m[1](m[0](x)))) + (
                m[3](x) if ranks.rank else 0)
            if ours:
                life.shares.BUCKET = 300  # bytes: a bucket for each weight and bias
                ranks.share(model, "ddp", torch.float32)
                assert len(ranks.buckets) > 4
                for last in (False, True):
                    ranks.meet(last)
                    model(x).square().sum().backward()
                grads.append([p.grad for p in model.parameters()])
                assert len(ranks.gradients(model.parameters())[0]) == 10
                grads[-1] = [p.grad for p in model.parameters()]
            else:
                theirs = DistributedDataParallel(model, find_unused_parameters=True)
                for _ in range(2):
                    theirs(x).square().sum().backward()
                grads.append([2 * p.grad for p in model.parameters()])
        for a, b in zip(*grads, strict=True):
            torch.testing.assert_close(a, b)
        return 0

    said = place / "said-gradients"
    ends = fork.ends(fork.together(2, both, said))
    assert ends == [0, 0], said.with_name("said-gradients-0").read_text()[-2000:]


def agents(**kept: str) -> dist.TCPStore:
    """The store that torchrun's agents keep through all attempts; not in this process, for one
    that has had such a thread in it must not fork any more."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True)
    for key, value in kept.items():
        store.set(key, value)
    return store


def test_ranks_that_are_started_again_meet_each_other_and_not_the_dead(place):
    """The agents of torchrun keep one store for all attempts, and count them each for itself."""
    def keep() -> None:
        store = agents(exception_dump="by one that died: NCCL asks for it, under no prefix")
        (place / "port").write_text(str(store.port))
        signal.pause()

    def meet() -> None:
        rank, attempt, late = (int(os.environ[x]) for x in ("RANK", "ATTEMPT", "LATE"))
        os.environ["TORCHELASTIC_RESTART_COUNT"] = str(attempt * rank)
        if rank == late:
            time.sleep(0.5)  # the others find what it left the last time
        ranks = Ranks.start("cpu", 20)
        words = ["", "umwana", "abana ☀"]
        assert ranks.gather(f"{attempt}{words[rank]}") == [f"{attempt}{x}" for x in words]
        store = dist.distributed_c10d._get_default_store()
        store = getattr(store, "_underlying_non_prefix_store", store)
        assert not store.check(["exception_dump"])
        ranks.barrier()  # rank 0 has the store, and dies with all others
        os.kill(os.getpid(), signal.SIGKILL)

    keeper = fork.child(keep, place / "said-keeper")
    try:
        while not (place / "port").exists() or not (port := (place / "port").read_text()):
            assert os.waitpid(keeper, os.WNOHANG)[0] == 0
            time.sleep(0.01)
        for attempt, late in enumerate((9, 0, 1, 2)):
            said = place / f"said-attempt-{attempt}"
            ends = fork.ends(fork.together(
                3, meet, said, MASTER_PORT=port, TORCHELASTIC_USE_AGENT_STORE="True",
                ATTEMPT=str(attempt), LATE=str(late)))
            assert ends == [-signal.SIGKILL] * 3, "".join(
                said.with_name(f"{said.name}-{i}").read_text()[-1000:] for i in range(3))
    finally:
        os.kill(keeper, signal.SIGKILL)
        os.waitpid(keeper, 0)


@pytest.mark.parametrize("rank,name,why", [
    (0, None, "rank 1"), (0, "of a dead one", "1 of 2 came within 1 s"), (1, None, "timeout")])
def test_a_rank_that_torchrun_started_does_not_wait_for_ever(place, rank, name, why):
    def wait() -> int:
        store = agents(**({"rank 1": name} if name else {}))
        os.environ["MASTER_PORT"] = str(store.port)
        return log.run(lambda: Ranks.start("cpu", timeout=1))

    said = place / "said-waited"
    (code,) = fork.ends([fork.child(
        wait, said, RANK=str(rank), WORLD_SIZE="2", LOCAL_RANK=str(rank), MASTER_ADDR="127.0.0.1",
        TORCHELASTIC_USE_AGENT_STORE="True")])
    (line,) = [x for x in said.read_text().splitlines() if x.startswith("error: ")]
    assert code == log.FLAGS and re.search(f"cannot meet the others .*{why}", line), line


@pytest.mark.parametrize("how", ["ddp", "fsdp"])
def test_two_ranks_measure_suites_as_one_and_a_guard_stops_both_at_one_step(place, how):
    """A guard on a held-out text, and a suite, whose head lies outside the blocks that are cut."""
    changes = {"suites": ["agreement"], "suite_items": 12, "eval_every": 2, "stop_if": ["kin<-1%"],
               "eval_tokens": 400}
    found = []
    for world, name in ((1, "guard-one"), (2, f"guard-{how}")):
        if not (place / name).exists():
            said = run(settings(place, name, shard=how if world > 1 else "none", **changes), world)
            assert "by --stop-if kin<-1%: kin is" in said
        lines = [json.loads(x) for x in (place / name / "metrics.jsonl").read_text().splitlines()]
        found.append([x for x in lines if "suites" in x])
        assert lines[-1]["step"] < 20 and "stopped" in lines[-1]
        assert (place / name / "model").is_dir()
    for one, two in zip(*found, strict=True):
        assert one["step"] == two["step"] and one["suites"] == two["suites"]
        assert two["bits_per_byte"] == pytest.approx(one["bits_per_byte"], rel=1e-5)
    if how == "fsdp":  # with suites alone the model is first used by a way that is not its forward
        changes |= {"stop_if": [], "hold_out": 0.0, "prompts": [], "steps": 2}
        assert "agreement.acc" in run(settings(place, "guard-alone", shard=how, **changes), 2)
