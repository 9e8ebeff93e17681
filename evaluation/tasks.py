"""The kinds of evaluation: what is asked of a model, and how it is counted.

**Bits per byte** of documents, as lm-evaluation-harness counts rolling log-likelihood (its
`get_rolling_token_windows` with a context of one token), except that BOS is never itself scored:

    document   t1 t2 t3 t4 t5 t6 t7 t8 t9 t10      window length 4
    1st        BOS t1 t2 t3              -> t1 t2 t3 t4
    2nd                 t4 t5 t6 t7      -> t5 t6 t7 t8
    last                   t6 t7 t8 t9   -> t9 t10    (full left context; t7, t8 not scored again)

Each document stands alone, each of its tokens is predicted exactly once, and the result is a ratio
of sums: nats of all documents over bytes of all documents, in bits. Unlike a loss per token it can
be compared between tokenizers. Windows are packed into rows, which changes nothing but the speed.

**Choices** by how likely each is behind the context, and **answers** by greedy decoding, as
lm-evaluation-harness cuts text into ids: context and continuation are encoded together, blanks at a
context's end belong to the continuation, and what is too long loses its beginning, BOS too. Asked
in conversation (its `--apply_chat_template`), examples are turns, the model's chat template writes
them, and a choice stands directly behind.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from data import IGNORE, Batch
from inference.detokenizer import decode_answer
from inference.generate import completions
from inference.sampling import SamplingParams, StoppingCriteria
from inference.scoring import score
from runtime.console import FLAGS, UserError, say
from tokenization.tokenizer import Part

if TYPE_CHECKING:
    from evaluation.suites import Item, Prompt, Suite
    from model import Llama
    from tokenization.chat_template import Template
    from tokenization.tokenizer import Tokenizer

ROW = 2048  # tokens: a packed row's attention costs its square; a longer window has its own row
BUDGET = 4096  # tokens read at once


def start_token(tokenizer: Tokenizer) -> int:
    """What stands before a document's first token: BOS, else EOS, as in lm-evaluation-harness."""
    start = tokenizer.eos if tokenizer.bos is None else tokenizer.bos
    if start is None:
        raise UserError("the tokenizer has neither BOS nor EOS, so a document's first token has "
                        "nothing to be predicted from; name a bos_token in tokenizer_config.json")
    return start


def windows(ids: Sequence[int], start: int, length: int) -> Iterator[tuple[list[int], list[int]]]:
    """Cut a document (without BOS) into (inputs, targets); the last inputs predict the targets.

    At most `length` inputs; every token is a target exactly once, in order. No token, no window.
    """
    ids = [start, *map(int, ids)]  # the token at i predicts the one at i + 1
    for begin in range(0, len(ids) - 1, length):
        end = min(begin + length, len(ids) - 1)
        yield ids[max(0, end - length) : end], ids[begin + 1 : end + 1]


def pack(lengths: Sequence[int], width: int) -> list[list[int]]:
    """Put pieces into rows of `width`, the longest that still fits first; rows of indices.

    A piece longer than that has a row of its own. Rows come longest first piece first.
    """
    left = sorted(range(len(lengths)), key=lengths.__getitem__)
    sizes = [lengths[i] for i in left]
    rows = []
    while left:
        row, room = [left.pop()], width - sizes.pop()
        while at := bisect_right(sizes, room):
            row.append(left.pop(at - 1))
            room -= sizes.pop(at - 1)
        rows.append(row)
    return rows


@torch.inference_mode()
def document_nats(model: Llama, documents: Sequence[Sequence[int]], start: int, length: int = 0,
                  move: Callable[[int], object] = lambda tokens: None,
                  kept: torch.dtype = torch.float64) -> np.ndarray:
    """-log p of each document in nats, (N,) float64; documents are ids without BOS and EOS.

    `start` stands before each document and is never scored; `length` is the most inputs of a
    window, 0 for the model's context. `move` is told how many tokens were scored, batch by batch.
    `kept`: what each log p, and a window's sum of them, is rounded to.
    """
    length = length or model.config.max_position_embeddings
    pieces, owner = [], []
    for i, ids in enumerate(documents):
        for piece in windows(ids, start, length):
            pieces.append(piece)
            owner.append(i)
    nats = torch.zeros(len(pieces), dtype=torch.float64)  # of each window
    sizes = [len(inputs) for inputs, _ in pieces]
    usual = min(max(sizes, default=0), ROW)
    rows = pack(sizes, usual)
    while rows:
        width = max(usual, sizes[rows[0][0]])
        n = max(1, BUDGET // width)
        batch = Batch.of([_row([(i, *pieces[i]) for i in row], width) for row in rows[:n]])
        rows = rows[n:]
        scored = batch.targets != IGNORE  # (B,T)
        at = batch.to(model.device)
        nll = model(at.tokens, at.doc, at.pos, at.targets).cpu().to(kept).double()  # (B,T)
        nats.index_add_(0, batch.doc[scored], nll[scored])
        move(int(scored.sum()))
    owner = torch.tensor(owner, dtype=torch.long)  # the document that a window is of
    whole = torch.zeros(len(documents), dtype=torch.float64)
    return whole.index_add_(0, owner, nats.to(kept).double()).numpy()


def _row(pieces: Sequence[tuple[int, list[int], list[int]]], width: int) -> np.ndarray:
    """Windows (index, inputs, targets) side by side: (4, width) of tokens, targets, doc, pos."""
    row = np.empty((4, width), np.int64)
    row[:] = [[0], [IGNORE], [-1], [0]]
    at = 0
    for i, inputs, targets in pieces:
        end = at + len(inputs)
        row[0, at:end], row[1, end - len(targets) : end] = inputs, targets
        row[2, at:end], row[3, at:end] = i, np.arange(len(inputs))
        at = end
    return row


class Written(str):
    """A text that a chat template wrote: a control token's name in it is that token."""


def begun(tokenizer: Tokenizer, text: str) -> list[int]:
    """A text's ids behind BOS, where the tokenizer begins a text so, and no template has."""
    start = [] if tokenizer.bos is None else [tokenizer.bos]
    if not isinstance(text, Written):
        return start + tokenizer.encode(text)
    [ids] = tokenizer.encode_parts([Part(text, control=True, first=True)])
    return ids if ids[:1] == start else start + ids


def split(tokenizer: Tokenizer, context: str, continuation: str) -> tuple[list[int], list[int]]:
    """Ids of a context, and of a continuation behind it; the first are never empty.

    Blanks at the context's end go over to the continuation; both are encoded as one text, and what
    goes beyond the context's own ids is the continuation, which may be nothing.
    """
    if not context:
        return [start_token(tokenizer)], tokenizer.encode(continuation)
    kind = type(context)
    before = begun(tokenizer, kind(context.rstrip()))
    whole = begun(tokenizer, kind(context + continuation))
    return before or [start_token(tokenizer)], whole[len(before) :]


def contexts(items: Sequence[Item], template: Template | None) -> list[str]:
    """What is read before each answer: a text, or the turns of a conversation as its template
    writes them, up to where an answer begins."""
    if template is None:
        return [x.context for x in items]
    roles = ("user", "assistant")
    return [Written(template.render([{"role": roles[i % 2], "content": said}
                                     for i, said in enumerate(x.turns)], generation=True))
            for x in items]


def say_cut(n: int, N: int, room: int) -> None:
    """Say how many of N requests do not fit, if any: nothing is left out in silence."""
    if n:
        say(f"{n:,} of {N:,} requests do not fit into {room} tokens: their contexts lose their "
            "beginning, BOS too, as in lm-evaluation-harness")


def choose(model: Llama, tokenizer: Tokenizer, asked: Sequence[tuple[str, Sequence[str]]],
           delimiter: str = " ", length: int = 0,
           move: Callable[[int], object] = lambda done: None,
           kept: torch.dtype = torch.float64,
           cut: Callable[[int, int, int], object] = say_cut) -> list[list[float]]:
    """log p of each choice behind its context, in nats; asked: (context, choices) of each item.
    `cut`: as `say_cut`."""
    prompts, continuations = [], []
    for i, (context, choices) in enumerate(asked):
        for choice in choices:
            before, ids = split(tokenizer, context, delimiter + choice)
            if not ids:
                raise UserError(f"item {i + 1}: the choice {choice!r} has no token of its own "
                                f"behind {context[-40:]!r}, so it cannot be scored")
            prompts.append(before)
            continuations.append(ids)
    room = (length or model.config.max_position_embeddings) + 1  # the last id is only predicted
    cut(sum(len(p) + len(c) > room for p, c in
            zip(prompts, continuations, strict=True)), len(prompts), room - 1)
    logp = iter(score(model, prompts, continuations, length, move, kept)[0].tolist())
    return [[next(logp) for _ in choices] for _, choices in asked]


def answer(model: Llama, tokenizer: Tokenizer, contexts: Sequence[str], stop: Sequence[str],
           new_tokens: int, length: int = 0, beams: int = 1,
           move: Callable[[int], object] = lambda done: None, ends: Collection[int] = (),
           cut: Callable[[int, int, int], object] = say_cut) -> list[tuple[str, str]]:
    """What the model says behind each context, greedily, and why it ended: eos, stop or length.

    A context keeps its last `length - new_tokens` ids. The answer is cut at the first stop string;
    `ends`: ids besides EOS that end one, as those of weights.stop_ids; `cut`: as `say_cut`.
    """
    length = length or model.config.max_position_embeddings
    if new_tokens >= length:
        raise UserError(f"--max-new-tokens {new_tokens}: a context of {length} tokens leaves no "
                        f"room for a question; at most {length - 1}", FLAGS)
    if tokenizer.eos is None:
        say("the tokenizer has no EOS: an answer ends at a stop string, or after "
            f"{new_tokens} tokens")
    eos = [] if tokenizer.eos is None else [tokenizer.pieces[tokenizer.eos]]
    ends = {tokenizer.eos, *ends}
    stops = StoppingCriteria(ends, [*stop, *eos], tokenizer.decode)
    prompts = [begun(tokenizer, x) for x in contexts]
    room = length - new_tokens
    cut(sum(len(ids) > room for ids in prompts), len(prompts), room)
    prompts = [ids[-room:] for ids in prompts]
    sampling = SamplingParams(new_tokens, temperature=0.0, beams=beams)
    said = []
    for ids, end in completions(model, prompts, sampling, stops, start_token(tokenizer)):
        text = decode_answer(tokenizer, [], [x for x in ids if x not in ends])
        said.append((stops.truncate(text), end))
        move(1)
    return said


def known(suite: Suite, prompt: Prompt, item: Item) -> dict[str, Any]:
    """What the record of an item says before the model has."""
    if suite.kind == "translate":
        return {"source": str(item.row[prompt.part.partition("-")[0]]), "reference": item.gold}
    return {"gold": item.gold}


def records(model: Llama, tokenizer: Tokenizer, suite: Suite, prompt: Prompt,
            items: Sequence[Item], length: int = 0, new_tokens: int = 0, beams: int = 1,
            move: Callable[[int], object] = lambda done: None,
            kept: torch.dtype = torch.float64,
            template: Template | None = None, ends: Collection[int] = (),
            cut: Callable[[int, int, int], object] = say_cut) -> list[dict[str, Any]]:
    """What the model chose or said of each item, as judge.py counts it.

    `move` is told how many choices, or answers, are done; `template`: it is asked in conversation;
    `ends`: ids besides EOS that end an answer; `cut`: told, in place of a person, as `say_cut`.
    """
    asked = contexts(items, template)
    if suite.kind == "choose":
        pairs = [(text, x.choices) for text, x in zip(asked, items, strict=True)]
        scores = choose(model, tokenizer, pairs, "" if template else suite.delimiter, length, move,
                        kept, cut)
        return [{**known(suite, prompt, x), "logp": logp, "choices": list(x.choices),
                 **{column: x.row[column] for column in suite.groups}}
                for x, logp in zip(items, scores, strict=True)]
    said = answer(model, tokenizer, asked, suite.stop, new_tokens or suite.new_tokens, length,
                  beams, move, ends, cut)
    what = "answer" if suite.kind == "match" else "hypothesis"
    return [{**known(suite, prompt, x), what: text, "end": end}
            for x, (text, end) in zip(items, said, strict=True)]
