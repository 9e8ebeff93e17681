"""Generation against transformers' own, and what a seed, a neighbour or a filter may not change."""

import functools
import math

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

import generate as g
import tiny
from generate import Sampling, generate
from log import UserError
from model import KVCache, Llama

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


def answers(prompts, sampling, eos=(), **more) -> list[list[int]]:
    """What follows each prompt."""
    found = [[] for _ in prompts]
    for row, token in generate(ours(), prompts, sampling, eos, **more):
        found[row].append(token)
    return found


def greedily(prompt: list[int], n: int, eos: int | None = None) -> list[int]:
    """transformers' greedy continuation of one prompt."""
    out = peer().generate(torch.tensor([prompt]), max_new_tokens=n, do_sample=False, pad_token_id=0,
                          attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
                          eos_token_id=[] if eos is None else eos)
    return out[0, len(prompt):].tolist()


def test_greedy_equals_transformers_for_prompts_of_many_lengths_at_once():
    wanted = [greedily(p, 20) for p in PROMPTS]
    assert answers(PROMPTS, Sampling(20, temperature=0)) == wanted
    assert len({tuple(x) for x in wanted}) == len(wanted) and len(set(wanted[0])) > 3  # not dull


@pytest.mark.parametrize("shape", list(tiny.SHAPES))
def test_every_family_continues_as_transformers_does_beyond_its_window(shape):
    peer = tiny.peer(shape, seed=3)
    model = tiny.ours(peer, shape)
    prompts = [tiny.tokens(1, n, seed=n)[0].tolist() for n in (30, 3, 17)]
    found = [[] for _ in prompts]
    for row, token in generate(model, prompts, Sampling(24, temperature=0)):
        found[row].append(token)
    for prompt, mine in zip(prompts, found, strict=True):
        out = peer.generate(torch.tensor([prompt]), max_new_tokens=24, do_sample=False,
                            pad_token_id=0, eos_token_id=[],
                            attention_mask=torch.ones(1, len(prompt), dtype=torch.long))
        assert mine == out[0, len(prompt):].tolist()


def test_rows_end_at_eos_as_in_transformers_and_the_others_go_on():
    greedy = [greedily(p, 20) for p in PROMPTS]
    eos = greedy[2][4]  # the longest prompt leaves first: the batch shrinks and its cache with it
    wanted = [greedily(p, 20, eos) for p in PROMPTS]
    assert len(wanted[2]) <= 5 < max(map(len, wanted))
    assert answers(PROMPTS, Sampling(20, temperature=0), {eos}) == wanted


@pytest.mark.parametrize("last", range(len(PROMPTS)))
def test_the_last_row_alive_is_right_whichever_it_is(last):
    others = [p for i, p in enumerate(PROMPTS) if i != last]
    endings = {greedily(p, 1)[0] for p in others}  # every other row ends at once
    alone = answers([PROMPTS[last]], Sampling(24, temperature=0), endings)[0]
    assert len(alone) > 3 and alone == greedily(PROMPTS[last], 24)[:len(alone)]
    assert answers(PROMPTS, Sampling(24, temperature=0), endings)[last] == alone


def test_cached_logits_equal_those_of_reading_all_again():
    model, rows = ours(), [list(p) for p in PROMPTS]
    with torch.inference_mode():
        cache = KVCache(model.config, len(rows), 32, "cpu", torch.float32)
        logits = g.prefill(model, rows, cache)
        for step in range(12):
            for i, row in enumerate(rows):
                torch.testing.assert_close(logits[i], peer()(torch.tensor([row])).logits[0, -1],
                                           atol=1e-5, rtol=1e-5)
            ids = torch.tensor([(7 * step + 11 * i) % V for i in range(len(rows))])
            rows = [[*row, int(x)] for row, x in zip(rows, ids, strict=True)]
            if step == 5:  # rows leave, the longest among them
                order = g.keep_rows(cache, [1, 3])
                rows, ids = [rows[i] for i in order], ids[order]
            logits = g.decode(model, ids, cache)


@given(st.sets(st.integers(0, 7), min_size=1), st.integers(0, 3))
@settings(max_examples=50, deadline=None)
def test_a_shrunk_cache_holds_the_rows_it_says(keep, more):
    n = max(keep) + 1 + more
    cache = KVCache(ours().config, n, 4, "cpu", torch.float32)
    cache.length += torch.arange(1, n + 1)
    cache.k += cache.length[:, None, None, None]
    cache.v += 2 * cache.k
    order = g.keep_rows(cache, sorted(keep))
    assert sorted(order) == sorted(keep)
    assert cache.length.tolist() == [i + 1 for i in order] and cache.extent == max(order) + 1
    assert cache.k[0, :, 0, 0, 0].tolist() == [i + 1 for i in order]
    assert cache.v[-1, :, -1, -1, -1].tolist() == [2 * (i + 1) for i in order]


@pytest.mark.parametrize("at_once", [32, 3, 1])
def test_a_sampled_answer_does_not_change_with_its_neighbours_or_their_order(at_once, monkeypatch):
    monkeypatch.setattr(g, "ROWS", at_once)
    sampling = Sampling(16, temperature=1.3, top_k=40, top_p=0.95, seed=5)
    alone = [answers([p], sampling)[0] for p in PROMPTS]
    assert answers(PROMPTS, sampling) == alone
    assert answers(PROMPTS[::-1], sampling) == alone[::-1]
    ending = {alone[0][3]}  # one leaves early, from each place in turn
    alone = [answers([p], sampling, ending)[0] for p in PROMPTS]
    for i in range(len(PROMPTS)):
        turned, wanted = PROMPTS[i:] + PROMPTS[:i], alone[i:] + alone[:i]
        assert answers(turned, sampling, ending) == wanted


def test_a_seed_gives_the_same_answer_again_and_another_seed_another():
    first = answers(PROMPTS, Sampling(12, seed=1))
    assert answers(PROMPTS, Sampling(12, seed=1)) == first
    assert all(a != b for a, b in zip(first, answers(PROMPTS, Sampling(12, seed=2)), strict=True))


def test_prompts_and_seeds_draw_from_streams_of_their_own():
    streams = g.random_streams([[1, 2], [1, 3], [1], [1, 2]], 1) + g.random_streams([[1, 2]], 2)
    assert len({s.random() for s in streams}) == len(streams)


def test_copies_of_a_prompt_get_different_answers_and_the_first_is_the_one_it_gets_alone():
    found = answers([PROMPTS[0]] * 3, Sampling(12, seed=1))
    assert found[0] == answers([PROMPTS[0]], Sampling(12, seed=1))[0]
    assert len({tuple(x) for x in found}) == 3


def chi_square(counts: torch.Tensor, p: torch.Tensor) -> tuple[float, int]:
    """Pearson's statistic and its degrees of freedom; tokens expected below 5 times are one."""
    expected = p * counts.sum()
    few = expected < 5
    seen = torch.cat([counts[~few], counts[few].sum()[None]])
    wanted = torch.cat([expected[~few], expected[few].sum()[None]])
    used = wanted > 0
    return float(((seen - wanted)[used] ** 2 / wanted[used]).sum()), int(used.sum()) - 1


@pytest.mark.parametrize(("temperature", "top_k", "top_p"), [
    (1.0, 0, 1.0), (1.7, 20, 1.0), (1.4, 0, 0.8), (0.7, 30, 0.9)])
def test_sampled_tokens_come_as_often_as_the_filtered_softmax_says(temperature, top_k, top_p):
    n = 4000
    found = answers([PROMPTS[0]] * n, Sampling(1, temperature, top_k, top_p, seed=3))
    with torch.inference_mode():
        logits = peer()(torch.tensor([PROMPTS[0]])).logits[:, -1]
    p = torch.tensor(plain_filter(logits[0].tolist(), temperature, top_k, top_p)).double()
    counts = torch.bincount(torch.tensor(found).flatten(), minlength=V).double()
    assert counts[p == 0].sum() == 0
    statistic, freedom = chi_square(counts, p)
    assert statistic < freedom + 4.5 * math.sqrt(2 * freedom)  # p below 1e-4


def plain_filter(logits: list[float], temperature: float, top_k: int, top_p: float) -> list[float]:
    """The probabilities that temperature, then top-k, then top-p leave, one token after another."""
    scaled = [x / temperature for x in logits]
    order = sorted(range(len(scaled)), key=lambda i: -scaled[i])
    if top_k:
        order = [i for i in order if scaled[i] >= scaled[order[min(top_k, len(order)) - 1]]]
    weights = {i: math.exp(scaled[i] - scaled[order[0]]) for i in order}
    total, kept, held = sum(weights.values()), [], 0.0
    for i in order:
        if held < top_p or top_p == 1:
            kept.append(i)
        held += weights[i] / total
    left = sum(weights[i] for i in kept)
    return [weights[i] / left if i in kept else 0.0 for i in range(len(scaled))]


@given(st.lists(st.floats(-8, 8, width=32), min_size=2, max_size=30), st.floats(0.2, 4),
       st.integers(0, 40), st.floats(0.05, 0.999) | st.just(1.0))
@settings(max_examples=150, deadline=None)
def test_filters_equal_the_plain_formula(logits, temperature, top_k, top_p):
    found = g.filter_logits(torch.tensor([logits]), temperature, top_k, top_p).softmax(-1)[0]
    wanted = torch.tensor(plain_filter(logits, temperature, top_k, top_p))
    if (found - wanted).abs().max() > 1e-5:
        # at the very edge of top-p float32 may keep a token more; of equals it may keep another
        held = torch.tensor(plain_filter(logits, temperature, top_k, 1.0)).sort(descending=True)
        at_edge = (held.values.cumsum(-1) - top_p).abs().min() < 1e-5
        assert at_edge or torch.allclose(found.sort().values, wanted.sort().values, atol=1e-5)


def test_filters_equal_the_warpers_of_transformers():
    torch.manual_seed(1)
    logits = torch.randn(50, 300) * 3
    for temperature, top_k, top_p in [(0.7, 0, 0.9), (1.5, 50, 1.0), (1.0, 40, 0.5), (2.0, 1, 0.9)]:
        wanted = transformers.TemperatureLogitsWarper(temperature)(None, logits)
        wanted = transformers.TopKLogitsWarper(top_k)(None, wanted) if top_k else wanted
        wanted = transformers.TopPLogitsWarper(top_p)(None, wanted) if top_p < 1 else wanted
        found = g.filter_logits(logits, temperature, top_k, top_p)
        assert torch.equal(found.isinf(), wanted.isinf())
        torch.testing.assert_close(found.softmax(-1), wanted.softmax(-1))


def test_draw_never_gives_a_token_of_no_probability_even_at_the_ends():
    logits = torch.full((2, 6), -math.inf)
    logits[:, 1], logits[:, 3] = 0.3, -1.2
    ends = torch.tensor([0.0, math.nextafter(1.0, 0.0)], dtype=torch.float64)
    assert g.draw(logits, ends).tolist() == [1, 3]


@pytest.mark.parametrize("temperature", [1e-30, 1e-4])
def test_a_tiny_temperature_is_greedy(temperature):
    assert answers(PROMPTS, Sampling(12, temperature)) == answers(PROMPTS, Sampling(12, 0))


def test_a_prompt_too_long_loses_its_beginning_but_not_its_bos_and_that_is_said(capsys):
    long = [BOS, *range(3, 63)]
    found = answers([long], Sampling(20, temperature=0), bos=BOS)[0]
    assert "17 of its 61 tokens are left out at the start" in capsys.readouterr().err
    assert found == greedily([BOS, *long[-43:]], 20)
    assert answers([long[1:]], Sampling(20, temperature=0))[0] == greedily(long[-44:], 20)
    assert answers([[]], Sampling(9, temperature=0), bos=BOS)[0] == greedily([BOS], 9)


def test_the_context_may_be_filled_to_its_end():
    prompt = [BOS, *range(3, 46)]  # 44 + 20 = 64
    wanted = [greedily(prompt, 20), greedily([BOS], 20)]
    assert answers([prompt, [BOS]], Sampling(20, temperature=0)) == wanted


@pytest.mark.parametrize(("values", "words"), [
    ({"temperature": -1.0}, "--temperature -1.0"), ({"temperature": math.nan}, "--temperature nan"),
    ({"top_p": 0.0}, "--top-p 0.0"), ({"top_p": 1.5}, "--top-p 1.5"), ({"top_k": -2}, "--top-k -2"),
    ({"max_new_tokens": 0}, "--max-new-tokens 0")])
def test_sampling_out_of_range_is_refused(values, words):
    with pytest.raises(UserError, match=words):
        Sampling(**values)


def test_what_cannot_be_generated_is_refused_in_one_line():
    with pytest.raises(UserError, match="no BOS"):
        answers([[]], Sampling(4))
    with pytest.raises(UserError, match="leaves no room for a prompt; at most 63"):
        answers([[1]], Sampling(64))
    broken = Llama(ours().config)
    broken.load_state_dict({k: v * math.nan for k, v in ours().state_dict().items()})
    with pytest.raises(UserError, match="not finite"):
        list(generate(broken, [[1]], Sampling(4)))
    assert answers([], Sampling(4)) == []


def test_gradients_are_off_inside_and_on_between_two_tokens(monkeypatch):
    choose, inside = g.choose, []

    def watched(*args):
        inside.append(torch.is_inference_mode_enabled())
        return choose(*args)

    monkeypatch.setattr(g, "choose", watched)
    for _ in generate(ours(), [[1, 2]], Sampling(3)):
        assert torch.is_grad_enabled() and not torch.is_inference_mode_enabled()
    assert inside == [True] * 3
