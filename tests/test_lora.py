"""LoRA against peft: the same adapter on the same model, both ways."""

from __future__ import annotations

import json
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

import lora
import tiny
from log import UserError

IDS = tiny.tokens(2, 24)
DOC, POS = torch.zeros_like(IDS), torch.arange(24).repeat(2, 1)
TARGETS = IDS.roll(-1, 1)


def pair(shape: str = "llama3", targets=("all-linear",), folder: Path | None = None):
    """Our model and peft's with the same random base, A and B."""
    peer = tiny.peer(shape)
    ours = tiny.ours(tiny.peer(shape), shape)
    config = peft.LoraConfig(
        r=4, lora_alpha=12, lora_dropout=0.0, task_type="CAUSAL_LM",
        target_modules=("all-linear" if list(targets) == ["all-linear"] else list(targets)))
    peer = peft.get_peft_model(peer, config)
    lora.attach(ours, 4, 12.0, 0.0, targets)
    mine = lora.adapter_state(ours)
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, p in peer.named_parameters():
            if "lora_" in name:
                p.normal_(0, 0.1, generator=draw)
                mine[name.replace(".default", "")].copy_(p)
    return ours, peer


@pytest.mark.parametrize("targets", [("all-linear",), ("q_proj", "v_proj"), ("down_proj",)])
@pytest.mark.parametrize("shape", ["llama3", "llama32", "biases"])
def test_logits_loss_and_gradients_equal_pefts(shape, targets):
    ours, peer = pair(shape, targets)
    with torch.no_grad():
        torch.testing.assert_close(
            ours(IDS, DOC, POS), peer(IDS).logits[:, -1], atol=1e-5, rtol=1e-5)
    loss = ours(IDS, DOC, POS, TARGETS).mean()
    logits = peer(IDS).logits
    theirs = torch.nn.functional.cross_entropy(logits.flatten(0, 1), TARGETS.flatten())
    torch.testing.assert_close(loss, theirs, atol=1e-5, rtol=1e-5)
    loss.backward()
    theirs.backward()
    grads = {
        n.replace(".default", ""): p.grad for n, p in peer.named_parameters() if p.grad is not None}
    mine = {f"{lora.PREFIX}{n}": p.grad for n, p in ours.named_parameters() if p.grad is not None}
    assert mine.keys() == grads.keys(), "the same tensors train, under the same names"
    for name in mine:
        torch.testing.assert_close(mine[name], grads[name], atol=1e-5, rtol=1e-4)


def test_step_zero_is_the_base_and_so_is_a_disabled_adapter():
    base = tiny.ours(tiny.peer("llama3"), "llama3")
    wrapped = tiny.ours(tiny.peer("llama3"), "llama3")
    lora.attach(wrapped, 4, 8.0, 0.0, ["all-linear"])
    with torch.no_grad():
        assert torch.equal(base(IDS, DOC, POS), wrapped(IDS, DOC, POS)), "B is zero"
        for m in lora.adapters(wrapped).values():
            m.lora_B.weight.normal_()
        moved = wrapped(IDS, DOC, POS)
        assert not torch.allclose(base(IDS, DOC, POS), moved)
        with lora.disabled(wrapped):
            assert torch.equal(base(IDS, DOC, POS), wrapped(IDS, DOC, POS))
        assert torch.equal(moved, wrapped(IDS, DOC, POS)), "enabled again"


def test_merged_equals_adapter_and_leaves_a_plain_model():
    ours, _ = pair()
    with torch.no_grad():
        before = ours(IDS, DOC, POS)
        lora.merge(ours)
        torch.testing.assert_close(ours(IDS, DOC, POS), before, atol=1e-5, rtol=1e-5)
    assert (
        not lora.adapters(ours)
        and ours.state_dict().keys() == tiny.ours(tiny.peer("llama3"), "llama3").state_dict().keys()
    )


def test_only_the_adapter_trains():
    ours, _ = pair()
    assert {n.rsplit(".", 2)[-2] for n, p in ours.named_parameters() if p.requires_grad} == {
        "lora_A", "lora_B"}


def test_pefts_own_folder_opens_here_and_ours_there(tmp_path):
    ours, peer = pair()
    peer.save_pretrained(tmp_path / "theirs")
    opened = tiny.ours(tiny.peer("llama3"), "llama3")
    lora.load_adapter(opened, tmp_path / "theirs")
    (tmp_path / "ours").mkdir()
    save_file(lora.adapter_state(ours), tmp_path / "ours/adapter_model.safetensors")
    (tmp_path / "ours/adapter_config.json").write_text(
        json.dumps(lora.adapter_config(ours, "base")))
    assert load_file(tmp_path / "ours/adapter_model.safetensors").keys() == \
        load_file(tmp_path / "theirs/adapter_model.safetensors").keys()
    theirs = peft.PeftModel.from_pretrained(tiny.peer("llama3"), tmp_path / "ours")
    with torch.no_grad():
        torch.testing.assert_close(
            opened(IDS, DOC, POS), peer(IDS).logits[:, -1], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(
            ours(IDS, DOC, POS), theirs(IDS).logits[:, -1], atol=1e-5, rtol=1e-5)


def test_dropout_is_drawn_in_training_only():
    ours, _ = pair()
    for m in lora.adapters(ours).values():
        m.dropout = 0.5
    with torch.no_grad():
        still = [ours.eval()(IDS, DOC, POS) for _ in range(2)]
        drawn = [ours.train()(IDS, DOC, POS) for _ in range(2)]
    assert torch.equal(*still) and not torch.equal(*drawn)


@pytest.mark.parametrize(
    "rank, targets, word",
    [(4, ["q_pro"], "there are down_proj, gate_proj, k_proj"), (0, ["all-linear"], "from 1 to"),
     (99, ["q_proj"], "from 1 to 32")],
)
def test_what_cannot_be_attached_is_refused_in_one_line(rank, targets, word):
    with pytest.raises(UserError, match=word):
        lora.attach(tiny.ours(tiny.peer("llama3"), "llama3"), rank, 8.0, 0.0, targets)


@pytest.mark.parametrize(
    "words, word",
    [({"use_dora": True}, "use_dora"), ({"use_rslora": True}, "use_rslora"),
     ({"bias": "all"}, "bias"), ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
     ({"peft_type": "IA3"}, "IA3"), ({"r": "x"}, "do not describe"),
     ({"r": True}, "do not describe"), ({"lora_dropout": 2.0}, "do not describe"),
     ({"target_modules": None}, "do not describe"), ({"init_lora_weights": "pissa"}, "pissa"),
     ({"r": 3}, "belongs to another base"), ({"r": 999}, "another base"),
     ({"target_modules": ["nothing"]}, "another base")],
)
def test_an_adapter_that_would_be_computed_otherwise_is_refused_by_name(tmp_path, words, word):
    ours, _ = pair()
    save_file(lora.adapter_state(ours), tmp_path / "adapter_model.safetensors")
    config = {**lora.adapter_config(ours, "base"), **words}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=word):
        lora.load_adapter(tiny.ours(tiny.peer("llama3"), "llama3"), tmp_path)


def test_a_missing_or_foreign_tensor_is_named(tmp_path):
    ours, _ = pair()
    state = lora.adapter_state(ours)
    name, tensor = next(iter(state.items()))
    fresh = tiny.ours(tiny.peer("llama3"), "llama3")
    lora.attach(fresh, 4, 8.0, 0.0, ["all-linear"])
    with pytest.raises(UserError, match=f"{name} is missing"):
        lora.fill(fresh, {k: v for k, v in state.items() if k != name}, "here")
    with pytest.raises(UserError, match="strange is not one of"):
        lora.fill(fresh, {**state, "strange": tensor}, "here")
