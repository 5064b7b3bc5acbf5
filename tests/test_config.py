"""Every form in which a config of this model exists, and every way in which one can be wrong."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_step35.config import LayerConfig, Llama3Scaling, ModelConfig
from mlx_step35.config.fields import ALIASES, FIXED, IGNORED, READ
from mlx_step35.errors import ConfigError
from tests.tiny import tiny_config

PER_LAYER_LISTS = (
    "layer_types",
    "rope_theta",
    "partial_rotary_factors",
    "swiglu_limits",
    "swiglu_limits_shared",
)


@pytest.fixture
def release() -> dict[str, Any]:
    """The real model's config.json."""
    raw: dict[str, Any] = json.loads((Path(__file__).parent / "data" / "step35_config.json").read_text())
    return raw


def shapes(config: ModelConfig) -> tuple[tuple[LayerConfig, ...], tuple[LayerConfig, ...]]:
    return config.layers, config.mtp_layers


def refused(raw: dict[str, Any], field: str, *found: str) -> None:
    """The config is refused with an error that names the field and what was found."""
    with pytest.raises(ConfigError) as error:
        ModelConfig.from_hf(raw)
    assert error.value.field == field
    for text in (field, *found):
        assert text in str(error.value)


class TestRelease:
    def test_dimensions(self, release: dict[str, Any]) -> None:
        config = ModelConfig.from_hf(release)
        assert (config.hidden_size, config.vocab_size, config.context_length) == (4096, 128896, 262144)
        assert (config.num_experts, config.top_k) == (288, 8)
        assert (config.moe_intermediate_size, config.share_expert_dim) == (1280, 1280)
        assert (config.router_scaling_factor, config.norm_topk_weights) == (3.0, True)
        assert (config.use_head_gate, config.tie_word_embeddings) == (True, False)
        assert (config.bos_token_id, config.eos_token_ids) == (0, (1, 2, 128007))
        assert "rms_norm_eps" not in release
        assert config.rms_norm_eps == 1e-5
        assert config.raw is release

    def test_layer_kinds(self, release: dict[str, Any]) -> None:
        config = ModelConfig.from_hf(release)
        assert config.num_layers == 45
        assert config.window == 512
        full = [layer.index for layer in config.layers if layer.kind == "full"]
        assert full == list(range(0, 45, 4))
        for layer in config.layers:
            is_full = layer.index in full
            assert layer.num_heads == (64 if is_full else 96)
            assert (layer.num_kv_heads, layer.head_dim) == (8, 128)
            assert layer.window == (None if is_full else 512)
            assert layer.rope.theta == (5e6 if is_full else 1e4)
            assert layer.rope.rotary_dims == (64 if is_full else 128)
            assert layer.rope.scaling == (Llama3Scaling(2.0, 131072, 1.0, 32.0) if is_full else None)
            assert layer.is_moe == (layer.index >= 3)
            assert layer.intermediate_size == 11264
            assert layer.swiglu_limit == (7.0 if layer.index in (43, 44) else None)
            assert layer.swiglu_limit_shared == (16.0 if layer.index == 44 else None)

    def test_mtp_layers(self, release: dict[str, Any]) -> None:
        config = ModelConfig.from_hf(release)
        assert [layer.index for layer in config.mtp_layers] == [45, 46, 47]
        for layer in config.mtp_layers:
            assert (layer.kind, layer.num_heads, layer.window) == ("sliding", 96, 512)
            assert (layer.rope.theta, layer.rope.rotary_dims, layer.rope.scaling) == (1e4, 128, None)
            assert (layer.is_moe, layer.intermediate_size) == (False, 11264)
            assert (layer.swiglu_limit, layer.swiglu_limit_shared) == (None, None)

    def test_lists_cut_to_the_backbone_mean_the_same(self, release: dict[str, Any]) -> None:
        cut = release | {name: release[name][:45] for name in PER_LAYER_LISTS}
        assert shapes(ModelConfig.from_hf(cut)) == shapes(ModelConfig.from_hf(release))

    @pytest.mark.parametrize("count", [0, 1, 2, 3, None])
    def test_fewer_mtp_layers_leave_the_lists_valid(self, release: dict[str, Any], count: int | None) -> None:
        release["num_nextn_predict_layers"] = count
        if count is None:
            del release["num_nextn_predict_layers"]
        for name in PER_LAYER_LISTS:
            for length in (45, 48):
                config = ModelConfig.from_hf(release | {name: release[name][:length]})
                assert len(config.mtp_layers) == (count or 0)
                assert config.num_layers == 45


class TestOtherForms:
    def test_step37_nests_the_text_model(self, release: dict[str, Any]) -> None:
        release["swiglu_limits_shared"][43] = 16
        nested = {
            "architectures": ["Step3p7ForConditionalGeneration"],
            "model_type": "step3p7",
            "image_token_id": 128001,
            "image_token_len": 169,
            "patch_token_len": 81,
            "understand_projector_stride": 2,
            "projector_bias": False,
            "vision_config": {"model_type": "perception_encoder", "width": 1536},
            "quantization": {"group_size": 64, "bits": 4},
            "text_config": {key: value for key, value in release.items() if key != "eos_token_id"},
            "eos_token_id": [1, 2, 128007],
        }
        config = ModelConfig.from_hf(nested)
        assert shapes(config) == shapes(ModelConfig.from_hf(release))
        assert config.layers[43].swiglu_limit_shared == 16.0
        assert config.eos_token_ids == (1, 2, 128007)
        assert config.quantization == {"group_size": 64, "bits": 4}

    def test_transformers_keys(self, release: dict[str, Any]) -> None:
        """What transformers 5 writes when it saves this model."""
        names = [
            *PER_LAYER_LISTS,
            "attention_other_setting",
            "moe_layers_enum",
            "rope_scaling",
            "yarn_only_types",
        ]
        renamed = {
            "num_attention_groups": "num_key_value_heads",
            "moe_num_experts": "n_routed_experts",
            "moe_top_k": "num_experts_per_tok",
        }
        saved = {renamed.get(k, k): value for k, value in release.items() if k not in names}
        kinds = release["layer_types"]
        saved |= {
            "layer_types": kinds[:45],
            "mtp_layer_types": kinds[45:],
            "mlp_layer_types": ["dense"] * 3 + ["sparse"] * 42,
            "mtp_mlp_layer_types": ["dense"] * 3,
            "num_sliding_attention_heads": 96,
            "per_layer_config": {
                str(i): {"num_attention_heads": 96} for i, kind in enumerate(kinds[:45]) if "sliding" in kind
            },
            "query_pre_attn_scalar": 128,
            "rope_parameters": {
                "full_attention": {
                    "rope_theta": 5e6,
                    "partial_rotary_factor": 0.5,
                    **release["rope_scaling"],
                },
                "sliding_attention": {
                    "rope_type": "default",
                    "rope_theta": 1e4,
                    "partial_rotary_factor": 1.0,
                },
            },
            "swiglu_limits": [value or None for value in release["swiglu_limits"][:45]],
            "swiglu_limits_shared": release["swiglu_limits_shared"][:45],
            "rms_norm_eps": 1e-5,
            "hidden_act": "silu",
            "attention_bias": False,
            "mlp_bias": False,
            "initializer_range": 0.02,
            "pad_token_id": 1,
            "id2label": {"0": "LABEL_0"},
        }
        assert shapes(ModelConfig.from_hf(saved)) == shapes(ModelConfig.from_hf(release))

    def test_mlx_lm_conversion(self, release: dict[str, Any]) -> None:
        block = {"group_size": 64, "bits": 4, "model.layers.3.mlp.gate.gate": {"group_size": 64, "bits": 8}}
        config = ModelConfig.from_hf(release | {"quantization": block, "quantization_config": block})
        assert config.quantization == block
        assert shapes(config) == shapes(ModelConfig.from_hf(release))

    def test_another_quantisers_block_is_not_ours(self, release: dict[str, Any]) -> None:
        assert (
            ModelConfig.from_hf(release | {"quantization_config": {"quant_method": "fp8"}}).quantization
            is None
        )

    @pytest.mark.parametrize("form", ["3,4", [3, 4], " 3, 4 ,", ["3", "4"]])
    def test_moe_layers_enum_forms(self, form: object) -> None:
        config = ModelConfig.from_hf(tiny_config(moe_layers_enum=form))
        assert [layer.index for layer in config.layers if layer.is_moe] == [3, 4]

    def test_no_experts_at_all(self) -> None:
        config = ModelConfig.from_hf(tiny_config(use_moe=False, moe_num_experts=None, moe_top_k=None))
        assert not any(layer.is_moe for layer in config.layers)
        assert config.num_experts == config.top_k == 0

    @pytest.mark.parametrize(("value", "expected"), [(7, (7,)), ([1, 2], (1, 2)), (None, ())])
    def test_eos_forms(self, value: object, expected: tuple[int, ...]) -> None:
        assert ModelConfig.from_hf(tiny_config(eos_token_id=value)).eos_token_ids == expected

    def test_one_value_for_all_backbone_layers(self) -> None:
        config = ModelConfig.from_hf(tiny_config(rope_theta=123.0, partial_rotary_factors=None))
        assert {layer.rope.theta for layer in config.layers} == {123.0}
        assert {layer.rope.rotary_dims for layer in config.layers} == {16}
        assert {layer.rope.theta for layer in config.mtp_layers} == {1e4}

    def test_zero_and_null_limits_clamp_nothing(self) -> None:
        config = ModelConfig.from_hf(tiny_config(swiglu_limits=[0, 0.0, None, 2, 0, 0]))
        assert [layer.swiglu_limit for layer in config.layers] == [None, None, None, 2.0, None, None]

    def test_bookkeeping_keys_are_ignored(self) -> None:
        plain = ModelConfig.from_hf(tiny_config())
        assert shapes(ModelConfig.from_hf(tiny_config(**dict.fromkeys(IGNORED, 1)))) == shapes(plain)


class TestRefusals:
    @pytest.mark.parametrize("name", PER_LAYER_LISTS)
    @pytest.mark.parametrize("length", [0, 5, 7, 8, 10])
    def test_wrong_lengths(self, name: str, length: int) -> None:
        raw = tiny_config()
        raw[name] = (raw[name] * 2)[:length]
        refused(raw, name, "expected 6 or 9 entries", f"found {length}")

    @pytest.mark.parametrize("value", ["llama", None, 3])
    def test_other_models(self, value: object) -> None:
        refused(tiny_config() | {"model_type": value}, "model_type", repr(value))

    def test_other_models_text_config(self) -> None:
        text = tiny_config() | {"model_type": "qwen3"}
        refused({"model_type": "step3p7", "text_config": text}, "text_config.model_type", "qwen3")
        refused({"model_type": "step3p7"}, "text_config", "missing")
        refused({"model_type": "step3p7", "text_config": 3}, "text_config", "3")

    def test_unknown_layer_kinds(self) -> None:
        raw = tiny_config()
        raw["layer_types"][2] = "linear_attention"
        refused(raw, "layer_types", "linear_attention")
        refused(tiny_config(mlp_layer_types=["gated"] * 6, moe_layers_enum=None), "mlp_layer_types", "gated")

    def test_unknown_keys(self) -> None:
        refused(tiny_config(attention_sinks=4), "attention_sinks", "4")

    @pytest.mark.parametrize(
        ("name", "value"),
        [
            ("zero_centered", False),
            ("use_qk_norm", False),
            ("sink", True),
            ("att_impl_type", "MLA"),
            ("moe_router_activation", "softmax"),
            ("use_moe_router_bias", False),
            ("hidden_act", "gelu"),
            ("attention_bias", True),
            ("use_rope_layers", [0, 4]),
        ],
    )
    def test_switches_of_another_architecture(self, name: str, value: object) -> None:
        refused(tiny_config(**{name: value}), name, repr(value))

    @pytest.mark.parametrize(
        ("name", "value"),
        [
            ("hidden_size", 0),
            ("hidden_size", "4096"),
            ("vocab_size", True),
            ("num_hidden_layers", -1),
            ("sliding_window", 0),
            ("head_dim", 16.0),
            ("rms_norm_eps", -1e-5),
            ("tie_word_embeddings", "no"),
            ("eos_token_id", ["</s>"]),
            ("moe_layers_enum", "1,two"),
            ("moe_layers_enum", "1,6"),
            ("num_nextn_predict_layers", 4),
            ("num_nextn_predict_layers", -1),
            ("rope_theta", "big"),
            ("partial_rotary_factors", 1.5),
            ("swiglu_limits", [-7.0] * 6),
            ("yarn_only_types", ["global_attention"]),
            ("moe_top_k", 9),
            ("moe_router_scaling_factor", 0),
        ],
    )
    def test_malformed_values(self, name: str, value: object) -> None:
        refused(tiny_config(**{name: value}), name)

    @pytest.mark.parametrize(
        "name",
        [
            "hidden_size",
            "num_hidden_layers",
            "num_attention_groups",
            "layer_types",
            "sliding_window",
            "rope_theta",
            "moe_layers_enum",
            "moe_top_k",
            "share_expert_dim",
            "yarn_only_types",
        ],
    )
    def test_missing_keys(self, name: str) -> None:
        raw = tiny_config()
        del raw[name]
        refused(raw, name, "missing")

    def test_contradicting_spellings(self) -> None:
        refused(tiny_config(num_key_value_heads=8), "num_key_value_heads", "8")
        assert ModelConfig.from_hf(tiny_config(num_key_value_heads=2)).layers[0].num_kv_heads == 2

    def test_heads_that_do_not_divide(self) -> None:
        refused(tiny_config(num_attention_heads=3), "num_attention_heads", "3")

    def test_nested_settings_name_their_place(self) -> None:
        raw = tiny_config()
        raw["attention_other_setting"]["attention_type"] = "full_attention"
        refused(raw, "attention_other_setting.attention_type", "full_attention")
        raw = tiny_config()
        raw["rope_scaling"]["rope_type"] = "yarn"
        refused(raw, "rope_scaling.rope_type", "yarn")
        raw = tiny_config()
        del raw["rope_scaling"]["factor"]
        refused(raw, "rope_scaling.factor", "missing")

    def test_sparse_mtp_layers(self) -> None:
        refused(tiny_config(mtp_mlp_layer_types=["sparse"] * 3), "mtp_mlp_layer_types")
        refused(tiny_config(moe_layers_enum=None, mlp_layer_types=["sparse"] * 9), "mlp_layer_types")

    def test_rope_parameters_without_a_needed_kind(self) -> None:
        entry = {"rope_type": "default", "rope_theta": 1e4}
        refused(tiny_config(rope_parameters={"full_attention": entry}), "rope_parameters", "sliding")
        refused(tiny_config(rope_parameters=entry), "rope_parameters")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.sampled_from(["", "3,4", "x", "dense"]),
    lambda values: st.lists(values, max_size=9) | st.dictionaries(st.sampled_from(["bits", "a"]), values),
    max_leaves=12,
)


@settings(deadline=None, max_examples=400)
@given(name=st.sampled_from([*READ, *FIXED, *ALIASES]), value=JSON, repeat=st.booleans())
def test_no_value_of_any_key_is_worse_than_refused(name: str, value: object, repeat: bool) -> None:
    raw = tiny_config() | {name: [value] * 6 if repeat else value}
    if name != "moe_layers_enum":
        del raw["moe_layers_enum"]
        raw.setdefault("mlp_layer_types", ["dense"] + ["sparse"] * 5)
    try:
        config = ModelConfig.from_hf(raw)
    except ConfigError as error:
        assert error.field in str(error)
    else:
        assert config.num_layers == len(config.layers)
