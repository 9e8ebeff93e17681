"""Bins and the loader: nothing lost, nothing twice, shares exact, the same rows for any number of
ranks."""

from __future__ import annotations

import hashlib
import json
import os
import resource
import shutil
import tracemalloc
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data import IGNORE, Bin, Loader, Source, TokenStream, sha256, validation_split
from helpers import tiny
from preparation.bin_writer import BinWriter
from preparation.specs import bin_name
from runtime.console import UserError
from tokenization.document import Document
from tokenization.tokenizer import Tokenizer
from training import datasets


def make(folder: Path, documents, vocab: int = 60000, masks=None, kind: str = "text") -> Bin:
    """A bin of the given lists of ids."""
    writer = BinWriter(folder, "a" * 64, vocab, kind)
    for i, ids in enumerate(documents):
        writer.add(Document(ids, masks[i] if masks else None, len(ids)))
    return writer.close({"documents": {}}, [])


def unique(lengths) -> list[list[int]]:
    """Documents whose ids are all different, so that a prediction names itself."""
    ends = np.cumsum(lengths)
    return [list(range(int(e - n), int(e))) for n, e in zip(lengths, ends, strict=True)]


@pytest.mark.parametrize(
    "vocab, dtype", [(65535, "<u2"), (65536, "<u2"), (65537, "<u4"), (128256, "<u4")])
def test_a_bin_is_read_by_three_lines_of_numpy(tmp_path, vocab, dtype):
    documents = [[1, vocab - 1, 2], [1, 2], [5]]
    make(tmp_path / "b", documents, vocab)
    meta = json.loads((tmp_path / "b/meta.json").read_text())
    tokens = np.memmap(tmp_path / "b/tokens.bin", {"u16": "<u2", "u32": "<u4"}[meta["dtype"]], "r")
    starts = np.fromfile(tmp_path / "b/starts.bin", "<i8")
    assert tokens.dtype == np.dtype(dtype)
    assert [tokens[a:b].tolist() for a, b in pairwise(starts)] == documents
    assert meta["documents"] == 3 and meta["tokens"] == 6 and meta["trained"] == 3
    assert not (tmp_path / "b/mask.bin").exists(), "all is trained: the file would say nothing"


def test_a_mask_is_kept_where_something_is_not_trained(tmp_path):
    bin = make(tmp_path / "b", [[1, 5, 6, 2], [1, 7, 2]], masks=[[0, 0, 1, 1], [0, 1, 1]])
    assert bin.mask.tolist() == [0, 0, 1, 1, 0, 1, 1] and bin.meta["trained"] == 4
    targets = np.concatenate([TokenStream(Source("b", bin, np.arange(2), 1), 8, (0, 0)).row(0)[1]])
    assert sorted(targets.tolist()) == sorted([IGNORE, 6, 2, 7, 2, IGNORE, IGNORE, IGNORE])


BROKEN = {
    "tokens cut short": (lambda f: (f / "tokens.bin").write_bytes(b"\0" * 3),
                         "3 bytes, expected 14"),
    "starts cut short": (lambda f: (f / "starts.bin").write_bytes(b"\0" * 8),
                         "8 bytes, expected 24"),
    "no tokens": (lambda f: (f / "tokens.bin").unlink(), "0 bytes, expected 14"),
    "no meta": (lambda f: (f / "meta.json").unlink(), "not a bin"),
    "meta that is no JSON": (lambda f: (f / "meta.json").write_text("{"), "damaged"),
    "another format": (lambda f: (f / "meta.json").write_text(
                           (f / "meta.json").read_text().replace('"format": 1', '"format": 9')),
                       "bin format 9"),
    "starts that do not fit": (lambda f: np.array([0, 9, 7], "<i8").tofile(f / "starts.bin"),
                               "do not fit"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_damaged_bin_is_refused_in_one_line(tmp_path, name):
    make(tmp_path / "b", [[1, 5, 6, 2], [1, 7, 2]])
    damage, word = BROKEN[name]
    damage(tmp_path / "b")
    with pytest.raises(UserError, match=word):
        Bin(tmp_path / "b")


def test_a_bin_is_checked_against_tokenizer_vocabulary_and_its_own_sums(tmp_path):
    bin = make(tmp_path / "b", [[1, 5, 50, 2]], vocab=100)
    bin.check("a" * 64, 51)
    with pytest.raises(UserError, match="tokenizer"):
        bin.check("b" * 64, 100)
    with pytest.raises(UserError, match="holds id 50, but the model's last id is 49"):
        bin.check("a" * 64, 50)
    raw = bytearray((tmp_path / "b/tokens.bin").read_bytes())
    raw[2] ^= 1
    (tmp_path / "b/tokens.bin").write_bytes(raw)
    with pytest.raises(UserError, match="sha256"):
        Bin(tmp_path / "b").check("a" * 64, 100)
    with pytest.raises(UserError, match="no token to train on"):
        make(tmp_path / "one", [[1], [2]]).check("a" * 64, 60000)


def test_a_folder_that_is_no_bin_is_never_replaced(tmp_path):
    (tmp_path / "home").mkdir()
    (tmp_path / "home/letter.txt").write_text("dear")
    with pytest.raises(UserError, match="not a bin"):
        BinWriter(tmp_path / "home", "a" * 64, 100)
    assert (tmp_path / "home/letter.txt").exists()


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 30), min_size=1, max_size=20).filter(lambda x: max(x) > 1),
       st.integers(2, 17), st.integers(0, 5), st.integers(0, 3))
def test_every_prediction_of_every_document_comes_once_in_each_epoch(tmp_path_factory, lengths, T,
                                                                     seed, epoch):
    bin = make(tmp_path_factory.mktemp("bin") / "b", unique(lengths))
    stream = TokenStream(Source("b", bin, np.arange(len(bin)), 1), T, (seed, 0))
    predictions = []
    for i in range(epoch * stream.rows, (epoch + 1) * stream.rows):
        tokens, targets, doc, pos = stream.row(i)
        inside = doc >= 0
        assert (targets[~inside] == IGNORE).all() and (
            np.flatnonzero(inside) == np.arange(inside.sum())).all()
        assert (targets[inside] == tokens[inside] + 1).all(), "the next id of the same document"
        begins = np.r_[True, np.diff(doc[inside]) != 0]
        assert (pos[inside][begins] == 0).all() and (np.diff(pos[inside])[~begins[1:]] == 1).all()
        predictions += tokens[inside].tolist()
    wanted = [i for ids in unique(lengths) for i in ids[:-1]]
    assert sorted(predictions) == wanted
    assert stream.tokens_in((epoch + 1) * stream.rows) == (epoch + 1) * len(wanted)


def two(folder: Path) -> list[Source]:
    draw = np.random.default_rng(0)
    bins = [make(folder / n, unique(draw.integers(2, 40, k))) for n, k in (("a", 50), ("b", 7))]
    return [Source(b.folder.name, b, np.arange(len(b)), w)
            for b, w in zip(bins, (3.0, 1.0), strict=True)]


@settings(max_examples=20, deadline=None)
@given(st.floats(0.05, 20), st.integers(2, 40), st.integers(1, 120))
def test_shares_are_exact_to_one_row_at_every_moment(tmp_path_factory, weight, T, rows):
    sources = two(tmp_path_factory.mktemp("mix"))
    sources[0].weight, sources[1].weight = weight, 1.0
    loader = Loader(sources, T, 1, seed=1)
    for _ in range(rows):
        loader.next()
        for share, n in zip(loader.shares, loader.tokens, strict=True):
            assert abs(n - share * sum(loader.tokens)) <= T


def test_seeking_gives_what_walking_gives(tmp_path):
    sources = two(tmp_path)
    walked = Loader(sources, 16, 2, seed=3)
    for _ in range(57):  # well into later epochs of the small source
        walked.next()
    sought = Loader(sources, 16, 2, seed=3)
    sought.seek(walked.rows_consumed)
    assert sought.tokens == walked.tokens
    for _ in range(9):
        one, other = walked.next(), sought.next()
        assert (one.tokens == other.tokens).all() and (one.doc == other.doc).all()


@pytest.mark.parametrize("world, rows", [(1, 8), (2, 4), (2, 2), (4, 2), (1, 1)])
def test_a_step_holds_the_same_rows_on_any_number_of_ranks(tmp_path, world, rows):
    sources = two(tmp_path)

    def step(world: int, rows: int) -> list[list[int]]:
        rows_by_rank = {}
        for rank in range(world):
            loader = Loader(sources, 16, rows, seed=3, rank=rank, world=world)
            for micro in range(8 // (rows * world)):
                for i, row in enumerate(loader.next().tokens.tolist()):
                    rows_by_rank[micro, rank, i] = row
        return [rows_by_rank[k] for k in sorted(rows_by_rank)]

    assert step(world, rows) == step(1, 8)


def test_another_seed_is_another_order_and_the_same_seed_the_same(tmp_path):
    sources = two(tmp_path)
    first = [Loader(sources, 16, 4, seed=s).next().tokens.tolist() for s in (1, 1, 2)]
    assert first[0] == first[1] != first[2]


def test_a_held_out_document_stays_held_out_when_others_come(tmp_path):
    draw = np.random.default_rng(1)
    documents = [draw.integers(0, 1000, 20).tolist() for _ in range(400)]
    few, many = make(tmp_path / "few", documents[:200]), make(tmp_path / "many", documents)
    split_of_few, split_of_many = validation_split(few, 0.05), validation_split(many, 0.05)
    assert (split_of_many[:200] == split_of_few).all() and 0 < split_of_many.sum() < 60
    two, one = make(tmp_path / "two", documents[:2]), make(tmp_path / "one", documents[:1])
    assert validation_split(two, 1e-9).sum() == 1, "never none of several"
    assert validation_split(one, 0.5).sum() == 0, "never the only one"


def test_conversations_under_one_long_system_prompt_are_held_out_by_what_is_asked(tmp_path):
    """Sides are those of the hash itself, of the first 64 tokens or of all before an answer."""
    draw = np.random.default_rng(2)

    def said(n: int) -> list[int]:
        return draw.integers(1, 1000, n).tolist()

    def sides(documents: list[list[int]], ends: list[int]) -> list[bool]:
        h = [int.from_bytes(hashlib.blake2b(np.array(x[:n], "<u2").tobytes(),
                                            digest_size=8).digest(), "little")
             for x, n in zip(documents, ends, strict=True)]
        return [x <= max(int(0.05 * 2**64), min(h)) for x in h]

    for systems in ([said(100)], [said(70), said(80)], [said(3)]):
        prompts = [systems[i % len(systems)] + said(5) for i in range(400)]
        twice = [x for x in prompts for _ in range(2)]
        answered = [x + said(4) for x in twice]
        masks = [[0] * len(x) + [1] * 4 for x in twice]
        name = str(len(systems[0]))
        ends = [max(64, len(x)) for x in twice]
        chat = make(tmp_path / name, answered, masks=masks, kind="chat")
        is_held_out = validation_split(chat, 0.05)
        assert is_held_out.tolist() == sides(answered, ends)
        assert 10 < is_held_out.sum() < 80
        if len(systems[0]) > 64:
            assert (is_held_out[::2] == is_held_out[1::2]).all(), "one question lies on one side"
        both = make(tmp_path / f"{name}-pairs", answered, masks=masks, kind="pairs")
        assert validation_split(both, 0.05)[::2].tolist() == sides(answered[::2], ends[::2])
        every = make(tmp_path / f"{name}-all", answered, kind="chat")  # --loss-on all
        assert validation_split(every, 0.05).tolist() == sides(answered, [999] * 800)
        text = make(tmp_path / f"{name}-text", answered)
        assert validation_split(text, 0.05).any() == (len(systems) > 1 or len(systems[0]) < 64)
        if validation_split(text, 0.05).any():
            assert validation_split(text, 0.05).tolist() == sides(answered, [64] * 800)


def test_what_holds_nothing_out_is_said_as_it_is(tmp_path, capsys):
    def opened(bin: Bin) -> str:
        s = SimpleNamespace(data=[str(bin.folder)], val=[], hold_out=0.1, seq_len=64, mode="cpt",
                            eval_tokens=99)
        datasets.open_data(s, tmp_path, SimpleNamespace(fingerprint="a" * 64), 60000,
                          tmp_path, None)
        return capsys.readouterr().err

    assert "one: one document, so none" in opened(make(tmp_path / "one", [[1, 2, 3]]))
    alike = [[*range(64), i] for i in range(70, 90)]
    assert "all: all 20 documents begin alike" in opened(make(tmp_path / "all", alike))


@pytest.mark.parametrize(("spec", "kind"), [
    ("val.txt", "text"), ("val.txt.gz", "text"), ("val/*.txt", "text"), ("val.jsonl.gz", "chat")])
def test_held_out_text_is_text_in_every_mode_packed_or_not(spec, kind, tmp_path):
    for name in ("chat", "text"):
        make(tmp_path / name, [[1, 2, 3]] * 9, kind=name, masks=[[0, 1, 1]] * 9)
    assert datasets.kind_of_val(spec, "chat") == kind
    s = SimpleNamespace(data=[f"{tmp_path}/chat"], val=[f"kin={tmp_path}/{kind}"], hold_out=0.1,
                        seq_len=64, mode="sft", eval_tokens=99)
    tokenizer = SimpleNamespace(fingerprint="a" * 64, bos=1, eos=3)
    _, val_sets = datasets.open_data(s, tmp_path, tokenizer, 60000, tmp_path, None)
    assert isinstance(val_sets["kin"][0], Document) == (kind == "chat")


def test_held_out_texts_of_one_file_name_have_bins_of_their_own(tmp_path, capfd):
    folder = tmp_path / "model"
    tiny.write_tokenizer(folder)
    for name in ("kin", "eng", "more"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "val.txt").write_text(f"Inka {name}\nAmazi {name}\n" * 20)
    s = SimpleNamespace(data=[str(tmp_path / "more/val.txt")], hold_out=0.1, seq_len=64,
                        val=[f"{x}={tmp_path / x}/val.txt" for x in ("kin", "eng")], mode="cpt",
                        eval_tokens=999)
    tokenizer, ranks = Tokenizer.open(folder), SimpleNamespace(rank=0, barrier=lambda: None)
    for prepared in (3, 0):  # once, and not again
        _, val_sets = datasets.open_data(s, folder, tokenizer, 60000, tmp_path / "out", ranks)
        assert {k: tokenizer.decode(x[0].tolist()) for k, x in val_sets.items()} == {
            "kin": "Inka kin", "eng": "Inka eng"}
        assert capfd.readouterr().err.count("preparing: ") == prepared


@pytest.mark.parametrize(("spec", "name"), [
    ("kin/*.txt", "kin"), ("a/eng/**/*.jsonl", "eng"), ("*.txt", "text"), ("x/rw wiki.v1.txt",
    "rw_wiki"), ("hf:org/data/*.parquet", "data"), ("kin*.txt", "kin_"), ("2024.txt", "2024")])
def test_a_source_is_called_as_its_file_or_its_folder(spec, name):
    assert bin_name(spec) == name


@pytest.mark.parametrize("kind", ["chat", "pairs"])
def test_a_bin_made_for_another_row_is_fresh_only_where_its_examples_fit_both(tmp_path, kind):
    file = tmp_path / "x.jsonl"
    file.write_text("{}\n")
    tokenizer = SimpleNamespace(fingerprint="a" * 64)
    longest = 20 if kind == "pairs" else 10  # predictions of the longest example

    def fresh(seq_len: int, ledger: dict) -> bool:
        writer = BinWriter(tmp_path / "bin", "a" * 64, 99, kind)
        for n in (4, 4, 11, 11):
            writer.add(Document(range(n), [0] + [1] * (n - 1), n))
        writer.close(ledger, [{"path": str(file), "bytes": 3, "sha256": sha256(file)}])
        return datasets.is_fresh(tmp_path / "bin", str(file), tokenizer, kind, seq_len)

    complete, dropped = {"documents": {"read": 4}}, {"documents": {"read": 5, "too long": 1}}
    assert fresh(longest, complete) and fresh(999, complete) and not fresh(longest - 1, complete)
    assert fresh(longest, {**dropped, "max_tokens": longest})
    for options in ({}, {"max_tokens": longest}):  # what was too long may fit now
        assert not fresh(999, {**dropped, **options})


def test_a_file_changed_to_one_as_long_and_as_old_is_prepared_again(tmp_path):
    file = tmp_path / "x.txt"
    file.write_text("Amazi\n")
    writer = BinWriter(tmp_path / "bin", "a" * 64, 99)
    writer.add(Document([1, 5, 2], None, 5))
    writer.close({}, [{"path": str(file), "bytes": 6, "sha256": sha256(file)}])

    def fresh() -> bool:
        return datasets.is_fresh(tmp_path / "bin", str(file), SimpleNamespace(fingerprint="a" * 64),
                                "text", 8)

    assert fresh()
    was = file.stat()
    file.write_text("Inkas\n")
    os.utime(file, ns=(was.st_atime_ns, was.st_mtime_ns))
    assert not fresh()
    file.write_text("Amazi\n")
    assert fresh(), "touched, and the same"


@pytest.mark.parametrize("other", ["k.n", "k_n", ""])
def test_two_held_out_texts_of_one_name_are_refused(tmp_path, other):
    for name in ("a", "b"):
        make(tmp_path / name, [[1, 2, 3]])
    s = SimpleNamespace(data=[f"{tmp_path}/a"], hold_out=0.1, seq_len=64, mode="cpt",
                        eval_tokens=99, val=[f"k.n={tmp_path}/a", f"{other}={tmp_path}/b"])
    tokenizer = SimpleNamespace(fingerprint="a" * 64, bos=1, eos=3)
    with pytest.raises(UserError, match="another one is called" if other else "NAME=SPEC") as e:
        datasets.open_data(s, tmp_path, tokenizer, 60000, tmp_path, None)
    assert e.value.code == 2


def test_a_source_of_one_token_documents_is_refused(tmp_path):
    bin = make(tmp_path / "b", [[1], [2]])
    with pytest.raises(UserError, match="no token to train on"):
        Loader([Source("b", bin, np.arange(2), 1)], 8, 1, seed=1)


def test_a_writer_that_gives_up_leaves_nothing(tmp_path):
    writer = BinWriter(tmp_path / "b", "a" * 64, 100)
    writer.add(Document([1, 2], None, 1))
    writer.abandon()
    assert list(tmp_path.iterdir()) == []
    shutil.rmtree(tmp_path)


@pytest.mark.parametrize("mask", [None, [1] * 500])
def test_a_writer_that_gives_up_leaves_nothing_on_a_full_disk_either(tmp_path, mask):
    """A limit on a file's size is refused as a full disk is; what is left in a buffer stays there.
    """
    writer = BinWriter(tmp_path / "b", "a" * 64, 100)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
        with pytest.raises(OSError, match="too large"):
            for _ in range(100):
                writer.add(Document([1] * 500, mask, 1))
        writer.abandon()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list(tmp_path.iterdir()) == []


def test_a_bin_is_written_beside_what_a_killed_one_left(tmp_path):
    """In a container every run has the same process number."""
    for _ in range(2):
        BinWriter(tmp_path / "b", "a" * 64, 100).add(Document([1, 2], None, 1))
    assert len(make(tmp_path / "b", [[1, 2, 3]])) == 1
    (tmp_path / "plain").mkdir()
    assert (tmp_path / "b").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_a_writer_holds_few_bytes_for_a_document(tmp_path):
    writer, n = BinWriter(tmp_path / "b", "a" * 64, 100), 1000
    writer.extend(np.ones(n, int), np.ones(n, int), n)
    tracemalloc.start()
    try:
        for _ in range(50):
            writer.extend(np.ones(n, int), np.ones(n, int), n)
        n_bytes, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert n_bytes < 12 * 50 * n
    assert len(writer.close({}, [])) == 51 * n
