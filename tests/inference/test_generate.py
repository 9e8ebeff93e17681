"""Generation against transformers' own, and what a seed, a neighbour or a filter may not change."""

import functools
import math
from dataclasses import replace

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

import lora
from helpers import tiny
from inference import decode
from inference import generate as g
from inference import sampling as chosen
from inference.generate import generate, score
from inference.sampling import Sampling, Stops
from layers import nf4
from model import Decoder, KVCache, Llama
from runtime.console import UserError

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
    return [x.ids for x in g.answers(ours(), prompts, sampling, Stops(eos), **more)]


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
        logits = decode.prefill(model, rows, cache)
        for step in range(12):
            for i, row in enumerate(rows):
                torch.testing.assert_close(logits[i], peer()(torch.tensor([row])).logits[0, -1],
                                           atol=1e-5, rtol=1e-5)
            ids = torch.tensor([(7 * step + 11 * i) % V for i in range(len(rows))])
            rows = [[*row, int(x)] for row, x in zip(rows, ids, strict=True)]
            if step == 5:  # rows leave, the longest among them
                cache, order = decode.keep_rows(cache, [1, 3])
                rows, ids = [rows[i] for i in order], ids[order]
            logits = decode.step(model, ids, cache)


@pytest.mark.parametrize("budget", [1, 30, 4096])
@pytest.mark.parametrize("shape", list(tiny.SHAPES))
def test_prompts_read_packed_are_read_as_side_by_side(shape, budget, monkeypatch):
    """The same keys, values and logits as of rows that are padded on the right."""
    monkeypatch.setattr(decode, "BUDGET", budget)
    model = tiny.ours(tiny.peer(shape), shape)
    prompts = [tiny.tokens(1, n, seed=n)[0].tolist() for n in (7, 1, 25, 70, 2)]
    packed, plain = (KVCache(model.config, 5, 80, "cpu", torch.float32) for _ in range(2))
    with torch.inference_mode():
        logits = decode.prefill(model, prompts, packed)
        tokens, doc = decode.ragged(prompts, model.device)
        pos = torch.arange(tokens.shape[1]).expand_as(tokens)
        torch.testing.assert_close(logits, model(tokens, doc, pos, cache=plain), atol=2e-4,
                                   rtol=1e-4)
    assert packed.length.tolist() == plain.length.tolist() == [7, 1, 25, 70, 2]
    assert packed.extent == plain.extent == 70 and packed.rows is None
    for row, n in enumerate(packed.length):
        for x, y in ((packed.k, plain.k), (packed.v, plain.v)):
            torch.testing.assert_close(x[:, row, :n], y[:, row, :n], atol=1e-4, rtol=1e-4)
            assert not x[:, row, n:].any()


@given(st.lists(st.integers(1, 9), max_size=60), st.integers(1, 3))
def test_prompts_are_begun_by_length_and_none_waits_for_those_far_behind_it(lengths, rows):
    order = decode.in_order(lengths, rows)
    ahead = decode.AHEAD * rows
    assert sorted(order) == list(range(len(lengths)))
    assert all(i // ahead == at // ahead for at, i in enumerate(order))
    for first in range(0, len(order), ahead):
        part = [lengths[i] for i in order[first : first + ahead]]
        assert part == sorted(part, reverse=first // ahead % 2 == 1)


@given(st.sets(st.integers(0, 7), min_size=1), st.integers(0, 3))
@settings(max_examples=50, deadline=None)
def test_a_shrunk_cache_holds_the_rows_it_says(keep, more):
    n = max(keep) + 1 + more
    cache = KVCache(ours().config, n, 4, "cpu", torch.float32)
    cache.length += torch.arange(1, n + 1)
    cache.k += cache.length[:, None, None, None]
    cache.v += 2 * cache.k
    cache.extent = 4
    cache, order = decode.keep_rows(cache, sorted(keep))
    assert sorted(order) == sorted(keep)
    assert cache.length.tolist() == [i + 1 for i in order] and cache.extent == max(order) + 1
    assert cache.k[0, :, 0, 0, 0].tolist() == [i + 1 for i in order]
    assert cache.v[-1, :, -1, -1, -1].tolist() == [2 * (i + 1) for i in order]


@pytest.mark.parametrize("at_once", [32, 3, 1])
def test_a_sampled_answer_does_not_change_with_its_neighbours_or_their_order(at_once):
    sampling = Sampling(16, temperature=1.3, top_k=40, top_p=0.95, seed=5)
    alone = [answers([p], sampling)[0] for p in PROMPTS]
    assert answers(PROMPTS, sampling, rows=at_once) == alone
    assert answers(PROMPTS[::-1], sampling, rows=at_once) == alone[::-1]
    ending = {alone[0][3]}  # one leaves early, from each place in turn
    alone = [answers([p], sampling, ending)[0] for p in PROMPTS]
    for i in range(len(PROMPTS)):
        turned, wanted = PROMPTS[i:] + PROMPTS[:i], alone[i:] + alone[:i]
        assert answers(turned, sampling, ending, rows=at_once) == wanted


def test_a_seed_gives_the_same_answer_again_and_another_seed_another():
    first = answers(PROMPTS, Sampling(12, seed=1))
    assert answers(PROMPTS, Sampling(12, seed=1)) == first
    assert all(a != b for a, b in zip(first, answers(PROMPTS, Sampling(12, seed=2)), strict=True))


def test_every_prompt_copy_and_seed_has_a_seed_of_its_own():
    seeds = chosen.own_seeds([[1, 2], [1, 3], [1], [1, 2]], 1) + chosen.own_seeds([[1, 2]], 2)
    assert len(set(seeds)) == len(seeds)


def test_copies_of_a_prompt_get_different_answers_and_the_first_is_the_one_it_gets_alone():
    found = answers([PROMPTS[0]] * 3, Sampling(12, seed=1))
    assert found[0] == answers([PROMPTS[0]], Sampling(12, seed=1))[0]
    assert len({tuple(x) for x in found}) == 3


@pytest.mark.parametrize("rows", [1, 2, 3, 5, 40])
def test_a_finished_row_gives_its_place_to_the_next_prompt_and_no_answer_changes(rows, monkeypatch):
    prompts = [tiny.tokens(1, 1 + (7 * i) % 19, seed=i)[0].remainder(V).tolist() for i in range(9)]
    wanted = [greedily(p, 12) for p in prompts]
    ending = wanted[0][3]
    wanted = [greedily(p, 12, ending) for p in prompts]
    assert len({len(x) for x in wanted}) > 1
    widths, run = [], decode.step

    def watched(model, ids, cache):
        widths.append(len(ids))
        return run(model, ids, cache)

    monkeypatch.setattr(decode, "step", watched)
    assert answers(prompts, Sampling(12, 0), {ending}, rows=rows) == wanted
    assert max(widths) <= rows
    waiting = sum(map(len, wanted)) - len(wanted)  # tokens that a step must make
    assert rows != 2 or len(widths) < 0.7 * waiting  # both places are used while prompts wait


def text_of(ids) -> str:
    """A text for ids: a letter each, so that a stop string may span several."""
    return "".join(chr(97 + i % 26) for i in ids)


def test_a_stop_string_ends_a_row_with_the_token_that_completes_it():
    whole = [greedily(p, 20) for p in PROMPTS]
    texts = [text_of(x) for x in whole]
    strings = [texts[0][4:7], texts[2][9:11]]
    stops = Stops((), strings, text_of)
    found = list(g.answers(ours(), PROMPTS, Sampling(20, 0), stops))
    assert {x.end for x in found} == {"stop", "length"}
    for (ids, end), text in zip(found, texts, strict=True):
        at = min((text.find(x) + len(x) for x in strings if x in text), default=20)
        assert text_of(ids) == text[:at] and end == ("length" if at == 20 else "stop")
    assert stops.cut(texts[0]) == texts[0][:4]


def test_a_stop_string_may_end_inside_a_token_and_span_many():
    ids = [5, 6, 7, 8]
    text = {5: "a b", 6: "c\nd", 7: "", 8: "efg"}
    stops = Stops({9}, ["b c\n", "\ndef"], lambda new: "".join(text[i] for i in new))
    assert [stops.end(ids[: n + 1], 10) for n in range(4)] == ["", "", "", "stop"]
    assert Stops({9}, ["bc\n"], stops.text).end(ids[:2], 10) == "stop"
    assert Stops({9}).end([5, 9], 2) == "eos" and Stops({9}).end([9, 5], 2) == "length"


def test_each_prompt_may_be_given_a_seed():
    alone = [answers([p], Sampling(12), seeds=[i])[0] for i, p in enumerate(PROMPTS, 5)]
    assert answers(PROMPTS, Sampling(12), seeds=[5, 6, 7, 8]) == alone
    assert answers(PROMPTS[::-1], Sampling(12), seeds=[8, 7, 6, 5], rows=2) == alone[::-1]
    own = chosen.own_seeds([PROMPTS[0]] * 3, 1)  # so a file is taken up again in its middle
    copies = answers([PROMPTS[0]] * 3, Sampling(12, seed=1))
    assert answers([PROMPTS[0]] * 2, Sampling(12), seeds=own[1:]) == copies[1:]


def peer_scores(peer, prompt, ids) -> tuple[float, bool]:
    """log p and greediness of a continuation, by transformers' forward pass over the whole."""
    with torch.inference_mode():
        logp = peer(torch.tensor([[*prompt, *ids]])).logits[0].log_softmax(-1)
    logp = logp[len(prompt) - 1 : -1]
    return (float(logp.gather(1, torch.tensor(ids)[:, None]).double().sum()),
            logp.argmax(-1).tolist() == list(ids))


def scored_as(peer, model, prompts, continuations) -> tuple[torch.Tensor, torch.Tensor]:
    """Our scores, which are transformers'."""
    found, greedy = score(model, prompts, continuations)
    wanted = [peer_scores(peer, p, c) for p, c in zip(prompts, continuations, strict=True)]
    torch.testing.assert_close(found, torch.tensor([x for x, _ in wanted]).double(), rtol=1e-5,
                               atol=1e-5)
    assert greedy.tolist() == [x for _, x in wanted]
    return found, greedy


def tokens_read(monkeypatch) -> list[int]:
    """How many tokens each pass through a model reads from here on."""
    read, run = [], Decoder.forward

    def watched(self, tokens, doc, pos, cache=None):
        read.append(int((doc >= 0).sum()))
        return run(self, tokens, doc, pos, cache)

    monkeypatch.setattr(Decoder, "forward", watched)
    return read


@pytest.mark.parametrize("shape", list(tiny.SHAPES))
def test_scores_equal_transformers_for_every_family(shape):
    peer = tiny.peer(shape, seed=4)
    model = tiny.ours(peer, shape)
    prompts, continuations = [], []
    for i, (n, many) in enumerate([(30, 4), (1, 3), (17, 1), (9, 2), (30, 1)]):
        prompt = tiny.tokens(1, n, seed=i)[0].tolist()
        for j in range(many):
            prompts.append(prompt)
            continuations.append(tiny.tokens(1, 1 + 4 * j, seed=50 + i + j)[0].tolist())
    ahead = list(generate(model, prompts[:1], Sampling(3, 0)))
    prompts.append(prompts[0])
    continuations.append([token for _, token in ahead])  # greedy by its making
    found, greedy = scored_as(peer, model, prompts, continuations)
    assert found.dtype == torch.float64 and greedy[-1]


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(1, 9)), min_size=1, max_size=12),
       st.integers(1, 60), st.integers(9, 40))
@settings(max_examples=25, deadline=None)
def test_scores_do_not_depend_on_neighbours_batches_or_order(asked, budget, length):
    prompts = [PROMPTS[i] for i, _ in asked]
    continuations = [tiny.tokens(1, n, seed=n)[0].remainder(V).tolist() for _, n in asked]
    alone = [score(ours(), [p], [c], length) for p, c in zip(prompts, continuations, strict=True)]
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(g, "SCORED", budget)
        found, greedy = score(ours(), prompts, continuations, length)
    torch.testing.assert_close(found, torch.cat([x for x, _ in alone]), rtol=1e-5, atol=1e-5)
    assert greedy.tolist() == [bool(x) for _, x in alone]


@pytest.mark.parametrize("shape", list(tiny.SHAPES))
def test_scores_behind_one_beginning_equal_transformers_and_it_is_read_once(shape, monkeypatch):
    """20 tokens that all prompts begin with: longer than a window, shorter than some prompts."""
    peer = tiny.peer(shape, seed=4)
    model, read = tiny.ours(peer, shape), tokens_read(monkeypatch)
    begun = tiny.tokens(1, 20, seed=9)[0].tolist()
    rest = [tiny.tokens(1, n, seed=n)[0].tolist() for n in (0, 1, 9)]
    prompts = [begun + x for x in rest for _ in range(2)]
    continuations = [tiny.tokens(1, 1 + i % 3, seed=70 + i)[0].tolist() for i in range(6)]
    scored_as(peer, model, prompts, continuations)
    if shape != "dynamic":
        later = sum(len(x) - 1 for x in continuations)
        assert sum(read) == 19 + sum(1 + len(x) for x in rest) + later


@pytest.mark.parametrize("shape", list(tiny.SHAPES))
def test_what_some_prompts_begin_with_is_read_once_and_equals_transformers(shape, monkeypatch):
    """Two pages of unlike lengths with questions about each, one of them asked twice, and prompts
    that share too little."""
    peer = tiny.peer(shape, seed=4)
    model, read = tiny.ours(peer, shape), tokens_read(monkeypatch)
    pages = [tiny.tokens(1, n, seed=n)[0].tolist() for n in (20, 25)]
    alone = [tiny.tokens(1, n, seed=n)[0].tolist() for n in (7, 30)]
    asked = [[90 + i] * (1 + 3 * i) for i in range(3)]
    prompts = [page + x for page in pages for x in asked] + [pages[0] + asked[2]] + alone
    prompts.append(pages[1][:10] + asked[1])  # less than half of a page
    continuations = [tiny.tokens(1, 1 + i % 3, seed=70 + i)[0].tolist() for i in range(10)]
    scored_as(peer, model, prompts, continuations)
    if shape != "dynamic":
        once = sum(map(len, pages)) + 2 * sum(map(len, asked)) + sum(map(len, alone)) + 10 + 4
        assert sum(read) == once + sum(len(x) - 1 for x in continuations)


@given(st.lists(st.tuples(st.integers(1, 40), st.integers(0, 3), st.integers(1, 4)), min_size=1,
                max_size=14), st.sampled_from([7, 40, 1024]))
@settings(max_examples=30, deadline=None)
def test_scores_of_prompts_with_any_beginnings_are_those_of_each_alone(asked, budget):
    """Beginnings of two texts, cut anywhere, with something behind."""
    texts = [tiny.tokens(1, 40, seed=i)[0].remainder(V).tolist() for i in (1, 2)]
    prompts = [texts[tail % 2][:n] + [7, 8, 9][:tail] for n, tail, _ in asked]
    continuations = [[3, 4, 5, 6][:n] for *_, n in asked]
    alone = [score(ours(), [p], [c])[0] for p, c in zip(prompts, continuations, strict=True)]
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(g, "SCORED", budget)
        found, _ = score(ours(), prompts, continuations)
    torch.testing.assert_close(found, torch.cat(alone), rtol=1e-5, atol=1e-5)


def test_copies_of_one_long_beginning_stay_few(monkeypatch):
    """Many pages behind one instruction, two questions about each."""
    made, build = [], g.KVCache

    def watched(config, rows, size, *more):
        made.append((rows, size))
        return build(config, rows, size, *more)

    monkeypatch.setattr(g, "KVCache", watched)
    monkeypatch.setattr(g, "SCORED", 64)
    monkeypatch.setattr(g, "HELD", 2)
    common, *pages = ([i, *tiny.tokens(1, n - 1, seed=i)[0].remainder(V).tolist()]
                      for i, n in enumerate((40, *[16] * 8), 2))
    prompts = [[*common, *page, x] for page in pages for x in (7, 8)]
    found, _ = score(ours(), prompts, [[5]] * 16)
    alone = [score(ours(), [x], [[5]])[0] for x in prompts]
    torch.testing.assert_close(found, torch.cat(alone), rtol=1e-5, atol=1e-5)
    assert len(made) > 1 + 4 and max(rows * size for rows, size in made) <= 2 * 64


def test_a_prompt_asked_often_is_read_once(monkeypatch):
    read, done = tokens_read(monkeypatch), []
    score(ours(), [PROMPTS[2]] * 4 + [PROMPTS[0]], [[5], [6], [7], [8], [9]], move=done.append)
    assert read == [len(PROMPTS[2]) + len(PROMPTS[0])] and done == [5]  # one-token choices share it
    read.clear()
    score(ours(), [PROMPTS[2]] * 3, [[5, 6, 7], [6], [8, 9]])
    assert read == [len(PROMPTS[2]), 2 + 1]


def test_a_prompt_beyond_the_context_is_scored_behind_its_end_as_in_lm_eval():
    prompt = tiny.tokens(1, 90)[0].remainder(V).tolist()
    for ids in ([5], [5, 6, 7, 8], list(range(3, 63))):
        whole = [*prompt, *ids][-(CONTEXT + 1):]
        wanted, _ = peer_scores(peer(), whole[: -len(ids)], ids)
        assert score(ours(), [prompt], [ids])[0].item() == pytest.approx(wanted, rel=1e-5)
    both, _ = score(ours(), [prompt, prompt], [[5], [5, 6, 7, 8]])
    assert both[1] == pytest.approx(float(score(ours(), [prompt], [[5, 6, 7, 8]])[0]), rel=1e-6)


@pytest.mark.parametrize(("prompt", "ids", "words"), [
    ([1, 2], [], "request 2: its continuation has no token"),
    ([], [5], "request 2: an empty prompt; begin it with BOS"),
    ([1], [5] * 65, "request 2: a continuation of 65 tokens; the context holds 64")])
def test_what_cannot_be_scored_is_refused_in_one_line(prompt, ids, words):
    with pytest.raises(UserError, match=words):
        score(ours(), [[1], prompt], [[2], ids])


def test_nothing_asked_is_nothing_scored():
    assert [x.tolist() for x in score(ours(), [], [])] == [[], []]


def chi_square(counts: torch.Tensor, p: torch.Tensor) -> tuple[float, int]:
    """Pearson's statistic and its degrees of freedom; tokens expected below 5 times are one."""
    expected = p * counts.sum()
    few = expected < 5
    seen = torch.cat([counts[~few], counts[few].sum()[None]])
    wanted = torch.cat([expected[~few], expected[few].sum()[None]])
    used = wanted > 0
    return float(((seen - wanted)[used] ** 2 / wanted[used]).sum()), int(used.sum()) - 1


@pytest.mark.parametrize(("temperature", "top_k", "top_p", "min_p"), [
    (1.0, 0, 1.0, 0.0), (1.7, 20, 1.0, 0.0), (1.4, 0, 0.8, 0.0), (0.7, 30, 0.9, 0.0),
    (1.6, 0, 1.0, 0.05)])
def test_sampled_tokens_come_as_often_as_the_filtered_softmax_says(temperature, top_k, top_p,
                                                                   min_p):
    n = 4000
    found = answers([PROMPTS[0]] * n, Sampling(1, temperature, top_k, top_p, 3, min_p), rows=64)
    with torch.inference_mode():
        logits = peer()(torch.tensor([PROMPTS[0]])).logits[:, -1]
    p = torch.tensor(plain_filter(logits[0].tolist(), temperature, top_k, top_p)).double()
    p = torch.where(p < min_p * p.max(), 0, p)
    p /= p.sum()
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


# of 1024ths, because float32 may make equals of two logits that differ by less, and top-k keep both
@given(st.lists(st.integers(-8192, 8192).map(lambda x: x / 1024), min_size=2, max_size=30),
       st.floats(0.2, 4), st.integers(0, 40), st.floats(0.05, 0.999) | st.just(1.0))
@settings(max_examples=150, deadline=None)
def test_filters_equal_the_plain_formula(logits, temperature, top_k, top_p):
    found = chosen.filter_logits(torch.tensor([logits]), temperature, top_k, top_p).softmax(-1)[0]
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
        found = chosen.filter_logits(logits, temperature, top_k, top_p)
        assert torch.equal(found.isinf(), wanted.isinf())
        torch.testing.assert_close(found.softmax(-1), wanted.softmax(-1))


def test_min_p_and_the_repetition_penalty_equal_those_of_transformers():
    torch.manual_seed(2)
    logits = torch.randn(40, 300) * 3
    for temperature, min_p in [(0.7, 0.1), (1.5, 0.02), (1.0, 1.0)]:
        wanted = transformers.TemperatureLogitsWarper(temperature)(None, logits)
        wanted = transformers.MinPLogitsWarper(min_p)(None, wanted)
        found = chosen.filter_logits(logits, temperature, min_p=min_p)
        assert torch.equal(found.isinf(), wanted.isinf())
        torch.testing.assert_close(found.softmax(-1), wanted.softmax(-1))
    seen = torch.randint(0, 300, (40, 50))
    for penalty in (1.3, 0.7):
        wanted = transformers.RepetitionPenaltyLogitsProcessor(penalty)(seen, logits.clone())
        assert torch.equal(chosen.penalise(logits, penalty, seen.tolist()), wanted)


def test_greedy_with_a_repetition_penalty_equals_transformers():
    for penalty in (1.4, 0.9):
        wanted = [peer().generate(torch.tensor([p]), max_new_tokens=16, do_sample=False,
                                  pad_token_id=0, eos_token_id=[], repetition_penalty=penalty,
                                  attention_mask=torch.ones(1, len(p), dtype=torch.long))
                  [0, len(p):].tolist() for p in PROMPTS]
        assert answers(PROMPTS, Sampling(16, 0, repetition_penalty=penalty), rows=3) == wanted


def test_draw_never_gives_a_token_of_no_probability_even_at_the_ends():
    logits = torch.full((2, 6), -math.inf)
    logits[:, 1], logits[:, 3] = 0.3, -1.2
    ends = torch.tensor([0.0, math.nextafter(1.0, 0.0)], dtype=torch.float64)
    assert chosen.draw(logits, ends).tolist() == [1, 3]


@pytest.mark.parametrize("temperature", [1e-30, 1e-4])
def test_a_tiny_temperature_is_greedy(temperature):
    assert answers(PROMPTS, Sampling(12, temperature)) == answers(PROMPTS, Sampling(12, 0))


def test_a_prompt_too_long_loses_its_beginning_but_not_its_bos_and_that_is_said(capsys):
    long = [BOS, *range(3, 63)]
    found = answers([long], Sampling(20, temperature=0), bos=BOS)[0]
    assert "1 of 1 prompts: up to 17 of 61 tokens are left out" in capsys.readouterr().err
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
    ({"max_new_tokens": 0}, "--max-new-tokens 0"), ({"min_p": 1.2}, "--min-p 1.2"),
    ({"repetition_penalty": 0.0}, "--repetition-penalty 0.0")])
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


def read(model: Llama, rows: int) -> torch.Tensor:
    """Logits behind some prompts and one more id each."""
    prompts = [tiny.tokens(1, 9 + i, seed=i)[0].tolist() for i in range(rows)]
    with torch.inference_mode():
        cache = KVCache(model.config, rows, 40, "cpu", model.compute_dtype)
        decode.prefill(model, prompts, cache)
        return decode.step(model, torch.arange(5, 5 + rows), cache)


def adapted(model: Llama, how: str) -> Llama:
    """The same with an adapter that is not nothing."""
    if how:
        torch.manual_seed(1)
        lora.attach(model, 4, 8, 0.0, ["all-linear"], dora=how == "dora")
        for m in lora.adapters(model).values():
            torch.nn.init.normal_(m.lora_B.weight, std=0.1)
    return model.eval()


@pytest.mark.parametrize("how", ["", "lora", "dora"])
@pytest.mark.parametrize("shape", ["llama32", "biases", "gemma2"])
@pytest.mark.parametrize("amx", [False, True])
def test_a_packed_model_computes_what_a_plain_one_does(shape, how, amx, monkeypatch):
    """In float32 as well, and in bf16 as near to float32."""
    monkeypatch.setattr(decode, "AMX", amx)
    peer, found = tiny.peer(shape).bfloat16().float(), {}
    for dtype in (torch.float32, torch.bfloat16):
        for packed in (False, True):
            model = adapted(tiny.ours(peer, shape), how)
            for m in model.modules():  # an adapter stays in float32
                if type(m) is not torch.nn.Linear:
                    for p in m.parameters(recurse=False):
                        p.data = p.data.to(dtype)
            model.model.compute_dtype = dtype
            if packed:
                decode.pack(model)
                wanted = decode.Few if amx and dtype == torch.bfloat16 else decode.Packed
                assert isinstance(model.lm_head, wanted) == decode.packs(model)
                kept = dtype if how == "lora" else torch.float32  # DoRA's lengths are float32
                assert {m.lora_A.weight.dtype for m in lora.adapters(model).values()} <= {kept}
            found[dtype, packed] = [read(model, rows) for rows in (1, 3, 20)]
    for i, exact in enumerate(found[torch.float32, False]):
        torch.testing.assert_close(found[torch.float32, True][i], exact, atol=2e-4, rtol=1e-4)
        plainly, packed = ((found[torch.bfloat16, x][i] - exact).abs().mean() for x in (0, 1))
        assert 0 < packed < 1.3 * plainly


@pytest.mark.parametrize("how", ["lora", "dora"])
def test_an_adapter_that_is_cast_once_gives_the_same_bits(how):
    model = adapted(tiny.ours(tiny.peer("llama32"), "llama32").bfloat16(), how)
    model.model.compute_dtype = torch.bfloat16
    plain = read(model, 3)
    assert {m.lora_B.weight.dtype for m in lora.adapters(model).values()} == {torch.float32}
    decode.settle(model)
    assert {m.lora_B.weight.dtype for m in lora.adapters(model).values()} == {
        torch.bfloat16 if how == "lora" else torch.float32}
    assert torch.equal(read(model, 3), plain)


@pytest.mark.parametrize("shape", ["llama32", "biases"])
def test_a_packed_model_that_keeps_its_head_gives_the_same_losses(shape):
    peer = tiny.peer(shape)
    plain, packed = tiny.ours(peer, shape), tiny.ours(peer, shape)
    decode.pack(packed, losses=True)
    ids = torch.randint(0, tiny.V, (2, 24), generator=torch.Generator().manual_seed(0))
    at = ids, torch.zeros_like(ids), torch.arange(24).expand(2, 24), ids.roll(-1, 1)
    with torch.inference_mode():
        torch.testing.assert_close(packed(*at), plain(*at), atol=1e-5, rtol=1e-5)


def test_where_there_is_no_such_product_a_model_stays_as_it_is(monkeypatch):
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: False)
    model = tiny.ours(tiny.peer("llama3"), "llama3").bfloat16()
    model.model.compute_dtype = torch.bfloat16
    decode.pack(model)
    assert not any(isinstance(m, decode.Packed) for m in model.modules())


def test_recording_where_it_cannot_be_is_refused():
    with pytest.raises(UserError, match="--compile: on a GPU alone"):
        decode.hasten(ours())


@pytest.mark.parametrize("beams", [1, 2])
def test_a_step_in_which_nobody_ends_asks_the_cache_nothing(monkeypatch, beams):
    """On a GPU each such question is a wait for the step before."""
    module, left = (g.beam if beams > 1 else g), []
    real = module.keep_rows
    monkeypatch.setattr(module, "keep_rows", lambda *x: left.append(len(x[1])) or real(*x))
    prompts = [[5, 6], [7, 8, 9], [10]]
    sampling = Sampling(6, temperature=0.0, beams=beams)
    assert all(len(x.ids) == 6 for x in g.answers(ours(), prompts, sampling))
    assert left == [0]


def replayed(run, pool=None):
    """What a GPU's graph does, on a CPU: computed once beforehand, then always into one place."""
    found = run().clone()

    def play():
        found.copy_(run())
        return found

    return play


SAMPLINGS = {"greedy": Sampling(30, temperature=0.0),
             "beams": Sampling(30, temperature=0.0, beams=3),
             "drawn": Sampling(30, temperature=1.0, top_k=40)}


def both_ways(monkeypatch, model: Llama, sampling: Sampling) -> None:
    """Eleven ragged prompts by four side by side: the same answers, steps recorded or not."""
    prompts = [tiny.tokens(1, n, seed=n)[0].tolist() for n in (7, 1, 25, 40, 2, 3, 9, 30, 5, 6, 4)]
    monkeypatch.setattr(decode, "REACH", 16)

    def run(recorded: bool, ends: set[int]) -> list[list[int]]:
        model.recorded = recorded
        return [x.ids for x in g.answers(model, prompts, sampling, Stops(ends),
                                         rows=4 * sampling.beams)]

    ends = {ids[5] for ids in run(False, set())[::2]}  # so that some end: rows move, others come
    plain = run(False, ends)
    assert 1 < sum(map(len, plain)) / len(plain) < 30
    assert run(True, ends) == plain


@pytest.mark.parametrize("how", list(SAMPLINGS))
@pytest.mark.parametrize("shape", [x for x in tiny.SHAPES if x != "dynamic"])
def test_steps_that_are_played_back_answer_as_steps_do(shape, how, monkeypatch):
    monkeypatch.setattr(decode, "recorded", replayed)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None)
    model = tiny.ours(tiny.peer(shape), shape)
    both_ways(monkeypatch, model, SAMPLINGS[how])


def test_steps_are_recorded_for_powers_of_two_and_each_reach(monkeypatch):
    monkeypatch.setattr(decode, "REACH", 16)
    model, seen = ours(), []

    def note(run):
        seen.append(run().shape)
        return run

    with torch.inference_mode():
        whole = KVCache(model.config, 6, 40, "cpu", torch.float32)
        prompts = [[1] * n for n in (3, 9, 1, 14, 5)]
        cache, _ = decode.refill(model, prompts, whole, whole.part(slice(0, 0)))
        steps = decode.Steps(model, whole, note)
        for _ in range(20):
            assert steps(torch.arange(5, 10), cache).shape == (5, V)
        reached = len(steps.plays)
        cache, _ = decode.keep_rows(cache, [0, 3])
        steps(torch.arange(2), cache)
    assert reached == 3 and list(steps.plays) == [(6, 16), (6, 32), (6, 40), (2, 40)]
    assert [x[0] for x in seen] == [6, 6, 6, 2]


def test_on_a_gpu_steps_are_recorded_unless_they_ask_the_device_or_send_it_something():
    assert not decode.recordable(ours())
    there = type("There", (Llama,), {"device": torch.device("cuda")})
    model, dynamic, quantised = (tiny.ours(tiny.peer(x), x)
                                 for x in ("linear", "dynamic", "llama3"))
    mlp = quantised.model.layers[0].mlp
    mlp.up_proj = nf4.NF4Linear(mlp.up_proj.weight, None, False)
    local = tiny.ours(tiny.peer("gemma3"), "gemma3")
    local.config = replace(local.config, local_rope=dynamic.config.rope)
    for x in (dynamic, local, quantised):
        x.__class__ = there
        with pytest.raises(UserError, match="not with a base in NF4") as e:
            decode.hasten(x)
        assert e.value.code == 2 and not x.recorded
    model.__class__ = there
    decode.hasten(model)
    assert model.recorded


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
@pytest.mark.parametrize("how", list(SAMPLINGS))
@pytest.mark.parametrize("shape", ["llama32", "mistral", "gemma2", "gemma3", "smollm3-window"])
def test_a_gpu_plays_back_what_it_computes(shape, how, monkeypatch):
    model = tiny.ours(tiny.peer(shape), shape).cuda()
    both_ways(monkeypatch, model, SAMPLINGS[how])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
def test_recording_takes_no_memory_that_is_not_given_back():
    """cuBLAS keeps some for each queue it was used in, and torch has 32 of them."""
    x, held = torch.randn(64, 64, device="cuda"), []
    for _ in range(8):
        pool = torch.cuda.graph_pool_handle()
        play = decode.recorded(lambda: x @ x, pool)
        torch.testing.assert_close(play(), x @ x)
        del play
        held.append(torch.cuda.memory_allocated())
    assert held[-1] - held[0] < 1 << 20
