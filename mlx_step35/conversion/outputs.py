"""The small files of a converted checkpoint: config.json, the index, the sidecar's metadata, the copies."""

import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mlx_step35.checkpoint.headers import INDEX, read_json
from mlx_step35.checkpoint.plan import SIDECAR_FORMAT, SIDECAR_FORMAT_KEY
from mlx_step35.conversion.plan import Plan, Shard
from mlx_step35.quantization import QuantizationSettings

# What mlx-lm writes too; its own loader looks at names only.
SHARD_METADATA = {"format": "mlx"}

COPIED = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab*",
    "merges.txt",
    "chat_template*",
    "generation_config.json",
    "*.model",
    "*.tiktoken",
    "*.py",
    "LICENSE*",
)


def config_json(raw: Mapping[str, Any], generation: Mapping[str, Any], plan: Plan) -> dict[str, Any]:
    """The source's config with every field kept, our format version, and the new packing for the old.

    The lists stay as long as they were, because transformers refuses other lengths. The ids that end a text
    are those of all configs, since readers look at one or the other.
    """
    config = _without_packing(raw)
    configs = [raw, generation]
    if isinstance(text := config.get("text_config"), dict):
        configs.insert(1, text)
        config["text_config"] = _without_packing(text)
    if eos := list(dict.fromkeys(token for each in configs for token in _ids(each.get("eos_token_id")))):
        config["eos_token_id"] = eos
        if len(configs) == 3:
            # Where there is a text_config, its fields win.
            config["text_config"]["eos_token_id"] = eos
    config[SIDECAR_FORMAT_KEY] = int(SIDECAR_FORMAT)
    block = quantization_block(plan, plan.shards)
    if block:
        # The second name is how the hub tells that a model is quantised.
        config["quantization"] = config["quantization_config"] = block
    return dict(sorted(config.items()))


def quantization_block(plan: Plan, shards: tuple[Shard, ...]) -> dict[str, Any]:
    """mlx-lm's form: the commonest packing as default, every other module by path."""
    choices = {
        job.weight.path: job.quantization
        for shard in shards
        for job in shard.jobs
        if job.quantization is not None
    }
    if not choices:
        return {}
    default = Counter(choices.values()).most_common(1)[0][0]
    others = {path: choice for path, choice in choices.items() if choice != default}
    return QuantizationSettings(default, others).as_block()


def sidecar_metadata(plan: Plan, revision: str) -> dict[str, str]:
    """All a reader needs to use the MTP layers beside somebody's checkpoint."""
    assert plan.sidecar is not None
    return {
        **SHARD_METADATA,
        SIDECAR_FORMAT_KEY: SIDECAR_FORMAT,
        "source_revision": revision,
        "quantization": json.dumps(quantization_block(plan, (plan.sidecar,)), sort_keys=True),
    }


def index_json(plan: Plan) -> dict[str, Any]:
    """The index of the backbone's shards; the sidecar is found by its name and never listed."""
    tensors = {tensor.name: (shard.name, tensor.nbytes) for shard in plan.shards for tensor in shard.tensors}
    parameters = sum(job.weight.num_parameters for shard in plan.shards for job in shard.jobs)
    return {
        "metadata": {
            "total_size": sum(nbytes for _, nbytes in tensors.values()),
            "total_parameters": parameters,
        },
        "weight_map": {name: tensors[name][0] for name in sorted(tensors)},
    }


def small_files(source: Path, raw: Mapping[str, Any], plan: Plan) -> dict[str, bytes]:
    """All that stands beside the weights, by name: tokenizer, template and generation config byte for byte,
    then index and config, without which a directory is no checkpoint."""
    generation = read_generation_config(source)
    # The hub's cache holds links to files; a directory is nothing of a tokenizer.
    copied = [file for pattern in COPIED for file in sorted(source.glob(pattern)) if file.is_file()]
    return {
        **{file.name: file.read_bytes() for file in copied},
        INDEX: _json(index_json(plan)),
        "config.json": _json(config_json(raw, generation, plan)),
    }


def read_generation_config(source: Path) -> dict[str, Any]:
    """The parsed generation_config.json, {} when there is none."""
    path = source / "generation_config.json"
    return read_json(path) if path.exists() else {}


def _without_packing(config: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in config.items() if key not in ("quantization", "quantization_config")}


def _json(content: Mapping[str, Any]) -> bytes:
    return (json.dumps(content, indent=4, ensure_ascii=False) + "\n").encode()


def _ids(value: object) -> list[int]:
    if isinstance(value, int):
        return [value]
    return [item for item in value if isinstance(item, int)] if isinstance(value, list) else []
