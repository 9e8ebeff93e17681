"""Curves and groups against transformers' and torch's own."""

from __future__ import annotations

import copy
import sys

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from helpers import tiny
from model import Llama
from runtime.console import UserError
from training import optimizer as optim
from training.schedule import SCHEDULES, learning_rate

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
        ours = learning_rate(step, STEPS, PEAK, schedule, WARMUP, 0.0)
        assert ours == pytest.approx(optimizer.param_groups[0]["lr"], abs=1e-9), step


def test_wsd_stays_at_the_peak_and_falls_over_the_last_tenth():
    rate = [learning_rate(i, 110, 1.0, "wsd", 10, 0.1) for i in range(1, 111)]
    assert (rate[9:100] == pytest.approx([1.0] * 91) and rate[104] == pytest.approx(0.55)
            and rate[-1] == pytest.approx(0.1))


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("steps, warmup", [(1, 0), (2, 0), (3, 3), (50, 1)])
def test_a_rate_lies_between_zero_and_the_peak_and_ends_at_the_floor(schedule, steps, warmup):
    rates = [
        learning_rate(i, steps, PEAK, schedule, warmup, 0.1) for i in range(1, steps + 1)]
    assert all(0 < r <= PEAK * (1 + 1e-12) for r in rates)
    if schedule in ("cosine", "linear", "wsd") and steps > warmup:
        assert rates[-1] == pytest.approx(0.1 * PEAK)


def test_norms_and_biases_do_not_decay_and_nothing_is_left_out():
    model = tiny.ours(tiny.peer("biases"), "biases")
    decayed, plain = sorted(optim.parameter_groups(model, 0.1), key=lambda x: -x["weight_decay"])
    names = {id(p): n for n, p in model.named_parameters()}
    assert {names[id(p)].rsplit(".", 1)[-1] for p in decayed["params"]} == {"weight"}
    assert all("norm" in names[id(p)] or names[id(p)].endswith("bias") for p in plain["params"])
    assert len(decayed["params"]) + len(plain["params"]) == len(names)
    assert (decayed["weight_decay"], plain["weight_decay"]) == (0.1, 0.0)


WIDE = {"hidden_size": 64, "intermediate_size": 128, "vocab_size": tiny.V}
KINDS = ["adamw", "adamw8bit", "adamw-bf16"]
IDS = tiny.tokens(2, 24)
DOC, POS = torch.zeros_like(IDS), torch.arange(24).repeat(2, 1)


def trained(kind: str, steps: int, seed: int = 0, between=None,
            drawn_by: int = 1) -> tuple[Llama, list[float]]:
    """A tiny model after some steps on random rows, and its losses; `between` gives a new model and
    optimizer at half of them."""
    model = tiny.ours(tiny.peer("llama3", seed, **WIDE), "llama3", **WIDE)
    model.to(torch.bfloat16 if kind == "adamw-bf16" else torch.float32)
    optimizer, losses = optim.adamw(model, 3e-3, (0.9, 0.95), 0.1, kind=kind, seed=drawn_by), []
    for step in range(steps):
        if between and step == steps // 2:
            model, optimizer = between(model, optimizer)
        ids = tiny.tokens(2, 24, seed=step % 3)
        loss = model(ids, DOC, POS, ids.roll(-1, 1)).mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return model, losses


@pytest.mark.parametrize("kind", ["adamw8bit", "adamw-bf16"])
def test_narrow_optimizers_learn_as_adamw_does(kind):
    wanted, found = trained("adamw", 30)[1], trained(kind, 30)[1]
    assert wanted[-1] < wanted[0] / 2
    assert found[0] == pytest.approx(wanted[0], rel=2e-2)
    assert found[-1] == pytest.approx(wanted[-1], rel=0.1)


@pytest.mark.parametrize("kind", KINDS)
def test_a_state_that_was_written_and_read_goes_on_bit_for_bit(kind, tmp_path):
    """By a file, as a resume point is: what was not in it would be missed."""
    def through_a_file(model, optimizer):
        tensors = {k: x.contiguous() for k, x in optim.state_tensors(model, optimizer).items()}
        save_file(tensors, tmp_path / "optimizer.safetensors")
        fresh = copy.deepcopy(model)
        again = optim.adamw(fresh, 3e-3, (0.9, 0.95), 0.1, kind=kind, seed=1)
        optim.load_state(fresh, again, load_file(tmp_path / "optimizer.safetensors"))
        return fresh, again

    (one, losses), (two, again) = trained(kind, 12), trained(kind, 12, between=through_a_file)
    assert losses == again
    for (name, p), q in zip(one.named_parameters(), two.parameters(), strict=True):
        assert torch.equal(p, q), name


def test_another_seed_rounds_otherwise_and_the_same_one_alike():
    """Of two seeds' numbers as many differ as must: those that lie between two of bf16's."""
    (one, _), (same, _), (other, _) = (trained("adamw-bf16", 1, drawn_by=x) for x in (1, 1, 2))
    weights = [torch.cat([p.flatten() for p in x.parameters()]) for x in (one, same, other)]
    assert torch.equal(weights[0], weights[1])
    apart = (weights[0] != weights[2]).double().mean().item()
    assert 0.2 < apart < 0.5  # of numbers anywhere between two neighbours, a third


def test_eight_bits_hold_the_moments_of_matrices_and_not_of_embeddings():
    model = tiny.ours(tiny.peer("llama3", **WIDE), "llama3", **WIDE)
    optimizer = optim.adamw(model, 1e-3, (0.9, 0.95), 0.1, kind="adamw8bit")
    model(IDS, DOC, POS, IDS.roll(-1, 1)).sum().backward()
    optimizer.step()
    for name, p in model.named_parameters():
        small = p.numel() < 4096 or name in optim.EMBEDDINGS
        kind = torch.float32 if small else torch.uint8
        held = optimizer.state[p]
        assert held["state1"].dtype == held["state2"].dtype == kind, name
    matrices = [p for n, p in model.named_parameters() if "_proj" in n and p.numel() >= 4096]
    held = sum(x.nbytes for p in matrices for k, x in optimizer.state[p].items()
               if k in ("state1", "state2", "absmax1", "absmax2"))
    assert held / sum(p.numel() for p in matrices) == pytest.approx(2, rel=0.02)  # bytes a number


def test_eight_bit_adamw_is_bitsandbytes_own():
    from bitsandbytes.optim import AdamW8bit

    torch.manual_seed(0)
    ours = torch.nn.Sequential(torch.nn.Linear(128, 128, bias=False))
    theirs = copy.deepcopy(ours)
    mine = optim.adamw(ours, 1e-2, (0.9, 0.95), 0.1, kind="adamw8bit")
    peer = AdamW8bit(theirs.parameters(), lr=1e-2, betas=(0.9, 0.95), weight_decay=0.1)
    for _ in range(5):
        x = torch.randn(8, 128)
        for model, optimizer in ((ours, mine), (theirs, peer)):
            model(x).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    assert torch.equal(ours[0].weight, theirs[0].weight)


def test_a_machine_without_bitsandbytes_says_so_in_one_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", None)
    with pytest.raises(UserError, match="adamw8bit: bitsandbytes does not work on cpu") as e:
        optim.adamw(torch.nn.Linear(4, 4), 1e-3, (0.9, 0.95), 0.1, kind="adamw8bit")
    assert e.value.code == 2 and "\n" not in str(e.value)


@given(st.floats(-2.0**100, 2.0**100, width=32), st.integers(0, 2**31))
@settings(deadline=None, max_examples=200)
def test_a_number_is_rounded_to_one_of_its_two_neighbours(x, seed):
    x = torch.full((64,), x)
    found = optim.round_stochastically(x, optim.random_bits(seed, 64)).float()
    down = (x.view(torch.int32) & -65536).view(torch.float32)  # towards 0
    up = ((x.view(torch.int32) & -65536) + 65536).view(torch.float32)
    assert ((found == down) | (found == up)).all()
    assert not torch.equal(x.bfloat16().float(), x) or torch.equal(found, x), "exact stays exact"


def test_rounding_is_right_on_average_and_small_steps_arrive():
    for value in (1.001, -3.14159, 1e-20):
        x = torch.full((200_000,), value)
        mean = optim.round_stochastically(x, optim.random_bits(0, len(x))).double().mean().item()
        assert mean == pytest.approx(value, rel=1e-4)
    w = torch.nn.Parameter(torch.ones(4096, dtype=torch.bfloat16))
    move = optim.BF16AdamW([{"params": [w], "names": ["w"]}],
                           {"lr": 1e-5, "betas": (0.9, 0.95), "weight_decay": 0.0, "seed": 1})
    for _ in range(100):  # 1e-5 is a 400th of what bf16 can tell from 1
        w.grad = torch.ones_like(w)
        move.step()
    assert w.float().mean().item() == pytest.approx(1 - 100e-5, abs=1e-4)
    still = torch.ones(4096, dtype=torch.bfloat16)
    for _ in range(100):
        still -= 1e-5
    assert (still == 1).all(), "to the nearest, nothing would have moved"


def test_hashed_bits_are_even_and_unlike_their_neighbours():
    """Every bit is set half of the time, whatever bit of the place, or whichever step, changes."""
    n = 1 << 16
    bits = (optim.random_bits(7, n)[:, None] >> torch.arange(16)) & 1  # (n,16)
    far = 5 * 0.5 / n**0.5  # five deviations of a mean of as many tosses
    assert (bits.double().mean(0) - 0.5).abs().max() < far
    for step in (1, 2, 64, 768, 4096, 2**20, 2**31):
        other = (optim.random_bits(7 + step, n)[:, None] >> torch.arange(16)) & 1
        assert ((bits ^ other).double().mean(0) - 0.5).abs().max() < far, step
    both = torch.stack((optim.random_bits(7, n), optim.random_bits(8, n))).double()
    assert torch.corrcoef(both)[0, 1].abs() < 5 / n**0.5
    assert len(optim.random_bits(7, n).unique()) > 0.6 * n  # 1 - 1/e of all, as if drawn


@given(st.integers(0, 2**33), st.integers(1, 500), st.integers(0, 499))
@settings(deadline=None, max_examples=50)
def test_a_part_of_a_tensor_is_rounded_as_in_the_whole(start, n, cut):
    cut = min(cut, n)
    assert torch.equal(optim.random_bits(start, n), torch.cat((
        optim.random_bits(start, cut), optim.random_bits(start + cut, n - cut))))
    assert 0 <= optim.random_bits(start, n).min() and optim.random_bits(start, n).max() < 1 << 16


def test_bf16_adamw_takes_adamws_steps():
    """From the same start, each number lands on a neighbour of where float32 AdamW puts it."""
    torch.manual_seed(0)
    start, g = torch.randn(64, 64).bfloat16(), torch.randn(64, 64).bfloat16()
    wide, narrow = (torch.nn.Parameter(start.to(d)) for d in (torch.float32, torch.bfloat16))
    words = {"lr": 1e-2, "betas": (0.9, 0.95), "weight_decay": 0.1}
    parts = [{"params": [narrow], "names": ["narrow"]}]
    for p, optimizer in ((wide, torch.optim.AdamW([wide], **words)),
                         (narrow, optim.BF16AdamW(parts, {**words, "seed": 1}))):
        p.grad = g.to(p.dtype)
        optimizer.step()
    apart = (wide - narrow.float()).abs()
    assert (apart <= wide.abs() * 2**-7 + 1e-30).all() and apart.mean() > 0
