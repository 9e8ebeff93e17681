"""From ids to text: whole answers, answers that stream, and the tail that stop strings are searched
in.

An answer is decoded together with its prompt, because a tokenizer may treat the beginning of a text
differently (SentencePiece drops its first space). Half a character decodes to U+FFFD and is held
back until the rest arrives.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from tokenization.tokenizer import Tokenizer

REPLACEMENT = "\ufffd"  # what bytes decode to that are not a whole character


class Detokenizer:
    """Makes text of ids that arrive one after another behind a prompt.

    `add` and `finish` return text that is final. Joined, it is the text of all ids up to the first
    of `stop_strings`.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int] = (),
                 stop_strings: Sequence[str] = ()):
        self.tokenizer, self.stop_strings = tokenizer, stop_strings
        self.ids = list(prompt)
        self.text = tokenizer.decode(self.ids)
        self.start = self.n_returned = len(self.text)
        self.stopped = False  # a stop string was found; later ids are not shown

    def add(self, token: int) -> str:
        """Add an id; return the text that is now certain, often none."""
        if self.stopped:
            return ""
        self.ids.append(token)
        self.text = self.tokenizer.decode(self.ids)
        end = first_stop(self.text, self.stop_strings, self.start)
        if end < len(self.text):
            self.text, self.stopped = self.text[:end], True
            return ""
        complete = self.text.rstrip(REPLACEMENT)
        certain = len(complete) - self._partial_stop(complete)
        if certain <= self.n_returned:
            return ""
        return self._take(certain)

    def finish(self) -> str:
        """Return the rest: an incomplete character, or the beginning of a stop string."""
        return self._take(len(self.text))

    def _take(self, end: int) -> str:
        piece = self.text[self.n_returned : end]
        self.n_returned = end
        return piece

    def _partial_stop(self, text: str) -> int:
        """How many characters at the end of a text are the beginning of a stop string."""
        return max((n for string in self.stop_strings for n in range(1, len(string))
                    if text.endswith(string[:n])), default=0)


def first_stop(text: str, stop_strings: Sequence[str], start: int = 0) -> int:
    """Where the first stop string begins at or after `start`; the text's length if there is
    none."""
    positions = [text.find(string, start) for string in stop_strings]
    return min((position for position in positions if position >= 0), default=len(text))


def stream_text(tokenizer: Tokenizer, prompt: Sequence[int], tokens: Iterable[int],
                stop_strings: Sequence[str] = ()) -> Iterator[str]:
    """The text of ids that follow a prompt, in pieces, as they become certain."""
    detokenizer = Detokenizer(tokenizer, prompt, stop_strings)
    for token in tokens:
        piece = detokenizer.add(token)
        if detokenizer.stopped:
            break
        if piece:
            yield piece
    yield detokenizer.finish()


def decode_answer(tokenizer: Tokenizer, prompt: Sequence[int], new: Sequence[int],
                  stop_strings: Sequence[str] = ()) -> str:
    """The text of ids that follow a prompt, up to the first stop string."""
    start = len(tokenizer.decode(list(prompt)))
    text = tokenizer.decode([*prompt, *new])[start:]
    return text[: first_stop(text, stop_strings)]


def decode_tail(tokenizer: Tokenizer, ids: Sequence[int]) -> str:
    """The text of ids from the middle of a text, its first space included."""
    return tokenizer.decode([*tokenizer.encode("a"), *ids])[1:]
