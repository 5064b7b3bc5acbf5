"""One conversation in one file: what `generate --prompt-cache-file` reads and writes.

Unlike the directory of a server it holds every row once, in one piece, and a snapshot at each boundary of
this one path of tokens.
"""

from collections.abc import Sequence
from pathlib import Path

from mlx_step35.errors import RequestError
from mlx_step35.prompt_cache.files import (
    Record,
    RecordError,
    SnapshotPart,
    is_prompt_cache,
    read,
    serialize,
    write,
)
from mlx_step35.prompt_cache.records import Snapshot


def read_archive(path: Path, fingerprint: str) -> list[Snapshot]:
    """The snapshots in a file, the shortest first. Raises RecordError for one that cannot be used."""
    record = read(path, fingerprint)
    snapshots = []
    for part in sorted(record.snapshots, key=lambda part: part.position):
        if record.start or part.position > record.end:
            raise RecordError(f"{path} is part of a server's prompt cache, not a conversation")
        end = part.position
        tail = tuple((keys[:, :, :end], values[:, :, :end]) for keys, values in record.rows)
        snapshots.append(Snapshot(record.tokens[:end], (), tail, part.sliding, part.draft))
    return snapshots


def write_archive(path: Path, fingerprint: str, whole: Snapshot, others: Sequence[Snapshot]) -> None:
    """Write the state at the end of a conversation and at places before it.

    `whole` has no blocks, all rows are its own. Raises RequestError if the file cannot be written.
    """
    assert not whole.blocks
    parts = {
        snapshot.position: SnapshotPart(snapshot.position, snapshot.sliding, snapshot.draft)
        for snapshot in (*others, whole)
    }
    record = Record(whole.tokens, 0, whole.position, whole.tail, (), tuple(parts.values()))
    try:
        write(path, serialize(record, fingerprint))
    except OSError as error:
        raise RequestError(f"cannot write {path}: {error.strerror}", field="prompt_cache_file") from None


def check_archive_path(path: Path) -> None:
    """Raises RequestError if writing there would fail, or destroy something else than a prompt cache."""
    if path.exists() and not is_prompt_cache(path):
        raise RequestError(f"{path} is not a prompt cache; name another file", field="prompt_cache_file")
    if not path.parent.is_dir():
        raise RequestError(f"{path.parent} is not a directory", field="prompt_cache_file")
