"""What a run would do and what it takes, said before it does it.

One idea: a plan is read off the very model, data and settings that would run, not off a table of
them.
"""

from __future__ import annotations

import dataclasses
import re
import time
from typing import Any

import log
import memory
import optim
import weights
from data import IGNORE
from ranks import GiB
from run import Run


def show(run: Run, origins: dict[str, str], objective: Any) -> None:
    """What would be done and what it takes, measured on one micro-batch that changes nothing."""
    s, n = run.s, run.parameters
    for f in dataclasses.fields(s):
        print(f"{f.name.replace('_', '-'):16} {getattr(s, f.name)!s:40} {origins[f.name]}")
    batch = run.loader.next()
    begun = time.perf_counter()
    (objective.total(run.model, batch.to(run.ranks.device))
     / max(1, objective.count(batch))).backward()
    run.ranks.wait()
    held = run.ranks.memory_gb()
    whole = "GPU's tensors" if run.ranks.device.type == "cuda" else "whole process"
    minutes = (time.perf_counter() - begun) * run.micro_batches * run.steps / 60
    moving = [(name, p) for name, p in run.model.named_parameters() if p.requires_grad]
    moments = sum(optim.bytes_held(name, p, s.optimizer) for name, p in moving) / GiB
    result = sum(p.nbytes for _, p in moving) / GiB
    base = weights.base_of(run.folder)
    said = memory.need(run.model.config, s, run.model.compute_dtype,
                       run.micro_batches, run.folder if run.folder != base else None)
    trained = "\n".join(
        f"             {len(x['params'])} tensors, {sum(p.numel() for p in x['params']):,} "
        f"numbers at {s.lr * x['scale']:.2e}, weight decay {x['weight_decay']}: "
        f"{', '.join(sorted({re.sub(r'layers.[0-9]+.', 'layers.*.', k) for k in x['names']}))}"
        for x in optim.groups(run.model, s.weight_decay, s.embedding_lr / s.lr or 1.0,
                              s.lora_plus))
    read = run.steps * run.tokens_per_step
    shares = ", ".join(
        f"{x.source.name} {share:.1%} ({x.tokens:,} tokens an epoch; {share * read:,.0f} in this "
        f"run, {share * read / x.tokens:.2f} times)"
        for x, share in zip(run.loader.streams, run.loader.shares, strict=True))
    print(
        f"\nmachine      {run.ranks}, products in {str(run.model.compute_dtype)[6:]}\n"
        f"parameters   {n['total']:,}, trained {n['trained']:,}\n{trained}\n"
        f"data         {shares}\n"
        f"steps        {run.steps} of {run.tokens_per_step:,} tokens\n"
        f"memory       {said.total / GiB:.2f} GB predicted at the most ({said}), of "
        f"{run.ranks.memory_limit_gb():.1f} GB here\n"
        f"             {held + moments:.2f} GB measured on one micro-batch, of the {whole}, with "
        f"{moments:.2f} for the optimizer\n"
        f"time         {minutes:.1f} minutes of steps, from that micro-batch (the first is "
        "the slowest)\n"
        f"disk         {s.keep * (result + moments) + result:.2f} GB for {s.keep} checkpoints "
        "and the result\n"
        "\nthe first row; what is trained is in colour:")
    tokens, targets, pos = (batch.tokens[0].tolist(), batch.targets[0].tolist(),
                            batch.pos[0].tolist())
    for i, (token, target) in enumerate(zip(tokens, targets, strict=True)):
        if pos[i] == 0:
            print(
                ("\n" if i else "") + log.coloured(run.tokenizer.piece(token), False), end="")
        following = (
            target if target != IGNORE else tokens[i + 1] if pos[i + 1 : i + 2] > [0] else None)
        if following is not None:
            print(log.coloured(run.tokenizer.piece(following), target != IGNORE), end="")
    print()
