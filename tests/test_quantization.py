"""Recipes: what each machine gets, what is refused."""

import json
from pathlib import Path

import pytest

from mlx_step35 import costs
from mlx_step35.config import ModelConfig
from mlx_step35.errors import CapacityError, RequestError
from mlx_step35.layout import backbone_weights, mtp_weights
from mlx_step35.quantization import Quantization
from mlx_step35.recipes import (
    RECIPES,
    Override,
    RecipeName,
    check_recipe,
    fit_recipe,
    machine_recipe,
    quantization,
    summary,
    uniform_recipe,
    with_mtp,
    with_overrides,
)


@pytest.fixture(scope="module")
def config() -> ModelConfig:
    raw = json.loads((Path(__file__).parent / "data" / "step35_config.json").read_text())
    return ModelConfig.from_hf(raw)


@pytest.mark.parametrize("name", RECIPES)
def test_machine_recipes_fit_their_machine_with_a_64k_context(config: ModelConfig, name: RecipeName) -> None:
    recipe = with_mtp(config, machine_recipe(config, name), 4)
    required = costs.required_bytes(config, recipe, 65536)
    limit = costs.memory_limit(int(name.removeprefix("mac-")))
    assert required <= limit - 2_000_000_000
    if name in ("mac-96", "mac-128", "mac-192"):
        assert required > 0.96 * limit, "a recipe should use the memory it is named after"


@pytest.mark.parametrize("name", RECIPES)
def test_machine_recipes_spend_bits_where_they_matter(config: ModelConfig, name: RecipeName) -> None:
    recipe = machine_recipe(config, name)
    sizes = costs.sizes_by_kind(backbone_weights(config), recipe)
    experts = sizes["experts"].bits_per_weight
    assert 2.5 <= experts <= (8.5 if name == "mac-512" else 6.5)
    for kind in ("attention", "shared", "dense", "embedding", "head"):
        assert sizes[kind].bits_per_weight >= experts
        assert sizes[kind].bits_per_weight >= 6
    assert sizes["router"].bits_per_weight == 16
    assert sizes["gate"].bits_per_weight >= 8
    assert sizes["norm"].bits_per_weight == 16
    assert sizes["bias"].bits_per_weight == 32


def test_recipes_grow_with_the_machine(config: ModelConfig) -> None:
    sizes = [costs.weight_bytes(config, machine_recipe(config, name)) for name in RECIPES]
    assert sizes == sorted(sizes)


@pytest.mark.parametrize("gigabytes", [70, 80, 92, 111, 130, 160, 400])
def test_fit_fills_its_budget_and_never_exceeds_it(config: ModelConfig, gigabytes: int) -> None:
    recipe = fit_recipe(config, gigabytes * 10**9)
    size = costs.weight_bytes(config, recipe)
    assert size <= gigabytes * 10**9
    one_step = 190_000_000  # one expert stack, one bit more
    assert size > gigabytes * 10**9 - one_step or gigabytes >= 170


def test_fit_levels_experts_before_it_raises_any(config: ModelConfig) -> None:
    recipe = fit_recipe(config, 92 * 10**9)
    bits = {recipe.choices[w.path].bits for w in backbone_weights(config) if w.kind == "experts"}
    assert bits == {3, 4}


def test_outer_layers_get_a_bit_more_first(config: ModelConfig) -> None:
    recipe = fit_recipe(config, 92 * 10**9)
    experts = [weight for weight in backbone_weights(config) if weight.kind == "experts"]
    bits = [recipe.choices[experts[index].path].bits for index in (0, len(experts) // 2, -1)]
    assert bits == [4, 3, 4]
    reverse = fit_recipe(config, 92 * 10**9, order=lambda weight: (-(weight.layer or 0),))
    assert reverse.choices[experts[0].path].bits == 3


def test_too_small_a_budget_is_refused_with_numbers(config: ModelConfig) -> None:
    with pytest.raises(CapacityError, match=r"smallest recipe takes 6\d\.\d\d GB, the budget is 50\.00 GB"):
        fit_recipe(config, 50 * 10**9)


def test_uniform_keeps_the_router_at_8_bits_and_the_heads_apart(config: ModelConfig) -> None:
    recipe = uniform_recipe(config, Quantization(3, 128))
    assert recipe.choice("model.layers.3.mlp.gate.gate") == Quantization(8, 64)
    assert recipe.choice("model.layers.3.self_attn.q_proj") == Quantization(3, 128)
    assert recipe.choice("model.layers.3.input_layernorm") is None
    assert recipe.choice("mtp.layers.0.eh_proj") is None
    assert with_mtp(config, recipe, 8).choice("mtp.layers.0.eh_proj") == Quantization(8, 64)
    assert with_mtp(config, recipe, 16).choice("mtp.layers.0.eh_proj") is None


def test_overrides_apply_in_order(config: ModelConfig) -> None:
    recipe = with_overrides(
        [*backbone_weights(config), *mtp_weights(config)],
        uniform_recipe(config, Quantization(4, 64)),
        [
            Override.parse(text)
            for text in (r"layers\.3\..*q_proj=8", r"layers\.3\.=6:128", "lm_head=16", "eh_proj=8")
        ],
    )
    assert recipe.choice("model.layers.3.self_attn.q_proj") == Quantization(6, 128)
    assert recipe.choice("model.layers.4.self_attn.q_proj") == Quantization(4, 64)
    assert recipe.choice("lm_head") is None
    assert recipe.choice("mtp.layers.2.eh_proj") == Quantization(8, 64)


@pytest.mark.parametrize(
    "text",
    [
        "q_proj",
        "=4",
        "q_proj=",
        "q_proj=four",
        "q_proj=4:",
        "(=4",
        "q_proj=7",
        "q_proj=4:16",
        "q_proj=4:0",
        "q_proj=16:7",
    ],
)
def test_malformed_overrides_are_refused(text: str) -> None:
    with pytest.raises(RequestError):
        Override.parse(text)


def test_an_override_that_matches_nothing_is_refused(config: ModelConfig) -> None:
    with pytest.raises(RequestError, match="matches no quantisable module"):
        with_overrides(
            backbone_weights(config), uniform_recipe(config, None), [Override.parse("input_layernorm=4")]
        )


def test_group_sizes_that_do_not_divide_are_refused_by_name(config: ModelConfig) -> None:
    raw = {**config.raw, "moe_intermediate_size": 96}
    odd = ModelConfig.from_hf(raw)
    with pytest.raises(RequestError, match=r"model\.layers\.3\.mlp\.switch_mlp\.down_proj .*96.*64"):
        check_recipe(backbone_weights(odd), uniform_recipe(odd, Quantization(4, 64)))
    check_recipe(backbone_weights(odd), uniform_recipe(odd, Quantization(4, 32)))


@pytest.mark.parametrize(
    ("bits", "group", "mode"),
    [(7, None, "affine"), (4, 16, "affine"), (8, None, "mxfp4"), (None, 64, "nvfp4")],
)
def test_packings_mlx_does_not_have_are_refused(bits: int | None, group: int | None, mode: str) -> None:
    with pytest.raises(RequestError):
        quantization(bits, group, mode)  # type: ignore[arg-type]


def test_defaults_of_modes() -> None:
    assert quantization(None, None, "affine") == Quantization(4, 64, "affine")
    assert quantization(None, None, "mxfp8") == Quantization(8, 32, "mxfp8")
    assert quantization(None, None, "nvfp4") == Quantization(4, 16, "nvfp4")


def test_summary_says_what_was_chosen(config: ModelConfig) -> None:
    recipe = with_mtp(config, machine_recipe(config, "mac-96"), 4)
    chosen = summary(backbone_weights(config), recipe)
    assert chosen["experts"].count("bits") == 2
    assert chosen["router"] == "bfloat16"
    assert chosen["bias"] == "float32"
    assert summary(mtp_weights(config), recipe)["head"] == "4 bits / 64"
