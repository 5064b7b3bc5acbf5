"""What a conversion has finished, and whether a directory may be written to.

`conversion.json` stays in the output: it names source, recipe and a checksum per tensor. It is replaced
atomically after every shard, so after any crash it lists only shards that are complete and synced.
"""

import fcntl
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlx_step35.conversion.tensorfile import write_atomically
from mlx_step35.errors import CheckpointError, RequestError

JOURNAL = "conversion.json"
LOCK = ".convert.lock"
FORMAT = 1


@dataclass(slots=True)
class Journal:
    """The record in one directory. `identity` is what a resumed run must repeat, `facts` is for readers."""

    directory: Path
    identity: Mapping[str, str]
    facts: Mapping[str, Any]
    checksums: dict[str, dict[str, str]]
    is_complete: bool = False

    def is_done(self, name: str, size: int) -> bool:
        """Whether a shard is finished; its file must still be there in full."""
        path = self.directory / name
        return name in self.checksums and path.exists() and path.stat().st_size == size

    def record(self, name: str, checksums: Mapping[str, str]) -> None:
        """Note a finished shard, durably."""
        self.checksums[name] = dict(checksums)
        self.save()

    def save(self) -> None:
        content = {
            "format": FORMAT,
            "complete": self.is_complete,
            "identity": dict(self.identity),
            **self.facts,
            "checksums": self.checksums,
        }
        text = json.dumps(content, indent=1, sort_keys=True) + "\n"
        write_atomically(self.directory / JOURNAL, text.encode())


def open_journal(directory: Path, identity: Mapping[str, str], facts: Mapping[str, Any]) -> Journal:
    """Begin or continue a conversion; call with the lock held.

    Raises RequestError for a directory that this converter did not make or that holds another conversion;
    nothing in it is touched.
    """
    path = directory / JOURNAL
    if not path.exists():
        foreign = sorted(file.name for file in directory.iterdir() if not _is_debris(file.name))
        if foreign:
            raise RequestError(
                f"{directory} holds '{foreign[0]}' but no {JOURNAL}: no conversion of ours, nothing changed",
                field="mlx_path",
            )
        journal = Journal(directory, identity, facts, {})
        journal.save()
        return journal
    try:
        content = json.loads(path.read_text())
        version, is_complete = content["format"], content["complete"]
        recorded, checksums = dict(content["identity"]), content["checksums"]
        checksums = {shard: dict(sums) for shard, sums in checksums.items()}
        if not isinstance(is_complete, bool):
            raise ValueError(f"complete is {is_complete!r}")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path} is damaged: {error}") from None
    if version != FORMAT:
        raise CheckpointError(f"{path} has format {version!r}, this version continues {FORMAT}")
    for key, value in identity.items():
        if recorded.get(key) != value:
            raise RequestError(
                f"{directory} holds a conversion with another {key}; choose another --mlx-path or delete it",
                field="mlx_path",
            )
    return Journal(directory, identity, facts, checksums, is_complete)


@contextmanager
def locked(directory: Path) -> Iterator[None]:
    """Hold a directory for one converter; the system lets go when the process dies, however it dies.

    Raises RequestError when another process holds it.
    """
    path = directory / LOCK
    while True:
        fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(fd)
            raise RequestError(f"another conversion is writing to {directory}", field="mlx_path") from None
        # A converter that just ended may have unlinked the file between our open and our lock.
        if path.exists() and os.fstat(fd).st_ino == path.stat().st_ino:
            break
        os.close(fd)
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        os.close(fd)


def _is_debris(name: str) -> bool:
    """What a converter killed before its first journal may have left."""
    return name in (LOCK, f".{JOURNAL}.partial", ".DS_Store")
