"""Text, conversations and pairs to token bins, and looking at them.

    python prepare.py text kin/*.txt --tokenizer MODEL --out bins/kin
    python prepare.py chat chats.jsonl --tokenizer MODEL --out bins/chat
    python prepare.py mt pairs.tsv --tokenizer MODEL --out bins/mt
    python prepare.py pairs preferences.jsonl --tokenizer MODEL --out bins/pairs
    python prepare.py prefer samples.jsonl --references kin.txt --out preferences.jsonl
    python prepare.py show bins/mt --tokenizer MODEL
    python prepare.py vocab kin/*.txt eng/*.txt --size 8000 --out tok
    python prepare.py fertility val.txt --tokenizers tok MODEL
"""

from __future__ import annotations

if __name__ == "__main__":  # before any import that needs this Python
    import os
    import sys

    if getattr(sys.flags, "safe_path", False):  # python -P does not search this folder
        sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
    from runtime.python_version import require_python

    require_python()

import json
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from tyro.conf import Positional

from data import Bin
from languages.language import (
    DEFAULT_LANGUAGE,
    DEFAULT_PAIR,
    language_of,
    read_names,
    translation_prompts,
)
from preparation.contamination import index_files
from preparation.conversations import prepare_conversations
from preparation.examples import LengthLimit
from preparation.ledger import Ledger, format_ledger
from preparation.preferences import (
    best_and_worst,
    pairs_of_votes,
    prepare_preferences,
    read_samples,
)
from preparation.readers import list_files, read_documents, read_texts
from preparation.show import text_spans
from preparation.specs import read_weighted_name
from preparation.text import build_normaliser, prepare_text
from preparation.translation import Prompt, prepare_translation
from preparation.workers import Workers
from runtime import console, flags
from runtime.console import FLAGS, UserError
from runtime.output_paths import (
    real_path,
    refused_as_output,
    try_output_file,
    try_output_folder,
)
from runtime.setting_metadata import bounded
from runtime.temporary import write_text
from tokenization.chat_template import read_template_kwargs
from tokenization.tokenizer import Tokenizer, learn


@dataclass
class Text:
    """Text files to a bin: clean, remove duplicates, encode; every byte read is accounted for."""

    files: Positional[list[str]]
    """Files, folders or globs: .txt .jsonl .tsv .parquet, and .gz."""
    tokenizer: str
    """A model's folder, or a tokenizer.json or .model file."""
    out: str
    """The bin's folder; an older bin there is replaced."""
    documents: Literal["auto", "file", "line", "block"] = "auto"
    """What a document of a .txt is."""
    text_key: str = "text"
    """The key or column of the text in .jsonl, .tsv and .parquet."""
    language: str = DEFAULT_LANGUAGE
    """The language of the text, by ISO 639-3 code; it decides which cleaning steps there are."""
    normalise: list[str] = field(default_factory=lambda: ["all"])
    """Cleaning steps: all, none, or by name (spaces, nfc, for Kinyarwanda apostrophe)."""
    keep_duplicates: bool = False
    """Keep documents whose text was read before."""
    without: list[str] = field(default_factory=list)
    """Test files: a document with a whole line or cell of theirs, or 13 words in a row, is left
    out."""
    min_chars: int = bounded(1, at_least=0)
    """Shorter documents are left out."""
    max_doc_mb: int = 64
    """Longer lines are left out; a longer file or block is refused."""
    on_bad: Literal["stop", "skip"] = "stop"
    """What happens if more than 0.1 % of the documents are undecodable."""
    processes: int = bounded(os.cpu_count() or 1, at_least=1)
    """Worker processes; they start after three seconds of work in one process."""


@dataclass
class Chat:
    """Conversations to a bin: ids and loss mask together; messages, ShareGPT and Alpaca forms."""

    files: Positional[list[str]]
    """Files, folders or globs: .jsonl .json .tsv .parquet, and .gz."""
    tokenizer: str
    """A model's folder: its tokenizer, and its chat template."""
    out: str
    """The bin's folder; an older bin there is replaced."""
    template: str = "model"
    """model: the model's own, or ours if it has none; plain: ours; or a .jinja file."""
    template_kwargs: list[str] = field(default_factory=list)
    """Variables of the template, KEY=VALUE or a JSON object, as in enable_thinking=false. A date
    that the template writes is given by date_string=2024-07-26."""
    loss_on: Literal["assistant", "all"] = "assistant"
    """What is trained: the assistant's messages and the token that ends each, or every token."""
    language: str = DEFAULT_LANGUAGE
    """The language of the conversations, by ISO 639-3 code."""
    normalise: list[str] = field(default_factory=lambda: ["all"])
    """Cleaning steps: all (but spaces, which would remove the indentation of code), none, or by
    name."""
    max_tokens: int = bounded(0, at_least=0)
    """The row that each example must fit, as --seq-len of the run; 0: no limit."""
    too_long: Literal["stop", "drop", "cut"] = "stop"
    """What is done with longer examples; stop leaves out up to one in a hundred."""
    keep_duplicates: bool = False
    """Keep examples that were read before."""
    processes: int = bounded(os.cpu_count() or 1, at_least=1)
    """Worker processes; they start after three seconds of work in one process."""


@dataclass
class Mt:
    """Translation pairs to a bin: both directions of every pair, with ALMA's prompt."""

    files: Positional[list[str]]
    """Files, folders or globs: .tsv .jsonl .json .parquet; with --aligned .txt; and .gz."""
    tokenizer: str
    """A model's folder, or a tokenizer.json or .model file."""
    out: str
    """The bin's folder; an older bin there is replaced."""
    languages: list[str] = field(default_factory=lambda: list(DEFAULT_PAIR))
    """The two languages, by ISO 639-3 code."""
    language_names: list[str] = field(default_factory=list)
    """English names of languages that languages/codes.py does not have, as CODE=NAME."""
    columns: list[str] = field(default_factory=list)
    """The columns of the two sides, as CODE=COLUMN; by default a column is called as its code."""
    eng_key: str = ""
    """An older name of --columns eng=COLUMN."""
    kin_key: str = ""
    """An older name of --columns kin=COLUMN."""
    aligned: bool = False
    """The files are .txt, of the first and the second language in turn, whose lines belong
    together."""
    directions: list[str] = field(default_factory=lambda: ["both"])
    """both, or directions with weights, as in eng-kin:3 kin-eng:1 (a third of the pairs in the
    second)."""
    prompts: list[str] = field(default_factory=lambda: ["alma"])
    """Translation prompts, with weights if you like: alma, eng-put, kin-put ..., or all; drawn by
    --seed. The first is the one that `sample.py --translate` uses."""
    as_chat: bool = False
    """As a conversation, by the model's chat template or ours."""
    as_text: bool = False
    """As plain text, both sides trained, to mix into continued pretraining; the prompt gives only
    the names of the languages."""
    template: str = "model"
    """With --as-chat: model, plain, or a .jinja file."""
    template_kwargs: list[str] = field(default_factory=list)
    """With --as-chat: variables of the template, KEY=VALUE or a JSON object."""
    shots: int = bounded(0, at_least=0)
    """Solved examples before each question."""
    join: int = bounded(1, at_least=1)
    """Consecutive pairs of a file that become one example."""
    max_ratio: float = bounded(3.0, at_least=0)
    """Pairs with one side longer than the other by this factor, ten characters added to both, are
    left out; 0: none."""
    normalise: list[str] = field(default_factory=lambda: ["all"])
    """Cleaning steps: all, none, or by name."""
    max_tokens: int = bounded(0, at_least=0)
    """The row that each example must fit, as --seq-len of the run; 0: no limit."""
    too_long: Literal["stop", "drop", "cut"] = "stop"
    """What is done with longer examples; stop leaves out up to one in a hundred."""
    keep_duplicates: bool = False
    """Keep pairs that were read before."""
    seed: int = 1
    """Of the prompts, directions and solved examples."""
    processes: int = bounded(os.cpu_count() or 1, at_least=1)
    """Worker processes; they start after three seconds of work in one process."""


@dataclass
class Pairs:
    """Preference pairs to a bin: rows with prompt, chosen, rejected."""

    files: Positional[list[str]]
    """.jsonl .json .tsv .parquet; texts, or messages."""
    tokenizer: str
    """A model's folder: its tokenizer, and its chat template."""
    out: str
    """The bin's folder; an older bin there is replaced."""
    as_chat: bool = False
    """A prompt that is a text is a user's message; without this the answer follows it directly."""
    template: str = "model"
    """For messages: model, plain, or a .jinja file."""
    template_kwargs: list[str] = field(default_factory=list)
    """Variables of the template, KEY=VALUE or a JSON object, as in enable_thinking=false. A date
    that the template writes is given by date_string=2024-07-26."""
    max_tokens: int = bounded(0, at_least=0)
    """The row that both documents of a pair must fit together, as --seq-len of the run; 0: no
    limit."""
    too_long: Literal["stop", "drop", "cut"] = "stop"
    """What is done with longer pairs; stop leaves out up to one in a hundred."""
    keep_duplicates: bool = False
    """Keep pairs that were read before."""
    processes: int = bounded(os.cpu_count() or 1, at_least=1)
    """Worker processes; they start after three seconds of work in one process."""


@dataclass
class Prefer:
    """Preference pairs from what `sample.py --json --samples N` printed: best and worst."""

    files: Positional[list[str]]
    """One file of samples."""
    out: str
    """A .jsonl of prompt, chosen, rejected, for `prepare.py pairs`."""
    references: str = ""
    """A reference for each prompt; samples are scored against it by sentence chrF++."""
    text_key: str = "text"
    """The key or column of the references in .jsonl, .tsv and .parquet; other files have one per
    line."""
    votes: str = ""
    """Or a file of votes: columns prompt, best, worst, numbers from 1."""
    gap: float = bounded(5.0, at_least=0)
    """The smallest difference between best and worst, in chrF++."""


@dataclass
class Show:
    """What is in a bin: its ledger, and its first documents with trained text in colour."""

    bin: Positional[str]
    """The bin's folder."""
    tokenizer: str
    """The tokenizer it was made with."""
    n: int = bounded(3, at_least=0)
    """Documents shown."""
    ids: bool = False
    """Print the tokens of each document too: id, piece, and whether it is trained."""


@dataclass
class Vocab:
    """Learn a SentencePiece tokenizer from text files."""

    files: Positional[list[str]]
    """Files, folders or globs: .txt .jsonl .tsv .parquet, and .gz."""
    out: str
    """The tokenizer's folder."""
    size: int = 8000
    """Pieces, among them the 256 bytes."""
    documents: Literal["auto", "file", "line", "block"] = "auto"
    """What a document of a .txt is."""
    text_key: str = "text"
    """The key or column of the text in .jsonl, .tsv and .parquet."""
    language: str = DEFAULT_LANGUAGE
    """The language of the text, by ISO 639-3 code."""
    normalise: list[str] = field(default_factory=lambda: ["all"])
    """Cleaning steps: all, none, or by name."""


@dataclass
class Fertility:
    """How many tokens tokenizers need for a text: tokens per word, bytes per token."""

    files: Positional[list[str]]
    """Files, folders or globs: .txt .jsonl .tsv .parquet, and .gz."""
    tokenizers: list[str]
    """Model folders, or tokenizer.json or .model files."""
    documents: Literal["auto", "file", "line", "block"] = "auto"
    """What a document of a .txt is."""
    text_key: str = "text"
    """The key or column of the text in .jsonl, .tsv and .parquet."""


def text(s: Text, workers: Workers | None = None) -> None:
    if s.max_doc_mb < 1:
        raise UserError(f"--max-doc-mb {s.max_doc_mb}: expected 1 or more", FLAGS)
    bin, ledger = prepare_text(
        s.files, s.tokenizer, s.out, unit=s.documents, key=s.text_key,
        normalise=build_normaliser(s.normalise, [language_of(s.language)]),
        keep_duplicates=s.keep_duplicates,
        is_contaminated=index_files(s.without) if s.without else None,
        min_chars=s.min_chars, max_doc_mb=s.max_doc_mb, on_bad=s.on_bad,
        workers=workers or Workers(s.processes))
    print(format_ledger(ledger.to_json()))
    print(f"{bin.folder}: {len(bin):,} documents, {bin.meta['tokens']:,} tokens, "
          f"{bin.meta['bytes'] / max(1, bin.meta['tokens']):.2f} bytes per token")


def chat(s: Chat, workers: Workers | None = None) -> None:
    normalise = build_normaliser(s.normalise, [language_of(s.language)], omitted=("spaces",))
    bin, ledger = prepare_conversations(
        s.files, s.tokenizer, s.out, template=s.template,
        template_kwargs=read_template_kwargs(s.template_kwargs), loss_on=s.loss_on,
        normalise=normalise, limit=LengthLimit(s.max_tokens, s.too_long),
        keep_duplicates=s.keep_duplicates,
        workers=workers or Workers(s.processes))
    print_examples(bin, ledger)


def mt(s: Mt, workers: Workers | None = None) -> None:
    if s.as_chat and s.as_text:
        raise UserError("prepare.py mt: give one of --as-chat and --as-text", FLAGS)
    if s.as_text and (s.shots or s.max_tokens or s.too_long != "stop"):
        raise UserError("prepare.py mt: --as-text goes without --shots, --max-tokens and "
                        "--too-long: no example stands before a text, and a row may cut it", FLAGS)
    if s.template_kwargs and not s.as_chat:
        raise UserError("--template-kwargs: give --as-chat with it", FLAGS)
    if s.template != "model" and not s.as_chat:
        raise UserError(f"--template {s.template}: give --as-chat with it", FLAGS)
    if len(set(s.languages)) != 2 or len(s.languages) != 2:
        raise UserError(f"--languages {' '.join(s.languages)}: expected two codes, as in "
                        f"{' '.join(DEFAULT_PAIR)}", FLAGS)
    names = read_names(s.language_names)
    first, second = (language_of(code, names) for code in s.languages)
    bin, ledger, directions = prepare_translation(
        s.files, s.tokenizer, s.out, languages=(first, second),
        prompts=read_prompts(s.prompts, translation_prompts(s.languages, names)),
        columns=read_columns(s), aligned=s.aligned, directions=s.directions, as_chat=s.as_chat,
        as_text=s.as_text, template=s.template,
        template_kwargs=read_template_kwargs(s.template_kwargs), shots=s.shots, join=s.join,
        max_ratio=s.max_ratio, normalise=build_normaliser(s.normalise, [first, second]),
        limit=LengthLimit(s.max_tokens, s.too_long), keep_duplicates=s.keep_duplicates, seed=s.seed,
        workers=workers or Workers(s.processes))
    print_examples(bin, ledger)
    if directions:
        print(", ".join(f"{name} {n:,} documents" for name, n in directions.items()))


def read_columns(s: Mt) -> dict[str, str]:
    """The columns of the languages by code: --columns, and the older --eng-key and --kin-key."""
    columns = {code: column for code, column in (("eng", s.eng_key), ("kin", s.kin_key)) if column}
    for word in s.columns:
        code, _, column = word.partition("=")
        if code not in s.languages or not column:
            raise UserError(f"--columns {word}: expected CODE=COLUMN with a code of --languages, "
                            f"{' or '.join(s.languages)}", FLAGS)
        columns[code] = column
    return columns


def read_prompts(words: list[str],
                 known: dict[str, tuple[str, dict[str, str]]]) -> list[tuple[Prompt, float]]:
    """The prompts that --prompts names, NAME[:WEIGHT], or all of them; with weights."""
    if words == ["all"]:
        words = list(known)
    prompts = []
    for word in words:
        name, weight = read_weighted_name(
            word, known, f"--prompts {word}: expected all, or names with weights if you like, "
            f"of {', '.join(known)}")
        prompts.append((Prompt(name, *known[name]), weight))
    return prompts


def pairs(s: Pairs, workers: Workers | None = None) -> None:
    bin, ledger = prepare_preferences(
        s.files, s.tokenizer, s.out, as_chat=s.as_chat, template=s.template,
        template_kwargs=read_template_kwargs(s.template_kwargs),
        limit=LengthLimit(s.max_tokens, s.too_long), keep_duplicates=s.keep_duplicates,
        workers=workers or Workers(s.processes))
    print_examples(bin, ledger)


def print_examples(bin: Bin, ledger: Ledger) -> None:
    print(format_ledger(ledger.to_json(), "rows"))
    print(f"{bin.folder}: {len(bin):,} documents, {bin.meta['tokens']:,} tokens, "
          f"{bin.meta['trained']:,} of them trained")


def prefer(s: Prefer) -> None:
    if bool(s.references) == bool(s.votes) or len(s.files) != 1:
        raise UserError("prepare.py prefer: one file of samples, and one of --references FILE and "
                        "--votes FILE", FLAGS)
    try_output_file(s.out)
    samples = read_samples(Path(s.files[0]))
    if s.votes:
        preferences = list(pairs_of_votes(samples, Path(s.votes)))
    else:
        from evaluation.metrics import sentence_scores

        def score(answer: str, reference: str) -> float:
            return sentence_scores([answer], [reference])[0]

        references = read_references(Path(s.references), s.text_key)
        preferences = list(best_and_worst(samples, references, score, s.gap))
    lines = [json.dumps(x, ensure_ascii=False) + "\n" for x in preferences]
    file = real_path(s.out)
    with refused_as_output(s.out):
        if file.exists() and not file.is_file():  # a device or a FIFO
            file.write_text("".join(lines), encoding="utf-8")
        else:
            write_text(file, "".join(lines))
    print(f"{s.out}: {len(preferences):,} pairs from {len(samples):,} prompts")


def read_references(path: Path, key: str) -> list[str]:
    """A reference translation for each prompt."""
    references = []
    for number, document in enumerate(read_documents(path, "line", key), 1):
        if document.fault:
            raise UserError(f"--references {path}, line {number}: {document.fault}; correct it")
        references.append(document.text)
    return references


def show(s: Show) -> None:
    bin, tokenizer = Bin(s.bin), Tokenizer.open(s.tokenizer)
    bin.check(tokenizer.fingerprint, tokenizer.vocab_size)
    print(f"{s.bin}: {bin.meta['kind']}, {len(bin):,} documents, {bin.meta['tokens']:,} tokens, "
          f"{bin.meta['trained']:,} of them trained, {bin.meta['bytes']:,} bytes")
    print(format_ledger(bin.meta["ledger"],
                        "documents" if bin.meta["kind"] == "text" else "rows"))
    for i in range(min(s.n, len(bin))):
        print(f"\n-- document {i}")
        ids, trained = bin.document(i).tolist(), bin.trained(i)
        for span, is_trained in text_spans(tokenizer, ids, trained):
            print(console.coloured(span, is_trained), end="")
        print()
        if s.ids:
            for j, token in enumerate(ids):
                mark = "trained" if j and trained[j] else ""
                print(console.printable(f"{token:>8}  {mark:8}{tokenizer.piece(token)!r}"))


def vocab(s: Vocab) -> None:
    normalise = build_normaliser(s.normalise, [language_of(s.language)])
    out = try_output_folder(s.out, ("tokenizer.model", "tokenizer_config.json"))
    ledger, paths = Ledger(), list_files(s.files)

    def lines() -> Iterator[str]:
        for path in paths:
            for document in read_documents(path, s.documents, s.text_key):
                content = document.text
                if normalise:
                    content, changes = normalise(content)
                    ledger.changes.update(changes)
                outcome = "kept" if content.strip() else "empty"
                ledger.add([document.fault or outcome], [document.n_bytes])
                yield from filter(None, content.split("\n"))
        ledger.check_undecodable(s.files, "correct them")

    tokenizer = learn(lines(), s.size, out)
    print(format_ledger(ledger.to_json()))
    print(f"{s.out}: {tokenizer.vocab_size:,} pieces, fingerprint {tokenizer.fingerprint[:12]}")


def fertility(s: Fertility) -> None:
    print(f"{'file':32}{'tokenizer':24}{'tokens/word':>12}{'bytes/token':>12}")
    for file in list_files(s.files):
        texts = read_texts(file, s.documents, s.text_key)
        n_words = sum(len(x.split()) for x in texts)
        n_bytes = sum(len(x.encode()) for x in texts)
        for name in s.tokenizers:
            n_tokens = sum(map(len, Tokenizer.open(name).encode_batch(texts)))
            print(f"{file.name:32}{Path(name).name:24}{n_tokens / n_words:>12.2f}"
                  f"{n_bytes / n_tokens:>12.2f}")


COMMANDS = {"text": (Text, text), "chat": (Chat, chat), "mt": (Mt, mt), "pairs": (Pairs, pairs),
            "prefer": (Prefer, prefer), "show": (Show, show), "vocab": (Vocab, vocab),
            "fertility": (Fertility, fertility)}


def main() -> None:
    classes = {name: command[0] for name, command in COMMANDS.items()}
    name, settings = flags.read_subcommand(
        classes, sys.argv[1:], "prepare.py", (__doc__ or "").strip())
    if hasattr(settings, "files") and not settings.files:
        raise UserError(f"prepare.py {name}: name at least one file", FLAGS)
    COMMANDS[name][1](settings)


if __name__ == "__main__":
    console.run(main)
