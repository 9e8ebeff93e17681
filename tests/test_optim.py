"""Curves and groups against transformers' and torch's own."""

from __future__ import annotations

import pytest
import torch
import transformers

import optim
import tiny

STEPS, WARMUP, PEAK = 100, 10, 2e-3


@pytest.mark.parametrize("schedule, theirs", [
    ("cosine", lambda o: transformers.get_cosine_schedule_with_warmup(o, WARMUP, STEPS)),
    ("linear", lambda o: transformers.get_linear_schedule_with_warmup(o, WARMUP, STEPS)),
    ("constant", lambda o: transformers.get_constant_schedule_with_warmup(o, WARMUP)),
    ("inverse-sqrt", lambda o: transformers.get_inverse_sqrt_schedule(o, WARMUP))])
def test_a_curve_equals_transformers_at_every_step(schedule, theirs):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=PEAK)
    curve = theirs(optimizer)
    for step in range(1, STEPS + 1):
        optimizer.step()
        # transformers counts steps from 0: its rate after `step` steps is ours of that step
        curve.step()
        ours = optim.learning_rate(step, STEPS, PEAK, schedule, WARMUP, 0.0)
        assert ours == pytest.approx(optimizer.param_groups[0]["lr"], abs=1e-9), step


def test_wsd_stays_at_the_peak_and_falls_over_the_last_tenth():
    rate = [optim.learning_rate(i, 110, 1.0, "wsd", 10, 0.1) for i in range(1, 111)]
    assert (rate[9:100] == pytest.approx([1.0] * 91) and rate[104] == pytest.approx(0.55)
            and rate[-1] == pytest.approx(0.1))


@pytest.mark.parametrize("schedule", optim.SCHEDULES)
@pytest.mark.parametrize("steps, warmup", [(1, 0), (2, 0), (3, 3), (50, 1)])
def test_a_rate_lies_between_zero_and_the_peak_and_ends_at_the_floor(schedule, steps, warmup):
    rates = [
        optim.learning_rate(i, steps, PEAK, schedule, warmup, 0.1) for i in range(1, steps + 1)]
    assert all(0 < r <= PEAK * (1 + 1e-12) for r in rates)
    if schedule in ("cosine", "linear", "wsd") and steps > warmup:
        assert rates[-1] == pytest.approx(0.1 * PEAK)


def test_norms_and_biases_do_not_decay_and_nothing_is_left_out():
    model = tiny.ours(tiny.peer("biases"), "biases")
    decayed, plain = sorted(optim.groups(model, 0.1), key=lambda x: -x["weight_decay"])
    names = {id(p): n for n, p in model.named_parameters()}
    assert {names[id(p)].rsplit(".", 1)[-1] for p in decayed["params"]} == {"weight"}
    assert all("norm" in names[id(p)] or names[id(p)].endswith("bias") for p in plain["params"])
    assert len(decayed["params"]) + len(plain["params"]) == len(names)
    assert (decayed["weight_decay"], plain["weight_decay"]) == (0.1, 0.0)


def test_a_state_put_back_goes_on_bit_for_bit():
    def step(model, optimizer, seed):
        for i, p in enumerate(model.parameters()):
            p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(seed * 1000 + i))
        optimizer.step()

    one = tiny.ours(tiny.peer())
    first = optim.adamw(one, 1e-2, (0.9, 0.95), 0.1)
    step(one, first, 1)
    two = tiny.ours(tiny.peer())
    two.load_state_dict(one.state_dict())
    second = optim.adamw(two, 1e-2, (0.9, 0.95), 0.1)
    optim.load_state(two, second, {k: v.clone() for k, v in optim.state(one, first).items()})
    step(one, first, 2)
    step(two, second, 2)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))
