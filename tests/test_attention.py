"""Rotary embedding, head gate, per-head norms and windows against plain numpy."""

import math
from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_map

from mlx_step35.attention import Attention, Rope, scaled_wavelengths
from mlx_step35.cache import make_layer_cache, window_mask
from mlx_step35.config import LayerConfig, Llama3Scaling, ModelConfig, RopeConfig
from tests import reference
from tests.tiny import tiny_config

# Divisors of the inverse frequencies of the release's full layers, by pair.
RELEASE_DIVISORS = [1.0] * 14 + [1.1384, 1.3745, 1.5764, 1.7337, 1.8476, 1.9256, 1.9773] + [2.0] * 11
RELEASE_SCALING = Llama3Scaling(2.0, 131072, 1.0, 32.0)


@pytest.fixture(scope="module")
def config() -> ModelConfig:
    return ModelConfig.from_hf(tiny_config())


def random_attention(config: ModelConfig, layer: LayerConfig) -> Attention:
    attention = Attention(config, layer)
    generator = np.random.default_rng(layer.index)
    attention.update(
        tree_map(
            lambda array: mx.array(generator.normal(0, 0.3, array.shape).astype(np.float32)),
            attention.parameters(),
        )
    )
    return attention


def expected(config: ModelConfig, layer: LayerConfig, attention: Attention, x: np.ndarray) -> np.ndarray:
    """The reference's answer for the module's weights; it wants norms as w, not 1 + w."""
    model = reference.Reference.__new__(reference.Reference)
    model.config, model.tensors = config, {}
    for name in ("q_proj", "k_proj", "v_proj", "o_proj", "g_proj", "q_norm", "k_norm"):
        weight = np.array(attention[name].weight).astype(np.float64) - ("norm" in name)
        model.tensors[f"model.layers.{layer.index}.self_attn.{name}.weight"] = weight
    return model.attention(layer, x.astype(np.float64))


@pytest.mark.parametrize("index", [0, 1])
def test_full_and_sliding_layers_equal_their_formulas(config: ModelConfig, index: int) -> None:
    layer = config.layers[index]
    attention = random_attention(config, layer)
    x = np.random.default_rng(9).normal(size=(30, config.hidden_size)).astype(np.float32)
    want = expected(config, layer, attention, x)
    whole = attention(mx.array(x)[None], window_mask(30, 0, layer.window))
    np.testing.assert_allclose(np.array(whole[0]), want, atol=2e-4)
    cache = make_layer_cache(layer)
    parts = []
    for start, end in ((0, 1), (1, 12), (12, 13), (13, 30)):
        parts.append(attention(mx.array(x[start:end])[None], cache.mask(end - start), cache))
    np.testing.assert_allclose(np.array(mx.concatenate(parts, axis=1)[0]), want, atol=2e-4)


def test_release_wavelengths_are_scaled_over_the_rotary_dims() -> None:
    plain = [5e6 ** (2 * pair / 64) for pair in range(32)]
    divisors = np.array(scaled_wavelengths(5e6, 64, RELEASE_SCALING)) / plain
    np.testing.assert_allclose(divisors, RELEASE_DIVISORS, atol=1e-4)


@pytest.mark.parametrize("scaling", [None, Llama3Scaling(2.0, 64, 1.0, 32.0)])
@pytest.mark.parametrize("dims", [8, 16])
def test_rotation(scaling: Llama3Scaling | None, dims: int) -> None:
    rope = RopeConfig(1e4, dims, scaling)
    layer = LayerConfig(0, "full", 2, 2, 16, None, rope, False, 1, None, None)
    x = np.random.default_rng(4).normal(size=(100, 2, 16)).astype(np.float32)
    want = reference.rotate(layer, x.astype(np.float64))
    rotated = Rope(rope)(mx.array(x).transpose(1, 0, 2)[None], 0)
    np.testing.assert_allclose(np.array(rotated[0].transpose(1, 0, 2)), want, atol=1e-4)
    # Dimensions behind the rotated ones pass through.
    assert np.array_equal(np.array(rotated[0].transpose(1, 0, 2))[..., dims:], x[..., dims:])
    later = Rope(rope)(mx.array(x[90:]).transpose(1, 0, 2)[None], 90)
    np.testing.assert_allclose(np.array(later[0].transpose(1, 0, 2)), want[90:], atol=1e-4)


def test_rotation_has_no_parameters() -> None:
    assert Rope(RopeConfig(5e6, 64, RELEASE_SCALING)).parameters() == {}


def test_the_gate_scales_each_head_before_the_output_projection(config: ModelConfig) -> None:
    layer = config.layers[0]
    attention = random_attention(config, layer)
    # A huge negative gate closes head 1, all others are wide open.
    gate = np.full((layer.num_heads, config.hidden_size), 0.0, dtype=np.float32)
    gate[:, 0], gate[1, 0] = 100.0, -100.0
    attention.g_proj.weight = mx.array(gate)
    x = mx.abs(mx.random.normal((1, 5, config.hidden_size), key=mx.random.key(0))) + 1
    gated = attention(x, "causal")
    attention.has_gate = False
    width = layer.head_dim
    attention.o_proj.weight[:, width : 2 * width] = 0.0
    np.testing.assert_allclose(np.array(gated), np.array(attention(x, "causal")), atol=1e-5)


def test_scores_are_scaled_by_the_head_size(config: ModelConfig) -> None:
    assert Attention(config, config.layers[0]).scale == pytest.approx(1 / math.sqrt(16))


@pytest.mark.parametrize("past", [0, 3, 40])
@pytest.mark.parametrize("window", [1, 8, 200])
def test_long_chunks_in_blocks_equal_one_call(config: ModelConfig, past: int, window: int) -> None:
    layer = replace(config.layers[1], window=window)
    attention = random_attention(config, layer)
    x = mx.random.normal((2, past + 500, config.hidden_size), key=mx.random.key(1))
    cache = make_layer_cache(layer)
    if past:
        attention(x[:, :past], cache.mask(past), cache)
    blocked = attention(x[:, past:], cache.mask(500), cache)
    attention.window = None
    whole = attention(x, window_mask(past + 500, 0, window))
    np.testing.assert_allclose(np.array(blocked), np.array(whole[:, past:]), atol=1e-4)
