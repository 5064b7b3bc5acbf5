"""Ids and text: exact both ways, whole and streamed, and clear about broken files."""

import json
import threading
from pathlib import Path

import pytest
import sentencepiece
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_step35.chat.streams import LibraryStream
from mlx_step35.chat.tokenizer import Tokenizer
from mlx_step35.errors import CheckpointError
from tests.chat.conftest import BOS, CORPUS, PLAIN, SPECIAL, write_tokenizer

TEXTS = [
    " leading",
    "\n\nlines\r\n\t", "trailing ", "你好，世界", "🏳️‍🌈 👩‍👩‍👧 é", "\x00\x7f\u200b", "", "   ", "naïve 😀",
]  # fmt: skip


@pytest.mark.parametrize("text", TEXTS)
def test_round_trip(tokenizer: Tokenizer, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert stream(tokenizer, tokenizer.encode(text)) == text


@settings(max_examples=100, deadline=None)
@given(st.text(max_size=40) | st.sampled_from([*TEXTS, *PLAIN, *SPECIAL, CORPUS[3]]))
def test_ids_are_those_of_the_library(model_directory: Path, tokenizer: Tokenizer, text: str) -> None:
    library = tokenizers.Tokenizer.from_file(str(model_directory / "tokenizer.json"))
    assert tokenizer.encode(text) == library.encode(text, add_special_tokens=False).ids


@pytest.mark.parametrize("control", ["", "<|im_end|>"])
def test_other_threads_go_on_while_a_text_is_tokenised(tokenizer: Tokenizer, control: str) -> None:
    text = " ".join(f"{number * 7919:x}" for number in range(50_000)) + control
    tokenizer.encode_text(control)
    ticks, is_done = [0], threading.Event()

    def tick() -> None:
        while not is_done.wait(0.001):
            ticks[0] += 1

    thread = threading.Thread(target=tick)
    thread.start()
    try:
        for encode in (tokenizer.encode, tokenizer.encode_text):
            before = ticks[0]
            encode(text)
            assert ticks[0] - before > 5
    finally:
        is_done.set()
        thread.join()


@settings(max_examples=100, deadline=None)
@given(st.text(max_size=40))
def test_any_text_survives(tokenizer: Tokenizer, text: str) -> None:
    for ids in (tokenizer.encode(text), tokenizer.encode_text(text)):
        assert tokenizer.decode(ids) == text
        assert stream(tokenizer, ids) == text


def stream(tokenizer: Tokenizer, ids: list[int]) -> str:
    detokenizer = tokenizer.detokenizer()
    pieces = [detokenizer.add(token) for token in ids]
    assert not any("\ufffd" in piece for piece in pieces)
    return "".join(pieces) + detokenizer.finish()


def test_bytes_never_come_out_as_half_characters(tokenizer: Tokenizer) -> None:
    text = "naïve 😀 你好 🏳️‍🌈"
    ids = [byte_id(tokenizer, byte) for byte in text.encode()]
    assert stream(tokenizer, ids) == text
    detokenizer = tokenizer.detokenizer()
    cut = [byte_id(tokenizer, byte) for byte in "ab😀".encode()[:-1]]
    assert "".join(detokenizer.add(token) for token in cut) == "ab"
    assert detokenizer.finish() == "\ufffd"


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(0, 255), max_size=20))
def test_invalid_bytes_neither_raise_nor_differ(tokenizer: Tokenizer, values: list[int]) -> None:
    ids = [byte_id(tokenizer, value) for value in values]
    detokenizer = tokenizer.detokenizer()
    text = "".join(detokenizer.add(token) for token in ids) + detokenizer.finish()
    assert text == bytes(values).decode("utf-8", "replace")


def byte_id(tokenizer: Tokenizer, value: int) -> int:
    """The id of a byte, in the alphabet that byte-level tokenizers use."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in printable]
    character = chr(value) if value in printable else chr(256 + hidden.index(value))
    token = tokenizer.token_id(character)
    assert token is not None
    return token


def test_unknown_ids_are_nothing(tokenizer: Tokenizer) -> None:
    beyond = [tokenizer.vocab_size, 128895, -1]
    ids = tokenizer.encode("ab")
    assert tokenizer.decode([*ids, *beyond]) == "ab"
    assert stream(tokenizer, [beyond[0], *ids, *beyond, *ids]) == "abab"


def test_special_ids(tokenizer: Tokenizer) -> None:
    assert tokenizer.bos_token_id == 0
    assert tokenizer.bos_token == BOS
    assert tokenizer.eos_token_ids == (1, 2, 4)
    assert tokenizer.token_id("nonsense!") is None
    assert set(tokenizer.control_strings) == {*SPECIAL, *PLAIN}


@pytest.mark.parametrize("control", [*SPECIAL, *PLAIN])
def test_control_strings_are_single_tokens_only_on_request(tokenizer: Tokenizer, control: str) -> None:
    text = f"a {control} b"
    token = tokenizer.token_id(control)
    assert token in tokenizer.encode(text)
    ids = tokenizer.encode_text(text)
    assert token not in ids
    assert tokenizer.decode(ids) == text
    assert tokenizer.decode(tokenizer.encode(text), skip_special_tokens=True) == (
        "a  b" if control in SPECIAL else text
    )


def test_lone_surrogates_become_replacement_characters(tokenizer: Tokenizer) -> None:
    assert tokenizer.decode(tokenizer.encode("a\ud800b\ud83d\ude00")) == "a\ufffdb😀"


def test_tokens_listed_only_in_the_config(tmp_path: Path) -> None:
    extra = {"content": "<extra>", "special": True, "normalized": False}
    write_tokenizer(tmp_path, added_tokens_decoder={"712": extra})
    tokenizer = Tokenizer.from_directory(tmp_path)
    token = tokenizer.token_id("<extra>")
    assert token is not None
    assert tokenizer.encode("a<extra>") == [*tokenizer.encode("a"), token]
    assert token not in tokenizer.encode_text("a<extra>")


@pytest.mark.parametrize(("name", "content", "message"), [
    ("tokenizer.json", "{", "cannot read"),
    ("tokenizer.json", "{}", "is no tokenizer"),
    ("tokenizer_config.json", "[]", "holds no JSON object"),
    ("tokenizer_config.json", '{"added_tokens_decoder": {"x": 1}}', "is no token"),
    ("config.json", "nonsense", "cannot read"),
])  # fmt: skip
def test_broken_files_are_named(tmp_path: Path, name: str, content: str, message: str) -> None:
    write_tokenizer(tmp_path)
    (tmp_path / name).write_text(content)
    with pytest.raises(CheckpointError, match=message) as caught:
        Tokenizer.from_directory(tmp_path)
    assert name in str(caught.value)


def test_no_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"neither tokenizer\.json nor tokenizer\.model"):
        Tokenizer.from_directory(tmp_path)


@pytest.fixture(scope="module")
def pieces(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("pieces")
    (directory / "text").write_text("\n".join(CORPUS))
    sentencepiece.SentencePieceTrainer.train(
        input=str(directory / "text"),
        model_prefix=str(directory / "tokenizer"),
        model_type="bpe",
        vocab_size=520,
        byte_fallback=True,
        control_symbols=["<|im_end|>"],
        user_defined_symbols=["<think>", "  "],
        minloglevel=2,
    )
    (directory / "config.json").write_text(json.dumps({"bos_token_id": 1, "eos_token_id": 2}))
    return directory


def test_a_bare_sentencepiece_model(pieces: Path) -> None:
    tokenizer = Tokenizer.from_directory(pieces)
    for text in TEXTS:
        assert tokenizer.decode(tokenizer.encode(text)) == text
        assert stream(tokenizer, tokenizer.encode(text)) == text
    for control in ("<|im_end|>", "<think>"):
        text = f"a {control}b"
        token = tokenizer.token_id(control)
        assert token in tokenizer.encode(text)
        assert token not in tokenizer.encode_text(text)
        assert (
            tokenizer.decode(tokenizer.encode_text(text)) == tokenizer.decode(tokenizer.encode(text)) == text
        )
    assert tokenizer.bos_token_id == 1
    assert tokenizer.eos_token_ids == (2,)
    assert tokenizer.token_id("nonsense!") is None
    assert tokenizer.decode([9999]) == ""


@pytest.mark.parametrize("content", [b"", b"nonsense", b"\x0a\xff\xff\xff"])
def test_a_broken_sentencepiece_model(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "tokenizer.model").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"tokenizer\.model is no sentencepiece model"):
        Tokenizer.from_directory(tmp_path)


def test_a_run_of_invalid_bytes_costs_no_more_than_text(tokenizer: Tokenizer) -> None:
    detokenizer = tokenizer.detokenizer()
    invalid = byte_id(tokenizer, 0x80)
    text = "".join(detokenizer.add(invalid) for _ in range(50_000)) + detokenizer.finish()
    assert text == "\ufffd" * 50_000


def test_another_decoder_streams_through_the_library(tmp_path: Path) -> None:
    write_tokenizer(tmp_path)
    definition = json.loads((tmp_path / "tokenizer.json").read_text())
    definition["decoder"] = {"type": "Sequence", "decoders": [definition["decoder"]]}
    (tmp_path / "tokenizer.json").write_text(json.dumps(definition))
    tokenizer = Tokenizer.from_directory(tmp_path)
    assert isinstance(tokenizer.detokenizer(), LibraryStream)
    for text in TEXTS:
        assert stream(tokenizer, tokenizer.encode(text)) == text
    detokenizer = tokenizer.detokenizer()
    assert "".join(detokenizer.add(byte_id(tokenizer, 0x80)) for _ in range(500)) + detokenizer.finish() == (
        "\ufffd" * 500
    )
    assert detokenizer.add(tokenizer.vocab_size) == ""
