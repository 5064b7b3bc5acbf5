"""Speed estimates against what others published, and the byte model they rest on."""

import json
from pathlib import Path

import pytest

from mlx_step35 import costs, speed
from mlx_step35.config import ModelConfig
from mlx_step35.layout import Recipe
from mlx_step35.quantization import Quantization
from mlx_step35.recipes import uniform_recipe, with_mtp


@pytest.fixture(scope="module")
def config() -> ModelConfig:
    raw = json.loads((Path(__file__).parent / "data" / "step35_config.json").read_text())
    return ModelConfig.from_hf(raw)


@pytest.fixture(scope="module")
def recipe(config: ModelConfig) -> Recipe:
    return with_mtp(config, uniform_recipe(config, Quantization(4, 64)), 4)


@pytest.mark.parametrize("published", speed.PUBLISHED, ids=lambda p: p.machine)
def test_decode_within_15_percent_up_to_64k(
    published: speed.Published, config: ModelConfig, recipe: Recipe
) -> None:
    """Calibrated on the empty context only; in fact the largest error is 6.1%."""
    found = speed.predictions(published, config, recipe)
    assert found[0][1] == pytest.approx(found[0][2])
    for context, tokens_per_s, predicted in found:
        if 0 < context <= 65536:
            assert predicted == pytest.approx(tokens_per_s, rel=0.065)


def test_the_point_that_is_not_predicted_stays_known(config: ModelConfig, recipe: Recipe) -> None:
    """At 256K the M4 Max published 8.9 where bytes alone say 16: there weights, KV and buffers exceed the
    wired limit of that run."""
    context, tokens_per_s, predicted = speed.predictions(speed.M4_MAX, config, recipe)[-1]
    assert (context, tokens_per_s) == (262144, 8.9)
    assert predicted == pytest.approx(16.1, abs=0.1)


def test_efficiency_of_one_chip_predicts_another(config: ModelConfig, recipe: Recipe) -> None:
    """An M3 Ultra with 9-bit weights (206 GiB, groups of 32 at 8 bits) was published at 36.1 at 1K."""
    nine_bits = uniform_recipe(config, Quantization(8, 32))
    assert costs.weight_bytes(config, nine_bits) / 2**30 == pytest.approx(206, abs=0.5)
    share = speed.efficiency(speed.M4_MAX, config, recipe)
    assert share == pytest.approx(0.571, abs=0.001)
    bandwidth = speed.CHIPS["M3 Ultra"].bandwidth * share
    [estimate] = speed.decode_estimates(speed.Reads.of_recipe(config, nine_bits), bandwidth, [1024], 0)
    assert estimate.by_depth[0] == pytest.approx(36.1, rel=0.02)


def test_prefill_within_5_percent_at_every_length(config: ModelConfig) -> None:
    """Calibrated on the shortest prompt."""
    rate = speed.prefill_rate(speed.CHIPS["M4 Max"], config)
    assert rate is not None
    for num_tokens, tokens_per_s in speed.M4_MAX.prefill:
        assert speed.prefill_speed(config, rate, num_tokens) == pytest.approx(tokens_per_s, rel=0.05)
    assert speed.prefill_rate(speed.CHIPS["M1 Ultra"], config) is None


def test_prefill_arithmetic_by_brute_force(config: ModelConfig) -> None:
    weights = speed.prefill_flops(config, 1) - sum(4 * x.num_heads * x.head_dim for x in config.layers)
    # 11.46 billion active parameters, less the head, which runs once.
    assert weights / 2e9 == pytest.approx(11.46 - 0.528, abs=0.01)
    for num_tokens in (3, 700):
        pairs = {
            window: sum(min(i + 1, window or num_tokens) for i in range(num_tokens)) for window in (None, 512)
        }
        attention = sum(4 * x.num_heads * x.head_dim * pairs[x.window] for x in config.layers)
        assert speed.prefill_flops(config, num_tokens) == pytest.approx(weights * num_tokens + attention)


def test_rounds_read_what_costs_count(config: ModelConfig, recipe: Recipe) -> None:
    reads = speed.Reads.of_recipe(config, recipe)
    for num_drafts in range(4):
        for context in (0, 100, 512, 10_000):
            expected = costs.step_read_bytes(config, recipe, num_drafts + 1, context)
            assert reads.round_bytes(num_drafts, context, by_mtp=False) == pytest.approx(expected)
            expected += costs.mtp_read_bytes(config, recipe, num_drafts)
            assert reads.round_bytes(num_drafts, context) == pytest.approx(expected)
    ratios = [reads.round_bytes(n, 0, by_mtp=False) / reads.round_bytes(0, 0) for n in (1, 2, 3)]
    assert ratios == pytest.approx([1.45, 1.88, 2.31], abs=0.01)


def test_drafts_pay_at_long_contexts(config: ModelConfig, recipe: Recipe) -> None:
    """KV is read once per round, so its share of a token falls with every accepted draft."""
    reads = speed.Reads.of_recipe(config, recipe)
    short, long = speed.decode_estimates(reads, 300e9, [0, 131072], 3)
    assert long.by_depth[2] / long.by_depth[0] > short.by_depth[2] / short.by_depth[0] > 1.1
