"""Proof that a converted checkpoint is its source: every tensor read again from both and compared.

The error a tensor may have is computed from the source, group by group: with b bits a group of values is cut
into 2^b - 1 steps, and rounding to steps gives an error of step / sqrt(12) on average. So the bound follows
the weights' own spread instead of a table, and a swapped or damaged tensor exceeds it by far.
"""

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import sqrt
from pathlib import Path

import mlx.core as mx
import numpy as np

from mlx_step35.checkpoint.headers import ITEM_BYTES, Entry, read_header
from mlx_step35.conversion.plan import Job, Plan
from mlx_step35.conversion.source import Source
from mlx_step35.conversion.tensorfile import read_range
from mlx_step35.conversion.transform import DTYPES, Slice, read_weight, unpack
from mlx_step35.errors import CheckpointError
from mlx_step35.layout import Kind
from mlx_step35.quantization import Quantization

# Rounding is not spread evenly in small groups, MLX moves steps so that 0 is exact, and scales are rounded.
AFFINE_SLACK = 1.5
# Relative error of the floating-point modes on weights of any spread: 1, 3 and 1 bits of mantissa.
FLOAT_ERRORS = {"mxfp4": 0.25, "mxfp8": 0.06, "nvfp4": 0.2}
# Half a step of the 8, 11 and 24 bits of mantissa.
CAST_ERRORS = {"BF16": 2**-8, "F16": 2**-10, "F32": 2**-23}


@dataclass(slots=True)
class KindReport:
    """The worst tensor of a kind: its relative error and what its bits allow."""

    tensors: int = 0
    worst: float = 0.0
    allowed: float = 0.0
    worst_tensor: str = ""


def verify(
    plan: Plan,
    source: Source,
    directory: Path,
    checksums: Mapping[str, Mapping[str, str]],
    progress: Callable[[int], object],
) -> dict[Kind, KindReport]:
    """Compare every tensor with its source.

    Raises CheckpointError naming the first tensor that is missing, misshapen, damaged or too far off.
    """
    reports: dict[Kind, KindReport] = {}
    for shard in plan.files:
        entries = read_header(directory / shard.name).entries
        _check_entries(shard.name, {tensor.name: tensor for tensor in shard.tensors}, entries)
        for job in shard.jobs:
            error, allowed = _compare(job, plan.recipe.dtype, source.entries, entries, progress)
            if not error <= allowed:
                raise CheckpointError(
                    f"'{job.weight.name}' in {shard.name} is off by {error:.4f}, "
                    f"its packing allows {allowed:.4f}"
                )
            report = reports.setdefault(job.weight.kind, KindReport())
            report.tensors += 1
            if error >= report.worst:
                report.worst, report.allowed, report.worst_tensor = error, allowed, job.weight.name
        for name, checksum in checksums.get(shard.name, {}).items():
            if _checksum(entries[name]) != checksum:
                raise CheckpointError(f"'{name}' in {shard.name} is not what the conversion wrote")
    return reports


def verify_small(files: Mapping[str, bytes], directory: Path) -> None:
    """Compare index, config and copies. Raises CheckpointError naming the first that differs."""
    for name, content in files.items():
        if (directory / name).read_bytes() != content:
            raise CheckpointError(f"{directory / name} is not what the conversion writes")


def _check_entries(file: str, planned: Mapping[str, object], entries: Mapping[str, Entry]) -> None:
    different = sorted(planned.keys() ^ entries.keys())
    if different:
        state = "lacks" if different[0] in planned else "should not have"
        raise CheckpointError(f"{file} {state} '{different[0]}'")


def _compare(
    job: Job,
    dtype: str,
    source: Mapping[str, Entry],
    output: Mapping[str, Entry],
    progress: Callable[[int], object],
) -> tuple[float, float]:
    """Relative error of one weight, and the largest its packing explains."""
    for tensor in job.outputs:
        entry = output[tensor.name]
        if (entry.dtype, entry.shape) != (tensor.dtype, tensor.shape):
            raise CheckpointError(
                f"'{tensor.name}' is {entry.dtype}{list(entry.shape)}, "
                f"planned {tensor.dtype}{list(tensor.shape)}"
            )
    totals = [0.0, 0.0, 0.0]
    for piece, array in read_weight(job, source):
        weight = array.astype(mx.float32)
        stored = _read_output(job, output, piece).astype(mx.float32)
        parts = [
            mx.sum(weight * weight),
            mx.sum((weight - stored) ** 2),
            _step_errors(weight, job.quantization),
        ]
        mx.eval(parts)
        totals = [total + np.array(part).item() for total, part in zip(totals, parts, strict=True)]
        progress(array.size)
    squares, errors, steps = totals
    if squares == 0:
        return (0.0 if errors == 0 else float("inf")), 0.0
    # A cast to the output's dtype precedes packing.
    cast = 0.0 if job.weight.kind == "bias" else CAST_ERRORS[dtype]
    if job.quantization is None:
        allowed = cast
    elif job.quantization.mode == "affine":
        # Scales and biases are stored in that dtype too, and a bias may be as large as the weights.
        allowed = AFFINE_SLACK * sqrt(steps / squares) + 2 * cast
    else:
        allowed = FLOAT_ERRORS[job.quantization.mode]
    return sqrt(errors / squares), allowed


def _step_errors(weight: mx.array, choice: Quantization | None) -> mx.array:
    """Summed squared error that rounding to steps gives."""
    if choice is None or choice.mode != "affine":
        return mx.array(0.0)
    groups = weight.reshape(-1, choice.group_size)
    # Zero is always a value of the grid, so a group's range reaches it.
    top, bottom = mx.maximum(groups.max(axis=1), 0), mx.minimum(groups.min(axis=1), 0)
    step = (top - bottom) / (2**choice.bits - 1)
    return mx.sum(step * step) * (choice.group_size / 12)


def _read_output(job: Job, entries: Mapping[str, Entry], piece: Slice) -> mx.array:
    """The same slice of the converted checkpoint, dequantised."""
    arrays = []
    rows = 1 if len(job.weight.shape) == 1 else job.weight.shape[-2]
    for tensor in job.outputs:
        entry = entries[tensor.name]
        width = entry.shape[-1] * ITEM_BYTES[entry.dtype]
        data = read_range(entry, (piece.first * rows + piece.row) * width, piece.count * piece.rows * width)
        array = mx.array(np.frombuffer(data, np.uint8)).view(DTYPES[entry.dtype])
        arrays.append(array.reshape(piece.count, piece.rows, -1))
    return arrays[0] if job.quantization is None else unpack(arrays, job.quantization)


def _checksum(entry: Entry) -> str:
    digest = hashlib.sha256()
    for offset in range(0, entry.nbytes, 1 << 24):
        digest.update(read_range(entry, offset, min(1 << 24, entry.nbytes - offset)))
    return digest.hexdigest()
