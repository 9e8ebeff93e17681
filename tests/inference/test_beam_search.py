"""Beam search against transformers', token for token, and what a neighbour may not change."""

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


def prompts(n: int, seed: int = 0) -> list[list[int]]:
    """Prompts of many lengths."""
    return [tiny.tokens(1, 1 + (5 * i + seed) % 17, seed=seed + i)[0].remainder(V).tolist()
            for i in range(n)]


def theirs(peer, asked, eos, beams=5, new=NEW, **more) -> list[list[int]]:
    """transformers' answers to a ragged batch, padded on the left, with its end cut off."""
    T = max(map(len, asked))
    ids = torch.tensor([[0] * (T - len(p)) + p for p in asked])
    mask = torch.tensor([[0] * (T - len(p)) + [1] * len(p) for p in asked])
    out = peer.generate(ids, attention_mask=mask, num_beams=beams, do_sample=False,
                        max_new_tokens=new, eos_token_id=sorted(eos), pad_token_id=0, **more)
    found = []
    for row in out[:, T:].tolist():
        end = next((i for i, x in enumerate(row) if x in eos), len(row) - 1)
        found.append(row[: end + 1])
    return found


def ours(model, asked, eos, beams=5, new=NEW, rows=32, **more) -> list[list[int]]:
    sampling = SamplingParams(new, temperature=0, beams=beams, **more)
    return [x.ids for x in completions(model, asked, sampling, StoppingCriteria(eos), rows=rows)]


@pytest.mark.parametrize("early_stopping", ["false", "true", "never"])
@pytest.mark.parametrize("length_penalty", [1.0, 0.0, 2.0, -0.5])
def test_beam_5_equals_transformers_on_ragged_batches(early_stopping, length_penalty):
    ended = 0
    for seed in range(3):
        peer, model = pair("llama3", seed)
        asked, eos = prompts(6, seed), {7 + seed, 40, 41, 52, 63, 74, 85}
        word = {"false": False, "true": True}.get(early_stopping, early_stopping)
        wanted = theirs(peer, asked, eos, early_stopping=word, length_penalty=length_penalty)
        assert ours(model, asked, eos, early_stopping=early_stopping,
                    length_penalty=length_penalty) == wanted
        ended += sum(x[-1] in eos for x in wanted)
    assert ended >= (0 if length_penalty == 2 else 3)  # 2 favours what goes on to the end


@pytest.mark.parametrize("shape", ["llama31", "mistral", "gemma2", "gemma3", "qwen3", "olmo2",
                                   "smollm3-window"])
def test_beam_search_of_other_families_equals_transformers_beyond_their_windows(shape):
    peer, model = pair(shape, 2)
    asked = [tiny.tokens(1, n, seed=n)[0].remainder(V).tolist() for n in (20, 3, 9)]
    for beams in (2, 5):
        alone = [theirs(peer, [p], {40}, beams)[0] for p in asked]
        assert ours(model, asked, {40}, beams) == alone


def test_a_repetition_penalty_goes_with_beams_as_in_transformers():
    peer, model = pair("llama3", 1)
    asked = prompts(4, 1)
    free = ours(model, asked, {40})
    for penalty in (1.3, 0.8):
        wanted = [theirs(peer, [p], {40}, repetition_penalty=penalty)[0] for p in asked]
        assert ours(model, asked, {40}, repetition_penalty=penalty) == wanted != free


@given(st.integers(1, 40), st.permutations(range(7)), st.sampled_from([2, 3, 5]))
@settings(max_examples=8, deadline=None)
def test_an_answer_does_not_change_with_its_neighbours_or_the_places(rows, order, beams):
    _, model = pair("llama3", 0)
    asked = prompts(7)
    alone = [ours(model, [p], {40, 41, 7}, beams)[0] for p in asked]
    found = ours(model, [asked[i] for i in order], {40, 41, 7}, beams, rows=rows)
    assert found == [alone[i] for i in order]


def test_beams_as_many_as_hypotheses_find_the_likeliest_of_all_answers():
    _, model = pair("llama3", 3, vocab_size=12)
    for prompt in ([1, 5], [3], [9, 2, 8]):
        every = [list(x) for x in itertools.product(range(12), repeat=2)]
        nats, _ = score(model, [prompt] * len(every), every)
        best = every[int(nats.argmax())]
        assert ours(model, [prompt], set(), beams=12, new=2)[0] == best


def test_a_search_ends_at_a_stop_string_and_without_eos_at_its_length():
    _, model = pair("llama3", 1)
    asked = prompts(3, 1)
    whole = ours(model, asked, set(), length_penalty=0.0)
    assert all(len(x) == NEW for x in whole)
    text = lambda ids: "".join(chr(0x4E00 + i) for i in ids)  # noqa: E731
    stop = text(whole[0][1:3])
    sampling = SamplingParams(NEW, 0, beams=5, length_penalty=0.0)
    found = list(completions(model, asked, sampling, StoppingCriteria((), [stop], text)))
    for ids, end in found:
        assert end == ("stop" if text(ids).endswith(stop) else "length")
        assert stop not in text(ids)[:-1]
    assert any(x.finish_reason == "stop" for x in found)


def test_more_beams_than_ids_are_refused_nowhere_and_bad_numbers_in_one_line():
    _, model = pair("llama3", 3, vocab_size=12)
    assert len(ours(model, [[1]], {5}, beams=20, new=3)[0]) <= 3
    for values, words in [({"beams": 0}, "--beams 0"), ({"length_penalty": math.nan}, "penalty"),
                          ({"beams": 4, "temperature": 0.5}, "--beams 4 cannot be used")]:
        with pytest.raises(UserError, match=words):
            SamplingParams(**{"temperature": 0, **values})
