"""Saved states as safetensors files that are either whole and ours, or refused.

A file holds token ids and, for all full-attention layers, the rows of a range of them; then any number of
snapshots: the sliding layers' windows and the draft rows at one position each. A block's file has rows and
its own key but no snapshot, a snapshot's file the rows behind its last block, and a file of its own
(`generate --prompt-cache-file`) everything from the first token on.

The metadata names the format and the model; a digest over metadata, tensor table and data makes any other
byte than those written a reason to refuse the file.
"""

import hashlib
import json
import os
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_step35.cache import LayerSnapshot
from mlx_step35.checkpoint.headers import Header, read_header
from mlx_step35.errors import CheckpointError, Step35Error
from mlx_step35.mtp_state import DraftSnapshot
from mlx_step35.prompt_cache.index import TokenArray
from mlx_step35.prompt_cache.records import Rows, Snapshot

FORMAT = "mlx_step35 prompt cache"
DIGEST_LENGTH = 64
VERSION = "1"

_DTYPES = {mx.float32: "F32", mx.bfloat16: "BF16", mx.float16: "F16"}
_FROM_DTYPES = {name: dtype for dtype, name in _DTYPES.items()}

# Weight files up to this size are read whole for the fingerprint, of larger ones a sample and the times.
WHOLE_FILE_BYTES = 64 << 20
SAMPLE_BYTES, SAMPLE_STRIDE = 4 << 10, 16 << 20


class RecordError(Step35Error):
    """A file of the prompt cache is torn, damaged, or belongs to another model or format."""


@dataclass(frozen=True, slots=True)
class SnapshotPart:
    """One snapshot inside a file: everything but its full-attention rows."""

    position: int
    sliding: tuple[LayerSnapshot, ...]
    draft: DraftSnapshot | None


@dataclass(frozen=True, slots=True)
class Record:
    """The contents of one file: `rows` cover tokens start..end-1.

    `tokens` are those of the rows for a block, all up to the end otherwise; `blocks` are the block's own key,
    otherwise those of the blocks before `start`.
    """

    tokens: TokenArray
    start: int
    end: int
    rows: tuple[Rows, ...]
    blocks: tuple[bytes, ...] = ()
    snapshots: tuple[SnapshotPart, ...] = ()

    @classmethod
    def of_snapshot(cls, snapshot: Snapshot) -> "Record":
        """A snapshot without its blocks."""
        keys = tuple(block.key for block in snapshot.blocks)
        part = SnapshotPart(snapshot.position, snapshot.sliding, snapshot.draft)
        return cls(snapshot.tokens, snapshot.tail_start, snapshot.position, snapshot.tail, keys, (part,))


@dataclass(frozen=True, slots=True)
class Heading:
    """What a file says of itself, not verified: good for an index, not for use."""

    tokens: TokenArray
    start: int
    end: int
    blocks: tuple[bytes, ...]
    positions: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Serialized:
    """A file's bytes, ready to be written by a thread that does not know MLX; views of the arrays."""

    metadata: Mapping[str, str]
    table: Mapping[str, tuple[str, tuple[int, ...]]]
    data: Sequence[memoryview]

    @property
    def nbytes(self) -> int:
        """The size of the file."""
        return len(self.head("0" * DIGEST_LENGTH)) + sum(len(view) for view in self.data)

    def digest(self) -> str:
        """Of everything that will be in the file but itself."""
        digest = _Digest(self.metadata, self._entries())
        for view in self.data:
            digest.update(view)
        return digest.hexdigest()

    def head(self, digest: str) -> bytes:
        """What stands before the data: the header and its length."""
        header = json.dumps({"__metadata__": {**self.metadata, "digest": digest}, **self._entries()}).encode()
        header += b" " * (-len(header) % 8)
        return struct.pack("<Q", len(header)) + header

    def _entries(self) -> dict[str, Any]:
        entries: dict[str, Any] = {}
        end = 0
        for (name, (dtype, shape)), view in zip(self.table.items(), self.data, strict=True):
            entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [end, end + len(view)]}
            end += len(view)
        return entries


def serialize(record: Record, fingerprint: str) -> Serialized:
    """Bytes of evaluated arrays; holds the arrays alive, copies nothing."""
    tensors = dict(_tensors(record))
    tokens = np.ascontiguousarray(record.tokens, dtype="<i4")
    metadata = {
        "format": FORMAT,
        "version": VERSION,
        "fingerprint": fingerprint,
        "start": str(record.start),
        "end": str(record.end),
        "blocks": json.dumps([key.hex() for key in record.blocks]),
        "snapshots": json.dumps(
            [
                {"position": part.position, "draft": None if part.draft is None else part.draft.first}
                for part in record.snapshots
            ]
        ),
    }
    table = {"tokens": ("I32", tokens.shape)}
    table |= {name: (_DTYPES[array.dtype], tuple(array.shape)) for name, array in tensors.items()}
    data = [tokens.data.cast("B") if len(tokens) else memoryview(b"")]
    data += [_bytes(array) for array in tensors.values()]
    return Serialized(metadata, table, data)


def write(path: Path, serialized: Serialized) -> None:
    """Write a file that is there whole or not at all, private to the user. Raises OSError."""
    head = serialized.head(serialized.digest())
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        with open(descriptor, "wb", buffering=0) as file:
            for view in (memoryview(head), *serialized.data):
                _write_all(file.fileno(), view)
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


def read_heading(path: Path, fingerprint: str) -> Heading:
    """Header and token ids only. Raises RecordError for a file that cannot be one of ours."""
    header = _header(path, fingerprint)
    try:
        with path.open("rb") as file:
            entry = header.entries["tokens"]
            file.seek(entry.start)
            tokens = np.frombuffer(file.read(entry.nbytes), dtype="<i4")
    except (KeyError, ValueError, OSError) as error:
        raise RecordError(f"{path}: {error!r}") from None
    return _heading(path, header.metadata, tokens)


def read(path: Path, fingerprint: str) -> Record:
    """A whole file, verified to the last byte. Raises RecordError."""
    header = _header(path, fingerprint)
    data_start = min((entry.start for entry in header.entries.values()), default=0)
    try:
        with path.open("rb") as file:
            file.seek(data_start)
            data = file.read()
    except OSError as error:
        raise RecordError(f"{path}: {error!r}") from None
    table = {
        name: {
            "dtype": entry.dtype,
            "shape": list(entry.shape),
            "data_offsets": [entry.start - data_start, entry.start - data_start + entry.nbytes],
        }
        for name, entry in header.entries.items()
    }
    metadata = dict(header.metadata)
    stated = metadata.pop("digest", "")
    digest = _Digest(metadata, table)
    digest.update(memoryview(data))
    if digest.hexdigest() != stated:
        raise RecordError(f"{path} is damaged: its digest differs")
    arrays = {
        name: np.frombuffer(data, np.uint8, entry.nbytes, entry.start - data_start)
        for name, entry in header.entries.items()
    }
    tensors = {
        name: _array(arrays[name], entry.dtype, entry.shape)
        for name, entry in header.entries.items()
        if name != "tokens"
    }
    heading = _heading(path, metadata, arrays["tokens"].view("<i4"))
    return _record(path, heading, tensors, json.loads(metadata["snapshots"]))


def is_prompt_cache(path: Path) -> bool:
    """Whether a file says it is one of these, whole or not; an empty one may become one."""
    try:
        with path.open("rb") as file:
            head = file.read(8 + 2 * len(FORMAT) + 64)
    except OSError:
        return False
    return not head or FORMAT.encode() in head


def fingerprint(model_path: Path, dtype: str) -> str:
    """What saved states depend on: weights, config, tokenizer, dtype and this format, as a hex digest.

    Of large weight files it takes size, times and a sample of the bytes, so copying a checkpoint may start a
    new cache but changing one always does.
    """
    digest = hashlib.blake2b(f"{FORMAT} {VERSION} {dtype}".encode(), digest_size=20)
    names = ("*.json", "*.safetensors", "*.jinja", "tokenizer.model")
    for path in sorted(file for name in names for file in model_path.glob(name)):
        status = path.stat()
        digest.update(f"\0{path.name}\0{status.st_size}\0".encode())
        with path.open("rb") as file:
            if status.st_size <= WHOLE_FILE_BYTES:
                digest.update(file.read())
                continue
            digest.update(str(status.st_mtime_ns).encode())
            for start in range(0, status.st_size, SAMPLE_STRIDE):
                file.seek(start)
                digest.update(file.read(SAMPLE_BYTES))
    return digest.hexdigest()


class _Digest:
    """Over metadata and table in one spelling, then the data."""

    def __init__(self, metadata: Mapping[str, str], table: Mapping[str, Any]) -> None:
        text = json.dumps([dict(metadata), dict(table)], sort_keys=True)
        self._hash = hashlib.sha256(text.encode())

    def update(self, view: memoryview) -> None:
        self._hash.update(view)

    def hexdigest(self) -> str:
        return self._hash.hexdigest()


def _tensors(record: Record) -> Iterator[tuple[str, mx.array]]:
    """Every array of a record by its name in the file; empty ones are left out."""
    for index, (keys, values) in enumerate(record.rows):
        if record.end > record.start:
            yield f"full.{index}.keys", keys
            yield f"full.{index}.values", values
    for part in record.snapshots:
        for index, layer in enumerate(part.sliding):
            if layer.keys is not None and layer.values is not None:
                yield f"at.{part.position}.sliding.{index}.keys", layer.keys
                yield f"at.{part.position}.sliding.{index}.values", layer.values
        if part.draft is not None and part.draft.hidden is not None:
            yield f"at.{part.position}.draft", part.draft.hidden


def _record(
    path: Path, heading: Heading, tensors: dict[str, mx.array], snapshots: list[dict[str, Any]]
) -> Record:
    rows = tuple(
        (keys, values)
        for _, (keys, values) in sorted(_pairs(tensors, "full."))
        if keys.shape[2] == values.shape[2] == heading.end - heading.start
    )
    parts = []
    for fields in snapshots:
        position, first = fields["position"], fields["draft"]
        pairs = sorted(_pairs(tensors, f"at.{position}.sliding."))
        sliding = tuple(LayerSnapshot(position, keys, values) for _, (keys, values) in pairs)
        hidden = tensors.get(f"at.{position}.draft")
        parts.append(SnapshotPart(position, sliding, None if first is None else DraftSnapshot(first, hidden)))
    return Record(heading.tokens, heading.start, heading.end, rows, heading.blocks, tuple(parts))


def _pairs(tensors: Mapping[str, mx.array], prefix: str) -> Iterator[tuple[int, Rows]]:
    for name, keys in tensors.items():
        if name.startswith(prefix) and name.endswith(".keys"):
            number = name.removeprefix(prefix).removesuffix(".keys")
            yield int(number), (keys, tensors[f"{prefix}{number}.values"])


def _header(path: Path, fingerprint: str) -> Header:
    try:
        header = read_header(path)
        size = path.stat().st_size
    except (CheckpointError, OSError) as error:
        raise RecordError(str(error)) from None
    metadata = header.metadata
    if metadata.get("format") != FORMAT or metadata.get("version") != VERSION:
        raise RecordError(f"{path} is no prompt cache of format {VERSION}")
    if metadata.get("fingerprint") != fingerprint:
        raise RecordError(f"{path} belongs to another model")
    if size != max((entry.start + entry.nbytes for entry in header.entries.values()), default=0):
        raise RecordError(f"{path} has {size} bytes, which is not what its header says")
    return header


def _heading(path: Path, metadata: Mapping[str, str], tokens: TokenArray) -> Heading:
    try:
        start, end = int(metadata["start"]), int(metadata["end"])
        blocks = tuple(bytes.fromhex(key) for key in json.loads(metadata["blocks"]))
        positions = tuple(int(part["position"]) for part in json.loads(metadata["snapshots"]))
    except (KeyError, ValueError, TypeError) as error:
        raise RecordError(f"{path} has odd metadata: {error!r}") from None
    return Heading(tokens, start, end, blocks, positions)


def _bytes(array: mx.array) -> memoryview:
    if not array.size:
        return memoryview(b"")
    # bfloat16 has no spelling in the buffer protocol.
    raw = array.view(mx.uint16) if array.dtype == mx.bfloat16 else array
    return np.asarray(raw).data.cast("B")


def _array(data: np.ndarray[Any, Any], dtype: str, shape: tuple[int, ...]) -> mx.array:
    if dtype not in _FROM_DTYPES:
        raise RecordError(f"an array of {dtype} in a prompt cache")
    width = _FROM_DTYPES[dtype].size
    raw = mx.array(data.view(np.uint32 if width == 4 else np.uint16)).reshape(shape)
    return raw.view(_FROM_DTYPES[dtype])


def _write_all(descriptor: int, view: memoryview) -> None:
    """A write may take less than all of it."""
    while len(view):
        view = view[os.write(descriptor, view) :]
