"""Text to bins: nothing read is lost without a word, whatever the file holds."""

from __future__ import annotations

import contextlib
import csv
import gzip
import io
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
import unicodedata
from functools import partial
from itertools import groupby
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import tokenizers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import prepare
from data import Bin
from helpers import tiny
from helpers.worker_jobs import process_id
from languages.language import language_of
from languages.normalise import INVISIBLE, normaliser
from preparation import contamination, readers
from preparation.ledger import Ledger
from preparation.text import prepare_text
from preparation.workers import Workers
from runtime.console import UserError
from runtime.paths import ROOT
from tokenization.tokenizer import Tokenizer, learn

STEPS = language_of("kin").all_steps
CLEAN = normaliser(list(STEPS), STEPS)
KIN, ENG = tiny.SENTENCES[:5], tiny.SENTENCES[5:]

quick = partial(settings, deadline=None,
                suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(scope="module")
def tok(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tok")
    learn(tiny.SENTENCES * 20, 400, folder)
    return folder


def documents(bin: Bin, tok: Path) -> list[str]:
    """A bin's texts."""
    opened = Tokenizer.open(tok)
    ids = [bin.document(i).tolist() for i in range(len(bin))]
    assert all(x[0] == opened.bos and x[-1] == opened.eos for x in ids)
    return [opened.decode(x) for x in ids]


def adds_up(ledger: Ledger, bin: Bin) -> None:
    """Every line of the ledger: what was read is the sum of what became of it."""
    for counts in (ledger.documents, ledger.bytes):
        assert counts["read"] == sum(n for what, n in counts.items() if what != "read")
    assert ledger.documents["kept"] == len(bin) == bin.meta["documents"]
    assert bin.meta["ledger"] == ledger.to_json()


MESSY = st.lists(st.one_of(
    st.sampled_from([b"", b" ", b"\r", b"\xff\xfe", b"a\xc3", b"\xef\xbb\xbfa", b"\xed\xa0\x80",
                     b"twice", b"twice ", "’n’umwana’".encode(), "a\u2028b\u0085c".encode()]),
    st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\n\0▁")).map(str.encode),
    st.binary(max_size=12).map(lambda x: x.replace(b"\n", b"").replace(b"\0", b""))), max_size=12)


@quick(max_examples=100)
@given(lines=MESSY, end=st.sampled_from([b"\n", b"\r\n", b"\n\n"]), bom=st.booleans(),
       unit=st.sampled_from(readers.DOCUMENT_UNITS), short=st.integers(1, 3), clean=st.booleans())
def test_what_is_read_is_the_sum_of_what_became_of_it(tok, lines, end, bom, unit, short, clean):
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "messy.txt"
        file.write_bytes(b"\xef\xbb\xbf" * bom + end.join([*lines, b"one that is kept"]) + end)
        try:
            bin, ledger = prepare_text(
                [str(file)], tok, Path(folder) / "bin", unit=unit, min_chars=short,
                normalise=CLEAN if clean else None, on_bad="skip")
        except UserError as e:  # a whole file, or a block, that one byte makes undecodable
            assert "the corpus is empty" in str(e) and unit != "line"
            assert [p.name for p in Path(folder).iterdir()] == ["messy.txt"]
            return
        adds_up(ledger, bin)
        pieces = list(readers.read_documents(file, unit))
        assert ledger.documents["read"] == len(pieces)
        assert ledger.bytes["read"] == sum(p.n_bytes for p in pieces)
        wanted = dict.fromkeys(text for p in pieces if not p.fault
                               for text in [CLEAN(p.text)[0] if clean else p.text]
                               if len(text.strip()) >= short)
        assert documents(bin, tok) == list(wanted)
        assert bin.meta["bytes"] == sum(len(x.encode()) for x in wanted)
        if unit == "line":
            assert ledger.documents["read"] == file.read_bytes().count(b"\n")


def messy(folder: Path) -> list[str]:
    """Files above several chunks, with every fate in them; the same file twice."""
    lines = [f"{tiny.SENTENCES[i % 10]} {i // 3}".encode() for i in range(24_000)]
    for i in range(0, 3000, 100):
        lines[i] = b"\xff"
        lines[i + 1] = b""
    (folder / "a.txt").write_bytes(b"\n".join(lines) + b"\n")
    (folder / "b.jsonl").write_text("".join(json.dumps({"text": f"n’umwana {i}"}) + "\n"
                                            for i in range(500)))
    return [str(folder / "a.txt"), str(folder / "b.jsonl"), str(folder / "b.jsonl")]


def test_chunks_after_the_first_are_mapped_by_worker_processes_in_order():
    results = list(Workers(2, serial_seconds=0).map(process_id, ((i, i) for i in range(8))))
    assert [number for number, _ in results] == list(range(8))
    assert results[0][1] == os.getpid()
    in_pool = {pid for _, pid in results[1:]}
    assert len(in_pool) == 2 and os.getpid() not in in_pool
    alone = list(Workers(2).map(process_id, ((i, i) for i in range(2))))  # for 3 seconds
    assert {pid for _, pid in alone} == {os.getpid()}


@pytest.mark.parametrize("kind", ["sentencepiece", "tokenizer.json"])
def test_a_bin_holds_the_ids_that_the_tokenizer_gives_each_text(tok, kind, tmp_path):
    folder = tok
    if kind == "tokenizer.json":
        folder = tiny.bytewise_folder(tmp_path / "tokenizer", ["<|begin|>"])
    texts = [f"{a}  {b}\n {c}" for a in tiny.SENTENCES for b in ("", "▁x", "é")
             for c in tiny.SENTENCES[:4]]
    file = tmp_path / "text.jsonl"
    file.write_text("".join(json.dumps({"text": x}) + "\n" for x in texts))
    bin, _ = prepare_text([str(file)], folder, tmp_path / "bin")
    ids = [bin.tokens[a:b].tolist() for a, b in zip(bin.starts, bin.starts[1:], strict=False)]
    tokenizer = Tokenizer.open(folder)
    assert ids == [tokenizer.document(x) for x in dict.fromkeys(texts)]


def test_one_process_and_two_write_the_same_bytes(tok, tmp_path):
    specs = messy(tmp_path)
    bins = [prepare_text(specs, tok, tmp_path / f"bin{n}", unit="line", normalise=CLEAN,
                         on_bad="skip", workers=Workers(n, serial_seconds=0,
                                                        chunk_bytes=1 << 16)) for n in (1, 2)]
    assert bins[0][1] == bins[1][1]
    assert bins[0][1].documents == {
        "read": 25_000, "kept": len(bins[0][0]), "undecodable": 30, "empty": 30,
        "duplicate": 25_000 - len(bins[0][0]) - 60}
    names = sorted(p.name for p in (tmp_path / "bin1").iterdir())
    assert names == ["meta.json", "starts.bin", "tokens.bin"]
    for name in names:
        assert (tmp_path / "bin1" / name).read_bytes() == (tmp_path / "bin2" / name).read_bytes()
    adds_up(bins[1][1], bins[1][0])


def test_workers_end_with_the_process_that_gave_them_work(tmp_path):
    (tmp_path / "go.py").write_text(
        "import os, signal, time\n"
        "from preparation.workers import Workers\n"
        "def job(x):\n"
        "    if x:\n"
        "        open(f'{x}.pid', 'w').write(str(os.getpid()))\n"
        "        time.sleep(60)\n"
        "if __name__ == '__main__':\n"
        "    list(Workers(2, serial_seconds=0).map(job, ((i, i) for i in range(5))))\n")
    with subprocess.Popen([sys.executable, "go.py"], cwd=tmp_path,
                          env={**os.environ, "PYTHONPATH": str(ROOT)},
                          start_new_session=True) as process:
        try:
            def pids() -> list[int]:
                return [int(x.read_text() or 0) for x in tmp_path.glob("*.pid")]

            assert settled(lambda: len(pids()) == 2 and all(pids()))
            process.kill()
            process.wait()
            assert settled(lambda: not any(Path(f"/proc/{x}").exists() for x in pids()))
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


def settled(holds) -> bool:
    """Whether something comes true within a minute."""
    return any(holds() or time.sleep(0.1) for _ in range(600))


def write(path: Path, raw: bytes) -> Path:
    path.write_bytes(gzip.compress(raw) if path.suffix == ".gz" else raw)
    return path


TXT = "\ufeffAmazi ni meza.\r\n\r\nInka zirya\nubwatsi.\n   \n\nAmazi ni meza.\n".encode()


@pytest.mark.parametrize("name", ["x.txt", "x.txt.gz"])
@pytest.mark.parametrize("unit, wanted", [
    ("file", ["Amazi ni meza.\n\nInka zirya\nubwatsi.\n   \n\nAmazi ni meza."]),
    ("line", ["Amazi ni meza.", "", "Inka zirya", "ubwatsi.", "   ", "", "Amazi ni meza."]),
    ("block", ["Amazi ni meza.", "Inka zirya\nubwatsi.", "Amazi ni meza."])])
def test_a_text_files_documents_are_the_file_its_lines_or_its_blocks(tmp_path, name, unit, wanted):
    file = write(tmp_path / name, TXT)
    assert [p.text for p in readers.read_documents(file, unit)] == wanted
    assert readers.detect_document_unit(file) == "block"


@pytest.mark.parametrize("raw, unit", [
    (b"one", "file"), (b"one\n", "file"), (b"\n\none\n\n", "file"), (b"one\ntwo", "line"),
    (b"one\n\ntwo", "block"), (b"one\n \r\ntwo", "block")])
def test_what_a_document_is_follows_from_blank_lines(tmp_path, raw, unit):
    assert readers.detect_document_unit(write(tmp_path / "x.txt", raw)) == unit


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_a_jsonl_gives_its_text_whatever_is_in_it(tmp_path, suffix):
    texts = ["Amazi", "two\nlines", "\u2028 \ufeff é", "", "n’umwana\t"]
    lines = [json.dumps({"id": i, "text": t}, ensure_ascii=i > 2) for i, t in enumerate(texts)]
    file = write(tmp_path / f"x.jsonl{suffix}", "\r\n\n".join(lines).encode())
    assert [p.text for p in readers.read_documents(file)] == texts
    assert [p.n_bytes for p in readers.read_documents(file)] == [len(t.encode()) for t in texts]
    assert readers.read_texts(file) == [t for t in texts if t]


@pytest.mark.parametrize("line", [
    '{"text": "a"}', ' \t{"text": "a"}\r ', '{"text": "a"} {"text": "b"}', '{"text": "a"},', "[1]",
    '\ufeff{"text": "a"}', '\u00a0{"text": "a"}', '{"text": "a"}\u00a0', '{"text": "a"', '"text"',
    '{"text": "a", "text": "b"}', '{"text": "a\tb"}', '{"text": NaN}', '{"text": 1}', "nul", "{}"])
def test_a_line_is_read_as_json_loads_reads_it(tmp_path, line):
    file = write(tmp_path / "x.jsonl", b'{"text": ""}\n' + line.encode())
    try:
        wanted = json.loads(line)["text"]
        assert isinstance(wanted, str)
    except (ValueError, KeyError, TypeError, AssertionError):
        with pytest.raises(UserError, match="line 2: "):
            list(readers.read_documents(file))
    else:
        assert [p.text for p in readers.read_documents(file)] == ["", wanted]


def test_half_a_surrogate_pair_in_a_jsonl_is_counted_as_undecodable(tmp_path, tok):
    raw = b'{"text": "\\ud800"}\n{"text": "Amazi"}\n{"text": "\xff"}\n'
    file = write(tmp_path / "x.jsonl", raw)
    bin, ledger = prepare_text([str(file)], tok, tmp_path / "bin", on_bad="skip")
    assert ledger.documents == {"read": 3, "undecodable": 2, "kept": 1}
    adds_up(ledger, bin)


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_a_tsv_gives_the_column_of_that_name(tmp_path, suffix):
    file = write(tmp_path / f"x.tsv{suffix}", "\ufeffid\tkin\n1\tAmazi \"ni\" meza\n2\t\n".encode())
    assert [p.text for p in readers.read_documents(file, key="kin")] == ['Amazi "ni" meza', ""]
    assert [p.text for p in readers.read_documents(file, key="id")] == ["1", "2"]


def test_a_parquet_gives_the_column_of_that_name_in_order(tmp_path):
    texts = [f"Amazi {i}" for i in range(3000)] + [None, "é\u2028"]
    pyarrow.parquet.write_table(pyarrow.table({"n": list(range(3002)), "kin": texts}),
                                tmp_path / "x.parquet", row_group_size=700)
    pieces = list(readers.read_documents(tmp_path / "x.parquet", key="kin"))
    assert [p.text for p in pieces] == [t or "" for t in texts]
    assert [p.n_bytes for p in pieces] == [len((t or "").encode()) for t in texts]


def test_a_parquet_cell_that_is_not_utf8_is_counted(tmp_path):
    raw = pyarrow.array([b"Amazi", b"\xff\xfe", b"meza"], pyarrow.binary())
    pyarrow.parquet.write_table(pyarrow.table({"text": raw.view(pyarrow.string())}),
                                tmp_path / "x.parquet")
    pieces = list(readers.read_documents(tmp_path / "x.parquet"))
    assert [p.fault for p in pieces] == ["", "undecodable", ""]
    assert [p.n_bytes for p in pieces] == [5, 2, 4]


def test_only_a_newline_ends_a_line(tmp_path, tok):
    odd = "a\u2028b\u2029c\u0085d\x0be\x0cf\x1cg\rh"
    file = write(tmp_path / "x.txt", f"{odd}\n{odd}x\n".encode())
    assert [p.text for p in readers.read_documents(file, "line")] == [odd, odd + "x"]
    bin, _ = prepare_text([str(file)], tok, tmp_path / "bin")
    assert documents(bin, tok) == [odd, odd + "x"]


@pytest.mark.parametrize("limit", [4, 10, 16])
def test_a_line_too_long_is_counted_and_the_next_one_read(tmp_path, limit):
    for n in range(1, 40):
        file = write(tmp_path / "x.txt", b"a" * n + b"\nb\n" + b"c" * n)
        pieces = list(readers.read_documents(file, "line", max_bytes=limit))
        assert len(pieces) == 3 and pieces[1].text == "b", n
        assert [p.fault for p in pieces] == ["too long" if n + 1 > limit else "", "",
                                             "too long" if n > limit else ""]
        assert pieces[2].n_bytes == n


def test_files_are_found_by_name_folder_and_glob_in_order(tmp_path):
    for name in ("b.txt", "a.jsonl", "c.txt.gz", "d.md", "e.parquet"):
        (tmp_path / name).write_bytes(b"")

    def found(spec: str) -> list[str]:
        return [p.name for p in readers.list_files([str(tmp_path / spec)])]

    assert found("") == ["a.jsonl", "b.txt", "c.txt.gz", "e.parquet"]
    assert found("*.txt*") == ["b.txt", "c.txt.gz"] and found("b.txt") == ["b.txt"]


def words_tokenizer(folder: Path, n: int) -> Path:
    """A tokenizer.json of bytes and words, n in all; the last is `last`. It has no BOS and no EOS.
    """
    vocabulary = {f"w{i}": i for i in range(n - 1)} | {"last": n - 1}
    for i in range(256):
        vocabulary[f"<0x{i:02X}>"] = vocabulary.pop(f"w{i + 4}")
    tok = tokenizers.Tokenizer(tokenizers.models.BPE(
        vocabulary, [], byte_fallback=True, ignore_merges=True))
    tok.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    folder.mkdir()
    tok.save(str(folder / "tokenizer.json"))
    return folder


@pytest.mark.parametrize("n, dtype", [(65_536, "u16"), (65_537, "u32")])
def test_ids_above_two_bytes_take_four_and_none_wraps(tmp_path, n, dtype):
    tok = words_tokenizer(tmp_path / "tok", n)
    file = write(tmp_path / "x.txt", b"w1 last\nlast w65534\n")
    bin, _ = prepare_text([str(file)], tok, tmp_path / "bin")
    assert bin.meta["dtype"] == dtype and bin.meta["vocabulary"] == n
    assert [bin.document(i).tolist() for i in (0, 1)] == [[1, n - 1], [n - 1, 65534]]
    raw = np.fromfile(bin.folder / "tokens.bin", {"u16": "<u2", "u32": "<u4"}[dtype])
    assert raw.tolist() == [1, n - 1, n - 1, 65534]


def test_a_document_of_one_token_is_kept_and_a_corpus_of_them_trains_nothing(tmp_path):
    tok = words_tokenizer(tmp_path / "tok", 300)
    file = write(tmp_path / "x.txt", b"w1\nw2\nw3\n")
    bin, ledger = prepare_text([str(file)], tok, tmp_path / "bin")
    assert ledger.documents["kept"] == len(bin) == 3 and bin.meta["trained"] == 0
    opened = Tokenizer.open(tok)
    with pytest.raises(UserError, match="no token to train on in 3 documents"):
        bin.check(opened.fingerprint, opened.vocab_size)


def test_equal_texts_are_kept_once_whichever_file_they_are_in(tmp_path, tok):
    raw = "Amazi\nInka\nAmazi\nn’inka\nn'inka\n".encode()
    a, b = write(tmp_path / "a.txt", raw), write(tmp_path / "b.txt", raw)
    bin, ledger = prepare_text([str(a), str(b)], tok, tmp_path / "bin", normalise=CLEAN)
    assert documents(bin, tok) == ["Amazi", "Inka", "n'inka"]
    assert ledger.documents == {"read": 10, "kept": 3, "duplicate": 7}
    assert ledger.changes == {"nfc": 0, "apostrophe": 2, "spaces": 0}
    bin, ledger = prepare_text([str(a)], tok, tmp_path / "all", keep_duplicates=True)
    assert len(bin) == 5 and ledger.documents["kept"] == 5


def test_a_failure_leaves_the_old_bin_and_nothing_beside_it(tmp_path, tok):
    good = write(tmp_path / "good.txt", b"Amazi\nInka\n")
    prepare_text([str(good)], tok, tmp_path / "bin")
    contents = {p: p.read_bytes() for p in (tmp_path / "bin").iterdir()}
    bad = write(tmp_path / "bad.jsonl", b'{"text": "Amazi"}\n{"text": 3}\n')
    for processes in (1, 2):
        with pytest.raises(UserError, match=r"bad\.jsonl, line 2: no text under 'text'"):
            prepare_text([str(good), str(bad)], tok, tmp_path / "bin",
                         workers=Workers(processes))
    assert {p: p.read_bytes() for p in (tmp_path / "bin").iterdir()} == contents
    assert sorted(p.name for p in tmp_path.iterdir()) == ["bad.jsonl", "bin", "good.txt"]


def test_an_evaluations_texts_leave_nothing_out(tmp_path):
    file = write(tmp_path / "a.txt", b"Amazi\n\nInka\n")
    assert readers.read_texts(file, "line") == ["Amazi", "Inka"]
    for raw, why in ((b"Amazi\n\xff\n", "document 2 is undecodable"), (b"\n \n", "no text in it")):
        with pytest.raises(UserError, match=why):
            readers.read_texts(write(tmp_path / "b.txt", raw), "line")


# The command itself, in processes of its own.


def call(*args: object, code: int = 0) -> tuple[str, str]:
    """What `python prepare.py ...` puts out and says, having ended with that code."""
    command = [sys.executable, str(ROOT / "prepare.py"), *map(str, args)]
    process = subprocess.run(command, timeout=60, capture_output=True, text=True)
    assert process.returncode == code, process.stderr[-2000:]
    return process.stdout, process.stderr


def test_documents_that_hold_what_a_test_asks_are_left_out_and_counted(tok, tmp_path):
    """As a command with two processes, and as one: the same bin, and no sign of the test in it."""
    questions = ["Amazi y'umugezi ni meza kandi arakonje.",
             "Ejo nzajya i Kigali kureba umuvandimwe wanjye; inka zacu zirya ubwatsi ku musozi, "
             "abana babiri bagiye ku ishuri."]
    write(tmp_path / "asked.txt", "\n".join(questions).encode())
    clean = [f"{s} Numero {i}." for i, s in enumerate(tiny.SENTENCES) if s != questions[0]]
    near = "Mu gitondo amazi y'umugezi ni meza kandi arakonje."  # few words, and not that sentence
    dirty = [f"Yego. {questions[0].upper()} Oya.",
             "Nuko rero ejo nzajya i Kigali kureba umuvandimwe wanjye inka zacu zirya ubwatsi ku "
             "musozi hejuru cyane."]
    lines = [*dirty, near, *clean[:4], dirty[1], *clean[4:]]
    write(tmp_path / "text.txt", "\n".join(lines).encode())
    output, _ = call("text", tmp_path / "text.txt", "--tokenizer", tok, "--out", tmp_path / "two",
                   "--documents", "line", "--without", tmp_path / "asked.txt",
                   "--processes", "2")
    assert re.search(r"contaminated +3 ", output) and re.search(rf"kept +{len(clean) + 1} ", output)
    sought = contamination.index_files([str(tmp_path / "asked.txt")])
    one, ledger = prepare_text([str(tmp_path / "text.txt")], tok, tmp_path / "one", unit="line",
                                 normalise=CLEAN, is_contaminated=sought)
    adds_up(ledger, one)
    assert Bin(tmp_path / "two").meta["ledger"] == ledger.to_json()
    remaining = documents(one, tok)
    assert remaining == documents(Bin(tmp_path / "two"), tok) == [near, *clean]
    tests = {"asked": [[x] for x in questions]}
    assert not contamination.count_contaminated(tests, remaining)["asked"]["any"]


def test_tests_of_every_form_are_sought_by_all_their_texts(tmp_path):
    eng = "The two cows eat grass upon the hill."
    kin = "Inka ebyiri zirya ubwatsi ku musozi muremure."
    row = {"id": 7, "eng": eng, "more": [{"kin": kin}]}
    table = pyarrow.Table.from_pylist([row])
    pyarrow.parquet.write_table(table, tmp_path / "t.parquet")
    for name, text in (("t.tsv", f"eng\tkin\n{eng}\t{kin}\n"), ("one.tsv", f"{eng}\n{kin}\n"),
                       ("none.tsv", f"{eng}\t{kin}\n"), ("t.jsonl", json.dumps(row) + "\n"),
                       ("t.json", json.dumps([row])), ("kin_Latn.devtest", f"{eng}\n{kin}\n"),
                       ("t.txt", f"{eng}\n{kin}\n"), ("t.parquet", None)):
        if text:
            write(tmp_path / name, text.encode())
        sought = contamination.index_files([str(tmp_path / name)])
        assert sought(f"Yego. {eng} Oya.") and sought(f"Yego. {kin} Oya."), name
        assert not sought("Umwana ararira kandi nyina aramuhoza buri munsi."), name
    for name, raw, wanted in (("x.devtest", b"a\n\xff\n", "x.devtest, line 2: byte 0 is not UTF-8"),
                              ("y.jsonl", b'{"n": 1}\n', "y.jsonl: no text in it"),
                              ("no*.devtest", None, "no such file")):
        if raw:
            write(tmp_path / name, raw)
        with pytest.raises(UserError, match=wanted):
            contamination.index_files([f"{tmp_path}/{name}"])


@pytest.mark.parametrize("spec", ["t.csv", "t.csv.gz", "", "*.csv*"])
def test_a_csvs_cells_are_sought_one_by_one(tmp_path, spec):
    """As Python's csv writes them, quoted where a comma, a quote or a newline is in them."""
    cells = ['Urebye, ntabwo nigeze "ntekereza" kuribyo rwose',
             "Inka ebyiri zirya ubwatsi\nku musozi", "Abana babiri bagiye ku ishuri none"]
    out = io.StringIO()
    csv.writer(out).writerows([["premise", "hypothesis", "label"], cells])
    write(tmp_path / ("t.csv.gz" if "gz" in spec else "t.csv"), out.getvalue().encode())
    sought = contamination.index_files([f"{tmp_path}/{spec}"])
    assert sought(f"Yego. {cells[0]}.") and sought(cells[2]) and not sought(" ".join(cells[1:]))
    assert contamination.words_of(cells[1]) in sought.sentences


def test_prepare_text_show_vocab_and_fertility_work_together(tmp_path):
    file = tmp_path / "kin.txt"
    file.write_text("\n".join(f"{x} n’{i}  a" for i, x in enumerate(tiny.SENTENCES * 20)) + "\n")
    out, _ = call("vocab", file, "--out", tmp_path / "tok", "--size", 400)
    assert "400 pieces, fingerprint " in out
    out, messages = call("text", file, "--tokenizer", tmp_path / "tok", "--out", tmp_path / "bin",
                     "--processes", 2)
    assert "kin.txt: a document is a line (detected; set another with --documents)" in messages
    assert re.search(r"read +200 .*\nkept +200 ", out) and "200 documents" in out
    assert "normalised: spaces, 200 places" in out
    out, _ = call("show", tmp_path / "bin", "--tokenizer", tmp_path / "tok", "--n", 2)
    assert "-- document 1" in out and tiny.SENTENCES[1] in out and "\x1b" not in out
    out, _ = call("fertility", file, "--tokenizers", tmp_path / "tok")
    assert re.search(r"kin.txt +tok +\d\.\d\d +\d\.\d\d", out)


def test_what_a_tokenizer_is_learned_from_is_accounted_for(tmp_path, capsys):
    lines = [f"{x} {i}".encode() for i in range(110) for x in tiny.SENTENCES]
    file, settings = tmp_path / "x.txt", prepare.Vocab([f"{tmp_path}/x.*"], f"{tmp_path}/tok", 400)
    write(file, b"\n".join([*lines, b"\xff", b""]))
    prepare.vocab(settings)
    assert re.search(r"read +1,101 .*\nkept +1,100 .*\nundecodable +1 ", capsys.readouterr().out)
    write(file, b"\n".join([*lines, b"\xff", b"\xff", b""]))
    with pytest.raises(UserError, match=r"^/.*x\.\*: 2 of 1102 documents are not UTF-8, more than"):
        prepare.vocab(settings)
    file.unlink()
    write(tmp_path / "x.jsonl", b'{"text": "Inka"}\n{"body": "Amazi"}\n')
    with pytest.raises(UserError, match=r"^/.*x\.jsonl, line 2: no text under 'text'"):
        prepare.vocab(settings)


def columns(**cells: list) -> bytes:
    """A parquet file of these columns; a name may end in _, which it then has not."""
    out, names = pyarrow.BufferOutputStream(), [x.rstrip("_") for x in cells]
    table = pyarrow.Table.from_arrays(list(map(pyarrow.array, cells.values())), names)
    pyarrow.parquet.write_table(table, out)
    return out.getvalue().to_pybytes()


BAD = {  # file, what it holds, flags, exit code, what the one line says
    "no such file": (None, b"", [], 3, "no such file"),
    "the hub": ("hf:org/data", b"", [], 2, "expected hf:org/name/glob"),
    "a kind not known": ("x.pdf", b"%PDF", [], 3, "unknown kind of file"),
    "empty": ("x.txt", b"", [], 3, "no document left of 0 read"),
    "blank": ("x.txt", b" \n\n \n", [], 3, "no document left"),
    "not UTF-8": ("x.txt", b"a\n\xff\n", [], 3, "1 of 2 documents are not UTF-8"),
    "binary": ("x.txt", b"\0\1" * 99, [], 3, "x.txt: binary, not text"),
    "UTF-16": ("x.txt", ("Amazi ni meza. " * 9).encode("utf-16"), [], 3, "x.txt: binary"),
    "no gzip": ("x.txt.gz", b"plain text\n", [], 3, "not a whole gzip file"),
    "bad gzip": ("x.txt.gz", gzip.compress(b"a")[:10] + b"\xff" * 99, [], 3, "not a whole gzip"),
    "half a gzip": ("x.txt.gz", gzip.compress(os.urandom(9999))[:999], [], 3, "not a whole gzip"),
    "not JSON": ("x.jsonl", b'{"text": "a"}\n{"te', [], 3, "x.jsonl, line 2: not JSON"),
    "deep JSON": ("x.jsonl", b"[" * 99999, [], 3, "x.jsonl, line 1: not JSON"),
    "another key": ("x.jsonl", b'{"body": "a"}', [], 3, "line 1: no text under 'text'"),
    "no object": ("x.jsonl", b'["text"]', [], 3, "line 1: no text under 'text'"),
    "no text": ("x.jsonl", b'{"text": null}', [], 3, "line 1: no text under 'text'"),
    "no column": ("x.tsv", b"id\tkin\n1\ta\n", [], 3, "no column 'text'"),
    "a cell too many": ("x.tsv", b"id\ttext\n1\ta\tb\n", [], 3, "line 2: 3 columns, expected 2"),
    "no parquet": ("x.parquet", b"PAR1 no", [], 3, "not a parquet file"),
    "no text column": ("x.parquet", columns(text=[1, 2]), [], 3,
                       "column 'text' is int64, expected text"),
    "no column, parquet": ("x.parquet", columns(kin=["a"]), ["--text-key", ""], 3, "no column ''"),
    "a packed parquet": ("x.parquet.gz", gzip.compress(columns(text=["a"])), [], 3,
                         "x.parquet.gz: unknown kind of file"),
    "two columns": ("x.tsv", b"text\ttext\na\tb\n", [], 3, "x.tsv: two columns are called 'text'"),
    "two columns, parquet": ("x.parquet", columns(text=["a"], text_=["b"]), [], 3,
                             "x.parquet: two columns are called 'text'"),
    "no megabyte": ("x.txt", b"a\n", ["--max-doc-mb", "0"], 2, "--max-doc-mb 0: expected 1 or"),
    "no step": ("x.txt", b"a\n", ["--normalise", "magic"], 2, "--normalise magic: no such step"),
    "no flag": ("x.txt", b"a\n", ["--sise", "3"], 2, "--sise"),
    "no number": ("x.txt", b"a\n", ["--min-chars", "many"], 2, "--min-chars"),
    "no tokenizer": ("x.txt", b"a\n", ["--tokenizer", "nowhere"], 3, "no tokenizer.json"),
    "not a bin": ("x.txt", b"a\n", ["--out", "."], 5, "exists and is not a bin"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_input_is_one_line_and_an_exit_code(tmp_path, tok, name):
    file, raw, flags, code, why = BAD[name]
    if file and not file.startswith("hf:"):
        (tmp_path / file).write_bytes(raw)
        file = str(tmp_path / file)
    args = ["text", file or str(tmp_path / "none.txt"), "--processes", 1, *flags]
    for flag, value in (("--tokenizer", tok), ("--out", tmp_path / "bin")):
        args += [flag, value] if flag not in flags else []
    _, message = call(*args, code=code)
    # lines that begin with a path say what a document is
    errors = [x for x in message.splitlines() if not x.startswith(str(tmp_path))]
    assert len(errors) == 1 and errors[0].startswith("error: ") and why in errors[0]
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".tmp") or p.name == "bin"]


@pytest.mark.parametrize("args, code, why", [
    (["txet"], 2, "unknown command 'txet'; did you mean text?"),
    (["show", "nowhere", "--tokenizer", "TOK"], 3, "it has no meta.json"),
    (["vocab", "x.txt", "--out", "o", "--size", "100000"], 3, "no such file"),
    (["fertility", "--tokenizers", "TOK"], 2, "fertility")])
def test_a_bad_command_is_one_line_too(tok, args, code, why):
    message = call(*(str(tok) if x == "TOK" else x for x in args), code=code)[1]
    assert message.count("\n") == 1 and message.startswith("error: ") and why in message


# Cleaning.

TEXT = st.text(st.one_of(st.sampled_from(" \t\n\r\u00a0\u200b\ufeff’‘ʼ`´'ane\u0301İ"),
                         st.characters(exclude_categories=["Cs"])))


@quick(max_examples=500)
@given(text=TEXT)
def test_cleaning_twice_changes_nothing_more(text):
    once, _ = CLEAN(text)
    assert CLEAN(once) == (once, dict.fromkeys(STEPS, 0))


@quick(max_examples=300)
@given(text=TEXT, step=st.sampled_from(sorted(STEPS)))
def test_a_step_counts_just_when_it_changes(text, step):
    once, n = STEPS[step](text)
    assert (n > 0) == (once != text)
    assert STEPS[step](once) == (once, 0)


def plain(text: str, step: str) -> tuple[str, int]:
    """A step of cleaning, character after character."""
    if step == "nfc":
        return unicodedata.normalize("NFC", text), unicodedata.normalize("NFC", text) != text
    if step == "apostrophe":
        elided = [a.isalnum() > a.isdecimal() and b in "’‘ʼ`´" and c.isalnum() > c.isdecimal()
                  for a, b, c in zip(" " + text, text, text[1:] + " ", strict=False)]
        return "".join("'" if e else b for e, b in zip(elided, text, strict=True)), sum(elided)
    visible = [c for c in text if c not in "\u200b\u200c\u200d\u2060\ufeff\u00ad"]
    even, n = "", len(text) - len(visible)
    for blank, run in groupby(visible, lambda c: c.isspace() and c != "\n"):
        one = "".join(run)
        n += blank and one != " "
        even += " " if blank else one
    lines = even.split("\n")
    n += sum(x == " " or x.startswith(" ") + x.endswith(" ") for x in lines)
    short = ""
    for newline, run in groupby("\n".join(x.strip(" ") for x in lines), lambda c: c == "\n"):
        one = "".join(run)
        n += newline and len(one) > 2
        short += one[:2] if newline else one
    return short, n


@quick(max_examples=1000)
@given(text=TEXT | st.text(" \n\ta\u00a0\u200b"), step=st.sampled_from(sorted(STEPS)))
def test_a_step_does_and_counts_what_it_does_character_after_character(text, step):
    assert STEPS[step](text) == plain(text, step)


@quick(max_examples=300)
@given(text=TEXT)
def test_cleaned_text_has_no_blank_to_spare_and_loses_no_letter(text):
    clean, _ = CLEAN(text)
    assert not re.search(r"[^\S\n ]|  | \n|\n |^ | $|\n\n\n", clean)
    assert unicodedata.is_normalized("NFC", clean)

    def letters(x: str) -> str:
        return "".join(c for c in unicodedata.normalize("NFC", x) if c.isalnum())

    assert letters(clean) == letters(INVISIBLE.sub("", text))


@pytest.mark.parametrize("text, wanted", [
    ("n’umwana, n‘umwana, nʼumwana, n`umwana, n´umwana", ", ".join(["n'umwana"] * 5)),
    ("’umwana’ ‘mu’ 5’6 a’ ’b", "’umwana’ ‘mu’ 5’6 a’ ’b"), ("n’”a", "n’”a"), ("é’ê", "é'ê")])
def test_only_a_mark_between_two_letters_is_an_elision(text, wanted):
    assert STEPS["apostrophe"](text)[0] == wanted


def test_an_unknown_step_names_the_known_ones():
    with pytest.raises(UserError, match="--normalise lower: no such step; there are "):
        normaliser(["nfc", "lower"], STEPS)
