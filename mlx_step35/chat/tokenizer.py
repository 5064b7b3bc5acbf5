"""Text to token ids and back, from a checkpoint's own files.

`tokenizer.json` is read directly with the tokenizers library; a directory that has only `tokenizer.model` is
read with sentencepiece. No special token is ever added: the chat template prints them itself. Control strings
in text become control tokens only where the caller says so (`encode`), never in `encode_text`.
"""

import json
import re
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import tokenizers

from mlx_step35.chat.pieces import SentencePieceBackend
from mlx_step35.chat.reading import clean, configured_tokens, read_json
from mlx_step35.chat.segments import Rendered
from mlx_step35.chat.streams import ByteStream, LibraryStream, StreamDetokenizer, byte_alphabet
from mlx_step35.errors import CheckpointError

_ALPHABET = byte_alphabet()
# How vocabularies without a byte alphabet name single bytes.
_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class Backend(Protocol):
    """What a tokenizer library offers, with the model's control strings already set apart."""

    @property
    def size(self) -> int: ...
    @property
    def control_strings(self) -> Sequence[str]: ...
    @property
    def definition(self) -> str | None:
        """The text of a tokenizer.json that does the same, if there is one."""
        ...

    def encode(self, text: str) -> list[int]: ...
    def encode_text(self, text: str) -> list[int]: ...
    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool) -> str: ...
    def token_id(self, token: str) -> int | None: ...
    def token(self, token_id: int) -> str | None: ...
    def token_bytes(self, token: int) -> bytes: ...
    def detokenizer(self) -> StreamDetokenizer: ...


class Tokenizer:
    """A checkpoint's tokenizer."""

    def __init__(self, backend: Backend, bos_token_id: int | None, eos_token_ids: Sequence[int]) -> None:
        self.backend = backend
        self.bos_token_id = bos_token_id
        self.eos_token_ids = tuple(eos_token_ids)

    @classmethod
    def from_directory(cls, path: Path | str) -> "Tokenizer":
        """Reads a checkpoint's tokenizer files. Raises CheckpointError when they are missing or damaged."""
        directory = Path(path)
        settings = read_json(directory / "tokenizer_config.json")
        added = configured_tokens(settings, directory / "tokenizer_config.json")
        backend: Backend
        if (directory / "tokenizer.json").is_file():
            backend = _TokenizersBackend(directory / "tokenizer.json", added)
        elif (directory / "tokenizer.model").is_file():
            backend = SentencePieceBackend(directory / "tokenizer.model", added)
        else:
            raise CheckpointError(f"{directory} has no tokenizer: neither tokenizer.json nor tokenizer.model")
        configs = [read_json(directory / name) for name in ("generation_config.json", "config.json")]
        bos = _special_id(backend, settings.get("bos_token"))
        if bos is None:
            bos = next((config["bos_token_id"] for config in configs if "bos_token_id" in config), None)
        eos = [token for config in configs for token in _id_list(config.get("eos_token_id"))]
        named = _special_id(backend, settings.get("eos_token"))
        return cls(backend, bos, list(dict.fromkeys(eos if named is None else [*eos, named])))

    @property
    def vocab_size(self) -> int:
        """Number of ids the tokenizer knows; the model's output may be padded beyond it."""
        return self.backend.size

    @property
    def control_strings(self) -> tuple[str, ...]:
        """Strings that `encode` turns into single tokens of their own."""
        return tuple(self.backend.control_strings)

    @property
    def bos_token(self) -> str | None:
        return None if self.bos_token_id is None else self.backend.token(self.bos_token_id)

    def encode(self, text: str) -> list[int]:
        """Ids of text; control strings in it become control tokens."""
        return self.backend.encode(clean(text))

    def encode_text(self, text: str) -> list[int]:
        """Ids of text in which nothing is a control token, whatever it says."""
        return self.backend.encode_text(clean(text))

    def encode_rendered(self, rendered: Rendered) -> list[int]:
        """Ids of a rendered conversation: control tokens only where the template wrote them."""
        ids: list[int] = []
        for segment in rendered.segments:
            ids += self.encode_text(segment.text) if segment.is_plain else self.encode(segment.text)
        return ids

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = False) -> str:
        """Text of ids; ids the tokenizer does not know are nothing."""
        known = [token for token in ids if 0 <= token < self.vocab_size]
        return self.backend.decode(known, skip_special_tokens=skip_special_tokens)

    def token_id(self, token: str) -> int | None:
        """The id of a token by its exact string."""
        return self.backend.token_id(token)

    def token_bytes(self, token: int) -> bytes:
        """What one token adds to the text, which may be part of a character."""
        return self.backend.token_bytes(token)

    def detokenizer(self) -> StreamDetokenizer:
        """A fresh stream; control tokens are printed as their strings."""
        return self.backend.detokenizer()


class _TokenizersBackend:
    """A tokenizer.json."""

    def __init__(self, path: Path, added: Mapping[int, Mapping[str, Any]]) -> None:
        try:
            self._text = path.read_text(encoding="utf-8")
            self._definition: dict[str, Any] = json.loads(self._text)
        except (OSError, ValueError) as error:
            raise CheckpointError(f"cannot read {path}: {error}") from error
        try:
            self.tokenizer = tokenizers.Tokenizer.from_str(self._text)
        except Exception as error:  # The library raises nothing narrower, whatever is wrong with the file.
            raise CheckpointError(f"{path} is no tokenizer: {error}") from error
        # Truncation or padding stored by a training run would cut prompts in silence.
        self.tokenizer.no_truncation()
        self.tokenizer.no_padding()
        self._add_tokens(added)
        self._is_byte_level = (self._definition.get("decoder") or {}).get("type") == "ByteLevel"
        self.size: int = 1 + max(self.tokenizer.get_vocab(with_added_tokens=True).values(), default=-1)

    @property
    def control_strings(self) -> list[str]:
        return [token.content for token in self.tokenizer.get_added_tokens_decoder().values()]

    @property
    def definition(self) -> str:
        text: str = self.tokenizer.to_str()
        return text

    def encode(self, text: str) -> list[int]:
        return _ids(self.tokenizer, text)

    def encode_text(self, text: str) -> list[int]:
        if not any(control in text for control in self.control_strings):
            return self.encode(text)
        return _ids(self._plain, text)

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool) -> str:
        text: str = self.tokenizer.decode(list(ids), skip_special_tokens=skip_special_tokens)
        return text

    def token_id(self, token: str) -> int | None:
        token_id: int | None = self.tokenizer.token_to_id(token)
        return token_id

    def token(self, token_id: int) -> str | None:
        token: str | None = self.tokenizer.id_to_token(token_id)
        return token

    def detokenizer(self) -> StreamDetokenizer:
        return ByteStream(self._bytes) if self._is_byte_level else LibraryStream(self.tokenizer, self.size)

    def token_bytes(self, token: int) -> bytes:
        if self._is_byte_level:
            return self._bytes(token)
        text = (self.token(token) if token >= 0 else None) or ""
        if match := _BYTE_TOKEN.fullmatch(text):
            return bytes([int(match[1], 16)])
        return text.replace("\u2581", " ").encode()

    def _bytes(self, token: int) -> bytes:
        """The bytes of one token, as the byte-level decoder sees it; ids without a token are nothing."""
        text = self.token(token) if token >= 0 else None
        if text is None:
            return b""
        codes = [_ALPHABET.get(character) for character in text]
        return text.encode() if None in codes else bytes(code for code in codes if code is not None)

    def _add_tokens(self, added: Mapping[int, Mapping[str, Any]]) -> None:
        """Tokens that only tokenizer_config.json lists, added as transformers does."""
        known = self.tokenizer.get_added_tokens_decoder()
        for number, entry in sorted(added.items()):
            if number in known:
                continue
            flags = {
                name: bool(entry[name])
                for name in ("single_word", "lstrip", "rstrip", "normalized", "special")
                if name in entry
            }
            token = tokenizers.AddedToken(entry["content"], **flags)
            if entry.get("special"):
                self.tokenizer.add_special_tokens([token])
            else:
                self.tokenizer.add_tokens([token])

    @cached_property
    def _plain(self) -> tokenizers.Tokenizer:
        """The same tokenizer without its control strings; built when first needed, a second vocabulary."""
        definition = dict(self._definition, added_tokens=[], truncation=None, padding=None)
        model = dict(definition["model"])
        controls = set(self.control_strings)
        if isinstance(model.get("vocab"), dict):
            # A control string that is also a vocabulary entry must not be reached as a whole word.
            model["vocab"] = {token: i for token, i in model["vocab"].items() if token not in controls}
        definition["model"] = model
        definition["post_processor"] = None
        return tokenizers.Tokenizer.from_str(json.dumps(definition, ensure_ascii=False))


def _ids(tokenizer: tokenizers.Tokenizer, text: str) -> list[int]:
    """Ids of one text; other threads go on meanwhile, which the library allows only in a batch."""
    ids: list[int] = tokenizer.encode_batch([text], add_special_tokens=False)[0].ids
    return ids


def _special_id(backend: Backend, token: Any) -> int | None:
    """The id of a token as tokenizer_config.json names it: a string, or an object with its content."""
    if isinstance(token, Mapping):
        token = token.get("content")
    return backend.token_id(token) if isinstance(token, str) else None


def _id_list(value: Any) -> list[int]:
    if isinstance(value, int):
        return [value]
    return [token for token in value if isinstance(token, int)] if isinstance(value, list) else []
