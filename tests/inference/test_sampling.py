"""Filters, penalties and samples against transformers' and plain formulas; stop strings."""

import math
import random

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.generation import PROMPTS, V, answers, peer
from inference.sampling import (
    SamplingParams,
    StoppingCriteria,
    apply_repetition_penalty,
    filter_logits,
    next_tokens,
    per_prompt_seeds,
    sample_from_logits,
)
from runtime.console import UserError


def test_every_prompt_copy_and_seed_gives_another_seed():
    seeds = per_prompt_seeds([[1, 2], [1, 3], [1], [1, 2]], 1) + per_prompt_seeds([[1, 2]], 2)
    assert len(set(seeds)) == len(seeds)


def test_a_stop_string_may_end_inside_a_token_and_span_many():
    ids = [5, 6, 7, 8]
    text = {5: "a b", 6: "c\nd", 7: "", 8: "efg"}
    stops = StoppingCriteria({9}, ["b c\n", "\ndef"], lambda new: "".join(text[i] for i in new))
    assert [stops.finish_reason(ids[: n + 1], 10) for n in range(4)] == ["", "", "", "stop"]
    assert StoppingCriteria({9}, ["bc\n"], stops.decode).finish_reason(ids[:2], 10) == "stop"
    assert StoppingCriteria({9}).finish_reason([5, 9], 2) == "eos"
    assert StoppingCriteria({9}).finish_reason([9, 5], 2) == "length"


def chi_square(counts: torch.Tensor, p: torch.Tensor) -> tuple[float, int]:
    """Pearson's statistic and its degrees of freedom; tokens expected below 5 times are one."""
    expected = p * counts.sum()
    few = expected < 5
    observed = torch.cat([counts[~few], counts[few].sum()[None]])
    expected = torch.cat([expected[~few], expected[few].sum()[None]])
    used = expected > 0
    return float(((observed - expected)[used] ** 2 / expected[used]).sum()), int(used.sum()) - 1


@pytest.mark.parametrize(("temperature", "top_k", "top_p", "min_p"), [
    (1.0, 0, 1.0, 0.0), (1.7, 20, 1.0, 0.0), (1.4, 0, 0.8, 0.0), (0.7, 30, 0.9, 0.0),
    (1.6, 0, 1.0, 0.05)])
def test_sampled_tokens_have_the_frequencies_of_the_filtered_softmax(temperature, top_k, top_p,
                                                                   min_p):
    n = 4000
    sampling = SamplingParams(1, temperature, top_k, top_p, 3, min_p)
    ours = answers([PROMPTS[0]] * n, sampling, rows=64)
    with torch.inference_mode():
        logits = peer()(torch.tensor([PROMPTS[0]])).logits[:, -1]
    p = torch.tensor(plain_filter(logits[0].tolist(), temperature, top_k, top_p)).double()
    p = torch.where(p < min_p * p.max(), 0, p)
    p /= p.sum()
    counts = torch.bincount(torch.tensor(ours).flatten(), minlength=V).double()
    assert counts[p == 0].sum() == 0
    statistic, freedom = chi_square(counts, p)
    assert statistic < freedom + 4.5 * math.sqrt(2 * freedom)  # p below 1e-4


def plain_filter(logits: list[float], temperature: float, top_k: int, top_p: float) -> list[float]:
    """The probabilities after temperature, top-k and top-p, computed token by token."""
    scaled = [x / temperature for x in logits]
    order = sorted(range(len(scaled)), key=lambda i: -scaled[i])
    if top_k:
        order = [i for i in order if scaled[i] >= scaled[order[min(top_k, len(order)) - 1]]]
    weights = {i: math.exp(scaled[i] - scaled[order[0]]) for i in order}
    total, remaining, cumulative = sum(weights.values()), [], 0.0
    for i in order:
        if cumulative < top_p or top_p == 1:
            remaining.append(i)
        cumulative += weights[i] / total
    total = sum(weights[i] for i in remaining)
    return [weights[i] / total if i in remaining else 0.0 for i in range(len(scaled))]


# multiples of 1/1024: float32 may make two closer logits equal, and then top-k keeps both
@given(st.lists(st.integers(-8192, 8192).map(lambda x: x / 1024), min_size=2, max_size=30),
       st.floats(0.2, 4), st.integers(0, 40), st.floats(0.05, 0.999) | st.just(1.0))
@settings(max_examples=150, deadline=None)
def test_filters_equal_the_plain_formula(logits, temperature, top_k, top_p):
    ours = filter_logits(torch.tensor([logits]), temperature, top_k, top_p).softmax(-1)[0]
    expected = torch.tensor(plain_filter(logits, temperature, top_k, top_p))
    if (ours - expected).abs().max() > 1e-5:
        # at the edge of top-p float32 may keep one token more, and of equal tokens another one
        sorted_p = torch.tensor(plain_filter(logits, temperature, top_k, 1.0)).sort(descending=True)
        at_edge = (sorted_p.values.cumsum(-1) - top_p).abs().min() < 1e-5
        assert at_edge or torch.allclose(ours.sort().values, expected.sort().values, atol=1e-5)


def test_filters_equal_those_of_transformers():
    torch.manual_seed(1)
    logits = torch.randn(50, 300) * 3
    for temperature, top_k, top_p in [(0.7, 0, 0.9), (1.5, 50, 1.0), (1.0, 40, 0.5), (2.0, 1, 0.9)]:
        expected = transformers.TemperatureLogitsWarper(temperature)(None, logits)
        expected = transformers.TopKLogitsWarper(top_k)(None, expected) if top_k else expected
        expected = transformers.TopPLogitsWarper(top_p)(None, expected) if top_p < 1 else expected
        ours = filter_logits(logits, temperature, top_k, top_p)
        assert torch.equal(ours.isinf(), expected.isinf())
        torch.testing.assert_close(ours.softmax(-1), expected.softmax(-1))


def test_min_p_and_the_repetition_penalty_equal_those_of_transformers():
    torch.manual_seed(2)
    logits = torch.randn(40, 300) * 3
    for temperature, min_p in [(0.7, 0.1), (1.5, 0.02), (1.0, 1.0)]:
        expected = transformers.TemperatureLogitsWarper(temperature)(None, logits)
        expected = transformers.MinPLogitsWarper(min_p)(None, expected)
        ours = filter_logits(logits, temperature, min_p=min_p)
        assert torch.equal(ours.isinf(), expected.isinf())
        torch.testing.assert_close(ours.softmax(-1), expected.softmax(-1))
    previous = torch.randint(0, 300, (40, 50))
    for penalty in (1.3, 0.7):
        expected = transformers.RepetitionPenaltyLogitsProcessor(penalty)(previous, logits.clone())
        assert torch.equal(apply_repetition_penalty(logits, penalty, previous.tolist()), expected)


def test_a_token_of_probability_zero_is_never_sampled():
    logits = torch.full((2, 6), -math.inf)
    logits[:, 1], logits[:, 3] = 0.3, -1.2
    ends = torch.tensor([0.0, math.nextafter(1.0, 0.0)], dtype=torch.float64)
    assert sample_from_logits(logits, ends).tolist() == [1, 3]


@pytest.mark.parametrize(("values", "message"), [
    ({"temperature": -1.0}, "--temperature -1.0"), ({"temperature": math.nan}, "--temperature nan"),
    ({"top_p": 0.0}, "--top-p 0.0"), ({"top_p": 1.5}, "--top-p 1.5"), ({"top_k": -2}, "--top-k -2"),
    ({"max_new_tokens": 0}, "--max-new-tokens 0"), ({"min_p": 1.2}, "--min-p 1.2"),
    ({"repetition_penalty": 0.0}, "--repetition-penalty 0.0")])
def test_sampling_out_of_range_is_refused(values, message):
    with pytest.raises(UserError, match=message):
        SamplingParams(**values)


@pytest.mark.parametrize("values", [
    {"temperature": 1e-300}, {"temperature": 1e-40}, {"temperature": 1e7},
    {"repetition_penalty": 1e-300}, {"repetition_penalty": 1e300}, {"length_penalty": 1e300},
    {"length_penalty": -1e300}, {"beams": 1_000_000, "temperature": 0.0}])
def test_a_number_that_float32_cannot_use_is_refused(values):
    with pytest.raises(UserError, match="out of range"):
        SamplingParams(**values)


@pytest.mark.parametrize("values", [
    {"temperature": 1e-37}, {"temperature": 1e6}, {"repetition_penalty": 1e-3},
    {"repetition_penalty": 1e3}, {"temperature": 0.0, "repetition_penalty": 1e-3}])
def test_the_extremes_that_are_allowed_give_ids_of_the_vocabulary(values):
    logits = torch.tensor([[50.0, -50.0, 0.0, 49.9], [-1e4, 1e4, 1e-6, 3.0]])
    ids = next_tokens(logits, SamplingParams(**values), [random.Random(1), random.Random(2)],
                      [[0, 1], [1, 3]])
    assert all(0 <= i < 4 for i in ids.tolist())
