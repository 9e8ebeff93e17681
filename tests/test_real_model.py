"""A real pretrained model: logits equal to transformers', fluent English, LoRA lowers the loss."""

from __future__ import annotations

import json

import pytest
import torch
import transformers

from checkpoints.huggingface import load_model
from helpers import tiny
from helpers.commands import command
from helpers.real_model import real_model  # noqa: F401

pytestmark = pytest.mark.real
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
