"""Snapshots on disk, under a limit of bytes: written behind, found after a restart, never trusted unread.

One directory belongs to one process at a time. A thread writes; it sees only bytes, so no array meets a
second thread. Everything else, the deleting of what was not used for longest included, happens on the thread
that owns the tier. Names are keyed hashes and say nothing of the prompts; only the user can read the files.
"""

import contextlib
import fcntl
import hashlib
import logging
import os
import queue
import re
import threading
import time
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mlx_step35.errors import RequestError
from mlx_step35.prompt_cache.files import (
    Record,
    RecordError,
    Serialized,
    read,
    read_heading,
    serialize,
    write,
)
from mlx_step35.prompt_cache.index import TokenArray
from mlx_step35.prompt_cache.records import Block, Rows, Snapshot, evaluate, rows_bytes

logger = logging.getLogger(__name__)

# Bytes that may wait for the writer; they are kept alive beyond the limit of the memory store.
MAX_WAITING_BYTES = 1 << 30

# What a disk is taken to read until it was measured.
ASSUMED_BYTES_PER_S = 1e9

# Only files with such names are ever deleted.
_NAME = re.compile(r"kv-(block|snapshot)-[0-9a-f]{40}\.safetensors")
_TEMPORARY = re.compile(r"\.kv-(block|snapshot)-[0-9a-f]{40}\.safetensors\.\d+\.tmp")


@dataclass(slots=True)
class _Saved:
    """A snapshot's file, and the keys and file names of its blocks."""

    tokens: TokenArray
    size: int
    keys: tuple[bytes, ...]
    blocks: tuple[str, ...]
    is_written: bool = True


@dataclass(frozen=True, slots=True)
class _Job:
    """Files to write for one snapshot, which itself is the last of them."""

    name: str
    files: tuple[tuple[str, Serialized], ...]

    @property
    def nbytes(self) -> int:
        return sum(serialized.nbytes for _, serialized in self.files)


@dataclass(frozen=True, slots=True)
class _Written:
    """How a job ended."""

    job: _Job
    error: OSError | None


class DiskTier:
    """The prompt cache's directory. Raises RequestError if it cannot be used or another process uses it."""

    def __init__(self, directory: Path, limit_bytes: int, fingerprint: str) -> None:
        self.limit_bytes = limit_bytes
        self.nbytes = 0
        self.num_failed = 0
        self.loaded_bytes = 0
        self.loading_s = 0.0
        self._directory = directory
        self._fingerprint = fingerprint
        # In the order of use, the newest last.
        self._saved: OrderedDict[str, _Saved] = OrderedDict()
        self._block_sizes: dict[str, int] = {}
        self._references: Counter[str] = Counter()
        # Files of ours that cannot be used: another model's, damaged ones.
        self._useless: list[str] = []
        self._gone: list[TokenArray] = []
        self._waiting_bytes = 0
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._written: deque[_Written] = deque()
        self._lock = _lock(directory)
        self._scan()
        self._writer = threading.Thread(target=self._write_jobs, name="prompt cache writer", daemon=True)
        self._writer.start()

    def boundaries(self) -> Iterator[tuple[TokenArray, str]]:
        """Token ids and name of every snapshot that is on disk."""
        return ((saved.tokens, name) for name, saved in self._saved.items() if saved.is_written)

    def missing(self, snapshot: Snapshot) -> list[Block]:
        """The blocks of a snapshot whose rows `save` would need; none if it is saved already."""
        if self._snapshot_name(snapshot.tokens) in self._saved:
            return []
        return [block for block in snapshot.blocks if self._block_name(block.key) not in self._block_sizes]

    def save(self, snapshot: Snapshot, rows: Mapping[bytes, tuple[Rows, ...]]) -> bool:
        """Hand a snapshot to the writer with the rows of its missing blocks; False if there is no room.

        The arrays must be evaluated and are held until they are written. Older snapshots are deleted.
        """
        name = self._snapshot_name(snapshot.tokens)
        if name in self._saved:
            self._saved.move_to_end(name)
            return True
        job = self._job(name, snapshot, rows)
        keys = tuple(block.key for block in snapshot.blocks)
        blocks = tuple(self._block_name(key) for key in keys)
        if self._waiting_bytes + job.nbytes > MAX_WAITING_BYTES:
            logger.info("a snapshot was not saved: prompts come faster than the disk takes them")
            return False
        self._references.update(blocks)
        if not self._make_room(job.nbytes):
            self._release(blocks)
            return False
        for block_name, serialized in job.files[:-1]:
            self._block_sizes[block_name] = serialized.nbytes
        self._saved[name] = _Saved(snapshot.tokens, job.files[-1][1].nbytes, keys, blocks, is_written=False)
        self.nbytes += job.nbytes
        self._waiting_bytes += job.nbytes
        self._jobs.put(job)
        return True

    def poll(self) -> tuple[list[tuple[TokenArray, str]], list[TokenArray]]:
        """Since the last call: snapshots that are written now, and tokens of those that were deleted."""
        added: list[tuple[TokenArray, str]] = []
        while self._written:
            written = self._written.popleft()
            job = written.job
            self._waiting_bytes -= job.nbytes
            if written.error is None:
                self._saved[job.name].is_written = True
                added.append((self._saved[job.name].tokens, job.name))
                continue
            self.num_failed += 1
            logger.warning("the prompt cache could not write to %s: %s", self._directory, written.error)
            for block, _ in job.files[:-1]:
                # Others that count on a block that is not there will not load.
                if not (self._directory / block).exists():
                    self.nbytes -= self._block_sizes.pop(block, 0)
            self.forget(job.name)
        gone, self._gone = self._gone, []
        return added, gone

    def load(self, name: str, tokens: TokenArray, stored: Callable[[bytes], Block | None]) -> Snapshot:
        """The snapshot of exactly these tokens; `stored` gives the blocks that are in memory.

        Raises RecordError, and forgets the snapshot, if a byte of it is not as it was written.
        """
        start_s = time.perf_counter()
        try:
            snapshot = self._load(name, tokens, stored)
        except RecordError:
            self.forget(name)
            raise
        evaluate(snapshot)
        self.loading_s += time.perf_counter() - start_s
        self._saved.move_to_end(name)
        # A restart tells by the times what was used last; that is all that is lost if it fails.
        with contextlib.suppress(OSError):
            os.utime(self._directory / name)
        return snapshot

    def estimated_load_s(self, name: str, stored: Callable[[bytes], Block | None]) -> float:
        """Seconds that `load` will take, by what loading took so far."""
        saved = self._saved[name]
        names = {self._block_name(key) for key in saved.keys if stored(key) is None}
        size = saved.size + sum(self._block_sizes.get(block, 0) for block in names)
        if not self.loaded_bytes:
            return size / ASSUMED_BYTES_PER_S
        return size * self.loading_s / self.loaded_bytes

    def forget(self, name: str) -> None:
        """Delete a snapshot and the blocks that no other one needs."""
        saved = self._saved.pop(name)
        self._gone.append(saved.tokens)
        self.nbytes -= saved.size
        self._unlink(name)
        self._release(saved.blocks)

    def close(self) -> None:
        """Write what waits and let go of the directory."""
        self._jobs.put(None)
        self._writer.join()
        os.close(self._lock)

    def _load(self, name: str, tokens: TokenArray, stored: Callable[[bytes], Block | None]) -> Snapshot:
        record = self._read(name)
        if len(record.snapshots) != 1 or not np.array_equal(record.tokens, tokens):
            raise RecordError(f"{self._directory / name} holds other tokens than it should")
        # All blocks are equally long.
        width = record.start // max(len(record.blocks), 1)
        blocks = [
            stored(key) or self._load_block(key, tokens, index * width)
            for index, key in enumerate(record.blocks)
        ]
        if record.start != sum(block.end - block.start for block in blocks):
            raise RecordError(f"{self._directory / name} does not fit its blocks")
        part = record.snapshots[0]
        return Snapshot(record.tokens, tuple(blocks), record.rows, part.sliding, part.draft)

    def _load_block(self, key: bytes, tokens: TokenArray, start: int) -> Block:
        name = self._block_name(key)
        record = self._read(name)
        is_right = record.blocks == (key,) and record.start == start
        if not is_right or not np.array_equal(record.tokens, tokens[record.start : record.end]):
            raise RecordError(f"{self._directory / name} holds another block than it should")
        return Block(key, record.start, record.end, rows_bytes(record.rows), record.rows)

    def _read(self, name: str) -> Record:
        self.loaded_bytes += self._size(name)
        return read(self._directory / name, self._fingerprint)

    def _make_room(self, needed: int) -> bool:
        """Delete what cannot be used, then what was not used for longest, until so many bytes fit."""
        while self._useless and self.nbytes + needed > self.limit_bytes:
            name = self._useless.pop()
            self.nbytes -= self._size(name)
            self._unlink(name)
        while self.nbytes + needed > self.limit_bytes:
            oldest = next((name for name, saved in self._saved.items() if saved.is_written), None)
            if oldest is None:
                return False
            self.forget(oldest)
        return True

    def _release(self, blocks: Sequence[str]) -> None:
        self._references.subtract(blocks)
        for block in blocks:
            if self._references[block] <= 0:
                del self._references[block]
                self.nbytes -= self._block_sizes.pop(block, 0)
                self._unlink(block)

    def _unlink(self, name: str) -> None:
        try:
            (self._directory / name).unlink(missing_ok=True)
        except OSError as error:
            logger.warning("the prompt cache could not delete %s: %s", name, error)

    def _size(self, name: str) -> int:
        try:
            return (self._directory / name).stat().st_size
        except OSError:
            return 0

    def _scan(self) -> None:
        """Take in what earlier processes left."""
        found = sorted(os.scandir(self._directory), key=lambda entry: entry.stat().st_mtime_ns)
        headings = {}
        for entry in found:
            if _TEMPORARY.fullmatch(entry.name):
                self._unlink(entry.name)
            if not _NAME.fullmatch(entry.name):
                continue
            self.nbytes += entry.stat().st_size
            try:
                headings[entry.name] = read_heading(self._directory / entry.name, self._fingerprint)
            except RecordError as error:
                logger.warning("the prompt cache skips a file: %s", error)
                self._useless.append(entry.name)
        self._block_sizes = {name: self._size(name) for name in headings if name.startswith("kv-block-")}
        for name, heading in headings.items():
            if name in self._block_sizes:
                continue
            blocks = tuple(self._block_name(key) for key in heading.blocks)
            is_whole = all(block in self._block_sizes for block in blocks)
            if is_whole and name == self._snapshot_name(heading.tokens):
                self._references.update(blocks)
                self._saved[name] = _Saved(heading.tokens, self._size(name), heading.blocks, blocks)
            else:
                logger.warning("the prompt cache skips a file: %s is not what its name says", name)
                self._useless.append(name)
        for name in [name for name in self._block_sizes if not self._references[name]]:
            # A process ended between writing a block and its snapshot.
            self._release([name])
        self._make_room(0)

    def _job(self, name: str, snapshot: Snapshot, rows: Mapping[bytes, tuple[Rows, ...]]) -> _Job:
        files = []
        for block in self.missing(snapshot):
            tokens = snapshot.tokens[block.start : block.end]
            record = Record(tokens, block.start, block.end, rows[block.key], (block.key,))
            files.append((self._block_name(block.key), serialize(record, self._fingerprint)))
        files.append((name, serialize(Record.of_snapshot(snapshot), self._fingerprint)))
        return _Job(name, tuple(files))

    def _write_jobs(self) -> None:
        """The writer thread: one job after the other, until there is no more."""
        while (job := self._jobs.get()) is not None:
            error = None
            try:
                for name, serialized in job.files:
                    write(self._directory / name, serialized)
                self._sync_directory()
            except OSError as failure:
                error = failure
            self._written.append(_Written(job, error))

    def _sync_directory(self) -> None:
        """Make renames last."""
        descriptor = os.open(self._directory, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def _snapshot_name(self, tokens: TokenArray) -> str:
        return self._name("snapshot", tokens.astype("<i4").tobytes())

    def _block_name(self, key: bytes) -> str:
        return self._name("block", key)

    def _name(self, kind: str, data: bytes) -> str:
        keyed = hashlib.blake2b(data, digest_size=20, key=self._fingerprint.encode()[:64])
        return f"kv-{kind}-{keyed.hexdigest()}.safetensors"


def _lock(directory: Path) -> int:
    """Create the directory, check that it can be written, and lock it; returns the lock's descriptor."""
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        if not any(directory.iterdir()):
            directory.chmod(0o700)
        descriptor = os.open(directory / "lock", os.O_RDWR | os.O_CREAT, 0o600)
    except OSError as error:
        message = f"the prompt cache directory {directory} cannot be used: {error}"
        raise RequestError(message, field="prompt_cache_dir") from None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        message = f"the prompt cache directory {directory} is used by another process; give each its own"
        raise RequestError(message, field="prompt_cache_dir") from None
    return descriptor
