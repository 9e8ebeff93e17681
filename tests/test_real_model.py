"""A real pretrained model: logits equal to transformers', fluent English, LoRA lowers the loss."""

from __future__ import annotations

import json

import pytest
import tokenizers
import torch
import transformers

from checkpoints.huggingface import load_model
from helpers import tiny
from helpers.commands import command
from helpers.real_model import real_model  # noqa: F401
from runtime.paths import ROOT
from tokenization.tokenizer import Tokenizer

pytestmark = pytest.mark.real
FLORES = ROOT.parent / "shared/data/eval/flores200"
ENGLISH = "The capital of France is"


def test_logits_equal_those_of_transformers(real_model):  # noqa: F811
    model, tokenizer = load_model(real_model)
    text = "Rwanda is a country of a thousand hills. Its capital is Kigali. It has four seasons."
    ids = torch.tensor([tokenizer.encode(text)])
    with torch.no_grad():
        peer = transformers.AutoModelForCausalLM.from_pretrained(real_model, dtype=torch.float32)
        expected = peer(ids).logits
    assert ids.shape[1] > 15
    torch.testing.assert_close(tiny.logits(model, ids), expected, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("language", ["kin", "eng", "swh"])
def test_ids_equal_those_of_tokenizers_on_flores(real_model, language):  # noqa: F811
    file = FLORES / f"devtest.{language}.txt"
    if not file.exists():
        pytest.skip(f"no {file}")
    peer = tokenizers.Tokenizer.from_file(str(real_model / "tokenizer.json"))
    lines = file.read_text(encoding="utf-8").splitlines()
    expected = [x.ids for x in peer.encode_batch(lines, add_special_tokens=False)]
    assert len(lines) == 1012
    assert Tokenizer.open(real_model).encode_batch(lines) == expected


def test_characters_that_it_cannot_spell_are_left_out_as_by_transformers(real_model):  # noqa: F811
    tokenizer = Tokenizer.open(real_model)
    peer = transformers.AutoTokenizer.from_pretrained(real_model)
    texts = [f"a{chr(i)}b" for i in [*range(0x3000), 0xE000, 0x1F992, 0x10FFFF]]
    expected = peer(texts, add_special_tokens=False).input_ids
    assert tokenizer.encode_batch(texts) == expected
    n_bytes = [int(tokenizer.byte_lengths[ids].sum()) for ids in expected]
    lost = [len(text.encode()) > n for text, n in zip(texts, n_bytes, strict=True)]
    assert [tokenizer.count_unspelled(text) > 0 for text in texts] == lost
    assert 0 < sum(lost) < len(texts) / 2


def test_its_greedy_text_is_english_and_that_of_transformers(real_model):  # noqa: F811
    done = command("sample.py", "--model", real_model, "--prompt", ENGLISH, "--temperature", "0",
                   "--max-new-tokens", "12", "--dtype", "fp32", "--device", "cpu")
    assert done.returncode == 0, done.stderr
    tokenizer = transformers.AutoTokenizer.from_pretrained(real_model)
    peer = transformers.AutoModelForCausalLM.from_pretrained(real_model, dtype=torch.float32)
    ids = tokenizer(ENGLISH, return_tensors="pt").input_ids
    answer = peer.generate(ids, max_new_tokens=12, do_sample=False)[0, ids.shape[1] :]
    assert done.stdout.strip() == ENGLISH + tokenizer.decode(answer, skip_special_tokens=True)
    assert "Paris" in done.stdout


def test_a_few_lora_steps_lower_the_loss_on_kinyarwanda(real_model, tmp_path):  # noqa: F811
    (tmp_path / "kin.txt").write_text("\n".join(
        f"{sentence} {i}" for i in range(30) for sentence in tiny.SENTENCES[:5]) + "\n")
    done = command(
        "train.py", "--mode", "cpt", "--model", real_model, "--data", tmp_path / "kin.txt",
        "--tune", "lora", "--lora-rank", "8", "--lr", "5e-4", "--seq-len", "64", "--rows", "2",
        "--steps", "8", "--hold-out", "0", "--dtype", "fp32", "--device", "cpu", "--out",
        tmp_path / "out")
    assert done.returncode == 0, done.stderr[-2000:]
    lines = [json.loads(x) for x in (tmp_path / "out/metrics.jsonl").read_text().splitlines()]
    losses = [x["loss"] for x in lines if "loss" in x]
    assert len(losses) == 8 and losses[-1] < 0.7 * losses[0], losses
