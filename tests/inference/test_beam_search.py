"""Beam search against transformers', token for token; neighbours do not change an answer."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers import tiny
from inference.generate import completions
from inference.sampling import SamplingParams, StoppingCriteria
from inference.scoring import score
from runtime.console import UserError

V, CONTEXT, NEW = 97, 96, 14


def pair(shape: str, seed: int, **changes):
    """transformers' model and ours, whose answers of NEW ids end now and then by an id of 96."""
    changes = {"vocab_size": V, "max_position_embeddings": CONTEXT, **changes}
    peer = tiny.peer(shape, seed=seed, **changes)
    with torch.no_grad():  # flatter than a random model: hypotheses compete
        peer.get_output_embeddings().weight.mul_(0.4)
    return peer, tiny.ours(peer, shape, **changes)


def make_prompts(n: int, seed: int = 0) -> list[list[int]]:
    """Prompts of many lengths."""
    return [tiny.tokens(1, 1 + (5 * i + seed) % 17, seed=seed + i)[0].remainder(V).tolist()
            for i in range(n)]


def theirs(peer, prompts, eos, beams=5, new=NEW, **options) -> list[list[int]]:
    """transformers' answers to a ragged batch, padded on the left, with its end cut off."""
    T = max(map(len, prompts))
    ids = torch.tensor([[0] * (T - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (T - len(p)) + [1] * len(p) for p in prompts])
    out = peer.generate(ids, attention_mask=mask, num_beams=beams, do_sample=False,
                        max_new_tokens=new, eos_token_id=sorted(eos), pad_token_id=0, **options)
    answers = []
    for row in out[:, T:].tolist():
        end = next((i for i, x in enumerate(row) if x in eos), len(row) - 1)
        answers.append(row[: end + 1])
    return answers


def ours(model, prompts, eos, beams=5, new=NEW, rows=32, **options) -> list[list[int]]:
    sampling = SamplingParams(new, temperature=0, beams=beams, **options)
    return [x.ids for x in completions(model, prompts, sampling, StoppingCriteria(eos), rows=rows)]


@pytest.mark.parametrize("early_stopping", ["false", "true", "never"])
@pytest.mark.parametrize("length_penalty", [1.0, 0.0, 2.0, -0.5])
def test_beam_5_equals_transformers_on_ragged_batches(early_stopping, length_penalty):
    ended = 0
    for seed in range(3):
        peer, model = pair("llama3", seed)
        batch, eos = make_prompts(6, seed), {7 + seed, 40, 41, 52, 63, 74, 85}
        option = {"false": False, "true": True}.get(early_stopping, early_stopping)
        expected = theirs(peer, batch, eos, early_stopping=option, length_penalty=length_penalty)
        assert ours(model, batch, eos, early_stopping=early_stopping,
                    length_penalty=length_penalty) == expected
        ended += sum(x[-1] in eos for x in expected)
    assert ended >= (0 if length_penalty == 2 else 3)  # 2 favours what goes on to the end


@pytest.mark.parametrize("shape", ["llama31", "mistral", "gemma2", "gemma3", "qwen3", "olmo2",
                                   "smollm3-window"])
def test_beam_search_of_other_families_equals_transformers_beyond_their_windows(shape):
    peer, model = pair(shape, 2)
    batch = [tiny.tokens(1, n, seed=n)[0].remainder(V).tolist() for n in (20, 3, 9)]
    for beams in (2, 5):
        alone = [theirs(peer, [p], {40}, beams)[0] for p in batch]
        assert ours(model, batch, {40}, beams) == alone


def test_a_repetition_penalty_goes_with_beams_as_in_transformers():
    peer, model = pair("llama3", 1)
    batch = make_prompts(4, 1)
    free = ours(model, batch, {40})
    for penalty in (1.3, 0.8):
        expected = [theirs(peer, [p], {40}, repetition_penalty=penalty)[0] for p in batch]
        assert ours(model, batch, {40}, repetition_penalty=penalty) == expected != free


@given(st.integers(1, 40), st.permutations(range(7)), st.sampled_from([2, 3, 5]))
@settings(max_examples=8, deadline=None)
def test_an_answer_does_not_change_with_its_neighbours_or_the_number_of_rows(rows, order, beams):
    _, model = pair("llama3", 0)
    batch = make_prompts(7)
    alone = [ours(model, [p], {40, 41, 7}, beams)[0] for p in batch]
    answers = ours(model, [batch[i] for i in order], {40, 41, 7}, beams, rows=rows)
    assert answers == [alone[i] for i in order]


def test_with_a_beam_for_each_hypothesis_the_most_likely_answer_is_found():
    _, model = pair("llama3", 3, vocab_size=12)
    for prompt in ([1, 5], [3], [9, 2, 8]):
        every = [list(x) for x in itertools.product(range(12), repeat=2)]
        nats, _ = score(model, [prompt] * len(every), every)
        best = every[int(nats.argmax())]
        assert ours(model, [prompt], set(), beams=12, new=2)[0] == best


def test_a_search_ends_at_a_stop_string_and_without_eos_at_its_length():
    _, model = pair("llama3", 1)
    batch = make_prompts(3, 1)
    unstopped = ours(model, batch, set(), length_penalty=0.0)
    assert all(len(x) == NEW for x in unstopped)
    text = lambda ids: "".join(chr(0x4E00 + i) for i in ids)  # noqa: E731
    stop = text(unstopped[0][1:3])
    sampling = SamplingParams(NEW, 0, beams=5, length_penalty=0.0)
    answers = list(completions(model, batch, sampling, StoppingCriteria((), [stop], text)))
    for ids, end in answers:
        assert end == ("stop" if text(ids).endswith(stop) else "length")
        assert stop not in text(ids)[:-1]
    assert any(x.finish_reason == "stop" for x in answers)


def test_more_beams_than_ids_are_allowed_and_bad_numbers_are_one_line():
    _, model = pair("llama3", 3, vocab_size=12)
    assert len(ours(model, [[1]], {5}, beams=20, new=3)[0]) <= 3
    for values, message in [({"beams": 0}, "--beams 0"), ({"length_penalty": math.nan}, "penalty"),
                          ({"beams": 4, "temperature": 0.5}, "--beams 4 cannot be used")]:
        with pytest.raises(UserError, match=message):
            SamplingParams(**{"temperature": 0, **values})
