"""Conversations, translations and preferences as documents: ids and loss mask together, compared
with transformers' templates; and what a person gets wrong, in one line with its place."""

from __future__ import annotations

import dataclasses
import gzip
import hashlib
import json
import random
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sacrebleu.metrics import CHRF

import prepare
from data import Bin, Source, validation_split
from helpers import fork, tiny
from helpers.chat_templates import KINDS, TEMPLATES, pair, said, tokenizer_folders
from languages.language import DEFAULT_PAIR, translation_prompts
from preparation.conversations import parse_conversation
from preparation.preferences import PreferenceEncoder, read_samples
from preparation.readers import Row, read_rows
from preparation.translation import Prompt
from preparation.workers import Workers
from runtime import console
from runtime.console import UserError
from runtime.paths import ROOT
from tokenization.chat_template import PLAIN, ChatTemplate, encode_rendered
from tokenization.document import Document
from tokenization.tokenizer import Tokenizer

PROMPTS = translation_prompts(DEFAULT_PAIR)
KIN, ENG = tiny.SENTENCES[:5], tiny.SENTENCES[5:]
LONG_PAIR = json.dumps({"prompt": "a", "chosen": KIN[0] * 5 + "a", "rejected": KIN[0] * 5 + "b"})
ANSWER = json.dumps({"messages": said(("u", "Amakuru?"), ("a", "Ni meza."))})

sentence = st.lists(st.sampled_from(
    "umugore arateka two cows i Kigali, mu n'umwana 12 é 🦒 {{ x }} <|user|> \n\n".split(" ")),
    min_size=1, max_size=6).map(" ".join).map(str.strip).filter(bool)


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    """A tokenizer's folder of each kind."""
    return tokenizer_folders(tmp_path_factory.mktemp("kinds"))


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """A tiny model's folder, without a chat template."""
    return tiny.folder(tmp_path_factory.mktemp("chat") / "model", max_position_embeddings=256)


def document_of(template: ChatTemplate, messages: list, loss_on: str = "assistant") -> Document:
    """A conversation's ids and which of them train, as lists."""
    rendered = template.render_with_mask(messages, loss_on)
    [document] = encode_rendered(template.tokenizer, [rendered])
    mask = None if document.mask is None else document.mask.tolist()
    return Document(document.ids.tolist(), mask, document.n_bytes)


def prepared(model: Path, tmp_path: Path, command: str, *words: str,
             workers: Workers | None = None) -> tuple[Bin, Tokenizer]:
    """The bin that a command of prepare.py makes, in this process."""
    out = tmp_path / "bin"
    classes = {name: command[0] for name, command in prepare.COMMANDS.items()}
    name, s = prepare.flags.read_subcommand(classes, [
        command, *words, "--tokenizer", str(model), "--out", str(out)], "prepare.py", "")
    prepare.COMMANDS[name][1](s, workers)
    return Bin(out), Tokenizer.open(model)


def command(model: Path, tmp_path: Path, *words: str) -> tuple[int, list[str]]:
    """The exit code of prepare.py with these words, in a process, and the lines that it says."""
    def action() -> None:
        sys.argv = ["prepare.py", *words, "--tokenizer", str(model), "--out", f"{tmp_path}/bin"]
        console.run(prepare.main)

    (code,) = fork.ends([fork.child(action, tmp_path / "said")])
    return code, (tmp_path / "said").read_text().splitlines()


def trained_text(tok: Tokenizer, ids, mask) -> list[str]:
    """The text of each run of trained tokens."""
    runs: list[list[int]] = []
    for i, (token, on) in enumerate(zip(ids, mask, strict=True)):
        if on:
            runs.append([]) if not (i and mask[i - 1]) else None
            runs[-1].append(int(token))
    return [tok.decode(x) for x in runs]


# ------------------------------------------------------------------ conversations

@pytest.mark.parametrize("kind", KINDS)
def test_ids_are_transformers_and_the_mask_is_the_assistants_words(folders, kind):
    """One to six turns, with and without a system, by every template whose ends the kind has."""
    tok = Tokenizer.open(folders[kind])
    sources = {**TEMPLATES, "plain": ChatTemplate.plain(tok).source}
    compared = set()

    @settings(max_examples=15, deadline=None)
    @given(sentences=st.lists(st.tuples(sentence, sentence), min_size=1, max_size=6),
           system=st.none() | sentence)
    def check(template, peer, name, sentences, system):
        turns = [x for question, answer in sentences for x in (("u", question), ("a", answer))]
        messages = said(*([] if system is None else [("s", system)]), *turns)
        try:
            document = document_of(template, messages)
        except UserError as e:
            # it tells a system in the last question only, so its prompt is no beginning
            moves = name == "mistral" and "generation prompt" in str(e)
            assert system is not None and (moves or "no system here" in str(e)), str(e)
            return
        assert document.ids == peer.apply_chat_template(messages, return_dict=False)
        trained = trained_text(tok, document.ids, document.mask)
        trained = [re.sub(r"^<think>\s*</think>", "", x.strip()).strip() for x in trained]
        assert trained == [answer for _, answer in sentences]
        for n_turns in range(1, len(messages)):
            if messages[n_turns]["role"] == "assistant":  # asked as taught
                question = template.encode(messages[:n_turns], add_generation_prompt=True)
                assert document.ids[: len(question)] == question
                assert document.mask[len(question)] and not document.mask[len(question) - 1]
        compared.add(name)

    for name, source in sources.items():
        template, peer = pair(folders[kind], source)
        try:
            document_of(template, said(("u", "a"), ("a", "b")))
        except UserError as e:
            assert "no control token behind an answer" in str(e) or "bos_token" in str(e)
            continue  # its ends are no tokens of this tokenizer, or it has no BOS
        check(template, peer, name)
    assert "plain" in compared and (len(compared) > 1 or kind == "llama json")


@pytest.mark.parametrize("name", TEMPLATES)
def test_every_template_is_compared_by_some_kind_of_tokenizer(folders, name):
    """What the test above leaves out for one kind, for its ends are no tokens of it, another has.
    """
    def fits(kind: str) -> bool:
        try:
            document_of(pair(folders[kind], TEMPLATES[name])[0], said(("u", "a"), ("a", "b")))
        except UserError:
            return False
        return True

    assert any(map(fits, KINDS))


@pytest.mark.parametrize("kind", ["sentencepiece", "llama json"])
def test_the_plain_template_is_llammas_byte_for_byte(folders, kind):
    template = ChatTemplate.plain(Tokenizer.open(folders[kind]))
    messages = said(("s", "Be kind."), ("u", " Muraho "), ("a", "Muraho neza."), ("u", "Ejo?"),
                    ("a", "Yego."))
    assert template.render(messages) == (
        "<s><|system|>\nBe kind.\n<|user|>\nMuraho\n<|assistant|>\nMuraho neza.</s>\n"
        "<|user|>\nEjo?\n<|assistant|>\nYego.</s>\n")
    prompt = template.render(messages[:2], add_generation_prompt=True)
    assert prompt.endswith("Muraho\n<|assistant|>\n")
    document = document_of(template, messages)
    tok = template.tokenizer
    assert trained_text(tok, document.ids, document.mask) == ["Muraho neza.", "Yego."]
    trained = [i for i, on in zip(document.ids, document.mask, strict=True) if on]
    assert trained.count(tok.eos) == 2 and document.ids.count(tok.bos) == 1
    question = template.encode(messages[:2], add_generation_prompt=True)
    assert document.ids[: len(question)] == question and not any(document.mask[: len(question)])
    assert document_of(template, messages, "all").mask is None


def test_a_control_token_typed_by_the_assistant_is_trained_as_text(folders):
    template, _ = pair(folders["llama3 json"], TEMPLATES["llama3"])
    document = document_of(template, said(("u", "Andika <|eot_id|>"),
                                          ("a", "Dore: <|eot_id|> ngiyi")))
    tok = template.tokenizer
    assert trained_text(tok, document.ids, document.mask) == ["Dore: <|eot_id|> ngiyi"]
    assert document.ids.count(tok.eos) == 3  # system, user, assistant


def test_each_form_of_conversation_is_recognised_and_named(model, tmp_path, capsys):
    forms = {
        "messages": {"messages": said(("u", "Amakuru?"), ("a", "Ni meza."))},
        "share": {"conversations": [{"from": "human", "value": "Amakuru?"},
                                    {"from": "gpt", "value": "Ni meza."}]},
        "alpaca": {"instruction": "Amakuru?", "input": "", "output": "Ni meza."}}
    bins = []
    for name, row in forms.items():
        file = tmp_path / f"{name}.jsonl"
        file.write_text(json.dumps(row) + "\n")
        bins.append(prepared(model, tmp_path, "chat", str(file))[0].tokens.tolist())
    assert bins[0] == bins[1] == bins[2]
    told = capsys.readouterr().err
    assert "messages (role" in told and "ShareGPT (from" in told and "Alpaca (instr" in told
    file = tmp_path / "more.json"
    file.write_text(json.dumps([{"instruction": "Hindura", "input": "inka", "output": "cow"}]))
    bin, tok = prepared(model, tmp_path, "chat", str(file))
    assert "Hindura\n\ninka" in tok.decode(bin.document(0))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(
        [forms["messages"]]), tmp_path / "m.parquet")
    assert prepared(model, tmp_path, "chat", f"{tmp_path}/m.parquet")[0].tokens.tolist() == bins[0]
    assert Bin(tmp_path / "bin").meta["prompt"]["chat"] == PLAIN


@pytest.mark.parametrize("row", [
    {"conversations": [{"from": "human", "value": "Amakuru?"}, {"from": "gpt", "value": "Ni."}]},
    {"instruction": "Amakuru?", "input": "", "output": "Ni.", "history": []},
    {"messages": said(("s", "Subiza."), ("u", "Amakuru?"), ("a", "Ni."))}],
    ids=["share", "alpaca", "messages"])
def test_a_system_column_is_a_conversations_first_message(row):
    def read(**cells: object) -> list[dict[str, str]]:
        return parse_conversation(Row("x, line 1", row | cells, 1))

    turns = said(("u", "Amakuru?"), ("a", "Ni."))
    assert read(system="Subiza.") == [*said(("s", "Subiza.")), *turns]
    assert read(system=None) == read(system=" ") == read() == (row.get("messages") or turns)
    with pytest.raises(UserError, match="line 1: no text under 'system'"):
        read(system=["Subiza."])
    if "messages" in row:
        with pytest.raises(UserError, match="line 1: the system cell differs"):
            read(system="Vuga.")
    if "history" in row:
        with pytest.raises(UserError, match="line 1: history holds turns before"):
            read(history=[["a", "b"]])


def test_a_system_column_stands_before_what_a_preference_answers(model):
    tokenizer = Tokenizer.open(model)
    template = ChatTemplate.plain(tokenizer)
    cells = {"prompt": "Amakuru?", "chosen": "Ni meza.", "rejected": "Oya.", "system": "Subiza."}
    rows = [Row("x, line 1", cells, 1)]
    (pair,) = PreferenceEncoder(tokenizer, template, as_chat=True)(rows)
    for document, answer in zip(pair.documents, ("Ni meza.", "Oya."), strict=True):
        conversation = said(("s", "Subiza."), ("u", "Amakuru?"), ("a", answer))
        assert document.ids.tolist() == document_of(template, conversation).ids
    with pytest.raises(UserError, match="line 1: a system message, and a prompt that is a text"):
        PreferenceEncoder(tokenizer, template)(rows)


# ------------------------------------------------------------------ translations

def write_pairs(file: Path, n: int = 5) -> Path:
    rows = [f"{ENG[i % 5]} {i}\t{KIN[i % 5]} {i}" for i in range(n)]
    file.write_text("\n".join(["eng\tkin", *rows]) + "\n")
    return file


def test_almas_prompt_stands_byte_for_byte_and_the_answer_follows_directly(model, tmp_path):
    bin, tok = prepared(model, tmp_path, "mt", str(write_pairs(tmp_path / "p.tsv", 1)))
    assert tok.decode(bin.document(0)) == (
        "Translate this from English to Kinyarwanda:\n"
        f"English: {ENG[0]} 0\n"
        f"Kinyarwanda:{KIN[0]} 0")
    assert tok.decode(bin.document(1)) == (
        "Translate this from Kinyarwanda to English:\n"
        f"Kinyarwanda: {KIN[0]} 0\n"
        f"English:{ENG[0]} 0")
    for i, wanted in enumerate((KIN[0], ENG[0])):
        ids, mask = bin.document(i), bin.trained(i)
        assert tok.decode(ids[mask]).strip() == f"{wanted} 0"
        assert ids[-1] == tok.eos and mask[-1] and ids[0] == tok.bos and not mask[0]
        assert list(ids).count(tok.eos) == list(ids).count(tok.bos) == 1
        prompt = [tok.bos, *tok.encode(tok.decode(ids[~mask]))]
        assert ids[~mask].tolist() == prompt  # what is asked is what was taught
    assert bin.meta["prompt"]["translate"][0] == {
        "name": "alma", "as_chat": False, "languages": {"eng": "English", "kin": "Kinyarwanda"},
        "text": "Translate this from {source} to {target}:\n{source}: {text}\n{target}:"}


def test_both_directions_of_every_pair_are_trained_and_not_one_half_twice(model, tmp_path):
    """The test that would have caught a split which gives both directions the same half."""
    file = write_pairs(tmp_path / "p.tsv", 40)
    pairs_read = [x.split("\t") for x in file.read_text().splitlines()[1:]]
    bin, tok = prepared(model, tmp_path, "mt", str(file))
    answers = [tok.decode(bin.document(i)[bin.trained(i)]).strip() for i in range(len(bin))]
    assert sorted(answers) == sorted([*(e for e, _ in pairs_read), *(k for _, k in pairs_read)])
    for only, side in (("eng-kin", 1), ("kin-eng", 0)):
        bin, _ = prepared(model, tmp_path, "mt", str(file), "--directions", only)
        answers = [tok.decode(bin.document(i)[bin.trained(i)]).strip() for i in range(len(bin))]
        assert answers == [p[side] for p in pairs_read]
    bin, _ = prepared(model, tmp_path, "mt", str(file), "--directions", "eng-kin:4", "kin-eng:1")
    to_kin = sum("to Kinyarwanda:" in tok.decode(bin.document(i)) for i in range(len(bin)))
    assert to_kin == 40 and 2 <= len(bin) - 40 <= 22


def test_pairs_come_from_every_kind_of_file_alike(model, tmp_path):
    tsv = write_pairs(tmp_path / "p.tsv")
    rows = [dict(zip(("eng", "kin"), x.split("\t"), strict=True))
            for x in tsv.read_text().splitlines()[1:]]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(x) + "\n" for x in rows))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "p.parquet")
    (tmp_path / "a.txt").write_text("\n".join(x["eng"] for x in rows) + "\n")
    (tmp_path / "b.txt").write_bytes(("\r\n".join(x["kin"] for x in rows) + "\r\n").encode())
    (tmp_path / "p.json").write_text(json.dumps(rows))
    for name in ("p.tsv", "p.jsonl", "p.json", "a.txt", "b.txt"):
        (tmp_path / f"{name}.gz").write_bytes(gzip.compress((tmp_path / name).read_bytes()))
    story = {"eng": [x["eng"] for x in rows], "kin": [x["kin"] for x in rows]}
    (tmp_path / "s.jsonl").write_text(json.dumps(story) + "\n")
    wanted = prepared(model, tmp_path, "mt", str(tsv))[0].tokens.tolist()
    for args in (["p.jsonl"], ["p.parquet"], ["s.jsonl"], ["a.txt", "b.txt", "--aligned"],
                  ["p.json"], ["p.tsv.gz"], ["p.jsonl.gz"], ["p.json.gz"],
                  ["a.txt.gz", "b.txt.gz", "--aligned"]):
        args = [str(tmp_path / x) if "." in x else x for x in args]
        assert prepared(model, tmp_path, "mt", *args)[0].tokens.tolist() == wanted


def test_a_side_that_is_null_is_counted_as_an_empty_one_is(model, tmp_path):
    sides = [("A cow.", "Inka."), (None, "Amazi."), ("Water.", None), (None, None)]
    rows = [dict(zip(("eng", "kin"), x, strict=True)) for x in sides]
    (tmp_path / "x.tsv").write_text("eng\tkin\n" + "".join(
        f"{e or ''}\t{k or ''}\n" for e, k in sides))
    (tmp_path / "x.jsonl").write_text("".join(json.dumps(x) + "\n" for x in rows))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "x.parquet")
    for name in ("x.tsv", "x.jsonl", "x.parquet"):
        bin, _ = prepared(model, tmp_path, "mt", f"{tmp_path}/{name}")
        assert bin.meta["ledger"]["documents"] == {"read": 4, "kept": 1, "empty": 3}, name


def test_a_parquet_row_that_is_not_utf8_is_one_line(tmp_path):
    raw = pyarrow.array([b"\xff\xfe"], pyarrow.binary()).view(pyarrow.string())
    pyarrow.parquet.write_table(pyarrow.table({"eng": raw}), tmp_path / "x.parquet")
    with pytest.raises(UserError, match=r"x\.parquet: a text in it is not UTF-8"):
        list(read_rows(tmp_path / "x.parquet"))


def test_prompts_are_drawn_by_seed_and_each_is_filled(model, tmp_path):
    file = str(write_pairs(tmp_path / "p.tsv", 60))
    drawn = [prepared(model, tmp_path, "mt", file, "--prompts", "all", "--seed", seed)[0]
             .tokens.tolist() for seed in ("1", "1", "2")]
    assert drawn[0] == drawn[1] != drawn[2]
    bin, tok = prepared(model, tmp_path, "mt", file, "--prompts", "all")
    said_once = {re.sub(r"\W.*", "", tok.decode(bin.document(i))) for i in range(len(bin))}
    assert {"Translate", "Shyira", "Ibi", "Aya", "Iyi", "How", "Put", "Below"} <= said_once
    for name, (text, languages) in PROMPTS.items():
        filled = Prompt(name, text, languages).fill("{target} inka", "eng-kin")
        assert "{target} inka" in filled and languages["kin"] in filled  # braces in a text stay
        assert filled.replace("{target} inka", "").count("{") == 0
    assert PROMPTS["kin-put"][1] == {"eng": "Cyongereza", "kin": "Kinyarwanda"}


@pytest.mark.parametrize("words", [[], ["--directions", "eng-kin:3", "kin-eng:1"], ["--as-text"],
                                   ["--join", "2", "--processes", "2"]], ids=" ".join)
def test_no_pair_that_is_held_out_is_trained_in_either_direction(model, tmp_path, words):
    """Every pair has a number of its own in both languages."""
    sides = [(f"cow {i:04}a", f"inka {i:04}b") for i in range(400)]
    (tmp_path / "x.tsv").write_text("eng\tkin\n" + "".join(f"{e}\t{k}\n" for e, k in sides))
    bin, tok = prepared(model, tmp_path, "mt", f"{tmp_path}/x.tsv", *words)
    is_held_out = validation_split(bin, 0.1)
    marks: list[set[str]] = [set(), set()]  # of what is trained, and of what is held out
    counts = Counter()
    for i, side in enumerate(is_held_out.tolist()):
        text = tok.decode(bin.document(i)[1:-1].tolist())
        marks[side].update(labels := re.findall(r"\d{4}[ab]", text))
        counts[side] += 1
        assert len(labels) in (2, 4)
    assert marks[0] and marks[1] and not marks[0] & marks[1]
    assert {x[:4] for x in marks[0] | marks[1]} == {f"{i:04}" for i in range(400)}
    assert 0.03 < counts[True] / len(is_held_out) < 0.2
    assert (bin.folder / "groups.bin").stat().st_size == 8 * len(bin)
    if not words:  # and other files, or one direction, hold out the same pairs
        one, _ = prepared(model, tmp_path / "one", "mt", f"{tmp_path}/x.tsv", "--directions",
                          "kin-eng")
        assert np.array_equal(validation_split(one, 0.1), is_held_out[::2]) and len(one) == 400


def test_the_groups_of_a_bin_are_the_same_bytes_for_any_number_of_processes(
        model, tmp_path):
    (tmp_path / "x.tsv").write_text("eng\tkin\n" + "".join(f"a {i}\tb {i}\n" for i in range(300)))
    files = [{f.name: f.read_bytes() for f in prepared(
        model, tmp_path / str(n), "mt", f"{tmp_path}/x.tsv",
        workers=Workers(n, serial_seconds=0, chunk_bytes=500))[0].folder.iterdir()}
        for n in (1, 3)]
    assert files[0] == files[1] and len(files[0]["groups.bin"]) == 600 * 8


def test_a_bin_without_groups_holds_out_the_documents_that_it_did(model, tmp_path):
    """One that was prepared before there were any: a run on it goes on as it began."""
    (tmp_path / "x.tsv").write_text("eng\tkin\n" + "".join(f"a {i}\tb {i}\n" for i in range(300)))
    bin, _ = prepared(model, tmp_path, "mt", f"{tmp_path}/x.tsv")
    meta, fingerprint = bin.meta, Source("x", bin, np.arange(600), 1.0).sha
    del meta["sha256"]["groups.bin"]
    (bin.folder / "groups.bin").unlink()
    (bin.folder / "meta.json").write_text(json.dumps(meta))
    old = Bin(bin.folder)
    wanted = [int.from_bytes(hashlib.blake2b(old.document(i)[:64].tobytes(), digest_size=8)
                             .digest(), "little") < 0.1 * 2**64 for i in range(600)]
    assert validation_split(old, 0.1).tolist() == wanted and 20 < sum(wanted) < 120
    sha = Source("x", old, np.arange(600), 1.0).sha
    digest = hashlib.sha256((bin.folder / "tokens.bin").read_bytes()).hexdigest()
    assert sha == digest != fingerprint


def test_examples_before_and_joined_pairs_and_plain_text(model, tmp_path):
    file = str(write_pairs(tmp_path / "p.tsv", 10))
    bin, tok = prepared(model, tmp_path, "mt", file, "--shots", "2")
    texts = [tok.decode(bin.document(i)) for i in range(len(bin))]
    assert [x.count("Translate this") for x in texts][:8] == [1, 1, 2, 2, 3, 3, 3, 3]
    assert all(len(trained_text(tok, bin.document(i), bin.trained(i))) == 1 for i in range(20))
    bin, _ = prepared(model, tmp_path, "mt", file, "--join", "4")
    assert len(bin) == 2 * 3 and f"{KIN[0]} 0 {KIN[1]} 1" in tok.decode(bin.document(0))
    bin, _ = prepared(model, tmp_path, "mt", file, "--as-text")
    assert bin.meta["kind"] == "text" and bin.mask is None and len(bin) == 20
    assert tok.decode(bin.document(0)) == f"English: {ENG[0]} 0\nKinyarwanda: {KIN[0]} 0"
    bin, _ = prepared(model, tmp_path, "mt", file, "--as-chat")
    assert tok.decode(bin.document(0)).startswith("<|user|>\nTranslate this from English to Kin")
    assert tok.decode(bin.document(0)[bin.trained(0)]).strip() == f"{KIN[0]} 0"
    assert bin.meta["prompt"]["translate"][0]["as_chat"] and bin.meta["prompt"]["chat"] == PLAIN


def test_every_pair_left_out_is_counted(model, tmp_path):
    file = tmp_path / "p.tsv"
    rows = [("eng", "kin"), (ENG[0], KIN[0]), ("Kigali", "Kigali"), ("", "Yego"), (ENG[0], KIN[0]),
            ("No", KIN[1] * 3), (ENG[1], KIN[1] * 40)]
    file.write_text("".join("\t".join(x) + "\n" for x in rows))
    bin, _ = prepared(model, tmp_path, "mt", str(file), "--max-tokens", "200", "--max-ratio", "9")
    ledger = bin.meta["ledger"]["documents"]
    assert ledger == {"read": 6, "kept": 1, "identical": 1, "empty": 1, "duplicate": 1,
                      "length ratio": 2}
    bin, _ = prepared(model, tmp_path, "mt", str(file), "--max-tokens", "200", "--max-ratio", "0",
                      "--too-long", "drop")
    ledger = bin.meta["ledger"]["documents"]
    assert ledger["too long"] == 1 and sum(ledger.values()) == 2 * ledger["read"]
    assert sum(bin.meta["ledger"]["bytes"].values()) == 2 * bin.meta["ledger"]["bytes"]["read"]


def test_languages_that_look_swapped_are_said_with_file_and_line(model, tmp_path):
    """By the share of frequent Kinyarwanda words, of each file by itself: it may be one of many."""
    swapped, right = tmp_path / "p.tsv", write_pairs(tmp_path / "q.tsv", 40)
    swapped.write_text("eng\tkin\n" + "".join(
        f"{k}\t{e}\n" for k, e in zip(KIN, ENG, strict=True)))
    code, lines = command(model, tmp_path, "mt", str(right), str(swapped))
    assert code == 0 and len(Bin(tmp_path / "bin")) == 2 * 45
    (told,) = (x for x in lines if "swapped" in x)
    assert told.startswith(f"{swapped}, line 2: from here on the languages look swapped: 'eng' has")
    assert re.search(r"'eng' has (\d+)% frequent Kinyarwanda words and 0% English ones", told)
    code, lines = command(model, tmp_path, "mt", str(swapped), "--eng-key", "kin", "--kin-key",
                          "eng")
    assert code == 0 and not any("swapped" in x for x in lines)
    for name, texts in (("a", KIN), ("b", ENG)):
        (tmp_path / f"{name}.txt").write_text("\n".join(texts) + "\n")
    code, lines = command(model, tmp_path, "mt", f"{tmp_path}/a.txt", f"{tmp_path}/b.txt",
                          "--aligned")
    assert code == 0 and any(x.startswith(f"{tmp_path}/a.txt, line 1: from here on") for x in lines)


def test_pairs_of_other_languages_are_named_by_their_codes(model, tmp_path):
    file = tmp_path / "x.tsv"
    file.write_text("lingala\tfra\nMbote.\tBonjour.\nMai.\tEau.\n")
    bin, tok = prepared(model, tmp_path, "mt", str(file), "--languages", "fra", "lin", "--columns",
                        "lin=lingala", "--directions", "fra-lin", "--prompts", "all")
    texts = [tok.decode(bin.document(i)) for i in range(len(bin))]
    assert len(texts) == 2 and "Lingala" in texts[0] and texts[0].endswith("Mbote.")
    assert set(bin.meta["prompt"]["translate"][0]["languages"]) == {"fra", "lin"}
    bin, tok = prepared(model, tmp_path, "mt", str(file), "--languages", "fra", "xyz", "--columns",
                        "xyz=lingala", "--language-names", "xyz=Xyz", "--as-text")
    assert tok.decode(bin.document(0)) == "French: Bonjour.\nXyz: Mbote."
    for args, wanted in ((["--languages", "fra", "xyz"], "language 'xyz': not in"),
                          (["--languages", "fra"], "--languages fra: expected two codes"),
                          (["--columns", "swa=x"], "--columns swa=x: expected CODE=COLUMN"),
                          (["--directions", "fra-lin"], "--directions fra-lin: expected both")):
        with pytest.raises(UserError, match=wanted):
            prepared(model, tmp_path, "mt", str(file), *args)


# ------------------------------------------------------------------ preferences

def test_a_preference_pair_is_two_documents_with_one_question(model, tmp_path):
    file = tmp_path / "d.jsonl"
    rows = [{"prompt": "Inka:", "chosen": "zirya", "rejected": "cow"},
            {"prompt": said(("u", "Inka?")), "chosen": "Zirya.", "rejected": "Oya."},
            {"chosen": said(("u", "Ejo?"), ("a", "Yego.")),
             "rejected": said(("u", "Ejo?"), ("a", "Oya."))}]
    file.write_text("".join(json.dumps(x) + "\n" for x in rows))
    bin, tok = prepared(model, tmp_path, "pairs", str(file))
    assert bin.meta["kind"] == "pairs" and len(bin) == 6
    texts = [tok.decode(bin.document(i)[bin.trained(i)]).strip() for i in range(6)]
    assert texts == ["zirya", "cow", "Zirya.", "Oya.", "Yego.", "Oya."]
    for i in (0, 2, 4):
        a, b = (bin.document(j)[~bin.trained(j)].tolist() for j in (i, i + 1))
        assert a == b
    assert tok.decode(bin.document(0)) == "Inka:zirya"


def test_best_and_worst_samples_are_those_of_sacrebleu(model, tmp_path):
    draw, metric = random.Random(3), CHRF(word_order=2)
    prompts = [f"Q{i}:" for i in range(6)]
    samples = {q: [" ".join(draw.sample(KIN[i % 5].split(), 3)) for _ in range(4)]
               for i, q in enumerate(prompts)}
    (tmp_path / "s.jsonl").write_text("".join(
        json.dumps({"prompt": q, "text": x, "tokens": 3}) + "\n" for q in prompts
        for x in samples[q]))
    (tmp_path / "ref.txt").write_text("\n".join(KIN[i % 5] for i in range(6)) + "\n")
    out = tmp_path / "made.jsonl"
    prepare.prefer(prepare.Prefer([str(tmp_path / "s.jsonl")], str(out),
                                  str(tmp_path / "ref.txt"), gap=0.0))
    for line in map(json.loads, out.read_text().splitlines()):
        i = prompts.index(line["prompt"])
        scores = {x: metric.sentence_score(x, [KIN[i % 5]]).score for x in samples[prompts[i]]}
        assert scores[line["chosen"]] == max(scores.values())
        assert scores[line["rejected"]] == min(scores.values())
        assert line["scores"][0] == round(max(scores.values()), 2)
    (tmp_path / "v.tsv").write_text("prompt\tbest\tworst\n2\t3\t1\n")
    prepare.prefer(prepare.Prefer([str(tmp_path / "s.jsonl")], str(out),
                                  votes=str(tmp_path / "v.tsv")))
    assert json.loads(out.read_text()) == {
        "prompt": "Q1:", "chosen": samples["Q1:"][2], "rejected": samples["Q1:"][0]}
    bin, _ = prepared(model, tmp_path, "pairs", str(out))
    assert len(bin) == 2


# ------------------------------------------------------------------ in several processes

def rows_of_all_kinds(folder: Path, n: int = 60) -> None:
    """Files with every fate of a row in them."""
    rows = [(f"{ENG[i % 5]} {i}", f"{KIN[i % 5]} {i}") for i in range(n)]
    rows[7], rows[20], rows[31], rows[32] = ("", "x"), rows[3], ("Kigali", "Kigali"), ("a", KIN[0])
    (folder / "mt.tsv").write_text("eng\tkin\n" + "".join(f"{e}\t{k}\n" for e, k in rows))
    talks = [said(*[t for j in range(1 + i % 3) for t in (("u", f"{e} {j}"), ("a", f" {k}’n {j}"))])
             for i, (e, k) in enumerate(rows) if e]
    (folder / "chat.jsonl").write_text("".join(json.dumps({"messages": x}) + "\n" for x in talks))
    (folder / "pairs.jsonl").write_text("".join(json.dumps(
        {"prompt": x[:-1] if i % 2 else f"{i}:", "chosen": x[-1]["content"], "rejected": "Oya."})
        + "\n" for i, x in enumerate(talks)))


ALL = ["--prompts", "all", "--shots", "2", "--directions", "eng-kin:3", "kin-eng:1"]


@pytest.mark.parametrize("args", [
    ["chat", "chat.jsonl", "--max-tokens", "150", "--too-long", "cut"],
    ["mt", "mt.tsv", *ALL, "--max-tokens", "400", "--too-long", "drop"],
    ["mt", "mt.tsv", "--as-chat", "--join", "2"], ["pairs", "pairs.jsonl"]],
    ids=["chat", "mt", "mt as chat", "pairs"])
def test_a_bin_is_the_same_bytes_for_any_number_of_processes(model, tmp_path, args):
    rows_of_all_kinds(tmp_path)
    command, file, *flags = args
    bins = []
    for n in (1, 2, 3):
        bin, _ = prepared(model, tmp_path, command, f"{tmp_path}/{file}", *flags,
                          workers=Workers(n, serial_seconds=0, chunk_bytes=1000))
        bins.append({x.name: x.read_bytes() for x in bin.folder.iterdir()})
    assert all(x == bins[0] for x in bins)
    assert bin.meta["ledger"]["documents"]["kept"] > 20


@settings(max_examples=15, deadline=None)
@given(size=st.integers(1, 9000), words=st.sampled_from([
    ["chat", "chat.jsonl"], ["mt", "mt.tsv", "--prompts", "all", "--directions", "eng-kin:3",
                             "kin-eng:1", "--join", "3"], ["pairs", "pairs.jsonl"]]))
def test_what_a_row_becomes_does_not_depend_on_how_rows_are_dealt_out(
        model, tmp_path_factory, size, words):
    folder = tmp_path_factory.mktemp("dealt")
    rows_of_all_kinds(folder, 40)
    command, file, *flags = words
    bins = []
    for chunk_bytes in (size, Workers.chunk_bytes):
        bin, _ = prepared(model, folder, command, f"{folder}/{file}", *flags,
                          workers=Workers(chunk_bytes=chunk_bytes))
        bins.append({x.name: x.read_bytes() for x in bin.folder.iterdir()})
    assert bins[0] == bins[1]


@pytest.mark.parametrize("n", [1, 2])
def test_the_first_fault_is_said_whichever_process_met_it(model, tmp_path, n):
    """A line that is no JSON is met by the one that reads, long before a worker sees the others."""
    rows_of_all_kinds(tmp_path)
    lines = (tmp_path / "chat.jsonl").read_text().splitlines()
    lines[30], lines[33], lines[40] = chat_line(("u", "a")), "{", chat_line(("u", "b"))
    for place, wanted in ((30, "the conversation does not end"), (33, "not JSON")):
        (tmp_path / "chat.jsonl").write_text("\n".join(lines) + "\n")
        with pytest.raises(UserError, match=rf"chat\.jsonl, line {place + 1}: {wanted}") as e:
            prepared(model, tmp_path, "chat", f"{tmp_path}/chat.jsonl",
                     workers=Workers(n, serial_seconds=0, chunk_bytes=200))
        assert e.value.code == 3 and not list(tmp_path.glob(".tmp*"))
        lines[30] = lines[29]


# ------------------------------------------------------------------ bad input

def chat_line(*turns: tuple[str, str]) -> str:
    return json.dumps({"messages": said(*turns)})


FAULTS = {  # command, file, what is in it, more flags; what is said, behind the file's folder
    "unknown role": ("chat", "x.jsonl", json.dumps({"messages": [
        {"role": "boss", "content": "x"}]}), [], "x.jsonl, line 1, message 1: role 'boss'"),
    "unknown speaker": ("chat", "x.jsonl", ANSWER + "\n" + json.dumps({"conversations": [
        {"from": "bot", "value": "x"}]}), [], "x.jsonl, line 2, message 1: role 'bot'"),
    "no content": ("chat", "x.jsonl", json.dumps({"messages": [{"role": "user"}]}), [],
                   "x.jsonl, line 1, message 1: no text"),
    "empty turn": ("chat", "x.jsonl", chat_line(("u", "Ejo?"), ("a", " \n")), [],
                   "x.jsonl, line 1: a turn of the assistant is empty"),
    "empty turn among others": ("chat", "x.jsonl", ANSWER + "\n" + chat_line(
        ("u", "a"), ("a", ""), ("u", "c"), ("a", "d")), [],
        "x.jsonl, line 2: a turn of the assistant is empty"),
    "half a character": (
        "chat", "x.jsonl", ANSWER + "\n" + chat_line(("u", "a \ud83d b"), ("a", "c")), [],
        "x.jsonl, line 2: half a character at 'a ' ..."),
    "half a character in a pair": (
        "mt", "x.jsonl", json.dumps({"eng": "a", "kin": "b \ud83d"}), [],
        "x.jsonl, line 1: half a character at 'b ' ..."),
    "half a character in a prompt": (
        "pairs", "x.jsonl", json.dumps({"prompt": "a \ud83d", "chosen": "b", "rejected": "c"}), [],
        "x.jsonl, line 1: half a character at 'a ' ..."),
    "half a character of input": (
        "chat", "x.jsonl", json.dumps({"instruction": "a", "input": "b \ud83d", "output": "c"}), [],
        "x.jsonl, line 1: half a character at 'b ' ..."),
    "nothing but unseen characters": (
        "chat", "x.jsonl", chat_line(("u", "a"), ("a", "\u200b\ufeff")),
        ["--normalise", "spaces"], "x.jsonl, line 1: a turn of the assistant is empty"),
    "ends with the user": ("chat", "x.jsonl", ANSWER + "\n\n" + chat_line(
        ("u", "a"), ("a", "b"), ("u", "c")), [],
        "x.jsonl, line 3: the conversation does not end with"),
    "all masked": ("chat", "x.jsonl", chat_line(("s", "x"), ("u", "y")), [],
                   "x.jsonl, line 1: the conversation does not end with the assistant"),
    "all masked by a cut": ("chat", "x.jsonl", ANSWER + "\n" + chat_line(
        ("u", "Ejo? " * 40), ("a", "Yego.")), ["--max-tokens", "100", "--too-long", "cut"],
        "x.jsonl, line 2: the first of 1 of 2 examples that have no trained token among their "
        "first 100"),
    "all masked by a cut, mt": (
        "mt", "x.tsv", f"eng\tkin\n{'a cow ' * 30}\t{'inka ' * 30}\n",
        ["--max-tokens", "40", "--too-long", "cut"],
        "x.tsv, line 2: the first of 1 of 1 examples that have no trained token"),
    "no conversation": ("chat", "x.jsonl", '{"text": "x"}', [],
                        "x.jsonl, line 1: no conversation; expected one of messages, conver"),
    "not JSON": ("chat", "x.jsonl", ANSWER + "\n{", [], "x.jsonl, line 2: not JSON"),
    "not UTF-8": ("chat", "x.jsonl", b'{"messages": "\xff"}', [],
                  "x.jsonl, line 1: byte 14 is not UTF-8"),
    "longer than a row": (
        "chat", "x.jsonl", "\n".join([ANSWER, chat_line(("u", "a"), ("a", KIN[0] * 5)), ANSWER]),
        ["--max-tokens", "60", "--keep-duplicates"],
        "x.jsonl, line 2: the first of 1 of 3 examples that are longer than 60 tokens"),
    "longer than a row, mt": (
        "mt", "x.tsv", f"eng\tkin\na\tb\n{ENG[0]}\t{KIN[0]}\n", ["--max-tokens", "100"],
        "x.tsv, line 3: the first of 1 of 2 examples that are longer than 100 tokens"),
    "longer than a row, pairs": (
        "pairs", "x.jsonl", json.dumps({"prompt": "a", "chosen": "b", "rejected": "c"}),
        ["--max-tokens", "5"], "x.jsonl, line 1: the first of 1 of 1 examples that are longer"),
    "template not there": ("chat", "x.jsonl", ANSWER, ["--template", "x.jinja"],
                           "--template x.jinja: cannot be read"),
    "one column": ("mt", "x.tsv", "eng\nA cow.\n", [], "x.tsv, line 1: one column, 'eng'"),
    "one column of JSON": ("mt", "x.jsonl", '{"eng": "A cow."}\n', [],
                           "x.jsonl, line 1: no text under 'kin'; it has eng"),
    "one column of preferences": ("pairs", "x.tsv", "prompt\na\n", [],
                                  "x.tsv, line 1: one column, 'prompt'"),
    "another column": ("mt", "x.tsv", "en\tkin\na\tb\n", [],
                       "x.tsv, line 2: no text under 'eng'; it has"),
    "two columns of a name": ("mt", "x.tsv", "eng\tkin\tkin\na\tb\tc\n", [],
                              "x.tsv, line 1: two columns are called 'kin'"),
    "a number": ("mt", "x.jsonl", '{"eng": 5, "kin": "b"}', [],
                 "x.jsonl, line 1: no text under 'eng'; found '5'"),
    "as text, with an example before it": (
        "mt", "x.tsv", "eng\tkin\na\tb\n", ["--as-text", "--shots", "2"],
        "prepare.py mt: --as-text goes without --shots, --max-tokens and --too-long"),
    "as text, in a row": ("mt", "x.tsv", "eng\tkin\na\tb\n", ["--as-text", "--max-tokens", "9"],
                          "prepare.py mt: --as-text goes without --shots, --max-tokens"),
    "as text, cut": ("mt", "x.tsv", "eng\tkin\na\tb\n", ["--as-text", "--too-long", "cut"],
                     "prepare.py mt: --as-text goes without --shots, --max-tokens"),
    "a template and no chat": ("mt", "x.tsv", "eng\tkin\na\tb\n", ["--template", "plain"],
                               "--template plain: give --as-chat with it"),
    "columns missing": ("mt", "x.tsv", "eng\tkin\na\tb\na\n", [],
                        "x.tsv, line 3: 1 columns, expected 2"),
    "no such direction": ("mt", "x.tsv", "eng\tkin\na\tb\n", ["--directions", "fra-kin"],
                          "--directions fra-kin: expected both"),
    "no such prompt": ("mt", "x.tsv", "eng\tkin\na\tb\n", ["--prompts", "alpha"],
                       "--prompts alpha: expected all, or names"),
    "nothing left": ("mt", "x.tsv", "eng\tkin\n\tb\na\ta\nb\tb\n", [],
                     "x.tsv: no example left of 3 read (1 empty, the first {}x.tsv, line 2, 2 "
                     "identical, the first {}x.tsv, line 3)"),
    "equal answers": ("pairs", "x.jsonl", json.dumps({"prompt": "a", "chosen": "b",
                      "rejected": "b"}), [], "x.jsonl, line 1: chosen and rejected are equal"),
    "answers that the template makes equal": (
        "pairs", "x.jsonl", json.dumps({"prompt": said(("u", "a")), "chosen": "b",
                                        "rejected": " b\n"}), [],
        "x.jsonl, line 1: chosen and rejected are equal"),
    "two questions": ("pairs", "x.jsonl", json.dumps({
        "chosen": said(("u", "a"), ("a", "b")), "rejected": said(("u", "x"), ("a", "c"))}), [],
        "x.jsonl, line 1: chosen and rejected answer different questions"),
    "another prompt": ("pairs", "x.jsonl", json.dumps({
        "prompt": said(("s", "x"), ("u", "a")), "chosen": said(("u", "a"), ("a", "b")),
        "rejected": "c"}), [], "x.jsonl, line 1: chosen begins with other messages than prompt"),
    "a text that asks something else": ("pairs", "x.jsonl", json.dumps({
        "prompt": "x", "chosen": said(("u", "a"), ("a", "b")), "rejected": said(
            ("u", "a"), ("a", "c"))}), [],
        "x.jsonl, line 1: chosen begins with other messages than prompt"),
    "two answers, one by a cut": ("pairs", "x.jsonl", LONG_PAIR, ["--max-tokens", "60",
                                                                  "--too-long", "cut"],
        "x.jsonl, line 1: the first of 1 of 1 examples that are two equal answers in their first "
        "30: a cut leaves nothing to prefer"),
    "the first of two faults, mt": (
        "mt", "x.jsonl", '{"eng": "a"}\n{', [], "x.jsonl, line 1: no text under 'kin'"),
    "the first of two faults, pairs": (
        "pairs", "x.jsonl", json.dumps({"prompt": "a", "chosen": "b", "rejected": "b"})
        + '\n{"prompt": "a"}', [], "x.jsonl, line 1: chosen and rejected are equal"),
    "no prompt": ("pairs", "x.jsonl", json.dumps({"chosen": "b", "rejected": "c"}), [],
                  "x.jsonl, line 1: prompt is 'None', expected a list of messages"),
    "no rejected": ("pairs", "x.jsonl", json.dumps({"prompt": "a", "chosen": "b"}), [],
                    "x.jsonl, line 1: no text under 'rejected'"),
    "empty answer": ("pairs", "x.jsonl", json.dumps({"prompt": "a", "chosen": "b",
                     "rejected": " "}), [], "x.jsonl, line 1: rejected is empty"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_mistake_is_one_line_with_file_and_line(model, tmp_path, fault):
    name, file, content, args, wanted = FAULTS[fault]
    content = content if isinstance(content, bytes) else content.encode()
    (tmp_path / file).write_bytes(content)
    code, lines = command(model, tmp_path, name, f"{tmp_path}/{file}", *args)
    place = f"{tmp_path}/" if wanted.startswith(file) else ""
    assert lines[-1].startswith(f"error: {place}{wanted.replace('{}', place)}")
    assert code == (3 if place else 2) and sum("error" in x for x in lines) == 1
    if "longer than" in fault:
        assert lines[-1].endswith("leave them out with --too-long drop, shorten them with "
                                  "--too-long cut, or raise --max-tokens")
    assert not (tmp_path / "bin").exists() and not list(tmp_path.glob(".tmp*"))


def test_a_mistake_is_said_by_the_program_as_one_line(model, tmp_path):
    (tmp_path / "x.jsonl").write_text(chat_line(("u", "a")) + "\n")
    process = subprocess.run(
        [sys.executable, str(ROOT / "prepare.py"), "chat", f"{tmp_path}/x.jsonl", "--tokenizer",
         str(model), "--out", f"{tmp_path}/bin"], capture_output=True, text=True, timeout=120)
    assert process.returncode == 3 and process.stderr.splitlines()[-1].startswith("error: ")
    assert "x.jsonl, line 1: " in process.stderr and "Traceback" not in process.stderr


def test_a_pair_of_which_a_cut_leaves_one_answer_is_left_out_and_counted(model, tmp_path):
    pairs = [json.dumps({"prompt": str(i), "chosen": "a", "rejected": "b"}) for i in range(99)]
    (tmp_path / "x.jsonl").write_text("\n".join([*pairs, LONG_PAIR]) + "\n")
    code, lines = command(model, tmp_path, "pairs", f"{tmp_path}/x.jsonl", "--max-tokens", "60",
                          "--too-long", "cut")
    assert code == 0 and any(re.fullmatch(r"equal +1 +\d+", x) for x in lines)
    assert len(Bin(tmp_path / "bin")) == 2 * 99


def test_a_text_beside_messages_that_ask_it_is_no_other_question(model, tmp_path):
    """As UltraFeedback's files have both."""
    row = {"prompt": "a ", "chosen": said(("s", "x"), ("u", "a"), ("a", "b")),
           "rejected": said(("s", "x"), ("u", "a"), ("a", "c"))}
    (tmp_path / "x.jsonl").write_text(json.dumps(row))
    bin, tok = prepared(model, tmp_path, "pairs", f"{tmp_path}/x.jsonl")
    template = ChatTemplate.plain(tok)
    assert [bin.document(i).tolist() for i in (0, 1)] == [
        document_of(template, row[x]).ids for x in ("chosen", "rejected")]


def test_up_to_one_long_example_in_a_hundred_is_left_out_and_counted(model, tmp_path):
    file = tmp_path / "x.jsonl"
    short = [chat_line(("u", str(i)), ("a", "b")) for i in range(99)]
    long = chat_line(("u", "a"), ("a", KIN[0] * 5))
    for rows, wanted in (([*short, long], 0), ([*short[1:], long, long], 3)):
        file.write_text("\n".join(rows) + "\n")
        code, lines = command(model, tmp_path, "chat", str(file), "--max-tokens", "60",
                              "--keep-duplicates")
        assert code == wanted
        if code == 0:
            assert any(re.fullmatch(r"too long +1 +\d+", x) for x in lines)
            assert len(Bin(tmp_path / "bin")) == 99
    assert lines[-1].startswith(f"error: {file}, line 99: the first of 2 of 100 examples")


@pytest.mark.parametrize("source", [
    "{% for m in messages %}[{{ m.content }}]{% endfor %}"
    "{% if add_generation_prompt %}<bot>{% endif %}",
    "{{ messages | length }}{% for m in messages %}{{ m.content }}{% endfor %}",
    "{% for m in messages %}{{ m.content | upper }}{% endfor %}"],
    ids=["another prompt", "counts", "upper case"])
def test_a_template_that_is_no_beginning_of_itself_is_refused(model, tmp_path, source):
    wrong, file = tmp_path / "t.jinja", tmp_path / "x.jsonl"
    file.write_text(ANSWER + "\n")
    wrong.write_text(source)
    code, lines = command(model, tmp_path, "chat", str(file), "--template", str(wrong))
    assert code == 3 and re.match(
        rf"error: {re.escape(str(file))}, line 1: .*t\.jinja: what it writes for turn 2 .* its own "
        "generation prompt", lines[-1])


def test_aligned_files_of_unequal_length_are_refused(model, tmp_path):
    (tmp_path / "a.txt").write_text("one\ntwo\n")
    (tmp_path / "b.txt").write_text("rimwe\n")
    with pytest.raises(UserError, match=r"b\.txt: 1 lines, .*a\.txt has 2"):
        prepared(model, tmp_path, "mt", f"{tmp_path}/a.txt", f"{tmp_path}/b.txt", "--aligned")
    with pytest.raises(UserError, match="an odd number of files"):
        prepared(model, tmp_path, "mt", f"{tmp_path}/a.txt", "--aligned")


def test_long_examples_are_dropped_or_cut_as_asked_and_counted(model, tmp_path):
    file = tmp_path / "x.jsonl"
    file.write_text(ANSWER + "\n" + chat_line(("u", "Ejo?"), ("a", KIN[0] * 9)) + "\n")
    bin, _ = prepared(model, tmp_path, "chat", str(file), "--max-tokens", "100", "--too-long",
                      "drop")
    assert bin.meta["ledger"]["documents"] == {"read": 2, "kept": 1, "too long": 1}
    assert bin.meta["ledger"]["max_tokens"] == 100  # a run of another row prepares anew
    bin, _ = prepared(model, tmp_path, "chat", str(file), "--max-tokens", "100", "--too-long",
                      "cut")
    assert bin.meta["ledger"]["documents"] == {"read": 2, "kept": 1, "cut": 1}
    assert len(bin.document(1)) == 101 and bin.trained(1).any()


def samples_of(file: Path, asked: list[str], n: int, number: bool) -> list[list[str]]:
    """Samples of prompts as sample.py writes them, n of each; what they say."""
    texts = [[f"{q} {i} {j}" for j in range(n)] for i, q in enumerate(asked)]
    file.write_text("".join(
        json.dumps({"prompt": q, "text": x} | ({"prompt_number": i} if number else {})) + "\n"
        for i, (q, answers) in enumerate(zip(asked, texts, strict=True), 1) for x in answers))
    return texts


@pytest.mark.parametrize(("asked", "number"), [
    (["a", "b", "a"], False), (["a", "a", "b"], True), (["a", "b", "a"], True)])
def test_a_prompt_that_stands_twice_is_two_prompts(tmp_path, asked, number):
    texts = samples_of(tmp_path / "s.jsonl", asked, 3, number)
    samples = read_samples(tmp_path / "s.jsonl")
    assert [(x.prompt, x.answers) for x in samples] == list(zip(asked, texts, strict=True))
    (tmp_path / "ref.kin").write_text("".join(f"{x[1]}\n" for x in texts))  # lines by any name
    prepare.prefer(prepare.Prefer([str(tmp_path / "s.jsonl")], f"{tmp_path}/o.jsonl",
                                  f"{tmp_path}/ref.kin", gap=0.0))
    pairs = list(map(json.loads, (tmp_path / "o.jsonl").read_text().splitlines()))
    assert [x["chosen"] for x in pairs] == [x[1] for x in texts]
    if number:  # and samples of two runs may lie behind one another
        both = (tmp_path / "s.jsonl").read_text() * 2
        (tmp_path / "s.jsonl").write_text(both)
        assert [x.answers for x in read_samples(tmp_path / "s.jsonl")] == [x * 2 for x in texts]


def test_references_that_cannot_be_read_are_refused_with_what_helps(tmp_path):
    samples_of(tmp_path / "s.jsonl", ["a", "a", "b"], 3, False)
    for name, raw, wanted in (
            ("r.kin", b"x\ny\nz\n", "3 lines for 2 prompts.*; 'a' has 6 answers, others 3: if it "
                                     "stands twice"),
            ("r.kin", b"x\n\xff\n", r"r\.kin, line 2: undecodable"),
            ("r.jsonl", b'{"kin": "x"}\n', "no text under 'text'; name the key of the text")):
        (tmp_path / name).write_bytes(raw)
        with pytest.raises(UserError, match=wanted):
            prepare.prefer(prepare.Prefer([f"{tmp_path}/s.jsonl"], f"{tmp_path}/o",
                                          f"{tmp_path}/{name}"))
    assert "text_key" in {x.name for x in dataclasses.fields(prepare.Prefer)}
    (tmp_path / "r.jsonl").write_text('{"kin": "x"}\n' * 2)
    prepare.prefer(prepare.Prefer([f"{tmp_path}/s.jsonl"], f"{tmp_path}/o", f"{tmp_path}/r.jsonl",
                                  text_key="kin"))


def test_samples_and_references_that_do_not_match_are_refused(tmp_path):
    (tmp_path / "s.jsonl").write_text('{"prompt": "a", "text": "b"}\n'
                                      '{"prompt": "a", "text": "c"}\n')
    (tmp_path / "r.txt").write_text("x\ny\n")
    (tmp_path / "v.tsv").write_text("prompt\tbest\tworst\n1\t1\t3\n")
    for options, wanted in (({"references": str(tmp_path / "r.txt")}, "2 lines for 1 prompts"),
                          ({"votes": str(tmp_path / "v.tsv")}, "line 2: .*expected the numbers"),
                          ({}, "one of --references FILE and --votes FILE")):
        with pytest.raises(UserError, match=wanted):
            prepare.prefer(prepare.Prefer([f"{tmp_path}/s.jsonl"], f"{tmp_path}/o", **options))


def test_preferences_that_cannot_be_written_are_one_line(tmp_path):
    samples_of(tmp_path / "s.jsonl", ["a"], 2, True)
    (tmp_path / "v.tsv").write_text("prompt\tbest\tworst\n1\t1\t2\n")
    with pytest.raises(UserError, match=r"^--out .*p\.jsonl: cannot be written \(No such") as e:
        prepare.prefer(prepare.Prefer([f"{tmp_path}/s.jsonl"], f"{tmp_path}/nodir/p.jsonl",
                                      votes=f"{tmp_path}/v.tsv"))
    assert e.value.code == console.STORAGE
