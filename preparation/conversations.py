"""Conversations -> token bin: the forms that are read, and their encoding by a chat template.

A row holds a conversation in one of three forms: messages (role, content), ShareGPT (from, value)
or Alpaca (instruction, input, output). Unknown roles, empty turns and conversations that do not end
with the assistant are refused.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data import Bin
from languages.normalise import Normaliser, cleaning_of
from preparation.examples import (
    Example,
    LengthLimit,
    example_key,
    open_template,
    render_conversations,
    require_utf8,
    text_cell,
    write_examples,
)
from preparation.ledger import Ledger
from preparation.readers import ROW_FORMATS, Row, list_files, read_rows
from preparation.workers import Workers
from runtime.console import UserError, info
from tokenization.chat_template import ChatTemplate, encode_rendered
from tokenization.tokenizer import Tokenizer

ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant",
         "system": "system", "tool": "tool"}  # of ShareGPT's `from`
FORMS = {"messages": "messages (role, content)", "conversations": "ShareGPT (from, value)",
         "instruction": "Alpaca (instruction, input, output)"}

Message = dict[str, str]


def prepare_conversations(specs: Sequence[str], tokenizer_path: Path | str, out: Path | str, *,
                          template: str = "model",
                          template_kwargs: Mapping[str, Any] | None = None,
                          loss_on: str = "assistant", normalise: Normaliser | None = None,
                          limit: LengthLimit | None = None, keep_duplicates: bool = False,
                          workers: Workers | None = None) -> tuple[Bin, Ledger]:
    """Prepare files of conversations into a bin of kind "chat".

    `template`: "model", "plain" or a .jinja file; `template_kwargs`: its variables; `loss_on`:
    "assistant" (the assistant's messages and the token that ends each) or "all".
    """
    tokenizer = Tokenizer.open(tokenizer_path)
    chat_template = open_template(template, Path(tokenizer_path), tokenizer, template_kwargs)
    paths = list_files(specs, ROW_FORMATS)
    encoder = ConversationEncoder(chat_template, loss_on, normalise)
    bin, ledger, _ = write_examples(
        read_conversations(paths), encoder, out, tokenizer, "chat", paths,
        chat_template.to_prompt(), limit or LengthLimit(), keep_duplicates, workers,
        cleaning_of(normalise))
    return bin, ledger


def read_conversations(paths: Iterable[Path]) -> Iterator[Row]:
    """The rows of files; says which form of conversation each file has."""
    for path in paths:
        last_form = None
        for row in read_rows(path):
            form = form_of(row)
            if form and form != last_form:
                info(f"{path}: conversations in the form of {FORMS[form]}")
                last_form = form
            yield row


@dataclass
class ConversationEncoder:
    """Rows to examples: one document per conversation."""

    template: ChatTemplate
    loss_on: str = "assistant"
    normalise: Normaliser | None = None

    def __call__(self, rows: Sequence[Row]) -> list[Example]:
        conversations, examples = [], []
        fault = None
        for row in rows:
            try:
                messages = parse_conversation(row)
            except UserError as e:  # raised below: an earlier conversation may be refused
                fault = e
                break
            changes: Counter[str] = Counter()
            if self.normalise:
                for message in messages:
                    message["content"], counts = self.normalise(message["content"])
                    changes.update(counts)
            conversations.append(messages)
            examples.append(Example([], example_key(messages), changes=changes))
        rendered = render_conversations(self.template, rows, conversations, self.loss_on)
        if fault:
            raise fault
        encoded = encode_rendered(self.template.tokenizer, rendered)
        for example, document in zip(examples, encoded, strict=True):
            example.documents = [document]
        return examples


def form_of(row: Row) -> str | None:
    """The form of a row's conversation, a key of FORMS; None if it has none."""
    return next((form for form in FORMS if form in row.cells), None)


def parse_conversation(row: Row) -> list[Message]:
    """The messages {"role", "content"} of a row; UserError for an unknown form or role."""
    form = form_of(row)
    if form is None:
        columns = ", ".join(map(str, row.cells)) or "nothing"
        raise UserError(f"{row.location}: no conversation; expected one of {', '.join(FORMS)}, "
                        f"found {columns}")
    if form != "instruction":
        return add_system_message(row, parse_messages(row, form))
    if row.cells.get("history"):
        raise UserError(f"{row.location}: history holds turns before the instruction; write the "
                        "row as messages, or remove history")
    instruction = text_cell(row, "instruction")
    if isinstance(row.cells.get("input"), str):
        context = text_cell(row, "input")
        if context.strip():
            instruction = f"{instruction}\n\n{context}"
    return add_system_message(row, [{"role": "user", "content": instruction},
                                    {"role": "assistant", "content": text_cell(row, "output")}])


def add_system_message(row: Row, messages: list[Message]) -> list[Message]:
    """Messages with the row's `system` cell as the first one, if it has one; UserError if they
    begin with another system message."""
    if row.cells.get("system") is None:
        return messages
    system = {"role": "system", "content": text_cell(row, "system")}
    if not system["content"].strip() or messages[0] == system:
        return messages
    if messages[0]["role"] == "system":
        raise UserError(f"{row.location}: the system cell differs from the first message; remove "
                        "one of them")
    return [system, *messages]


def parse_messages(row: Row, key: str) -> list[Message]:
    """The messages in a cell: role and content, or ShareGPT's from and value."""
    cell = row.cells.get(key)
    if not isinstance(cell, list | tuple | np.ndarray) or not len(cell):
        raise UserError(f"{row.location}: {key} is {str(cell)[:40]!r}, expected a list of messages")
    messages = []
    for number, item in enumerate(cell, 1):
        fields = item if isinstance(item, Mapping) else {}
        if "role" in fields:
            role = fields["role"]
        else:
            role = ROLES.get(str(fields.get("from")), fields.get("from"))
        content = fields.get("content", fields.get("value"))
        problem = ""
        if role not in ROLES.values():
            problem = f"role {role!r}"
        elif not isinstance(content, str):
            problem = "no text"
        if problem:
            raise UserError(
                f"{row.location}, message {number}: {problem}; expected system, user, assistant or "
                "tool (ShareGPT: human, gpt), and a text")
        messages.append({"role": role, "content": require_utf8(row, content)})
    return messages
