"""The model that is evaluated: how requests become token ids, and how they are answered.

The requests are those of lm-evaluation-harness: the likelihood of a continuation after a context,
a greedy answer after a context, the likelihood of a document. Ids are cut as the harness cuts them:
context and continuation are encoded together, spaces at the end of a context belong to the
continuation, and a context that is too long loses its beginning, BOS included. With a chat template
(the harness's `--apply_chat_template`) few-shot examples are turns of a conversation, and a
continuation follows without a delimiter.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch

from evaluation.likelihood import document_nats, no_progress
from inference.detokenizer import decode_answer
from inference.generate import completions
from inference.sampling import SamplingParams, StoppingCriteria
from inference.scoring import score
from runtime.console import FLAGS, UserError, info
from runtime.dtypes import FLAG_NAMES
from tokenization.tokenizer import Segment

if TYPE_CHECKING:
    from evaluation.suites import Item
    from model import Llama
    from tokenization.chat_template import ChatTemplate
    from tokenization.tokenizer import Tokenizer

Progress = Callable[[int], object]  # gets the number of requests, or of tokens, just finished


class Continuation(NamedTuple):
    """A request for the likelihood of a continuation after a context."""

    context: str
    text: str
    item: int  # index of the item, for messages


class Answer(NamedTuple):
    """A generated answer and why it ended: eos, stop or length."""

    text: str
    end: str


class Truncation(NamedTuple):
    """How many of all requests are longer than the room that the context has for them."""

    truncated: int
    requests: int
    room: int  # tokens


class ChatText(str):
    """A text that a chat template wrote: the name of a control token in it is that token."""


def warn_truncated(truncation: Truncation) -> None:
    """Print how many requests are truncated, if any."""
    if truncation.truncated:
        info(f"{truncation.truncated:,} of {truncation.requests:,} requests do not fit into "
            f"{truncation.room} tokens: their contexts lose their beginning, BOS included, as in "
            "lm-evaluation-harness")


def start_token(tokenizer: Tokenizer) -> int:
    """Return what stands before a document's first token: BOS, else EOS, as in the harness."""
    start = tokenizer.eos if tokenizer.bos is None else tokenizer.bos
    if start is None:
        raise UserError("tokenizer_config.json: expected a BOS or an EOS token, found neither BOS "
                        "nor EOS, so the first token of a document cannot be predicted; add a "
                        "bos_token")
    return start


def encode_context(tokenizer: Tokenizer, text: str) -> list[int]:
    """Return the ids of a text after BOS, if the tokenizer has one and the text does not begin with
    it already."""
    bos = [] if tokenizer.bos is None else [tokenizer.bos]
    if not isinstance(text, ChatText):
        return bos + tokenizer.encode(text)
    [ids] = tokenizer.encode_segments([Segment(text, control=True, first=True)])
    return ids if ids[:1] == bos else bos + ids


def encode_pair(tokenizer: Tokenizer, context: str,
                continuation: str) -> tuple[list[int], list[int]]:
    """Return the ids of a context, which are never empty, and of the continuation after it.

    Spaces at the end of the context move to the continuation. Both are encoded as one text; what
    goes beyond the context's own ids is the continuation, which may be empty.
    """
    if not context:
        return [start_token(tokenizer)], tokenizer.encode(continuation)
    text_type = type(context)
    context_ids = encode_context(tokenizer, text_type(context.rstrip()))
    all_ids = encode_context(tokenizer, text_type(context + continuation))
    return context_ids or [start_token(tokenizer)], all_ids[len(context_ids) :]


@dataclass
class EvalModel:
    """A model with its tokenizer, and how it is evaluated."""

    model: Llama
    tokenizer: Tokenizer
    max_length: int = 0  # tokens of context; 0: all that the model has
    quant: str = "none"
    lm_eval_compat: bool = False
    chat_template: ChatTemplate | None = None  # with one, suites are asked as conversations
    taught_template: ChatTemplate | None = None  # of prompts that are taught as conversations
    stop_ids: frozenset[int] = frozenset()  # ids that end an answer, in addition to EOS
    # what each log p, and a sum of them, is rounded to; None: compute dtype with lm_eval_compat
    logprob_dtype: torch.dtype | None = None

    def __post_init__(self) -> None:
        self.max_length = self.max_length or self.model.config.max_position_embeddings
        if self.logprob_dtype is None:
            compute_dtype = self.model.compute_dtype
            self.logprob_dtype = compute_dtype if self.lm_eval_compat else torch.float64

    @property
    def dtype_name(self) -> str:
        """The compute dtype as --dtype calls it."""
        return FLAG_NAMES[self.model.compute_dtype]

    def signature(self) -> dict[str, object]:
        """Return the choices that figures of this model depend on, by name."""
        choices: dict[str, object] = {
            "start": "eos" if self.tokenizer.bos is None else "bos", "window": self.max_length,
            "dtype": self.dtype_name,
            "sum": self.dtype_name if self.lm_eval_compat else "fp64"}
        if self.quant != "none":
            choices["quant"] = self.quant
        if self.lm_eval_compat:
            choices["compat"] = "lm-eval,0.4.13"
        return choices

    def template(self, taught_as: str = "") -> ChatTemplate | None:
        """Return the chat template by which a prompt is asked (`Prompt.taught_as`), if any."""
        if taught_as == "chat":
            return self.taught_template
        return None if taught_as else self.chat_template

    def chat_signature(self, taught_as: str = "") -> dict[str, str]:
        """Return the hash of the chat template and its variables, if a prompt is asked with one."""
        template = self.template(taught_as)
        if template is None:
            return {}
        text = template.source
        if template.kwargs:
            text += json.dumps(template.kwargs, sort_keys=True)
        return {"chat": hashlib.sha256(text.encode()).hexdigest()[:8]}

    def contexts(self, items: Sequence[Item], taught_as: str = "") -> list[str]:
        """Return the context of each item: its text, or its turns as the chat template writes them,
        up to where the answer begins."""
        template = self.template(taught_as)
        if template is None:
            return [item.context for item in items]
        texts = []
        for item in items:
            messages = [{"role": "assistant" if i % 2 else "user", "content": text}
                        for i, text in enumerate(item.turns)]
            texts.append(ChatText(template.render(messages, add_generation_prompt=True)))
        return texts

    def delimiter(self, delimiter: str, taught_as: str = "") -> str:
        """Return what stands between context and continuation: nothing after a chat template."""
        return delimiter if self.template(taught_as) is None else ""

    def loglikelihood(self, requests: Sequence[Continuation], progress: Progress = no_progress,
                      on_truncation: Callable[[Truncation], object] = warn_truncated,
                      ) -> list[float]:
        """Return log p of each continuation after its context, in nats."""
        contexts, continuations = [], []
        for request in requests:
            context_ids, ids = encode_pair(self.tokenizer, request.context, request.text)
            if not ids:
                raise UserError(
                    f"item {request.item + 1}: the choice {request.text!r} has no token of its own "
                    f"after {request.context[-40:]!r}, so it cannot be scored; correct the choices "
                    "of the suite")
            contexts.append(context_ids)
            continuations.append(ids)
        room = self.max_length + 1  # the last id is only predicted, never an input
        truncated = sum(len(context_ids) + len(ids) > room
                        for context_ids, ids in zip(contexts, continuations, strict=True))
        on_truncation(Truncation(truncated, len(requests), room - 1))
        logp, _ = score(self.model, contexts, continuations, self.max_length, progress,
                        self.logprob_dtype)
        return logp.tolist()

    def generate_until(self, contexts: Sequence[str], stop: Sequence[str], max_new_tokens: int,
                       beams: int = 1, progress: Progress = no_progress,
                       on_truncation: Callable[[Truncation], object] = warn_truncated,
                       ) -> list[Answer]:
        """Return the model's answer to each context, greedy or the best of `beams`.

        A context keeps its last `max_length - max_new_tokens` ids. An answer is cut at the first
        stop string.
        """
        tokenizer = self.tokenizer
        room = self.max_length - max_new_tokens
        if room < 1:
            raise UserError(
                f"--max-new-tokens {max_new_tokens}: a context of {self.max_length} tokens leaves "
                f"no room for a question; expected at most {self.max_length - 1}", FLAGS)
        stop_strings = list(stop)
        if tokenizer.eos is None:
            info("the tokenizer has no EOS: an answer ends at a stop string, or after "
                f"{max_new_tokens} tokens")
        else:
            stop_strings.append(tokenizer.pieces[tokenizer.eos])
        stop_ids = {tokenizer.eos, *self.stop_ids}
        stops = StoppingCriteria(stop_ids, stop_strings, tokenizer.decode)
        prompts = [encode_context(tokenizer, text) for text in contexts]
        truncated = sum(len(ids) > room for ids in prompts)
        on_truncation(Truncation(truncated, len(prompts), room))
        prompts = [ids[-room:] for ids in prompts]
        params = SamplingParams(max_new_tokens, temperature=0.0, beams=beams)
        answers = []
        for ids, end in completions(self.model, prompts, params, stops, start_token(tokenizer)):
            text = decode_answer(tokenizer, [], [x for x in ids if x not in stop_ids])
            answers.append(Answer(stops.truncate(text), end))
            progress(1)
        return answers

    def with_scored_bos(self, documents: Sequence[list[int]]) -> list[list[int]]:
        """Return documents (ids) with a BOS that is scored itself, which lm_eval_compat asks for;
        else as they are."""
        bos = self.tokenizer.bos
        if self.lm_eval_compat and bos is not None:
            return [[bos, *ids] for ids in documents]
        return list(documents)

    def rolling_nats(self, documents: Sequence[Sequence[int]],
                     progress: Progress = no_progress) -> np.ndarray:
        """Return -log p in nats of each document (ids), (N,) float64."""
        return document_nats(self.model, documents, start_token(self.tokenizer), self.max_length,
                             progress, self.logprob_dtype)

    def check_finite(self, values: np.ndarray, name: str) -> None:
        """Raise UserError if a log-probability is not finite."""
        if not np.isfinite(values).all():
            raise UserError(f"{name}: log-probabilities are not finite in {self.dtype_name}; use "
                            "--dtype fp32")
