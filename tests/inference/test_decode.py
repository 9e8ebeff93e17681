"""Prefill, steps with a cache, and the compiled step against the plain one."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers import tiny
from helpers.generation import PROMPTS, V, ours, peer, with_adapter
from inference.decode import (
    LOOKAHEAD,
    CompiledDecodeStep,
    DecodeStep,
    compiled_decode_step,
    evict_finished,
    order_by_length,
    pad_right,
    prefill,
    supports_cuda_graphs,
)
from inference.generate import completions
from inference.sampling import SamplingParams, StoppingCriteria
from layers import nf4
from model import KVCache, Llama
from runtime.console import UserError


def test_logits_with_a_cache_equal_those_of_the_whole_text():
    model, rows = ours(), [list(p) for p in PROMPTS]
    with torch.inference_mode():
        cache = KVCache(model.config, len(rows), 32, "cpu", torch.float32)
        logits = prefill(model, rows, cache)
        for step in range(12):
            for i, row in enumerate(rows):
                torch.testing.assert_close(logits[i], peer()(torch.tensor([row])).logits[0, -1],
                                           atol=1e-5, rtol=1e-5)
            ids = torch.tensor([(7 * step + 11 * i) % V for i in range(len(rows))])
            rows = [[*row, int(x)] for row, x in zip(rows, ids, strict=True)]
            if step == 5:  # rows leave, the longest among them
                cache, order = evict_finished(cache, [1, 3])
                rows, ids = [rows[i] for i in order], ids[order]
            logits = DecodeStep(model)(ids, cache, cache)


@pytest.mark.parametrize("max_tokens", [1, 30, 4096])
@pytest.mark.parametrize("shape", list(tiny.SHAPES))
def test_packed_prompts_give_the_same_cache_as_padded_ones(shape, max_tokens):
    """The same keys, values and logits as of rows that are padded on the right."""
    model = tiny.ours(tiny.peer(shape), shape)
    prompts = [tiny.tokens(1, n, seed=n)[0].tolist() for n in (7, 1, 25, 70, 2)]
    packed, plain = (KVCache(model.config, 5, 80, "cpu", torch.float32) for _ in range(2))
    with torch.inference_mode():
        logits = prefill(model, prompts, packed, max_tokens)
        tokens, doc = pad_right(prompts, model.device)
        pos = torch.arange(tokens.shape[1]).expand_as(tokens)
        torch.testing.assert_close(logits, model(tokens, doc, pos, cache=plain), atol=2e-4,
                                   rtol=1e-4)
    assert packed.lengths.tolist() == plain.lengths.tolist() == [7, 1, 25, 70, 2]
    assert packed.cache_len == plain.cache_len == 70
    for row, n in enumerate(packed.lengths):
        for x, y in ((packed.k, plain.k), (packed.v, plain.v)):
            torch.testing.assert_close(x[:, row, :n], y[:, row, :n], atol=1e-4, rtol=1e-4)
            assert not x[:, row, n:].any()


@given(st.lists(st.integers(1, 9), max_size=60), st.integers(1, 3))
def test_prompts_are_sorted_by_length_within_groups(lengths, rows):
    order = order_by_length(lengths, rows)
    ahead = LOOKAHEAD * rows
    assert sorted(order) == list(range(len(lengths)))
    assert all(i // ahead == place // ahead for place, i in enumerate(order))
    for first in range(0, len(order), ahead):
        group_lengths = [lengths[i] for i in order[first : first + ahead]]
        assert group_lengths == sorted(group_lengths, reverse=first // ahead % 2 == 1)


@given(st.sets(st.integers(0, 7), min_size=1), st.integers(0, 3))
@settings(max_examples=50, deadline=None)
def test_a_cache_without_its_finished_rows_holds_the_rows_it_names(keep, more):
    n = max(keep) + 1 + more
    cache = KVCache(ours().config, n, 4, "cpu", torch.float32)
    cache.lengths += torch.arange(1, n + 1)
    cache.k += cache.lengths[:, None, None, None]
    cache.v += 2 * cache.k
    cache.cache_len = 4
    cache, order = evict_finished(cache, sorted(keep))
    assert sorted(order) == sorted(keep)
    assert cache.lengths.tolist() == [i + 1 for i in order] and cache.cache_len == max(order) + 1
    assert cache.k[0, :, 0, 0, 0].tolist() == [i + 1 for i in order]
    assert cache.v[-1, :, -1, -1, -1].tolist() == [2 * (i + 1) for i in order]


COMPILED = ["llama32", "biases", "gemma2", "smollm3-window"]  # the others are slow
SAMPLINGS = {"greedy": SamplingParams(30, temperature=0.0),
             "beams": SamplingParams(30, temperature=0.0, beams=3),
             "sampled": SamplingParams(30, temperature=1.0, top_k=40)}


def eager_step(model: Llama, **options) -> CompiledDecodeStep:
    """The compiled step as a CPU runs it: traced as one graph, whose operations run eagerly."""
    return CompiledDecodeStep(model, multiple=16, mode=None, backend="eager", fullgraph=True,
                              **options)


def compare_compiled(model: Llama, sampling: SamplingParams, compiled: CompiledDecodeStep) -> None:
    """Eleven ragged prompts, four at once: the same answers by plain and by compiled steps."""
    prompts = [tiny.tokens(1, n, seed=n)[0].tolist() for n in (7, 1, 25, 40, 2, 3, 9, 30, 5, 6, 4)]

    def run(decode_step: DecodeStep | None, ends: set[int]) -> list[list[int]]:
        finished = completions(model, prompts, sampling, StoppingCriteria(ends),
                               rows=4 * sampling.beams, decode_step=decode_step)
        return [x.ids for x in finished]

    ends = {ids[5] for ids in run(None, set())[::2]}  # some rows end, others take their place
    plain = run(None, ends)
    assert 1 < sum(map(len, plain)) / len(plain) < 30
    assert run(compiled, ends) == plain


@pytest.mark.parametrize("shape", [
    pytest.param(x, marks=() if x in COMPILED else pytest.mark.slow)
    for x in tiny.SHAPES if x != "dynamic"])
def test_compiled_steps_answer_as_plain_steps_do(shape):
    model = tiny.ours(tiny.peer(shape), shape)
    compare_compiled(model, SAMPLINGS["greedy"], eager_step(model))


@pytest.mark.parametrize("how", ["beams", "sampled"])
def test_compiled_steps_answer_as_plain_steps_do_with_beams_and_when_sampled(how):
    model = tiny.ours(tiny.peer("gemma3"), "gemma3")
    compare_compiled(model, SAMPLINGS[how], eager_step(model))


@pytest.mark.parametrize("how", ["lora", "dora"])
def test_compiled_steps_of_an_adapter_answer_as_plain_steps_do(how):
    model = with_adapter(tiny.ours(tiny.peer("llama32"), "llama32"), how)
    compare_compiled(model, SAMPLINGS["greedy"], eager_step(model))


def test_a_step_is_compiled_once_for_each_shape_of_a_cache():
    compiled_graphs = []

    def backend(graph, inputs):
        compiled_graphs.append(graph)
        return graph

    step = CompiledDecodeStep(ours(), multiple=16, mode=None, backend=backend, fullgraph=True)
    for prompts in ([[1] * 3, [1] * 9], [[1] * 5], [[2] * 4], [[1] * 6, [5]]):
        assert all(len(x.ids) == 7 for x in completions(
            ours(), prompts, SamplingParams(7, temperature=0), decode_step=step))
    assert len(compiled_graphs) == 2  # two rows, one row; all need at most 16 tokens


def test_compile_is_refused_on_a_cpu():
    with pytest.raises(UserError, match="--compile needs a GPU") as e:
        compiled_decode_step(ours())
    assert e.value.code == 2


def test_cuda_graphs_are_refused_where_a_step_asks_the_device_or_copies_to_it():
    cuda = torch.device("cuda")
    model, dynamic, quantised = (tiny.ours(tiny.peer(x), x)
                                 for x in ("linear", "dynamic", "llama3"))
    mlp = quantised.model.layers[0].mlp
    mlp.up_proj = nf4.NF4Linear(mlp.up_proj.weight, None, False)
    local = tiny.ours(tiny.peer("gemma3"), "gemma3")
    local.config = replace(local.config, local_rope=dynamic.config.rope)
    assert supports_cuda_graphs(model, cuda) and not supports_cuda_graphs(model, model.device)
    assert not any(supports_cuda_graphs(x, cuda) for x in (dynamic, local, quantised))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
@pytest.mark.parametrize("how", list(SAMPLINGS))
@pytest.mark.parametrize("shape", ["llama32", "mistral", "gemma2", "gemma3", "smollm3-window"])
def test_a_gpu_replays_what_it_computes(shape, how):
    model = tiny.ours(tiny.peer(shape), shape).cuda()
    compare_compiled(model, SAMPLINGS[how], compiled_decode_step(model))
