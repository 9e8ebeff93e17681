"""Conversations as the model's own chat template writes them, and their ids.

One idea: the template is a stranger's program, and a message is a stranger's text. The template
runs in Jinja's sandbox, bounded in what it may write, and can only make a string. What becomes a
control token is decided by the template alone: the same characters typed in a message stay text.

A conversation becomes ids and loss mask together (`Template.lay_out`, `documents`): it is laid out
as parts of text, of which it is known whether they train, and then the parts become ids, those of
many conversations at once. What is trained begins exactly where the template's own generation
prompt ends, so that a model is asked as it was taught, and ends with the token that ends the turn.
A template whose generation prompt is not the beginning of what it writes later is refused.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from itertools import count
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from runtime.console import UserError
from tokenization.document import Document
from tokenization.tokenizer import Part, Tokenizer, read_words

# for a base without a template: Llammas' tags, plain text, each answer ended by EOS (TartuNLP)
PLAIN = """\
{{ bos_token }}{% for message in messages %}{{ '<|' + message['role'] + '|>\n' }}\
{{ message['content'] | trim }}{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}\
{{ '\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"""

ROLES = ("system", "user", "assistant", "tool")
LONGEST = 1 << 26  # characters that a template may make of one conversation
GREETING = ({"role": "user", "content": "Amakuru?"}, {"role": "assistant", "content": "Ni meza."})
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
        words = read_words(folder / "tokenizer_config.json")
        known = {k: tokenizer.pieces[i] for k, i in (("bos_token", tokenizer.bos),
                                                     ("eos_token", tokenizer.eos)) if i is not None}
        tokens = {**known, **read_words(folder / "special_tokens_map.json"), **words}
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

    @classmethod
    def plain(cls, tokenizer: Tokenizer) -> Template:
        """Our own, for a base that has none: tags as plain text, no new control token."""
        if tokenizer.eos is None:
            raise UserError("the tokenizer names no eos_token, so no answer would end; name one in "
                            "tokenizer_config.json")
        source = PLAIN if tokenizer.bos is not None else PLAIN.replace("{{ bos_token }}", "")
        named = {"bos_token": tokenizer.bos, "eos_token": tokenizer.eos}
        tokens = {k: tokenizer.pieces[i] for k, i in named.items() if i is not None}
        return cls(Path("plain"), source, tokens, tokenizer)

    def render(self, messages: Sequence[Mapping[str, str]], generation: bool = False) -> str:
        """A conversation as the template writes it; `generation`: up to where an answer begins.

        UserError on messages that are none, and on whatever goes wrong in the template.
        """
        import jinja2

        messages = [dict(x) for x in map(_checked, messages, count())]
        try:
            parts, length = [], 0
            for part in _compiled(self.source).generate(
                    messages=messages, tools=None, documents=None,
                    add_generation_prompt=generation, **self.tokens):
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

    @property
    def end(self) -> int | None:
        """The control token that ends a turn of the assistant; None if the template writes none."""
        text = self.render(GREETING)
        said = max(0, text.rfind(GREETING[1]["content"]))
        found = self.tokenizer.control_names.search(text, said)
        return self.tokenizer.encode_parts([Part(found[0], True, True)])[0][0] if found else None

    def encode(self, messages: Sequence[Mapping[str, str]], generation: bool = False) -> list[int]:
        """Ids of a conversation; no BOS is added, for the template writes it where it wants one.

        A control token's name in a message is taken out before the template sees it, and put
        back as text where the template has left its mark.
        """
        hidden, taken = self._hide(messages)
        parts = self._parts(self.render(hidden, generation), taken, True)
        return [i for ids in self.tokenizer.encode_parts(parts) for i in ids]

    def lay_out(self, messages: Sequence[Mapping[str, str]], loss_on: str = "assistant") -> Layout:
        """A conversation's parts and which train: the assistant's words and what ends them.

        `loss_on` "all" trains every token. UserError on a conversation that does not end with the
        assistant, and on a template whose generation prompt is not a beginning of its text, or
        that ends an answer with no control token.
        """
        said = [x for x in messages if x.get("role") == "assistant"]
        if not said or messages[-1] is not said[-1]:
            raise UserError("the conversation does not end with the assistant, so its last turn "
                            "has no answer to train on; add one, or take the turn out")
        if any(not str(x.get("content", "")).strip() for x in said):
            raise UserError("a turn of the assistant is empty; fill it, or take it out")
        hidden, taken = self._hide(messages)
        text = self.render(hidden)
        laid = Layout(sum(len(x["content"].encode()) for x in messages), whole=loss_on == "all")
        at, names = 0, self.tokenizer.control_names
        for i, message in enumerate(hidden):
            if message["role"] != "assistant":
                continue
            begin = len(prompt := self.render(hidden[:i], generation=True))
            words = message["content"].strip()
            if not text.startswith(prompt) or words not in text[begin:]:
                raise UserError(
                    f"{self.where}: what it writes for turn {i + 1} of a conversation does not go "
                    "on from its own generation prompt, so a model would be asked otherwise than "
                    "it was taught; give another with --template")
            closing = names.search(text, begin)
            if closing is None or not text[begin : closing.start()].rstrip().endswith(words):
                raise UserError(f"{self.where}: writes no control token behind an answer, so that "
                                "a model would not learn to end one; put {{ eos_token }} there, or "
                                "give another with --template")
            laid.add(self._parts(text[at:begin], taken, not laid.parts), CLOSING)
            laid.add(self._parts(text[begin : (at := closing.start())], taken, False), TRAINED)
        laid.add(self._parts(text[at:], taken, False), CLOSING)
        return laid

    def _hide(self, messages: Sequence[Mapping[str, str]]) -> tuple[list[dict], list[str]]:
        """Messages with marks where control tokens were typed, and what the marks stand for."""
        may, both = self._typed
        taken: list[str] = []

        def mark(m: re.Match[str]) -> str:
            taken.append(m.group())
            return f"\ue000{len(taken) - 1}\ue001"

        def hide(x: Any) -> Any:
            if isinstance(x, str):
                return both.sub(mark, x) if may.search(x) else x
            if isinstance(x, Mapping):
                return {k: hide(v) for k, v in x.items()}
            return list(map(hide, x)) if isinstance(x, list | tuple) else x

        return [{**hide(x), "role": x["role"]} for x in map(_checked, messages, count())], taken

    @functools.cached_property
    def _typed(self) -> tuple[re.Pattern[str], re.Pattern[str]]:
        """What a message holds that must be hidden, a control token's name or a mark of ours: its
        first characters, by which most texts are seen to have none, and all of it."""
        names = self.tokenizer.control_names.pattern
        marks = {"\ue000", "\ue001"}
        first = {x[0] for i in self.tokenizer.control if (x := self.tokenizer.pieces[i])} | marks
        return (re.compile("|".join(map(re.escape, sorted(first)))),
                re.compile(f"{names}|[\ue000\ue001]"))

    def _parts(self, text: str, taken: Sequence[str], first: bool) -> list[Part]:
        """A part of what was rendered, with what was taken out put back; `first`: nothing stands
        before it."""
        found: list[Part] = []
        for i, part in enumerate(re.split("\ue000(\\d+)\ue001", text)):
            begins = first and not found  # text, number of what was taken, text, ...
            if i % 2 and int(part) < len(taken):
                found.append(Part(taken[int(part)], False, begins))
            elif i % 2 or re.search("[\ue000\ue001]", part):
                raise UserError(f"{self.where}: takes a message's text apart where it holds a "
                                "control token's name; leave that name out of the message")
            elif part:
                found.append(Part(part, True, begins))
        return found


NOT, TRAINED, CLOSING = range(3)  # what of a part trains: nothing, all, its first id


@dataclass
class Layout:
    """A document before its texts are ids: parts, and which train; `begin` and `end` are ids that
    stand around them, `whole`: all of it trains."""

    n_bytes: int
    parts: list[Part] = field(default_factory=list)
    trains: list[int] = field(default_factory=list)  # of each part
    begin: Sequence[int] = ()  # not trained
    end: Sequence[int] = ()  # trained
    whole: bool = False

    def add(self, parts: Sequence[Part], trains: int) -> None:
        """More parts. CLOSING: the first id ends an answer, if anything stands before it."""
        later = TRAINED if trains == TRAINED else NOT
        self.trains += [later if i or not self.parts else trains for i in range(len(parts))]
        self.parts += parts


def documents(tokenizer: Tokenizer, layouts: Sequence[Layout]) -> list[Document]:
    """Layouts as documents, ids and mask together, in arrays: small to keep and to send."""
    found, encoded = [], iter(tokenizer.encode_parts([x for laid in layouts for x in laid.parts]))
    for laid in layouts:
        ids, mask = [*laid.begin], [False] * len(laid.begin)
        for trains in laid.trains:
            ids += (new := next(encoded))
            mask += [trains != NOT] * len(new[:1]) + [trains == TRAINED] * len(new[1:])
        mask += [True] * len(laid.end)
        found.append(Document(np.array([*ids, *laid.end], np.uint32),
                              None if laid.whole else np.array(mask, bool), laid.n_bytes))
    return found


@functools.cache
def _compiled(source: str) -> Any:
    """The template, ready to run, in an environment as transformers makes it."""
    import jinja2
    from jinja2.ext import Extension
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """The tag around what an assistant says; as transformers, it writes what is inside."""

        tags: ClassVar[set[str]] = {"generation"}

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            inside = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return jinja2.nodes.Scope(inside, lineno=line)

    class World(ImmutableSandboxedEnvironment):
        """`*` and `**` make nothing that no memory could hold."""

        intercepted_binops = frozenset(("*", "**"))

        def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
            sizes = [len(x) if isinstance(x, str | list | tuple) else abs(x) for x in (left, right)]
            if sizes[0] * sizes[1] > LONGEST or (operator == "**" and max(sizes) > 64):
                raise jinja2.TemplateError(f"{operator} that makes too much")
            return super().call_binop(context, operator, left, right)

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    def tojson(x: Any, ensure_ascii: bool = False, indent: int | None = None,
               separators: Any = None, sort_keys: bool = False) -> str:
        return json.dumps(x, ensure_ascii=ensure_ascii, indent=indent, separators=separators,
                          sort_keys=sort_keys)

    world = World(trim_blocks=True, lstrip_blocks=True,
                  extensions=[Generation, "jinja2.ext.loopcontrols"])
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
