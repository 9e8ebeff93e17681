"""What a run looks at between steps: held-out text in bits per byte, and fixed prompts continued.

One idea: a look leaves no trace in what it looks at. The model trains on afterwards as if it had
not been asked, and samples.txt holds each look once, however often a run was cut and resumed.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from checkpoints.atomic_write import write_text
from evaluation.eval_model import start_token
from evaluation.likelihood import answer_nats, document_nats
from evaluation.metrics import bits_per_byte
from inference.detokenizer import decode_answer
from inference.generate import completions
from inference.sampling import SamplingParams, StoppingCriteria
from model import Llama
from runtime import console
from tokenization.document import Document
from tokenization.tokenizer import Tokenizer
from training import datasets as sources

NEW = 40  # tokens that a prompt is continued by, at most


def bits(model: Llama, held: sources.Held, tokenizer: Tokenizer) -> dict[str, float]:
    """Bits per byte of each held-out text, as eval.py measures them."""
    found = {}
    model.eval()
    for name, texts in held.items():
        if isinstance(texts[0], Document):  # of an answer, given what was asked
            nats = answer_nats(model, texts)
            n_bytes = sum(int(tokenizer.byte_lengths[d.ids[d.mask]].sum()) for d in texts)
        else:
            nats = document_nats(model, texts, start_token(tokenizer))
            n_bytes = sum(tokenizer.count_bytes(ids) for ids in texts)
        found[name] = bits_per_byte(float(np.sum(nats)), n_bytes)
    model.train()
    return found


def samples(model: Llama, held: sources.Held, tokenizer: Tokenizer, prompts: Sequence[str]) -> str:
    """The prompts, or the first words of held-out texts, continued greedily, as samples.txt has
    them. All ranks ask: of a model that is cut each has a part."""
    start = [] if tokenizer.bos is None else [tokenizer.bos]
    read = [start + tokenizer.encode(p) for p in prompts] or [
        x.ids[: int(np.argmax(x.mask))].tolist() if isinstance(x, Document)
        else start + tokenizer.encode(tokenizer.decode(x[:8].tolist()))
        for texts in held.values() for x in texts[:2]]
    prompts, block = prompts or [tokenizer.decode(ids) for ids in read], ""
    sampling = SamplingParams(min(NEW, model.config.max_position_embeddings // 2), temperature=0.0)
    model.eval()
    answers = list(completions(model, read, sampling, StoppingCriteria({tokenizer.eos}),
                               tokenizer.bos))
    model.train()
    for prompt, ids, answer in zip(prompts, read, answers, strict=True):
        continued = decode_answer(tokenizer, ids, answer.ids)
        block += f"-- {prompt}\n{console.printable(continued)}\n"
    return block


def add(file: Path, step: int, block: str) -> None:
    """Put a step's look at the end of samples.txt, in place of those of work that was lost."""
    before = file.read_text(encoding="utf-8") if file.exists() else ""
    for m in re.finditer(r"^== step (\d+)$", before, re.M):
        if int(m[1]) >= step:
            before = before[: m.start()]
            break
    write_text(file, f"{before}== step {step}\n{block}")
