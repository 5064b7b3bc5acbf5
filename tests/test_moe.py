"""Router, experts and clamps against plain numpy."""

from dataclasses import replace

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from mlx_step35.config import ModelConfig
from mlx_step35.moe import (
    SORT_THRESHOLD,
    QuantizedSwitchLinear,
    Router,
    SparseMoE,
    SwitchGLU,
    SwitchLinear,
    swiglu,
)
from mlx_step35.quantization import DEFAULTS, Mode, Quantization
from tests import reference
from tests.tiny import tiny_config


@pytest.fixture(scope="module")
def config() -> ModelConfig:
    return ModelConfig.from_hf(tiny_config())


def normal(*shape: int, seed: int = 0, spread: float = 1.0) -> mx.array:
    return mx.random.normal(shape, key=mx.random.key(seed)) * spread


def random_router(config: ModelConfig, bias: float = 0.3) -> Router:
    router = Router(config)
    router.gate.weight = normal(config.num_experts, config.hidden_size, seed=1, spread=0.3)
    router.router_bias = normal(config.num_experts, seed=2, spread=bias)
    return router


class TestRouter:
    def test_equals_its_formula(self, config: ModelConfig) -> None:
        router, x = random_router(config), normal(1, 50, config.hidden_size)
        experts, weights = (np.array(array) for array in router(x))
        scores = reference.sigmoid(np.array(x[0], np.float64) @ np.array(router.gate.weight, np.float64).T)
        ranking = scores + np.array(router.router_bias)
        for row in range(50):
            chosen = np.argsort(-ranking[row])[: config.top_k]
            assert set(experts[0, row]) == set(chosen)
            picked = scores[row, experts[0, row]]
            np.testing.assert_allclose(weights[0, row], picked / picked.sum() * 3.0, rtol=1e-5)

    def test_the_bias_selects_but_does_not_weigh(self, config: ModelConfig) -> None:
        router, x = random_router(config, bias=0.0), normal(1, 1, config.hidden_size)
        before, weights = router(x)
        loser = next(i for i in range(config.num_experts) if i not in np.array(before))
        router.router_bias = mx.where(mx.arange(config.num_experts) == loser, 5.0, 0.0)
        after, biased = router(x)
        assert loser in np.array(after)
        assert biased.sum().item() == pytest.approx(weights.sum().item()) == pytest.approx(3.0)
        scores = mx.sigmoid(router.gate(x))[0, 0]
        picked = scores[after[0, 0]]
        np.testing.assert_allclose(np.array(biased[0, 0]), np.array(picked / picked.sum() * 3), rtol=1e-5)

    def test_weights_without_normalisation(self, config: ModelConfig) -> None:
        router, x = random_router(replace(config, norm_topk_weights=False)), normal(1, 3, config.hidden_size)
        experts, weights = router(x)
        scores = mx.take_along_axis(mx.sigmoid(router.gate(x)), experts, axis=-1)
        np.testing.assert_allclose(np.array(weights), np.array(scores * 3.0), rtol=1e-5)

    @pytest.mark.parametrize("packed", [False, True])
    def test_logits_are_float32_whatever_the_input(self, config: ModelConfig, packed: bool) -> None:
        router, x = random_router(config), normal(1, 20, config.hidden_size).astype(mx.bfloat16)
        if packed:
            router.gate = nn.QuantizedLinear.from_linear(router.gate, group_size=64, bits=8)
            weight = mx.dequantize(router.gate.weight, router.gate.scales, router.gate.biases, 64, 8)
        else:
            weight = router.gate.weight
        experts, weights = router(x)
        assert weights.dtype == mx.float32
        scores = mx.sigmoid(x.astype(mx.float32) @ weight.T)
        picked = mx.take_along_axis(scores, experts, axis=-1)
        expected = picked / picked.sum(-1, keepdims=True) * 3
        # A bf16 product would be off by 1e-3.
        np.testing.assert_allclose(np.array(weights), np.array(expected), rtol=2e-5)


class TestClamp:
    GATE = mx.array([-20.0, -1.0, 0.0, 0.5, 5.0, 20.0])
    UP = mx.array([-20.0, 20.0, 1.0, -0.5, -5.0, 3.0])

    def test_gate_is_clamped_after_silu_and_above_only(self) -> None:
        silu = np.array(self.GATE) / (1 + np.exp(-np.array(self.GATE)))
        expected = np.minimum(silu, 2.0) * np.clip(np.array(self.UP), -2.0, 2.0)
        np.testing.assert_allclose(np.array(swiglu(self.GATE, self.UP, 2.0)), expected, rtol=1e-5)
        # silu never goes below -0.28, so clamping before it would show at the first entry.
        assert abs(swiglu(mx.array([-1.0]), mx.array([1.0]), 0.1).item() + 0.0269) < 1e-3

    def test_no_limit_is_plain_swiglu(self) -> None:
        np.testing.assert_allclose(
            np.array(swiglu(self.GATE, self.UP, None)), np.array(nn.silu(self.GATE) * self.UP), rtol=1e-5
        )

    @pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16, mx.float16])
    def test_dtype_is_kept(self, dtype: mx.Dtype) -> None:
        for limit in (None, 2.0):
            assert swiglu(self.GATE.astype(dtype), self.UP.astype(dtype), limit).dtype == dtype


class TestExperts:
    def experts(self, config: ModelConfig, limit: float | None = 0.5) -> SwitchGLU:
        experts = SwitchGLU(config, limit)
        for seed, name in enumerate(("gate_proj", "up_proj", "down_proj")):
            shape = experts[name].weight.shape
            experts[name].weight = normal(*shape, seed=10 + seed, spread=0.3)
        return experts

    @pytest.mark.parametrize("length", [1, 4, SORT_THRESHOLD, 200])
    def test_sorted_or_not_equals_one_by_one(self, config: ModelConfig, length: int) -> None:
        experts = self.experts(config)
        x = normal(2, length, config.hidden_size)
        chosen = mx.random.randint(0, config.num_experts, (2, length, config.top_k), key=mx.random.key(3))
        outputs = np.array(experts(x, chosen))
        assert outputs.shape == (2, length, config.top_k, config.hidden_size)
        gate, up, down = (np.array(experts[f"{name}_proj"].weight) for name in ("gate", "up", "down"))
        for b, i, k in ((0, 0, 0), (1, length - 1, config.top_k - 1), (0, length // 2, 1)):
            e, row = int(chosen[b, i, k].item()), np.array(x[b, i], np.float64)
            expected = reference.swiglu(row @ gate[e].T, row @ up[e].T, 0.5) @ down[e].T
            np.testing.assert_allclose(outputs[b, i, k], expected, atol=1e-4)

    @pytest.mark.parametrize("mode", ["affine", "mxfp4", "mxfp8", "nvfp4"])
    @pytest.mark.parametrize("length", [2, 100])
    def test_packed_experts_equal_their_dequantised_selves(
        self, config: ModelConfig, mode: Mode, length: int
    ) -> None:
        packing = DEFAULTS[mode] if mode != "affine" else Quantization(4, 32)
        packed, plain = self.experts(config), self.experts(config)
        for name in ("gate_proj", "up_proj", "down_proj"):
            weight = plain[name].weight
            module = QuantizedSwitchLinear(packing)
            module.weight, module.scales, *biases = mx.quantize(
                weight, packing.group_size, packing.bits, mode=mode
            )
            if biases:
                module.biases = biases[0]
            packed[name] = module
            plain[name] = SwitchLinear(*(weight.shape[i] for i in (0, 2, 1)))
            plain[name].weight = mx.dequantize(
                module.weight,
                module.scales,
                *biases,
                group_size=packing.group_size,
                bits=packing.bits,
                mode=mode,
            ).astype(mx.float32)
        x = normal(1, length, config.hidden_size)
        chosen = mx.random.randint(0, config.num_experts, (1, length, config.top_k), key=mx.random.key(3))
        np.testing.assert_allclose(np.array(packed(x, chosen)), np.array(plain(x, chosen)), atol=2e-4)

    def test_the_shared_expert_is_added_plain(self, config: ModelConfig) -> None:
        layer = config.layers[5]
        moe = SparseMoE(config, layer)
        moe.gate = random_router(config)
        moe.switch_mlp = self.experts(config, layer.swiglu_limit)
        for seed, name in enumerate(("gate_proj", "up_proj", "down_proj")):
            shape = moe.share_expert[name].weight.shape
            moe.share_expert[name].weight = normal(*shape, seed=20 + seed, spread=0.3)
        x = normal(1, 7, config.hidden_size)
        experts, weights = moe.gate(x)
        routed = (moe.switch_mlp(x, experts) * weights[..., None]).sum(-2)
        np.testing.assert_allclose(np.array(moe(x) - routed), np.array(moe.share_expert(x)), atol=1e-4)
        assert moe.share_expert.limit == layer.swiglu_limit_shared == 0.5
        assert moe.switch_mlp.limit == layer.swiglu_limit == 0.3
