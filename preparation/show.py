"""Documents of a bin as text, split where training begins and ends."""

from __future__ import annotations

from collections.abc import Sequence

from tokenization.tokenizer import Tokenizer


def text_spans(tokenizer: Tokenizer, ids: Sequence[int],
               trained: Sequence[bool]) -> list[tuple[str, bool]]:
    """Decode the ids of a document into spans of text, each with whether it is trained.

    Control tokens stand in the text by their names. A character whose bytes are divided between
    two spans stands in the second.
    """
    spans: list[tuple[str, bool]] = []
    n_shown = 0  # characters of the decoded text that are in the spans
    for start, end in _runs(tokenizer, ids, trained):
        is_trained = bool(trained[start]) and start > 0  # nothing predicts the first token
        if ids[start] in tokenizer.control:
            spans.append((tokenizer.pieces[ids[start]], is_trained))
            continue
        text = tokenizer.decode(ids[:end])
        if end < len(ids):
            text = text.rstrip("\ufffd")  # an incomplete character
        spans.append((text[n_shown:], is_trained))
        n_shown = max(n_shown, len(text))
    return spans


def _runs(tokenizer: Tokenizer, ids: Sequence[int],
          trained: Sequence[bool]) -> list[tuple[int, int]]:
    """(start, end) of consecutive ids that are all trained or all not; each control token is a run
    of its own."""
    runs = []
    start = 0
    for i in range(1, len(ids) + 1):
        if i == len(ids) or i == 1 or trained[i] != trained[start] \
                or ids[i] in tokenizer.control or ids[start] in tokenizer.control:
            runs.append((start, i))
            start = i
    return runs
