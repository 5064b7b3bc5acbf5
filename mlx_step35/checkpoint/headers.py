"""Safetensors headers and the index: which tensors a directory holds, where, in which dtype and shape.

Read by offset, never mapped: mapped pages count as resident memory, and a damaged file must be found here
and not in the middle of a generation.
"""

import json
import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from mlx_step35.errors import CheckpointError

INDEX = "model.safetensors.index.json"

# The format allows no larger header; a longer one means that the file is something else.
MAX_HEADER_BYTES = 100_000_000

ITEM_BYTES = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1, "U16": 2, "I16": 2, "F16": 2,
    "BF16": 2, "U32": 4, "I32": 4, "F32": 4, "U64": 8, "I64": 8, "F64": 8,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Entry:
    """Where one tensor lies."""

    path: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class Header:
    """What one safetensors file says about itself."""

    entries: Mapping[str, Entry]
    metadata: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Listing:
    """All tensors of a checkpoint directory by their stored name. `mtp_metadata` is that of the sidecars."""

    entries: Mapping[str, Entry]
    metadata: Mapping[str, str]
    mtp_metadata: Mapping[str, str]


def read_header(path: Path) -> Header:
    """Parse and check one header. Raises CheckpointError for a missing, truncated or foreign file."""
    if path.exists() and not path.is_file():
        raise CheckpointError(f"{path} is no file")
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            prefix = file.read(8)
            length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else size
            if 8 + length > min(size, MAX_HEADER_BYTES):
                raise CheckpointError(f"{path} is truncated or no safetensors file ({size} bytes)")
            text = file.read(length)
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing") from None
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from None
    try:
        parsed = json.loads(text)
        # MLX writes null when there is none; any other value than an object is as damaged as the rest.
        metadata = dict(parsed.pop("__metadata__", None) or {})
        entries = {name: _entry(path, 8 + length, fields) for name, fields in parsed.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path} has a damaged header: {error}") from None
    for name, entry in entries.items():
        if entry.start + entry.nbytes > size:
            raise CheckpointError(f"{path} is truncated: '{name}' ends after its {size} bytes")
    return Header(entries, metadata)


def read_listing(path: Path) -> Listing:
    """Read every header of a checkpoint directory.

    Shards are those the index names, or all `model*.safetensors` without one; sidecars are
    `mtp*.safetensors`. Raises CheckpointError for a missing or damaged file, a tensor that is there twice,
    and an index that its shards contradict.
    """
    index = read_index(path)
    shards = sorted(set(index.values())) or sorted(file.name for file in path.glob("model*.safetensors"))
    if not shards:
        raise CheckpointError(f"{path} has no model*.safetensors")
    sidecars = sorted(file.name for file in path.glob("mtp*.safetensors") if file.name not in shards)
    entries: dict[str, Entry] = {}
    metadata: dict[str, str] = {}
    mtp_metadata: dict[str, str] = {}
    for name in (*shards, *sidecars):
        header = read_header(path / name)
        for tensor, entry in header.entries.items():
            if tensor in entries:
                raise CheckpointError(f"'{tensor}' is in {entries[tensor].path} and again in {entry.path}")
            if index and name not in sidecars and index.get(tensor) != name:
                raise CheckpointError(f"{path / name} holds '{tensor}', which {INDEX} does not place there")
            entries[tensor] = entry
        (mtp_metadata if name in sidecars else metadata).update(header.metadata)
    for tensor, name in index.items():
        if tensor not in entries:
            raise CheckpointError(f"{INDEX} promises '{tensor}' in {path / name}, which does not hold it")
    return Listing(entries, metadata, mtp_metadata)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file. Raises CheckpointError when it is missing or something else."""
    try:
        parsed = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing") from None
    except (ValueError, OSError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from None
    if not isinstance(parsed, dict):
        raise CheckpointError(f"{path} is not a JSON object")
    return parsed


def read_index(path: Path) -> dict[str, str]:
    """Tensor name -> file name, {} for a checkpoint without an index."""
    if not (path / INDEX).exists():
        return {}
    weight_map = read_json(path / INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{path / INDEX} has no weight_map")
    for tensor, name in weight_map.items():
        # A shard is a file beside the index, whatever the index says.
        if not isinstance(name, str) or Path(name).name != name:
            raise CheckpointError(f"{path / INDEX} places '{tensor}' in {name!r}, which is no file name")
    return weight_map


def _entry(path: Path, data_start: int, fields: Mapping[str, Any]) -> Entry:
    start, end = fields["data_offsets"]
    shape, dtype = tuple(fields["shape"]), fields["dtype"]
    if not 0 <= start <= end or any(size < 0 for size in shape):
        raise ValueError(f"impossible offsets {start}, {end} or shape {list(shape)}")
    if dtype in ITEM_BYTES and prod(shape) * ITEM_BYTES[dtype] != end - start:
        raise ValueError(f"{end - start} bytes do not hold {dtype}{list(shape)}")
    return Entry(path, dtype, shape, data_start + start, end - start)
