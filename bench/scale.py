"""Training on one rank and on two (DDP and FSDP2), compared with transformers + accelerate; the
cost of a checkpoint during training; and two programs on the same cores.

    python -m bench.scale [--quick] [--cases none ddp fsdp stall beside] [--rounds 2] [--write]

Two CPU processes that communicate by gloo share the cores of one machine, so a second rank does not
make training faster. The cost of sharing is compared with that of the peer, with the same number of
threads for each rank and the same allocator. The losses of the first and the last step must be
equal on all sides.

The cost of a checkpoint is measured in the training loop: steps without a save, then steps while a
checkpoint is written, repeated in one process. Two programs that do not know of each other each use
all cores at the same time, with libgomp's default waiting of threads and with ours
(runtime/openmp.py).
"""

from __future__ import annotations

import json
import os
import socket
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from bench import Child, Settings, Spread, child, in_turn, installed, limits, main, table
from bench.train_step import MODELS, draw, tokens_of
from runtime import openmp

HERE = "bench.scale"
LR, BETAS, DECAY, CLIP = 3e-4, (0.9, 0.95), 0.1, 1.0
APART = 1e-4  # the largest difference of losses, in float32
WAYS = {"none": "one rank", "ddp": "two ranks, ddp", "fsdp": "two ranks, fsdp"}


def ours(how: str, folder: str) -> Callable[[Any], float]:
    """A step of train.py on this rank's rows."""
    import torch

    import train
    from checkpoints.huggingface import load_model
    from data import IGNORE, Batch
    from runtime.distributed import Distributed
    from training import optimizer as optim
    from training.objective import NLL

    ranks = Distributed.start("cpu")
    model, _ = load_model(folder, dtype=torch.float32, tokenizer=False)
    ranks.wrap_model(model.train(), how, torch.float32)
    optimizer = optim.adamw(model, LR, BETAS, DECAY)

    def step(tokens: Any) -> float:
        targets = torch.nn.functional.pad(tokens[:, 1:], (0, 1), value=IGNORE)
        doc, pos = torch.zeros_like(tokens), torch.arange(tokens.shape[1]).expand_as(tokens)
        batch = Batch(tokens, targets, doc, pos)
        return train.train_step(model, NLL, [batch], optimizer, ranks, CLIP)[0]

    step.parts = lambda: {  # type: ignore[attr-defined]
        "model": dict(model.named_parameters()), "optimizer": optim.state_tensors(model, optimizer)}
    step.ranks = ranks  # type: ignore[attr-defined]
    return step


def accelerate(how: str, folder: str) -> Callable[[Any], float]:
    """One step as in accelerate's documentation. Gradients are views of DDP's buckets, its fastest
    mode. On a CPU accelerate always selects DDP, so FSDP is set in its state, and it is checked
    that the model is then sharded."""
    import torch
    from accelerate import (
        Accelerator,
        DistributedDataParallelKwargs,
        DistributedType,
        FullyShardedDataParallelPlugin,
    )
    from torch.distributed.tensor import DTensor
    from transformers import LlamaForCausalLM

    from runtime.device import keep_freed_memory

    keep_freed_memory()  # as our ranks do
    views = DistributedDataParallelKwargs(gradient_as_bucket_view=True)
    accelerator = Accelerator(cpu=True, kwargs_handlers=[views])
    if how == "fsdp":
        accelerator.state.distributed_type = DistributedType.FSDP
        accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin(
            fsdp_version=2, auto_wrap_policy="transformer_based_wrap",
            transformer_cls_names_to_wrap=["LlamaDecoderLayer"])
    model: Any = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, betas=BETAS, weight_decay=DECAY,
                                  eps=1e-8, fused=True)
    model, optimizer = accelerator.prepare(model, optimizer)
    assert all(isinstance(p, DTensor) for p in model.parameters()) == (how == "fsdp")

    def step(tokens: Any) -> float:
        loss = model(input_ids=tokens, labels=tokens).loss
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad()
        return accelerator.reduce(loss.detach(), "mean").item()

    return step


def on_ranks(world: int, threads: int, action: Callable[[], Any]) -> list[Any]:
    """Run a function in forked processes and return their results, which are JSON."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    with tempfile.TemporaryDirectory() as place:
        pids = []
        for rank in range(world):
            if pid := os.fork():
                pids.append(pid)
                continue
            code = 1
            try:
                import torch

                torch.set_num_threads(threads)
                if world > 1:
                    os.environ.update(
                        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world),
                        LOCAL_WORLD_SIZE=str(world), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
                Path(place, str(rank)).write_text(json.dumps(action()))
                code = 0
            except BaseException:
                import traceback

                traceback.print_exc()
            finally:
                os._exit(code)
        ends = [os.waitpid(pid, 0)[1] for pid in pids]
        if any(ends):
            sys.exit("a rank failed")
        return [json.loads(Path(place, str(rank)).read_text()) for rank in range(world)]


def measure(side: str, how: str, model: str, folder: str, threads: int,
            steps: int) -> dict[str, Any]:
    """Seconds per step of the slowest rank, and the losses."""
    world = 1 if how == "none" else 2
    tokens = tokens_of(model)

    def rank() -> list[list[float]]:
        step = {"ours": ours, "accelerate": accelerate}[side](how, folder)
        rows = tokens.chunk(world)[int(os.environ.get("RANK", 0))]
        results = []
        for _ in range(2 + steps):
            begun = time.perf_counter()
            loss = step(rows)
            results.append([time.perf_counter() - begun, loss])
        return results

    results = on_ranks(world, threads, rank)
    return {"seconds": [max(rank[i][0] for rank in results) for i in range(2, 2 + steps)],
            "first": results[0][0][1], "last": results[0][-1][1]}


def stall(how: str, model: str, folder: str, threads: int, saves: int) -> dict[str, Any]:
    """Seconds per step without a checkpoint and while one is written; seconds of the copy, until
    the files have their names, and of a save for which training waits."""
    world = 1 if how == "none" else 2
    tokens = tokens_of(model)

    def rank() -> dict[str, Any]:
        from checkpoints.resume_point import AsyncCheckpointer

        step: Any = ours(how, folder)
        rows = tokens.chunk(world)[int(os.environ.get("RANK", 0))]
        saver = AsyncCheckpointer(Path(folder) / f"checkpoints-{how}", 2, step.ranks)

        def turn() -> float:  # as train.py's loop goes
            begun = time.perf_counter()
            step(rows)
            if not step.ranks.all_reduce_max(saver.busy)[0]:
                saver.poll()
            return time.perf_counter() - begun

        seconds: dict[str, Any] = {"plain": [], "beside": [], "copy": [], "written": []}
        for _ in range(3):
            turn()
        for i in range(saves):
            seconds["plain"] += [turn() for _ in range(4)]
            begun = time.perf_counter()
            saver.save(i, step.parts(), {})
            seconds["copy"].append(time.perf_counter() - begun)
            while saver.pending is not None:
                seconds["beside"].append(turn())
            seconds["written"].append(time.perf_counter() - begun)
        seconds["plain"] += [turn() for _ in range(4)]  # before and after: machines drift
        begun = time.perf_counter()
        saver.save(saves, step.parts(), {})
        saver.finish()
        return {**seconds, "waited": [time.perf_counter() - begun],
                "bytes": sum(x.numel() * x.element_size() for tensors in step.parts().values()
                             for x in tensors.values())}

    return on_ranks(world, threads, rank)[0]  # all ranks take each turn together


def alone(side: str, model: str, folder: str) -> Iterator[float]:
    """Seconds of each step of one rank on all cores, after two warm-up steps."""
    step, tokens = {"ours": ours, "accelerate": accelerate}[side]("none", folder), tokens_of(model)
    step(tokens), step(tokens)
    while True:
        begun = time.perf_counter()
        step(tokens)
        yield time.perf_counter() - begun


def beside(s: Settings) -> str:
    """Seconds of a step of one program, and of two at the same time."""
    model = {"full": "30M", "quick": "10M", "tiny": "tiny"}[s.size]
    turns = {"full": 4, "quick": 2, "tiny": 1}[s.size]
    rows = []
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(2) as both:
        child(HERE, "draw", model, folder, "float32")
        for side in ("ours", "accelerate"):
            if side != "ours" and not installed(side):
                continue
            for spins in (openmp.LIBGOMP_SPIN_COUNT, openmp.SHORT_SPIN_COUNT):
                took = []
                for n in (1, 2):
                    programs = [Child(HERE, "alone", side, model, folder,
                                      GOMP_SPINCOUNT=str(spins)) for _ in range(n)]
                    took.append(Spread.of([x for _ in range(turns) for x in
                                           both.map(Child.turn, programs)]))
                    for program in programs:
                        program.end()
                rows.append([side, f"{spins:,}",
                             *(f"{x.median:.3f} ({x.low:.3f} to {x.high:.3f})" for x in took),
                             f"{took[1].median / took[0].median:.1f}"])
    return (
        f"Two programs on the same cores ({model}), one rank each. Spins: how often a thread looks "
        f"for its next work before it sleeps (GOMP_SPINCOUNT); {openmp.LIBGOMP_SPIN_COUNT:,} is "
        f"libgomp's own, "
        f"{openmp.SHORT_SPIN_COUNT:,} ours.\n\n"
        + table(["side", "spins", "a step alone (range), s", "beside the other, s",
                 "times as long"], rows))


def speeds(s: Settings, ways: list[str]) -> str:
    """Steps of both sides, in turn."""
    model = {"full": "110M", "quick": "10M", "tiny": "tiny"}[s.size]
    steps = 2 if s.size == "tiny" else 3
    threads = max(1, (os.cpu_count() or 2) // 2)
    *_, B, T = MODELS[model]
    with tempfile.TemporaryDirectory() as folder:
        numbers = child(HERE, "draw", model, folder, "float32")
        results = in_turn(HERE, s.rounds, {
            f"{how}, {side}": ("measure", [side, how, model, folder, threads, steps])
            for how in ways for side in ("ours", "accelerate")
            if side == "ours" or installed("accelerate")})
    rows = []
    for side, runs in results.items():
        how, who = side.split(", ")
        spread = Spread.of([x for run in runs for x in run["seconds"]])
        rows.append([WAYS[how], who, f"{spread.median:.3f}",
                     f"{spread.low:.3f} to {spread.high:.3f}", f"{B * T / spread.median:.0f}",
                     f"{runs[0]['first']:.5f}", f"{runs[0]['last']:.5f}"])
    for name, which in (("first", 5), ("last", 6)):
        losses = [float(row[which]) for row in rows]
        if max(losses) - min(losses) > APART * max(losses):
            s.faults.append(f"the {name} losses are {min(losses)} to {max(losses)}")
    return (
        f"{numbers / 1e6:.1f}M parameters, {B} x {T} tokens a step in float32, threads a rank: "
        f"{threads}. Median of {s.rounds} x {steps} steps after two. The ranks of one machine "
        "share its cores and memory: this shows what sharing costs, not what a second GPU "
        "brings.\n\n"
        + table(["", "side", "seconds a step", "range", "tokens/s", "first loss", "last loss"],
                rows))


def stalls(s: Settings, ways: list[str]) -> str:
    """The cost of a checkpoint, written in the background and blocking."""
    model = {"full": "30M", "quick": "10M", "tiny": "tiny"}[s.size]
    saves = {"full": 3, "quick": 1, "tiny": 2}[s.size]
    cores = os.cpu_count() or 2
    with tempfile.TemporaryDirectory() as folder:
        numbers = child(HERE, "draw", model, folder, "float32")
        results = in_turn(HERE, s.rounds, {
            how: ("stall", [how, model, folder, cores if how == "none" else cores // 2, saves])
            for how in ways})
    rows = []
    for how, runs in results.items():
        x = {k: [v for run in runs for v in run[k]]
             for k in ("plain", "beside", "copy", "written", "waited")}
        plain, beside = Spread.of(x["plain"]), Spread.of(x["beside"])
        rows.append([
            WAYS[how], f"{runs[0]['bytes'] / 2**30:.2f}",
            f"{plain.median:.3f} ({plain.low:.3f} to {plain.high:.3f})",
            f"{beside.median:.3f} ({beside.low:.3f} to {beside.high:.3f})",
            f"{beside.median / plain.median - 1:+.1%}",
            f"{statistics.fmean(x['beside']) / statistics.fmean(x['plain']) - 1:+.1%}",
            f"{beside.n} of {len(x['copy'])}",
            *(f"{statistics.median(x[k]):.2f}" for k in ("copy", "written", "waited"))])
    return (
        f"A checkpoint while training goes on ({numbers / 1e6:.1f}M parameters, all train; all "
        "cores train too). Training waits for the copy to host memory alone. The writer is a "
        "background thread: on a CPU it shares the cores with the training steps.\n\n"
        + table(["", "GB", "a step, no save (range), s", "a step beside a save (range), s",
                 "medians", "means", "steps beside of saves", "copy, s", "until it has its name, s",
                 "if training waits, s"], rows))


def job(s: Settings) -> str:
    """All sides in turn, and the checkpoints."""
    cases = s.cases or (["ddp", "stall"] if s.size == "quick" else [*WAYS, "stall", "beside"])
    ways = [x for x in WAYS if x in cases]
    parts = []
    if ways:
        parts.append(speeds(s, ways))
    if "stall" in cases:
        stalled = ways or list(WAYS)
        if s.size == "quick" and not s.cases:
            stalled = ["none"]
        parts.append(stalls(s, stalled))
    if "beside" in cases:
        parts.append(beside(s))
    return "\n\n".join(
        [*parts, limits.description(limits.measured(s.size), "transformers", "accelerate")])


if __name__ == "__main__":
    sys.exit(main(HERE, "One rank and two; a checkpoint while training goes on",
                  {"draw": draw, "measure": measure, "stall": stall, "alone": alone}, job,
                  cases=[*WAYS, "stall", "beside"]))
