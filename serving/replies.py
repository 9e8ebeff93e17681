"""Answers the web page's questions with a model.

A question comes from a browser, so every key and type is checked, and nothing can be asked beyond
what sample.py was started with.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from inference.decode import DecodeStep
from inference.detokenizer import stream_text
from inference.generate import generate
from inference.prompt_format import TRUNCATED_NOTICE, GenerationConfig
from model import Llama
from runtime.console import UserError

# Label, description, and placeholder of a tab
TABS = {"chat": ("Chat", "A conversation. Earlier messages are remembered until Clear.",
                 "Say something"),
        "text": ("Continue", "The model continues a text.", "The beginning of a text")}
QUESTION_TYPES = {"format": str, "text": str, "messages": list, "new": int, "seed": int,
                  "temperature": int | float, "top_p": int | float}


def page_facts(title: str, configs: Mapping[str, GenerationConfig]) -> dict[str, Any]:
    """What the page shows: its title, its tabs with their texts, and the default settings."""
    formats = []
    for name, (prompt_format, _, _) in configs.items():
        if name in TABS:
            kind, (label, about, hint) = name, TABS[name]
        else:
            kind = "translate"
            source, target = map(prompt_format.translation.name_of, name.split("-"))
            label, about = f"{source} → {target}", "Each line is translated separately."
            hint = f"Text in {source}"
        formats.append({"name": name, "kind": kind, "label": label, "about": about, "hint": hint})
    sampling = configs["text"].sampling
    return {"title": title, "formats": formats, "truncated": TRUNCATED_NOTICE,
            "new": sampling.max_new_tokens, "temperature": sampling.temperature,
            "top_p": sampling.top_p}


def make_replier(model: Llama, configs: Mapping[str, GenerationConfig],
                 decode_step: DecodeStep | None = None,
                 ) -> Callable[[Mapping[str, Any]], Iterator[dict[str, Any]]]:
    """A function that answers the page's questions.

    A question has "format", "text" or "messages", and optionally "new", "seed", "temperature" and
    "top_p". The answer is that of `reply_parts`. UserError on any other question.
    """

    def reply(question: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
        name, content = check_question(question, configs)
        config = adjusted_config(configs[name], question)
        prompt_format = config.prompt_format
        truncated = False
        if prompt_format.direction:  # each line separately; a blank line has no translation
            prompts = [prompt_format.encode(line) if line.strip() else []
                       for line in content.split("\n")]
        elif name == "chat":
            room = model.config.max_position_embeddings - config.sampling.max_new_tokens
            messages, ids = prompt_format.truncate_conversation(content, room)
            prompts, truncated = [ids], len(messages) < len(content)
        else:
            prompts = [prompt_format.encode(content)]
        return reply_parts(model, config, prompts, name != "text", truncated, decode_step)

    return reply


def check_question(question: Mapping[str, Any],
                   configs: Mapping[str, GenerationConfig]) -> tuple[str, Any]:
    """The name of the tab, and the text or messages; UserError on a malformed question."""
    for key, value in question.items():
        if not isinstance(value, QUESTION_TYPES.get(key, ())) or isinstance(value, bool):
            raise UserError(f"{key[:20]}: not a key of a question, or of the wrong type")
    name = question.get("format")
    content = question.get("messages" if name == "chat" else "text")
    if name not in configs or content is None or content == []:
        raise UserError("expected a format that the page offers, and a text or messages")
    return name, content


def adjusted_config(config: GenerationConfig, question: Mapping[str, Any]) -> GenerationConfig:
    """The configuration with the settings of a question; a translation is not sampled."""
    limit = config.sampling.max_new_tokens
    new = question.get("new", limit)
    if new > limit:
        raise UserError(f"{new} tokens: at most {limit}, as sample.py was started with")
    keys = ["seed"]
    if not config.prompt_format.direction:
        keys += ["temperature", "top_p"]
    values = {key: question[key] for key in keys if key in question}
    return config._replace(sampling=replace(config.sampling, max_new_tokens=new, **values))


def reply_parts(model: Llama, config: GenerationConfig, prompts: Sequence[Sequence[int]],
                strip: bool, truncated: bool,
                decode_step: DecodeStep | None = None) -> Iterator[dict[str, Any]]:
    """An answer as it is generated: {"text"} of each of `prompts`, a line each, and {"note"},
    finally {"end", "tokens", "seconds"}.

    `strip`: no line begins with a space; `truncated`: `prompts` lack a part of the conversation.
    """
    prompt_format, sampling, stopping = config
    start, reasons = time.monotonic(), []  # of each token
    room = model.config.max_position_embeddings - sampling.max_new_tokens
    bos = prompt_format.tokenizer.bos

    def new_tokens(ids: Sequence[int]) -> Iterator[int]:
        for _, token, reason in generate(model, [ids], sampling, stopping, bos,
                                         decode_step=decode_step):
            reasons.append(reason)
            yield token

    if truncated:
        yield {"note": TRUNCATED_NOTICE}
    for i, ids in enumerate(prompts):
        if i:
            yield {"text": "\n"}
        if not ids and prompt_format.direction:
            continue
        if len(ids) > room:
            yield {"note": "this is longer than the context; its beginning was left out"}
        at_start = strip
        for piece in stream_text(prompt_format.tokenizer, ids, new_tokens(ids), stopping.strings):
            if at_start:
                piece = piece.lstrip()
                at_start = not piece
            yield {"text": piece}
    if "length" in reasons:
        end = "length"
    else:
        end = reasons[-1] if reasons else "eos"
    yield {"end": end, "tokens": len(reasons), "seconds": round(time.monotonic() - start, 1)}
