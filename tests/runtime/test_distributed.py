"""The same run on one rank or two, by DDP or FSDP2, cut and resumed on other numbers of ranks: real
processes that talk by gloo."""

from __future__ import annotations

import copy
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

import pytest
import torch
import torch.distributed as dist

import train
from helpers import fork, tiny
from helpers.train_runs import (
    assert_same_run,
    load_result,
    make_settings,
    read_losses,
    run_ranks,
    send_signal_at,
)
from preparation.bin_writer import BinWriter
from runtime import console
from runtime.distributed import (
    GRADIENT_SUM,
    Distributed,
    local_shard,
    needs_sync_every_microbatch,
)
from tokenization.document import Document
from tokenization.tokenizer import Tokenizer
from training.objective import NLL

pytestmark = pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")


TUNES = {
    "full, tied": {},
    "full, untied, biases": {"model": "untied"},
    "some layers": {"model": "untied", "train_layers": ["1"], "train_embeddings": True},
    "LoRA": {"tune": "lora", "lora_rank": 4},
    "DoRA with embeddings and norms": {"tune": "lora", "dora": True, "lora_rank": 4,
                                       "train_embeddings": True, "train_norms": True},
    "QLoRA": {"tune": "qlora", "lora_rank": 4},
    "recomputed": {"recompute": "full"},
    "selective": {"recompute": "selective", "tune": "lora", "lora_rank": 4},
    "best": {"model": "untied", "best": "kin", "eval_every": 5},
}


ALWAYS = ("full, tied", "DoRA with embeddings and norms", "QLoRA")


@pytest.mark.parametrize("tune", [
    x if x in ALWAYS else pytest.param(x, marks=pytest.mark.slow) for x in TUNES])
def test_twenty_steps_are_the_same_on_one_rank_and_on_two_by_ddp_and_fsdp(workspace, tune):
    changes = dict(TUNES[tune])
    if "model" in changes:
        changes["model"] = str(workspace / changes["model"])
    out = {how: f"{tune}-{how}" for how in ("none", "ddp", "fsdp")}
    for how, name in out.items():
        run_ranks(
            make_settings(workspace, name, shard=how, **changes), world=1 if how == "none" else 2
        )
    one = read_losses(workspace / out["none"])
    assert len(one) == 20 and one[20] < one[1]
    for how in ("ddp", "fsdp"):
        assert_same_run(workspace / out["none"], workspace / out[how])
        bpb = [[json.loads(x)["bits_per_byte"] for x in
                (workspace / name / "metrics.jsonl").read_text().splitlines() if "bits_per" in x]
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
def answers(workspace) -> dict[str, list[str]]:
    """Two bins of each kind whose documents are asked and answered: short ones of uneven masks."""
    tokenizer = Tokenizer.open(workspace / "tied")
    draw, found = random.Random(2), {}
    for kind in set(KINDS.values()):
        found[kind] = [f"{workspace}/bin-{kind}-a:3", f"{workspace}/bin-{kind}-b:1"]
        for name, n in (("a", 80), ("b", 40)):
            writer = BinWriter(workspace / f"bin-{kind}-{name}", tokenizer.fingerprint,
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
def test_every_mode_is_the_same_on_one_rank_and_on_two(workspace, answers, mode, tune):
    changes = {**WHAT[tune], "mode": mode, "data": answers[KINDS[mode]], "hold_out": 0.0}
    one, *others = ("none", "ddp", "fsdp")
    for how in (one, *others):
        run_ranks(
            make_settings(workspace, f"{mode}-{tune}-{how}", shard=how, **changes),
            1 if how == one else 2,
        )
    for how in others:
        assert_same_run(workspace / f"{mode}-{tune}-{one}", workspace / f"{mode}-{tune}-{how}")


@pytest.mark.parametrize("tune", ["full", pytest.param("LoRA with embeddings",
                                                       marks=pytest.mark.slow)])
def test_gradients_that_are_reduced_after_every_micro_batch_are_the_same(workspace, tune):
    """As they do by fsdp where whole ones would be too much to keep."""
    run_ranks(make_settings(workspace, f"seldom-{tune}", **WHAT[tune]))

    def often(run: train.Run) -> None:
        assert run.ranks.fsdp_modules and run.micro_batches == 3
        run.ranks.sync_every_microbatch = True

    run_ranks(
        make_settings(workspace, f"often-{tune}", shard="fsdp", **WHAT[tune]), 2, during=often
    )
    assert_same_run(workspace / f"seldom-{tune}", workspace / f"often-{tune}")


def test_gradients_meet_often_where_often_would_fill_a_tenth_of_a_gpu(workspace):
    model = tiny.ours(tiny.peer("biases"), "biases")
    cut = sum(p.numel() for n, p in model.named_parameters() if p.dim() == 2)
    assert not needs_sync_every_microbatch(model, 40.1 * cut / 2**30)
    assert needs_sync_every_microbatch(model, 39.9 * cut / 2**30)


def noting(workspace: Path, name: str) -> Callable[[train.Run], None]:
    """Write down, by step, a hash of every row that any rank trains on."""

    def during(run: train.Run) -> None:
        if "next" in vars(run.loader):
            return
        draw = run.loader.next

        def noted():
            batch = draw()
            with open(workspace / f"rows-{name}", "a") as file:
                for i in range(len(batch.tokens)):
                    row = [getattr(batch, x)[i].numpy().tobytes()
                           for x in ("tokens", "targets", "doc", "pos")]
                    digest = hashlib.sha256(b"".join(row)).hexdigest()
                    file.write(f"{run.step + 1} {digest}\n")
            return batch

        run.loader.next = noted

    return during


@pytest.mark.parametrize("how", [pytest.param("ddp", marks=pytest.mark.slow), "fsdp"])
def test_bf16_weights_are_rounded_alike_by_one_rank_and_by_two(workspace, how):
    """Bit for bit, also where two ranks are cut and one goes on: a sum of two gradients is the same
    in any order, nothing is clipped, and what a number is rounded by depends on its position."""
    changes = {"steps": 12, "optimizer": "adamw-bf16", "dtype": "bf16", "tokens_per_step": 64,
               "clip": 1e9, "model": str(workspace / "untied")}
    if not (workspace / "narrow").exists():
        run_ranks(make_settings(workspace, "narrow", **changes))
    run_ranks(make_settings(workspace, f"narrow-{how}", shard=how, **changes), world=2)
    cut = f"narrow-{how}-cut"
    run_ranks(
        make_settings(workspace, cut, shard=how, **changes),
        world=2,
        codes={143},
        during=send_signal_at(7),
    )
    run_ranks(make_settings(workspace, cut, resume=True, shard="none"))
    one = load_result(workspace / "narrow")
    assert len(read_losses(workspace / "narrow")) == 12
    for name in (f"narrow-{how}", cut):
        assert read_losses(workspace / name) == pytest.approx(
            read_losses(workspace / "narrow"), rel=1e-6
        )
        two = load_result(workspace / name)
        assert one.keys() == two.keys() and all(torch.equal(one[k], two[k]) for k in one)


@pytest.mark.parametrize("how,worlds", [
    ("fsdp", (1, 2, 1)), ("fsdp", (2, 4, 2)), *(pytest.param(*x, marks=pytest.mark.slow) for x in (
        ("ddp", (1, 2, 1)), ("ddp", (2, 4, 2)), ("fsdp", (3, 1, 4)), ("ddp", (4, 3, 2))))])
def test_thirty_steps_are_ten_on_some_ranks_ten_on_others_and_ten_on_some(workspace, how, worlds):
    """The same rows by hash, the same losses and weights as one rank undisturbed."""
    def rows(name: str) -> list[str]:
        return sorted((workspace / f"rows-{name}").read_text().splitlines())

    def both(a, b):
        return lambda run: (a(run), b(run))

    changes = {"steps": 30, "tune": "lora", "dora": True, "lora_rank": 4, "train_embeddings": True,
               "seq_len": 16}  # twelve rows a step
    if not (workspace / "thirty").exists():
        run_ranks(make_settings(workspace, "thirty", **changes), during=noting(workspace, "thirty"))
    out = f"thirty-{how}-{worlds}"
    for i, world in enumerate(worlds):
        s = make_settings(
            workspace, out, **changes, resume=i > 0, shard=how if world > 1 else "none"
        )
        cut = [send_signal_at(10), send_signal_at(20, rank=min(1, world - 1)), id][i]
        said = run_ranks(s, world, {143 if i < 2 else 0}, during=both(noting(workspace, out), cut))
        assert i == 0 or f"resumed from {workspace}/{out}/checkpoints/step-0000{i}0" in said
    assert rows(out) == rows("thirty")
    assert_same_run(workspace / "thirty", workspace / out, steps=30)
    if worlds[0] == 1:
        one, cut = read_losses(workspace / "thirty"), read_losses(workspace / out)
        assert [cut[k] for k in range(1, 11)] == [one[k] for k in range(1, 11)], "bit for bit"


@pytest.mark.parametrize("how", ["ddp", "fsdp"])
def test_two_ranks_cut_and_resumed_equal_two_that_were_not_bit_for_bit(workspace, how):
    changes = {"steps": 12, "tune": "lora", "lora_dropout": 0.2, "shard": how,
               "train_embeddings": True, "best": "kin", "eval_every": 5}
    run_ranks(make_settings(workspace, f"uncut-{how}", **changes), world=2)
    run_ranks(
        make_settings(workspace, f"cut-{how}", **changes),
        world=2,
        codes={143},
        during=send_signal_at(7),
    )
    run_ranks(make_settings(workspace, f"cut-{how}", resume=True), world=2)
    assert read_losses(workspace / f"cut-{how}") == read_losses(workspace / f"uncut-{how}")
    a, b = load_result(workspace / f"cut-{how}"), load_result(workspace / f"uncut-{how}")
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize("world, recorded, line", [
    (3, None, "53f4a60"), (3, GRADIENT_SUM, ""), (2, None, ""), (1, None, "")])
def test_only_a_run_of_several_ranks_that_summed_in_another_order_is_told_so(world, recorded, line):
    ranks = Distributed(0, world, torch.device("cpu"))
    assert line in ranks.changed_gradient_sum(recorded)
    assert bool(ranks.changed_gradient_sum(recorded)) == bool(line)


@pytest.mark.parametrize("how", ["ddp", "fsdp"])
def test_no_rank_writes_more_than_its_part(workspace, how):
    run_ranks(make_settings(workspace, f"parts-{how}", steps=2, shard=how), world=2)
    folder = workspace / f"parts-{how}/checkpoints/step-000002"
    sizes = [sum(f.stat().st_size for f in folder.glob(f"*-{rank}.safetensors")) for rank in (0, 1)]
    assert max(sizes) < 0.62 * sum(sizes)


def poison(step: int, rank: int, value: float = float("nan"),
           steps: int = 1) -> Callable[[train.Run], None]:
    """Spoil the last micro-batch's loss on one rank, in so many steps from that one on."""

    def during(run: train.Run) -> None:
        if run.ranks.rank != rank or hasattr(run, "calls"):
            return
        run.calls, objective = 0, NLL.sums

        def total(model, batch):
            run.calls += 1
            bad = step <= run.step + 1 < step + steps and run.calls % run.micro_batches == 0
            return objective(model, batch) * (value if bad else 1.0)

        object.__setattr__(NLL, "sums", total)

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
        held = [local_shard(p.detach())[1].clone() for p in run.model.parameters()]
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
def test_a_step_that_is_not_finite_on_one_rank_moves_no_rank(workspace, how, what):
    name, loss = f"bad-{how}-{what}", what != "a gradient"
    spoil = poison(3, rank=1, value=what) if loss else poison_gradient(3, rank=1)
    run_ranks(make_settings(workspace, name, steps=5, shard=how), world=2, during=unmoved(3, spoil))
    lines = [json.loads(x) for x in (workspace / name / "metrics.jsonl").read_text().splitlines()]
    skipped = {x["step"]: x["skipped"] for x in lines if "loss" in x and x["loss"] is None}
    assert skipped == {3: 1}
    odd = [json.loads(x) for x in (workspace / name / "odd_steps.jsonl").read_text().splitlines()]
    assert [(x["step"], x["what"]) for x in odd] == [(3, "not finite")]
    named = sum(map(len, odd[0]["documents"].values()))
    assert 0 < named < (30 if loss else 60), "those of one rank's rows, or of the step's"


def test_three_bad_steps_in_a_row_end_all_ranks_with_4_and_what_was_saved_stands(workspace):
    said = run_ranks(make_settings(workspace, "worse", steps=9), world=2, codes={4},
                     during=poison(3, rank=1, steps=3))
    assert "three steps in a row were not finite" in said
    assert len((workspace / "worse/odd_steps.jsonl").read_text().splitlines()) == 3
    assert "resumed from" in run_ranks(make_settings(workspace, "worse", resume=True), world=2)
    assert len(read_losses(workspace / "worse")) == 9


@pytest.mark.slow
def test_products_in_bf16_and_fp16_are_the_same_by_fsdp_as_by_ddp(workspace):
    """What is gathered in the dtype of products is what one rank would cast to it."""
    for dtype in ("bf16", "fp16"):
        for how in ("ddp", "fsdp"):
            run_ranks(
                make_settings(workspace, f"{dtype}-{how}", shard=how, dtype=dtype, steps=8), world=2
            )
        a, b = read_losses(workspace / f"{dtype}-ddp"), read_losses(workspace / f"{dtype}-fsdp")
        assert all(b[k] == pytest.approx(a[k], rel=1e-4) for k in a)
        x, y = load_result(workspace / f"{dtype}-ddp"), load_result(workspace / f"{dtype}-fsdp")
        assert {t.dtype for t in y.values()} == {torch.float32}
        for name in x:  # AdamW moves by the rate whatever the gradient's size: a sign may differ
            assert (x[name] - y[name]).abs().mean() < 2e-4


@pytest.mark.slow
def test_compiled_blocks_are_the_same_on_two_ranks(workspace):
    run_ranks(make_settings(workspace, "not-compiled", steps=4))
    for how in ("ddp", "fsdp"):
        run_ranks(
            make_settings(workspace, f"compiled-{how}", steps=4, shard=how, compile=True), world=2
        )
        a, b = read_losses(workspace / "not-compiled"), read_losses(workspace / f"compiled-{how}")
        assert all(b[k] == pytest.approx(a[k], rel=1e-5) for k in a)


def test_gradients_are_sums_over_ranks_and_micro_batches(workspace):
    """With parameters that only one rank uses, or none in the last micro-batch, and a loss that
    calls the model twice. Names of parameters stay those of the model."""

    def loss(model: torch.nn.Module, x: torch.Tensor, extra: int | None) -> torch.Tensor:
        h = sum(model[2](model[1](model[0](scale * x))) for scale in (1, 2))
        if extra is not None:
            h = h + model[extra](x)
        return h.square().sum()

    def micro_batches(rank: int) -> list[tuple[torch.Tensor, int | None]]:
        x = torch.randn(2, 4, 8, generator=torch.Generator().manual_seed(rank))
        return [(x[0], 4), (x[1], 3 if rank else None)]

    def rank() -> int:
        ranks = Distributed.start("cpu", 30)
        model = torch.nn.ModuleList(torch.nn.Linear(8, 8) for _ in range(6))
        single = copy.deepcopy(model)
        names = [name for name, _ in model.named_parameters()]
        ranks.wrap_model(model, "ddp", torch.float32)
        assert [name for name, _ in model.named_parameters()] == names
        for step in range(3):
            for i, (x, extra) in enumerate(micro_batches(ranks.rank)):
                ranks.set_gradient_sync(last=i == 1)
                ranks.forward(loss, model, x, extra).backward()
            for other in range(2):
                for x, extra in micro_batches(other):
                    loss(single, x, extra).backward()
            for (name, a), b in zip(model.named_parameters(), single.parameters(), strict=True):
                assert (a.grad is None) == (b.grad is None) == name.startswith("5."), (step, name)
                if a.grad is not None:
                    torch.testing.assert_close(a.grad, b.grad)
            for p in (*model.parameters(), *single.parameters()):
                p.grad = None
        ranks.close()
        return 0

    output = workspace / "said-gradients"
    ends = fork.ends(fork.together(2, rank, output))
    assert ends == [0, 0], output.with_name("said-gradients-0").read_text()[-2000:]


def agents(**kept: str) -> dist.TCPStore:
    """The store that torchrun's agents keep through all attempts; not in this process, for one
    that has had such a thread in it must not fork any more."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True)
    for key, value in kept.items():
        store.set(key, value)
    return store


def test_ranks_that_are_started_again_meet_each_other_and_not_the_dead(workspace):
    """The agents of torchrun keep one store for all attempts, and count them each for itself."""
    def keep() -> None:
        store = agents(exception_dump="by one that died: NCCL asks for it, under no prefix")
        (workspace / "port").write_text(str(store.port))
        signal.pause()

    def meet() -> None:
        rank, attempt, late = (int(os.environ[x]) for x in ("RANK", "ATTEMPT", "LATE"))
        os.environ["TORCHELASTIC_RESTART_COUNT"] = str(attempt * rank)
        if rank == late:
            time.sleep(0.5)  # the others find what it left the last time
        ranks = Distributed.start("cpu", 20)
        words = ["", "umwana", "abana ☀"]
        assert ranks.all_gather_text(f"{attempt}{words[rank]}") == [f"{attempt}{x}" for x in words]
        store = dist.distributed_c10d._get_default_store()
        store = getattr(store, "_underlying_non_prefix_store", store)
        assert not store.check(["exception_dump"])
        ranks.barrier()  # rank 0 has the store, and dies with all others
        os.kill(os.getpid(), signal.SIGKILL)

    keeper = fork.child(keep, workspace / "said-keeper")
    try:
        while not (workspace / "port").exists() or not (port := (workspace / "port").read_text()):
            assert os.waitpid(keeper, os.WNOHANG)[0] == 0
            time.sleep(0.01)
        for attempt, late in enumerate((9, 0, 1, 2)):
            said = workspace / f"said-attempt-{attempt}"
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
def test_a_rank_that_torchrun_started_does_not_wait_for_ever(workspace, rank, name, why):
    def wait() -> int:
        store = agents(**({"rank 1": name} if name else {}))
        os.environ["MASTER_PORT"] = str(store.port)
        return console.run(lambda: Distributed.start("cpu", timeout=1))

    said = workspace / "said-waited"
    (code,) = fork.ends([fork.child(
        wait, said, RANK=str(rank), WORLD_SIZE="2", LOCAL_RANK=str(rank), MASTER_ADDR="127.0.0.1",
        TORCHELASTIC_USE_AGENT_STORE="True")])
    (line,) = [x for x in said.read_text().splitlines() if x.startswith("error: ")]
    assert code == console.FLAGS and re.search(f"cannot connect to the others .*{why}", line), line


@pytest.mark.parametrize("how", ["ddp", "fsdp"])
def test_two_ranks_measure_suites_as_one_and_a_guard_stops_both_at_one_step(workspace, how):
    """A guard on a held-out text, and a suite, whose head lies outside the blocks that are cut."""
    changes = {"suites": ["agreement"], "suite_items": 12, "eval_every": 2, "stop_if": ["kin<-1%"],
               "eval_tokens": 400}
    found = []
    for world, name in ((1, "guard-one"), (2, f"guard-{how}")):
        if not (workspace / name).exists():
            said = run_ranks(
                make_settings(workspace, name, shard=how if world > 1 else "none", **changes), world
            )
            assert "by --stop-if kin<-1%: kin is" in said
        lines = [
            json.loads(x) for x in (workspace / name / "metrics.jsonl").read_text().splitlines()
        ]
        found.append([x for x in lines if "suites" in x])
        assert lines[-1]["step"] < 20 and "stopped" in lines[-1]
        assert (workspace / name / "model").is_dir()
    for one, two in zip(*found, strict=True):
        assert one["step"] == two["step"] and one["suites"] == two["suites"]
        assert two["bits_per_byte"] == pytest.approx(one["bits_per_byte"], rel=1e-5)
    if how == "fsdp":  # with suites alone the model is first used by a way that is not its forward
        changes |= {"stop_if": [], "hold_out": 0.0, "prompts": [], "steps": 2}
        assert "agreement.acc" in run_ranks(
            make_settings(workspace, "guard-alone", shard=how, **changes), 2
        )
