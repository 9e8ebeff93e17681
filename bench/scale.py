"""One rank and two, by DDP and FSDP2, here and by transformers + accelerate; and what a checkpoint
costs while training goes on.

    python -m bench.scale [--quick] [--rounds 2] [--write]

Two CPU processes that talk by gloo share one machine's cores, so the second rank brings no speed:
what is measured is what sharing costs beside the peer's, at equal threads a rank. Losses of the
first and last step must agree between all sides that see the same tokens.
"""

from __future__ import annotations

import json
import os
import socket
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench import Settings, Spread, child, in_turn, installed, main, table, versions
from bench.train_step import MODELS, draw, tokens_of

HERE = "bench.scale"
LR, BETAS, DECAY, CLIP = 3e-4, (0.9, 0.95), 0.1, 1.0
APART = 1e-4  # of the losses, at most; float32
SIDES = [("ours", "none"), ("accelerate", "none"), ("ours", "ddp"), ("accelerate", "ddp"),
         ("ours", "fsdp"), ("accelerate", "fsdp")]


def ours(how: str, folder: str) -> Callable[[Any, int], float]:
    """A step of train.py on this rank's rows."""
    import torch

    import optim
    import train
    import weights
    from data import IGNORE, Batch
    from ranks import Ranks

    ranks = Ranks.start("cpu")
    model, _ = weights.load(folder, dtype=torch.float32, tokenizer=False)
    ranks.share(model.train(), how, torch.float32)
    optimizer = optim.adamw(model, LR, BETAS, DECAY)

    def step(tokens: Any) -> float:
        targets = torch.nn.functional.pad(tokens[:, 1:], (0, 1), value=IGNORE)
        doc, pos = torch.zeros_like(tokens), torch.arange(tokens.shape[1]).expand_as(tokens)
        batch = Batch(tokens, targets, doc, pos)
        return train.train_step(model, train.NLL, [batch], optimizer, ranks, CLIP)[0]

    step.parts = lambda: {  # type: ignore[attr-defined]
        "model": dict(model.named_parameters()), "optimizer": optim.state(model, optimizer)}
    step.ranks = ranks  # type: ignore[attr-defined]
    return step


def accelerate(how: str, folder: str) -> Callable[[Any], float]:
    """A step as accelerate's documents write it."""
    import torch
    from accelerate import Accelerator, FullyShardedDataParallelPlugin
    from transformers import LlamaForCausalLM

    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2, auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=["LlamaDecoderLayer"]) if how == "fsdp" else None
    accelerator = Accelerator(cpu=True, fsdp_plugin=plugin)
    model: Any = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, betas=BETAS, weight_decay=DECAY,
                                  eps=1e-8, fused=True)
    model, optimizer = accelerator.prepare(model, optimizer)

    def step(tokens: Any) -> float:
        loss = model(input_ids=tokens, labels=tokens).loss
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad()
        return accelerator.reduce(loss.detach(), "mean").item()

    return step


def on_ranks(world: int, threads: int, action: Callable[[], Any]) -> list[Any]:
    """What each of so many forked processes gives, as JSON."""
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
    """Seconds a step and losses, the slowest rank's."""
    import torch  # before the ranks are forked

    world = 1 if how == "none" else 2
    tokens = tokens_of(model)

    def rank() -> list[list[float]]:
        step = {"ours": ours, "accelerate": accelerate}[side](how, folder)
        rows = tokens.chunk(world)[int(os.environ.get("RANK", 0))]
        found = []
        for _ in range(2 + steps):
            begun = time.perf_counter()
            loss = step(rows)
            found.append([time.perf_counter() - begun, loss])
        return found

    assert torch.get_num_threads() >= 1
    found = on_ranks(world, threads, rank)
    seconds = [max(rank[i][0] for rank in found) for i in range(2, 2 + steps)]
    return {"seconds": statistics.median(seconds), "first": found[0][0][1],
            "last": found[0][-1][1]}


def stall(how: str, model: str, folder: str, threads: int, steps: int) -> dict[str, float]:
    """What one checkpoint costs: the copy, what the steps that go on beside it lose, and the whole
    time it takes to be written; and the same where training waits for it."""
    import torch  # noqa: F401

    world = 1 if how == "none" else 2
    tokens = tokens_of(model)

    def rank() -> dict[str, float]:
        import checkpoint

        step: Any = ours(how, folder)
        rows = tokens.chunk(world)[int(os.environ.get("RANK", 0))]

        def timed() -> float:
            begun = time.perf_counter()
            step(rows)
            return time.perf_counter() - begun

        plain = [timed() for _ in range(2 + steps)][2:]
        saver = checkpoint.Saver(Path(folder) / f"checkpoints-{how}", 2, step.ranks)
        begun = time.perf_counter()
        saver.save(1, step.parts(), {})
        copied = time.perf_counter() - begun
        beside, asked = [], 0.0
        while saver.work is not None:
            beside.append(timed())
            at = time.perf_counter()
            if not step.ranks.highest(saver.busy)[0]:
                saver.advance()
            asked += time.perf_counter() - at
        written = time.perf_counter() - begun
        begun = time.perf_counter()
        saver.save(2, step.parts(), {})
        saver.finish()
        usual = statistics.median(plain)
        return {"step": usual, "copy": copied, "waited": time.perf_counter() - begun,
                "lost": sum(beside) + asked - usual * len(beside), "written": written,
                "steps": len(beside),
                "bytes": sum(x.numel() * x.element_size() for part in step.parts().values()
                             for x in part.values())}

    found = on_ranks(world, threads, rank)
    return {k: max(x[k] for x in found) for k in found[0]}


def job(s: Settings) -> str:
    """All sides in turn."""
    model = {"full": "110M", "quick": "110M", "tiny": "tiny"}[s.size]
    steps = {"full": 5, "quick": 2, "tiny": 2}[s.size]
    threads = max(1, (os.cpu_count() or 2) // 2)
    *_, B, T = MODELS[model]
    with tempfile.TemporaryDirectory() as folder:
        child(HERE, "draw", model, folder, "float32")
        sides = {f"{how}, {side}": ("measure", [side, how, model, folder, threads, steps])
                 for side, how in SIDES if side == "ours" or installed("accelerate")}
        found = in_turn(HERE, s.rounds, sides)
        stalls = in_turn(HERE, s.rounds, {
            how: ("stall", [how, model, folder, threads, steps])
            for how in ("none", "ddp", "fsdp")})
    rows = []
    for side, runs in found.items():
        how, who = side.split(", ")
        spread = Spread.of([x["seconds"] for x in runs])
        rows.append(["1 rank" if how == "none" else f"2 ranks, {how}", who,
                     f"{spread.median:.3f}", f"{spread.least:.3f} to {spread.most:.3f}",
                     f"{B * T / spread.median:.0f}", f"{runs[0]['first']:.5f}",
                     f"{runs[0]['last']:.5f}"])
    for at, which in (("first", 5), ("last", 6)):
        losses = [float(row[which]) for row in rows]
        if max(losses) - min(losses) > APART * max(losses):
            s.faults.append(f"the {at} losses are {min(losses)} to {max(losses)}")
    lines = []
    for how, runs in stalls.items():
        x = {k: statistics.median(run[k] for run in runs) for k in runs[0]}
        lines.append([
            "1 rank" if how == "none" else f"2 ranks, {how}", f"{x['bytes'] / 2**30:.2f}",
            f"{x['step']:.3f}", f"{x['copy']:.3f}", f"{x['lost']:.3f}",
            f"{x['lost'] / x['step'] / max(1, x['steps']):.1%}", f"{x['written']:.2f}",
            f"{x['waited']:.2f}"])
    return (
        f"{model}, {B} x {T} tokens a step in float32, {threads} threads a rank, {os.cpu_count()} "
        f"cores; {versions('torch', 'transformers', 'accelerate')}. The ranks of one machine share "
        "its cores and memory: this shows what sharing costs, not what a second GPU brings.\n\n"
        + table(["", "side", "seconds a step", "range", "tokens/s", "first loss", "last loss"],
                rows)
        + "\n\nA checkpoint while training goes on: it waits for the copy to host memory; the "
        "steps taken while the files are written lose what stands beside, in all and as a share of "
        "those steps (here writing takes the cores that train).\n\n"
        + table(["", "GB", "seconds a step", "copy", "lost beside it", "of those steps",
                 "seconds until it has its name", "if training waits"], lines))


if __name__ == "__main__":
    sys.exit(main(HERE, "One rank and two; a checkpoint while training goes on",
                  {"draw": draw, "measure": measure, "stall": stall}, job))
