"""Our ids against sentencepiece's and tokenizers' own, and bytes against the text's."""

from __future__ import annotations

import base64
import functools
import gc
import json
import os
import pickle
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import sentencepiece
import tokenizers
import transformers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers.pre_tokenizers import ByteLevel

from helpers import tiny
from preparation.ledger import format_ledger
from preparation.text import prepare_text
from runtime.console import UserError
from runtime.paths import ROOT
from tokenization.tokenizer import LINE_PART, Segment, Tokenizer, _JsonTokenizer, learn

DATA = ROOT.parent / "shared" / "data"
TOKENIZERS = DATA / "tokenizers"
ODD = ["", " ", "a", "  two  spaces ", "line\nline\n\n", "\ttab", "n’umwana n'umwana",
       "🦒🇷🇼👩‍👩‍👧", "日本語", "é e\u0301", "<s> </s> <unk>", "<0x0A>", "12345 1,000.5", "\r\n",
       "<|begin_of_text|><|end_of_text|><|eot_id|>", "\u00a0\u3000", "don't WE'LL"]
TEXTS = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="▁\0")) | \
    st.lists(st.sampled_from([*tiny.SENTENCES, *ODD, "\n", " "])).map("".join)

quick = settings(max_examples=150, deadline=None,
                 suppress_health_check=[HealthCheck.function_scoped_fixture])


def stored(name: str) -> Path:
    """A published tokenizer's folder, or a skipped test."""
    if not (TOKENIZERS / name).is_dir():
        pytest.skip(f"needs {name}'s published tokenizer under shared/data/tokenizers")
    return TOKENIZERS / name


@functools.cache
def opened(folder: Path) -> Tokenizer:
    """LLaMA 3's takes two seconds to open."""
    return Tokenizer.open(folder)


@functools.cache
def flores() -> tuple[str, ...]:
    """FLORES-200 devtest in both languages, 2,024 sentences."""
    folder = DATA / "eval" / "flores200"
    if not folder.is_dir():
        pytest.skip("needs FLORES-200 devtest under shared/data/eval")
    texts = [(folder / f"devtest.{x}.txt").read_text().splitlines() for x in ("eng", "kin")]
    assert [len(x) for x in texts] == [1012, 1012]
    return tuple(texts[0] + texts[1])


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("learned")
    learn(tiny.SENTENCES * 20, 400, folder)
    return folder


@pytest.fixture(scope="module")
def json_folder(tmp_path_factory) -> Path:
    """A byte-level tokenizer.json, as LLaMA 3's, learned by tokenizers itself."""
    folder = tmp_path_factory.mktemp("json")
    tok = tokenizers.Tokenizer(tokenizers.models.BPE())
    tok.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tok.decoder = tokenizers.decoders.ByteLevel()
    special = ["<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>"]
    tok.train_from_iterator(tiny.SENTENCES * 20, tokenizers.trainers.BpeTrainer(
        vocab_size=400, special_tokens=special, show_progress=False,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet()))
    tok.post_processor = tokenizers.processors.TemplateProcessing(  # adds BOS if it is asked
        single="<|begin_of_text|> $A", special_tokens=[("<|begin_of_text|>", 0)])
    tok.enable_truncation(8)
    tok.enable_padding(length=8)
    tok.save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture(scope="module")
def both(model_folder, json_folder) -> list[Tokenizer]:
    return [Tokenizer.open(model_folder), Tokenizer.open(json_folder)]


@pytest.mark.data
def test_llama2_ids_are_sentencepieces_on_all_of_flores():
    folder, texts = stored("llama2"), [*flores(), *ODD]
    peer = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    ours = opened(folder)
    ids = ours.encode_batch(texts)
    assert ids == peer.encode(texts)
    assert (ours.vocab_size, ours.bos, ours.eos) == (32000, peer.bos_id(), peer.eos_id())
    assert [ours.count_bytes(x) for x in ids] == [len(t.encode()) for t in texts]
    assert [ours.decode(x) for x in ids] == texts


@pytest.mark.data
def test_llama3_ids_are_tokenizers_own_on_all_of_flores():
    folder, texts = stored("llama3"), list(flores())
    peer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    ours = opened(folder)
    ids = ours.encode_batch(texts)
    assert ids == [x.ids for x in peer.encode_batch(texts, add_special_tokens=False)]
    assert (ours.vocab_size, ours.bos, ours.eos) == (128256, 128000, 128001)
    for text, x in zip([*texts, *ODD], [*ids, *ours.encode_batch(ODD)], strict=True):
        assert ours.count_bytes(x) == len(text.encode()) and ours.decode(x) == text
        assert max(x, default=0) < 128000


@pytest.mark.data
@pytest.mark.parametrize("name", ["llama2", "llama3"])
def test_published_documents_have_one_beginning_and_one_end(name):
    tok = opened(stored(name))
    for text in (*flores()[::50], *ODD, "<s></s>"):
        ids = tok.document(text)
        assert ids[0] == tok.bos and ids[-1] == tok.eos and ids[1:-1] == tok.encode(text)
        assert ids.count(tok.bos) == ids.count(tok.eos) == 1
        assert tok.decode(ids) == text and tok.count_bytes(ids) == len(text.encode())


@pytest.mark.data
@pytest.mark.parametrize("file", ["llama3/tokenizer.model",
                                  "mistral/mistral_instruct_tokenizer_240323.model.v3"])
def test_other_published_files_open_or_are_one_error(file):
    path = stored(file.split("/")[0]) / Path(file).name
    if "llama3" in file:  # tiktoken's own format under the same name
        with pytest.raises(UserError, match=r"tokenizer\.model: not a SentencePiece model"):
            Tokenizer.open(path)
    else:
        tok = Tokenizer.open(path)
        assert tok.decode(tok.document("[INST] Amakuru? [/INST]")) == "[INST] Amakuru? [/INST]"


@quick
@given(text=TEXTS)
def test_bytes_add_up_and_text_comes_back(both, text):
    for tok in both:
        ids = tok.document(text)
        assert tok.count_bytes(ids) == tok.count_bytes(tok.encode(text)) == len(text.encode())
        assert tok.decode(ids) == tok.decode(tok.encode(text)) == text
        assert ids.count(tok.bos) == ids.count(tok.eos) == 1
        assert all(0 <= i < tok.vocab_size for i in ids)


@quick
@given(texts=st.lists(TEXTS, max_size=4))
def test_a_batch_is_its_texts_one_by_one(both, texts):
    for tok in both:
        assert tok.encode_batch(texts) == [tok.encode(t) for t in texts]


def test_ids_are_the_peers_own_whatever_their_files_would_add(model_folder, json_folder):
    texts = tiny.SENTENCES + ODD
    peer = sentencepiece.SentencePieceProcessor(model_file=str(model_folder / "tokenizer.model"))
    assert Tokenizer.open(model_folder).encode_batch(texts) == peer.encode(texts)
    other = tokenizers.Tokenizer.from_file(str(json_folder / "tokenizer.json"))
    other.no_truncation()
    other.no_padding()
    plain = [t for t in texts if "<|" not in t]  # the peer would read an end in the text
    assert Tokenizer.open(json_folder).encode_batch(plain) == \
        [other.encode(t, add_special_tokens=False).ids for t in plain]


@pytest.mark.parametrize("text", ["<s>", "</s>", "<|end_of_text|>", "a<|begin_of_text|>b</s>"])
def test_a_control_tokens_name_in_a_text_stays_text(both, text):
    for tok in both:
        assert not tok.control & set(tok.encode(text)) and tok.decode(tok.encode(text)) == text


def test_control_tokens_are_no_bytes_and_bytes_are_one(both):
    sp, js = both
    assert [sp.byte_lengths[i] for i in (sp.bos, sp.eos)] == [0, 0]
    assert {sp.byte_lengths[sp.pieces.index(f"<0x{i:02X}>")] for i in range(256)} == {1}
    assert js.byte_lengths[[js.bos, js.eos]].tolist() == [0, 0]
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    assert {js.byte_lengths[js.pieces.index(c)] for c in alphabet} == {1}
    assert {len(t.byte_lengths) - t.vocab_size for t in both} == {0}


def test_ids_that_no_piece_has_are_left_out_of_a_text(both):
    for tok in both:
        assert tok.decode([*tok.encode("Amazi"), tok.eos, tok.vocab_size + 7]) == "Amazi"
        assert tok.decode([]) == "" and tok.count_bytes([]) == 0


def test_a_fingerprint_follows_what_decides_the_ids_and_not_the_folder(model_folder, json_folder,
                                                                       tmp_path):
    sp, js = Tokenizer.open(model_folder), Tokenizer.open(json_folder)
    sp.save(tmp_path / "a")
    js.save(tmp_path / "b")
    assert Tokenizer.open(tmp_path / "a").fingerprint == sp.fingerprint
    assert Tokenizer.open(tmp_path / "b").fingerprint == js.fingerprint
    assert learn(tiny.SENTENCES * 19, 401, tmp_path / "c").fingerprint != sp.fingerprint

    words = json.loads((tmp_path / "b" / "tokenizer.json").read_text())
    words["padding"] = words["truncation"] = None  # never asked
    (tmp_path / "b" / "tokenizer.json").write_text(json.dumps(words, indent=9, sort_keys=True))
    assert Tokenizer.open(tmp_path / "b").fingerprint == js.fingerprint
    words["post_processor"] = None  # it alone says that a text begins with BOS
    (tmp_path / "b" / "tokenizer.json").write_text(json.dumps(words))
    assert Tokenizer.open(tmp_path / "b").bos is None
    assert Tokenizer.open(tmp_path / "b").fingerprint != js.fingerprint
    words["model"]["merges"].pop()
    (tmp_path / "b" / "tokenizer.json").write_text(json.dumps(words))
    assert Tokenizer.open(tmp_path / "b").fingerprint != js.fingerprint

    (tmp_path / "a" / "tokenizer_config.json").write_text('{"bos_token": "</s>"}')
    changed = Tokenizer.open(tmp_path / "a")
    assert changed.bos == 2 and changed.fingerprint != sp.fingerprint


def test_a_worker_gets_the_tokenizer_that_was_opened(both):
    for opened in both:
        tok = type(opened)(opened.file, n_threads=2)
        again = pickle.loads(pickle.dumps(tok))
        assert again.n_threads == 1  # it is one of several workers
        assert again.encode_batch(ODD * 9) == tok.encode_batch(ODD * 9)
        assert again.fingerprint == tok.fingerprint and again.begin_end_ids == tok.begin_end_ids
        assert again.pieces == tok.pieces and again.control == tok.control
        assert (again.byte_lengths == tok.byte_lengths).all()
        assert again.dummy_prefix == tok.dummy_prefix
        for control in (False, True):
            parts = [Segment(x, control, first) for x in ODD for first in (True, False)]
            assert again.encode_segments(parts) == tok.encode_segments(parts)


@pytest.mark.parametrize("value", ["false", "0", "", "true"])
def test_batches_are_encoded_on_all_cores_unless_the_user_forbids_it(json_folder, value):
    code = ("import os, sys\n"
            "from tokenization.tokenizer import Tokenizer\n"
            "for parallel in (False, True):\n"
            "    tok = Tokenizer.open(sys.argv[1], parallel)\n"
            "    tok.encode_batch(['a', 'b', 'c'])\n"
            "    print(tok.n_threads, os.environ['TOKENIZERS_PARALLELISM'])\n")
    done = subprocess.run([sys.executable, "-c", code, str(json_folder)], cwd=ROOT, text=True,
                          capture_output=True, env={**os.environ, "TOKENIZERS_PARALLELISM": value})
    n_threads = 1 if value in ("false", "0") else os.cpu_count()
    assert done.stdout == f"1 false\n{n_threads} false\n", done.stderr


def test_threads_give_the_ids_of_one_thread_in_order(json_folder):
    texts = [f"{x} {i}" for i in range(7) for x in ODD]
    for n in (2, 3, 5):
        tok = _JsonTokenizer(json_folder / "tokenizer.json", n_threads=n)
        assert tok.encode_batch(texts) == [tok.encode(x) for x in texts]


def test_opening_leaves_the_search_for_garbage_as_it_was(json_folder, tmp_path):
    (tmp_path / "tokenizer.json").write_text("{")
    for enabled in (True, False):
        (gc.enable if enabled else gc.disable)()
        try:
            Tokenizer.open(json_folder)
            with pytest.raises(UserError):
                Tokenizer.open(tmp_path)
            assert gc.isenabled() == enabled
        finally:
            gc.enable()


def test_saving_copies_every_file_and_onto_itself_does_nothing(model_folder, tmp_path):
    tok = Tokenizer.open(model_folder)
    tok.save(tmp_path / "new" / "folder")
    for file in tok.files:
        assert (tmp_path / "new" / "folder" / file.name).read_bytes() == file.read_bytes()
    before = [f.read_bytes() for f in tok.files]
    tok.save(model_folder)
    assert [f.read_bytes() for f in tok.files] == before


def broken_json(json_folder: Path, **changes: object) -> bytes:
    words = json.loads((json_folder / "tokenizer.json").read_text())
    for k, v in changes.items():
        words[k] = v
    return json.dumps(words).encode()


BAD_JSON = {
    "empty": lambda f: b"",
    "truncated": lambda f: (f / "tokenizer.json").read_bytes()[:999],
    "not UTF-8": lambda f: b"\xff\xfe{}",
    "a list": lambda f: b"[]",
    "an object": lambda f: b"{}",
    "deep": lambda f: b"[" * 100_000,
    "no model": lambda f: broken_json(f, model=None),
    "no vocabulary": lambda f: broken_json(f, model={"type": "BPE", "vocab": {}, "merges": []},
                                           added_tokens=[]),
    "unknown model": lambda f: broken_json(f, model={"type": "Magic", "vocab": {}}),
    "merge of strangers": lambda f: broken_json(
        f, model={"type": "BPE", "vocab": {"a": 0}, "merges": [["x", "y"]]}),
    "id no one has": lambda f: broken_json(
        f, model={"type": "BPE", "vocab": {"a": 4_000_000_000}, "merges": []}),
    "panic": lambda f: broken_json(f, normalizer={"type": "Precompiled",
                                                  "precompiled_charsmap": "AAAA"}),
    "odd added": lambda f: broken_json(f, added_tokens=[{"id": 0}]),
    "added no list": lambda f: broken_json(f, added_tokens=3),
}


@pytest.mark.parametrize("name", BAD_JSON)
def test_a_bad_tokenizer_json_is_one_error_that_names_it(json_folder, tmp_path, name, capfd):
    file = tmp_path / "tokenizer.json"
    file.write_bytes(BAD_JSON[name](json_folder))
    with pytest.raises(UserError) as e:
        Tokenizer.open(tmp_path)
    assert str(e.value).startswith(f"{file}: ") and "\n" not in str(e.value)
    assert e.value.code == 3
    assert capfd.readouterr().err == "", "a Rust backtrace is nothing for a person"


def steps(kind: str, *parts: dict) -> dict:
    """A normalizer or decoder of several steps."""
    return {"type": "Sequence", kind: list(parts)}


DOUBLE = {"type": "Replace", "pattern": {"String": "a"}, "content": "aa"}
LONG = {"type": "Replace", "pattern": {"Regex": ""}, "content": "x" * 5000}
CHARSMAP = base64.b64encode((0).to_bytes(4, "little") + b"x" * 5000 + b"\0").decode()
GROWING = {
    "doubled forty times": {"normalizer": steps("normalizers", *[DOUBLE] * 40)},
    "nested": {"normalizer": steps("normalizers", steps("normalizers", *[DOUBLE] * 12))},
    "a long text at every place": {"normalizer": LONG}, "in the decoder": {"decoder": LONG},
    "a long prefix": {"normalizer": {"type": "Prepend", "prepend": "x" * 5000}},
    "a long replacement in a table": {"normalizer": {"type": "Precompiled",
                                                     "precompiled_charsmap": CHARSMAP}},
    "thousands of steps": {"normalizer": steps("normalizers", *[{"type": "NFC"}] * 5000)}}


@pytest.mark.parametrize("name", GROWING)
def test_a_tokenizer_that_would_fill_the_memory_is_refused_at_once(json_folder, tmp_path, name):
    (tmp_path / "tokenizer.json").write_bytes(broken_json(json_folder, **GROWING[name]))
    begin = time.perf_counter()
    with pytest.raises(UserError, match=r"times longer|steps, expected at most 64") as e:
        Tokenizer.open(tmp_path)
    assert time.perf_counter() - begin < 10 and "\n" not in str(e.value)


def test_a_regex_that_backtracks_without_end_is_one_error(json_folder, tmp_path, capfd):
    split = {"type": "Split", "pattern": {"Regex": "(a+)+$"}, "behavior": "Isolated",
             "invert": False}
    (tmp_path / "tokenizer.json").write_bytes(broken_json(json_folder, pre_tokenizer=split))
    tokenizer = Tokenizer.open(tmp_path)
    with pytest.raises(UserError, match=r"tokenizer\.json: the tokenizer fails on a text"):
        tokenizer.encode("a" * 60 + "!")


@pytest.mark.parametrize("kind", ["json", "model"])
def test_a_damaged_tokenizer_is_used_or_refused_and_nothing_else(kind, json_folder, model_folder,
                                                                 tmp_path, capfd):
    draw, seen = random.Random(7), {True: 0, False: 0}
    for _ in range(300):
        if kind == "json":
            (tmp_path / "tokenizer.json").write_text(damaged_json(json_folder, draw))
        else:
            raw = bytearray((model_folder / "tokenizer.model").read_bytes())
            for _ in range(draw.randrange(1, 4)):
                at = draw.randrange(len(raw))
                raw[at : at + draw.randrange(2)] = draw.randbytes(draw.randrange(3))
            (tmp_path / "tokenizer.model").write_bytes(raw)
        try:
            tok = Tokenizer.open(tmp_path)
            for text in ("Amazi <|eot_id|>é🦒", "", "a\n\n b"):
                ids = tok.document(text)
                tok.decode(ids)
                tok.count_bytes(ids)
                tok.encode_segments([Segment(text, control=True, first=False)])
            seen[True] += 1
        except UserError as e:
            assert "\n" not in str(e) and str(tmp_path) in str(e)
            seen[False] += 1
    assert min(seen.values()) > 5, seen
    assert "panicked" not in capfd.readouterr().err


def damaged_json(folder: Path, draw: random.Random) -> str:
    """tokenizer.json with one to three things in it that are odd, each well-formed by itself."""
    words = json.loads((folder / "tokenizer.json").read_text())
    merges, vocab = words["model"]["merges"], words["model"]["vocab"]
    for _ in range(draw.randrange(1, 4)):
        what = draw.randrange(6)
        if what == 0:
            merges.insert(draw.randrange(len(merges)), draw.choice([*merges, ["a" * 300, "b"], []]))
        elif what == 1:
            draw.shuffle(merges)
        elif what == 2:
            vocab[draw.choice(list(vocab))] = draw.choice([0, 5, 399, 400, 10**5])
        elif what == 3:
            words["added_tokens"].append({
                "id": draw.choice([0, 3, 399, 400, 9999]), "special": draw.random() < 0.5,
                "content": draw.choice(["a", "", "é", "<|eot_id|>", "ma"]), "lstrip": True,
                "rstrip": False, "normalized": draw.random() < 0.5, "single_word": False})
        elif what == 4:
            words["pre_tokenizer"] = draw.choice([
                None, {"type": "UnicodeScripts"}, *(
                    {"type": "Split", "pattern": {"Regex": x}, "behavior": "Isolated",
                     "invert": False} for x in ("(", "", "."))])
        else:
            words["normalizer"] = draw.choice([
                {"type": "Prepend", "prepend": ""},
                {"type": "Replace", "pattern": {"Regex": ""}, "content": "x"},
                {"type": "Precompiled", "precompiled_charsmap": "AAAA"}, {"type": "Lowercase"}])
    return json.dumps(words)


def test_every_beginning_of_a_tokenizer_model_opens_or_is_one_error(model_folder, tmp_path, capfd):
    whole = (model_folder / "tokenizer.model").read_bytes()
    file = tmp_path / "tokenizer.model"
    refused = 0
    for n in [*range(0, 60), *range(60, len(whole), 97)]:
        file.write_bytes(whole[:n])
        try:
            Tokenizer.open(file)
        except UserError as e:
            refused += 1
            assert str(e).startswith(f"{file}: ")
    assert refused > 50
    for bad in (b"\0" * 100, b"<html>not found</html>", b"version https://git-lfs.github.com/spec/v1\n"):
        file.write_bytes(bad)
        with pytest.raises(UserError, match=r"tokenizer\.model: not a SentencePiece model"):
            Tokenizer.open(file)


@pytest.mark.parametrize("kind", ["Unigram", "WordPiece", "WordLevel"])
def test_another_kind_of_tokenizer_json_is_refused_by_its_name(tmp_path, kind):
    model = {"Unigram": lambda: tokenizers.models.Unigram([("<unk>", 0.0), ("a", -1.0)], 0, False),
             "WordPiece": lambda: tokenizers.models.WordPiece({"[UNK]": 0, "a": 1}),
             "WordLevel": lambda: tokenizers.models.WordLevel({"a": 0}, "a")}[kind]()
    tokenizers.Tokenizer(model).save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(UserError, match=rf"tokenizer\.json: its model is '{kind}', expected BPE"):
        Tokenizer.open(tmp_path)


UNUSUAL = "a\x05b\x7f é 🦒 \ue000 z\n\t"


def test_characters_that_a_bytewise_tokenizer_cannot_spell_are_left_out_as_by_transformers(
        json_folder, tmp_path):
    content = json.loads((json_folder / "tokenizer.json").read_text())
    model = content["model"]
    for character in "\x05\x7fé":  # of é the first byte
        piece = ByteLevel(add_prefix_space=False).pre_tokenize_str(character)[0][0][0]
        model["vocab"][f"unused {character}"] = model["vocab"].pop(piece)
        model["merges"] = [pair for pair in model["merges"] if piece not in "".join(pair)]
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    tokenizer = Tokenizer.open(tmp_path)
    peer = transformers.PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "tokenizer.json"))
    assert tokenizer.encode(UNUSUAL) == peer(UNUSUAL, add_special_tokens=False).input_ids
    assert not tokenizer.spells_every_byte
    assert tokenizer.count_unspelled(UNUSUAL * 2) == 2 * 3
    assert tokenizer.count_unspelled("Amazi y'umugezi, n’inka") == 0


@pytest.mark.parametrize("segment", ["é é", "na", " é", "🦒é"])
def test_characters_that_sentencepiece_cannot_spell_become_its_unknown_token(tmp_path, segment):
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(tiny.SENTENCES), model_prefix=str(tmp_path / "tokenizer"),
        vocab_size=60, model_type="bpe", hard_vocab_limit=False, minloglevel=2,
        normalization_rule_name="identity", remove_extra_whitespaces=False)
    tokenizer = Tokenizer.open(tmp_path / "tokenizer.model")
    peer = sentencepiece.SentencePieceProcessor(str(tmp_path / "tokenizer.model"))
    text = "amazi é 🦒 \n umugezi"
    assert tokenizer.encode(text) == peer.encode(text)
    assert tokenizer.unknown == peer.unk_id() and tokenizer.unknown in tokenizer.encode(text)
    assert tokenizer.count_unspelled(text) == 3
    assert tokenizer.byte_lengths[tokenizer.unknown] == 0
    # behind another segment: without the space before it, and without losing its first character
    first, ids = tokenizer.encode_segments([Segment("amazi", False, True),
                                            Segment(segment, False, False)])
    assert first == peer.encode("amazi")
    assert [*first, *ids] == peer.encode("amazi" + segment)


def test_a_ledger_counts_characters_that_cannot_be_spelled(json_folder, tmp_path, capsys):
    content = json.loads((json_folder / "tokenizer.json").read_text())
    piece = ByteLevel(add_prefix_space=False).pre_tokenize_str("\x05")[0][0]
    content["model"]["vocab"]["unused"] = content["model"]["vocab"].pop(piece)
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    (tmp_path / "kin.txt").write_text("amazi\x05 \x05\numugezi\n")
    bin, ledger = prepare_text([str(tmp_path / "kin.txt")], tmp_path, tmp_path / "bin", unit="line")
    assert ledger.n_unspelled == 2 and bin.meta["ledger"]["unspelled"] == 2
    assert "not spelled: 2 characters" in format_ledger(bin.meta["ledger"])


def test_a_tokenizer_that_cannot_spell_a_letter_is_refused(tmp_path):
    tokenizers.Tokenizer(tokenizers.models.BPE({"b": 0}, [])).save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(UserError, match="has no token for the letter a"):
        Tokenizer.open(tmp_path)


@pytest.mark.parametrize("added", [
    {"400": {"content": "ijambo", "special": False}}, {"400": {"special": True}}, {"x": {}},
    {"400": 3}, [1], {"99999999999": {"content": "far", "special": True}}])
def test_what_sentencepiece_cannot_add_is_refused(model_folder, tmp_path, added):
    shutil.copyfile(model_folder / "tokenizer.model", tmp_path / "tokenizer.model")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": added}))
    with pytest.raises(UserError, match="added_tokens_decoder cannot be used with a tokenizer"):
        Tokenizer.open(tmp_path)


def test_no_bos_where_a_file_says_null(json_folder, tmp_path):
    shutil.copyfile(json_folder / "tokenizer.json", tmp_path / "tokenizer.json")
    for words, eos in (({}, 1), ({"eos_token": None}, None), ({"eos_token": "<|eot_id|>"}, 2)):
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(words))
        assert Tokenizer.open(tmp_path).eos == eos


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer.model"])
def test_a_huge_file_is_refused_unread(tmp_path, name):
    with open(tmp_path / name, "wb") as f:
        f.truncate(3 << 30)
    with pytest.raises(UserError, match="3072 MB, expected at most 64 MB"):
        Tokenizer.open(tmp_path)


def test_a_folder_without_a_tokenizer_says_so(tmp_path):
    for path in (tmp_path, tmp_path / "none"):
        with pytest.raises(UserError, match=r"no tokenizer\.json or tokenizer.model here"):
            Tokenizer.open(path)


@pytest.mark.parametrize("words", ["", "[1]", "{", '"x"', '{"bos_token": "<nobody>"}',
                                   '{"bos_token": 7}', '{"bos_token": ["<s>"]}'])
def test_a_bad_tokenizer_config_is_one_error_that_names_it(model_folder, tmp_path, words):
    shutil.copyfile(model_folder / "tokenizer.model", tmp_path / "tokenizer.model")
    (tmp_path / "tokenizer_config.json").write_text(words)
    with pytest.raises(UserError, match=r"tokenizer_config\.json: "):
        Tokenizer.open(tmp_path)


def test_learning_twice_gives_the_same_files(model_folder, tmp_path):
    again = learn(tiny.SENTENCES * 20, 400, tmp_path)
    assert again.vocab_size == 400 and (again.bos, again.eos) == (1, 2)
    for name in ("tokenizer.model", "tokenizer_config.json"):
        assert (tmp_path / name).read_bytes() == (model_folder / name).read_bytes()


def test_a_learned_folder_opens_in_transformers_with_equal_ids(model_folder):
    ours = Tokenizer.open(model_folder)
    peer = transformers.AutoTokenizer.from_pretrained(model_folder)
    assert (peer.bos_token_id, peer.eos_token_id) == (ours.bos, ours.eos)
    for text in [*tiny.SENTENCES, *(t for t in ODD if "<" not in t and not t.startswith(" "))]:
        # before a blank transformers leaves out the blank that sentencepiece puts before all
        assert ours.encode(text) == peer.encode(text, add_special_tokens=False), text


def test_a_line_of_megabytes_is_learned_from_as_short_ones_are(tmp_path):
    texts = tiny.SENTENCES * 4000
    long = " ".join(texts)
    assert len(long) > 1 << 20
    assert learn([long], 400, tmp_path / "a").fingerprint == learn(
        texts, 400, tmp_path / "b").fingerprint
    for unbroken in ("é" * 600_000, "é" * 300_000 + " a", "a  b "):
        parts = LINE_PART.findall(unbroken)
        assert max(len(x.encode()) for x in parts) <= 1 << 20
        assert "".join(parts).replace(" ", "") == unbroken.replace(" ", "")


@pytest.mark.parametrize("texts, size", [([], 400), (["a"], 100_000), (tiny.SENTENCES, 10)])
def test_what_cannot_be_learned_is_one_error(tmp_path, texts, size):
    with pytest.raises(UserError, match=r"--size .* cannot be learned from these texts"):
        learn(texts, size, tmp_path)
