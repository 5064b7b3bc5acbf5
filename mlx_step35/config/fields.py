"""Checked access to config.json: which keys exist, which are ignored, what types their values have."""

from collections.abc import Mapping
from typing import Any

from mlx_step35.errors import ConfigError

MAX_MTP_LAYERS = 3


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


# Nothing the forward pass needs: transformers' bookkeeping, training switches, superseded duplicates.
IGNORED = _names(
    """
    _attn_implementation _name_or_path add_cross_attention architectures attention_dropout auto_map
    bad_words_ids begin_suppress_tokens chunk_size_feed_forward cross_attention_hidden_size
    decoder_start_token_id diversity_penalty do_sample dtype early_stopping
    encoder_no_repeat_ngram_size exponential_decay_length_penalty finetuning_task
    forced_bos_token_id forced_eos_token_id id2label initializer_range is_decoder is_encoder_decoder
    label2id length_penalty max_length min_length moe_every_n_layer moe_layer_offset need_fp32_gate
    no_repeat_ngram_size num_beam_groups num_beams num_return_sequences output_attentions
    output_hidden_states output_router_logits output_scores pad_token_id prefix problem_type
    pruned_heads remove_invalid_values repetition_penalty return_dict return_dict_in_generate
    sep_token_id suppress_tokens task_specific_params temperature tf_legacy_loss tie_encoder_decoder
    tokenizer_class top_k top_p torch_dtype torchscript transformers_version typical_p use_bfloat16
    use_cache
    """
)

# Step-3.7 puts the text model beside these; this package runs the text model only.
IGNORED_BESIDE_TEXT = _names(
    """
    vision_config image_token_id image_token_len patch_token_len understand_projector_stride
    projector_bias im_start_token im_end_token im_patch_token use_im_start_end vision_select_layer
    model_type text_config image_token_index processor_class hidden_size vocab_size
    max_position_embeddings num_hidden_layers num_attention_heads
    """
)

# Architecture switches with one supported value: another value is another model.
FIXED: Mapping[str, tuple[Any, ...]] = {
    "att_impl_type": ("GQA",),
    "attention_bias": (False,),
    "gating": (True,),
    "hidden_act": ("silu",),
    "mlp_bias": (False,),
    "moe_router_activation": ("sigmoid",),
    "sink": (False, None),
    "use_bidirectional_attention": (False, None),
    "use_moe_router_bias": (True,),
    "use_qk_norm": (True,),
    "use_rope_layers": ([], None),
    "zero_centered": (True,),
}

# transformers' spelling -> the release's.
ALIASES: Mapping[str, str] = {
    "num_key_value_heads": "num_attention_groups",
    "n_routed_experts": "moe_num_experts",
    "num_local_experts": "moe_num_experts",
    "num_experts_per_tok": "moe_top_k",
    "share_expert_dims": "share_expert_dim",
    "num_mtp_layers": "num_nextn_predict_layers",
}

READ = _names(
    """
    attention_other_setting bos_token_id eos_token_id head_dim hidden_size intermediate_size mlx_step35_format
    layer_types max_position_embeddings max_seq_len mlp_layer_types model_type moe_intermediate_size
    moe_layers_enum moe_num_experts moe_router_scaling_factor moe_top_k mtp_layer_types
    mtp_mlp_layer_types norm_expert_weight num_attention_groups num_attention_heads
    num_hidden_layers num_nextn_predict_layers num_sliding_attention_heads partial_rotary_factors
    per_layer_config quantization quantization_config query_pre_attn_scalar rms_norm_eps
    rope_parameters rope_scaling rope_theta share_expert_dim sliding_window swiglu_limits
    swiglu_limits_shared tie_word_embeddings use_head_wise_attn_gate use_moe vocab_size
    yarn_only_types
    """
)


def flatten(raw: Mapping[str, Any]) -> dict[str, Any]:
    """The text model's keys under the release's names; outer keys fill what `text_config` leaves out."""
    model_type = raw.get("model_type")
    if model_type not in ("step3p5", "step3p7"):
        raise ConfigError("model_type", f"expected 'step3p5' or 'step3p7', found {model_type!r}")
    merged = dict(raw)
    if "text_config" in raw:
        text = raw["text_config"]
        if not isinstance(text, Mapping):
            raise ConfigError("text_config", f"expected an object, found {text!r}")
        if text.get("model_type", "step3p5") != "step3p5":
            raise ConfigError("text_config.model_type", f"expected 'step3p5', found {text['model_type']!r}")
        merged = {key: value for key, value in raw.items() if key not in IGNORED_BESIDE_TEXT} | dict(text)
    elif model_type == "step3p7":
        raise ConfigError("text_config", "missing; a step3p7 config nests the text model there")
    for alias, name in ALIASES.items():
        if alias in merged:
            value = merged.pop(alias)
            if merged.setdefault(name, value) != value:
                raise ConfigError(alias, f"{value!r} contradicts {name} = {merged[name]!r}")
    return merged


class Fields:
    """The keys of one JSON object, each read with its type checked; errors name the key with its prefix."""

    def __init__(self, raw: object, prefix: str = "") -> None:
        if not isinstance(raw, Mapping):
            raise ConfigError(prefix.rstrip("."), f"expected an object, found {raw!r}")
        self.raw: Mapping[str, Any] = raw
        self.prefix = prefix

    def refuse_unknown(self) -> None:
        """Raise for the first key that is neither read, nor checked, nor known to be without effect."""
        unknown = sorted(set(self.raw) - READ - IGNORED - set(FIXED))
        if unknown:
            raise ConfigError(unknown[0], f"unknown key with value {self.raw[unknown[0]]!r}")

    def check_fixed(self) -> None:
        """Raise unless every architecture switch that is present has the one supported value."""
        for name, values in FIXED.items():
            self.expect(name, values)

    def expect(self, name: str, values: tuple[Any, ...]) -> None:
        """Raise if the key is present with another value."""
        if name in self.raw and self.raw[name] not in values:
            raise ConfigError(self.prefix + name, f"expected {values[0]!r}, found {self.raw[name]!r}")

    def has(self, name: str) -> bool:
        """Present and not null."""
        return self.raw.get(name) is not None

    def integer(self, name: str, default: int | None = None, minimum: int = 1) -> int:
        value = self._value(name, default)
        if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
            raise ConfigError(
                self.prefix + name, f"expected an integer of at least {minimum}, found {value!r}"
            )
        return value

    def number(self, name: str, default: float | None = None) -> float:
        return number(self.prefix + name, self._value(name, default))

    def boolean(self, name: str, default: bool) -> bool:
        value = self._value(name, default)
        if not isinstance(value, bool):
            raise ConfigError(self.prefix + name, f"expected true or false, found {value!r}")
        return value

    def mapping(self, name: str) -> Mapping[str, Any]:
        return Fields(self._value(name, None), f"{self.prefix}{name}.").raw

    def sequence(self, name: str) -> list[Any]:
        value = self._value(name, None)
        if not isinstance(value, list | tuple):
            raise ConfigError(self.prefix + name, f"expected a list, found {value!r}")
        return list(value)

    def token_ids(self, name: str) -> tuple[int, ...]:
        """One id or a list of ids; absent is no ids."""
        value = self.raw.get(name)
        ids = value if isinstance(value, list) else [] if value is None else [value]
        if any(isinstance(token, bool) or not isinstance(token, int) or token < 0 for token in ids):
            raise ConfigError(self.prefix + name, f"expected token ids, found {value!r}")
        return tuple(ids)

    def num_mtp_layers(self) -> int:
        """How many MTP layers the config announces; the weights decide whether they are there."""
        count = self.integer("num_nextn_predict_layers", 0, minimum=0)
        if count > MAX_MTP_LAYERS:
            raise ConfigError("num_nextn_predict_layers", f"expected at most {MAX_MTP_LAYERS}, found {count}")
        return count

    def per_layer(self, name: str, default: object, mtp_default: object) -> list[Any]:
        """One value per backbone and MTP layer.

        Lists cover the backbone, or the backbone and the MTP layers; what a backbone-only list, a single
        value or an absent key leaves open for the MTP layers is `mtp_default`. A `default` of None makes the
        key required.
        """
        num_layers, num_mtp = self.integer("num_hidden_layers"), self.num_mtp_layers()
        value = self._value(name, default)
        if not isinstance(value, list):
            if name in ("layer_types", "mlp_layer_types"):
                raise ConfigError(self.prefix + name, f"expected a list, found {value!r}")
            value = [value] * num_layers
        # The release's tail stays when somebody lowers num_nextn_predict_layers.
        lengths = sorted({num_layers, num_layers + num_mtp, num_layers + MAX_MTP_LAYERS})
        if len(value) not in lengths:
            expected = " or ".join(str(length) for length in lengths)
            raise ConfigError(self.prefix + name, f"expected {expected} entries, found {len(value)}")
        values = [*value, *[mtp_default] * num_mtp] if len(value) == num_layers else value
        return list(values[: num_layers + num_mtp])

    def _value(self, name: str, default: object) -> Any:
        value = self.raw.get(name)
        if value is not None:
            return value
        if default is None:
            raise ConfigError(self.prefix + name, "missing")
        return default


def number(field: str, value: object) -> float:
    """A positive finite number."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < float("inf"):
        raise ConfigError(field, f"expected a positive number, found {value!r}")
    return float(value)
