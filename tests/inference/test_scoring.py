"""Log-likelihoods against transformers', and that shared text is read once."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers import tiny
from helpers.generation import CONTEXT, PROMPTS, V, ours, peer
from inference.generate import completions
from inference.sampling import SamplingParams
from inference.scoring import ScoringLimits, score
from model import Llama
from runtime.console import UserError


def peer_scores(peer, prompt, ids) -> tuple[float, bool]:
    """log p and greediness of a continuation, by transformers' forward pass over the whole text."""
    with torch.inference_mode():
        logp = peer(torch.tensor([[*prompt, *ids]])).logits[0].log_softmax(-1)
    logp = logp[len(prompt) - 1 : -1]
    return (float(logp.gather(1, torch.tensor(ids)[:, None]).double().sum()),
            logp.argmax(-1).tolist() == list(ids))


def scored_as(peer, model, prompts, continuations) -> tuple[torch.Tensor, torch.Tensor]:
    """Our scores, which are transformers'."""
    scores, greedy = score(model, prompts, continuations)
    expected = [peer_scores(peer, p, c) for p, c in zip(prompts, continuations, strict=True)]
    torch.testing.assert_close(scores, torch.tensor([x for x, _ in expected]).double(), rtol=1e-5,
                               atol=1e-5)
    assert greedy.tolist() == [x for _, x in expected]
    return scores, greedy


@contextmanager
def passes(model: Llama) -> Iterator[list[tuple]]:
    """The arguments of each pass through the model inside the block: tokens, doc, pos, cache."""
    calls: list[tuple] = []
    hook = model.model.register_forward_pre_hook(lambda _, args: calls.append(args))
    try:
        yield calls
    finally:
        hook.remove()


def tokens_read(calls: list[tuple]) -> list[int]:
    """How many tokens each pass has read, padding apart."""
    return [int((doc >= 0).sum()) for _, doc, *_ in calls]


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
    [greedy_answer] = completions(model, prompts[:1], SamplingParams(3, 0))
    prompts.append(prompts[0])
    continuations.append(greedy_answer.ids)
    scores, greedy = scored_as(peer, model, prompts, continuations)
    assert scores.dtype == torch.float64 and greedy[-1]


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(1, 9)), min_size=1, max_size=12),
       st.integers(1, 60), st.integers(9, 40))
@settings(max_examples=25, deadline=None)
def test_scores_do_not_depend_on_neighbours_batches_or_order(suffixes, budget, length):
    prompts = [PROMPTS[i] for i, _ in suffixes]
    continuations = [tiny.tokens(1, n, seed=n)[0].remainder(V).tolist() for _, n in suffixes]
    alone = [score(ours(), [p], [c], length) for p, c in zip(prompts, continuations, strict=True)]
    scores, greedy = score(ours(), prompts, continuations, length,
                          limits=ScoringLimits(tokens=budget))
    torch.testing.assert_close(scores, torch.cat([x for x, _ in alone]), rtol=1e-5, atol=1e-5)
    assert greedy.tolist() == [bool(x) for _, x in alone]


@pytest.mark.parametrize("shape", list(tiny.SHAPES))
def test_a_prefix_of_all_prompts_is_read_once_and_scores_equal_transformers(shape):
    """A prefix of 20 tokens: longer than a window, shorter than some prompts."""
    peer = tiny.peer(shape, seed=4)
    model = tiny.ours(peer, shape)
    begun = tiny.tokens(1, 20, seed=9)[0].tolist()
    rest = [tiny.tokens(1, n, seed=n)[0].tolist() for n in (0, 1, 9)]
    prompts = [begun + x for x in rest for _ in range(2)]
    continuations = [tiny.tokens(1, 1 + i % 3, seed=70 + i)[0].tolist() for i in range(6)]
    with passes(model) as calls:
        scored_as(peer, model, prompts, continuations)
    if shape != "dynamic":
        later = sum(len(x) - 1 for x in continuations)
        assert sum(tokens_read(calls)) == 19 + sum(1 + len(x) for x in rest) + later


@pytest.mark.parametrize("shape", list(tiny.SHAPES))
def test_a_prefix_of_some_prompts_is_read_once_and_scores_equal_transformers(shape):
    """Two passages of different lengths, each with questions, one of them asked twice; and prompts
    that share too little."""
    peer = tiny.peer(shape, seed=4)
    model = tiny.ours(peer, shape)
    pages = [tiny.tokens(1, n, seed=n)[0].tolist() for n in (20, 25)]
    alone = [tiny.tokens(1, n, seed=n)[0].tolist() for n in (7, 30)]
    suffixes = [[90 + i] * (1 + 3 * i) for i in range(3)]
    prompts = [page + x for page in pages for x in suffixes] + [pages[0] + suffixes[2]] + alone
    prompts.append(pages[1][:10] + suffixes[1])  # less than half of a page
    continuations = [tiny.tokens(1, 1 + i % 3, seed=70 + i)[0].tolist() for i in range(10)]
    with passes(model) as calls:
        scored_as(peer, model, prompts, continuations)
    if shape != "dynamic":
        once = sum(map(len, pages)) + 2 * sum(map(len, suffixes)) + sum(map(len, alone)) + 10 + 4
        assert sum(tokens_read(calls)) == once + sum(len(x) - 1 for x in continuations)


@given(st.lists(st.tuples(st.integers(1, 40), st.integers(0, 3), st.integers(1, 4)), min_size=1,
                max_size=14), st.sampled_from([7, 40, 1024]))
@settings(max_examples=30, deadline=None)
def test_scores_of_prompts_with_any_prefixes_equal_those_of_each_alone(suffixes, budget):
    """Prefixes of two texts, of any length, with other tokens behind."""
    texts = [tiny.tokens(1, 40, seed=i)[0].remainder(V).tolist() for i in (1, 2)]
    prompts = [texts[tail % 2][:n] + [7, 8, 9][:tail] for n, tail, _ in suffixes]
    continuations = [[3, 4, 5, 6][:n] for *_, n in suffixes]
    alone = [score(ours(), [p], [c])[0] for p, c in zip(prompts, continuations, strict=True)]
    scores, _ = score(ours(), prompts, continuations, limits=ScoringLimits(tokens=budget))
    torch.testing.assert_close(scores, torch.cat(alone), rtol=1e-5, atol=1e-5)


def test_copies_of_a_long_prefix_are_limited():
    """One instruction, then many passages with two questions each."""
    common, *pages = ([i, *tiny.tokens(1, n - 1, seed=i)[0].remainder(V).tolist()]
                      for i, n in enumerate((40, *[16] * 8), 2))
    prompts = [[*common, *page, x] for page in pages for x in (7, 8)]
    with passes(ours()) as calls:
        scores, _ = score(ours(), prompts, [[5]] * 16,
                         limits=ScoringLimits(tokens=64, prefix_copies=2))
    alone = [score(ours(), [x], [[5]])[0] for x in prompts]
    torch.testing.assert_close(scores, torch.cat(alone), rtol=1e-5, atol=1e-5)
    sizes = [cache.k.shape[1] * cache.k.shape[2] for *_, cache in calls]  # rows times tokens
    assert len(sizes) > 1 + 4 and max(sizes) <= 2 * 64


def test_a_prompt_with_several_continuations_is_read_once():
    progress = []
    with passes(ours()) as calls:
        score(ours(), [PROMPTS[2]] * 4 + [PROMPTS[0]], [[5], [6], [7], [8], [9]],
              progress=progress.append)
    assert tokens_read(calls) == [len(PROMPTS[2]) + len(PROMPTS[0])]
    assert progress == [5]  # choices of one token share the pass
    with passes(ours()) as calls:
        score(ours(), [PROMPTS[2]] * 3, [[5, 6, 7], [6], [8, 9]])
    assert tokens_read(calls) == [len(PROMPTS[2]), 2 + 1]


def test_a_prompt_beyond_the_context_loses_its_beginning_as_in_lm_eval():
    prompt = tiny.tokens(1, 90)[0].remainder(V).tolist()
    for ids in ([5], [5, 6, 7, 8], list(range(3, 63))):
        ids_read = [*prompt, *ids][-(CONTEXT + 1):]
        expected, _ = peer_scores(peer(), ids_read[: -len(ids)], ids)
        assert score(ours(), [prompt], [ids])[0].item() == pytest.approx(expected, rel=1e-5)
    both, _ = score(ours(), [prompt, prompt], [[5], [5, 6, 7, 8]])
    assert both[1] == pytest.approx(float(score(ours(), [prompt], [[5, 6, 7, 8]])[0]), rel=1e-6)


@pytest.mark.parametrize(("prompt", "ids", "message"), [
    ([1, 2], [], "request 2: its continuation has no token"),
    ([], [5], "request 2: an empty prompt. Begin it with BOS"),
    ([1], [5] * 65, "request 2: a continuation of 65 tokens; the context holds 64")])
def test_what_cannot_be_scored_is_refused_in_one_line(prompt, ids, message):
    with pytest.raises(UserError, match=message):
        score(ours(), [[1], prompt], [[2], ids])


def test_no_requests_give_no_scores():
    assert [x.tolist() for x in score(ours(), [], [])] == [[], []]
