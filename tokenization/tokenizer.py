"""One face for both kinds of tokenizer file: SentencePiece's `tokenizer.model` and
`tokenizer.json`.

There is one way to encode. BOS and EOS are added here, in `document`, exactly once: BOS where the
tokenizer's own files say that a text begins with it (tokenizer.json's post-processor, or, beside a
`.model`, add_bos_token), for many name a BOS and never write it. Text stays text: `</s>` typed by a
user is four characters, not an end.

`byte_lengths` says how many bytes of text each id stands for, which is what makes bits per byte
possible where a document is cut between tokens.
"""

from __future__ import annotations

import functools
import gc
import hashlib
import io
import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from runtime.console import UserError

FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json",
         "chat_template.jinja")
WORDS = FILES[2:4]  # where BOS and EOS are named
MOST = 1 << 22  # ids: a single wrong one must not become a table of gigabytes
LARGEST = 64 << 20  # bytes of a tokenizer file: the largest known are 35 MB
PROBES = ("", "a", " ", "é", "Amazi y'umugezi, n’inka 🦒\n\n 1. ")  # every tokenizer can these
# parts of a long line to learn from, cut at blanks: 2**18 characters have up to 2**20 bytes
PART = re.compile(r"(?s)(.{1,262144}(?= |\Z)|.{262144}) ?")
BYTE = re.compile(r"<0x([0-9A-F]{2})>")  # SentencePiece's name of a single byte
# whether a person forbade the library threads, before this program says what it wants itself
ALONE = os.environ.get("TOKENIZERS_PARALLELISM", "").lower() in ("false", "0", "no", "off")
BEGIN, END = (("<s>", "<|begin_of_text|>"),
              ("</s>", "<|end_of_text|>", "<|endoftext|>"))  # where no file says


class Part(NamedTuple):
    """A part of a text: `control`: control tokens in it are read as such; `first`: nothing stands
    before it, else it gets no space of its own."""

    text: str
    control: bool
    first: bool


class Tokenizer:
    """Text to ids and back; open one with `Tokenizer.open(folder or file)`.

    `vocab_size` ids; `bos`, `eos` ids or None; `byte_lengths` (vocab_size,) int32, 0 for control
    tokens; `fingerprint`, a sha256 of all that decides what text becomes; `all_cores`: whether
    threads on all of them encode a batch, which is for who sets it, not for one of several workers.
    """

    all_cores = False

    @classmethod
    def open(cls, path: Path | str) -> Tokenizer:
        """From a model's folder, or from a tokenizer.json or .model file itself; UserError if it
        cannot be used."""
        path = Path(path)
        file = path if path.is_file() else next(
            (path / n for n in FILES[:2] if (path / n).exists()), None)
        if file is None:
            raise UserError(
                f"{path}: no tokenizer.json or tokenizer.model here; give a model's folder")
        if file.stat().st_size > LARGEST:
            raise UserError(
                f"{file}: {file.stat().st_size >> 20} MB, no tokenizer is above {LARGEST >> 20} MB")
        return (_Json if file.suffix == ".json" else _SentencePiece)(file)

    def __init__(self, file: Path, pieces: list[str], control: set[int], content: bytes,
                 bytewise: bool, begins: bool | str):
        folder, self.file = file.parent, file
        self.files = [folder / n for n in FILES if (folder / n).exists()] or [file]
        self.pieces, self.control, self.vocab_size = pieces, control, len(pieces)
        names = {pieces[i]: i for i in sorted(control)}
        self.bos, self.eos = (_special(folder, key, known, names) for key, known in
                              (("bos_token", BEGIN), ("eos_token", END)))
        if isinstance(begins, str):  # the file itself puts this one before a text
            self.bos = names.get(begins)
        elif not begins:
            self.bos = None
        self.fingerprint = hashlib.sha256(
            content + json.dumps([self.bos, self.eos]).encode()).hexdigest()
        if lost := _byte_pieces(bytewise) - set(pieces):
            raise UserError(f"{file}: no piece for {len(lost)} of the 256 bytes, so it would lose "
                            "what it cannot spell; take a tokenizer with byte fallback")
        sizes = [0 if i in control else _bytes_of(p, bytewise) for i, p in enumerate(pieces)]
        self.byte_lengths = np.array(sizes, np.int32)
        self.dummy_prefix = (
            int(self.byte_lengths[self.encode("a")].sum()) - 1)  # SentencePiece's space before all

    def __reduce__(self) -> tuple[Any, ...]:
        """Another process opens the file by itself."""
        return Tokenizer.open, (self.file,)

    def encode(self, text: str) -> list[int]:
        """Ids of a text, without BOS or EOS."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of many texts, each without BOS or EOS."""
        raise AssertionError("a kind of file says how")

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids; control tokens are left out."""
        raise AssertionError("a kind of file says how")

    def encode_parts(self, parts: Sequence[Part]) -> list[list[int]]:
        """Ids of parts of texts, all at once."""
        found: list[list[int]] = [[]] * len(parts)
        left = range(len(parts))
        for mark, before in (*self._marks, ("", [])):  # what stands before a part must not merge
            behind = [not parts[i].first and self.dummy_prefix > 0 for i in left]
            ids = self._wholes([(mark * x + parts[i].text, parts[i].control)
                                for i, x in zip(left, behind, strict=True)])
            merged = []
            for i, x, whole in zip(left, behind, ids, strict=True):
                n = len(before) * x
                found[i] = whole[n:]
                if whole[:n] != before[:n]:
                    merged.append(i)
            if not (left := merged):
                break
        return found

    @functools.cached_property
    def _marks(self) -> list[tuple[str, list[int]]]:
        """What is put before a part that gets no space of its own, and its ids."""
        return [(x, self.encode(x)) for x in "\x01\n"]

    def _wholes(self, texts: Sequence[tuple[str, bool]]) -> list[list[int]]:
        """Ids of whole texts, each with whether its control tokens are read as such."""
        raise AssertionError("a kind of file says how")

    @functools.cached_property
    def control_names(self) -> re.Pattern[str]:
        """Matches a control token's name, the longest that fits."""
        names = sorted(filter(None, (self.pieces[i] for i in self.control)), key=len, reverse=True)
        return re.compile("|".join(map(re.escape, names)) or r"(?!)")

    def document(self, text: str) -> list[int]:
        """BOS, the text's ids, EOS; each exactly once, left out where the tokenizer has none."""
        begin, end = self.ends
        return [*begin, *self.encode(text), *end]

    @property
    def ends(self) -> tuple[list[int], list[int]]:
        """What stands before a document and behind it: BOS and EOS, each if there is one."""
        return [self.bos] * (self.bos is not None), [self.eos] * (self.eos is not None)

    def piece(self, i: int) -> str:
        """An id as a person reads it: its piece, with a space for the mark that stands for one."""
        return self.pieces[i].replace("▁", " ").replace("Ġ", " ").replace("Ċ", "\n")

    def count_bytes(self, ids: Sequence[int]) -> int:
        """UTF-8 bytes of the text that a document's ids stand for."""
        ids = np.asarray(ids, dtype=np.int64)
        inside = ids[~np.isin(ids, list(self.control))]
        return max(
            0, int(self.byte_lengths[inside].sum()) - (self.dummy_prefix if len(inside) else 0))

    def save(self, folder: Path) -> None:
        """Copy the tokenizer's files into a folder."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        for file in self.files:
            if file.parent != Path(folder):
                shutil.copyfile(file, Path(folder) / file.name)


class _SentencePiece(Tokenizer):
    """A `tokenizer.model`."""

    def __init__(self, file: Path):
        import sentencepiece

        with _guarded(f"{file}: not a SentencePiece model", quiet=True):
            self.sp = sentencepiece.SentencePieceProcessor(model_file=str(file))
            n = self.sp.vocab_size()
            pieces = self.sp.id_to_piece(list(range(n)))
            self.sp.decode(self.sp.encode(list(PROBES)))
        control = {i for i in range(n) if self.sp.is_control(i)}
        added = _added_beside(file.parent, n)
        pieces += [added.get(i, "") for i in range(n, max(added, default=n - 1) + 1)]
        words = read_words(file.parent / WORDS[0])
        self.legacy = words.get("legacy") is True  # as transformers: a space after a control token
        super().__init__(file, pieces, control | set(added),
                         file.read_bytes() + (json.dumps(added).encode() if added else b""),
                         bytewise=False, begins=words.get("add_bos_token") is not False)

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return self.sp.encode(list(texts), num_threads=-1 if self.all_cores else 1)

    def _wholes(self, texts: Sequence[tuple[str, bool]]) -> list[list[int]]:
        if not any(control for _, control in texts):
            return self.encode_batch([text for text, _ in texts])
        names, parts = {self.pieces[i]: i for i in self.control}, []
        laid: list[list[int | None]] = []  # of each text: its control tokens, None for a part
        for text, control in texts:
            row, at = [], 0
            ends = [*(self.control_names.finditer(text) if control else ()), None]
            for m in ends:
                if part := text[at : m.start() if m else None]:
                    parts.append(Part(part, False, self.legacy or not row))
                    row.append(None)
                if m:
                    row.append(names[m.group()])
                    at = m.end()
            laid.append(row)
        ids = iter(self.encode_parts(parts))
        return [[i for x in row for i in (next(ids) if x is None else (x,))] for row in laid]

    def decode(self, ids: Sequence[int]) -> str:
        return self.sp.decode(
            [i for i in map(int, ids) if i < self.sp.vocab_size() and i not in self.control])


class _Json(Tokenizer):
    """A `tokenizer.json`."""

    def __init__(self, file: Path):
        with _guarded(f"{file}: not a tokenizer.json that can be used", quiet=True), _uncollected():
            content = file.read_bytes()
            raw = json.loads(content)
            kind = raw["model"].get("type", "BPE")
            if kind != "BPE":
                raise UserError(f"{file}: its model is {kind!r}, expected BPE, as of all the "
                                "families that are known here; give a model with such a tokenizer")
            added = {a["id"]: a for a in raw["added_tokens"]}
            n = max([*raw["model"]["vocab"].values(), *added]) + 1
            if n > MOST:
                raise ValueError(f"id {n - 1}, no tokenizer has above {MOST:,}")
            self.tok = _rust(content)
            if odd := [x for i, x in added.items() if self.tok.token_to_id(x["content"]) != i]:
                raise ValueError(f"id {odd[0]['id']} of {odd[0]['content']!r} is another's, or far")
            for text in (*PROBES, *(a["content"] for a in list(added.values())[:9])):
                for as_text in (False, True):  # a control token's name in a text stays text
                    self.tok.encode_special_tokens = as_text
                    self.tok.decode(self.tok.encode(text, add_special_tokens=False).ids)
        pieces = [self.tok.id_to_token(i) or "" for i in range(n)]
        control = {i for i, a in added.items() if a["special"]}
        begins = _first_token(raw.get("post_processor")) or False
        raw.update(padding=None, truncation=None, post_processor=None)
        bytewise = "ByteLevel" in json.dumps([raw.get("pre_tokenizer"), raw.get("decoder")])
        super().__init__(file, pieces, control,
                         json.dumps(raw, sort_keys=True, ensure_ascii=False).encode(), bytewise,
                         begins)
        for i, a in added.items():
            if i not in control:
                self.byte_lengths[i] = len(a["content"].encode())

    def __reduce__(self) -> tuple[Any, ...]:
        """Another process is told what was found in the file, and need not look through it."""
        found = {k: v for k, v in vars(self).items() if k not in ("tok", "all_cores")}
        return _again, (self.file, found)

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        together = self.all_cores and not ALONE
        os.environ["TOKENIZERS_PARALLELISM"] = str(together).lower()  # read at each call
        with _guarded(f"{self.file}: the tokenizer fails on a text"):
            batch = self.tok.encode_batch_fast(list(texts), add_special_tokens=False)
        return [e.ids for e in batch]

    def _wholes(self, texts: Sequence[tuple[str, bool]]) -> list[list[int]]:
        found: list[list[int]] = [[]] * len(texts)
        try:
            for control in {x for _, x in texts}:
                self.tok.encode_special_tokens = not control
                at = [i for i, (_, x) in enumerate(texts) if x == control]
                for i, ids in zip(at, self.encode_batch([texts[i][0] for i in at]), strict=True):
                    found[i] = ids
        finally:
            self.tok.encode_special_tokens = True
        return found

    def decode(self, ids: Sequence[int]) -> str:
        return self.tok.decode(
            [int(i) for i in ids if int(i) not in self.control], skip_special_tokens=False)


def _rust(content: bytes) -> Any:
    """The tokenizers library's own object, which pads and cuts nothing and reads text as text."""
    import tokenizers

    tok = tokenizers.Tokenizer.from_buffer(content)
    tok.no_padding()
    tok.no_truncation()
    tok.encode_special_tokens = True
    return tok


def _again(file: Path, found: dict[str, Any]) -> _Json:
    """A tokenizer.json that another process has opened: what it found, and the file."""
    tokenizer = _Json.__new__(_Json)
    vars(tokenizer).update(found)
    with _guarded(f"{file}: cannot be opened again"):
        tokenizer.tok = _rust(file.read_bytes())
    return tokenizer


@contextmanager
def _uncollected() -> Iterator[None]:
    """Without the search for garbage, which half a million merges and none of it garbage would set
    off again and again."""
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()


@contextmanager
def _guarded(what: str, quiet: bool = False) -> Iterator[None]:
    """UserError for whatever goes wrong in a library's own code, a panic in Rust too, which is no
    Exception; `quiet`: what that code writes to the terminal is not shown."""
    kept = os.dup(2) if quiet else None
    try:
        if quiet:
            with open(os.devnull, "w") as nowhere:
                os.dup2(nowhere.fileno(), 2)
        yield
    except BaseException as e:
        if isinstance(e, KeyboardInterrupt | SystemExit | MemoryError | UserError):
            raise
        raise UserError(f"{what} ({' '.join(str(e).split())[:80]})") from None
    finally:
        if kept is not None:
            os.dup2(kept, 2)
            os.close(kept)


def _special(folder: Path, key: str, known: Sequence[str], names: dict[str, int]) -> int | None:
    """The id of bos_token or eos_token: as the folder's own files say (null: there is none), else
    by its usual names."""
    told = [(folder / x, words) for x in WORDS if key in (words := read_words(folder / x))]
    for file, words in told:
        token = words[key].get("content") if isinstance(words[key], dict) else words[key]
        if token is not None:
            if not isinstance(token, str) or token not in names:
                raise UserError(f"{file}: {key} {token!r} is no control token of the tokenizer")
            return names[token]
    return None if told else next((names[x] for x in known if x in names), None)


def read_words(file: Path) -> dict[str, Any]:
    """A JSON file's object, empty where there is no file; UserError if it holds anything else."""
    try:
        words = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    except (ValueError, OSError, RecursionError) as e:
        raise UserError(f"{file}: cannot be read ({' '.join(str(e).split())[:80]}); fetch it again"
                        ) from None
    if not isinstance(words, dict):
        raise UserError(f"{file}: not a JSON object; fetch it again")
    return words


def _added_beside(folder: Path, n: int) -> dict[int, str]:
    """Control tokens that tokenizer_config.json adds after the `n` pieces of a `.model`, by id.

    UserError on any that is not one: ordinary words that sentencepiece does not know.
    """
    file, added = folder / WORDS[0], {}
    found = read_words(file).get("added_tokens_decoder") or {}
    try:
        for i, x in ((int(k), x) for k, x in found.items()):
            if i >= n:
                if not x.get("special") or i > MOST:
                    raise ValueError(f"{x.get('content')!r}, id {i}, is no control token")
                added[i] = str(x["content"])
    except (AttributeError, TypeError, ValueError, KeyError) as e:
        raise UserError(
            f"{file}: added_tokens_decoder cannot be used beside a tokenizer.model ({e}); save the "
            "tokenizer with transformers, which writes tokenizer.json") from None
    return added


def _first_token(processor: Any) -> str | None:
    """The control token that tokenizer.json's post-processor puts before a text."""
    if not isinstance(processor, dict):
        return None
    if processor.get("type") == "Sequence":
        return next(filter(None, map(_first_token, processor.get("processors", []))), None)
    single = processor.get("single") or [{}]
    first = single[0].get("SpecialToken") if processor.get("type") == "TemplateProcessing" else None
    return first and first.get("id")


def _bytes_of(piece: str, bytewise: bool) -> int:
    """Bytes of text that a piece stands for: a character each, a named byte, or its spelling."""
    if bytewise:
        return len(piece)
    return 1 if BYTE.fullmatch(piece) else len(piece.replace("▁", " ").encode())


def _byte_pieces(bytewise: bool) -> set[str]:
    """The 256 pieces that stand for single bytes, so that every text can be spelled."""
    if not bytewise:
        return {f"<0x{i:02X}>" for i in range(256)}
    from tokenizers.pre_tokenizers import ByteLevel

    return set(ByteLevel.alphabet())


def learn(texts: Iterable[str], size: int, folder: Path) -> Tokenizer:
    """Learn a SentencePiece BPE of `size` pieces (Kudo & Richardson 2018) into a folder.

    As LLaMA's: bytes for what is rare, no normalising, digits one by one, a space before each text.
    """
    import sentencepiece

    out, faults = io.BytesIO(), []

    def lines() -> Iterator[str]:
        try:
            for text in texts:
                yield from PART.findall(text)
        except BaseException as e:  # the library tells it in words of its own
            faults.append(e)
            raise

    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=lines(), model_writer=out, vocab_size=size, model_type="bpe",
            byte_fallback=True, normalization_rule_name="identity", remove_extra_whitespaces=False,
            split_digits=True, allow_whitespace_only_pieces=True, character_coverage=0.9999,
            max_sentence_length=1 << 20, unk_id=0, bos_id=1, eos_id=2, pad_id=-1, minloglevel=2)
    except RuntimeError as e:
        why = " ".join(str(e).split())[-120:]
        raise next(iter(faults), UserError(
            f"--size {size}: cannot be learned from these texts ({why})")) from None
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.model").write_bytes(out.getvalue())
    words = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>",
             "unk_token": "<unk>", "add_bos_token": True, "add_eos_token": False, "legacy": False,
             "clean_up_tokenization_spaces": False}
    (folder / "tokenizer_config.json").write_text(json.dumps(words, indent=1), encoding="utf-8")
    return Tokenizer.open(folder)
