"""Writing the planned files slice by slice: memory holds a few slices, whatever the size of a tensor."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import mlx.core as mx

from mlx_step35.checkpoint.headers import Entry
from mlx_step35.conversion.plan import Job, Shard
from mlx_step35.conversion.tensorfile import TensorWriter
from mlx_step35.conversion.transform import pack, read_weight, to_bytes

# Freed buffers that MLX keeps for the next slice.
CACHE_BYTES = 256 << 20


def write_shard(
    path: Path,
    shard: Shard,
    dtype: str,
    entries: Mapping[str, Entry],
    metadata: Mapping[str, str],
    progress: Callable[[int], object],
) -> dict[str, str]:
    """Convert and write one file; it appears under its name only when complete. Returns checksums per tensor.

    `progress` is told the source bytes of every slice. Raises CheckpointError for a damaged source.
    """
    with _small_cache(), TensorWriter(path, shard.tensors, metadata) as writer:
        for job in shard.jobs:
            width = _source_bytes(job, entries) / job.weight.num_parameters
            running: list[mx.array] = []
            for _, array in read_weight(job, entries):
                parts = pack(array, job, dtype)
                # MLX computes this slice while the one before is written.
                mx.async_eval(parts)
                _append(writer, job, running)
                running = parts
                progress(round(array.size * width))
            _append(writer, job, running)
        return writer.commit()


def source_bytes(shard: Shard, entries: Mapping[str, Entry]) -> int:
    """What converting a file reads."""
    return sum(_source_bytes(job, entries) for job in shard.jobs)


def _append(writer: TensorWriter, job: Job, parts: list[mx.array]) -> None:
    """Write one slice's part of every output tensor; nothing for no slice."""
    if parts:
        for tensor, part in zip(job.outputs, parts, strict=True):
            writer.append(tensor.name, to_bytes(part))


def _source_bytes(job: Job, entries: Mapping[str, Entry]) -> int:
    # Scales and biases of a packed source are an eighth at most and not worth a second number.
    return entries[job.source].nbytes


@contextmanager
def _small_cache() -> Iterator[None]:
    before = mx.set_cache_limit(CACHE_BYTES)
    try:
        yield
    finally:
        mx.set_cache_limit(before)
