"""Tokens to text one by one, never emitting half a character."""

import codecs
from collections.abc import Callable, Mapping
from typing import Protocol

import tokenizers
from tokenizers.decoders import DecodeStream

# A character has four bytes, so a stream that holds back more than this waits for nothing.
_MAX_HELD = 32


class StreamDetokenizer(Protocol):
    """Turns tokens into text one by one."""

    def add(self, token: int) -> str:
        """Text that became certain with this token, often none."""
        ...

    def finish(self) -> str:
        """What was held back: at an end in mid-character, one replacement character."""
        ...


class ByteStream:
    """For tokenizers whose tokens are bytes, whatever stands around them."""

    def __init__(self, to_bytes: Callable[[int], bytes]) -> None:
        self._to_bytes = to_bytes
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def add(self, token: int) -> str:
        return self._decoder.decode(self._to_bytes(token))

    def finish(self) -> str:
        return self._decoder.decode(b"", final=True)


class LibraryStream:
    """For all others, by the library's own stream."""

    def __init__(self, tokenizer: tokenizers.Tokenizer, size: int) -> None:
        self._tokenizer = tokenizer
        self._size = size
        self._stream = DecodeStream(skip_special_tokens=False)
        # The library has no flush: what it holds back is kept here too.
        self._held: list[int] = []

    def add(self, token: int) -> str:
        if not 0 <= token < self._size:
            return ""
        text: str | None = self._stream.step(self._tokenizer, token)
        if text is not None:
            self._held = []
            return text
        self._held.append(token)
        return self.finish() if len(self._held) > _MAX_HELD else ""

    def finish(self) -> str:
        held, self._held = self._held, []
        self._stream = DecodeStream(skip_special_tokens=False)
        text: str = self._tokenizer.decode(held, skip_special_tokens=False)
        return text


def byte_alphabet() -> Mapping[str, int]:
    """The byte each character of a byte-level vocabulary stands for: printable ones for themselves."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    alphabet = {chr(byte): byte for byte in printable}
    hidden = [byte for byte in range(256) if chr(byte) not in alphabet]
    return alphabet | {chr(0x100 + place): byte for place, byte in enumerate(hidden)}
