"""What tokenizer and template both read: a checkpoint's JSON files and the tokens they declare."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mlx_step35.errors import CheckpointError


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file that may be absent. Raises CheckpointError when it is there and damaged."""
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"cannot read {path}: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds no JSON object")
    return value


def configured_tokens(settings: Mapping[str, Any], source: Path) -> dict[int, dict[str, Any]]:
    """`added_tokens_decoder` of tokenizer_config.json by id. Raises CheckpointError when it is malformed."""
    decoder = settings.get("added_tokens_decoder", {})
    if not isinstance(decoder, Mapping):
        raise CheckpointError(f"{source}: added_tokens_decoder must be an object")
    tokens: dict[int, dict[str, Any]] = {}
    for key, entry in decoder.items():
        if not key.isdecimal() or not isinstance(entry, Mapping) or not isinstance(entry.get("content"), str):
            raise CheckpointError(f"{source}: added_tokens_decoder[{key!r}] is no token")
        tokens[int(key)] = dict(entry)
    return tokens


def clean(text: str) -> str:
    """Text that can be encoded: lone surrogates, which JSON can smuggle in, become replacement characters."""
    if text.isascii():
        return text
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text
