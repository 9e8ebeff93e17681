"""Chat templates: conversations as text and as ids with a loss mask.

A template is a program from a model folder, and a message is a text from anybody. The template runs
in a process of its own with limits of CPU time, memory and output (`template_renderer.py`). Only
the template can write control tokens: if a message contains the name of one, it stays text.

`ChatTemplate.render_with_mask` and `encode_rendered` make ids and loss mask together. What is
trained begins where the template's generation prompt ends, so that a model is prompted as it was
trained, and ends with the token that ends the turn. A template is refused if the text after its
generation prompt is not what it writes there for a whole conversation, or if it writes no control
token behind an answer.
"""

from __future__ import annotations

import enum
import functools
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from runtime.console import BAD_INPUT, FLAGS, UserError
from runtime.model_files import has_model_file, read_model_json_if_present, read_model_text
from tokenization.document import Document
from tokenization.template_renderer import Rendering, RenderingLimits, Request, shared_renderer
from tokenization.tokenizer import Segment, Tokenizer

# For a base model without a template: Llammas' tags as plain text, each answer ended by EOS.
PLAIN = """\
{{ bos_token }}{% for message in messages %}{{ '<|' + message['role'] + '|>\n' }}\
{{ message['content'] | trim }}{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}\
{{ '\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"""

ROLES = ("system", "user", "assistant", "tool")
MAX_TEMPLATE_CHARS = 1 << 20  # published ones have up to about 30,000
GREETING = ({"role": "user", "content": "Amakuru?"}, {"role": "assistant", "content": "Ni meza."})
SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token")
# Variables that we give to each template, and a template's own names.
RESERVED_NAMES = ("messages", "tools", "documents", "add_generation_prompt", "self")
# Private-use characters. "\ue0003\ue001" stands for the third control token's name in the messages.
MARK_BEGIN, MARK_END = "\ue000", "\ue001"

Message = Mapping[str, str]


class Loss(enum.Enum):
    """Which ids of a segment are trained."""

    NONE = 0
    ALL = 1
    FIRST = 2  # the first id, which ends an answer


@dataclass(frozen=True)
class ChatTemplate:
    """A chat template: its origin (a file, or "plain"), its Jinja source, the names of the special
    tokens that it may use, further variables, and what a rendering may use."""

    origin: Path
    source: str
    special_tokens: Mapping[str, str]
    tokenizer: Tokenizer
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    limits: RenderingLimits = field(default_factory=RenderingLimits)

    @classmethod
    def from_folder(cls, folder: Path, tokenizer: Tokenizer) -> ChatTemplate | None:
        """The template of a model's folder: chat_template.jinja, else the one in
        tokenizer_config.json; None if there is none. With the variables that it was taught with:
        `template_kwargs` of prompt.json."""
        config = read_model_json_if_present(folder, "tokenizer_config.json")
        tokens: dict[str, Any] = {
            **_known_tokens(tokenizer),
            **read_model_json_if_present(folder, "special_tokens_map.json"), **config}
        tokens = {k: x.get("content") if isinstance(x, dict) else x for k, x in tokens.items()}
        tokens = {k: tokens[k] for k in SPECIAL_TOKENS if isinstance(tokens.get(k), str)}
        kwargs = read_model_json_if_present(folder, "prompt.json").get("template_kwargs") or {}
        _check_kwargs(kwargs, f"{folder / 'prompt.json'}: template_kwargs")
        if has_model_file(folder, "chat_template.jinja"):
            source = read_model_text(folder, "chat_template.jinja")
            source = source.replace("\r\n", "\n").replace("\r", "\n")  # as text files are read
            return cls(folder / "chat_template.jinja", source, tokens, tokenizer, kwargs)
        config_file, source = folder / "tokenizer_config.json", config.get("chat_template")
        if isinstance(source, list):  # several, by name
            named = {x.get("name"): x.get("template") for x in source if isinstance(x, dict)}
            source = named.get("default")
        if source is None:
            return None
        if not isinstance(source, str):
            raise UserError(f"{config_file}: chat_template is not a text; fetch it again")
        if len(source) > MAX_TEMPLATE_CHARS:
            raise UserError(f"{config_file}: a template of more than 1 MB; use another one")
        return cls(config_file, source, tokens, tokenizer, kwargs)

    @classmethod
    def plain(cls, tokenizer: Tokenizer) -> ChatTemplate:
        """Our own template, for a base model without one: tags as plain text."""
        if tokenizer.eos is None:
            raise UserError("the tokenizer names no eos_token, so no answer would end; name one in "
                            "tokenizer_config.json")
        source = PLAIN if tokenizer.bos is not None else PLAIN.replace("{{ bos_token }}", "")
        return cls(Path("plain"), source, _known_tokens(tokenizer), tokenizer)

    def render(self, messages: Sequence[Message], add_generation_prompt: bool = False) -> str:
        """A conversation as the template writes it; with `add_generation_prompt` up to the place
        where an answer begins.

        UserError for invalid messages, for whatever fails in the template, and for a limit.
        """
        checked = [dict(_check_message(message, i)) for i, message in enumerate(messages)]
        rendering = shared_renderer(self.limits).render(
            self.source, self._variables, Request(checked, add_generation_prompt))
        if rendering.error:
            raise UserError(f"{self.origin}: {rendering.error}")
        return rendering.text

    @property
    def _variables(self) -> dict[str, Any]:
        """What the template can use in addition to the messages."""
        return {"tools": None, "documents": None, **self.special_tokens, **self.kwargs}

    def with_kwargs(self, kwargs: Mapping[str, Any]) -> ChatTemplate:
        """The same template with further variables, which replace those of the same names."""
        return replace(self, kwargs={**self.kwargs, **kwargs})

    def to_prompt(self) -> dict[str, Any]:
        """The template and its variables, as meta.json and a model's prompt.json hold them."""
        prompt: dict[str, Any] = {"chat": self.source}
        if self.kwargs:
            prompt["template_kwargs"] = dict(self.kwargs)
        return prompt

    @property
    def end_of_turn(self) -> int | None:
        """The control token that ends a turn of the assistant; None if the template writes none."""
        text = self.render(GREETING)
        answer_start = max(0, text.rfind(GREETING[1]["content"]))
        match = self.tokenizer.control_names.search(text, answer_start)
        if match is None:
            return None
        return self.tokenizer.encode_segments([Segment(match[0], True, True)])[0][0]

    def encode(self, messages: Sequence[Message], add_generation_prompt: bool = False) -> list[int]:
        """Ids of a conversation. No BOS is added: the template writes it where it wants one."""
        hidden, names = self._hide_control_names(messages)
        segments = self._split_marks(self.render(hidden, add_generation_prompt), names, True)
        return [i for ids in self.tokenizer.encode_segments(segments) for i in ids]

    def render_with_mask(self, messages: Sequence[Message],
                         loss_on: str = "assistant") -> RenderedDocument:
        """A conversation as segments with their loss: trained are the assistant's messages and the
        token that ends each, or everything if `loss_on` is "all".

        UserError for a conversation that does not end with the assistant, for an empty answer, and
        for a template that cannot be trained on (see the head of this file).
        """
        return next(self.render_all_with_mask([messages], loss_on))

    def render_all_with_mask(self, conversations: Iterable[Sequence[Message]],
                             loss_on: str = "assistant") -> Iterator[RenderedDocument]:
        """`render_with_mask` for each conversation, faster than one by one. The UserError of a
        conversation is raised in its place."""
        begun: list[tuple[RenderedDocument, list[dict], list[str]]] = []
        fault = None

        def requests() -> Iterator[Request]:
            nonlocal fault
            for messages in conversations:
                try:
                    self._check_answers(messages)
                    hidden, names = self._hide_control_names(messages)
                except UserError as e:
                    fault = e
                    return
                n_bytes = sum(len(message["content"].encode()) for message in messages)
                begun.append((RenderedDocument(n_bytes, train_all=loss_on == "all"), hidden, names))
                yield Request(hidden, prompts=_answers(hidden))

        renderings = shared_renderer(self.limits).render_all(
            self.source, self._variables, requests())
        # a rendering with an error is the last one, and _add_segments raises it
        for (document, hidden, names), rendering in zip(begun, renderings, strict=False):
            self._add_segments(document, rendering, hidden, names)
            yield document
        if fault:
            raise fault

    def _add_segments(self, document: RenderedDocument, rendering: Rendering,
                      messages: Sequence[Message], names: Sequence[str]) -> None:
        """Divide a rendered conversation into segments with their loss. `messages` and `names` are
        those of `_hide_control_names`."""
        text = rendering.text
        position = 0
        for number, i in enumerate(_answers(messages)):
            if number == len(rendering.prompt_lengths):
                raise UserError(f"{self.origin}: {rendering.error}")
            begin = rendering.prompt_lengths[number]
            end = self._answer_end(text, begin, messages[i], i)
            prompt = self._split_marks(text[position:begin], names, not document.segments)
            document.add(prompt, Loss.FIRST)
            document.add(self._split_marks(text[begin:end], names, False), Loss.ALL)
            position = end
        document.add(self._split_marks(text[position:], names, False), Loss.FIRST)

    def _check_answers(self, messages: Sequence[Message]) -> None:
        answers = [x for x in messages if x.get("role") == "assistant"]
        if not answers or messages[-1] is not answers[-1]:
            raise UserError("the conversation does not end with the assistant, so its last turn "
                            "has no answer to train on; add one, or remove the turn")
        if any(not str(x.get("content", "")).strip() for x in answers):
            raise UserError("a turn of the assistant is empty; fill it, or remove it")

    def _answer_end(self, text: str, begin: int, message: Message, i: int) -> int:
        """Where the answer in message i ends in the rendered conversation. It begins at `begin`,
        where the generation prompt ends; -1: the text does not begin with that prompt."""
        answer = message["content"].strip()
        if begin < 0 or text.find(answer, begin) < 0:
            raise UserError(
                f"{self.origin}: what it writes for turn {i + 1} of a conversation does not "
                "continue its own generation prompt, so a model would be prompted in another way "
                "than it was trained; give another template with --template")
        closing = self.tokenizer.control_names.search(text, begin)
        if closing is None or not text[begin : closing.start()].rstrip().endswith(answer):
            raise UserError(f"{self.origin}: writes no control token behind an answer, so a model "
                            "would not learn to end one; put {{ eos_token }} there, or give "
                            "another template with --template")
        return closing.start()

    def _hide_control_names(self, messages: Sequence[Message]) -> tuple[list[dict], list[str]]:
        """Messages in which a mark stands for each name of a control token, and these names."""
        quick, exact = self._hidden_patterns
        names: list[str] = []

        def mark(match: re.Match[str]) -> str:
            names.append(match.group())
            return f"{MARK_BEGIN}{len(names) - 1}{MARK_END}"

        def hide(value: Any) -> Any:
            if isinstance(value, str):
                return exact.sub(mark, value) if quick.search(value) else value
            if isinstance(value, Mapping):
                return {k: hide(v) for k, v in value.items()}
            if isinstance(value, list | tuple):
                return [hide(x) for x in value]
            return value

        hidden = []
        for i, message in enumerate(messages):
            _check_message(message, i)
            hidden.append({**hide(message), "role": message["role"]})
        return hidden, names

    @functools.cached_property
    def _hidden_patterns(self) -> tuple[re.Pattern[str], re.Pattern[str]]:
        """What must be hidden in a message: names of control tokens, and our own mark characters.
        The first pattern matches their first characters only, and quickly; the second all of them.
        """
        names = self.tokenizer.control_names.pattern
        first = {MARK_BEGIN, MARK_END}
        for i in self.tokenizer.control:
            if self.tokenizer.pieces[i]:
                first.add(self.tokenizer.pieces[i][0])
        return (re.compile("|".join(map(re.escape, sorted(first)))),
                re.compile(f"{names}|[{MARK_BEGIN}{MARK_END}]"))

    def _split_marks(self, text: str, names: Sequence[str], first: bool) -> list[Segment]:
        """Rendered text as segments, with the hidden names put back as text. `first`: nothing
        stands before the text."""
        segments: list[Segment] = []
        # text, number of a name, text, number of a name, ...
        for i, part in enumerate(re.split(f"{MARK_BEGIN}(\\d+){MARK_END}", text)):
            at_start = first and not segments
            is_number = i % 2 == 1
            if is_number and int(part) < len(names):
                segments.append(Segment(names[int(part)], False, at_start))
            elif is_number or re.search(f"[{MARK_BEGIN}{MARK_END}]", part):
                raise UserError(f"{self.origin}: divides the text of a message where it contains "
                                "the name of a control token; remove that name from the message")
            elif part:
                segments.append(Segment(part, True, at_start))
        return segments


@dataclass
class RenderedDocument:
    """A document before it is encoded: segments and their losses; ids `begin` (not trained) and
    `end` (trained) around them; `train_all`: every id is trained."""

    n_bytes: int
    segments: list[Segment] = field(default_factory=list)
    losses: list[Loss] = field(default_factory=list)  # of each segment
    begin: Sequence[int] = ()
    end: Sequence[int] = ()
    train_all: bool = False

    def add(self, segments: Sequence[Segment], loss: Loss) -> None:
        """Append segments. Loss.FIRST trains the first id of the first segment, unless nothing
        stands before it."""
        for i, segment in enumerate(segments):
            segment_loss = loss
            if loss is Loss.FIRST and (i > 0 or not self.segments):
                segment_loss = Loss.NONE
            self.losses.append(segment_loss)
            self.segments.append(segment)


def encode_rendered(tokenizer: Tokenizer,
                    rendered: Sequence[RenderedDocument]) -> list[Document]:
    """Encode rendered documents, all segments in one batch. Ids and masks are arrays, which are
    small in memory and quick to send to another process."""
    segments = [segment for document in rendered for segment in document.segments]
    encoded = iter(tokenizer.encode_segments(segments))
    documents = []
    for document in rendered:
        ids = [*document.begin]
        mask = [False] * len(ids)
        for loss in document.losses:
            segment_ids = next(encoded)
            segment_mask = [loss is Loss.ALL] * len(segment_ids)
            if loss is Loss.FIRST and segment_mask:
                segment_mask[0] = True
            ids += segment_ids
            mask += segment_mask
        ids += document.end
        mask += [True] * len(document.end)
        documents.append(Document(
            np.array(ids, np.uint32), None if document.train_all else np.array(mask, bool),
            document.n_bytes,
            sum(tokenizer.count_unspelled(segment.text) for segment in document.segments)))
    return documents


def read_template_kwargs(words: Sequence[str]) -> dict[str, Any]:
    """The variables of a template that --template-kwargs gives: KEY=VALUE, or a JSON object.

    A value that is JSON (false, 3, "a text") is read as such; any other value is a text.
    """
    kwargs: dict[str, Any] = {}
    for word in words:
        key, equals, value = word.partition("=")
        if word.lstrip().startswith("{"):
            values = _json_or_text(word)
        elif equals:
            values = {key: _json_or_text(value)}
        else:
            values = word
        if not isinstance(values, dict):
            raise UserError(f"--template-kwargs {word[:80]}: expected KEY=VALUE, as in "
                            "enable_thinking=false, or a JSON object", FLAGS)
        kwargs |= values
    _check_kwargs(kwargs, "--template-kwargs", FLAGS)
    return kwargs


def _json_or_text(word: str) -> Any:
    try:
        return json.loads(word)
    except (ValueError, RecursionError):
        return word


def _check_kwargs(kwargs: Any, where: str, code: int = BAD_INPUT) -> None:
    """UserError unless `kwargs` can be variables of a template, by name."""
    if not isinstance(kwargs, dict):
        raise UserError(f"{where}: {str(kwargs)[:80]!r}; expected an object", code)
    for name in kwargs:
        if not name.isidentifier() or name in RESERVED_NAMES:
            raise UserError(f"{where}: {name[:80]!r} cannot be given to a template; expected the "
                            "name of a variable, as in enable_thinking", code)
    try:
        json.dumps(kwargs, allow_nan=False).encode()
    except ValueError:
        raise UserError(f"{where}: holds a number that is not finite", code) from None


def _known_tokens(tokenizer: Tokenizer) -> dict[str, str]:
    """The names of BOS and EOS, each if the tokenizer has one."""
    ids = {"bos_token": tokenizer.bos, "eos_token": tokenizer.eos}
    return {name: tokenizer.pieces[i] for name, i in ids.items() if i is not None}


def _answers(messages: Sequence[Message]) -> list[int]:
    """The numbers of the assistant's messages."""
    return [i for i, message in enumerate(messages) if message["role"] == "assistant"]


def _check_message(message: Any, i: int) -> Message:
    """Message i, {"role", "content"}; UserError for anything else."""
    if not isinstance(message, Mapping) or not isinstance(message.get("content"), str) \
            or message.get("role") not in ROLES:
        raise UserError(f"message {i + 1}: {str(message)[:80]!r}; expected a role "
                        f"({', '.join(ROLES)}) and a content, both text")
    return message
