"""Bytes against the sizes of published repositories and against figures derived from the shapes."""

import json
from pathlib import Path

import pytest

from mlx_step35 import costs, memory
from mlx_step35.config import ModelConfig
from mlx_step35.layout import Recipe, Weight, backbone_weights, mtp_weights, stored_tensors
from mlx_step35.quantization import Quantization
from mlx_step35.recipes import Override, uniform_recipe, with_mtp, with_overrides

GIB = 1 << 30


@pytest.fixture(scope="module")
def config() -> ModelConfig:
    raw = json.loads((Path(__file__).parent / "data" / "step35_config.json").read_text())
    return ModelConfig.from_hf(raw)


def uniform(config: ModelConfig, bits: int) -> Recipe:
    return with_mtp(config, uniform_recipe(config, Quantization(bits, 64)), 4)


def test_parameter_counts(config: ModelConfig) -> None:
    heads = sum(weight.num_parameters for weight in mtp_weights(config))
    assert sum(weight.num_parameters for weight in backbone_weights(config)) == 196_956_130_368
    assert heads == 3 * 809_390_336


def test_original_release_is_399_gb(config: ModelConfig) -> None:
    recipe = uniform_recipe(config, None)
    released = costs.weight_bytes(config, recipe) + costs.mtp_bytes(config, recipe)
    assert released / 1e9 == pytest.approx(398.77, abs=0.005)


@pytest.mark.parametrize(("bits", "gigabytes"), [(4, 110.81), (6, 160.0), (8, 209.3)])
def test_uniform_sizes_equal_the_public_uploads(config: ModelConfig, bits: int, gigabytes: float) -> None:
    assert costs.weight_bytes(config, uniform(config, bits)) / 1e9 == pytest.approx(gigabytes, abs=0.05)


def test_four_bit_size_to_the_last_digit_given(config: ModelConfig) -> None:
    assert costs.weight_bytes(config, uniform(config, 4)) / 1e9 == pytest.approx(110.81, abs=0.005)


def test_bytes_read_per_token(config: ModelConfig) -> None:
    # The derivation counts the router at 4 bits like all else; uploads keep it at 8, 25 MB a token more.
    recipe = with_overrides(
        backbone_weights(config), uniform(config, 4), [Override.parse(r"mlp\.gate\.gate$=4")]
    )
    reads = [costs.step_read_bytes(config, recipe, tokens) / 1e9 for tokens in (1, 2, 3, 4)]
    assert reads == pytest.approx([6.45, 9.34, 12.15, 14.88], abs=0.005)
    assert [read / reads[0] for read in reads[1:]] == pytest.approx([1.45, 1.88, 2.31], abs=0.005)
    uploaded = costs.step_read_bytes(config, uniform(config, 4)) / 1e9
    assert uploaded - reads[0] == pytest.approx(0.025, abs=0.001)


def test_each_mtp_layer_reads_under_half_a_gigabyte(config: ModelConfig) -> None:
    recipe = uniform(config, 4)
    layer = costs.mtp_read_bytes(config, recipe, 1)
    assert layer / 1e9 == pytest.approx(0.455, abs=0.0005)
    assert [costs.mtp_read_bytes(config, recipe, depth) for depth in (0, 2, 3)] == [0, 2 * layer, 3 * layer]
    head = next(weight for weight in mtp_weights(config) if weight.kind == "head")
    assert costs.stored_bytes(head, recipe) / 1e9 == pytest.approx(0.297, abs=0.0005)


@pytest.mark.parametrize(
    ("context", "gibibytes"),
    [(8192, 0.375), (16384, 0.75), (32768, 1.5), (65536, 3.0), (131072, 6.0), (262144, 12.0)],
)
def test_kv_table(config: ModelConfig, context: int, gibibytes: float) -> None:
    assert costs.kv_bytes_per_token(config) == 48 * 1024
    sliding = 66 << 20
    assert costs.kv_bytes(config, context) == int(gibibytes * GIB) + sliding
    assert costs.mtp_kv_bytes(config, context) == 6 << 20


def test_short_contexts_do_not_fill_the_window(config: ModelConfig) -> None:
    assert costs.kv_bytes(config, 10) == 10 * 45 * 2 * 8 * 128 * 2
    assert costs.kv_bytes(config, 1000, slack=16) - costs.kv_bytes(config, 1000) == 33 * 16 * 4096


def test_a_snapshot_holds_what_a_rollback_and_the_drafts_need(config: ModelConfig) -> None:
    sliding = 33 * (511 + 16) * 4096
    assert memory.snapshot_bytes(config, 65536, mtp=False) == sliding
    assert memory.snapshot_bytes(config, 65536) == sliding + (3 * 511 + 1 + 16) * 4096 * 2
    assert memory.snapshot_bytes(config, 65537, mtp=False) == sliding + 48 * 1024
    assert memory.snapshot_bytes(config, 0) == 0


def test_kinds_add_up(config: ModelConfig) -> None:
    recipe = uniform(config, 4)
    sizes = costs.sizes_by_kind(backbone_weights(config), recipe)
    assert costs.total(sizes).nbytes == costs.weight_bytes(config, recipe)
    assert set(sizes) == {
        "embedding", "head", "attention", "gate", "dense", "shared", "experts", "router", "norm", "bias",
    }  # fmt: skip
    assert sizes["experts"].bits_per_weight == 4.5
    assert sizes["router"].bits_per_weight == 8.5
    assert sizes["bias"].bits_per_weight == 32


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        (0, "0 B"), (999, "999 B"), (1000, "1.0 kB"), (999_949, "999.9 kB"), (999_950, "1.0 MB"),
        (22_540_000, "22.5 MB"), (999_960_000, "1.00 GB"), (110_812_345_678, "110.81 GB"),
    ],
)  # fmt: skip
def test_sizes_are_readable(size: int, expected: str) -> None:
    assert costs.readable_bytes(size) == expected


def test_memory_limits() -> None:
    assert costs.memory_limit(128) == 96 * GIB
    assert costs.memory_limit(96) == 72 * GIB


def test_four_bits_do_not_fit_128_gb(config: ModelConfig) -> None:
    assert costs.required_bytes(config, uniform(config, 4), 65536) > costs.memory_limit(128)


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
@pytest.mark.parametrize("group_size", [32, 64, 128])
def test_stored_tensors_have_the_shapes_mlx_makes(bits: int, group_size: int) -> None:
    import mlx.core as mx

    weight = Weight("experts", (3, 5, 256), "experts")
    made = mx.quantize(mx.zeros(weight.shape, mx.bfloat16), group_size=group_size, bits=bits)
    expected = stored_tensors(weight, Quantization(bits, group_size), "BF16")
    assert [tensor.shape for tensor in expected] == [array.shape for array in made]
    assert [tensor.nbytes for tensor in expected] == [array.nbytes for array in made]


@pytest.mark.parametrize(
    ("mode", "bits", "group_size"), [("mxfp4", 4, 32), ("mxfp8", 8, 32), ("nvfp4", 4, 16)]
)
def test_stored_tensors_of_floating_modes(mode: str, bits: int, group_size: int) -> None:
    import mlx.core as mx

    weight = Weight("experts", (3, 5, 256), "experts")
    made = mx.quantize(mx.zeros(weight.shape, mx.bfloat16), group_size=group_size, bits=bits, mode=mode)
    expected = stored_tensors(weight, Quantization(bits, group_size, mode), "BF16")  # type: ignore[arg-type]
    assert [tensor.shape for tensor in expected] == [array.shape for array in made]
    assert [tensor.nbytes for tensor in expected] == [array.nbytes for array in made]
