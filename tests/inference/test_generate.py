"""Generation against transformers' own, and what a seed or a neighbour may not change."""

import math

import pytest
import torch

from helpers import tiny
from helpers.generation import BOS, PROMPTS, V, answers, greedily, ours, peer
from inference.decode import DecodeStep
from inference.generate import completions, generate
from inference.sampling import SamplingParams, StoppingCriteria, per_prompt_seeds
from model import KVCache, Llama
from runtime.console import UserError


def test_greedy_equals_transformers_for_prompts_of_many_lengths_at_once():
    expected = [greedily(p, 20) for p in PROMPTS]
    assert answers(PROMPTS, SamplingParams(20, temperature=0)) == expected
    assert len({tuple(x) for x in expected}) == len(expected)  # the answers vary
    assert len(set(expected[0])) > 3


@pytest.mark.parametrize("shape", list(tiny.SHAPES))
def test_every_family_continues_as_transformers_does_beyond_its_window(shape):
    peer = tiny.peer(shape, seed=3)
    model = tiny.ours(peer, shape)
    prompts = [tiny.tokens(1, n, seed=n)[0].tolist() for n in (30, 3, 17)]
    finished = completions(model, prompts, SamplingParams(24, temperature=0))
    for prompt, answer in zip(prompts, finished, strict=True):
        out = peer.generate(torch.tensor([prompt]), max_new_tokens=24, do_sample=False,
                            pad_token_id=0, eos_token_id=[],
                            attention_mask=torch.ones(1, len(prompt), dtype=torch.long))
        assert answer.ids == out[0, len(prompt):].tolist()


def test_rows_end_at_eos_as_in_transformers_and_the_others_go_on():
    greedy = [greedily(p, 20) for p in PROMPTS]
    eos = greedy[2][4]  # the longest prompt leaves first: the batch shrinks and its cache with it
    expected = [greedily(p, 20, eos) for p in PROMPTS]
    assert len(expected[2]) <= 5 < max(map(len, expected))
    assert answers(PROMPTS, SamplingParams(20, temperature=0), {eos}) == expected


@pytest.mark.parametrize("last", range(len(PROMPTS)))
def test_the_last_active_row_is_right_whichever_it_is(last):
    others = [p for i, p in enumerate(PROMPTS) if i != last]
    endings = {greedily(p, 1)[0] for p in others}  # every other row ends at once
    alone = answers([PROMPTS[last]], SamplingParams(24, temperature=0), endings)[0]
    assert len(alone) > 3 and alone == greedily(PROMPTS[last], 24)[:len(alone)]
    assert answers(PROMPTS, SamplingParams(24, temperature=0), endings)[last] == alone


@pytest.mark.parametrize("at_once", [32, 3, 1])
def test_a_sampled_answer_does_not_change_with_its_neighbours_or_their_order(at_once):
    sampling = SamplingParams(16, temperature=1.3, top_k=40, top_p=0.95, seed=5)
    alone = [answers([p], sampling)[0] for p in PROMPTS]
    assert answers(PROMPTS, sampling, rows=at_once) == alone
    assert answers(PROMPTS[::-1], sampling, rows=at_once) == alone[::-1]
    ending = {alone[0][3]}  # one leaves early, from each place in turn
    alone = [answers([p], sampling, ending)[0] for p in PROMPTS]
    for i in range(len(PROMPTS)):
        turned, expected = PROMPTS[i:] + PROMPTS[:i], alone[i:] + alone[:i]
        assert answers(turned, sampling, ending, rows=at_once) == expected


def test_a_seed_gives_the_same_answer_again_and_another_seed_another():
    first = answers(PROMPTS, SamplingParams(12, seed=1))
    assert answers(PROMPTS, SamplingParams(12, seed=1)) == first
    second = answers(PROMPTS, SamplingParams(12, seed=2))
    assert all(a != b for a, b in zip(first, second, strict=True))


def test_copies_of_a_prompt_get_different_answers_and_the_first_is_the_one_it_gets_alone():
    finished = answers([PROMPTS[0]] * 3, SamplingParams(12, seed=1))
    assert finished[0] == answers([PROMPTS[0]], SamplingParams(12, seed=1))[0]
    assert len({tuple(x) for x in finished}) == 3


@pytest.mark.parametrize("rows", [1, 2, 3, 5, 40])
def test_a_finished_row_gives_its_slot_to_the_next_prompt_and_no_answer_changes(rows):
    prompts = [tiny.tokens(1, 1 + (7 * i) % 19, seed=i)[0].remainder(V).tolist() for i in range(9)]
    expected = [greedily(p, 12) for p in prompts]
    ending = expected[0][3]
    expected = [greedily(p, 12, ending) for p in prompts]
    assert len({len(x) for x in expected}) > 1
    widths = []

    class Counting(DecodeStep):
        def __call__(self, ids, cache, storage):
            widths.append(len(ids))
            return super().__call__(ids, cache, storage)

    assert answers(prompts, SamplingParams(12, 0), {ending}, rows=rows,
                   decode_step=Counting(ours())) == expected
    assert max(widths) <= rows
    waiting = sum(map(len, expected)) - len(expected)  # tokens that a step must make
    assert rows != 2 or len(widths) < 0.7 * waiting  # both places are used while prompts wait


def text_of(ids) -> str:
    """A text for ids: a letter each, so that a stop string may span several."""
    return "".join(chr(97 + i % 26) for i in ids)


def test_a_stop_string_ends_a_row_with_the_token_that_completes_it():
    unstopped = [greedily(p, 20) for p in PROMPTS]
    texts = [text_of(x) for x in unstopped]
    strings = [texts[0][4:7], texts[2][9:11]]
    stops = StoppingCriteria((), strings, text_of)
    finished = list(completions(ours(), PROMPTS, SamplingParams(20, 0), stops))
    assert {x.finish_reason for x in finished} == {"stop", "length"}
    for (ids, reason), text in zip(finished, texts, strict=True):
        n = min((text.find(x) + len(x) for x in strings if x in text), default=20)
        assert text_of(ids) == text[:n] and reason == ("length" if n == 20 else "stop")
    assert stops.truncate(texts[0]) == texts[0][:4]


def test_each_prompt_can_be_given_a_seed():
    alone = [answers([p], SamplingParams(12), seeds=[i])[0] for i, p in enumerate(PROMPTS, 5)]
    assert answers(PROMPTS, SamplingParams(12), seeds=[5, 6, 7, 8]) == alone
    assert answers(PROMPTS[::-1], SamplingParams(12), seeds=[8, 7, 6, 5], rows=2) == alone[::-1]
    seeds = per_prompt_seeds([PROMPTS[0]] * 3, 1)  # so a file can be continued in its middle
    copies = answers([PROMPTS[0]] * 3, SamplingParams(12, seed=1))
    assert answers([PROMPTS[0]] * 2, SamplingParams(12), seeds=seeds[1:]) == copies[1:]


def test_greedy_with_a_repetition_penalty_equals_transformers():
    for penalty in (1.4, 0.9):
        expected = [peer().generate(torch.tensor([p]), max_new_tokens=16, do_sample=False,
                                  pad_token_id=0, eos_token_id=[], repetition_penalty=penalty,
                                  attention_mask=torch.ones(1, len(p), dtype=torch.long))
                  [0, len(p):].tolist() for p in PROMPTS]
        sampling = SamplingParams(16, 0, repetition_penalty=penalty)
        assert answers(PROMPTS, sampling, rows=3) == expected


@pytest.mark.parametrize("temperature", [1e-30, 1e-4])
def test_a_tiny_temperature_is_greedy(temperature):
    greedy = answers(PROMPTS, SamplingParams(12, 0))
    assert answers(PROMPTS, SamplingParams(12, temperature)) == greedy


def test_a_prompt_too_long_loses_its_beginning_but_not_its_bos_with_a_message(capsys):
    long = [BOS, *range(3, 63)]
    finished = answers([long], SamplingParams(20, temperature=0), bos=BOS)[0]
    assert "1 of 1 prompts: up to 17 of 61 tokens are left out" in capsys.readouterr().err
    assert finished == greedily([BOS, *long[-43:]], 20)
    assert answers([long[1:]], SamplingParams(20, temperature=0))[0] == greedily(long[-44:], 20)
    assert answers([[]], SamplingParams(9, temperature=0), bos=BOS)[0] == greedily([BOS], 9)


def test_the_context_can_be_filled_to_its_end():
    prompt = [BOS, *range(3, 46)]  # 44 + 20 = 64
    expected = [greedily(prompt, 20), greedily([BOS], 20)]
    assert answers([prompt, [BOS]], SamplingParams(20, temperature=0)) == expected


def test_what_cannot_be_generated_is_refused_in_one_line():
    with pytest.raises(UserError, match="no BOS to start from"):
        answers([[]], SamplingParams(4))
    with pytest.raises(UserError, match="leaves no room for a prompt; at most 63"):
        answers([[1]], SamplingParams(64))
    broken = Llama(ours().config)
    broken.load_state_dict({k: v * math.nan for k, v in ours().state_dict().items()})
    with pytest.raises(UserError, match="not finite"):
        list(completions(broken, [[1]], SamplingParams(4)))
    assert answers([], SamplingParams(4)) == []


def test_gradients_are_off_inside_and_on_between_two_tokens():
    inside = []
    hook = ours().model.register_forward_hook(
        lambda *_: inside.append(torch.is_inference_mode_enabled()))
    for _ in generate(ours(), [[1, 2]], SamplingParams(3)):
        assert torch.is_grad_enabled() and not torch.is_inference_mode_enabled()
    hook.remove()
    assert inside == [True] * 3


@pytest.mark.parametrize(("beams", "n_selects"), [(1, 5), (2, 12)])
def test_rows_are_evicted_only_when_one_has_ended(beams, n_selects):
    """On a GPU each eviction waits for the step before. A cache is viewed once at the start, three
    times for a prefill, once for an eviction, and with beams once for each reordering: 1 + 6."""
    selected = []

    class Cache(KVCache):
        def select(self, rows):
            selected.append(rows)
            return super().select(rows)

    class Step(DecodeStep):
        def new_cache(self, rows, size):
            return Cache(self.model.config, rows, size, "cpu", torch.float32)

    prompts = [[5, 6], [7, 8, 9], [10]]
    sampling = SamplingParams(6, temperature=0.0, beams=beams)
    finished = completions(ours(), prompts, sampling, decode_step=Step(ours()))
    assert all(len(x.ids) == 6 for x in finished)
    assert len(selected) == n_selects
