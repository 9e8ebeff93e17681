"""A cache of the ids of words, which makes `prepare.py text` about 1.5 times as fast.

A text is cut before each single space that stands behind another character than a blank. If no
token of the tokenizer can reach over such a cut, the ids of a text are the ids of its words, end to
end, and a word that was encoded before is looked up. Whether this holds is read from the
tokenizer's own file, in `_splits_sentencepiece` and `_splits_json`. If it does not hold, whole
texts are encoded. The ids are those of the tokenizer in any case.

Nothing else depends on this module: `WordCache.encode_documents` could be replaced by
`Tokenizer.encode_batch`. docs/benchmarks.md says what it gains.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from itertools import chain, compress, filterfalse
from operator import not_
from typing import Any
from unicodedata import is_normalized

import numpy as np
import pyarrow
import pyarrow.compute

from tokenization.tokenizer import Tokenizer

MAX_IDS = 1 << 21  # in the cache: about half a million words
GROUP = 64  # new words that are encoded as one text, because a call costs more than a word
FIRST, RUN = "\1", "\0"  # marks of the first word of a text, and of a space that is not a cut
STARTS = ("", FIRST, RUN)  # a word that begins with one of these stands at the start of a text
UNCUT_SPACES = re.compile(r"(?<!\S) +| {2,}| +\Z")
BLANK_THEN_SPACE = re.compile(r"[^\S ] ")  # there are tokens of a line break and a space
OVER_CUT = re.compile(r"[^▁ ][▁ ]")  # a token that contains one reaches over a cut

# The regular expressions of GPT-2, Llama 3 and Qwen 2 that cut a text into pieces, each encoded by
# itself. None of them has a space behind a non-blank character in one piece.
GPT2 = (r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
        r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+")
LLAMA3 = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
          r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
EXPRESSIONS = {*GPT2, LLAMA3, LLAMA3.replace("{1,3}", "")}


class WordCache:
    """Encodes documents with a cache of words. `splits_words`: whether the tokenizer allows it;
    `max_ids`: the cache is emptied when it holds more ids.

    The cache is a table of entries, each some ids: entry 0 is BOS, entry 1 is EOS, the others are
    words and whole texts.
    """

    def __init__(self, tokenizer: Tokenizer, max_ids: int = MAX_IDS):
        self.tokenizer, self.max_ids = tokenizer, max_ids
        if hasattr(tokenizer, "sp"):
            self.splits_words = _splits_sentencepiece(tokenizer)
        else:
            self.splits_words = _splits_json(tokenizer)
        # With a dummy prefix the first word of a text has the same ids as any other word.
        self.begin, self.space = ("", "") if tokenizer.dummy_prefix > 0 else (FIRST, " ")
        self._clear()

    def encode_documents(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """`Tokenizer.document` of D texts: ids of all, end to end, (N,) uint32, and the number of
        ids of each, (D,)."""
        if len(self.ids) > self.max_ids:
            self._clear()
        uncut = [i for i, text in enumerate(texts) if not self._can_cut(text)]
        marked = [self.begin + _mark_spaces(text) for text in texts]
        for i in uncut:
            marked[i] = self.begin
        split = pyarrow.compute.split_pattern(pyarrow.array(marked, pyarrow.large_string()), " ")
        words = split.flatten().dictionary_encode()
        word_entries = self._entries_of(words.dictionary.to_pylist())[words.indices.to_numpy()]
        ends = split.offsets.to_numpy()
        # the entries of a document: BOS, its words, EOS
        D, n_words = len(texts), np.diff(ends)  # (D,)
        entries = np.full(len(word_entries) + 2 * D, 1)  # (W + 2D,) EOS
        first = ends[:-1] + 2 * np.arange(D)  # where each document begins
        entries[first] = 0  # BOS
        places = np.arange(len(word_entries)) + 1 + 2 * np.repeat(np.arange(D), n_words)
        entries[places] = word_entries
        if uncut:
            encoded = self.tokenizer.encode_batch([texts[i] for i in uncut])
            entries[first[uncut] + 1] = self._append(encoded)
        starts, sizes = self.starts[entries], self.sizes[entries]
        shift = starts - np.cumsum(sizes) + sizes  # from a place among the ids to one in the table
        ids = self.ids[np.arange(sizes.sum()) + np.repeat(shift, sizes)]
        return ids, np.add.reduceat(sizes, first) if D else n_words

    def _can_cut(self, text: str) -> bool:
        """Whether a text may be cut at all: it contains no mark, and no ▁, which is a space to
        some tokenizers."""
        return self.splits_words and not (FIRST in text or RUN in text or "▁" in text)

    def _clear(self) -> None:
        self.entries: dict[str, int] = {}  # of each word
        self.ids = np.zeros(0, np.uint32)  # of all entries, end to end
        self.starts = self.sizes = np.zeros(0, np.int64)  # of each entry's ids
        self._append(self.tokenizer.begin_end_ids)

    def _entries_of(self, words: list[str]) -> np.ndarray:
        """The entries of U words, (U,); new words are encoded and appended."""
        new = list(filterfalse(self.entries.__contains__, words))
        is_single = list(map(_must_be_single, new))
        singles = list(compress(new, is_single))
        grouped = list(compress(new, map(not_, is_single)))
        entries = [self._append(self.tokenizer.encode_batch(list(map(self._text, singles))))]
        groups = [grouped[i : i + GROUP] for i in range(0, len(grouped), GROUP)]
        texts = [self.space + _unmark(" ".join(group)) for group in groups]
        encoded = self.tokenizer.encode_batch(texts)
        sizes = self._sizes_in_groups(grouped, encoded)
        if (sizes > 0).all():
            entries.append(self._append(encoded, sizes))
        else:  # a normaliser has changed the bytes of some words
            entries.append(self._append(self.tokenizer.encode_batch(list(map(self._text,
                                                                             grouped)))))
        self.entries.update(zip(singles + grouped, np.concatenate(entries).tolist(), strict=True))
        return np.fromiter(map(self.entries.__getitem__, words), np.int64, len(words))

    def _text(self, word: str) -> str:
        """The text that is encoded for a word: with its space, unless it starts a text."""
        if word[:1] in STARTS:
            return _unmark(word.removeprefix(FIRST))
        return _unmark(self.space + word)

    def _sizes_in_groups(self, words: list[str], encoded: list[list[int]]) -> np.ndarray:
        """The number of ids of each word among those of its group, (U,), from the bytes that each
        id stands for; zeros if these do not fit the words."""
        ids = np.fromiter(chain.from_iterable(encoded), np.int64)
        byte_ends = np.cumsum(self.tokenizer.byte_lengths[ids])  # of each id
        word_ends = np.cumsum([len(word.encode()) + 1 for word in words])  # each with its space
        last = np.searchsorted(byte_ends, word_ends)  # the last id of each word
        group_last = np.append(last[GROUP - 1 : -1 : GROUP], last[-1:])  # of each group
        if (not np.array_equal(group_last + 1, np.cumsum(list(map(len, encoded))))
                or (byte_ends[last] != word_ends).any()):
            return np.zeros(len(words), np.int64)
        return np.diff(last, prepend=-1)

    def _append(self, encoded: Sequence[Sequence[int]],
                sizes: np.ndarray | None = None) -> np.ndarray:
        """Append ids to the table and return the new entries, (U,): one for each list, or with
        `sizes` one for each of so many ids."""
        if not len(encoded):
            return np.zeros(0, np.int64)  # often: the table is not copied
        if sizes is None:
            sizes = np.fromiter(map(len, encoded), np.int64, len(encoded))
        self.starts = np.append(self.starts, len(self.ids) + np.cumsum(sizes) - sizes)
        self.ids = np.append(self.ids, np.fromiter(chain.from_iterable(encoded), np.uint32))
        self.sizes = np.append(self.sizes, sizes)
        return np.arange(len(self.sizes) - len(sizes), len(self.sizes))


def _must_be_single(word: str) -> bool:
    """Whether a word must be encoded by itself: it starts a text, or ends in a blank, which may
    merge with a word behind it, or a normaliser may change its bytes."""
    if word and word.isascii() and word.isprintable():
        return False  # most words; this test is the fastest
    return word[:1] in STARTS or _unmark(word[-1:]).isspace() or not is_normalized("NFC", word)


def _unmark(word: str) -> str:
    return word.replace(RUN, " ")


def _mark_spaces(text: str) -> str:
    """A text in which every space that is not a cut is replaced by RUN."""
    if "  " not in text and text[:1] != " " and text[-1:] != " ":
        if text.isprintable() or not BLANK_THEN_SPACE.search(text):  # the first test is fast
            return text
    return UNCUT_SPACES.sub(lambda match: RUN * len(match[0]), text)


def _splits_sentencepiece(tokenizer: Any) -> bool:
    """Whether the words of a `.model` can be encoded alone: it is a BPE (the score of a piece is
    its rank), no piece reaches over a cut, and it normalises no character."""
    sp, n = tokenizer.sp, tokenizer.sp.vocab_size()
    if not all(sp.get_score(i).is_integer() for i in range(n)):
        return False
    every_character = map(chr, [*range(33, 0xD800), *range(0xE000, 0x10000)])
    text = "x" + "x  x".join(every_character) + "x"
    if sp.normalize(text).removeprefix("▁") != text.replace(" ", "▁"):
        return False
    return not any(OVER_CUT.search(piece) for piece in sp.id_to_piece(list(range(n))))


def _splits_json(tokenizer: Any) -> bool:
    """Whether the words of a tokenizer.json can be encoded alone: its normaliser and pre-tokenizer
    are known ones, and no token reaches over a cut."""
    tok, model = tokenizer.tok, tokenizer.tok.model
    if model.dropout or model.continuing_subword_prefix or model.end_of_word_suffix:
        return False
    for token in tok.get_added_tokens_decoder().values():
        if OVER_CUT.search(token.content) or token.lstrip or token.rstrip or token.single_word:
            return False
        if tokenizer.dummy_prefix > 0 and not token.special:
            return False  # behind it the text starts again, with a dummy prefix
    normalisers, pre_tokenizers = _steps(tok.normalizer), _steps(tok.pre_tokenizer)
    spelling = [x for x in normalisers if x["type"] != "NFC"]
    if not all(map(_spells_spaces, spelling)):
        return False
    if spelling or any(x["type"] == "Metaspace" for x in pre_tokenizers):
        return _splits_marked(tokenizer, spelling, pre_tokenizers)
    if not any(map(_cuts_words, pre_tokenizers)) or pre_tokenizers[-1]["type"] != "ByteLevel":
        return False  # bytes must be spelled last, or an expression would not see spaces
    *others, last = pre_tokenizers
    if last["add_prefix_space"] and not _cuts_words(last):
        return False
    return all(_cuts_words(x) or x["type"] == "Digits" for x in others)


def _splits_marked(tokenizer: Any, spelling: list[dict], pre_tokenizers: list[dict]) -> bool:
    """`_splits_json` for a tokenizer that writes spaces as ▁."""
    replaces = any(x["type"] == "Replace" for x in spelling)
    if not replaces and not any(x["type"] == "Metaspace" for x in pre_tokenizers[:1]):
        return False  # a space must become ▁ before anything is cut
    if tokenizer.tok.model.ignore_merges:
        return False  # a token might be used for a whole word only
    for step in pre_tokenizers:
        if step["type"] == "Metaspace":
            known = step.get("replacement") == "▁"
        else:
            known = step.get("pattern") == {"String": " "}
        if not known:
            return False
    return not any(map(OVER_CUT.search, tokenizer.pieces))


def _spells_spaces(step: dict[str, Any]) -> bool:
    """Whether a normaliser only puts ▁ before a text or in the place of a space."""
    return (step["type"] in ("Prepend", "Replace")
            and step.get("prepend", step.get("content")) == "▁"
            and step.get("pattern", {"String": " "}) == {"String": " "})


def _steps(step: Any) -> list[dict[str, Any]]:
    """The steps of a normaliser or pre-tokenizer in order, as tokenizer.json has them."""
    if step is None:
        return []
    config = json.loads(step.__getstate__())
    return config.get("normalizers") or config.get("pretokenizers") or [config]


def _cuts_words(step: dict[str, Any]) -> bool:
    """Whether a pre-tokenizer cuts a text at every cut."""
    if step["type"] == "ByteLevel":
        return step["use_regex"] and not step["add_prefix_space"]
    return (step["type"] == "Split" and step["pattern"].get("Regex") in EXPRESSIONS
            and step["behavior"] == "Isolated" and not step["invert"])
