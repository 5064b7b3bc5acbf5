"""Recipes: which module gets how many bits.

Uniform bits as mlx-lm chooses them, or a budget: routed experts take what memory is left after everything
that runs for every token has been given 6 or 8 bits. Pure; a recipe is a finished table of path to packing.
"""

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

from mlx_step35.config import ModelConfig
from mlx_step35.costs import (
    kv_bytes,
    memory_limit,
    mtp_bytes,
    mtp_kv_bytes,
    readable_bytes,
    stored_bytes,
)
from mlx_step35.errors import CapacityError, RequestError
from mlx_step35.layout import (
    Kind,
    Recipe,
    Weight,
    backbone_weights,
    mtp_weights,
    stored_tensors,
)
from mlx_step35.quantization import AFFINE_BITS, AFFINE_GROUPS, DEFAULTS, Mode, Quantization

# Sorts weights by how much they gain from one more bit, most first.
Order = Callable[[Weight], tuple[int, ...]]

RecipeName = Literal["mac-96", "mac-128", "mac-192", "mac-256", "mac-512"]
RECIPES: tuple[RecipeName, ...] = get_args(RecipeName)

# What a recipe named after a machine must leave room for: this context, and the buffers of a prefill chunk.
RECIPE_CONTEXT = 65536
RECIPE_WORKSPACE = 2_000_000_000

ROUTER = Quantization(8, 64)

# Rungs of the routed experts. Beyond 6 bits a machine has better uses for its bandwidth.
EXPERT_RUNGS = tuple(Quantization(bits, 64) for bits in (2, 3, 4, 5, 6))
# From this budget on, 8 bits for all that runs for every token are affordable beside 5 for the experts.
ROOMY_BYTES = 120_000_000_000


def quantization(bits: int | None, group_size: int | None, mode: Mode) -> Quantization:
    """A packing MLX has, with the mode's defaults for what is None. Raises RequestError for any other."""
    default = DEFAULTS[mode]
    choice = Quantization(
        default.bits if bits is None else bits, default.group_size if group_size is None else group_size, mode
    )
    if mode != "affine":
        if choice != default:
            raise RequestError(
                f"{mode} has {default.bits} bits and groups of {default.group_size}, nothing else",
                field="q_mode",
            )
        return choice
    if choice.bits not in AFFINE_BITS:
        raise RequestError(f"{choice.bits} bits: choose one of {_listed(AFFINE_BITS)}", field="q_bits")
    if choice.group_size not in AFFINE_GROUPS:
        raise RequestError(
            f"groups of {choice.group_size}: choose one of {_listed(AFFINE_GROUPS)}", field="q_group_size"
        )
    return choice


def uniform_recipe(config: ModelConfig, choice: Quantization | None, dtype: str = "BF16") -> Recipe:
    """mlx-lm's choice: every matrix alike, except the router at 8 bits. None leaves all unquantised."""
    if choice is None:
        return Recipe("unquantised", {}, dtype)
    choices = {
        weight.path: ROUTER if weight.kind == "router" else choice
        for weight in backbone_weights(config)
        if weight.is_quantizable
    }
    return Recipe(_described(choice), choices, dtype)


def with_mtp(config: ModelConfig, recipe: Recipe, bits: int) -> Recipe:
    """The recipe with the matrices of the MTP layers at `bits`; 16 keeps them unquantised."""
    if bits == 16:
        return recipe
    choice = quantization(bits, None, "affine")
    choices = {weight.path: choice for weight in mtp_weights(config) if weight.is_quantizable}
    return replace(recipe, choices={**recipe.choices, **choices})


def machine_recipe(
    config: ModelConfig, name: RecipeName, mtp_bits: int | None = 4, dtype: str = "BF16"
) -> Recipe:
    """The best recipe whose weights, heads and a 64K context fit the default GPU limit of the machine."""
    if name == "mac-512":
        return Recipe(name, _base_choices(backbone_weights(config), experts=8, rest=8), dtype)
    limit = memory_limit(int(name.removeprefix("mac-")))
    caches = kv_bytes(config, RECIPE_CONTEXT)
    heads = 0
    if mtp_bits is not None:
        caches += mtp_kv_bytes(config, RECIPE_CONTEXT)
        heads = mtp_bytes(config, with_mtp(config, Recipe("", {}, dtype), mtp_bits))
    return replace(fit_recipe(config, limit - caches - RECIPE_WORKSPACE - heads, dtype), name=name)


def outer_layers(config: ModelConfig) -> Order:
    """From both ends inwards: all later layers see an early one's error, and none repairs a late one's.

    Figures in docs/conversion.md.
    """

    def order(weight: Weight) -> tuple[int, ...]:
        layer = weight.layer or 0
        return (min(layer, config.num_layers - 1 - layer), layer, not weight.path.endswith("down_proj"))

    return order


def fit_recipe(config: ModelConfig, budget: int, dtype: str = "BF16", order: Order | None = None) -> Recipe:
    """The best recipe whose backbone takes at most `budget` bytes. Raises CapacityError for too small ones.

    Every group of experts reaches a rung before any goes beyond it, because each bit less doubles the error;
    within a rung `order` decides, `outer_layers` by default.
    """
    weights = backbone_weights(config)
    choices = _base_choices(weights, experts=EXPERT_RUNGS[0].bits, rest=8 if budget >= ROOMY_BYTES else 6)
    recipe = Recipe(readable_bytes(max(budget, 0)), choices, dtype)
    left = budget - sum(stored_bytes(weight, recipe) for weight in weights)
    if left < 0:
        raise CapacityError(
            f"the smallest recipe takes {readable_bytes(budget - left)}, "
            f"the budget is {readable_bytes(max(budget, 0))}"
        )
    for weight, rung in _upgrades(weights, order or outer_layers(config)):
        cost = _nbytes(weight, rung, dtype) - _nbytes(weight, choices[weight.path], dtype)
        if cost <= left:
            choices[weight.path] = rung
            left -= cost
    return replace(recipe, choices=choices)


@dataclass(frozen=True, slots=True)
class Override:
    """One `REGEX=BITS[:GROUP]`: modules whose path the pattern finds; 16 bits means unquantised."""

    text: str
    pattern: re.Pattern[str]
    choice: Quantization | None

    @classmethod
    def parse(cls, text: str) -> "Override":
        pattern, found, packing = text.rpartition("=")
        bits, _, group = packing.partition(":")
        if not (found and pattern and bits.isdecimal() and (group.isdecimal() or ":" not in packing)):
            raise RequestError(f"'{text}' is not REGEX=BITS[:GROUP]", field="q_overrides")
        try:
            compiled = re.compile(pattern)
        except re.error as error:
            raise RequestError(
                f"'{pattern}' is not a regular expression: {error}", field="q_overrides"
            ) from None
        if bits != "16":
            return cls(text, compiled, quantization(int(bits), int(group) if group else None, "affine"))
        if group:
            raise RequestError(f"'{text}': 16 bits are unquantised and have no groups", field="q_overrides")
        return cls(text, compiled, None)


def with_overrides(weights: Iterable[Weight], recipe: Recipe, overrides: Sequence[Override]) -> Recipe:
    """The recipe with some paths chosen by hand; later ones win, and one that finds nothing is refused."""
    choices = dict(recipe.choices)
    paths = [weight.path for weight in weights if weight.is_quantizable]
    for override in overrides:
        found = [path for path in paths if override.pattern.search(path)]
        if not found:
            raise RequestError(
                f"override '{override.text}' matches no quantisable module", field="q_overrides"
            )
        for path in found:
            if override.choice is None:
                choices.pop(path, None)
            else:
                choices[path] = override.choice
    return replace(recipe, choices=choices, name=f"{recipe.name} + overrides" if overrides else recipe.name)


def check_recipe(weights: Iterable[Weight], recipe: Recipe) -> None:
    """Raise RequestError for the first weight that the recipe cannot pack."""
    for weight in weights:
        stored_tensors(weight, recipe.choice(weight.path), recipe.dtype)


def summary(weights: Iterable[Weight], recipe: Recipe) -> dict[Kind, str]:
    """What a recipe chose per kind, for people: '6 bits' or '4 bits x 23, 5 bits x 103'."""
    counts: dict[Kind, dict[str, int]] = {}
    for weight in weights:
        choice = recipe.choice(weight.path) if weight.is_quantizable else None
        label = (
            _described(choice) if choice else ("float32" if weight.kind == "bias" else _DTYPES[recipe.dtype])
        )
        kind = counts.setdefault(weight.kind, {})
        kind[label] = kind.get(label, 0) + 1
    return {
        kind: next(iter(labels))
        if len(labels) == 1
        else ", ".join(f"{n} x {label}" for label, n in sorted(labels.items()))
        for kind, labels in counts.items()
    }


_DTYPES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}


def _base_choices(weights: Iterable[Weight], experts: int, rest: int) -> dict[str, Quantization]:
    """Bits for the experts and for all else; attention gates have 8, and the router stays as it is."""
    choices: dict[str, Quantization] = {}
    for weight in weights:
        if weight.kind == "experts":
            choices[weight.path] = Quantization(experts, 64)
        elif weight.kind == "gate":
            choices[weight.path] = Quantization(8, 64)
        elif weight.is_quantizable and weight.kind != "router":
            choices[weight.path] = Quantization(rest, 64)
    return choices


def _upgrades(weights: Iterable[Weight], order: Order) -> list[tuple[Weight, Quantization]]:
    experts = sorted((weight for weight in weights if weight.kind == "experts"), key=order)
    return [(weight, rung) for rung in EXPERT_RUNGS[1:] for weight in experts]


def _nbytes(weight: Weight, choice: Quantization, dtype: str) -> int:
    return sum(tensor.nbytes for tensor in stored_tensors(weight, choice, dtype))


def _described(choice: Quantization) -> str:
    suffix = "" if choice.mode == "affine" else f" {choice.mode}"
    return f"{choice.bits} bits / {choice.group_size}{suffix}"


def _listed(values: Iterable[int]) -> str:
    return ", ".join(str(value) for value in values)
