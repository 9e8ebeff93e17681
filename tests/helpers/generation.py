"""A tiny random model and transformers' answers to a few prompts."""

from __future__ import annotations

import functools

import torch
import transformers

import lora
from helpers import tiny
from inference.generate import completions
from inference.sampling import SamplingParams, StoppingCriteria
from model import Llama

V, CONTEXT, BOS = 97, 64, 1
PROMPTS = [[1, 5, 9, 33, 12], [1, 7], [1, 80, 81, 82, 3, 4, 5, 6, 40, 41, 42], [60, 61, 62]]


@functools.cache
def peer() -> transformers.LlamaForCausalLM:
    """A random model; this seed's, because its answers to PROMPTS begin with four different ids."""
    return tiny.peer("llama3", seed=34, vocab_size=V, max_position_embeddings=CONTEXT)


@functools.cache
def ours() -> Llama:
    """The same weights in our model."""
    return tiny.ours(peer(), "llama3", vocab_size=V, max_position_embeddings=CONTEXT)


def answers(prompts, sampling: SamplingParams, eos=(), **options) -> list[list[int]]:
    """What follows each prompt."""
    return [x.ids for x in completions(ours(), prompts, sampling, StoppingCriteria(eos), **options)]


def greedily(prompt: list[int], n: int, eos: int | None = None) -> list[int]:
    """transformers' greedy continuation of one prompt."""
    out = peer().generate(torch.tensor([prompt]), max_new_tokens=n, do_sample=False, pad_token_id=0,
                          attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
                          eos_token_id=[] if eos is None else eos)
    return out[0, len(prompt):].tolist()


def with_adapter(model: Llama, how: str) -> Llama:
    """The same with an adapter that is not nothing."""
    if how:
        torch.manual_seed(1)
        lora.add_lora(model, 4, 8, 0.0, ["all-linear"], dora=how == "dora")
        for m in lora.adapters(model).values():
            torch.nn.init.normal_(m.lora_B.weight, std=0.1)
    return model.eval()
