"""The data of a run: --data and --val become bins, bins become sources and held-out documents.

A spec names a prepared bin, or files. Files are prepared once, into OUT/bins. Text, conversations
and translations may be mixed in one run, because each is documents with a loss mask; preference
pairs may not be mixed with them.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from data import Bin, Source, sha256, validation_split
from languages.language import (
    DEFAULT_LANGUAGE,
    DEFAULT_PAIR,
    language_of,
    read_normaliser,
    translation_prompts,
)
from languages.normalise import Normaliser, cleaning_of
from preparation.conversations import prepare_conversations
from preparation.examples import LengthLimit, open_template
from preparation.ledger import Ledger, format_ledger
from preparation.preferences import prepare_preferences
from preparation.readers import TEXT_FORMATS, file_format, list_files
from preparation.specs import bin_name, folder_name, split_weight
from preparation.text import build_normaliser, prepare_text
from preparation.translation import Prompt, prepare_translation
from preparation.workers import Workers
from runtime import console
from runtime.console import FLAGS, UserError
from runtime.distributed import Distributed
from tokenization.chat_template import read_template_kwargs
from tokenization.document import Document
from tokenization.tokenizer import Tokenizer
from training.settings import BIN_KINDS, Settings

RENDERED = ("chat", "pairs")  # kinds of bins that a chat template writes
MIXED = ("text", "chat", "mt")  # the kinds of bins that may be mixed: trained by their NLL

CLEANING_KEYS = {"text": "clean_text", "chat": "clean_chat", "mt": "clean_translate"}  # by kind

# Held-out documents by name: ids of texts, or documents with their loss mask.
ValidationSets = dict[str, list[np.ndarray] | list[Document]]


def open_data(s: Settings, model_dir: Path, tokenizer: Tokenizer, vocab_size: int, out: Path,
              ranks: Distributed) -> tuple[list[Source], ValidationSets]:
    """Open or prepare --data and --val -> the sources to train on, and the held-out documents."""
    if not s.data:
        raise UserError("--data: name at least one bin or file of text", FLAGS)
    specs = [split_weight(x) for x in s.data]
    if len({weight is None for _, weight in specs}) > 1:
        raise UserError(
            "--data: give a weight to every source or to none, as in kin.txt:3 eng.txt:1", FLAGS)
    opener = _Opener(s, model_dir, tokenizer, vocab_size, out, ranks)
    sources: list[Source] = []
    val_sets: ValidationSets = {}
    for spec, weight in specs:
        bin = opener.open_training_bin(spec)
        name = bin.folder.name
        if name in {x.name for x in sources}:
            raise UserError(
                f"--data: two sources are called {name}; give their files or folders different "
                "names, or prepare them as bins", FLAGS)
        is_held_out = validation_split(bin, 0.0 if s.val else s.hold_out)
        if is_held_out.any():
            val_sets[name] = opener.read_val_set(bin, np.flatnonzero(is_held_out))
        elif not s.val and s.hold_out:
            console.info(f"{name}: {_why_none_is_held_out(bin)}, so none is held out; cut it into "
                        "documents, or give --val")
        sources.append(Source(name, bin, np.flatnonzero(~is_held_out),
                              weight or float(bin.meta["tokens"] - len(bin))))
    normaliser = normaliser_of(source.bin for source in sources)
    for item in s.val:
        name, _, spec = item.partition("=")
        if not (name and spec):
            raise UserError(f"--val {item}: expected NAME=SPEC, as in kin=val.jsonl", FLAGS)
        if folder_name(name) in map(folder_name, val_sets):
            raise UserError(f"--val {item}: another one is called {name}; give it a name of its "
                            "own, or a glob or folder for both", FLAGS)
        bin = opener.open_val_bin(name, spec, normaliser)
        val_sets[name] = opener.read_val_set(bin, range(len(bin)))
    return sources, val_sets


def _why_none_is_held_out(bin: Bin) -> str:
    if len(bin) == 1:
        return "one document"
    return f"all {len(bin):,} documents begin alike, or are one pair"


class _Opener:
    """Opens the bins of one run."""

    def __init__(self, s: Settings, model_dir: Path, tokenizer: Tokenizer, vocab_size: int,
                 out: Path, ranks: Distributed):
        self.s, self.model_dir, self.tokenizer = s, model_dir, tokenizer
        self.vocab_size, self.out, self.ranks = vocab_size, out, ranks
        self.kind = BIN_KINDS[s.mode]

    def open_training_bin(self, spec: str) -> Bin:
        bin = self._open(spec, self.kind, bin_name(spec))
        kinds = MIXED if self.kind in MIXED else (self.kind,)
        return self._check_kind(bin, kinds)

    def open_val_bin(self, name: str, spec: str, normaliser: Normaliser | None) -> Bin:
        """`normaliser`: how text is cleaned, if it is not a bin yet."""
        bin = self._open(spec, kind_of_val(spec, self.kind), f"{folder_name(name)}-val",
                         is_val=True, normaliser=normaliser)
        return self._check_kind(bin, (*MIXED, self.kind))

    def _open(self, spec: str, kind: str, name: str, is_val: bool = False,
              normaliser: Normaliser | None = None) -> Bin:
        """A prepared bin, or the bin of files, which rank 0 prepares under OUT/bins if needed."""
        folder = Path(spec)
        if not (folder / "meta.json").exists():
            folder = self.out / "bins" / name
            if self.ranks.rank == 0:
                kwargs = self.s.template_kwargs if kind in RENDERED else ()
                prompt = self._template_prompt(kind)
                cleaning = cleaning_of(normaliser) if is_val and kind == "text" else None
                if not is_fresh(folder, spec, self.tokenizer, kind, self.s.seq_len, prompt,
                                cleaning):
                    prepare_files(kind, spec, self.model_dir, folder, self.s.seq_len, is_val,
                                  kwargs, normaliser)
            self.ranks.barrier()
        bin = Bin(folder)
        bin.check(self.tokenizer.fingerprint, self.vocab_size)
        return bin

    def _template_prompt(self, kind: str) -> dict[str, Any] | None:
        """What the meta.json of a bin of this kind says of its chat template; None for kinds that
        are not rendered by one."""
        if kind not in RENDERED:
            return None
        prompt = open_template("model", self.model_dir, self.tokenizer,
                               read_template_kwargs(self.s.template_kwargs)).to_prompt()
        if kind == "pairs":  # a pair may be text alone
            del prompt["chat"]
        return prompt

    def _check_kind(self, bin: Bin, kinds: Sequence[str]) -> Bin:
        if bin.meta["kind"] not in kinds:
            expected = MIXED if self.kind in MIXED else (self.kind,)
            raise UserError(f"{bin.folder}: a bin of {bin.meta['kind']}, but --mode {self.s.mode} "
                            f"trains on {', '.join(expected)}")
        return bin

    def read_val_set(self, bin: Bin, documents: Sequence[int]) -> list[np.ndarray] | list[Document]:
        """The held-out documents of a bin, --eval-tokens of them."""
        if bin.meta["kind"] == "text":
            return read_texts(bin, documents, self.tokenizer, self.s.eval_tokens)
        if bin.meta["kind"] == "pairs":
            documents = documents[::2]  # the chosen ones
        return read_answers(bin, documents, self.s.eval_tokens)


def kind_of_val(spec: str, kind: str) -> str:
    """The kind of bin that files of --val become: .txt files are text in every mode."""
    return "text" if file_format(Path(spec)) == ".txt" else kind


# -- preparing files -------------------------------------------------------------------------------


def prepare_files(kind: str, spec: str, model_dir: Path, out: Path, seq_len: int,
                  is_val: bool = False, template_kwargs: Sequence[str] = (),
                  val_normaliser: Normaliser | None = None) -> None:
    """Prepare files into a bin as prepare.py does by default, and print the command that is equal.

    Examples must fit a row of `seq_len`. Held-out text is not deduplicated, and is cleaned by
    `val_normaliser`. `template_kwargs`: the words of --template-kwargs, for chat and pairs.
    """
    is_val_text = is_val and kind == "text"
    argv = [kind, spec, "--tokenizer", str(model_dir), "--out", str(out)]
    if kind != "text":
        argv += ["--max-tokens", str(seq_len)]
    if template_kwargs:
        argv += ["--template-kwargs", *template_kwargs]
    if is_val_text:
        steps = cleaning_of(val_normaliser)["steps"] or ["none"]
        argv += ["--normalise", *steps, "--keep-duplicates"]
    console.info("preparing: " + shlex.join(["python", "prepare.py", *argv]))
    language = language_of(DEFAULT_LANGUAGE)
    common = {"specs": [spec], "tokenizer_path": str(model_dir), "out": str(out),
              "workers": Workers(os.cpu_count() or 1)}
    limit, normalised = LengthLimit(seq_len), ["all"]
    if kind == "text":
        normaliser = build_normaliser(normalised, [language])
        if is_val_text:
            normaliser = val_normaliser
        bin, ledger = prepare_text(**common, normalise=normaliser, keep_duplicates=is_val_text)
    elif kind == "chat":
        normaliser = build_normaliser(normalised, [language], omitted=("spaces",))
        bin, ledger = prepare_conversations(
            **common, template_kwargs=read_template_kwargs(template_kwargs), normalise=normaliser,
            limit=limit)
    elif kind == "mt":
        first, second = map(language_of, DEFAULT_PAIR)
        name, prompt = next(iter(translation_prompts(DEFAULT_PAIR).items()))
        bin, ledger, _ = prepare_translation(
            **common, languages=(first, second), prompts=[(Prompt(name, *prompt), 1.0)],
            normalise=build_normaliser(normalised, [first, second]), limit=limit)
    else:
        bin, ledger = prepare_preferences(
            **common, template_kwargs=read_template_kwargs(template_kwargs), limit=limit)
    _print_ledger(bin, ledger)


def _print_ledger(bin: Bin, ledger: Ledger) -> None:
    unit = "documents" if bin.meta["kind"] == "text" else "rows"
    console.info(format_ledger(ledger.to_json(), unit))
    console.info(f"{bin.folder}: {len(bin):,} documents, {bin.meta['tokens']:,} tokens")


def is_fresh(folder: Path, spec: str, tokenizer: Tokenizer, kind: str, seq_len: int,
             prompt: Mapping[str, Any] | None = None,
             cleaning: Mapping[str, Any] | None = None) -> bool:
    """Whether the bin in a folder is the one that preparing `spec` now would give.

    Compares the sizes of the source files and, for files that changed after the bin was made, the
    sha256. A bin of examples that was made for another row length is still fresh if all of its
    examples fit both. `prompt`, `cleaning`: as they must be in meta.json; a bin of an earlier
    version has no `cleaning` and stays fresh.
    """
    if not (folder / "meta.json").exists():
        return False
    bin = Bin(folder)
    if (bin.meta["tokenizer"], bin.meta["kind"]) != (tokenizer.fingerprint, kind):
        return False
    if prompt is not None and bin.meta.get("prompt", {}) != prompt:
        return False
    if cleaning is not None and bin.meta.get("cleaning", cleaning) != cleaning:
        return False
    formats = TEXT_FORMATS if kind == "text" else (*TEXT_FORMATS, ".json")
    files = [(str(p), p.stat().st_size) for p in list_files([spec], formats)]
    if files != [(x["path"], x["bytes"]) for x in bin.meta["sources"]]:
        return False
    made = (folder / "meta.json").stat().st_mtime
    for source in bin.meta["sources"]:
        path = Path(source["path"])
        if path.stat().st_ctime >= made and sha256(path) != source["sha256"]:
            return False
    ledger = bin.meta["ledger"]
    if kind == "text" or ledger.get("max_tokens") == seq_len:
        return True
    documents_per_example = 2 if kind == "pairs" else 1
    sizes = (np.diff(bin.starts) - 1).reshape(-1, documents_per_example).sum(1)
    return "too long" not in ledger["documents"] and sizes.max() <= seq_len


# -- reading bins ----------------------------------------------------------------------------------


def read_texts(bin: Bin, documents: Sequence[int], tokenizer: Tokenizer,
               max_tokens: int) -> list[np.ndarray]:
    """The ids of documents without BOS and EOS, up to `max_tokens` in all; the last one is cut."""
    texts = []
    for i in documents:
        ids = bin.document(i)
        if len(ids) and ids[0] == tokenizer.bos:
            ids = ids[1:]
        if len(ids) and ids[-1] == tokenizer.eos:
            ids = ids[:-1]
        ids = ids[:max_tokens]
        max_tokens -= len(ids)
        if len(ids):
            texts.append(np.array(ids))
        if max_tokens <= 0:
            break
    return texts


def read_answers(bin: Bin, documents: Sequence[int], max_tokens: int) -> list[Document]:
    """Documents with their loss mask, up to `max_tokens` in all, but at least one."""
    answers: list[Document] = []
    for i in documents:
        ids = bin.document(i)
        if answers:
            max_tokens -= len(ids)
            if max_tokens < 0:
                break
        answers.append(Document(np.array(ids, np.int64), bin.trained(i), 0))
    return answers


def normaliser_of(bins: Iterable[Bin]) -> Normaliser | None:
    """How the text of the first bin of text was cleaned; None if there is none, or if its meta.json
    does not say."""
    for bin in bins:
        if bin.meta["kind"] == "text":
            entry = bin.meta.get("cleaning")
            return read_normaliser(entry, str(bin.folder / "meta.json")) if entry else None
    return None


def prompts_of(sources: Sequence[Source]) -> dict[str, Any]:
    """How the sources' prompts were written: {"translate": [...], "chat": template,
    "template_kwargs": its variables}; and how their text was cleaned: {"clean_text": steps}.

    If several sources have a key, the first one counts. A template without variables has empty
    ones here, so that those of another template are not used with it.
    """
    prompts: dict[str, Any] = {}
    for source in sources:
        prompt = source.bin.meta.get("prompt", {})
        if "chat" in prompt:
            prompt = {"template_kwargs": {}, **prompt}
        key = CLEANING_KEYS.get(source.bin.meta["kind"])
        if key and "cleaning" in source.bin.meta:
            prompt = {**prompt, key: source.bin.meta["cleaning"]}
        prompts = {**prompt, **prompts}
    return prompts
