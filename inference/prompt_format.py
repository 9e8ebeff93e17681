"""How a model is asked, and how its answer is read.

The one idea: a model is asked as it was taught. A conversation is written by the model's own chat
template; a translation is asked for by the prompt that training wrote beside the model
(prompt.json). Where there is none, ours for a conversation, and ALMA's for a translation.

`replies` answers the questions of a page (web.py), which is not to be trusted with more than it
offers.
"""

from __future__ import annotations

import functools
import json
import re
import time
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

from checkpoints.model_folder import base_model_dir
from inference.generate import stream
from inference.sampling import Sampling, Stops
from model import Llama
from runtime.console import UserError
from tokenization.chat_template import Template
from tokenization.tokenizer import Tokenizer

LANGUAGES = {"eng": "English", "kin": "Kinyarwanda"}
DIRECTIONS = ("eng-kin", "kin-eng")
OUTGROWN = "the conversation outgrows the context; what was said first is forgotten"
# Xu et al. 2023, as their code builds it; the answer follows directly
ALMA = "Translate this from {source} to {target}:\n{source}: {text}\n{target}:"

Asked = str | list[dict[str, str]]  # a text, or the messages of a conversation


@dataclass(frozen=True)
class Way:
    """How a model is asked: a text as it is, or within the prompt of a translation; messages by a
    template."""

    folder: Path
    tokenizer: Tokenizer
    direction: str = ""  # of a translation: eng-kin or kin-eng
    prompt: str = ALMA
    languages: Mapping[str, str] = field(default_factory=lambda: LANGUAGES)
    as_chat: bool = False  # whether a translation is asked for in a conversation

    @classmethod
    def of(cls, folder: Path, tokenizer: Tokenizer, direction: str = "") -> Way:
        """As the model's folder says, or for an adapter its base's; of a model that was taught no
        translation, ALMA's."""
        plain = cls(folder, tokenizer, direction)
        return (direction and plain._taught()) or plain

    def _taught(self) -> Way | None:
        """How a translation was asked for when the model was taught; None if it was not."""
        for file in (x / "prompt.json" for x in self.places):
            if not file.exists():
                continue
            try:
                asked = json.loads(file.read_text(encoding="utf-8")).get("translate")
                if asked is None:  # it was taught conversations
                    continue
                taught = asked[0]
                prompt = str(taught["text"])
                languages = {k: str(taught["languages"][k]) for k in LANGUAGES}
                if "{text}" not in prompt:
                    raise ValueError("no {text} in it")
                return replace(self, prompt=prompt, languages=languages,
                               as_chat=bool(taught.get("as_chat")))
            except (OSError, ValueError, LookupError, TypeError, AttributeError) as e:
                raise UserError(f"{file}: says not how a translation is asked for ({e}); mend it, "
                                "or take it away and ALMA's prompt is used") from None
        return None

    @classmethod
    def taught(cls, folder: Path, tokenizer: Tokenizer) -> dict[str, Way]:
        """All ways that the model's folder speaks of, by name: a direction of translation, chat;
        and text, which every model continues."""
        plain = cls.of(folder, tokenizer)
        taught = plain._taught()
        ways = {x: replace(taught, direction=x) for x in DIRECTIONS} if taught else {}
        return {**ways, **({"chat": plain} if plain.own_template else {}), "text": plain}

    @property
    def places(self) -> tuple[Path, Path]:
        """Where what was taught may stand: the model's folder, and for an adapter its base's."""
        return self.folder, base_model_dir(self.folder)

    @functools.cached_property
    def own_template(self) -> Template | None:
        """The model's chat template, or for an adapter its base's."""
        found = (Template.of(place, self.tokenizer) for place in self.places)
        return next(filter(None, found), None)

    @functools.cached_property
    def template(self) -> Template:
        """The model's own, else our plain one."""
        return self.own_template or Template.plain(self.tokenizer)

    def recent(self, said: Sequence[dict[str, str]],
               room: int) -> tuple[list[dict[str, str]], list[int]]:
        """The end of a conversation that fits into so many ids, and its ids: the first exchanges
        may go, the last message never does."""
        said = list(said)
        ids = self.ids(said)
        if len(ids) > room and len(said) > 2:  # halved, for it may be long, and a stranger's
            later = range(2, len(said), 2)
            found = bisect_left(later, -room, key=lambda i: -len(self.ids(said[i:])))
            said = said[later[min(found, len(later) - 1)] :]
            ids = self.ids(said)
        return said, ids

    def text(self, asked: Asked) -> str:
        """What is read, as a text: a prompt, or a conversation as its template writes it."""
        if not isinstance(asked, str):
            return self.template.render(asked, generation=True)
        return self._filled(asked) if self.direction else asked

    def ids(self, asked: Asked) -> list[int]:
        """The same as ids, with BOS where the tokenizer has one."""
        if isinstance(asked, str) and self.direction and self.as_chat:
            asked = [{"role": "user", "content": self._filled(asked)}]
        if not isinstance(asked, str):
            return self.template.encode(asked, generation=True)
        start = [] if self.tokenizer.bos is None else [self.tokenizer.bos]
        return start + self.tokenizer.encode(self.text(asked))

    def tail(self, ids: Sequence[int]) -> str:
        """The text of ids that stand behind others; of a text's beginning, a tokenizer may drop the
        space."""
        return self.tokenizer.decode([*self.tokenizer.encode("a"), *ids])[1:]

    def _filled(self, text: str) -> str:
        """The translation prompt of a text, its words parted by a blank each, as in training."""
        source, target = (self.languages[x] for x in self.direction.split("-"))
        words = {"{source}": source, "{target}": target, "{text}": " ".join(text.split())}
        return re.sub(r"\{(?:source|target|text)\}", lambda m: words[m[0]], self.prompt)


def pieces(tokenizer: Tokenizer, prompt: Sequence[int], tokens: Iterable[int],
           strings: Sequence[str] = ()) -> Iterator[str]:
    """A continuation's text, in pieces as they become certain; joined they are all of it, up to
    the first of `strings`.

    Decoded behind its prompt, so that spaces are right. Half a character decodes to U+FFFD: such an
    end waits for the tokens that complete it, and so does the beginning of a string.
    """
    ids = list(prompt)
    text = tokenizer.decode(ids)
    begin = shown = len(text)
    for token in tokens:
        ids.append(token)
        text = tokenizer.decode(ids)
        if found := [at for x in strings if (at := text.find(x, begin)) >= 0]:
            text = text[: min(found)]
            break
        whole = text.rstrip("\ufffd")
        starts = (n for x in strings for n in range(1, len(x)) if whole.endswith(x[:n]))
        certain = len(whole) - max(starts, default=0)
        if certain > shown:
            yield text[shown:certain]
            shown = certain
    yield text[shown:]


def whole(tokenizer: Tokenizer, prompt: Sequence[int], new: Sequence[int],
          strings: Sequence[str] = ()) -> str:
    """What `pieces` gives, of a continuation that is there to its end."""
    begin = len(tokenizer.decode(list(prompt)))
    text = tokenizer.decode([*prompt, *new])[begin:]
    return text[: min((at for x in strings if (at := text.find(x)) >= 0), default=len(text))]


class Manner(NamedTuple):
    """A way to be asked, how the tokens of an answer are chosen, and what ends it."""

    way: Way
    sampling: Sampling
    stops: Stops


def facts(title: str, manners: Mapping[str, Manner]) -> dict[str, Any]:
    """What a page shows: its title, the ways to ask with their names and words, what it may set."""
    words = {"chat": ("Chat", "A conversation. What was said is remembered until Clear.",
                      "Say something"),
             "text": ("Continue", "The model goes on from where a text ends.",
                      "The beginning of a text")}
    ways = []
    for name, (way, _, _) in manners.items():
        source, target = (way.languages.get(x, "") for x in name.partition("-")[::2])
        label, about, hint = words.get(name, (
            f"{source} → {target}", "Each line is translated by itself.", f"Text in {source}"))
        ways.append({"name": name, "kind": name if name in words else "translate",
                     "label": label, "about": about, "hint": hint})
    usual = manners["text"].sampling
    return {"title": title, "ways": ways, "outgrown": OUTGROWN, "new": usual.max_new_tokens,
            "temperature": usual.temperature, "top_p": usual.top_p}


def replies(model: Llama, manners: Mapping[str, Manner],
            ) -> Callable[[Mapping[str, Any]], Iterator[dict[str, Any]]]:
    """What answers a page's questions: {"way", "text" or "messages"} and maybe {"new", "seed",
    "temperature", "top_p"} -> an answer's `parts`; UserError on any other."""
    kinds = {"way": str, "text": str, "messages": list, "new": int, "seed": int,
             "temperature": int | float, "top_p": int | float}

    def reply(question: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
        for key, x in question.items():
            if not isinstance(x, kinds.get(key, ())) or isinstance(x, bool):
                raise UserError(f"{key[:20]}: no part of a question, or of another kind")
        name = question.get("way")
        asked = question.get("messages" if name == "chat" else "text")
        if name not in manners or asked is None or asked == []:
            raise UserError("expected a way that the page offers, and a text or messages")
        way, sampling, stops = manners[name]
        new = question.get("new", sampling.max_new_tokens)
        if new > sampling.max_new_tokens:
            raise UserError(f"{new} tokens: at most {sampling.max_new_tokens}, as sample.py was "
                            "told")
        chosen = ("seed",) if way.direction else ("seed", "temperature", "top_p")
        more = {k: question[k] for k in chosen if k in question}
        manner = Manner(way, replace(sampling, max_new_tokens=new, **more), stops)
        outgrown = False
        if way.direction:  # each line by itself
            texts = [way.ids(x) if x.strip() else [] for x in asked.split("\n")]
        elif name == "chat":
            said, ids = way.recent(asked, model.config.max_position_embeddings - new)
            texts, outgrown = [ids], len(said) < len(asked)
        else:
            texts = [way.ids(asked)]
        return parts(model, manner, texts, name != "text", outgrown)

    return reply


def parts(model: Llama, manner: Manner, texts: Sequence[Sequence[int]], bare: bool,
          outgrown: bool) -> Iterator[dict[str, Any]]:
    """An answer as it comes: {"text"} behind the ids of each of `texts`, a line each, and {"note"},
    at last {"end", "tokens", "seconds"}.

    `bare`: no line begins with a space; `outgrown`: of a conversation not all is in `texts`.
    """
    way, sampling, stops = manner
    begun, ends = time.monotonic(), []  # of each token, what stream says
    room = model.config.max_position_embeddings - sampling.max_new_tokens
    if outgrown:
        yield {"note": OUTGROWN}
    for i, ids in enumerate(texts):
        if i:
            yield {"text": "\n"}
        if not ids and way.direction:  # a blank line
            continue
        if len(ids) > room:
            yield {"note": "this is longer than the context; its beginning was left out"}
        found = _noted(stream(model, [ids], sampling, stops, way.tokenizer.bos), ends)
        blank = bare
        for piece in pieces(way.tokenizer, ids, found, stops.strings):
            piece = piece.lstrip() if blank else piece  # no answer begins with a space
            blank = blank and not piece
            yield {"text": piece}
    end = "length" if "length" in ends else ends[-1] if ends else "eos"
    yield {"end": end, "tokens": len(ends), "seconds": round(time.monotonic() - begun, 1)}


def _noted(found: Iterable[tuple[int, int, str]], ends: list[str]) -> Iterator[int]:
    """The ids that `stream` gives; its `end` of each is added to `ends`."""
    for _, token, end in found:
        ends.append(end)
        yield token
