"""Every number of config.json has a range, and a value outside it is named."""

from __future__ import annotations

import pytest

from helpers import tiny
from layers.config import MAX_SIZES, NUMBER_RANGES, ModelConfig
from runtime.console import UserError

ROPES = {
    "factor": {"rope_type": "linear", "factor": 2.0},
    "low_freq_factor": tiny.LLAMA3_ROPE, "high_freq_factor": tiny.LLAMA3_ROPE,
    "original_max_position_embeddings": tiny.LLAMA3_ROPE,
    **{key: {"rope_type": "yarn", "factor": 2.0, "mscale": 1.0, "mscale_all_dim": 0.5}
       for key in ("beta_slow", "beta_fast", "mscale", "mscale_all_dim", "attention_factor")}}


def config_with(key: str, value: object) -> dict:
    """A config in which `key` is used, with this value."""
    if key in ROPES:
        return tiny.config("llama3", rope_scaling={**ROPES[key], key: value})
    return tiny.config("gemma3", **{key: value})


@pytest.mark.parametrize("key", [*NUMBER_RANGES, *MAX_SIZES, "max_position_embeddings",
                                 "sliding_window", "sliding_window_pattern",
                                 "original_max_position_embeddings"])
def test_a_number_out_of_its_range_is_named_with_what_is_expected(key):
    if key in NUMBER_RANGES:
        low, high = NUMBER_RANGES[key]
        values = [low / 2, high * 2, -1.0, 0, 1e30, 1e-40, 10**40]
    else:
        values = [MAX_SIZES.get(key, (1 << 31) - 1) + 1, 0, -1, 1.5, 10**40]
    for value in [*values, float("nan"), float("inf"), "1", True, [1], {"a": 1}]:
        if value == 0 and key in ("mscale", "mscale_all_dim"):
            continue  # as in transformers: not given
        with pytest.raises(UserError) as e:
            ModelConfig.from_hf(config_with(key, value))
        text = str(e.value)
        assert text.startswith(f"config.json: {key} is ") and "expected a" in text, (value, text)
        assert len(text) < 250


PUBLISHED = [  # key, the extremes of published models
    ("rope_theta", 10000, 1e11), ("rms_norm_eps", 1e-8, 1e-5), ("factor", 1.0, 40.0),
    ("beta_fast", 32, 32), ("beta_slow", 1, 1), ("mscale", 0.707, 1.0), ("mscale_all_dim", 0.5, 1),
    ("query_pre_attn_scalar", 128, 256), ("final_logit_softcapping", 15.0, 50.0),
    ("max_position_embeddings", 512, 10_485_760), ("vocab_size", 32000, 262_208),
    ("intermediate_size", 1536, 53_248), ("sliding_window", 128, 131_072),
    ("high_freq_factor", 4.0, 4.0), ("original_max_position_embeddings", 4096, 65_536)]


@pytest.mark.parametrize("key, low, high", PUBLISHED, ids=[key for key, *_ in PUBLISHED])
def test_the_values_of_published_models_are_accepted(key, low, high):
    for value in (low, high):
        ModelConfig.from_hf(config_with(key, value))


@pytest.mark.parametrize("rope", [
    {**tiny.LLAMA3_ROPE, "low_freq_factor": 4.0}, {**tiny.LLAMA3_ROPE, "low_freq_factor": 5.0},
    {"rope_type": "yarn", "factor": 2.0, "beta_fast": 1, "beta_slow": 32}])
def test_bounds_of_rotary_scaling_in_the_wrong_order_are_refused(rope):
    with pytest.raises(UserError, match=r"expected a (high_freq_factor|beta_fast) above"):
        ModelConfig.from_hf(tiny.config("llama3", rope_scaling=rope))
