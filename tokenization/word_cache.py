"""Words encoded once: a text's ids from those of its words.

A text is cut before each single space behind a character that is none. Where no token reaches over
such a cut, which is read off the tokenizer itself, a text's ids are those of its words end to end,
and a word met before costs a look-up: text is encoded several times as fast as by the tokenizer
alone. Where that cannot be read off, whole texts are encoded, as ever.
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

MOST = 1 << 21  # ids kept: about half a million words, fewer where words are long
GROUP = 64  # new words encoded as one text: a call costs more than a word
FIRST, RUN = "\1", "\0"  # marks a text's first word; a space that is at no cut
ALONE = ("", FIRST, RUN)  # what begins so begins a text
SPACES = re.compile(r"(?<!\S) +| {2,}| +\Z")
BEHIND = re.compile(r"[^\S ] ")  # behind a line's end, say: there are tokens that hold both
ACROSS = re.compile(r"[^▁ ][▁ ]")  # a token that holds one reaches over a cut

# What cuts a text into pieces that are encoded alone, and never has a space behind a character
# that is none in one piece: GPT-2's expression, Llama 3's, Qwen 2's.
GPT2 = (r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
        r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+")
LLAMA3 = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
          r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
EXPRESSIONS = {*GPT2, LLAMA3, LLAMA3.replace("{1,3}", "")}


class Words:
    """A tokenizer with a memory for words; `apart` says whether it can be used."""

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer = tokenizer
        self.apart = _sentencepiece(tokenizer) if hasattr(tokenizer, "sp") else _json(tokenizer)
        # a tokenizer that puts a space before a text gives a first word the ids of any other
        self.begin, self.space = ("", "") if tokenizer.dummy_prefix > 0 else (FIRST, " ")
        self._forget()

    def documents(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """`Tokenizer.document` of D texts end to end: ids (N,) uint32, and how many each has,
        (D,)."""
        if len(self.ids) > MOST:
            self._forget()
        odd = [i for i, text in enumerate(texts)  # they hold a mark, or what is a space to some
               if not self.apart or FIRST in text or RUN in text or "▁" in text]
        evened = list(texts)
        for i in odd:
            evened[i] = ""
        cut = pyarrow.compute.split_pattern(pyarrow.array(
            [self.begin + _evened(text) for text in evened], pyarrow.large_string()), " ")
        found = cut.flatten().dictionary_encode()
        here = self._learn(found.dictionary.to_pylist())[found.indices.to_numpy()]  # (W,)
        ends = cut.offsets.to_numpy()
        # a document's words stand between BOS and EOS: entries of the table like any other
        D, n = len(texts), np.diff(ends)  # (D,)
        laid = np.full(len(here) + 2 * D, 1)  # (W + 2D,) EOS
        first = ends[:-1] + 2 * np.arange(D)  # where each document begins
        laid[first] = 0  # BOS
        laid[np.arange(len(here)) + 1 + 2 * np.repeat(np.arange(D), n)] = here
        if odd:
            laid[first[odd] + 1] = self._add(self.tokenizer.encode_batch([texts[i] for i in odd]))
        starts, sizes = self.starts[laid], self.sizes[laid]
        shift = starts - np.cumsum(sizes) + sizes  # from a place among the ids to one in the table
        ids = self.ids[np.arange(sizes.sum()) + np.repeat(shift, sizes)]
        return ids, np.add.reduceat(sizes, first) if D else n

    def _forget(self) -> None:
        self.known: dict[str, int] = {}  # a word behind a space: its place in the table
        self.ids = np.zeros(0, np.uint32)  # of the table's entries, end to end
        self.starts = self.sizes = np.zeros(0, np.int64)  # of each entry in them
        self._add(self.tokenizer.begin_end_ids)

    def _learn(self, words: list[str]) -> np.ndarray:
        """Words' places in the table, (U,), where those new to it are put."""
        new = list(filterfalse(self.known.__contains__, words))
        apart = list(map(_alone, new))
        alone = list(compress(new, apart))
        behind = list(compress(new, map(not_, apart)))
        places = [self._add(self.tokenizer.encode_batch(list(map(self._text, alone))))]
        groups = [behind[i : i + GROUP] for i in range(0, len(behind), GROUP)]
        texts = [self.space + _plain(" ".join(group)) for group in groups]
        encoded = self.tokenizer.encode_batch(texts)
        sizes = self._sizes(behind, encoded)
        if (sizes > 0).all():
            places.append(self._add(encoded, sizes))
        else:  # a normaliser made other bytes of some
            places.append(self._add(self.tokenizer.encode_batch(list(map(self._text, behind)))))
        self.known.update(zip(alone + behind, np.concatenate(places).tolist(), strict=True))
        return np.fromiter(map(self.known.__getitem__, words), np.int64, len(words))

    def _text(self, word: str) -> str:
        """What is encoded for a word: with its space, if it does not begin a text."""
        first = word[:1] in ALONE
        return _plain(word.removeprefix(FIRST) if first else self.space + word)

    def _sizes(self, words: list[str], encoded: list[list[int]]) -> np.ndarray:
        """How many ids each word has of those of its group, (U,), by the bytes that each id stands
        for; 0 where those do not come out."""
        ids = np.fromiter(chain.from_iterable(encoded), np.int64)
        reached = np.cumsum(self.tokenizer.byte_lengths[ids])
        ends = np.cumsum([len(word.encode()) + 1 for word in words])  # each with its space
        last = np.searchsorted(reached, ends)  # of each word
        closed = np.append(last[GROUP - 1 : -1 : GROUP], last[-1:])  # of each group's last word
        if (not np.array_equal(closed + 1, np.cumsum(list(map(len, encoded))))
            or (reached[last] != ends).any()):
            return np.zeros(len(words), np.int64)
        return np.diff(last, prepend=-1)

    def _add(self, encoded: Sequence[Sequence[int]], sizes: np.ndarray | None = None) -> np.ndarray:
        """Put ids into the table: the places, (U,), of entries of so many ids each, or of each
        list."""
        if not len(encoded):
            return np.zeros(0, np.int64)  # nothing is new, as often: the table is not copied
        if sizes is None:
            sizes = np.fromiter(map(len, encoded), np.int64, len(encoded))
        self.starts = np.append(self.starts, len(self.ids) + np.cumsum(sizes) - sizes)
        self.ids = np.append(self.ids, np.fromiter(chain.from_iterable(encoded), np.uint32))
        self.sizes = np.append(self.sizes, sizes)
        return np.arange(len(self.sizes) - len(sizes), len(self.sizes))


def _alone(word: str) -> bool:
    """Whether a word is encoded by itself: it begins a text, or its spaces at the end may be cut
    otherwise with another behind it, or a normaliser may make other bytes of it."""
    if word and word.isascii() and word.isprintable():
        return False  # as most are: the quickest to see
    return word[:1] in ALONE or _plain(word[-1:]).isspace() or not is_normalized("NFC", word)


def _plain(word: str) -> str:
    return word.replace(RUN, " ")


def _evened(text: str) -> str:
    """A text whose only spaces are those at cuts."""
    even = "  " not in text and text[:1] != " " and text[-1:] != " " and (
        text.isprintable() or not BEHIND.search(text))  # the first is quick, and of most lines so
    return text if even else SPACES.sub(lambda m: RUN * len(m[0]), text)


def _sentencepiece(tokenizer: Any) -> bool:
    """Of a `.model`: BPE (a piece's score is its rank), no piece across a cut, and no character
    changed before."""
    sp, n = tokenizer.sp, tokenizer.sp.vocab_size()
    ranks = all(sp.get_score(i).is_integer() for i in range(n))
    plain = "x" + "x  x".join(map(chr, [*range(33, 0xD800), *range(0xE000, 0x10000)])) + "x"
    shown = sp.normalize(plain).removeprefix("▁")
    return ranks and shown == plain.replace(" ", "▁") and not any(map(ACROSS.search, sp.id_to_piece(
        list(range(n)))))


def _json(tokenizer: Any) -> bool:
    """Of a tokenizer.json: its normaliser and pre-tokenizer are known ones, and no token, or no
    piece that they leave, is across a cut."""
    tok, model = tokenizer.tok, tokenizer.tok.model
    if model.dropout or model.continuing_subword_prefix or model.end_of_word_suffix:
        return False
    if any(ACROSS.search(x.content) or x.lstrip or x.rstrip or x.single_word
           or (tokenizer.dummy_prefix > 0 and not x.special)
           for x in tok.get_added_tokens_decoder().values()):
        return False  # behind one, text begins anew, with a space where texts get one
    normal, before = _steps(tok.normalizer), _steps(tok.pre_tokenizer)
    spelled = [x for x in normal if x["type"] != "NFC"]
    if any(x["type"] not in ("Prepend", "Replace") or x.get("prepend", x.get("content")) != "▁"
           or x.get("pattern", {"String": " "}) != {"String": " "} for x in spelled):
        return False
    if spelled or any(x["type"] == "Metaspace" for x in before):
        # all spaces become ▁ before anything is cut; a word that is a token is none within a text
        # unless merges make it (ignore_merges)
        marked = any(x["type"] == "Replace" for x in spelled) \
            or any(x["type"] == "Metaspace" for x in before[:1])
        return marked and not model.ignore_merges and all(
            x.get("replacement") == "▁" if x["type"] == "Metaspace" else
            x.get("pattern") == {"String": " "} for x in before
        ) and not any(map(ACROSS.search, tokenizer.pieces))
    # bytes are spelled last, or an expression would not see spaces
    return any(map(_cuts, before)) and before[-1]["type"] == "ByteLevel" and all(
        _cuts(x) or x["type"] == "Digits" or (x is before[-1] and not x["add_prefix_space"])
        for x in before)


def _steps(step: Any) -> list[dict[str, Any]]:
    """A normaliser or pre-tokenizer, by its steps in order, each as tokenizer.json has it."""
    if step is None:
        return []
    found = json.loads(step.__getstate__())
    return found.get("normalizers") or found.get("pretokenizers") or [found]


def _cuts(step: dict[str, Any]) -> bool:
    """Whether a pre-tokenizer parts a text at every cut."""
    if step["type"] == "ByteLevel":
        return step["use_regex"] and not step["add_prefix_space"]
    return (step["type"] == "Split" and step["pattern"].get("Regex") in EXPRESSIONS
            and step["behavior"] == "Isolated" and not step["invert"])
