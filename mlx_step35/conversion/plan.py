"""What becomes of every source tensor: pure, from names, config and recipe, so a dry run needs no weights.

Every source tensor is used exactly once or named as dropped; anything else is an error. `check_source`
compares the plan with headers once there are some.
"""

import json
from collections.abc import Collection, Iterator, Mapping
from dataclasses import asdict, dataclass
from hashlib import sha256
from math import ceil, prod
from typing import Literal

from mlx_step35.checkpoint.headers import Entry
from mlx_step35.checkpoint.names import is_original_backbone, parameter_name, text_name
from mlx_step35.config import ModelConfig
from mlx_step35.config.fields import MAX_MTP_LAYERS
from mlx_step35.errors import CheckpointError, RequestError
from mlx_step35.layout import (
    Recipe,
    Tensor,
    Weight,
    backbone_weights,
    mtp_weights,
    stored_tensors,
)
from mlx_step35.quantization import Quantization

MTPChoice = Literal["keep", "drop", "only"]

# mlx-lm's limit; its loader does not care, the hub and file systems do.
MAX_SHARD_BYTES = 5 << 30
FP8_BLOCK = 128

SCALE_SUFFIXES = ("_scale_inv", "_scale")


@dataclass(frozen=True, slots=True)
class Job:
    """One weight: the source tensor it comes from, and the tensors it becomes.

    `is_original` says that a norm still lacks its 1. `scale` is the FP8 scale's name; `packed` how an MLX
    source packed the weight, whose scales and biases are then `beside` it.
    """

    weight: Weight
    source: str
    is_original: bool
    scale: str | None
    packed: Quantization | None
    beside: tuple[str, ...]
    quantization: Quantization | None
    outputs: tuple[Tensor, ...]


@dataclass(frozen=True, slots=True)
class Shard:
    """One output file."""

    name: str
    jobs: tuple[Job, ...]

    @property
    def tensors(self) -> list[Tensor]:
        return [tensor for job in self.jobs for tensor in job.outputs]

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors)


@dataclass(frozen=True, slots=True)
class Plan:
    """The whole conversion. `dropped` maps source tensors that are not used to the reason."""

    recipe: Recipe
    shards: tuple[Shard, ...]
    sidecar: Shard | None
    dropped: Mapping[str, str]

    @property
    def files(self) -> tuple[Shard, ...]:
        return self.shards if self.sidecar is None else (*self.shards, self.sidecar)

    @property
    def jobs(self) -> Iterator[Job]:
        return (job for shard in self.files for job in shard.jobs)

    @property
    def nbytes(self) -> int:
        return sum(shard.nbytes for shard in self.files)

    def digest(self) -> str:
        """Equal for equal plans: what a resumed conversion must agree on."""
        text = json.dumps(asdict(self), sort_keys=True)
        return sha256(text.encode()).hexdigest()


def make_plan(
    names: Collection[str],
    config: ModelConfig,
    recipe: Recipe,
    mtp: MTPChoice,
    *,
    packed: Mapping[str, Quantization] | None = None,
    written_by_mlx: bool = False,
) -> Plan:
    """Decide everything. `packed` is how an MLX source packed those of its modules that have scales; the last
    argument is what the files' metadata say of their writer, which matters only for a model without experts.

    Raises CheckpointError for missing or unknown tensors, RequestError for a recipe the shapes do not allow.
    """
    found = _Names(names, config, packed or {}, written_by_mlx)
    heads = mtp_weights(config)
    if mtp != "drop" and not any(found.has(weight) for weight in heads):
        raise RequestError("the source has no MTP layers; --mtp drop converts without them", field="mtp")
    jobs = [] if mtp == "only" else [found.job(weight, recipe) for weight in backbone_weights(config)]
    head_jobs = [] if mtp == "drop" else [found.job(weight, recipe) for weight in heads]
    if mtp == "only":
        found.drop(("model.", "lm_head."), "--mtp only")
    # Also layers that the config does not announce.
    found.drop(("mtp.",), "--mtp drop" if mtp == "drop" else "not in the config")
    sidecar = Shard("mtp.safetensors", tuple(head_jobs)) if head_jobs else None
    return Plan(recipe, _shards(jobs), sidecar, found.finish())


def check_source(plan: Plan, entries: Mapping[str, Entry]) -> None:
    """Raise CheckpointError for the first tensor whose shape or dtype is not what the plan expects."""
    for job in plan.jobs:
        entry = entries[job.source]
        shape = job.weight.shape
        if job.packed is not None:
            stored = stored_tensors(job.weight, job.packed, "BF16")
            for name, tensor in zip((job.source, *job.beside), stored, strict=True):
                _check_shape(name, entries[name], tensor.shape)
            continue
        _check_shape(job.source, entry, shape)
        if entry.dtype == "F8_E4M3":
            if job.scale is None:
                raise CheckpointError(f"'{job.source}' is FP8 and has no scale '{job.source}_scale_inv'")
            _check_scale(job, entries[job.scale])
        elif job.scale is not None:
            raise CheckpointError(f"'{job.scale}' scales '{job.source}', which is {entry.dtype}, not FP8")
        elif entry.dtype not in ("BF16", "F16", "F32"):
            raise CheckpointError(f"'{job.source}' is {entry.dtype}; expected a floating-point weight or FP8")


class _Names:
    """The source's tensors by parameter path, ticked off as the plan uses them."""

    def __init__(
        self,
        names: Collection[str],
        config: ModelConfig,
        packed: Mapping[str, Quantization],
        written_by_mlx: bool,
    ) -> None:
        self._packed = packed
        self._left: dict[str, tuple[str, bool]] = {}
        self._dropped: dict[str, str] = {}
        texts = {stored: name for stored in names if (name := text_name(stored)) is not None}
        self._dropped.update(dict.fromkeys(sorted(set(names) - set(texts)), "vision"))
        outside = tuple(f"model.layers.{config.num_layers + k}." for k in range(MAX_MTP_LAYERS))
        backbone = (name for name in texts.values() if not name.startswith(("mtp.", *outside)))
        is_original = is_original_backbone(backbone, written_by_mlx)
        for stored, text in texts.items():
            parameter = parameter_name(text, config.num_layers, is_original)
            if parameter.name in self._left:
                raise CheckpointError(f"'{stored}' and '{self._left[parameter.name][0]}' are the same tensor")
            self._left[parameter.name] = (stored, parameter.is_original)

    def has(self, weight: Weight) -> bool:
        return weight.name in self._left

    def job(self, weight: Weight, recipe: Recipe) -> Job:
        if weight.name not in self._left:
            raise CheckpointError(f"the source has no '{weight.name}' under this or its original name")
        source, is_original = self._left.pop(weight.name)
        quantization = recipe.choice(weight.path) if weight.is_quantizable else None
        outputs = stored_tensors(weight, quantization, recipe.dtype)
        packed = self._packing(weight)
        beside = [self._take(tensor.name) for tensor in stored_tensors(weight, packed, recipe.dtype)[1:]]
        scale = next(
            (self._take(weight.name + end) for end in SCALE_SUFFIXES if weight.name + end in self._left), None
        )
        return Job(weight, source, is_original, scale, packed, tuple(beside), quantization, outputs)

    def drop(self, starts: tuple[str, ...], reason: str) -> None:
        """Set aside everything whose parameter path begins so."""
        for name in [name for name in self._left if name.startswith(starts)]:
            self._dropped[self._left.pop(name)[0]] = reason

    def finish(self) -> dict[str, str]:
        """What was dropped. Raises CheckpointError if anything has neither been used nor dropped."""
        left = [stored for stored, _ in self._left.values()]
        if left:
            if left[0].endswith(SCALE_SUFFIXES):
                raise CheckpointError(f"'{left[0]}' scales no tensor of the source")
            more = f" and {len(left) - 1} more" if len(left) > 1 else ""
            raise CheckpointError(f"the source has tensors this model does not: '{left[0]}'{more}")
        return self._dropped

    def _packing(self, weight: Weight) -> Quantization | None:
        scales = self._left.get(f"{weight.path}.scales")
        if scales is None:
            return None
        if weight.path not in self._packed:
            raise CheckpointError(
                f"the source has '{scales[0]}', but nothing says how '{weight.path}' is quantised"
            )
        return self._packed[weight.path]

    def _take(self, name: str) -> str:
        if name not in self._left:
            raise CheckpointError(f"the source has no '{name}'")
        return self._left.pop(name)[0]


def _shards(jobs: list[Job]) -> tuple[Shard, ...]:
    """Files of at most MAX_SHARD_BYTES in forward order; a weight never spans two."""
    groups: list[list[Job]] = []
    filled = MAX_SHARD_BYTES
    for job in jobs:
        nbytes = sum(tensor.nbytes for tensor in job.outputs)
        if filled + nbytes > MAX_SHARD_BYTES:
            groups.append([])
            filled = 0
        groups[-1].append(job)
        filled += nbytes
    if len(groups) == 1:
        return (Shard("model.safetensors", tuple(groups[0])),)
    return tuple(
        Shard(f"model-{number:05d}-of-{len(groups):05d}.safetensors", tuple(group))
        for number, group in enumerate(groups, 1)
    )


def _check_shape(name: str, entry: Entry, shape: tuple[int, ...]) -> None:
    if entry.shape != shape:
        raise CheckpointError(f"'{name}' has shape {list(entry.shape)}, the config needs {list(shape)}")


def _check_scale(job: Job, entry: Entry) -> None:
    """One scale per 128x128 block, per expert or for all; bfloat16 or float32."""
    *experts, rows, columns = job.weight.shape
    blocks = (*experts, ceil(rows / FP8_BLOCK), ceil(columns / FP8_BLOCK))
    per_expert = entry.shape == tuple(experts) and experts
    if not (entry.shape == blocks or per_expert or prod(entry.shape) == 1):
        raise CheckpointError(
            f"'{job.scale}' has shape {list(entry.shape)}; expected {list(blocks)}, or one per expert, or one"
        )
    if entry.dtype not in ("BF16", "F16", "F32"):
        raise CheckpointError(f"'{job.scale}' is {entry.dtype}; expected bfloat16 or float32")
