"""Random checkpoints in the release's layout: bfloat16 or FP8 shards, MTP layers in the first, files beside.

Sizes are chosen so that groups of 64 divide every row and FP8 blocks of 128 have ragged edges both ways.
"""

import hashlib
import json
import struct
from collections.abc import Mapping
from math import ceil, prod
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from tests.tiny import tiny_config, tiny_weights

# dtype, shape, bytes
Stored = tuple[str, tuple[int, ...], bytes]

NUMPY = {
    "BF16": np.uint16,
    "F16": np.float16,
    "F32": np.float32,
    "U32": np.uint32,
    "U8": np.uint8,
    "F8_E4M3": np.uint8,
}


def release_config(**changes: Any) -> dict[str, Any]:
    """The tiny model, widened for quantisation."""
    sizes: dict[str, Any] = {
        "hidden_size": 320,
        "intermediate_size": 192,
        "moe_intermediate_size": 192,
        "share_expert_dim": 192,
        "vocab_size": 64,
        "head_dim": 32,
        "moe_num_experts": 4,
        "moe_top_k": 2,
        "torch_dtype": "bfloat16",
        "attention_other_setting": {
            "attention_type": "sliding_attention",
            "num_attention_heads": 6,
            "num_attention_groups": 2,
            "head_dim": 32,
            "true_head_dim": 32,
        },
    }
    return tiny_config(**{**sizes, **changes})


def release_tensors(raw: Mapping[str, Any], seed: int = 0, dtype: str = "BF16") -> dict[str, Stored]:
    """Original names -> stored tensors; the router's bias is float32 as in the release."""
    return {
        name: stored(array, "F32" if name.endswith("router_bias") else dtype)
        for name, array in tiny_weights(raw, seed).items()
    }


def stored(array: np.ndarray, dtype: str) -> Stored:
    """Float32 values in some dtype of a safetensors file."""
    if dtype == "BF16":
        data = bytes(memoryview(mx.array(array).astype(mx.bfloat16).view(mx.uint16)))
    elif dtype == "F8_E4M3":
        data = bytes(memoryview(mx.to_fp8(mx.array(array))))
    else:
        data = array.astype(NUMPY[dtype]).tobytes()
    return dtype, array.shape, data


def values(tensor: Stored) -> np.ndarray:
    """A stored tensor as float32 (or as integers, for packed ones)."""
    dtype, shape, data = tensor
    array = np.frombuffer(data, NUMPY[dtype]).reshape(shape)
    if dtype == "BF16":
        return (array.astype(np.uint32) << 16).view(np.float32)
    if dtype == "F8_E4M3":
        return fp8_values(array)
    return array.astype(np.float32) if dtype == "F16" else array


def fp8_values(bits: np.ndarray) -> np.ndarray:
    """float8_e4m3fn by its definition: sign, 4 exponent bits with bias 7, 3 bits of mantissa, no infinity."""
    exponent, mantissa = (bits >> 3) & 15, (bits & 7).astype(np.float32)
    normal = (1 + mantissa / 8) * np.float32(2.0) ** (exponent.astype(np.float32) - 7)
    magnitude = np.where(exponent == 0, mantissa / 8 * np.float32(2.0**-6), normal)
    return np.where(bits & 0x80, -magnitude, magnitude).astype(np.float32)


def to_fp8(
    tensors: Mapping[str, Stored], scale_dtype: str = "F32", scale_shape: str = "blocks"
) -> dict[str, Stored]:
    """The FP8 release's form: routed experts in e4m3, a scale per 128x128 block, per expert or for all."""
    result: dict[str, Stored] = {}
    for name, tensor in tensors.items():
        if ".moe." not in name or not name.endswith("proj.weight"):
            result[name] = tensor
            continue
        array = values(tensor)
        experts, rows, columns = array.shape
        shape = {
            "blocks": (experts, ceil(rows / 128), ceil(columns / 128)),
            "experts": (experts,),
            "one": (1,),
            "none": (),
        }[scale_shape]
        scale = np.random.default_rng(len(name)).uniform(0.5, 2, shape).astype(np.float32)
        scale = values(stored(scale, scale_dtype))
        result[name] = stored(array / block_scales(scale, array.shape), "F8_E4M3")
        result[f"{name}_scale_inv"] = stored(scale, scale_dtype)
    return result


def block_scales(scale: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Every weight's scale."""
    if scale.ndim == 3:
        full = np.repeat(np.repeat(scale, 128, axis=1), 128, axis=2)
        return full[:, : shape[1], : shape[2]]
    return np.broadcast_to(scale.reshape(-1, 1, 1), shape)


def write_release(
    path: Path, raw: Mapping[str, Any] | None = None, tensors: Mapping[str, Stored] | None = None
) -> Path:
    """Write four shards, the MTP layers in the first, and the small files that are copied."""
    raw = release_config() if raw is None else raw
    tensors = release_tensors(raw) if tensors is None else tensors
    path.mkdir(parents=True)
    count = raw["num_hidden_layers"]
    heads = [
        name for name in tensors if name.startswith(tuple(f"model.layers.{count + k}." for k in range(3)))
    ]
    rest = [name for name in tensors if name not in heads]
    size = -(-len(rest) // 3)
    groups = [group for group in (heads, rest[:size], rest[size : 2 * size], rest[2 * size :]) if group]
    weight_map = {}
    for number, names in enumerate(groups, 1):
        file = f"model-{number:05d}.safetensors"
        write_safetensors(path / file, {name: tensors[name] for name in names})
        weight_map.update(dict.fromkeys(names, file))
    (path / "config.json").write_text(json.dumps(raw))
    (path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (path / "generation_config.json").write_text('{"bos_token_id": 0,  "eos_token_id": [1, 7]}')
    (path / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}\n')
    (path / "chat_template.jinja").write_text("{{ messages }}\n")
    (path / "README.md").write_text("---\nlicense: apache-2.0\n---\nThe original card.\n")
    return path


def write_safetensors(
    path: Path, tensors: Mapping[str, Stored], metadata: Mapping[str, str] | None = None
) -> None:
    header: dict[str, Any] = {"__metadata__": dict(metadata or {"format": "pt"})}
    end = 0
    for name, (dtype, shape, data) in tensors.items():
        assert len(data) == prod(shape) * np.dtype(NUMPY[dtype]).itemsize
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [end, end + len(data)]}
        end += len(data)
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + b"".join(data for _, _, data in tensors.values()))


def read_safetensors(path: Path) -> tuple[dict[str, Stored], dict[str, str]]:
    """Every tensor of a file, and its metadata."""
    content = path.read_bytes()
    length = struct.unpack("<Q", content[:8])[0]
    header = json.loads(content[8 : 8 + length])
    metadata = header.pop("__metadata__", {})
    tensors = {}
    for name, entry in header.items():
        start, end = (8 + length + offset for offset in entry["data_offsets"])
        tensors[name] = (entry["dtype"], tuple(entry["shape"]), content[start:end])
    return tensors, metadata


def read_output(path: Path) -> dict[str, Stored]:
    """All tensors of a converted directory, sidecar included."""
    tensors: dict[str, Stored] = {}
    for file in sorted(path.glob("*.safetensors")):
        tensors |= read_safetensors(file)[0]
    return tensors


def digests(path: Path) -> dict[str, str]:
    """A hash per file of a directory."""
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted(path.iterdir())}
