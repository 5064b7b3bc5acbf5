"""The finished shape of the model, decided once from config.json.

`ModelConfig.from_hf` is the only reader of raw JSON: it knows the original keys, Step-3.7's nested
`text_config`, transformers' newer spellings and what mlx-lm's converter adds. All else reads the dataclasses.
The surprise: per-layer lists may be longer than the backbone, because their tail describes the MTP layers.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from mlx_step35.config.fields import Fields, flatten, number
from mlx_step35.errors import ConfigError

LayerKind = Literal["full", "sliding"]


@dataclass(frozen=True, slots=True)
class Llama3Scaling:
    """Llama-3 frequency scaling: static, the same at every position."""

    factor: float
    original_context_length: int
    low_freq_factor: float
    high_freq_factor: float


@dataclass(frozen=True, slots=True)
class RopeConfig:
    """Rotary embedding of one layer; only the first `rotary_dims` of each head are rotated."""

    theta: float
    rotary_dims: int
    scaling: Llama3Scaling | None


@dataclass(frozen=True, slots=True)
class LayerConfig:
    """One decoder layer; `swiglu_limit` clamps routed experts, `swiglu_limit_shared` the other MLPs."""

    index: int
    kind: LayerKind
    num_heads: int
    num_kv_heads: int
    head_dim: int
    window: int | None
    rope: RopeConfig
    is_moe: bool
    intermediate_size: int
    swiglu_limit: float | None
    swiglu_limit_shared: float | None


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """The whole model. MTP layer k has `index` num_layers + k, its place in the original checkpoint."""

    hidden_size: int
    vocab_size: int
    rms_norm_eps: float
    layers: tuple[LayerConfig, ...]
    mtp_layers: tuple[LayerConfig, ...]
    num_experts: int
    top_k: int
    moe_intermediate_size: int
    share_expert_dim: int
    router_scaling_factor: float
    norm_topk_weights: bool
    use_head_gate: bool
    tie_word_embeddings: bool
    context_length: int
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]
    quantization: Mapping[str, Any] | None
    raw: Mapping[str, Any]

    @property
    def num_layers(self) -> int:
        """Backbone layers; the MTP layers are not counted."""
        return len(self.layers)

    @property
    def window(self) -> int | None:
        """Positions a sliding layer sees, the current one included; None without sliding layers."""
        return next((layer.window for layer in (*self.layers, *self.mtp_layers) if layer.window), None)

    @classmethod
    def from_hf(cls, raw: Mapping[str, Any]) -> "ModelConfig":
        """Interpret a parsed config.json. Raises ConfigError for anything this model cannot be."""
        fields = Fields(flatten(raw))
        fields.refuse_unknown()
        fields.check_fixed()
        layers, mtp_layers = _layers(fields)
        has_moe = any(layer.is_moe for layer in layers)
        num_experts = fields.integer("moe_num_experts") if has_moe else 0
        top_k = fields.integer("moe_top_k") if has_moe else 0
        if top_k > num_experts:
            raise ConfigError("moe_top_k", f"{top_k} is more than the {num_experts} experts")
        return cls(
            hidden_size=fields.integer("hidden_size"),
            vocab_size=fields.integer("vocab_size"),
            # Absent from the release; every implementation uses 1e-5.
            rms_norm_eps=fields.number("rms_norm_eps", 1e-5),
            layers=layers,
            mtp_layers=mtp_layers,
            num_experts=num_experts,
            top_k=top_k,
            moe_intermediate_size=fields.integer("moe_intermediate_size") if has_moe else 0,
            share_expert_dim=fields.integer("share_expert_dim") if has_moe else 0,
            router_scaling_factor=fields.number("moe_router_scaling_factor") if has_moe else 1.0,
            norm_topk_weights=fields.boolean("norm_expert_weight", True),
            use_head_gate=fields.boolean("use_head_wise_attn_gate", True),
            tie_word_embeddings=fields.boolean("tie_word_embeddings", False),
            context_length=fields.integer(
                "max_position_embeddings", fields.integer("max_seq_len", 0, minimum=0)
            ),
            bos_token_id=next(iter(fields.token_ids("bos_token_id")), None),
            eos_token_ids=fields.token_ids("eos_token_id"),
            quantization=_quantization(fields),
            raw=raw,
        )


_KINDS: Mapping[str, LayerKind] = {"full_attention": "full", "sliding_attention": "sliding"}


def _quantization(fields: Fields) -> Mapping[str, Any] | None:
    """MLX's block, which converters write under two names; other quantisers' blocks are not ours to read."""
    for name in ("quantization", "quantization_config"):
        if fields.has(name) and "quant_method" not in fields.mapping(name):
            return fields.mapping(name)
    return None


def _layers(fields: Fields) -> tuple[tuple[LayerConfig, ...], tuple[LayerConfig, ...]]:
    num_layers, num_mtp = fields.integer("num_hidden_layers"), fields.num_mtp_layers()
    kinds = _layer_kinds(fields)
    moe = _moe_layers(fields)
    # What a truncated list leaves out about an MTP layer is the release's own values.
    limits = fields.per_layer("swiglu_limits", 0.0, mtp_default=0.0)
    shared_limits = fields.per_layer("swiglu_limits_shared", 0.0, mtp_default=0.0)
    ropes = _Ropes(fields)
    heads = _Heads(fields)
    layers = []
    for index, kind in enumerate(kinds):
        num_heads, num_kv_heads, head_dim = heads.of(index, kind)
        layers.append(
            LayerConfig(
                index=index,
                kind=kind,
                num_heads=num_heads,
                num_kv_heads=num_kv_heads,
                head_dim=head_dim,
                window=fields.integer("sliding_window") if kind == "sliding" else None,
                rope=ropes.of(index, kind, head_dim),
                is_moe=index in moe,
                intermediate_size=fields.integer("intermediate_size"),
                swiglu_limit=_limit("swiglu_limits", limits[index]),
                swiglu_limit_shared=_limit("swiglu_limits_shared", shared_limits[index]),
            )
        )
    assert len(layers) == num_layers + num_mtp
    return tuple(layers[:num_layers]), tuple(layers[num_layers:])


def _layer_kinds(fields: Fields) -> list[LayerKind]:
    names = fields.per_layer("layer_types", None, mtp_default="sliding_attention")
    if fields.has("mtp_layer_types"):
        num_layers, mtp_names = fields.integer("num_hidden_layers"), fields.sequence("mtp_layer_types")
        if len(mtp_names) < fields.num_mtp_layers():
            raise ConfigError(
                "mtp_layer_types", f"expected {fields.num_mtp_layers()} entries, found {len(mtp_names)}"
            )
        names[num_layers:] = mtp_names[: fields.num_mtp_layers()]
    return [_kind("layer_types", name) for name in names]


def _kind(field: str, name: object) -> LayerKind:
    if not isinstance(name, str) or name not in _KINDS:
        raise ConfigError(field, f"expected one of {', '.join(_KINDS)}, found {name!r}")
    return _KINDS[name]


def _limit(field: str, value: object) -> float | None:
    """0 and null mean 'no clamp', not 'clamp to nothing'."""
    return None if value in (None, 0) else number(field, value)


def _moe_layers(fields: Fields) -> frozenset[int]:
    num_layers = fields.integer("num_hidden_layers")
    if not fields.boolean("use_moe", True):
        return frozenset()
    mtp_kinds = fields.sequence("mtp_mlp_layer_types") if fields.has("mtp_mlp_layer_types") else []
    if any(kind != "dense" for kind in mtp_kinds):
        raise ConfigError("mtp_mlp_layer_types", "expected 'dense' only, MTP layers have no experts here")
    if fields.has("moe_layers_enum"):
        value = fields.raw["moe_layers_enum"]
        entries = value.split(",") if isinstance(value, str) else fields.sequence("moe_layers_enum")
        try:
            indices = frozenset(int(str(entry)) for entry in entries if str(entry).strip())
        except ValueError:
            raise ConfigError("moe_layers_enum", f"expected layer numbers, found {value!r}") from None
        if any(not 0 <= index < num_layers for index in indices):
            raise ConfigError("moe_layers_enum", f"expected numbers below {num_layers}, found {value!r}")
        return indices
    if not fields.has("mlp_layer_types"):
        raise ConfigError("moe_layers_enum", "missing, and no mlp_layer_types either")
    kinds = fields.per_layer("mlp_layer_types", None, mtp_default="dense")
    if any(kind not in ("sparse", "dense") for kind in kinds):
        raise ConfigError("mlp_layer_types", f"expected 'sparse' or 'dense', found {kinds!r}")
    if "sparse" in kinds[num_layers:]:
        raise ConfigError("mlp_layer_types", "an MTP layer is 'sparse', MTP layers have no experts here")
    return frozenset(index for index, kind in enumerate(kinds) if kind == "sparse")


class _Heads:
    """Head counts per layer: plain keys describe full layers, `attention_other_setting` the sliding ones."""

    def __init__(self, fields: Fields) -> None:
        full = (
            fields.integer("num_attention_heads"),
            fields.integer("num_attention_groups"),
            fields.integer("head_dim"),
        )
        sliding = full
        if fields.has("attention_other_setting"):
            other = Fields(fields.mapping("attention_other_setting"), "attention_other_setting.")
            other.expect("attention_type", ("sliding_attention",))
            names = ("num_attention_heads", "num_attention_groups", "head_dim")
            heads, groups, head_dim = (
                other.integer(name, default) for name, default in zip(names, full, strict=True)
            )
            other.expect("true_head_dim", (head_dim,))
            sliding = (heads, groups, head_dim)
        if fields.has("num_sliding_attention_heads"):
            sliding = (fields.integer("num_sliding_attention_heads"), *sliding[1:])
        fields.expect("query_pre_attn_scalar", (full[2], None))
        self._by_kind: Mapping[LayerKind, tuple[int, int, int]] = {"full": full, "sliding": sliding}
        self._overrides = fields.mapping("per_layer_config") if fields.has("per_layer_config") else {}

    def of(self, index: int, kind: LayerKind) -> tuple[int, int, int]:
        """Heads, KV heads and head size of one layer."""
        num_heads, num_kv_heads, head_dim = self._by_kind[kind]
        if str(index) in self._overrides:
            override = Fields(self._overrides[str(index)], f"per_layer_config.{index}.")
            if set(override.raw) - {"num_attention_heads"}:
                raise ConfigError(
                    "per_layer_config", f"only num_attention_heads may vary, found {override.raw!r}"
                )
            num_heads = override.integer("num_attention_heads", num_heads)
        if num_heads % num_kv_heads:
            raise ConfigError(
                "num_attention_heads", f"{num_heads} is not a multiple of {num_kv_heads} KV heads"
            )
        return num_heads, num_kv_heads, head_dim


class _Ropes:
    """Rotary settings per layer, from the release's lists or transformers' per-kind `rope_parameters`."""

    def __init__(self, fields: Fields) -> None:
        self._by_kind: dict[LayerKind, Fields] = {}
        scaling: object = fields.raw.get("rope_scaling")
        if fields.has("rope_parameters"):
            parameters = fields.mapping("rope_parameters")
            for name, kind in _KINDS.items():
                if name in parameters:
                    self._by_kind[kind] = Fields(parameters[name], f"rope_parameters.{name}.")
            if not self._by_kind:
                raise ConfigError(
                    "rope_parameters", f"expected one entry per layer kind, found {parameters!r}"
                )
        else:
            self._thetas = fields.per_layer("rope_theta", None, mtp_default=1e4)
            self._fractions = fields.per_layer("partial_rotary_factors", 1.0, mtp_default=1.0)
        self._scaling = _scaling(Fields(scaling, "rope_scaling.")) if scaling else None
        # Named after YaRN, but the scaling it restricts is llama3's.
        only = fields.sequence("yarn_only_types") if fields.has("yarn_only_types") else []
        self._scaled_kinds = {_kind("yarn_only_types", name) for name in only}
        if self._scaling and not self._by_kind and not only:
            raise ConfigError("yarn_only_types", "missing; rope_scaling needs the layer kinds it applies to")

    def of(self, index: int, kind: LayerKind, head_dim: int) -> RopeConfig:
        """The rotary settings of one layer."""
        if self._by_kind:
            if kind not in self._by_kind:
                raise ConfigError(
                    "rope_parameters", f"no entry for {kind}_attention, which layer {index} needs"
                )
            entry = self._by_kind[kind]
            theta, fraction = entry.number("rope_theta"), entry.number("partial_rotary_factor", 1.0)
            scaling = _scaling(entry)
        else:
            theta = number("rope_theta", self._thetas[index])
            fraction = number("partial_rotary_factors", self._fractions[index])
            scaling = self._scaling if kind in self._scaled_kinds else None
        rotary_dims = int(head_dim * fraction)
        if fraction > 1 or rotary_dims % 2:
            raise ConfigError(
                "partial_rotary_factors", f"{fraction} of {head_dim} dims cannot be rotated in pairs"
            )
        return RopeConfig(theta=theta, rotary_dims=rotary_dims, scaling=scaling)


def _scaling(entry: Fields) -> Llama3Scaling | None:
    rope_type = entry.raw.get("rope_type", entry.raw.get("type", "default"))
    if rope_type == "default":
        return None
    if rope_type != "llama3":
        raise ConfigError(f"{entry.prefix}rope_type", f"expected 'llama3' or 'default', found {rope_type!r}")
    low, high = entry.number("low_freq_factor"), entry.number("high_freq_factor")
    if high <= low:
        raise ConfigError(f"{entry.prefix}high_freq_factor", f"expected more than {low}, found {high}")
    return Llama3Scaling(
        factor=entry.number("factor"),
        original_context_length=entry.integer("original_max_position_embeddings"),
        low_freq_factor=low,
        high_freq_factor=high,
    )
