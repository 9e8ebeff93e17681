"""Bits per byte against the plain rule and against transformers; eval.py and sample.py as people run them."""

import functools
import math

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

import tasks
from log import UserError
from model import Llama, ModelConfig

V, CONTEXT, BOS = 97, 16, 1


def rolling(tokens, prefix, length):
    """evaluation.md A2, word for word: lm-evaluation-harness's own generator with a context of one token."""
    if not tokens:
        return
    first = min(length, len(tokens))
    yield [prefix, *tokens[: first - 1]], tokens[:first]
    predicted = first
    while predicted < len(tokens):
        n = min(len(tokens) - predicted, length)
        end = predicted + n
        yield tokens[end - length - 1 : end - 1], tokens[end - n : end]
        predicted += n


@given(st.lists(st.integers(3, 90), max_size=60), st.integers(1, 20))
@settings(max_examples=300, deadline=None)
def test_windows_are_those_of_the_rule(ids, length):
    found = list(tasks.windows(ids, BOS, length))
    assert found == list(rolling(ids, BOS, length))
    assert [t for _, targets in found for t in targets] == ids  # each token once, in order
    assert all(len(targets) <= len(inputs) <= length for inputs, targets in found)
    assert all(len(inputs) == length for inputs, _ in found[1:])  # full left context


@given(st.lists(st.integers(1, 50), max_size=60), st.integers(1, 40))
@settings(max_examples=200, deadline=None)
def test_every_piece_is_packed_once_and_no_row_is_too_full(lengths, width):
    rows = tasks.pack(lengths, width)
    assert sorted(i for row in rows for i in row) == list(range(len(lengths)))
    for row in rows:
        assert len(row) == 1 or sum(lengths[i] for i in row) <= width
    firsts = [lengths[row[0]] for row in rows]
    assert firsts == sorted(firsts, reverse=True)
    full = [sum(lengths[i] for i in row) for row in rows]
    assert not any(a + b <= width for a in full[:-1] for b in full[-1:] if len(rows) > 1)


@functools.cache
def peer() -> transformers.LlamaForCausalLM:
    """A random model with strong opinions."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=V, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=CONTEXT,
        initializer_range=0.3, bos_token_id=BOS, eos_token_id=2)
    return transformers.LlamaForCausalLM(config).eval()


@functools.cache
def ours() -> Llama:
    """The same weights in our model."""
    model = Llama(ModelConfig.from_hf(peer().config.to_dict()))
    model.load_state_dict(peer().state_dict())
    return model.eval()


@torch.inference_mode()
def by_hand(model, ids, start, length) -> float:
    """Nats of a document by transformers' logits, window after window."""
    total = 0.0
    for inputs, targets in rolling(ids, start, length):
        logp = model(torch.tensor([inputs])).logits[0].float().log_softmax(-1)
        at = torch.arange(len(inputs) - len(targets), len(inputs))
        total -= logp[at, torch.tensor(targets)].double().sum().item()
    return total


def made(lengths, seed=0) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return [rng.integers(3, V, n).tolist() for n in lengths]


@pytest.mark.parametrize(("row", "budget"), [(2048, 8192), (40, 100), (8, 20)])
@pytest.mark.parametrize("length", [0, 1, 7])
def test_nats_of_documents_equal_transformers_however_they_are_packed(row, budget, length, monkeypatch):
    monkeypatch.setattr(tasks, "ROW", row)
    monkeypatch.setattr(tasks, "BUDGET", budget)
    documents = made([5, 0, 16, 1, 17, 40, 3, 33, 15, 2, 64, 9])
    told = []
    found = tasks.document_nats(ours(), documents, BOS, length, told.append)
    wanted = [by_hand(peer(), ids, BOS, length or CONTEXT) for ids in documents]
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-5)
    assert sum(told) == sum(map(len, documents)) and found[1] == 0


def test_nothing_to_measure_is_no_error():
    assert tasks.document_nats(ours(), [], BOS).shape == (0,)
    assert tasks.document_nats(ours(), [[], []], BOS).tolist() == [0, 0]


def test_a_documents_nats_do_not_change_with_its_neighbours():
    documents = made([12, 30, 5])
    together = tasks.document_nats(ours(), documents, BOS)
    alone = [tasks.document_nats(ours(), [ids], BOS)[0] for ids in documents]
    np.testing.assert_allclose(together, alone, rtol=1e-6)


def test_the_interval_covers_the_truth_about_as_often_as_it_says():
    rng = np.random.default_rng(0)
    hit = 0
    for _ in range(60):
        n_bytes = rng.integers(50, 400, 80)
        nats = n_bytes * rng.normal(1.0, 0.2, 80)
        low, high = tasks.interval(nats, n_bytes)
        assert low < nats.sum() / n_bytes.sum() / math.log(2) < high
        hit += low <= 1 / math.log(2) <= high
    assert 50 <= hit <= 60


def test_the_interval_is_the_same_again_and_of_a_ratio_of_sums():
    nats, n_bytes = np.array([10.0, 400.0]), np.array([10, 200])
    assert tasks.interval(nats, n_bytes) == tasks.interval(nats, n_bytes)
    # two documents: a resample is one of them twice, or both
    assert tasks.interval(nats, n_bytes) == pytest.approx((1 / math.log(2), 2 / math.log(2)))
    assert tasks.interval(nats[:1], n_bytes[:1]) is None
    assert tasks.interval(np.ones(40), np.full(40, 4)) == pytest.approx([0.25 / math.log(2)] * 2)


class NoBOS:
    bos, eos = None, 2


def test_a_document_begins_from_bos_else_from_eos_else_is_refused():
    tokenizer = NoBOS()
    assert tasks.start_token(tokenizer) == 2
    tokenizer.bos = 1
    assert tasks.start_token(tokenizer) == 1
    tokenizer.bos = tokenizer.eos = None
    with pytest.raises(UserError, match="neither BOS nor EOS"):
        tasks.start_token(tokenizer)
