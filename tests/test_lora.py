"""LoRA against peft: the same adapter on the same model, both ways."""

from __future__ import annotations

import json
import time

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import lora
from checkpoints.huggingface import load_model, save_model
from checkpoints.peft_adapter import (
    PEFT_PREFIX,
    adapter_config,
    adapter_state,
    load_adapter,
    load_adapter_state,
    save_adapter,
)
from helpers import tiny
from runtime.console import UserError

IDS = tiny.tokens(2, 24)
DOC, POS = torch.zeros_like(IDS), torch.arange(24).repeat(2, 1)
TARGETS = IDS.roll(-1, 1)


LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
KINDS = {"LoRA": {}, "rsLoRA": {"use_rslora": True}, "DoRA": {"use_dora": True},
         "both": {"use_rslora": True, "use_dora": True}, "one layer": {"layers_to_transform": [1]},
         "embeddings": {"modules_to_save": ["embed_tokens", "lm_head"]},
         "norms": {"modules_to_save": ["input_layernorm", "norm"]}}


def attach(model, targets=("all-linear",), layers_to_transform=(), modules_to_save=(),
           use_rslora=False, use_dora=False, dropout=0.0, **_):
    """Our adapter, in PEFT's words."""
    modules = [x for x in modules_to_save if x != "lm_head" or model.lm_head is not None]
    lora.add_lora(model, 4, 12.0, dropout, targets, use_rslora, use_dora, layers_to_transform,
                  modules)


def pair(shape: str = "llama3", targets=("all-linear",), **options):
    """Our model and peft's with the same random base and the same random adapter."""
    if options.get("layers_to_transform") and list(targets) == ["all-linear"]:
        targets = LINEARS  # peft's all-linear would take no notice of the layers
    peer, ours = tiny.peer(shape), tiny.ours(tiny.peer(shape), shape)
    attach(ours, targets, **options)
    if ours.lm_head is None and options.get("modules_to_save"):
        options = {**options, "ensure_weight_tying": "embed_tokens" in options["modules_to_save"]}
    config = peft.LoraConfig(
        r=4, lora_alpha=12, lora_dropout=options.pop("dropout", 0.0), task_type="CAUSAL_LM",
        target_modules="all-linear" if list(targets) == ["all-linear"] else list(targets),
        **options)
    peer = peft.get_peft_model(peer, config)
    mine, draw = adapter_state(ours), torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, p in peer.named_parameters():
            own_name = name.replace(".default", "").replace(".modules_to_save", "")
            own_name = own_name.replace("lora_magnitude_vector.weight", "lora_magnitude_vector")
            if own_name in mine and p.requires_grad:
                p.add_(torch.empty_like(p).normal_(0, 0.1, generator=draw))
                mine[own_name].copy_(p)
    return ours, peer


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("targets", [("all-linear",), ("q_proj", "v_proj"), ("down_proj",)])
@pytest.mark.parametrize("shape", ["llama3", "llama32", "biases", "gemma3"])
def test_logits_loss_and_gradients_equal_pefts(shape, targets, kind):
    ours, peer = pair(shape, targets, **KINDS[kind])
    with torch.no_grad():
        torch.testing.assert_close(
            ours(IDS, DOC, POS), peer(IDS).logits[:, -1], atol=1e-5, rtol=1e-5)
    loss = ours(IDS, DOC, POS, TARGETS).mean()
    logits = peer(IDS).logits
    theirs = torch.nn.functional.cross_entropy(logits.flatten(0, 1), TARGETS.flatten())
    torch.testing.assert_close(loss, theirs, atol=1e-5, rtol=1e-5)
    loss.backward()
    theirs.backward()
    grads = {n.replace(".default", "").replace(".modules_to_save", "")
             .replace("vector.weight", "vector"): p.grad
             for n, p in peer.named_parameters() if p.grad is not None}
    mine = {f"{PEFT_PREFIX}{n}": p.grad
            for n, p in ours.named_parameters() if p.grad is not None}
    assert mine.keys() == grads.keys(), "the same tensors train, under the same names"
    for name in mine:  # in float32, in which both compute: a difference by its length
        assert tiny.apart(mine[name], grads[name]) < 1e-5, name


@pytest.mark.parametrize("kind", KINDS)
def test_twenty_steps_lose_what_peft_loses(kind):
    ours, peer = pair("llama32", **KINDS[kind])
    sides = [(peer, torch.optim.AdamW([p for p in peer.parameters() if p.requires_grad], lr=3e-3)),
             (ours, torch.optim.AdamW([p for p in ours.parameters() if p.requires_grad], lr=3e-3))]
    losses = ([], [])
    for step in range(20):
        ids = tiny.tokens(2, 24, seed=step % 4)
        targets = ids.roll(-1, 1)
        for side_losses, (model, optimizer) in zip(losses, sides, strict=True):
            if model is ours:
                loss = model(ids, DOC, POS, targets).mean()
            else:
                logits = model(ids).logits.flatten(0, 1)
                loss = torch.nn.functional.cross_entropy(logits, targets.flatten())
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            side_losses.append(loss.item())
    assert losses[1] == pytest.approx(losses[0], rel=1e-4) and losses[0][-1] < losses[0][0]


def test_step_zero_is_the_base_and_so_is_a_disabled_adapter():
    base = tiny.ours(tiny.peer("llama3"), "llama3")
    wrapped = tiny.ours(tiny.peer("llama3"), "llama3")
    lora.add_lora(wrapped, 4, 8.0, 0.0, ["all-linear"])
    with torch.no_grad():
        assert torch.equal(base(IDS, DOC, POS), wrapped(IDS, DOC, POS)), "B is zero"
        for m in lora.adapters(wrapped).values():
            m.lora_B.weight.normal_()
        moved = wrapped(IDS, DOC, POS)
        assert not torch.allclose(base(IDS, DOC, POS), moved)
        with lora.disabled(wrapped):
            assert torch.equal(base(IDS, DOC, POS), wrapped(IDS, DOC, POS))
        assert torch.equal(moved, wrapped(IDS, DOC, POS)), "enabled again"


@pytest.mark.parametrize("kind", KINDS)
def test_disabled_is_the_base_and_merged_is_the_adapter(kind):
    ours, _ = pair("llama32", **KINDS[kind])
    base = tiny.ours(tiny.peer("llama32"), "llama32")
    with torch.no_grad():
        base_logits = ours(IDS, DOC, POS)
        with lora.disabled(ours):
            assert torch.equal(ours(IDS, DOC, POS), base(IDS, DOC, POS))
        assert torch.equal(ours(IDS, DOC, POS), base_logits), "enabled again"
        assert not torch.allclose(base_logits, base(IDS, DOC, POS))
        lora.merge(ours)
        torch.testing.assert_close(ours(IDS, DOC, POS), base_logits, atol=1e-5, rtol=1e-5)
    assert not lora.adapters(ours) and not lora.base_values(ours)
    assert ours.state_dict().keys() == base.state_dict().keys()


def test_doras_rows_have_the_lengths_of_the_sum():
    ours, _ = pair("biases", use_dora=True)
    for m in lora.adapters(ours).values():
        wanted = (m.base_layer.weight + m.delta()).norm(dim=1)
        torch.testing.assert_close(m.row_norms(), wanted)
        torch.testing.assert_close(m.merged().norm(dim=1), m.lora_magnitude_vector.data.abs())


def test_only_the_adapter_trains():
    ours, _ = pair()
    assert {n.rsplit(".", 2)[-2] for n, p in ours.named_parameters() if p.requires_grad} == {
        "lora_A", "lora_B"}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", ["llama3", "llama32"])  # a head of its own, and a tied one
def test_pefts_own_folder_opens_here_and_ours_there(tmp_path, shape, kind):
    ours, peer = pair(shape, **KINDS[kind])
    peer.save_pretrained(tmp_path / "theirs")
    opened = tiny.ours(tiny.peer(shape), shape)
    load_adapter(opened, tmp_path / "theirs")
    (tmp_path / "ours").mkdir()
    save_file({k: x.contiguous() for k, x in adapter_state(ours).items()},
              tmp_path / "ours/adapter_model.safetensors")
    (tmp_path / "ours/adapter_config.json").write_text(
        json.dumps(adapter_config(ours, "base")))
    names = [load_file(tmp_path / x / "adapter_model.safetensors").keys()
             for x in ("ours", "theirs")]
    assert names[0] == names[1]
    theirs = peft.PeftModel.from_pretrained(tiny.peer(shape), tmp_path / "ours")
    with torch.no_grad():
        torch.testing.assert_close(
            opened(IDS, DOC, POS), peer(IDS).logits[:, -1], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(
            ours(IDS, DOC, POS), theirs(IDS).logits[:, -1], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("targets", [
    ("layers.0.self_attn.q_proj", "v_proj"), ("layers.1.mlp.up_proj", "layers.0.mlp.up_proj"),
    ("model.layers.1.self_attn.o_proj",), ("self_attn.q_proj", "down_proj")])
def test_an_adapter_on_a_part_of_a_path_opens_again_here_and_in_peft(tmp_path, targets):
    base = tiny.folder(tmp_path / "base", "llama3")
    model, _ = load_model(base)
    attach(model, targets)
    draw = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for x in adapter_state(model).values():
            x.add_(torch.empty_like(x).normal_(0, 0.1, generator=draw))
        wanted = tiny.logits(model, IDS)
        save_adapter(model, tmp_path / "adapter", base, source=base)
        again, _ = load_model(tmp_path / "adapter")
        assert lora.adapters(again).keys() == lora.adapters(model).keys()
        assert torch.equal(tiny.logits(again, IDS), wanted)
        peer = transformers.AutoModelForCausalLM.from_pretrained(base)
        peer = peft.PeftModel.from_pretrained(peer, tmp_path / "adapter").eval()
        assert tiny.apart(peer(IDS).logits, wanted) < 1e-5


@pytest.mark.parametrize("kind", ["LoRA", "rsLoRA", "DoRA"])
@pytest.mark.parametrize("whole", [(), ("embed_tokens", "lm_head")], ids=["", "embeddings"])
@pytest.mark.parametrize("shape", ["llama3", "llama32"])  # a head of its own, and a tied one
def test_saved_loaded_merged_saved_and_loaded_it_computes_the_same(tmp_path, shape, whole, kind):
    base = tiny.folder(tmp_path / "base", shape)
    model, _ = load_model(base)
    attach(model, modules_to_save=whole, **KINDS[kind])
    draw = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for x in adapter_state(model).values():
            x.add_(torch.empty_like(x).normal_(0, 0.1, generator=draw))
        wanted = tiny.logits(model, IDS)
        assert not torch.allclose(wanted, tiny.logits(load_model(base)[0], IDS), atol=1e-2)
        save_adapter(model, tmp_path / "adapter", base, source=base)
        again, _ = load_model(tmp_path / "adapter")
        assert torch.equal(tiny.logits(again, IDS), wanted)
        lora.merge(again)
        assert tiny.apart(tiny.logits(again, IDS), wanted) < 1e-5
        save_model(again, tmp_path / "merged", source=base)
        merged, _ = load_model(tmp_path / "merged")
        assert torch.equal(tiny.logits(merged, IDS), tiny.logits(again, IDS))
        peer = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
        assert tiny.apart(peer(IDS).logits, wanted) < 1e-5
    assert (merged.lm_head is None) == (shape == "llama32")


def test_without_a_gradient_a_layer_computes_the_same_bits():
    torch.manual_seed(0)
    base = torch.nn.Linear(64, 96, dtype=torch.bfloat16)
    layer = lora.LoRALinear(base, 8, 16.0, 0.0, False, False)
    torch.nn.init.normal_(layer.lora_B.weight, std=0.3)
    x = torch.randn(2, 5, 64, dtype=torch.bfloat16)
    with torch.no_grad():
        read = layer(x)
    assert torch.equal(read, layer(x).detach())
    assert not torch.equal(read, base(x))


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
    [(4, ["q_pro"], "expected down_proj, gate_proj, k_proj"), (0, ["all-linear"], "from 1 to"),
     (99, ["q_proj"], "from 1 to 32"), (4, ["q_proj", "embed_tokens"], "--train-embeddings"),
     (4, ["lm_head"], "--train-embeddings")],
)
def test_what_cannot_be_attached_is_refused_in_one_line(rank, targets, word):
    model = tiny.ours(tiny.peer("llama3"), "llama3")
    for dora in (False, True):
        with pytest.raises(UserError, match=word) as e:
            lora.add_lora(model, rank, 8.0, 0.0, targets, dora=dora)
        assert "\n" not in str(e.value) and e.value.code == 2


@pytest.mark.parametrize(
    "words, word",
    [({"use_dora": True}, "lora_magnitude_vector is missing"), ({"bias": "all"}, "bias"),
     ({"modules_to_save": ["lm_head"]}, "lm_head.weight is missing"),
     ({"modules_to_save": ["nothing"]}, "another base"), ({"layers_to_transform": [7]}, "0 to 1"),
     ({"layers_to_transform": "x"}, "do not describe"), ({"rank_pattern": {"q": 2}}, "rank_pat"),
     ({"peft_type": "IA3"}, "IA3"), ({"r": "x"}, "do not describe"),
     ({"r": True}, "do not describe"), ({"lora_dropout": 2.0}, "do not describe"),
     ({"target_modules": None}, "do not describe"), ({"init_lora_weights": "pissa"}, "pissa"),
     ({"r": 3}, "belongs to another base"), ({"r": 999}, "another base"),
     ({"target_modules": ["nothing"]}, "another base"),
     ({"target_modules": ["q_proj", "embed_tokens"]}, "adapter on embed_tokens is not")],
)
def test_an_adapter_that_would_be_computed_otherwise_is_refused_by_name(tmp_path, words, word):
    ours, _ = pair()
    save_file(adapter_state(ours), tmp_path / "adapter_model.safetensors")
    config = {**adapter_config(ours, "base"), **words}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=word):
        load_adapter(tiny.ours(tiny.peer("llama3"), "llama3"), tmp_path)


PATTERNS = [r".*\.(q|v)_proj", r"model\.layers\.1\..*_proj", r".*self_attn\..*", "all-linear",
            r"model\.layers\.\d+\.mlp\.(gate|up)_proj",
            r"(?:.*?(?:self_attn|mlp).*?(?:q|down)_proj)"]


@pytest.mark.parametrize("pattern", PATTERNS)
def test_a_pattern_selects_the_modules_that_peft_selects(tmp_path, pattern):
    theirs = peft.get_peft_model(tiny.peer("llama3"), peft.LoraConfig(
        r=4, lora_alpha=8, target_modules=pattern, init_lora_weights=False, task_type="CAUSAL_LM"))
    theirs.save_pretrained(tmp_path)
    model = tiny.ours(tiny.peer("llama3"), "llama3")
    load_adapter(model, tmp_path)
    ids = tiny.tokens(1, 20)
    with torch.no_grad():
        torch.testing.assert_close(
            tiny.logits(model, ids), theirs.eval()(ids).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("pattern, word", [
    (r"(a+)+$", "matches no module"), (r"(.*a){20}.*!", "matches no module"),
    (r"(?=.*q_proj).*", "cannot be used"), (r"(.)\1.*", "cannot be used"), ("[", "cannot be used"),
    (r"a)|(.*", "cannot be used"), ("(a{1000}){1000}", "cannot be used"),
    (r".*(embed_tokens|q_proj)", "embed_tokens is not supported"),
    (r".*(lm_head|q_proj)", "lm_head is not supported"), ("x*" * 5000, "matches no module"),
    ("(" * 5000 + "x" + ")" * 5000, "target_modules")])
def test_a_pattern_is_matched_at_once_or_refused_in_one_line(tmp_path, pattern, word):
    ours, _ = pair()
    save_file(adapter_state(ours), tmp_path / "adapter_model.safetensors")
    config = {**adapter_config(ours, "base"), "target_modules": pattern}
    config.pop("layers_to_transform", None)
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    begin = time.perf_counter()
    with pytest.raises(UserError, match=word) as e:
        load_adapter(tiny.ours(tiny.peer("llama3"), "llama3"), tmp_path)
    assert time.perf_counter() - begin < 10 and len(str(e.value)) < 600


def test_a_pattern_together_with_layers_is_refused_as_by_peft(tmp_path):
    ours, _ = pair()
    save_file(adapter_state(ours), tmp_path / "adapter_model.safetensors")
    config = {**adapter_config(ours, "base"), "target_modules": ".*q_proj",
              "layers_to_transform": [0]}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="layers_to_transform cannot be used with a pattern"):
        load_adapter(tiny.ours(tiny.peer("llama3"), "llama3"), tmp_path)


@pytest.mark.parametrize("key, value", [
    ("r", 0), ("r", 1.0), ("r", 2**63), ("lora_alpha", -1), ("lora_alpha", 1e30),
    ("lora_alpha", True), ("lora_alpha", "8"), ("lora_dropout", 1), ("lora_dropout", -0.1),
    ("lora_dropout", None), ("target_modules", ["q_proj", 1]), ("target_modules", ["x" * 600]),
    ("target_modules", ["a b"]),
    ("target_modules", ["q_proj"] * 20_000), ("layers_to_transform", [0.0]),
    ("layers_to_transform", True), ("modules_to_save", "lm_head"), ("modules_to_save", [None]),
    ("use_rslora", 1), ("use_dora", "yes"), ("bias", ["none"]), ("exclude_modules", "(a+)+$")])
def test_a_value_of_an_adapter_that_is_out_of_range_is_named(tmp_path, key, value):
    ours, _ = pair()
    save_file(adapter_state(ours), tmp_path / "adapter_model.safetensors")
    config = {**adapter_config(ours, "base"), key: value}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(UserError) as e:
        load_adapter(tiny.ours(tiny.peer("llama3"), "llama3"), tmp_path)
    text = str(e.value)
    assert text.startswith(f"{tmp_path / 'adapter_config.json'}: ") and len(text) < 500
    assert key in text or "another base" in text


def test_a_missing_or_foreign_tensor_is_named(tmp_path):
    ours, _ = pair()
    state = adapter_state(ours)
    name, tensor = next(iter(state.items()))
    fresh = tiny.ours(tiny.peer("llama3"), "llama3")
    lora.add_lora(fresh, 4, 8.0, 0.0, ["all-linear"])
    with pytest.raises(UserError, match=f"{name} is missing"):
        load_adapter_state(fresh, {k: v for k, v in state.items() if k != name}, "here")
    with pytest.raises(UserError, match="strange is not one of"):
        load_adapter_state(fresh, {**state, "strange": tensor}, "here")
