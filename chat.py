"""Conversations as the model's own chat template writes them, and their ids.

One idea: the template is a stranger's program, and a message is a stranger's text. The template
runs in Jinja's sandbox, with bounds, and can only make a string. What becomes a control token is
decided by the template alone: the same characters typed inside a message stay text.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from log import UserError
from tokenizer import Tokenizer

ROLES = ("system", "user", "assistant", "tool")
LONGEST = 1 << 26  # characters that a template may make of one conversation
NAMED = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token")


@dataclass(frozen=True)
class Template:
    """A chat template: where it is from, its Jinja source, and the control tokens it may name."""

    where: Path
    source: str
    tokens: Mapping[str, str]
    tokenizer: Tokenizer

    @classmethod
    def of(cls, folder: Path, tokenizer: Tokenizer) -> Template | None:
        """The template of a model's folder: chat_template.jinja, else tokenizer_config.json's."""
        words = _words(folder / "tokenizer_config.json")
        tokens = {**_words(folder / "special_tokens_map.json"), **words}
        tokens = {k: x.get("content") if isinstance(x, dict) else x for k, x in tokens.items()}
        tokens = {k: tokens[k] for k in NAMED if isinstance(tokens.get(k), str)}
        file = folder / "chat_template.jinja"
        if file.exists():
            try:
                return cls(file, file.read_text(encoding="utf-8"), tokens, tokenizer)
            except (OSError, ValueError) as e:
                raise UserError(f"{file}: cannot be read ({e}); fetch it again") from None
        file, found = folder / "tokenizer_config.json", words.get("chat_template")
        if isinstance(found, list):  # several, by name
            named = {x.get("name"): x.get("template") for x in found if isinstance(x, dict)}
            found = named.get("default")
        if found is None:
            return None
        if not isinstance(found, str):
            raise UserError(f"{file}: chat_template is no text; fetch it again")
        return cls(file, found, tokens, tokenizer)

    def render(self, messages: Sequence[Mapping[str, str]], generation: bool = False) -> str:
        """A conversation as the template writes it; `generation`: up to where an answer begins.

        UserError on messages that are none, and on whatever goes wrong in the template.
        """
        import jinja2

        messages = [dict(_checked(x, i)) for i, x in enumerate(messages)]
        try:
            parts, length = [], 0
            for part in _compiled(self.source).generate(
                    messages=messages, add_generation_prompt=generation, **self.tokens):
                parts.append(part)
                if (length := length + len(part)) > LONGEST:
                    raise UserError(f"{self.where}: writes without end")
            return "".join(parts)
        except jinja2.TemplateError as e:
            raise UserError(f"{self.where}: {' '.join(str(e).split())[:200]}") from None
        except (TypeError, ValueError, KeyError, IndexError, AttributeError, ArithmeticError,
                RecursionError, MemoryError) as e:
            raise UserError(f"{self.where}: {type(e).__name__} in the template "
                            f"({' '.join(str(e).split())[:160]})") from None

    def encode(self, messages: Sequence[Mapping[str, str]], generation: bool = False) -> list[int]:
        """Ids of a conversation; no BOS is added, for the template writes it where it wants one.

        A control token's name in a message is taken out before the template sees it, and put
        back as text where the template has left its mark.
        """
        names = sorted((self.tokenizer.pieces[i] for i in self.tokenizer.control), key=len)
        names = [x for x in reversed(names) if x]
        typed = re.compile("|".join(map(re.escape, names)) or r"(?!)")
        taken: list[str] = []

        def mark(m: re.Match[str]) -> str:
            taken.append(m.group())
            return f"\ue000{len(taken) - 1}\ue001"

        private = re.compile("[\ue000\ue001]")  # a mark that a person typed is taken out too
        both = re.compile(f"{typed.pattern}|{private.pattern}")
        hidden = [{**x, "content": both.sub(mark, _checked(x, i)["content"])}
                  for i, x in enumerate(messages)]
        ids: list[int] = []
        parts = re.split("\ue000(\\d+)\ue001", self.render(hidden, generation))
        for i, part in enumerate(parts):  # text, number of what was taken, text, ...
            if i % 2:
                ids += self.tokenizer.encode_piece(taken[int(part)], control=False, first=not ids)
            elif part:
                ids += self.tokenizer.encode_piece(part, control=True, first=not ids)
        return ids


@functools.cache
def _compiled(source: str) -> Any:
    """The template, ready to run, in an environment as transformers makes it."""
    import jinja2
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    def tojson(x: Any, ensure_ascii: bool = False, indent: int | None = None,
               separators: Any = None, sort_keys: bool = False) -> str:
        return json.dumps(x, ensure_ascii=ensure_ascii, indent=indent, separators=separators,
                          sort_keys=sort_keys)

    world = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True,
                                          extensions=["jinja2.ext.loopcontrols"])
    world.filters["tojson"] = tojson
    world.globals["raise_exception"] = raise_exception
    world.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return world.from_string(source)


def _checked(message: Any, i: int) -> Mapping[str, str]:
    """A message {"role", "content"}; UserError on anything else."""
    if not isinstance(message, Mapping) or not isinstance(message.get("content"), str) \
            or message.get("role") not in ROLES:
        raise UserError(f"message {i + 1}: {str(message)[:80]!r}; expected a role "
                        f"({', '.join(ROLES)}) and a content, both text")
    return message


def _words(file: Path) -> dict[str, Any]:
    """A JSON file's object; empty where there is no file."""
    if not file.exists():
        return {}
    try:
        words = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, OSError, RecursionError) as e:
        raise UserError(f"{file}: cannot be read ({' '.join(str(e).split())[:80]})") from None
    if not isinstance(words, dict):
        raise UserError(f"{file}: not a JSON object; fetch it again")
    return words
