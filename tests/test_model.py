"""The model against transformers' on every shape; packed against separate; a cache against none."""

import pytest
import torch
import torch.nn.functional as F
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from data import IGNORE
from helpers import tiny
from layers import functional as layers
from model import KVCache, Llama, ModelConfig
from runtime.console import UserError
from training import optimizer as optim

SHAPES = list(tiny.SHAPES)
GPU = pytest.param("gpu", marks=[pytest.mark.gpu, pytest.mark.skipif(
    not torch.cuda.is_available(), reason="no GPU here")])


def both(shape: str, seed: int = 0) -> tuple[transformers.LlamaForCausalLM, Llama]:
    """transformers' model and ours with the same weights."""
    peer = tiny.peer(shape, seed)
    return peer, tiny.ours(peer, shape)


def nll(model: Llama, ids: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Our NLL of each target, one document a row."""
    doc, pos = torch.zeros_like(ids), torch.arange(ids.shape[1]).expand_as(ids)
    return model(ids, doc, pos, targets)


def shifted(ids: torch.Tensor) -> torch.Tensor:
    """Each token's next as its target; none for the last."""
    return torch.cat([ids[:, 1:], torch.full_like(ids[:, :1], IGNORE)], dim=1)


@pytest.mark.parametrize("shape", SHAPES)
def test_logits_loss_and_gradients_are_those_of_transformers(shape):
    peer, model = both(shape)
    ids = tiny.tokens(2, 80)
    out = peer(ids, labels=ids)
    with torch.no_grad():
        torch.testing.assert_close(tiny.logits(model, ids), out.logits, rtol=1e-5, atol=1e-5)
    loss = nll(model, ids, shifted(ids)).sum() / (ids.numel() - len(ids))
    torch.testing.assert_close(loss, out.loss, rtol=1e-5, atol=1e-5)
    out.loss.backward()
    loss.backward()
    theirs = {k: p.grad for k, p in peer.named_parameters()}
    mine = {k: p.grad for k, p in model.named_parameters()}
    assert mine.keys() == theirs.keys()
    for k in mine:
        torch.testing.assert_close(mine[k], theirs[k], rtol=1e-4, atol=1e-5,
                                   msg=lambda m, k=k: f"{k}: {m}")


@pytest.mark.parametrize("shape", ["llama1", "llama31", "llama32", "biases", "gemma2", "olmo2"])
def test_twenty_adamw_steps_lose_what_transformers_loses(shape):
    peer, model = both(shape)
    peer.train()
    model.train()
    theirs = torch.optim.AdamW(peer.parameters(), lr=3e-3, betas=(0.9, 0.95), weight_decay=0.1)
    mine = optim.adamw(model, lr=3e-3, betas=(0.9, 0.95), weight_decay=0.1)
    assert mine.param_groups[0]["eps"] == theirs.param_groups[0]["eps"]
    for group in mine.param_groups:
        group["weight_decay"] = 0.1  # ours spares norms and biases; here the same for all
    for group in (*mine.param_groups, *theirs.param_groups):
        group["eps"] = 1e-4  # by 1e-8 a gradient that is rounding alone moves a weight by its sign
    losses = []
    for step in range(20):
        ids = tiny.tokens(2, 32, seed=step % 4)
        a, b = peer(ids, labels=ids).loss, nll(model, ids, shifted(ids)).sum() / (2 * 31)
        losses.append((a.item(), b.item()))
        for loss, optimizer in ((a, theirs), (b, mine)):
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    for a, b in losses:
        assert b == pytest.approx(a, rel=1e-5)
    assert losses[-1][0] < 0.8 * losses[0][0]  # it did learn something


@pytest.mark.parametrize("shape", SHAPES)
def test_names_and_shapes_are_those_of_transformers_and_config_words_survive(shape):
    peer, _ = both(shape)
    config = ModelConfig.from_hf(tiny.config(shape))
    with torch.device("meta"):
        state = Llama(config).state_dict()
    wanted = {k: p.shape for k, p in peer.state_dict().items()}
    if config.tie_word_embeddings:
        del wanted["lm_head.weight"]
    assert {k: p.shape for k, p in state.items()} == wanted
    assert ModelConfig.from_hf(peer.config.to_dict()) == config  # in transformers 5's words


@pytest.mark.parametrize("shape", [x for x in tiny.LLAMAS if x not in ("yarn", "dynamic")])
def test_a_llamas_config_is_written_in_words_that_transformers_reads(shape):
    peer, _ = both(shape)
    config = ModelConfig.from_hf(tiny.config(shape))
    assert ModelConfig.from_hf(config.to_hf()) == config
    again = transformers.LlamaConfig(**config.to_hf())
    for word in ("head_dim", "num_key_value_heads", "rms_norm_eps", "tie_word_embeddings",
                 "attention_bias", "mlp_bias", "max_position_embeddings"):
        assert getattr(again, word) == getattr(peer.config, word), word
    assert again.rope_parameters.items() <= peer.config.rope_parameters.items()


@pytest.mark.parametrize("shape", ["llama3", "llama31", "linear", "yarn"])
def test_rotary_frequencies_are_those_of_transformers_at_published_sizes(shape):
    config = tiny.config(shape, hidden_size=4096, num_attention_heads=32, num_key_value_heads=8,
                        max_position_embeddings=131072)
    if shape == "llama31":
        config["rope_scaling"] = {**tiny.LLAMA3_ROPE, "original_max_position_embeddings": 8192}
    theirs = LlamaRotaryEmbedding(transformers.LlamaConfig(**config))
    rope = ModelConfig.from_hf(config).rope
    mine = layers.rope_frequencies(rope, 128, "cpu")
    torch.testing.assert_close(mine, theirs.inv_freq, rtol=1e-6, atol=0)
    assert rope.amplitude == pytest.approx(theirs.attention_scaling)


@pytest.mark.parametrize("shape", SHAPES)
def test_bf16_weights_give_the_logits_of_transformers_to_bf16_rounding(shape):
    peer, model = both(shape)
    ids = tiny.tokens(2, 40)
    with torch.no_grad():
        exact = tiny.logits(model, ids)
        theirs = peer.to(torch.bfloat16)(ids).logits.float()
        narrow = tiny.ours(tiny.peer(shape), shape, torch.bfloat16).to(torch.bfloat16)
        mine = tiny.logits(narrow, ids).float()
    span = exact.std()
    assert (mine - exact).abs().mean() < 1e-2 * span + 1.2 * (theirs - exact).abs().mean()
    assert (mine - theirs).abs().mean() < 3e-2 * span


def test_bf16_products_stay_near_float32_and_logits_come_as_float32():
    peer, model = both("llama31")
    ids = tiny.tokens(2, 40)
    exact = nll(model, ids, shifted(ids))
    model = tiny.ours(peer, "llama31", torch.bfloat16)
    near = nll(model, ids, shifted(ids))
    assert near.dtype == torch.float32 and model.compute_dtype == torch.bfloat16
    assert (near - exact).abs().max() > 1e-4  # it did compute otherwise
    theirs = peer.to(torch.bfloat16)(ids, labels=ids).loss.float()
    assert abs(near.sum() / 78 - exact.sum() / 78) < 2 * abs(theirs - exact.sum() / 78) + 0.01
    doc, pos = torch.zeros_like(ids), torch.arange(40).expand_as(ids)
    assert model(ids, doc, pos).dtype == torch.float32


@pytest.mark.parametrize(("change", "says"), [
    ({"architectures": ["MixtralForCausalLM"]}, "Olmo2ForCausalLM"),
    ({"architectures": ["LlamaForSequenceClassification"]}, "LlamaForSequenceClassification"),
    ({"architectures": None, "model_type": "gpt2"}, "gpt2"),
    ({"architectures": 7}, "architectures"), ({"hidden_act": "gelu"}, "gelu"),
    ({"rope_scaling": {"rope_type": "longrope", "factor": 4.0}}, "longrope"),
    ({"rope_scaling": {"type": "dynamic"}}, "factor is None"),
    ({"partial_rotary_factor": 0.5, "rope_scaling": {"type": "linear", "factor": 2.0}}, "in part"),
    ({"layer_types": ["sliding_attention"] * 2}, "layer_types"),
    ({"rope_scaling": {"rope_type": "linear"}}, "factor"), ({"rope_scaling": "linear"}, "rope"),
    ({"quantization_config": {"quant_method": "gptq"}}, "quantis"),
    ({"hidden_size": 33}, "hidden_size 33"), ({"num_key_value_heads": 3}, "key/value heads"),
    ({"head_dim": 7}, "width 7"), ({"vocab_size": 0}, "vocab_size is 0"),
    ({"num_hidden_layers": -1}, "num_hidden_layers is -1"),
    ({"num_attention_heads": True}, "num_attention_heads is True"),
    ({"intermediate_size": 1e12}, "intermediate_size"),
    ({"rms_norm_eps": "x"}, "rms_norm_eps is 'x'"),
    ({"rope_theta": float("inf")}, "rope_theta is inf"),
    ({"tie_word_embeddings": "yes"}, "tie_word_embeddings is 'yes'")])
def test_a_config_that_would_be_computed_wrongly_is_refused_by_name(change, says):
    with pytest.raises(UserError) as e:
        ModelConfig.from_hf(tiny.config(**change))
    assert says in str(e.value) and "\n" not in str(e.value)


def test_any_word_of_any_kind_is_refused_or_harmless():
    values = [0, -1, 10**12, 1e12, "x", None, [], {}, [1], True, float("nan"), 2**31 - 1]
    every = ["llama31", "qwen2-window", "smollm3-window", "gemma2", "gemma3"]
    cases = [(x, key, value) for x in every for key in tiny.config(x) for value in values]
    for shape, key, value in cases:
        config = tiny.config(shape, **{key: value})
        try:
            ModelConfig.from_hf(config)
        except UserError as e:
            assert "config.json" in str(e)


def packed(lengths: list[int], rows: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """doc and pos (rows, width) of documents laid end to end; what is left is a tail."""
    doc, pos = torch.full((rows, width), -1), torch.zeros(rows, width, dtype=torch.long)
    start = n = 0
    for length in lengths:
        while length and start < rows * width:
            row, column = divmod(start, width)
            n_fitting = min(length, width - column)
            doc[row, column : column + n_fitting] = n
            pos[row, column : column + n_fitting] = torch.arange(n_fitting)
            # the rest of a document that is cut goes on as another document
            start, length, n = start + n_fitting, length - n_fitting, n + 1
    return doc, pos


def prepare(path: str, shape: str) -> Llama:
    """A model whose attention takes that path."""
    backends = {"blocks": "cpu", "one by one": "cpu_documents", "mask": "sdpa_mask"}
    model = tiny.ours(tiny.peer(shape), shape, recompute="full" if path == "recompute" else "none",
                      attention_backend=backends.get(path, "auto"))
    return model.to("cuda") if path == "gpu" else model


PATHS = ["blocks", "one by one", "mask", "recompute", GPU]
PACKED = ["llama31", "gemma2", "qwen2-window", "smollm3"]  # plain; capped and windowed; unturned


@pytest.mark.parametrize("shape", PACKED)
@pytest.mark.parametrize("path", PATHS)
def test_changing_a_document_leaves_its_neighbours_untouched(path, shape):
    model = prepare(path, shape)

    @settings(max_examples=25, deadline=None)
    @given(st.lists(st.integers(1, 30), min_size=2, max_size=8), st.randoms(use_true_random=False))
    def check(lengths, random):
        doc, pos = packed(lengths, 2, 40)
        ids = tiny.tokens(2, 40, seed=1)
        row, column = random.choice((doc >= 0).nonzero().tolist())
        changed = torch.zeros_like(doc, dtype=torch.bool)
        changed[row] = doc[row] == doc[row, column]
        other = torch.where(changed, tiny.tokens(2, 40, seed=2), ids)
        results = []
        with torch.set_grad_enabled(path == "recompute"):  # only a gradient makes it forget
            for x in (ids, other):
                inputs = [y.to(model.device) for y in (x, doc, pos)]
                results.append(tiny.logits(model, *inputs).cpu())
        a, b = results
        assert torch.equal(a[~changed], b[~changed])
        assert not torch.equal(a[changed], b[changed]) or torch.equal(ids, other)

    check()


@pytest.mark.parametrize("shape", PACKED)
@pytest.mark.parametrize("path", PATHS)
def test_packed_documents_compute_what_they_do_alone(path, shape):
    model = prepare(path, shape)

    @settings(max_examples=12, deadline=None)
    @given(st.lists(st.integers(1, 40), min_size=1, max_size=8))
    def check(lengths):
        doc, pos = packed(lengths, 2, 40)
        ids = tiny.tokens(2, 40, seed=3)
        targets = torch.where(doc >= 0, tiny.tokens(2, 40, seed=4), IGNORE)
        device = model.device
        model.zero_grad()
        together = model(*(x.to(device) for x in (ids, doc, pos, targets)))
        together.sum().backward()
        gradients = [p.grad.clone() for p in model.parameters()]
        model.zero_grad()
        for row in range(2):
            for d in doc[row].unique().tolist():
                inside = doc[row] == d
                if d < 0:
                    assert (together[row, inside] == 0).all()
                    continue
                alone = model(*(x[row, inside][None].to(device) for x in (ids, doc, pos, targets)))
                torch.testing.assert_close(together[row, inside], alone[0], rtol=1e-5, atol=1e-5)
                alone.sum().backward()
        for g, p in zip(gradients, model.parameters(), strict=True):
            torch.testing.assert_close(g, p.grad, rtol=1e-4, atol=1e-4)

    check()


def test_dynamic_rotary_beyond_its_context_is_that_of_each_document_alone():
    changes = {"max_position_embeddings": 24}
    peer = tiny.peer("dynamic", **changes)
    model = tiny.ours(peer, "dynamic", **changes)
    lengths = [40, 20, 30]
    doc, pos = packed(lengths, 1, sum(lengths))
    ids = tiny.tokens(1, sum(lengths))
    with torch.no_grad():
        together = tiny.logits(model, ids, doc, pos)
        for d in range(len(lengths)):
            inside = doc[0] == d
            theirs = peer(ids[:, inside]).logits
            torch.testing.assert_close(together[:, inside], theirs, rtol=1e-5, atol=1e-5)


def test_rows_of_one_document_each_do_not_see_each_other():
    model = tiny.ours(tiny.peer("llama3"), "llama3")
    ids, other = tiny.tokens(3, 20, seed=1), tiny.tokens(3, 20, seed=2)
    mixed = torch.stack([ids[0], other[1], ids[2]])
    a, b = tiny.logits(model, ids), tiny.logits(model, mixed)
    assert torch.equal(a[[0, 2]], b[[0, 2]]) and not torch.allclose(a[1], b[1])


def test_a_token_sees_those_before_it_and_none_after():
    model = tiny.ours(tiny.peer("linear"), "linear")
    ids = tiny.tokens(1, 24)
    changed = ids.clone()
    changed[0, 10] = (changed[0, 10] + 7) % tiny.V
    a, b = tiny.logits(model, ids)[0], tiny.logits(model, changed)[0]
    assert torch.equal(a[:10], b[:10]) and (a[10:] != b[10:]).any(-1).all()


def test_the_next_logits_are_those_of_each_rows_last_token_in_a_document():
    model = tiny.ours(tiny.peer())
    doc, pos = packed([7, 5, 20 + 13], 2, 20)
    doc[1, 13:] = -1
    ids = tiny.tokens(2, 20)
    with torch.no_grad():
        every = tiny.logits(model, ids, doc, pos)
        torch.testing.assert_close(model(ids, doc, pos), torch.stack([every[0, 19], every[1, 12]]))


def read(model: Llama, cache: KVCache, ids: torch.Tensor, real: torch.Tensor | None = None):
    """Next logits (B,V) after ids (B,T) behind what the cache holds; not `real`: padding."""
    pos = cache.lengths[:, None] + torch.arange(ids.shape[1])
    doc = torch.zeros_like(ids) if real is None else torch.where(real, 0, -1)
    return model(ids, doc, pos, cache=cache)


@pytest.mark.parametrize("shape", SHAPES)
def test_a_cache_read_token_by_token_gives_the_logits_of_the_whole(shape):
    model = tiny.ours(tiny.peer(shape), shape)
    ids = tiny.tokens(2, 24)
    with torch.no_grad():
        expected = tiny.logits(model, ids)
        for rows in (slice(0, 1), slice(0, 2)):  # one row takes a path of its own
            selected = ids[rows]
            cache = KVCache(model.config, len(selected), 24, "cpu", torch.float32)
            for t in range(24):
                logits = read(model, cache, selected[:, t : t + 1])
                torch.testing.assert_close(logits, expected[rows, t], rtol=1e-5, atol=1e-5)
            assert cache.lengths.tolist() == [24] * len(selected)


@settings(max_examples=25, deadline=None)
@given(lengths=st.lists(st.integers(1, 12), min_size=1, max_size=4),
       parts=st.lists(st.integers(1, 5), max_size=3))
def test_ragged_rows_read_in_parts_give_the_logits_of_each_row_alone(lengths, parts):
    model = tiny.ours(tiny.peer("llama31"), "llama31")
    B, longest = len(lengths), max(lengths)
    ids = tiny.tokens(B, longest + sum(parts) + 1)
    cache = KVCache(model.config, B, longest + sum(parts), "cpu", torch.float32)
    real = torch.arange(longest) < torch.tensor(lengths)[:, None]
    with torch.no_grad():
        logits = read(model, cache, torch.where(real, ids[:, :longest], 0), real)
        prefixes = [ids[i, :n] for i, n in enumerate(lengths)]
        for width in [0, *parts]:
            if width:
                following = torch.stack([ids[i, len(x) : len(x) + width]
                                         for i, x in enumerate(prefixes)])
                logits = read(model, cache, following)
                prefixes = [torch.cat(x) for x in zip(prefixes, following, strict=True)]
            assert cache.lengths.tolist() == [len(x) for x in prefixes]
            for i, x in enumerate(prefixes):
                alone = tiny.logits(model, x[None])[0, -1]
                torch.testing.assert_close(logits[i], alone, rtol=1e-5, atol=1e-5)


def test_recomputing_activations_keeps_few_of_them_and_changes_no_gradient():
    ids = tiny.tokens(2, 30)
    doc, pos = packed([11, 19, 30], 2, 30)
    gradients, n_bytes = [], []
    for recompute in ("none", "full"):
        model = tiny.ours(tiny.peer("biases"), "biases", recompute=recompute).train()
        saved: list[int] = []
        note = torch.autograd.graph.saved_tensors_hooks(
            lambda x, saved=saved: saved.append(x.nbytes) or x, lambda x: x)
        with note:
            loss = model(ids, doc, pos, shifted(ids)).sum()
        n_bytes.append(sum(saved))
        loss.backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
    assert n_bytes[1] < n_bytes[0] / 2


def test_flops_per_token_are_those_torch_counts_in_the_products():
    from torch.utils.flop_counter import FlopCounterMode

    model = tiny.ours(tiny.peer("llama3"), "llama3").train()
    ids = tiny.tokens(1, 64)
    doc_pos = torch.zeros_like(ids), torch.arange(64).expand_as(ids)
    with FlopCounterMode(display=False) as counter:
        model(ids, *doc_pos, ids, reduction="sum").backward()
    counts = counter.get_flop_counts()["Global"]
    products = sum(n for op, n in counts.items()
                   if "attention" not in str(op) and "bmm" not in str(op))
    assert products == model.flops_per_token(0) * 64
    assert model.flops_per_token(64) - model.flops_per_token(0) == 6 * 64 * 32 * 2
    for T in (0, 64):
        assert 3 * model.flops_per_token(T, gradient=False) == model.flops_per_token(T)
    model.lm_head.requires_grad_(False)
    assert 3 * model.flops_per_token(0, gradient=False) \
        == model.flops_per_token(0) + 2 * model.head.numel()


def test_a_model_that_starts_from_nothing_starts_near_ln_v_and_the_same_for_a_seed():
    models = [Llama(ModelConfig.from_hf(tiny.config("llama3"))) for _ in range(2)]
    for m in models:
        m.initialise(seed=5)
    assert all(torch.equal(a, b) for a, b in zip(*(m.parameters() for m in models), strict=True))
    ids = tiny.tokens(4, 32)
    loss = nll(models[0], ids, ids).mean()
    assert abs(loss - F.cross_entropy(torch.zeros(1, tiny.V), torch.tensor([3]))) < 0.1
