"""Tensors read and written by offset: nothing here maps a file, because mapped pages count as resident."""

import fcntl
import hashlib
import json
import os
import struct
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType

from mlx_step35.checkpoint.headers import Entry
from mlx_step35.layout import Tensor


def read_range(entry: Entry, offset: int, nbytes: int) -> bytes:
    """Some bytes of a tensor."""
    with entry.path.open("rb", buffering=0) as file:
        return os.pread(file.fileno(), nbytes, entry.start + offset)


class TensorWriter:
    """A safetensors file being written: header first, then every tensor front to back, in any interleaving.

    The file has a temporary name until `commit`, which needs every byte of every tensor; leaving without it
    removes the file.
    """

    def __init__(self, path: Path, tensors: Sequence[Tensor], metadata: Mapping[str, str]) -> None:
        self.path = path
        self.partial = path.with_name(f".{path.name}.partial")
        header, starts = _header(tensors, metadata)
        self._regions = {t.name: _Region(start, t.nbytes) for t, start in zip(tensors, starts, strict=True)}
        self._fd = os.open(self.partial, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o644)
        os.ftruncate(self._fd, self.planned_size(tensors, metadata))
        _pwrite(self._fd, header, 0)

    @staticmethod
    def planned_size(tensors: Sequence[Tensor], metadata: Mapping[str, str]) -> int:
        """The length the finished file will have."""
        return len(_header(tensors, metadata)[0]) + sum(tensor.nbytes for tensor in tensors)

    def append(self, name: str, data: bytes | memoryview) -> None:
        """Write the next bytes of a tensor."""
        region = self._regions[name]
        assert region.written + len(data) <= region.nbytes, f"{name} is longer than planned"
        _pwrite(self._fd, data, region.start + region.written)
        region.written += len(data)
        region.hash.update(data)

    def commit(self) -> dict[str, str]:
        """Sync and give the file its name; returns a checksum per tensor."""
        short = [name for name, region in self._regions.items() if region.written != region.nbytes]
        assert not short, f"{short[0]} is incomplete"
        _sync(self._fd)
        os.close(self._fd)
        self._fd = -1
        self.partial.replace(self.path)
        sync_directory(self.path.parent)
        return {name: region.hash.hexdigest() for name, region in self._regions.items()}

    def __enter__(self) -> "TensorWriter":
        return self

    def __exit__(self, kind: type[BaseException] | None, value: object, trace: TracebackType | None) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self.partial.unlink(missing_ok=True)


def write_atomically(path: Path, data: bytes) -> None:
    """Replace a small file so that a crash leaves either the old or the new one."""
    partial = path.with_name(f".{path.name}.partial")
    fd = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    try:
        _pwrite(fd, data, 0)
        _sync(fd)
    finally:
        os.close(fd)
    partial.replace(path)
    sync_directory(path.parent)


def sync_directory(path: Path) -> None:
    """Make renames in a directory durable."""
    fd = os.open(path, os.O_RDONLY)
    try:
        # Some network file systems refuse to sync directories; the rename itself has happened.
        with suppress(OSError):
            os.fsync(fd)
    finally:
        os.close(fd)


class _Region:
    """Where a tensor goes and how far it has got."""

    def __init__(self, start: int, nbytes: int) -> None:
        self.start = start
        self.nbytes = nbytes
        self.written = 0
        self.hash = hashlib.sha256()


def _header(tensors: Sequence[Tensor], metadata: Mapping[str, str]) -> tuple[bytes, list[int]]:
    """The file's first bytes and the absolute start of every tensor."""
    fields: dict[str, object] = {"__metadata__": dict(metadata)}
    offsets = [0]
    for tensor in tensors:
        offsets.append(offsets[-1] + tensor.nbytes)
        fields[tensor.name] = {
            "dtype": tensor.dtype,
            "shape": list(tensor.shape),
            "data_offsets": offsets[-2:],
        }
    text = json.dumps(fields, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    header = struct.pack("<Q", len(text)) + text
    return header, [len(header) + offset for offset in offsets[:-1]]


def _sync(fd: int) -> None:
    """Bring a file to the medium; on macOS fsync alone stops at the drive's own cache."""
    if sys.platform == "darwin":
        with suppress(OSError):
            fcntl.fcntl(fd, fcntl.F_FULLFSYNC)
            return
    os.fsync(fd)


def _pwrite(fd: int, data: bytes | memoryview, offset: int) -> None:
    """All of the data: one call may write less, and at most 2 GiB on macOS."""
    view = memoryview(data)
    while view:
        written = os.pwrite(fd, view, offset)
        view, offset = view[written:], offset + written
