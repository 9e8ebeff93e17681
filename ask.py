"""How a model is asked, and how its answer is read.

The one idea: a model is asked as it was taught. A conversation is written by the model's own chat
template; a translation is asked for by the prompt that training wrote beside the model
(prompt.json). Where there is none, ours for a conversation, and ALMA's for a translation.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import weights
from chat import Template
from log import UserError
from tokenizer import Tokenizer

LANGUAGES = {"eng": "English", "kin": "Kinyarwanda"}
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
        """As the model's folder says, or for an adapter its base's."""
        places = (folder, weights.base_of(folder))
        file = next((x / "prompt.json" for x in places if (x / "prompt.json").exists()), None)
        if not direction or file is None:
            return cls(folder, tokenizer, direction)
        try:
            taught = json.loads(file.read_text(encoding="utf-8"))["translate"][0]
            prompt = str(taught["text"])
            languages = {k: str(taught["languages"][k]) for k in LANGUAGES}
            if "{text}" not in prompt:
                raise ValueError("no {text} in it")
        except (OSError, ValueError, LookupError, TypeError) as e:
            raise UserError(f"{file}: says not how a translation is asked for ({e}); mend it, or "
                            "take it away and ALMA's prompt is used") from None
        return cls(folder, tokenizer, direction, prompt, languages, bool(taught.get("as_chat")))

    @functools.cached_property
    def template(self) -> Template:
        """The model's chat template, or for an adapter its base's; else our plain one."""
        places = (self.folder, weights.base_of(self.folder))
        found = (Template.of(place, self.tokenizer) for place in places)
        return next(filter(None, found), None) or Template.plain(self.tokenizer)

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

    def _filled(self, text: str) -> str:
        """The translation prompt of a text, which is put on one line."""
        source, target = (self.languages[x] for x in self.direction.split("-"))
        words = {"{source}": source, "{target}": target, "{text}": " ".join(text.splitlines())}
        return re.sub(r"\{(?:source|target|text)\}", lambda m: words[m[0]], self.prompt)

    def turn_ends(self) -> set[int]:
        """The control token that the template writes behind an answer, if it writes one."""
        asked = [{"role": "user", "content": "a"}]
        whole = self.template.encode([*asked, {"role": "assistant", "content": "b"}])
        behind = whole[len(self.template.encode(asked, generation=True)) :]
        return set([x for x in behind if x in self.tokenizer.control][:1])


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
