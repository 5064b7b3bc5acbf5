"""Bytes of weights, caches and reads: pure functions of the config and a recipe.

The converter's dry run, its model card, the planner and the depth controller call these same functions.
Nothing here is measured; sizes are exact because they are summed from `layout`'s list of tensors.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from mlx_step35.config import ModelConfig
from mlx_step35.layout import Kind, Recipe, Weight, backbone_weights, mtp_weights, stored_tensors

GIB = 1 << 30

# macOS lets the GPU use this share of the memory unless `iogpu.wired_limit_mb` says otherwise.
DEFAULT_LIMIT_SHARE = 0.75


@dataclass(frozen=True, slots=True)
class Size:
    """Parameters and the bytes that store them."""

    parameters: int = 0
    nbytes: int = 0

    def __add__(self, other: "Size") -> "Size":
        return Size(self.parameters + other.parameters, self.nbytes + other.nbytes)

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.nbytes / self.parameters if self.parameters else 0.0


def stored_bytes(weight: Weight, recipe: Recipe) -> int:
    """Bytes of one weight with its scales and biases."""
    return sum(t.nbytes for t in stored_tensors(weight, recipe.choice(weight.path), recipe.dtype))


def sizes_by_kind(weights: Iterable[Weight], recipe: Recipe) -> dict[Kind, Size]:
    """Sizes summed per kind, in order of first appearance."""
    sizes: dict[Kind, Size] = {}
    for weight in weights:
        one = Size(weight.num_parameters, stored_bytes(weight, recipe))
        sizes[weight.kind] = sizes.get(weight.kind, Size()) + one
    return sizes


def weight_bytes(config: ModelConfig, recipe: Recipe) -> int:
    """Bytes of the backbone's tensors, as the headers of its shards list them."""
    return total(sizes_by_kind(backbone_weights(config), recipe)).nbytes


def mtp_bytes(config: ModelConfig, recipe: Recipe) -> int:
    """Bytes of the tensors of all MTP layers."""
    return total(sizes_by_kind(mtp_weights(config), recipe)).nbytes


def total(sizes: Mapping[Kind, Size]) -> Size:
    return sum(sizes.values(), start=Size())


def kv_bytes_per_token(config: ModelConfig, dtype_bytes: int = 2) -> int:
    """What one more token costs in the full-attention layers; sliding layers stop growing at their window."""
    return (
        sum(2 * layer.num_kv_heads * layer.head_dim for layer in config.layers if layer.window is None)
        * dtype_bytes
    )


def kv_bytes(config: ModelConfig, context: int, dtype_bytes: int = 2, slack: int = 0) -> int:
    """Keys and values of the backbone at a context length; full sliding layers hold `window + slack` rows."""
    full = kv_bytes_per_token(config, dtype_bytes) * context
    return full + _sliding_bytes(config, context, dtype_bytes, slack)


def mtp_kv_bytes(config: ModelConfig, context: int, dtype_bytes: int = 2, slack: int = 0) -> int:
    """Keys and values of the MTP layers, each with its own window."""
    return sum(
        2 * layer.num_kv_heads * layer.head_dim * _rows(context, layer.window, slack)
        for layer in config.mtp_layers
    ) * (dtype_bytes)


def expected_experts(config: ModelConfig, num_tokens: int) -> float:
    """Experts of a layer that some tokens touch if each chooses independently: a pessimistic bound."""
    return config.num_experts * (1 - (1 - config.top_k / config.num_experts) ** num_tokens)


def step_read_bytes(
    config: ModelConfig, recipe: Recipe, num_tokens: int = 1, context: int = 0, kv_dtype_bytes: int = 2
) -> float:
    """Bytes one forward pass over `num_tokens` tokens reads: weights once, experts by union, KV once.

    The embedding is not counted: a pass reads one row of it per token.
    """
    share = expected_experts(config, num_tokens) / config.num_experts
    sizes = sizes_by_kind(backbone_weights(config), recipe)
    weights = sum(
        size.nbytes * (share if kind == "experts" else 1)
        for kind, size in sizes.items()
        if kind != "embedding"
    )
    return weights + kv_bytes(config, context, kv_dtype_bytes)


def mtp_read_bytes(config: ModelConfig, recipe: Recipe, depth: int) -> int:
    """Bytes that drafting `depth` tokens reads: each draft runs one more MTP layer with its own head."""
    weights = [weight for weight in mtp_weights(config) if weight.layer is not None and weight.layer < depth]
    return total(sizes_by_kind(weights, recipe)).nbytes


def readable_bytes(size: int) -> str:
    """A size in the decimal unit that leaves one to three digits before the point: "110.81 GB", "22.5 MB"."""
    if size < 1000:
        return f"{size} B"
    for unit, scale in (("kB", 1e3), ("MB", 1e6)):
        # 999.96 MB would be printed as 1000.0 MB.
        if round(size / scale, 1) < 1000:
            return f"{size / scale:.1f} {unit}"
    return f"{size / 1e9:.2f} GB"


def memory_limit(memory_gib: int) -> int:
    """Bytes the GPU of a Mac with that much memory may use by default; a "128 GB" Mac has 128 GiB."""
    return int(memory_gib * GIB * DEFAULT_LIMIT_SHARE)


def required_bytes(config: ModelConfig, recipe: Recipe, context: int, *, mtp: bool = True) -> int:
    """Weights, heads and caches together, without the workspace of a prefill."""
    backbone = weight_bytes(config, recipe) + kv_bytes(config, context)
    return backbone + (mtp_bytes(config, recipe) + mtp_kv_bytes(config, context) if mtp else 0)


def _sliding_bytes(config: ModelConfig, context: int, dtype_bytes: int, slack: int) -> int:
    rows = sum(
        2 * layer.num_kv_heads * layer.head_dim * _rows(context, layer.window, slack)
        for layer in config.layers
        if layer.window is not None
    )
    return rows * dtype_bytes


def _rows(context: int, window: int | None, slack: int) -> int:
    return context if window is None else min(context, window + slack)
