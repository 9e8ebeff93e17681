"""Text, conversations and pairs to token bins, and looking at them.

    python prepare.py text kin/*.txt --tokenizer MODEL --out bins/kin
    python prepare.py chat chats.jsonl --tokenizer MODEL --out bins/chat
    python prepare.py mt pairs.tsv --tokenizer MODEL --out bins/mt
    python prepare.py pairs preferences.jsonl --tokenizer MODEL --out bins/pairs
    python prepare.py show bins/mt --tokenizer MODEL
    python prepare.py vocab kin/*.txt eng/*.txt --size 8000 --out tok
    python prepare.py fertility val.txt --tokenizers tok MODEL
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Literal

from tyro.conf import Positional

from data import Bin
from languages.kinyarwanda import normalise, prompts
from preparation import contamination as overlap
from preparation import conversations as examples
from preparation import text as corpus
from preparation import translation as pairs
from runtime import console as log
from runtime import flags as config
from runtime.console import FLAGS, STORAGE, UserError
from tokenization.chat_template import Template
from tokenization.tokenizer import Tokenizer, learn


@dataclass
class Text:
    """Text files to a bin: clean, drop duplicates, encode; every byte read is accounted for."""

    files: Positional[list[str]]
    """Files, folders or globs: .txt .jsonl .tsv .parquet, and .gz."""
    tokenizer: str
    """A model's folder, or a tokenizer.json or .model file."""
    out: str
    """The bin's folder; an older bin there is replaced."""
    documents: Literal["auto", "file", "line", "block"] = "auto"
    """What a document of a .txt is."""
    text_key: str = "text"
    """Where the text is in .jsonl, .tsv and .parquet."""
    normalise: list[str] = field(default_factory=lambda: list(normalise.STEPS))
    """Steps of cleaning, or none."""
    keep_duplicates: bool = False
    """Keep documents whose text was seen before."""
    without: list[str] = field(default_factory=list)
    """Test files: what holds a whole line or cell of theirs, or 13 words in a row, is left out."""
    min_chars: int = 1
    """Shorter documents are left out."""
    max_doc_mb: int = 64
    """Longer ones are left out, or where a document is a file or block refused."""
    on_bad: Literal["stop", "skip"] = "stop"
    """What more than 0.1 % undecodable documents do."""
    processes: int = os.cpu_count() or 1
    """Workers, begun when a few seconds of work have not been enough."""


@dataclass
class Chat:
    """Conversations to a bin: ids and loss mask together; messages, ShareGPT and Alpaca forms."""

    files: Positional[list[str]]
    """Files, folders or globs: .jsonl .json .tsv .parquet, and .gz."""
    tokenizer: str
    """A model's folder: its tokenizer, and its chat template."""
    out: str
    template: str = "model"
    """model: the model's own, or ours where it has none; plain: ours; or a .jinja file."""
    loss_on: Literal["assistant", "all"] = "assistant"
    """What is trained: the assistant's words and what ends them, or every token."""
    normalise: list[str] = field(default_factory=lambda: ["nfc", "apostrophe"])
    """Steps of cleaning, or none. `spaces` would take the indents out of code."""
    max_tokens: int = 0
    """The row that each must fit, as --seq-len of the run; 0: any."""
    too_long: Literal["stop", "drop", "cut"] = "stop"
    """What is done with longer ones; stop leaves out up to one in a hundred."""
    keep_duplicates: bool = False
    processes: int = os.cpu_count() or 1
    """Workers, begun when a few seconds of work have not been enough."""


@dataclass
class Mt:
    """Translation pairs to a bin: both directions of every pair, asked as ALMA does."""

    files: Positional[list[str]]
    """Files, folders or globs: .tsv .jsonl .json .parquet; with --aligned two .txt; and .gz."""
    tokenizer: str
    out: str
    aligned: bool = False
    """The files are .txt, English and Kinyarwanda in turn, whose lines belong together."""
    eng_key: str = "eng"
    """The column of the English side."""
    kin_key: str = "kin"
    directions: list[str] = field(default_factory=lambda: ["both"])
    """both, or eng-kin and kin-eng with weights, as in eng-kin:3 kin-eng:1 (a third of the pairs
    in the second)."""
    prompts: list[str] = field(default_factory=lambda: ["alma"])
    """How a translation is asked for, with weights if you like: alma, eng-put, kin-put ..., all;
    drawn by --seed. The first is what `sample.py --translate` asks with."""
    as_chat: bool = False
    """As a conversation, by the model's chat template or ours."""
    as_text: bool = False
    """As plain text, both sides trained, to join continued pretraining; of --prompts it takes the
    languages' names."""
    template: str = "model"
    """With --as-chat: model, plain, or a .jinja file."""
    shots: int = 0
    """Solved examples before the one that is asked."""
    join: int = 1
    """Consecutive pairs of a file that become one example."""
    max_ratio: float = 3.0
    """Pairs of which one side is longer by more than this, both plus ten characters, are left out;
    0: none."""
    normalise: list[str] = field(default_factory=lambda: list(normalise.STEPS))
    max_tokens: int = 0
    """The row that each must fit, as --seq-len of the run; 0: any."""
    too_long: Literal["stop", "drop", "cut"] = "stop"
    keep_duplicates: bool = False
    seed: int = 1
    processes: int = os.cpu_count() or 1
    """Workers, begun when a few seconds of work have not been enough."""


@dataclass
class Pairs:
    """Preference pairs to a bin: rows with prompt, chosen, rejected."""

    files: Positional[list[str]]
    """.jsonl .json .tsv .parquet; texts, or messages."""
    tokenizer: str
    out: str
    as_chat: bool = False
    """A prompt that is a text is what a user says; without it the answer follows it directly."""
    template: str = "model"
    """For messages: model, plain, or a .jinja file."""
    max_tokens: int = 0
    """The row that both documents of a pair must fit together, as --seq-len of the run; 0: any."""
    too_long: Literal["stop", "drop", "cut"] = "stop"
    keep_duplicates: bool = False
    processes: int = os.cpu_count() or 1
    """Workers, begun when a few seconds of work have not been enough."""


@dataclass
class Prefer:
    """Preference pairs from what `sample.py --json --samples N` printed: best and worst."""

    files: Positional[list[str]]
    """One file of samples."""
    out: str
    """A .jsonl of prompt, chosen, rejected, for `prepare.py pairs`."""
    references: str = ""
    """A line for each prompt; samples are scored against it by sentence chrF++."""
    text_key: str = "text"
    """Where the references are in .jsonl, .tsv and .parquet; other files have one a line."""
    votes: str = ""
    """Or a file of people's votes: columns prompt, best, worst, numbers from 1."""
    gap: float = 5.0
    """The least difference between best and worst, in chrF++."""


@dataclass
class Show:
    """What is in a bin: its ledger, and its first documents with trained tokens in colour."""

    bin: Positional[str]
    tokenizer: str
    """The tokenizer it was made with."""
    n: int = 3
    """Documents shown."""


@dataclass
class Vocab:
    """Learn a SentencePiece tokenizer from text files."""

    files: Positional[list[str]]
    out: str
    size: int = 8000
    """Pieces, the 256 bytes among them."""
    documents: Literal["auto", "file", "line", "block"] = "auto"
    text_key: str = "text"
    normalise: list[str] = field(default_factory=lambda: list(normalise.STEPS))


@dataclass
class Fertility:
    """How many tokens tokenizers need for a text: tokens per word, bytes per token."""

    files: Positional[list[str]]
    tokenizers: list[str]
    documents: Literal["auto", "file", "line", "block"] = "auto"
    text_key: str = "text"


def text(s: Text) -> None:
    if s.max_doc_mb < 1:
        raise UserError(f"--max-doc-mb {s.max_doc_mb}: expected 1 or more", FLAGS)
    bin, ledger = corpus.prepare(
        s.files, Path(s.tokenizer), Path(s.out), unit=s.documents, key=s.text_key,
        normalise=cleaning(s.normalise), keep_duplicates=s.keep_duplicates,
        contaminated=overlap.signs(s.without) if s.without else None, min_chars=s.min_chars,
        max_doc_mb=s.max_doc_mb, on_bad=s.on_bad, processes=s.processes)
    ledger_lines(ledger.to_json())
    print(f"{bin.folder}: {len(bin):,} documents, {bin.meta['tokens']:,} tokens, "
          f"{bin.meta['bytes'] / max(1, bin.meta['tokens']):.2f} bytes per token")


def ledger_lines(ledger: dict, unit: str = "documents") -> None:
    """The ledger as a table: what was read, and where it went."""
    print(f"{'':14}{unit:>12}{'bytes':>16}")
    for what, n in ledger["documents"].items():
        print(f"{what:14}{n:>12,}{ledger['bytes'][what]:>16,}")
    for step, n in ledger["changes"].items():
        print(f"normalised: {step}, {n:,} places")


def chat(s: Chat) -> None:
    tokenizer = Tokenizer.open(s.tokenizer)
    template = template_of(s.template, Path(s.tokenizer), tokenizer)
    paths = corpus.files(s.files, examples.KINDS)
    job = examples.Conversations(template, s.loss_on, cleaning(s.normalise))
    done(*examples.write(
        examples.conversations(paths), job, Path(s.out), tokenizer, "chat", paths,
        {"chat": template.source}, s.max_tokens, s.too_long, s.keep_duplicates, s.processes))


def mt(s: Mt) -> None:
    if s.as_chat and s.as_text:
        raise UserError("prepare.py mt: give one of --as-chat and --as-text", FLAGS)
    if s.as_text and (s.shots or s.max_tokens or s.too_long != "stop"):
        raise UserError("prepare.py mt: --as-text goes without --shots, --max-tokens and "
                        "--too-long: no example stands before a text, and a row may cut it", FLAGS)
    if s.template != "model" and not s.as_chat:
        raise UserError(f"--template {s.template}: give --as-chat with it", FLAGS)
    tokenizer = Tokenizer.open(s.tokenizer)
    template = template_of(s.template, Path(s.tokenizer), tokenizer) if s.as_chat else None
    chosen = prompts_of(s.prompts)
    paths = corpus.files(s.files, (".txt",) if s.aligned else examples.KINDS)
    if s.aligned and len(paths) % 2:
        raise UserError("--aligned: an odd number of files; name an English one and its "
                        "Kinyarwanda one in turn", FLAGS)
    keys = (s.eng_key, s.kin_key)
    files = zip(paths[::2], paths[1::2], strict=True) if s.aligned else zip(paths)
    found = (row for file in files for row in in_place(
        examples.aligned(*file, keys) if s.aligned else examples.rows(*file), keys))
    job = pairs.Translations(
        tokenizer, chosen, pairs.read_directions(s.directions), cleaning(s.normalise), s.max_ratio,
        max(0, s.shots), s.as_text, template, s.seed)
    prompt = {"translate": [{**p.to_json(), "as_chat": s.as_chat} for p, _ in chosen]} | (
        {"chat": template.source} if template else {})
    done(*examples.write(
        pairs.joined(found, keys, max(1, s.join)), job, Path(s.out), tokenizer,
        "text" if s.as_text else "mt", paths, {} if s.as_text else prompt, s.max_tokens,
        s.too_long, s.keep_duplicates, s.processes))


def prefer(s: Prefer) -> None:
    if bool(s.references) == bool(s.votes) or len(s.files) != 1:
        raise UserError("prepare.py prefer: one file of samples, and one of --references FILE and "
                        "--votes FILE", FLAGS)
    found = pairs.candidates(Path(s.files[0]))
    if s.votes:
        made = list(pairs.by_votes(found, Path(s.votes)))
    else:
        from evaluation.metrics import sentence_scores

        def score(text: str, reference: str) -> float:
            return sentence_scores([text], [reference])[0]

        read = list(corpus.read(Path(s.references), "line", s.text_key))
        for n, x in enumerate(read, 1):
            if x.fault:
                raise UserError(f"--references {s.references}, line {n}: {x.fault}; mend it")
        references = [x.text for x in read]
        made = list(pairs.best_and_worst(found, references, score, s.gap))
    lines = [json.dumps(x, ensure_ascii=False) + "\n" for x in made]
    try:
        Path(s.out).write_text("".join(lines), encoding="utf-8")
    except OSError as e:
        raise UserError(f"--out {s.out}: cannot be written ({e.strerror}); name another",
                        STORAGE) from None
    print(f"{s.out}: {len(made):,} pairs from {len(found):,} prompts")


def preferences(s: Pairs) -> None:
    tokenizer = Tokenizer.open(s.tokenizer)
    template = template_of(s.template, Path(s.tokenizer), tokenizer)
    paths = corpus.files(s.files, examples.KINDS)
    found = (row for path in paths for row in examples.rows(path))
    done(*examples.write(
        found, pairs.Preferences(tokenizer, template, s.as_chat), Path(s.out), tokenizer, "pairs",
        paths, {}, s.max_tokens, s.too_long, s.keep_duplicates, s.processes))


def template_of(word: str, folder: Path, tokenizer: Tokenizer) -> Template:
    """The chat template that a flag names: the model's, or ours; ours; or a file's."""
    own = Template.of(folder, tokenizer) if word == "model" and folder.is_dir() else None
    if own is None and word in ("model", "plain"):
        return Template.plain(tokenizer)
    if own is None:
        try:
            source = Path(word).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as e:
            raise UserError(f"--template {word}: cannot be read ({e}); expected model, plain, or a "
                            ".jinja file", FLAGS) from None
        return dataclasses.replace(Template.plain(tokenizer), where=Path(word), source=source)
    return own


def prompts_of(words: list[str]) -> list[tuple[pairs.Prompt, float]]:
    """Prompts by name, NAME[:WEIGHT], or all of them."""
    found = []
    for word in prompts.PROMPTS if words == ["all"] else words:
        name, _, weight = word.partition(":")
        try:
            share = float(weight or 1)
        except ValueError:
            share = 0.0
        if name not in prompts.PROMPTS or not 0 < share < float("inf"):
            raise UserError(f"--prompts {word}: expected all, or names with weights if you like, "
                            f"of {', '.join(prompts.PROMPTS)}", FLAGS)
        found.append((pairs.Prompt(name, *prompts.PROMPTS[name]), share))
    return found


def in_place(found: Iterator[examples.Row], keys: tuple[str, str]) -> Iterator[examples.Row]:
    """A file's rows; says so where its English side reads as Kinyarwanda and the other as English.
    """
    head, fault = [], None
    try:
        head.extend(islice(found, 1000))
    except UserError as e:  # rows before it may have faults of another kind, which come first
        fault = e
    sides = ([x for row in head if isinstance(x := row.cells.get(key), str)] for key in keys)
    eng, kin = map(prompts.share, sides)
    if eng[0] > eng[1] and kin[1] > kin[0]:
        log.say(f"{head[0].where}: from here on the languages look swapped: {keys[0]!r} has "
                f"{eng[0]:.0%} frequent Kinyarwanda words and {eng[1]:.0%} English ones, "
                f"{keys[1]!r} {kin[0]:.0%} and {kin[1]:.0%}; see --eng-key and --kin-key")
    yield from head
    if fault:
        raise fault
    yield from found


def cleaning(steps: list[str]) -> corpus.Normaliser | None:
    """The steps of cleaning that a flag names."""
    return None if steps == ["none"] else normalise.normaliser(steps)


def done(bin: Bin, ledger: corpus.Ledger, kinds: Counter[str]) -> None:
    """What became of the rows, and what the bin holds."""
    ledger_lines(ledger.to_json(), "rows")
    print(f"{bin.folder}: {len(bin):,} documents, {bin.meta['tokens']:,} tokens, "
          f"{bin.meta['trained']:,} of them trained")
    if kinds:
        print(", ".join(f"{name} {n:,} documents" for name, n in kinds.items()))


def show(s: Show) -> None:
    bin, tokenizer = Bin(s.bin), Tokenizer.open(s.tokenizer)
    bin.check(tokenizer.fingerprint, tokenizer.vocab_size)
    print(f"{s.bin}: {bin.meta['kind']}, {len(bin):,} documents, {bin.meta['tokens']:,} tokens, "
          f"{bin.meta['trained']:,} of them trained, {bin.meta['bytes']:,} bytes")
    ledger_lines(bin.meta["ledger"], "documents" if bin.meta["kind"] == "text" else "rows")
    for i in range(min(s.n, len(bin))):
        print(f"\n-- document {i}")
        for j, (token, trained) in enumerate(
                zip(bin.document(i).tolist(), bin.trained(i), strict=True)):
            print(log.coloured(tokenizer.piece(token), j > 0 and trained), end="")
        print()


def vocab(s: Vocab) -> None:
    clean = normalise.normaliser([] if s.normalise == ["none"] else s.normalise)
    ledger, paths = corpus.Ledger(), corpus.files(s.files)

    def lines() -> Iterator[str]:
        for path in paths:
            for piece in corpus.read(path, s.documents, s.text_key):
                text, changes = clean(piece.text)
                ledger.add([piece.fault or ("kept" if text.strip() else "empty")], [piece.size])
                ledger.changes.update(changes)
                yield from filter(None, text.split("\n"))
        ledger.check(s.files, "mend them")

    tokenizer = learn(lines(), s.size, Path(s.out))
    ledger_lines(ledger.to_json())
    print(f"{s.out}: {tokenizer.vocab_size:,} pieces, fingerprint {tokenizer.fingerprint[:12]}")


def fertility(s: Fertility) -> None:
    print(f"{'file':32}{'tokenizer':24}{'tokens/word':>12}{'bytes/token':>12}")
    for file in corpus.files(s.files):
        texts = corpus.texts(file, s.documents, s.text_key)
        words, n_bytes = sum(len(t.split()) for t in texts), sum(len(t.encode()) for t in texts)
        for name in s.tokenizers:
            tokens = sum(map(len, Tokenizer.open(name).encode_batch(texts)))
            print(f"{file.name:32}{Path(name).name:24}{tokens / words:>12.2f}"
                  f"{n_bytes / tokens:>12.2f}")


COMMANDS = {"text": (Text, text), "chat": (Chat, chat), "mt": (Mt, mt),
            "pairs": (Pairs, preferences), "prefer": (Prefer, prefer), "show": (Show, show),
            "vocab": (Vocab, vocab), "fertility": (Fertility, fertility)}


def main() -> None:
    name, settings = config.pick({k: v[0] for k, v in COMMANDS.items()}, sys.argv[1:], "prepare.py",
                                 (__doc__ or "").strip())
    if hasattr(settings, "files") and not settings.files:
        raise UserError(f"prepare.py {name}: name at least one file", FLAGS)
    COMMANDS[name][1](settings)


if __name__ == "__main__":
    log.run(main)
