"""Words encoded once, against the tokenizer's own encoding of whole texts."""

from __future__ import annotations

import functools
import json
import pickle
import subprocess
import sys

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers, trainers

from helpers import tiny
from preparation.text import prepare_text
from runtime.paths import ROOT
from tokenization import word_cache as words
from tokenization.tokenizer import Tokenizer, learn
from tokenization.word_cache import WordCache

DATA = ROOT.parent / "shared" / "data"
PUBLISHED = ["llama2/tokenizer.model", "llama3/tokenizer.json", "gpt2/tokenizer.json",
             "mistral/mistral_instruct_tokenizer_240323.model.v3"]
# spaces of all kinds beside words, signs, digits, marks and names of control tokens
ATOMS = [*"   \n\t\r\u00a0\u3000\u2028▁_.,!?'’-12ab\0\1é", "e\u0301", "\u0308", "🦒", "</s>", "<s>",
         "<|end_of_text|>", "'ll", "umugezi", "Amazi", "  ", " \n", "\n ", "<b>", "\n \n",
         "\t \t", "\u00a0 \u00a0", "\u095c"]
SPACED = [f"a{x} {x}b" for x in "\n\t\u00a0"]  # some tokens are spaces of several kinds
TEXTS = st.lists(st.lists(st.sampled_from(ATOMS)).map("".join) | st.text(max_size=20)
                 | st.sampled_from(tiny.SENTENCES), max_size=5)


def bytewise(expression: str | None, first: bool = False, **more: bool) -> tokenizers.Tokenizer:
    """A byte-level BPE whose texts are cut by an expression, or by GPT-2's own; `first`: spelled as
    bytes before."""
    tok = tokenizers.Tokenizer(models.BPE())
    steps = [pre_tokenizers.Split(Regex(expression), "isolated")] if expression else []
    spelled = pre_tokenizers.ByteLevel(more.get("add_prefix_space", False), not expression)
    tok.pre_tokenizer = pre_tokenizers.Sequence([spelled, *steps] if first else [*steps, spelled])
    tok.decoder = decoders.ByteLevel()
    tok.train_from_iterator(tiny.SENTENCES * 3 + SPACED * 20, trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<s>", "</s>"], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    return tok


def composed(tok: tokenizers.Tokenizer) -> tokenizers.Tokenizer:
    """The same with NFC before it."""
    tok.normalizer = normalizers.NFC()
    return tok


def marked(prepend: bool, metaspace: bool, across: bool = False,
           **more: bool) -> tokenizers.Tokenizer:
    """A BPE over characters, spaces as ▁, bytes where a character is unknown, as LLaMA 2's
    (`prepend`) or Gemma's; `across`: with a token that reaches over a space."""
    named = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256))]
    vocab = {x: i for i, x in enumerate([*named, *"▁abcdeghimnorstuwyz,.!'12"])}
    merges = [("a", "m"), ("▁", "a"), ("▁", "▁"), ("▁a", "m"), ("u", "m"), ("▁▁", "▁▁"), ("i", "n"),
              ("e", "."), ("um", "u"), ("▁", "um"), *([("a", "▁")] if across else [])]
    for a, b in merges:
        vocab.setdefault(a + b, len(vocab))
    tok = tokenizers.Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", byte_fallback=True,
                                          fuse_unk=True, **more))
    if metaspace:
        tok.pre_tokenizer = pre_tokenizers.Metaspace(
            "▁", "first" if prepend else "never", split=False)
    else:
        tok.normalizer = normalizers.Sequence(
            [*([normalizers.Prepend("▁")] if prepend else []), normalizers.Replace(" ", "▁")])
    tok.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(),
                                     decoders.Fuse()])
    tok.add_special_tokens(["<s>", "</s>"])
    return tok


MADE = {"gpt2": lambda: bytewise(None), "llama3": lambda: bytewise(words.LLAMA3),
        "qwen2": lambda: composed(bytewise(words.LLAMA3.replace("{1,3}", ""))),
        "llama2": lambda: marked(True, False), "llama2-meta": lambda: marked(True, True),
        "gemma": lambda: marked(False, False), "gemma-meta": lambda: marked(False, True)}
WHOLE = {"another expression": lambda: bytewise(r"[^ ]+ ?| "),
         "a space before texts": lambda: bytewise(None, add_prefix_space=True),
         "a space before pieces": lambda: bytewise(words.LLAMA3, add_prefix_space=True),
         "an expression that sees no space": lambda: bytewise(words.LLAMA3, first=True),
         "words that no merge makes": lambda: marked(True, False, ignore_merges=True),
         "a token over a space": lambda: marked(True, False, across=True)}


@functools.cache
def stored(name: str) -> Tokenizer:
    if not (DATA / "tokenizers" / name).exists():
        pytest.skip(f"needs the published {name} under shared/data/tokenizers")
    return Tokenizer.open(DATA / "tokenizers" / name)


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> dict[str, Tokenizer]:
    root, found = tmp_path_factory.mktemp("made"), {}
    for name, build in (MADE | WHOLE).items():
        folder = root / name.replace(" ", "-")
        folder.mkdir()
        build().save(str(folder / "tokenizer.json"))
        found[name] = Tokenizer.open(folder)
    found["learned"] = learn(tiny.SENTENCES * 20, 320, root / "learned")
    return found


def assert_same_ids(cache: WordCache, texts: list[str]) -> None:
    """The cache gives the ids of the tokenizer."""
    ids, sizes = cache.encode_documents(texts)
    found = [x.tolist() for x in np.split(ids, np.cumsum(sizes)[:-1])] if texts else []
    assert found == [cache.tokenizer.document(text) for text in texts]
    assert len(sizes) == len(texts) and ids.dtype == np.uint32


@pytest.mark.parametrize("name", [*MADE, *WHOLE, "learned"])
@settings(max_examples=120, deadline=None)
@given(batches=st.lists(TEXTS, max_size=3))
def test_documents_are_the_tokenizers_own(made, name, batches):
    cache = WordCache(made[name])
    assert cache.splits_words == (name not in WHOLE)
    for texts in batches:
        assert_same_ids(cache, texts)


@pytest.mark.parametrize("name", PUBLISHED)
@settings(max_examples=120, deadline=None)
@given(texts=TEXTS)
def test_published_tokenizers_documents_are_their_own(name, texts):
    cache = WordCache(stored(name))
    assert cache.splits_words
    assert_same_ids(cache, texts)


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_tokenizers_on_all_of_flores(name):
    folder = DATA / "eval" / "flores200"
    if not folder.is_dir():
        pytest.skip("needs FLORES-200 devtest under shared/data/eval")
    cache = WordCache(stored(name))
    for language in ("eng", "kin", "eng"):
        assert_same_ids(cache, (folder / f"devtest.{language}.txt").read_text().splitlines())


def test_a_cache_that_is_full_begins_anew(made):
    cache = WordCache(made["learned"], max_ids=10)
    for i in range(0, len(tiny.SENTENCES), 3):
        batch = tiny.SENTENCES[i : i + 3]
        assert_same_ids(cache, batch)
        assert set(cache.entries) <= {word for text in batch for word in text.split()}


@pytest.mark.parametrize("name", ["learned", "qwen2"])
def test_words_whose_bytes_do_not_come_out_are_encoded_one_by_one(made, name):
    tokenizer = pickle.loads(pickle.dumps(made[name]))
    tokenizer.byte_lengths = np.zeros_like(tokenizer.byte_lengths)
    assert_same_ids(WordCache(tokenizer), tiny.SENTENCES)


def test_a_cache_holds_little_of_what_is_encoded_whole(made):
    """Texts that are not cut, and words as long as texts."""
    for name, space in (("another expression", " "), ("learned", "\t"), ("learned", "▁")):
        cache = WordCache(made[name], max_ids=100)
        for i in range(20):
            texts = [x.replace(" ", space) + str(i) for x in tiny.SENTENCES[:5]]
            assert_same_ids(cache, texts)
            assert len(cache.ids) < 100 + 2 * sum(map(len, texts))


def test_lines_of_nothing_but_spaces_are_as_the_published_llama3_has_them():
    cache = WordCache(stored("llama3/tokenizer.json"))
    assert_same_ids(cache, ["a\n \nb", "\n \n", "a\t \tb", "\u00a0 \u00a0b \n c", " \n \n",
                            "a \n\t"])
    assert_same_ids(cache, ["a\n\t", "x \nc", "a b\n\t c"])


class Recorder:
    """A tokenizer that records the texts that it encodes."""

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer = tokenizer
        self.encoded: list[str] = []

    def __getattr__(self, name: str) -> object:
        return getattr(self.tokenizer, name)

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        self.encoded += texts
        return self.tokenizer.encode_batch(texts)


def test_a_known_word_is_not_encoded_again(made):
    recorder = Recorder(made["learned"])
    cache = WordCache(recorder)
    cache.encode_documents(["amazi na amazi", "na amazi"])
    cache.encode_documents(["amazi na umugezi"])
    assert recorder.encoded == ["amazi na", "umugezi"]  # new words, as one text


@pytest.mark.parametrize("name", ["learned", "llama3"])
def test_a_bin_made_without_the_cache_is_the_same(made, name, tmp_path):
    file = tmp_path / "text.txt"
    file.write_text("\n".join([*tiny.SENTENCES, "a  b ", "▁x"]))
    bins = [prepare_text([str(file)], made[name].file.parent, tmp_path / str(use), unit="line",
                         use_word_cache=use)[0] for use in (True, False)]
    assert bins[0].tokens.tolist() == bins[1].tokens.tolist()
    assert bins[0].starts.tolist() == bins[1].starts.tolist()


def test_a_unigram_model_and_one_that_changes_characters_are_encoded_whole(tmp_path):
    import sentencepiece

    for more in ({"model_type": "unigram"}, {"normalization_rule_name": "nmt_nfkc"},
                 {"remove_extra_whitespaces": True}):
        how = {"model_type": "bpe", "normalization_rule_name": "identity",
               "remove_extra_whitespaces": False} | more
        file = tmp_path / "tokenizer.model"
        with open(file, "wb") as out:
            sentencepiece.SentencePieceTrainer.train(
                sentence_iterator=iter(tiny.SENTENCES * 20), model_writer=out, vocab_size=320,
                byte_fallback=True, minloglevel=2, **how)
        cache = WordCache(Tokenizer.open(file))
        assert not cache.splits_words
        assert_same_ids(cache, ["ﬁ  x y", " a", *tiny.SENTENCES[:3]])


@pytest.mark.parametrize("name", ["learned", "llama3"])
def test_a_bin_is_that_of_whole_texts(made, name, tmp_path):
    """prepare.py itself, its documents read back, beside the tokenizer's own ids."""
    texts = [f"{a}  {b}\n {c}" for a in tiny.SENTENCES for b in ("", "▁x", "é")
             for c in tiny.SENTENCES[:4]]
    file = tmp_path / "text.jsonl"
    file.write_text("".join(json.dumps({"text": x}) + "\n" for x in texts))
    folder = made[name].file.parent
    subprocess.run([sys.executable, "prepare.py", "text", str(file), "--tokenizer", str(folder),
                    "--normalise", "none", "--out", str(tmp_path / "bin")], check=True,
                   cwd=ROOT)
    from data import Bin

    read = Bin(tmp_path / "bin")
    found = [read.tokens[a:b].tolist() for a, b in zip(read.starts, read.starts[1:], strict=False)]
    assert found == [made[name].document(x) for x in dict.fromkeys(texts)]
