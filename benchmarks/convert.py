"""Memory and speed of conversion on a generated checkpoint of several gigabytes, beside mlx-lm's converter.

    python benchmarks/convert.py --dir DIR

Each converter runs in a process of its own; peak memory is what the operating system counted for it, and so
is the CPU time, which other programs on the machine disturb less than they do the wall clock. The
bound is twice the largest output tensor plus 1 GiB. mlx-lm is called as its command line does it, without the
tokenizer. Neither converts the MTP layers, since mlx-lm cannot.
"""

import argparse
import json
import os
import platform
import shutil
import struct
import subprocess
import sys
import time
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

OURS = """
import sys
from mlx_step35.convert import convert
convert(sys.argv[1], sys.argv[2], True, q_bits=int(sys.argv[3]), mtp="drop", verify=len(sys.argv) > 4)
"""
THEIRS = """
import sys
from pathlib import Path
from mlx_lm.utils import load_model, quantize_model, save_config, save_model
model, config = load_model(Path(sys.argv[1]), lazy=True)
model, config = quantize_model(model, config, None, int(sys.argv[3]))
save_model(sys.argv[2], model, donate_model=True)
save_config(config, Path(sys.argv[2]) / "config.json")
"""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dir", type=Path, required=True, help="scratch directory; 20 GB at the defaults")
    parser.add_argument("--moe-layers", type=int, default=2)
    parser.add_argument("--experts", type=int, default=192, help="192 make stacks of 1.6 GB")
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument(
        "--fp8", action="store_true", help="experts as in the FP8 release; mlx-lm has no part"
    )
    parser.add_argument("--verify", action="store_true")
    parser.add_argument("--no-mlx-lm", action="store_true")
    parser.add_argument("--keep", action="store_true", help="keep the generated checkpoint")
    given = parser.parse_args()
    given.dir.mkdir(parents=True, exist_ok=True)
    source = given.dir / "source"
    if not source.exists():
        generate(source, given.moe_layers, given.experts, given.fp8)
    # The last shard holds the MTP layer.
    size = sum(file.stat().st_size for file in sorted(source.glob("*.safetensors"))[:-1])
    largest = given.experts * 1024 * 4096 * given.bits // 8
    result: dict[str, Any] = {
        "machine": f"{platform.platform()}, {os.cpu_count()} cores",
        "source_bytes": size,
        "bound_bytes": 2 * largest + (1 << 30),
        "mlx_step35": measure(
            OURS, source, given.dir / "ours", given.bits, ["verify"] if given.verify else []
        ),
    }
    if not (given.no_mlx_lm or given.fp8):
        result["mlx_lm"] = measure(THEIRS, source, given.dir / "theirs", given.bits, [])
    for name in ("mlx_step35", "mlx_lm"):
        if name in result:
            for clock in ("seconds", "cpu_seconds"):
                result[name][f"MB_per_{clock[:-1]}"] = round(size / 1e6 / result[name][clock], 1)
    result["within_bound"] = result["mlx_step35"]["peak_bytes"] <= result["bound_bytes"]
    for directory in ("ours", "theirs", *([] if given.keep else ["source"])):
        shutil.rmtree(given.dir / directory, ignore_errors=True)
    print(json.dumps(result, indent=1))
    sys.exit(not result["within_bound"])


def measure(script: str, source: Path, target: Path, bits: int, more: list[str]) -> dict[str, Any]:
    """Seconds and peak resident bytes of one conversion; a fork of this small process hides nothing."""
    shutil.rmtree(target, ignore_errors=True)
    began = time.perf_counter()
    process = subprocess.Popen([sys.executable, "-c", script, str(source), str(target), str(bits), *more])
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    seconds = time.perf_counter() - began
    unit = 1 if sys.platform == "darwin" else 1024
    return {
        "seconds": round(seconds, 1),
        "cpu_seconds": round(usage.ru_utime + usage.ru_stime, 1),
        "peak_bytes": usage.ru_maxrss * unit,
        "exit_status": process.returncode,
    }


def generate(path: Path, moe_layers: int, experts: int, fp8: bool) -> None:
    """A model with few layers of almost real width, one tensor per expert stack, random but repeating."""
    path.mkdir(parents=True)
    layers = 1 + moe_layers
    hidden, width, vocabulary, intermediate = 4096, 1024, 32000, 8192
    raw = {
        "model_type": "step3p5", "hidden_size": hidden, "intermediate_size": intermediate,
        "vocab_size": vocabulary, "num_hidden_layers": layers, "num_nextn_predict_layers": 1,
        "max_position_embeddings": 4096, "torch_dtype": "bfloat16", "num_attention_heads": 64,
        "num_attention_groups": 8, "head_dim": 128,
        "layer_types": ["full_attention"] * layers + ["sliding_attention"],
        "attention_other_setting": {
            "attention_type": "sliding_attention", "num_attention_heads": 96, "num_attention_groups": 8,
            "head_dim": 128, "true_head_dim": 128,
        },
        "sliding_window": 512, "rope_theta": [5e6] * layers + [1e4],
        "partial_rotary_factors": [0.5] * layers + [1.0], "use_head_wise_attn_gate": True,
        "moe_num_experts": experts, "moe_top_k": 8, "moe_intermediate_size": width, "share_expert_dim": width,
        "moe_layers_enum": ",".join(str(1 + k) for k in range(moe_layers)),
        "moe_router_activation": "sigmoid", "moe_router_scaling_factor": 3.0, "norm_expert_weight": True,
        "bos_token_id": 0, "eos_token_id": [1], "tie_word_embeddings": False,
    }  # fmt: skip
    (path / "config.json").write_text(json.dumps(raw))
    shards: list[dict[str, tuple[int, ...]]] = [
        {"model.embed_tokens.weight": (vocabulary, hidden), "model.norm.weight": (hidden,)}
    ]
    shards[0]["lm_head.weight"] = (vocabulary, hidden)
    for index in range(layers + 1):
        tensors = _layer(f"model.layers.{index}.", 64 if index < layers else 96, hidden)
        if 0 < index < layers:
            tensors |= _moe(f"model.layers.{index}.", experts, width, hidden)
        else:
            tensors |= _mlp(f"model.layers.{index}.mlp.", intermediate, hidden)
        if index == layers:
            prefix = f"model.layers.{index}."
            tensors |= {f"{prefix}{name}.weight": (hidden,) for name in ("enorm", "hnorm")}
            tensors[f"{prefix}eh_proj.weight"] = (hidden, 2 * hidden)
            tensors[f"{prefix}transformer.shared_head.norm.weight"] = (hidden,)
            tensors[f"{prefix}transformer.shared_head.output.weight"] = (vocabulary, hidden)
        shards.append(tensors)
    weight_map = {}
    for number, tensors in enumerate(shards, 1):
        file = f"model-{number:05d}.safetensors"
        tensors = _to_fp8(tensors) if fp8 else tensors
        _write(path / file, tensors, fp8)
        weight_map.update(dict.fromkeys(tensors, file))
    (path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def _layer(prefix: str, heads: int, hidden: int) -> dict[str, tuple[int, ...]]:
    return {
        f"{prefix}input_layernorm.weight": (hidden,),
        f"{prefix}post_attention_layernorm.weight": (hidden,),
        f"{prefix}self_attn.q_proj.weight": (heads * 128, hidden),
        f"{prefix}self_attn.k_proj.weight": (1024, hidden),
        f"{prefix}self_attn.v_proj.weight": (1024, hidden),
        f"{prefix}self_attn.o_proj.weight": (hidden, heads * 128),
        f"{prefix}self_attn.g_proj.weight": (heads, hidden),
        f"{prefix}self_attn.q_norm.weight": (128,),
        f"{prefix}self_attn.k_norm.weight": (128,),
    }


def _mlp(prefix: str, width: int, hidden: int, experts: tuple[int, ...] = ()) -> dict[str, tuple[int, ...]]:
    return {
        f"{prefix}gate_proj.weight": (*experts, width, hidden),
        f"{prefix}up_proj.weight": (*experts, width, hidden),
        f"{prefix}down_proj.weight": (*experts, hidden, width),
    }


def _moe(prefix: str, experts: int, width: int, hidden: int) -> dict[str, tuple[int, ...]]:
    return {
        f"{prefix}moe.gate.weight": (experts, hidden),
        f"{prefix}moe.router_bias": (experts,),
        **_mlp(f"{prefix}moe.", width, hidden, (experts,)),
        **_mlp(f"{prefix}share_expert.", width, hidden),
    }


def _to_fp8(tensors: dict[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """The FP8 release's form: a scale for each 128x128 block beside every stack of experts."""
    scales = {
        f"{name}_scale_inv": (shape[0], -(-shape[1] // 128), -(-shape[2] // 128))
        for name, shape in tensors.items()
        if len(shape) == 3
    }
    return tensors | scales


def _write(path: Path, tensors: dict[str, tuple[int, ...]], fp8: bool) -> None:
    values = np.random.default_rng(0).normal(0, 0.05, 16 << 20).astype(np.float32)
    bits = (values.view(np.uint32) >> 16).astype(np.uint16)
    # Any byte without the exponent's highest bit is an FP8 number between -2 and 2.
    blocks = {
        "BF16": bits.tobytes(),
        "F8_E4M3": (bits & 0xBF).astype(np.uint8).tobytes(),
        "F32": np.ones(1 << 18, np.float32).tobytes(),
    }
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    dtypes = {}
    end = 0
    for name, shape in tensors.items():
        in_float32 = name.endswith(("router_bias", "_scale_inv"))
        dtypes[name] = "F32" if in_float32 else "F8_E4M3" if fp8 and len(shape) == 3 else "BF16"
        nbytes = prod(shape) * {"F32": 4, "BF16": 2, "F8_E4M3": 1}[dtypes[name]]
        header[name] = {"dtype": dtypes[name], "shape": shape, "data_offsets": [end, end + nbytes]}
        end += nbytes
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name in tensors:
            start, end = header[name]["data_offsets"]
            block, left = blocks[dtypes[name]], end - start
            while left:
                left -= file.write(block[: min(left, len(block))])


if __name__ == "__main__":
    main()
