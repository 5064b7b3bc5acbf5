"""Every parameter of the model and every tensor that stores it: names, shapes, kinds, bytes, from the config.

This is the one list of tensors: the converter's plan, the byte counts of `costs` and the recipes all read it.
Names are those of the converted checkpoint (mlx-lm's for the backbone, `mtp.layers.K.` for the heads).
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from typing import Literal

from mlx_step35.config import LayerConfig, ModelConfig
from mlx_step35.errors import RequestError
from mlx_step35.quantization import Quantization

Kind = Literal[
    "embedding", "head", "attention", "gate", "dense", "shared", "experts", "router", "norm", "bias"
]

# Vectors (norms, the router's bias) are never quantised, whatever a recipe says.
VECTOR_KINDS: frozenset[Kind] = frozenset({"norm", "bias"})

DTYPE_BYTES = {"F32": 4, "BF16": 2, "F16": 2, "U32": 4, "U8": 1, "F8_E4M3": 1}


@dataclass(frozen=True, slots=True)
class Recipe:
    """The packing of every quantised module by its path; whatever is not listed stays in `dtype`."""

    name: str
    choices: Mapping[str, Quantization]
    dtype: str = "BF16"

    def choice(self, path: str) -> Quantization | None:
        return self.choices.get(path)


@dataclass(frozen=True, slots=True)
class Tensor:
    """One entry of a safetensors file; `dtype` is spelt as the file spells it."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * DTYPE_BYTES[self.dtype]


@dataclass(frozen=True, slots=True)
class Weight:
    """One parameter of the model before any quantisation; `path` is its module, `leaf` its name in there."""

    path: str
    shape: tuple[int, ...]
    kind: Kind
    layer: int | None = None
    is_mtp: bool = False
    leaf: str = "weight"

    @property
    def name(self) -> str:
        return f"{self.path}.{self.leaf}"

    @property
    def num_parameters(self) -> int:
        return prod(self.shape)

    @property
    def is_quantizable(self) -> bool:
        return self.kind not in VECTOR_KINDS


def backbone_weights(config: ModelConfig) -> list[Weight]:
    """Parameters of the backbone in forward order."""
    vocabulary = (config.vocab_size, config.hidden_size)
    weights = [Weight("model.embed_tokens", vocabulary, "embedding")]
    for layer in config.layers:
        weights += _layer_weights(config, layer, f"model.layers.{layer.index}", is_mtp=False)
    weights.append(Weight("model.norm", (config.hidden_size,), "norm"))
    if not config.tie_word_embeddings:
        weights.append(Weight("lm_head", vocabulary, "head"))
    return weights


def mtp_weights(config: ModelConfig) -> list[Weight]:
    """Parameters of the multi-token-prediction layers in forward order."""
    width = config.hidden_size
    weights: list[Weight] = []
    for k, layer in enumerate(config.mtp_layers):
        prefix = f"mtp.layers.{k}"
        weights += [
            Weight(f"{prefix}.enorm", (width,), "norm", k, True),
            Weight(f"{prefix}.hnorm", (width,), "norm", k, True),
            Weight(f"{prefix}.eh_proj", (width, 2 * width), "dense", k, True),
            *_layer_weights(config, layer, prefix, is_mtp=True, number=k),
            Weight(f"{prefix}.shared_head.norm", (width,), "norm", k, True),
            Weight(f"{prefix}.shared_head.output", (config.vocab_size, width), "head", k, True),
        ]
    return weights


def stored_tensors(weight: Weight, quantization: Quantization | None, dtype: str) -> tuple[Tensor, ...]:
    """The tensors that hold a weight on disk. `dtype` is that of whatever stays floating point.

    Raises RequestError when the group size does not divide the weight's rows.
    """
    if weight.kind == "bias":
        # It decides which experts run; mlx-lm keeps it out of every cast too.
        return (Tensor(weight.name, "F32", weight.shape),)
    if quantization is None or not weight.is_quantizable:
        return (Tensor(weight.name, dtype, weight.shape),)
    *rows, columns = weight.shape
    bits, group_size = quantization.bits, quantization.group_size
    if columns % group_size or columns * bits % 32:
        raise RequestError(
            f"{weight.path} has rows of {columns}, which groups of {group_size} at {bits} bits do not divide",
            field="group_size",
        )
    packed = Tensor(weight.name, "U32", (*rows, columns * bits // 32))
    groups = (*rows, columns // group_size)
    if quantization.mode != "affine":
        return (packed, Tensor(f"{weight.path}.scales", "U8", groups))
    scales = Tensor(f"{weight.path}.scales", dtype, groups)
    return (packed, scales, Tensor(f"{weight.path}.biases", dtype, groups))


def _layer_weights(
    config: ModelConfig, layer: LayerConfig, prefix: str, *, is_mtp: bool, number: int | None = None
) -> list[Weight]:
    """Both norms, attention and the feed-forward part of one layer."""
    index = layer.index if number is None else number

    def weight(path: str, shape: tuple[int, ...], kind: Kind, leaf: str = "weight") -> Weight:
        return Weight(f"{prefix}.{path}", shape, kind, index, is_mtp, leaf)

    def attention() -> Iterator[Weight]:
        width, queries = config.hidden_size, layer.num_heads * layer.head_dim
        keys = layer.num_kv_heads * layer.head_dim
        yield weight("self_attn.q_proj", (queries, width), "attention")
        yield weight("self_attn.k_proj", (keys, width), "attention")
        yield weight("self_attn.v_proj", (keys, width), "attention")
        yield weight("self_attn.o_proj", (width, queries), "attention")
        if config.use_head_gate:
            yield weight("self_attn.g_proj", (layer.num_heads, width), "gate")
        yield weight("self_attn.q_norm", (layer.head_dim,), "norm")
        yield weight("self_attn.k_norm", (layer.head_dim,), "norm")

    def mlp(path: str, width: int, kind: Kind, experts: tuple[int, ...] = ()) -> Iterator[Weight]:
        hidden = config.hidden_size
        yield weight(f"{path}.gate_proj", (*experts, width, hidden), kind)
        yield weight(f"{path}.up_proj", (*experts, width, hidden), kind)
        yield weight(f"{path}.down_proj", (*experts, hidden, width), kind)

    def moe() -> Iterator[Weight]:
        yield weight("mlp.gate.gate", (config.num_experts, config.hidden_size), "router")
        yield weight("mlp.gate", (config.num_experts,), "bias", "router_bias")
        yield from mlp("mlp.switch_mlp", config.moe_intermediate_size, "experts", (config.num_experts,))
        yield from mlp("mlp.share_expert", config.share_expert_dim, "shared")

    return [
        weight("input_layernorm", (config.hidden_size,), "norm"),
        *attention(),
        weight("post_attention_layernorm", (config.hidden_size,), "norm"),
        *(moe() if layer.is_moe else mlp("mlp", layer.intermediate_size, "dense")),
    ]
