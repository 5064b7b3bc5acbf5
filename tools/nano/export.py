"""Write a trained state as a checkpoint in the layout of the original release: config, bf16 shards, index.

python -m tools.nano.export --state build/nano/state.pt
"""

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from tools.nano.data import NANO
from tools.nano.model import Nano, NanoConfig

IM_END = "<|im_end|>"
NUM_SHARDS = 3


def hf_config(config: NanoConfig, im_end: int) -> dict[str, Any]:
    """config.json with the same keys as the release; per-layer lists include the MTP layers."""
    total = config.num_layers + config.num_mtp_layers
    sliding = [config.is_sliding(i) for i in range(total)]
    return {
        "architectures": ["Step3p5ForCausalLM"],
        "model_type": "step3p5",
        "auto_map": {
            "AutoConfig": "configuration_step3p5.Step3p5Config",
            "AutoModelForCausalLM": "modeling_step3p5.Step3p5ForCausalLM",
        },
        "rope_scaling": config.scaling,
        "yarn_only_types": ["full_attention"],
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_nextn_predict_layers": config.num_mtp_layers,
        "max_seq_len": 32768,
        "max_position_embeddings": 32768,
        "vocab_size": config.vocab_size,
        "torch_dtype": "bfloat16",
        "use_qk_norm": True,
        "moe_layers_enum": ",".join(str(i) for i in range(total) if config.is_moe(i)),
        "moe_every_n_layer": 1,
        "moe_layer_offset": 0,
        "use_moe": True,
        "moe_num_experts": config.num_experts,
        "moe_top_k": config.top_k,
        "moe_intermediate_size": config.moe_intermediate_size,
        "share_expert_dim": config.share_expert_dim,
        "norm_expert_weight": True,
        "use_moe_router_bias": True,
        "moe_router_activation": "sigmoid",
        "moe_router_scaling_factor": config.router_scaling_factor,
        "need_fp32_gate": True,
        "att_impl_type": "GQA",
        "num_attention_heads": config.full_heads,
        "num_attention_groups": config.num_kv_heads,
        "head_dim": config.head_dim,
        "attention_other_setting": {
            "attention_type": "sliding_attention",
            "num_attention_heads": config.sliding_heads,
            "num_attention_groups": config.num_kv_heads,
            "head_dim": config.head_dim,
            "true_head_dim": config.head_dim,
        },
        "layer_types": ["sliding_attention" if s else "full_attention" for s in sliding],
        "sliding_window": config.window,
        "sink": False,
        "use_head_wise_attn_gate": True,
        "use_rope_layers": [],
        "rope_theta": [config.sliding_theta if s else config.full_theta for s in sliding],
        "partial_rotary_factors": [1.0 if s else config.full_rotary for s in sliding],
        "zero_centered": True,
        "swiglu_limits": [float(x) for x in config.swiglu_limits],
        "swiglu_limits_shared": [float(x) for x in config.swiglu_limits_shared],
        "tie_word_embeddings": False,
        "bos_token_id": 0,
        "eos_token_id": [1, 2, im_end],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--state", type=Path, default=Path("build/nano/state.pt"))
    parser.add_argument("--out", type=Path, default=NANO)
    args = parser.parse_args()
    config = NanoConfig()
    model = Nano(config)
    model.load_state_dict(torch.load(args.state)["model"])
    tensors = {
        name: value.float() if name.endswith("router_bias") else value.bfloat16()
        for name, value in model.state_dict().items()
    }
    tokens = json.loads((args.out / "tokenizer.json").read_text())["added_tokens"]
    im_end = next(token["id"] for token in tokens if token["content"] == IM_END)

    # As in the release, the MTP layers sit in the first shards.
    names = sorted(tensors, key=lambda name: (_layer(name) < config.num_layers, _layer(name), name))
    sizes = {name: tensors[name].nbytes for name in names}
    total = sum(sizes.values())
    shards: list[dict[str, torch.Tensor]] = [{} for _ in range(NUM_SHARDS)]
    written = 0
    for name in names:
        shards[min(NUM_SHARDS - 1, written * NUM_SHARDS // total)][name] = tensors[name].contiguous()
        written += sizes[name]
    weight_map = {}
    for number, shard in enumerate(shards, 1):
        file = f"model-{number:05}-of-{NUM_SHARDS:05}.safetensors"
        save_file(shard, args.out / file, metadata={"format": "pt"})
        (args.out / file).chmod(0o644)
        weight_map.update(dict.fromkeys(shard, file))
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    _write(args.out / "model.safetensors.index.json", index)
    _write(args.out / "config.json", hf_config(config, im_end))
    _write(args.out / "generation_config.json", {"bos_token_id": 0, "eos_token_id": [1, 2, im_end]})
    parameters = sum(value.numel() for value in tensors.values())
    print(f"{parameters:,} parameters, {total:,} bytes in {NUM_SHARDS} shards in {args.out}")


def _layer(name: str) -> int:
    """Number of the layer a tensor belongs to; what stands before or after all layers counts as layer 0."""
    parts = name.split(".")
    return int(parts[2]) if parts[1] == "layers" else 0


def _write(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n")


if __name__ == "__main__":
    main()
