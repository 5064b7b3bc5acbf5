"""A random model with every branch of the real one, small enough to build in milliseconds.

`tiny_config()` is a config.json in the release's form (window 8, vocabulary 32, dense and sparse layers,
both clamps, llama3 scaling, three MTP layers); `tiny_weights` are the matching tensors under the release's
names, norms stored as w; `write_checkpoint` puts both into a directory that `load_checkpoint` reads.
"""

import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_step35.config import ModelConfig
from mlx_step35.layout import backbone_weights, mtp_weights

VOCAB_SIZE = 32
WINDOW = 8

_ORIGINAL = (
    (".mlp.switch_mlp.", ".moe."),
    (".mlp.gate.gate.", ".moe.gate."),
    (".mlp.gate.router_bias", ".moe.router_bias"),
    (".mlp.share_expert.", ".share_expert."),
)


def tiny_config(**changes: Any) -> dict[str, Any]:
    """A config.json as the release writes it; `changes` replace or (None) remove keys."""
    num_layers, num_mtp = 6, 3
    total = num_layers + num_mtp
    kinds = (["full_attention", *["sliding_attention"] * 3] * 3)[:total]
    # The tail describes the MTP layers: sliding, whatever the period says.
    kinds[num_layers:] = ["sliding_attention"] * num_mtp
    full = [kind == "full_attention" for kind in kinds]
    raw: dict[str, Any] = {
        "architectures": ["Step3p5ForCausalLM"],
        "model_type": "step3p5",
        "hidden_size": 64,
        "intermediate_size": 96,
        "vocab_size": VOCAB_SIZE,
        "num_hidden_layers": num_layers,
        "num_nextn_predict_layers": num_mtp,
        "max_seq_len": 4096,
        "max_position_embeddings": 4096,
        "torch_dtype": "float32",
        "num_attention_heads": 4,
        "num_attention_groups": 2,
        "head_dim": 16,
        "attention_other_setting": {
            "attention_type": "sliding_attention",
            "num_attention_heads": 6,
            "num_attention_groups": 2,
            "head_dim": 16,
            "true_head_dim": 16,
        },
        "layer_types": kinds,
        "sliding_window": WINDOW,
        "sink": False,
        "rope_theta": [5e6 if is_full else 1e4 for is_full in full],
        "partial_rotary_factors": [0.5 if is_full else 1.0 for is_full in full],
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 2.0,
            "original_max_position_embeddings": 64,
            "low_freq_factor": 1.0,
            "high_freq_factor": 32.0,
        },
        "yarn_only_types": ["full_attention"],
        "use_rope_layers": [],
        "use_qk_norm": True,
        "use_head_wise_attn_gate": True,
        "zero_centered": True,
        "att_impl_type": "GQA",
        "use_moe": True,
        "moe_num_experts": 8,
        "moe_top_k": 3,
        "moe_layers_enum": "1,2,3,4,5",
        "moe_layer_offset": 0,
        "moe_every_n_layer": 1,
        "moe_intermediate_size": 32,
        "share_expert_dim": 32,
        "moe_router_activation": "sigmoid",
        "moe_router_scaling_factor": 3.0,
        "norm_expert_weight": True,
        "use_moe_router_bias": True,
        "need_fp32_gate": True,
        # Low enough to be hit by random weights.
        "swiglu_limits": [0.0, 0.0, 0.0, 0.0, 0.3, 0.3, 0.0, 0.0, 0.0],
        "swiglu_limits_shared": [0.0, 0.0, 0.0, 0.0, 0.0, 0.5, 0.0, 0.0, 0.0],
        "tie_word_embeddings": False,
        "bos_token_id": 0,
        "eos_token_id": [1, 2, 31],
    }
    raw.update(changes)
    return {key: value for key, value in raw.items() if value is not None}


def tiny_weights(raw: Mapping[str, Any], seed: int = 0, mtp: bool = True) -> dict[str, np.ndarray]:
    """Random float32 tensors under the release's names, large enough for every branch to matter."""
    config = ModelConfig.from_hf(raw)
    generator = np.random.default_rng(seed)
    tensors = {}
    for weight in backbone_weights(config) + (mtp_weights(config) if mtp else []):
        spread = {"norm": 0.2, "bias": 0.3, "embedding": 1.0, "router": 0.3}.get(
            weight.kind, weight.shape[-1] ** -0.5 * 1.5
        )
        tensors[original_name(weight.name, config.num_layers)] = generator.normal(
            0, spread, weight.shape
        ).astype(np.float32)
    return tensors


def original_name(name: str, num_layers: int) -> str:
    """The release's name of a parameter."""
    if name.startswith("mtp.layers."):
        number, rest = name.removeprefix("mtp.layers.").split(".", 1)
        return f"model.layers.{num_layers + int(number)}.{rest}".replace(
            ".shared_head.", ".transformer.shared_head."
        )
    for converted, original in _ORIGINAL:
        if converted in name:
            return name.replace(converted, original)
    return name


def write_checkpoint(
    path: Path,
    raw: Mapping[str, Any] | None = None,
    tensors: Mapping[str, np.ndarray] | None = None,
    num_shards: int = 2,
    dtype: str = "F32",
) -> Path:
    """Write config, shards and index in the release's layout; returns the directory."""
    raw = tiny_config() if raw is None else raw
    tensors = tiny_weights(raw) if tensors is None else tensors
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").write_text(json.dumps(raw))
    names = sorted(tensors)
    weight_map = {}
    for shard in range(num_shards):
        file = f"model-{shard + 1:05d}-of-{num_shards:05d}.safetensors"
        part = {name: tensors[name] for name in names[shard::num_shards]}
        save_tensors(path / file, part, dtype)
        weight_map.update(dict.fromkeys(part, file))
    index = {"metadata": {}, "weight_map": weight_map}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    return path


def save_tensors(
    file: Path,
    tensors: Mapping[str, np.ndarray],
    dtype: str = "F32",
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write float arrays as F32 or BF16 (router biases stay F32, as in the release)."""
    header: dict[str, Any] = {"__metadata__": dict(metadata or {})}
    blobs: list[bytes] = []
    end = 0
    for name, array in tensors.items():
        kind = "F32" if name.endswith("router_bias") else dtype
        blob = array.astype(np.float32).tobytes() if kind == "F32" else _bf16(array)
        header[name] = {
            "dtype": kind,
            "shape": list(array.shape),
            "data_offsets": [end, end + len(blob)],
        }
        end += len(blob)
        blobs.append(blob)
    text = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + b"".join(blobs))


def _bf16(array: np.ndarray) -> bytes:
    """Round to nearest even, as PyTorch does."""
    return bytes(memoryview(mx.array(array.astype(np.float32)).astype(mx.bfloat16).view(mx.uint16)))
