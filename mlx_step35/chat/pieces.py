"""A bare `tokenizer.model`, read with sentencepiece so that text survives a round trip exactly.

The file's own normaliser would add a leading space, fold blanks and rewrite characters; it is switched off.
Pieces that look like tags are taken out of the library's hands, so that they match only where a caller wants
them to.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import sentencepiece

from mlx_step35.chat.streams import ByteStream
from mlx_step35.errors import CheckpointError

# Serialised protobuf messages merge when they are joined: normalizer_spec { precompiled_charsmap: ""
# add_dummy_prefix: false remove_extra_whitespaces: false }.
_EXACT_NORMALIZER = b"\x1a\x06\x12\x00\x18\x00\x20\x00"
_CONTROL, _USER_DEFINED = 3, 4
_TAG = re.compile(r"<[^<>\s]+>|\[[^\[\]\s]+\]")
_SPACE = "▁"


class SentencePieceBackend:
    """A sentencepiece model with control strings of its own."""

    def __init__(self, path: Path, added: Mapping[int, Mapping[str, Any]]) -> None:
        try:
            data = bytearray(path.read_bytes())
            tags = _hide_tags(data)
            self._model = sentencepiece.SentencePieceProcessor(model_proto=bytes(data) + _EXACT_NORMALIZER)
        except (OSError, ValueError, IndexError, RuntimeError) as error:
            raise CheckpointError(f"{path} is no sentencepiece model: {error}") from error
        self._controls = {tag: self._model.piece_to_id(tag) for tag in tags}
        self._controls |= {entry["content"]: number for number, entry in added.items()}
        self._names = {number: tag for tag, number in self._controls.items()}
        self.size: int = max(self._model.get_piece_size(), 1 + max(self._names, default=-1))
        # Longest first: of two control strings that start alike the longer one is meant.
        strings = sorted(self._controls, key=len, reverse=True)
        self._splitter = re.compile("(" + "|".join(map(re.escape, strings)) + ")") if strings else None

    definition = None

    @property
    def control_strings(self) -> list[str]:
        return list(self._controls)

    def encode(self, text: str) -> list[int]:
        if self._splitter is None:
            return self.encode_text(text)
        ids: list[int] = []
        for part in self._splitter.split(text):
            ids += [self._controls[part]] if part in self._controls else self.encode_text(part)
        return ids

    def encode_text(self, text: str) -> list[int]:
        ids: list[int] = self._model.encode(text)
        return ids

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool) -> str:
        kept = [token for token in ids if not (skip_special_tokens and token in self._names)]
        return b"".join(map(self.token_bytes, kept)).decode("utf-8", "replace")

    def token_id(self, token: str) -> int | None:
        if token in self._controls:
            return self._controls[token]
        number: int = self._model.piece_to_id(token)
        return None if number == self._model.unk_id() and token != self._model.id_to_piece(number) else number

    def token(self, token_id: int) -> str | None:
        if token_id in self._names:
            return self._names[token_id]
        piece: str = self._model.id_to_piece(token_id)
        return piece

    def detokenizer(self) -> ByteStream:
        return ByteStream(self.token_bytes)

    def token_bytes(self, token: int) -> bytes:
        if token in self._names:
            return self._names[token].encode()
        if not 0 <= token < self._model.get_piece_size() or self._model.is_unknown(token):
            return b""
        piece: str = self._model.id_to_piece(token)
        if self._model.is_byte(token):
            return bytes([int(piece[3:-1], 16)])
        return piece.replace(_SPACE, " ").encode()


def _hide_tags(data: bytearray) -> list[str]:
    """Marks tag-like pieces as control pieces, which the library never finds in text; returns their strings.

    Raises ValueError or IndexError when the data is no serialised model.
    """
    tags: list[str] = []
    for number, start, end in _fields(data, 0, len(data)):
        if number != 1:
            continue
        piece, kind_at = "", -1
        for inner, inner_start, inner_end in _fields(data, start, end):
            if inner == 1:
                piece = data[inner_start:inner_end].decode()
            elif inner == 3:
                kind_at = inner_start
        kind = data[kind_at] if kind_at >= 0 else 0
        if kind == _CONTROL or (kind == _USER_DEFINED and _TAG.fullmatch(piece)):
            tags.append(piece)
            data[kind_at] = _CONTROL
    return tags


def _fields(data: bytearray, position: int, end: int) -> Iterator[tuple[int, int, int]]:
    """Number and extent of every field of a protobuf message."""
    while position < end:
        key, position = _varint(data, position)
        wire, start = key & 7, position
        if wire == 0:
            _, position = _varint(data, position)
        elif wire == 1:
            position += 8
        elif wire == 2:
            length, start = _varint(data, position)
            position = start + length
        elif wire == 5:
            position += 4
        else:
            raise ValueError(f"no protobuf field at byte {start}")
        if position > end:
            raise ValueError(f"the file ends inside the field at byte {start}")
        yield key >> 3, start, position


def _varint(data: bytearray, position: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if not byte & 0x80:
            return value, position
        shift += 7
