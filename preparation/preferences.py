"""Preference pairs -> token bin, and preference pairs from samples of a model.

A preference pair is one prompt with two answers, the chosen and the rejected one: documents 2i and
2i + 1 of a bin. `best_and_worst` and `pairs_of_votes` make pairs of what `sample.py --json
--samples N` wrote.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data import Bin
from preparation.conversations import Message, add_system_message, parse_messages
from preparation.examples import (
    Example,
    LengthLimit,
    example_key,
    have_equal_ids,
    open_template,
    text_cell,
    with_location,
    write_examples,
)
from preparation.ledger import Ledger
from preparation.readers import ROW_FORMATS, Row, list_files, read_rows
from preparation.translation import render_answer
from preparation.workers import Workers
from runtime.console import UserError, info
from tokenization.chat_template import ChatTemplate, RenderedDocument, encode_rendered
from tokenization.tokenizer import Tokenizer

Question = str | list[Message]  # a text, or the messages of a conversation


def prepare_preferences(specs: Sequence[str], tokenizer_path: Path | str, out: Path | str, *,
                        as_chat: bool = False, template: str = "model",
                        template_kwargs: Mapping[str, Any] | None = None,
                        limit: LengthLimit | None = None, keep_duplicates: bool = False,
                        workers: Workers | None = None) -> tuple[Bin, Ledger]:
    """Prepare files of preference pairs into a bin of kind "pairs".

    `as_chat`: a prompt that is a text is a user's message; without it the answer follows the text
    directly.
    """
    tokenizer = Tokenizer.open(tokenizer_path)
    chat_template = open_template(template, Path(tokenizer_path), tokenizer, template_kwargs)
    paths = list_files(specs, ROW_FORMATS)
    rows = (row for path in paths for row in read_rows(path))
    encoder = PreferenceEncoder(tokenizer, chat_template, as_chat)
    prompt = {}
    if chat_template.kwargs:
        prompt["template_kwargs"] = dict(chat_template.kwargs)
    bin, ledger, _ = write_examples(rows, encoder, out, tokenizer, "pairs", paths, prompt,
                                    limit or LengthLimit(), keep_duplicates, workers)
    return bin, ledger


@dataclass
class PreferenceEncoder:
    """Rows {"prompt", "chosen", "rejected"} to examples of two documents, the chosen one first.

    A prompt is a text or messages; an answer is a text or messages, alone or behind those of the
    prompt.
    """

    tokenizer: Tokenizer
    template: ChatTemplate
    as_chat: bool = False

    def __call__(self, rows: Sequence[Row]) -> list[Example]:
        examples, rendered = [], []
        fault = None
        for row in rows:
            try:
                question, *answers = self._parse(row)
                with with_location(row):
                    rendered += self._render(question, answers)
            except UserError as e:  # raised below: an earlier row may have two equal answers
                fault = e
                break
            examples.append(Example([], example_key([str(question), *answers])))
        # a fault may leave one rendered answer behind those of whole pairs
        encoded = iter(encode_rendered(self.tokenizer, rendered))
        for row, example in zip(rows, examples, strict=False):
            example.documents = [next(encoded), next(encoded)]
            if have_equal_ids(example.documents):
                raise UserError(f"{row.location}: chosen and rejected are equal, so nothing can be "
                                "learned from the pair; remove it")
        if fault:
            raise fault
        return examples

    def _render(self, question: Question, answers: Sequence[str]) -> list[RenderedDocument]:
        if isinstance(question, str):
            return [render_answer(self.tokenizer, question, answer) for answer in answers]
        return list(self.template.render_all_with_mask(
            [*question, {"role": "assistant", "content": answer}] for answer in answers))

    def _parse(self, row: Row) -> tuple[Question, str, str]:
        """The question of a row, and its two answers."""
        chosen, rejected = (_parse_answer(row, key) for key in ("chosen", "rejected"))
        question = _parse_question(row, "chosen", self.as_chat)
        if question != _parse_question(row, "rejected", self.as_chat):
            raise UserError(f"{row.location}: chosen and rejected answer different questions; "
                            "a pair has one, give it as prompt")
        return question, chosen, rejected


def _parse_question(row: Row, key: str, as_chat: bool) -> Question:
    """The question of the answer under `key`: the prompt, or the messages before the answer."""
    prompt = row.cells.get("prompt")
    answer_is_text = isinstance(row.cells[key], str)
    before_answer = [] if answer_is_text else parse_messages(row, key)[:-1]
    if isinstance(prompt, str):
        prompt = text_cell(row, "prompt")
        messages = before_answer or [{"role": "user", "content": prompt}]
        contents = [message["content"].strip() for message in messages]
        differs = prompt.strip() not in contents
    elif prompt is not None or not before_answer:
        messages = parse_messages(row, "prompt")
        differs = bool(before_answer) and messages != before_answer
    else:
        messages, differs = before_answer, False
    if differs:
        raise UserError(f"{row.location}: {key} begins with other messages than prompt; remove one "
                        "of the two")
    messages = add_system_message(row, messages)
    if not isinstance(prompt, str) or not answer_is_text or as_chat:
        return messages
    if len(messages) > 1:
        raise UserError(f"{row.location}: a system message, and a prompt that is a text; give "
                        "--as-chat, or remove the system message")
    return prompt


def _parse_answer(row: Row, key: str) -> str:
    """The text of an answer, which is a text or the last of some messages."""
    if isinstance(row.cells.get(key), str | None):
        answer = text_cell(row, key)
    else:
        last = parse_messages(row, key)[-1]
        if last["role"] != "assistant":
            raise UserError(f"{row.location}: {key} does not end with the assistant")
        answer = last["content"]
    if not answer.strip():
        raise UserError(f"{row.location}: {key} is empty; remove the pair")
    return answer


@dataclass
class Samples:
    """A prompt (a text or the messages of a conversation), and the answers of a model to it."""

    prompt: Question
    answers: list[str]


def read_samples(path: Path) -> list[Samples]:
    """What `sample.py --json --samples N` wrote, by prompt, in order.

    Equal prompts are told apart by the number beside each answer; in files without numbers, by
    what stands between them. Says how many answers were cut, because training would end them there.
    """
    samples: dict[tuple[str, str], Samples] = {}
    n_cut = run = 0
    last_prompt = None
    for row in read_rows(path):
        prompt, answer = text_cell(row, "prompt"), text_cell(row, "text")
        n_cut += row.cells.get("end") == "length"
        run += prompt != last_prompt
        last_prompt = prompt
        question = parse_messages(row, "messages") if "messages" in row.cells else prompt
        key = (str(row.cells.get("prompt_number", -run)), prompt)
        samples.setdefault(key, Samples(question, [])).answers.append(answer)
    if not samples:
        raise UserError(f"{path}: no samples in it")
    if n_cut:
        n_answers = sum(len(x.answers) for x in samples.values())
        info(f"{path}: {n_cut:,} of {n_answers:,} answers were cut at --max-new-tokens; training "
            "would teach the model to end there, so sample again with more tokens")
    return list(samples.values())


def best_and_worst(samples: Sequence[Samples], references: Sequence[str],
                   score: Callable[[str, str], float],
                   min_gap: float) -> Iterator[dict[str, Any]]:
    """A preference pair for each prompt: the answers with the highest and the lowest score.

    A prompt whose two scores are not more than `min_gap` apart gives none. UserError if there is
    not one reference per prompt.
    """
    if len(references) != len(samples):
        raise UserError(_describe_mismatch(samples, references))
    for one, reference in zip(samples, references, strict=True):
        scored = [(score(answer.strip(), reference), answer)
                  for answer in dict.fromkeys(one.answers)]
        scored.sort(key=lambda x: x[0])
        (low, worst), (high, best) = scored[0], scored[-1]
        if high - low > min_gap and best.strip() and worst.strip():
            yield {"prompt": one.prompt, "chosen": best, "rejected": worst,
                   "scores": [round(high, 2), round(low, 2)]}


def _describe_mismatch(samples: Sequence[Samples], references: Sequence[str]) -> str:
    fewest = min(samples, key=lambda x: len(x.answers))
    largest = max(samples, key=lambda x: len(x.answers))
    text = (f"--references: {len(references):,} lines for {len(samples):,} prompts; expected a "
            "line for each prompt, in order")
    if len(largest.answers) > len(fewest.answers):
        text += (f"; {str(largest.prompt)[:60]!r} has {len(largest.answers)} answers, others "
                 f"{len(fewest.answers)}: if it stands twice, sample again, which numbers prompts")
    return text


def pairs_of_votes(samples: Sequence[Samples], votes: Path) -> Iterator[dict[str, Any]]:
    """A preference pair for each vote, a row {"prompt", "best", "worst"} of numbers from 1."""
    for row in read_rows(votes):
        try:
            prompt, best, worst = (int(row.cells[k]) for k in ("prompt", "best", "worst"))
            question, answers = samples[prompt - 1].prompt, samples[prompt - 1].answers
            if min(prompt, best, worst) < 1 or answers[best - 1] == answers[worst - 1]:
                raise IndexError
            pair = {"prompt": question, "chosen": answers[best - 1],
                    "rejected": answers[worst - 1]}
        except (KeyError, ValueError, TypeError, IndexError):
            raise UserError(
                f"{row.location}: {dict(row.cells)}; expected the numbers of a prompt and of two "
                "different samples of it, as prompt, best, worst, counted from 1") from None
        yield pair
