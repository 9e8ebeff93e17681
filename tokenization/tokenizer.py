"""One interface for both kinds of tokenizer file: SentencePiece's `tokenizer.model` and
`tokenizer.json`.

BOS and EOS are added in `document` only, each once: BOS if the tokenizer's own files say that a
text begins with it (the post-processor of tokenizer.json, or add_bos_token beside a `.model`),
because many tokenizers name a BOS and never write it. Text stays text: `</s>` typed by a user is
four characters, not an end of sequence.

`byte_lengths` holds the bytes of text of each id. With it bits per byte can be computed for a
document that is cut between tokens.

Some published tokenizers have no token for a few bytes (SmolLM2 for 21). They encode a text as
transformers does: with their unknown token, or without the character. `count_unspelled` counts
such characters.

Refused: models other than BPE in a tokenizer.json, files that are damaged or too large, and a
normalizer that would make a text many times longer. The libraries stop a regex that backtracks too
often; that is an error of one line too.
"""

from __future__ import annotations

import base64
import functools
import gc
import hashlib
import io
import json
import math
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from runtime.console import UserError
from runtime.model_files import (
    copy_model_file,
    has_model_file,
    read_model_file,
    read_model_json_if_present,
)
from runtime.strict_json import shorten, strict_json
from runtime.tokenizer_threads import FORBIDDEN_BY_USER, disable_library_threads

FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json",
         "chat_template.jinja")
CONFIG_FILES = FILES[2:4]  # BOS and EOS are named in them
MAX_VOCABULARY = 1 << 22  # a single wrong id must not become a table of gigabytes
MAX_STEPS = 64  # of a normalizer, pre-tokenizer or decoder; published ones have up to 10
MAX_GROWTH = 1000  # times that a normalizer or decoder may make a text longer
PROBES = ("", "a", " ", "é", "Amazi y'umugezi, n’inka 🦒\n\n 1. ")  # encoded when a file is opened
# A long line is cut at spaces before a tokenizer is learned from it: 2**18 characters have up to
# 2**20 bytes.
LINE_PART = re.compile(r"(?s)(.{1,262144}(?= |\Z)|.{262144}) ?")
BYTE_PIECE = re.compile(r"<0x([0-9A-F]{2})>")  # SentencePiece's name of a single byte
BOS_NAMES = ("<s>", "<|begin_of_text|>")  # where no file names it
EOS_NAMES = ("</s>", "<|end_of_text|>", "<|endoftext|>")


class Segment(NamedTuple):
    """A segment of a text. `control`: names of control tokens in it become control tokens;
    `first`: nothing stands before it (else it gets no space of its own)."""

    text: str
    control: bool
    first: bool


class Tokenizer:
    """Text to ids and back; open one with `Tokenizer.open(folder or file)`.

    `vocab_size`: number of ids. `bos`, `eos`: ids, or None. `control`: the ids of control tokens.
    `byte_lengths`: (vocab_size,) int32, 0 for control tokens. `dummy_prefix`: 1 if the tokenizer
    puts a space before a text, else 0. `fingerprint`: a sha256 of everything that decides how text
    is encoded. `n_threads`: threads that encode a batch. `unknown`: the id of the unknown token, or
    None. `spells_every_byte`: whether every text can be encoded without loss.
    """

    @classmethod
    def open(cls, path: Path | str, parallel: bool = False) -> Tokenizer:
        """Open a model's folder, or a tokenizer.json or .model file; UserError if it cannot be
        used. `parallel`: encode batches on all cores, unless TOKENIZERS_PARALLELISM forbids it."""
        path = Path(path)
        file = path
        if not os.path.isfile(path):
            file = next((path / n for n in FILES[:2] if has_model_file(path, n)), None)
        if file is None:
            raise UserError(
                f"{path}: no tokenizer.json or tokenizer.model here; give a model's folder")
        n_threads = 1
        if parallel and not FORBIDDEN_BY_USER:
            n_threads = os.cpu_count() or 1
        if file.suffix == ".json":
            return _JsonTokenizer(file, n_threads)
        return _SentencePieceTokenizer(file, n_threads)

    def __init__(self, file: Path, pieces: list[str], control: set[int], content: bytes,
                 byte_lengths: np.ndarray, byte_pieces: set[str], unknown: int | None,
                 begins_with: bool | str, n_threads: int):
        folder, self.file = file.parent, file
        self.files = [folder / n for n in FILES if has_model_file(folder, n)] or [file]
        self.pieces, self.control, self.vocab_size = pieces, control, len(pieces)
        self.n_threads = n_threads
        names = {pieces[i]: i for i in sorted(control)}
        self.bos = _special_id(folder, "bos_token", BOS_NAMES, names)
        self.eos = _special_id(folder, "eos_token", EOS_NAMES, names)
        if isinstance(begins_with, str):  # the post-processor puts this token before a text
            self.bos = names.get(begins_with)
        elif not begins_with:
            self.bos = None
        self.fingerprint = hashlib.sha256(
            content + json.dumps([self.bos, self.eos]).encode()).hexdigest()
        self.spells_every_byte = byte_pieces <= set(pieces)
        self.unknown, self.byte_lengths = unknown, byte_lengths
        if unknown is not None:
            byte_lengths[unknown] = 0
        self._unspelled: dict[str, bool] = {}  # of each character that was looked up
        n_bytes = int(byte_lengths[self.encode("a")].sum())
        if n_bytes < 1:
            raise UserError(f"{file}: has no token for the letter a; use another model's tokenizer")
        self.dummy_prefix = n_bytes - 1

    def __reduce__(self) -> tuple[Any, ...]:
        """Another process opens the file itself, and encodes with one thread."""
        return Tokenizer.open, (self.file,)

    def encode(self, text: str) -> list[int]:
        """Ids of a text, without BOS or EOS."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of many texts, each without BOS or EOS."""
        raise AssertionError("implemented by each kind of tokenizer")

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids; control tokens are left out."""
        raise AssertionError("implemented by each kind of tokenizer")

    def _encode_mixed(self, texts: Sequence[tuple[str, bool]]) -> list[list[int]]:
        """Ids of whole texts, each with whether names of control tokens in it are control tokens.
        """
        raise AssertionError("implemented by each kind of tokenizer")

    def encode_segments(self, segments: Sequence[Segment]) -> list[list[int]]:
        """Ids of segments of texts, all at once.

        A tokenizer with a dummy prefix would put a space before each segment. A segment that is
        not the first is therefore encoded behind a mark, whose ids are removed. If the mark has
        merged with the segment, another mark is tried, and at last none.
        """
        encoded: list[list[int]] = [[] for _ in segments]
        remaining = list(range(len(segments)))
        for mark, mark_ids in (*self._marks, ("", [])):
            behind_mark = [not segments[i].first and self.dummy_prefix > 0 for i in remaining]
            texts = []
            for i, marked in zip(remaining, behind_mark, strict=True):
                text = mark + segments[i].text if marked else segments[i].text
                texts.append((text, segments[i].control))
            merged = []
            for i, marked, ids in zip(remaining, behind_mark, self._encode_mixed(texts),
                                      strict=True):
                if not marked:
                    encoded[i] = ids
                elif ids[: len(mark_ids)] == mark_ids:
                    encoded[i] = ids[len(mark_ids):]
                else:
                    merged.append(i)
            remaining = merged
            if not remaining:
                break
        return encoded

    @functools.cached_property
    def _marks(self) -> list[tuple[str, list[int]]]:
        """What is put before a segment that gets no space of its own, and its ids.

        Neighbouring unknown characters become one token, so a mark must not be unknown.
        """
        marks = ["\x01", "\n"]
        if not self.spells_every_byte:
            marks = [mark for mark in (*marks, ".", "a") if not self._is_unspelled(mark)]
        return [(mark, self.encode(mark)) for mark in marks]

    @functools.cached_property
    def control_names(self) -> re.Pattern[str]:
        """Matches the name of a control token, the longest that fits."""
        names = sorted(filter(None, (self.pieces[i] for i in self.control)), key=len, reverse=True)
        return re.compile("|".join(map(re.escape, names)) or r"(?!)")

    def document(self, text: str) -> list[int]:
        """BOS, the ids of a text, EOS; each exactly once, left out if the tokenizer has none."""
        begin, end = self.begin_end_ids
        return [*begin, *self.encode(text), *end]

    @property
    def begin_end_ids(self) -> tuple[list[int], list[int]]:
        """The ids before and behind a document: BOS and EOS, each if there is one."""
        return ([] if self.bos is None else [self.bos]), ([] if self.eos is None else [self.eos])

    def piece(self, i: int) -> str:
        """The piece of an id, with a space or line break for the mark that stands for one."""
        return self.pieces[i].replace("▁", " ").replace("Ġ", " ").replace("Ċ", "\n")

    def count_bytes(self, ids: Sequence[int]) -> int:
        """UTF-8 bytes of the text of a document's ids."""
        ids = np.asarray(ids, dtype=np.int64)
        text_ids = ids[~np.isin(ids, list(self.control))]
        if not len(text_ids):
            return 0
        return max(0, int(self.byte_lengths[text_ids].sum()) - self.dummy_prefix)

    def count_unspelled(self, text: str) -> int:
        """Characters of a text that the tokenizer cannot spell: they become its unknown token, or
        are left out."""
        if self.spells_every_byte:
            return 0
        counts = Counter(text)
        return sum(n for character, n in counts.items() if self._is_unspelled(character))

    def _is_unspelled(self, character: str) -> bool:
        if character not in self._unspelled:
            ids = self.encode(character)
            n_bytes = int(self.byte_lengths[ids].sum()) - self.dummy_prefix
            if self.unknown is None:
                self._unspelled[character] = n_bytes < len(character.encode())
            else:
                self._unspelled[character] = self.unknown in ids
        return self._unspelled[character]

    def save(self, folder: Path) -> None:
        """Copy the tokenizer's files into a folder."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        for file in self.files:
            if file.parent != Path(folder):
                copy_model_file(file.parent, file.name, Path(folder) / file.name)


class _SentencePieceTokenizer(Tokenizer):
    """A `tokenizer.model`."""

    def __init__(self, file: Path, n_threads: int):
        import sentencepiece

        content = read_model_file(file.parent, file.name)
        with _guarded(f"{file}: not a SentencePiece model", quiet=True):
            self.sp = sentencepiece.SentencePieceProcessor(model_proto=content)
            n = self.sp.vocab_size()
            pieces = self.sp.id_to_piece(list(range(n)))
            self.sp.decode(self.sp.encode(list(PROBES)))
        control = {i for i in range(n) if self.sp.is_control(i)}
        added = _added_control_tokens(file.parent, n)
        pieces += [added.get(i, "") for i in range(n, max(added, default=n - 1) + 1)]
        control |= set(added)
        config = read_model_json_if_present(file.parent, CONFIG_FILES[0])
        # as transformers: a space after a control token
        self.legacy = config.get("legacy") is True
        if added:
            content += json.dumps(added).encode()
        super().__init__(
            file, pieces, control, content, _byte_lengths(pieces, control, bytewise=False),
            _byte_alphabet(bytewise=False), unknown=self.sp.unk_id(),
            begins_with=config.get("add_bos_token") is not False, n_threads=n_threads)

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return self.sp.encode(list(texts), num_threads=self.n_threads)

    def _encode_mixed(self, texts: Sequence[tuple[str, bool]]) -> list[list[int]]:
        if not any(control for _, control in texts):
            return self.encode_batch([text for text, _ in texts])
        control_ids = {self.pieces[i]: i for i in self.control}
        segments: list[Segment] = []
        rows: list[list[int | None]] = []  # of each text: control tokens, None for a segment
        for text, control in texts:
            row: list[int | None] = []
            position = 0
            matches = list(self.control_names.finditer(text)) if control else []
            for match in [*matches, None]:
                between = text[position : match.start() if match else None]
                if between:
                    segments.append(Segment(between, False, self.legacy or not row))
                    row.append(None)
                if match:
                    row.append(control_ids[match.group()])
                    position = match.end()
            rows.append(row)
        segment_ids = iter(self.encode_segments(segments))
        encoded = []
        for row in rows:
            ids: list[int] = []
            for control_id in row:
                ids += next(segment_ids) if control_id is None else [control_id]
            encoded.append(ids)
        return encoded

    def decode(self, ids: Sequence[int]) -> str:
        return self.sp.decode(
            [i for i in map(int, ids) if i < self.sp.vocab_size() and i not in self.control])


class _JsonTokenizer(Tokenizer):
    """A `tokenizer.json`."""

    def __init__(self, file: Path, n_threads: int):
        with _guarded(f"{file}: not a tokenizer.json that can be used", quiet=True), \
                _without_garbage_collection():
            content = read_model_file(file.parent, file.name)
            raw = strict_json(content, file)
            for section in ("normalizer", "pre_tokenizer", "decoder"):
                _check_steps(file, section, raw.get(section))
            kind = raw["model"].get("type", "BPE")
            if kind != "BPE":
                raise UserError(f"{file}: its model is {kind!r}, expected BPE; use a model with "
                                "such a tokenizer")
            added = {a["id"]: a for a in raw["added_tokens"]}
            n = max([*raw["model"]["vocab"].values(), *added]) + 1
            if n > MAX_VOCABULARY:
                raise ValueError(f"id {n - 1}, expected ids below {MAX_VOCABULARY:,}")
            self.tok = _load_rust(content, control=True)
            for i, token in added.items():
                if self.tok.token_to_id(token["content"]) != i:
                    raise ValueError(f"id {i} of {token['content']!r} is another token's, or too "
                                     "large")
            probes = [*PROBES, *(a["content"] for a in list(added.values())[:9])]
            for as_text in (False, True):  # from here on a control token's name in a text is text
                self.tok.encode_special_tokens = as_text
                for text in probes:
                    self.tok.decode(self.tok.encode(text, add_special_tokens=False).ids)
        pieces = [self.tok.id_to_token(i) or "" for i in range(n)]
        control = {i for i, a in added.items() if a["special"]}
        unknown = self.tok.token_to_id(raw["model"].get("unk_token") or "")
        begins_with = _first_token(raw.get("post_processor")) or False
        raw.update(padding=None, truncation=None, post_processor=None)
        bytewise = "ByteLevel" in json.dumps([raw.get("pre_tokenizer"), raw.get("decoder")])
        byte_lengths = _byte_lengths(pieces, control, bytewise)
        for i, token in added.items():
            if i not in control:  # spelled as it is
                byte_lengths[i] = len(token["content"].encode())
        super().__init__(
            file, pieces, control, json.dumps(raw, sort_keys=True, ensure_ascii=False).encode(),
            byte_lengths, _byte_alphabet(bytewise), unknown, begins_with, n_threads)

    def __reduce__(self) -> tuple[Any, ...]:
        """Another process gets what was read from the file, and does not check the file again."""
        state = {k: v for k, v in vars(self).items() if k not in ("tok", "_control_tok")}
        return _reopen, (self.file, {**state, "n_threads": 1})

    @functools.cached_property
    def _control_tok(self) -> Any:
        """A second tokenizer, to which the name of a control token is that token."""
        with _guarded(f"{self.file}: cannot be opened again"):
            return _load_rust(read_model_file(self.file.parent, self.file.name), True)

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        texts = list(texts)
        n = min(self.n_threads, len(texts))
        if n < 2:
            return self._encode(self.tok, texts)
        encoded: list[list[int]] = [[] for _ in texts]
        with ThreadPoolExecutor(n) as pool:
            parts = pool.map(lambda i: self._encode(self.tok, texts[i::n]), range(n))
            for i, ids in enumerate(parts):
                encoded[i::n] = ids
        return encoded

    def _encode(self, tok: Any, texts: list[str]) -> list[list[int]]:
        with _guarded(f"{self.file}: the tokenizer fails on a text"):
            batch = tok.encode_batch_fast(texts, add_special_tokens=False)
        return [encoding.ids for encoding in batch]

    def _encode_mixed(self, texts: Sequence[tuple[str, bool]]) -> list[list[int]]:
        encoded: list[list[int]] = [[] for _ in texts]
        for control in (False, True):
            numbers = [i for i, (_, x) in enumerate(texts) if x == control]
            if not numbers:
                continue
            chosen = [texts[i][0] for i in numbers]
            ids = self._encode(self._control_tok, chosen) if control else self.encode_batch(chosen)
            for i, x in zip(numbers, ids, strict=True):
                encoded[i] = x
        return encoded

    def decode(self, ids: Sequence[int]) -> str:
        text_ids = [int(i) for i in ids if int(i) not in self.control]
        with _guarded(f"{self.file}: the tokenizer fails on its own ids"):
            return self.tok.decode(text_ids, skip_special_tokens=False)


def _load_rust(content: bytes, control: bool) -> Any:
    """The object of the tokenizers library, which neither pads nor truncates. `control`: the name
    of a control token in a text is that token."""
    import tokenizers

    disable_library_threads()
    tok = tokenizers.Tokenizer.from_buffer(content)
    tok.no_padding()
    tok.no_truncation()
    tok.encode_special_tokens = not control
    return tok


def _reopen(file: Path, state: dict[str, Any]) -> _JsonTokenizer:
    """Open a tokenizer.json that another process has read and checked."""
    tokenizer = _JsonTokenizer.__new__(_JsonTokenizer)
    vars(tokenizer).update(state)
    with _guarded(f"{file}: cannot be opened again"):
        tokenizer.tok = _load_rust(read_model_file(file.parent, file.name), False)
    return tokenizer


def _check_steps(file: Path, section: str, value: Any) -> None:
    """UserError if a section of tokenizer.json has too many steps, or would make a text many times
    longer: forty replacements of "a" by "aa" make a text longer than any memory."""
    steps = _steps_of(value)
    if len(steps) > MAX_STEPS:
        raise UserError(f"{file}: {section} has {len(steps):,} steps, expected at most "
                        f"{MAX_STEPS}; download it again")
    growth = math.prod(map(_growth, steps))
    if growth > MAX_GROWTH:
        raise UserError(f"{file}: {section} may make a text {shorten(growth)} times longer, "
                        f"expected at most {MAX_GROWTH:,}; download it again")


def _steps_of(value: Any) -> list[dict[str, Any]]:
    """The steps of a normalizer, pre-tokenizer or decoder, those of sequences one by one."""
    if not isinstance(value, dict):
        return []
    if value.get("type") != "Sequence":
        return [value]
    steps: list[dict[str, Any]] = []
    for key in ("normalizers", "pretokenizers", "decoders"):
        parts = value.get(key)
        if isinstance(parts, list):
            for part in parts:
                steps += _steps_of(part)
    return steps


def _growth(step: dict[str, Any]) -> int:
    """How many times longer a step may make a text, at most."""
    if isinstance(step.get("precompiled_charsmap"), str):
        charsmap = base64.b64decode(step["precompiled_charsmap"])
        trie_size = int.from_bytes(charsmap[:4], "little")
        # behind the trie stand the replacements, each ended by a zero byte (SentencePiece)
        return max(map(len, charsmap[4 + trie_size:].split(b"\0")), default=0) + 1
    inserted = [step[key] for key in ("content", "prepend", "replacement")
                if isinstance(step.get(key), str)]
    n_inserted = sum(map(len, inserted))
    pattern = step.get("pattern")
    matched = pattern.get("String") if isinstance(pattern, dict) else None
    if isinstance(matched, str) and matched:
        return max(1, math.ceil(n_inserted / len(matched)))
    return 1 + n_inserted  # a regex can match before each character


@contextmanager
def _without_garbage_collection() -> Iterator[None]:
    """Half a million merges, none of them garbage, would start the collector again and again."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


@contextmanager
def _guarded(message: str, quiet: bool = False) -> Iterator[None]:
    """UserError for whatever fails in a library's own code, also for a panic in Rust, which is not
    an Exception. `quiet`: hide what that code writes to the terminal."""
    stderr = os.dup(2) if quiet else None
    try:
        if quiet:
            with open(os.devnull, "w") as null:
                os.dup2(null.fileno(), 2)
        yield
    except BaseException as e:
        if isinstance(e, KeyboardInterrupt | SystemExit | MemoryError | UserError):
            raise
        raise UserError(f"{message} ({' '.join(str(e).split())[:80]})") from None
    finally:
        if stderr is not None:
            os.dup2(stderr, 2)
            os.close(stderr)


def _special_id(folder: Path, key: str, usual_names: Sequence[str],
                names: dict[str, int]) -> int | None:
    """The id of bos_token or eos_token: as the folder's files say (null: there is none), else by
    its usual names. `names`: the ids of control tokens by name."""
    configs = {folder / x: read_model_json_if_present(folder, x) for x in CONFIG_FILES}
    configs = {file: config for file, config in configs.items() if key in config}
    for file, config in configs.items():
        token = config[key].get("content") if isinstance(config[key], dict) else config[key]
        if token is not None:
            if not isinstance(token, str) or token not in names:
                raise UserError(
                    f"{file}: {key} {shorten(token)} is not a control token of the tokenizer")
            return names[token]
    if configs:
        return None
    return next((names[x] for x in usual_names if x in names), None)


def _added_control_tokens(folder: Path, n: int) -> dict[int, str]:
    """Control tokens that tokenizer_config.json adds after the `n` pieces of a `.model`, by id.

    UserError for an added token that is not a control token: sentencepiece does not know it.
    """
    file, added = folder / CONFIG_FILES[0], {}
    decoder = read_model_json_if_present(folder, CONFIG_FILES[0]).get("added_tokens_decoder") or {}
    try:
        for key, token in decoder.items():
            i = int(key)
            if i >= n:
                name = token["content"]
                if not token.get("special") or i > MAX_VOCABULARY or not isinstance(name, str):
                    raise ValueError(f"{shorten(name)}, id {i}, is not a control token")
                added[i] = name
    except (AttributeError, TypeError, ValueError, KeyError) as e:
        raise UserError(
            f"{file}: added_tokens_decoder cannot be used with a tokenizer.model "
            f"({str(e)[:200]}); save the tokenizer with transformers, which writes tokenizer.json"
        ) from None
    return added


def _first_token(processor: Any) -> str | None:
    """The control token that tokenizer.json's post-processor puts before a text."""
    if not isinstance(processor, dict):
        return None
    if processor.get("type") == "Sequence":
        return next(filter(None, map(_first_token, processor.get("processors", []))), None)
    if processor.get("type") != "TemplateProcessing":
        return None
    first = (processor.get("single") or [{}])[0].get("SpecialToken")
    return first and first.get("id")


def _byte_lengths(pieces: Sequence[str], control: set[int], bytewise: bool) -> np.ndarray:
    """Bytes of text of each id, (vocab_size,) int32, 0 for control tokens. `bytewise`: a character
    of a piece stands for a byte."""
    sizes = np.zeros(len(pieces), np.int32)
    for i, piece in enumerate(pieces):
        if i in control:
            continue
        if bytewise:
            sizes[i] = len(piece)
        elif BYTE_PIECE.fullmatch(piece):
            sizes[i] = 1
        else:
            sizes[i] = len(piece.replace("▁", " ").encode())
    return sizes


def _byte_alphabet(bytewise: bool) -> set[str]:
    """The 256 pieces of single bytes, with which every text can be spelled."""
    if not bytewise:
        return {f"<0x{i:02X}>" for i in range(256)}
    from tokenizers.pre_tokenizers import ByteLevel

    return set(ByteLevel.alphabet())


def learn(texts: Iterable[str], size: int, folder: Path) -> Tokenizer:
    """Learn a SentencePiece BPE of `size` pieces (Kudo & Richardson 2018) into a folder.

    As LLaMA's: byte fallback, no normalisation, digits split, a space before each text.
    """
    import sentencepiece

    model, errors = io.BytesIO(), []

    def lines() -> Iterator[str]:
        try:
            for text in texts:
                yield from LINE_PART.findall(text)
        except BaseException as e:  # the library raises another error in its place
            errors.append(e)
            raise

    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=lines(), model_writer=model, vocab_size=size, model_type="bpe",
            byte_fallback=True, normalization_rule_name="identity", remove_extra_whitespaces=False,
            split_digits=True, allow_whitespace_only_pieces=True, character_coverage=0.9999,
            max_sentence_length=1 << 20, unk_id=0, bos_id=1, eos_id=2, pad_id=-1, minloglevel=2)
    except RuntimeError as e:
        if errors:
            raise errors[0] from None
        reason = " ".join(str(e).split())[-120:]
        raise UserError(f"--size {size}: cannot be learned from these texts ({reason})") from None
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.model").write_bytes(model.getvalue())
    config = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>",
              "unk_token": "<unk>", "add_bos_token": True, "add_eos_token": False, "legacy": False,
              "clean_up_tokenization_spaces": False}
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=1), encoding="utf-8")
    return Tokenizer.open(folder)
