"""The checkpoint to convert: which tensors it has, whether they are original, and how they are packed.

Reads headers only. Whether a file holds `w` or `1 + w` for a norm is decided by the names around it, never by
looking at values: the backbone of a converted checkpoint has mlx-lm's names, MTP layers moved out of the
original release keep theirs and stay original wherever they are.
"""

import hashlib
import logging
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from mlx_step35.checkpoint.headers import INDEX, Entry, Header, read_header, read_index, read_json
from mlx_step35.checkpoint.names import parameter_name, text_name
from mlx_step35.config import ModelConfig
from mlx_step35.errors import CheckpointError

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Source:
    """A local checkpoint. `revision` is the hub's commit where the path tells it."""

    path: Path
    config: ModelConfig
    entries: Mapping[str, Entry]
    metadata: Mapping[str, str]
    mtp_metadata: Mapping[str, str]
    revision: str | None
    fingerprint: str


def read_source(path: Path, only: frozenset[str] | None = None) -> Source:
    """Read config and headers; `only` limits it to the shards that hold those tensors.

    Raises CheckpointError for a missing or truncated shard and for an index that its shards contradict.
    """
    config = ModelConfig.from_hf(read_json(path / "config.json"))
    index = read_index(path)
    wanted = {name: file for name, file in index.items() if only is None or name in only}
    shards = (
        sorted(set(wanted.values()))
        if index
        else sorted(file.name for file in path.glob("model*.safetensors"))
    )
    if not shards:
        raise CheckpointError(f"{path} has no model*.safetensors and no {INDEX}")
    sidecars = sorted(file.name for file in path.glob("mtp*.safetensors") if file.name not in shards)
    entries: dict[str, Entry] = {}
    metadata: dict[str, str] = {}
    mtp_metadata: dict[str, str] = {}
    digests = [hashlib.sha256((path / "config.json").read_bytes()).hexdigest()]
    for name in (*shards, *sidecars):
        header = read_header(path / name)
        digests.append(_digest(header))
        twice = entries.keys() & header.entries.keys()
        if twice:
            raise CheckpointError(f"'{min(twice)}' is in {name} and in {entries[min(twice)].path.name}")
        entries.update(header.entries)
        (mtp_metadata if name in sidecars else metadata).update(header.metadata)
    _check_index(wanted, entries)
    _warn_of_strays(path, {*shards, *sidecars}, index)
    fingerprint = hashlib.sha256("\n".join(digests).encode()).hexdigest()
    return Source(path, config, entries, metadata, mtp_metadata, _revision(path), fingerprint)


def mtp_names(names: Iterable[str], config: ModelConfig) -> frozenset[str]:
    """Those of MTP layers, in whatever layout."""
    texts = {stored: text_name(stored) or "" for stored in names}
    return frozenset(
        stored for stored, text in texts.items() if parameter_name(text, config.num_layers, False).is_mtp
    )


def _digest(header: Header) -> str:
    """Identifies what a file holds and where."""
    entries = [(n, e.path.name, e.dtype, e.shape, e.start) for n, e in sorted(header.entries.items())]
    return hashlib.sha256(repr(entries).encode()).hexdigest()


def _check_index(wanted: Mapping[str, str], entries: Mapping[str, Entry]) -> None:
    for name, file in wanted.items():
        if name not in entries or entries[name].path.name != file:
            raise CheckpointError(f"{INDEX} promises '{name}' in {file}, which does not hold it")


def _warn_of_strays(path: Path, known: set[str], index: Mapping[str, str]) -> None:
    for file in sorted(path.glob("*.safetensors")):
        # Shards the index names but this run does not need are no strays.
        if file.name not in known and file.name not in set(index.values()):
            logger.warning("%s is not in the index and is ignored", file.name)


def _revision(path: Path) -> str | None:
    """The commit a hub cache directory is named after."""
    resolved = path.resolve()
    if resolved.parent.name == "snapshots" and re.fullmatch(r"[0-9a-f]{40}", resolved.name):
        return resolved.name
    return None
