"""Every way not to start: one line that says why, 2 for what the user has to change, 1 for what is broken."""

import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from mlx_step35 import server
from mlx_step35.errors import CapacityError, RequestError
from mlx_step35.http.listening import address_of, bind
from tests.server.scripted import NANO
from tests.tiny import tiny_config, tiny_weights, write_checkpoint

NANO_MODEL = ("--model", "nano", "--port", "0")


@pytest.fixture(autouse=True)
def no_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLX_STEP35_API_KEY", raising=False)


@pytest.mark.parametrize(
    "arguments",
    [
        ["--port", "80.5"],
        ["--port", "65536"],
        ["--port", "-1"],
        ["--prompt-cache-bytes", "1e400"],
        ["--prompt-cache-bytes=-5"],
        ["--prompt-cache-bytes", "5 apples"],
        ["--prompt-cache-dir-bytes", "nan"],
        ["--max-context", "0"],
        ["--max-queue", "none"],
        ["--temp", "nan"],
        ["--top-p", "1.5"],
        ["--keepalive", "inf"],
        ["--request-timeout", "0"],
        ["--mtp", "4"],
        ["--dtype", "int8"],
        ["--cors-origin", "example.com"],
        ["--cors-origin", "https://example.com/page"],
        ["--cors-origin", "https://example.com/"],
        ["--cors-origin", "https://example.com:443"],
        ["--cors-origin", "http://example.com:80"],
        ["--cors-origin", "http://["],
        ["--cors-origin", "nonsense"],
        ["--log-level", "loud"],
        ["--no-such-flag"],
    ],
    ids=" ".join,
)
def test_a_value_that_is_none_is_refused(arguments: list[str], capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        server.run([*NANO_MODEL, *arguments])
    errors = capfd.readouterr().err
    assert exit_.value.code == 2
    assert errors.count("error: ") == 1 and "Traceback" not in errors


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--host", "0.0.0.0"], "--api-key"),
        (["--host", "no.such.host.invalid", "--insecure"], "cannot listen at no.such.host.invalid"),
        (["--host", "host\udcff", "--insecure"], "cannot listen"),
        # A documentation address, which no machine has.
        (["--host", "192.0.2.1", "--insecure"], "cannot listen at 192.0.2.1"),
        (["--api-key", ""], "API key"),
        (["--api-key", "ключ"], "API key"),
        (["--api-key", "key\n"], "API key"),
        (["--max-context", "1000000000"], "this model holds 32768 tokens"),
        (["--prompt-cache-dir-bytes", "1GB"], "needs --prompt-cache-dir"),
        (["--model", "no-such-model"], "no model directory"),
    ],
    ids=lambda value: " ".join(map(ascii, value)) if isinstance(value, list) else "",
)
def test_what_cannot_be_honoured_is_refused(
    arguments: list[str], reason: str, capfd: pytest.CaptureFixture[str]
) -> None:
    assert server.run([*NANO_MODEL, *arguments]) == 2
    assert reason in only_error(capfd)


def test_a_model_too_large_for_memory_is_the_users_to_change(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise CapacityError("it takes 200.0 GB,\nbut 100.0 GB are available")

    monkeypatch.setattr(server, "check_load", refuse)
    assert server.run(NANO_MODEL) == 2
    assert "200.0 GB, but 100.0 GB" in only_error(capfd)


def test_drafts_need_heads(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    raw = tiny_config()
    path = write_checkpoint(tmp_path / "model", raw, tiny_weights(raw, mtp=False))
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(NANO / name, path)
    assert server.run(["--model", str(path), "--port", "0", "--mtp", "2"]) == 2
    assert "--mtp 2 needs MTP layers" in only_error(capfd)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("config.json", b"{"),
        ("config.json", b"\xff\xfe"),
        ("config.json", b"[]"),
        ("tokenizer.json", b"{}"),
        ("tokenizer_config.json", b"{"),
        ("chat_template.jinja", b"{% if %}"),
        ("model-00001-of-00003.safetensors", b"\x08\0\0\0\0\0\0\0{      }"),
        ("model-00001-of-00003.safetensors", b""),
    ],
    ids=str,
)
def test_a_broken_checkpoint_is_a_failure(
    tmp_path: Path, name: str, content: bytes, capfd: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "model"
    shutil.copytree(NANO, path)
    (path / name).write_bytes(content)
    assert server.run(["--model", str(path), "--port", "0"]) == 1
    only_error(capfd)


def test_what_goes_wrong_while_loading_is_a_failure(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise MemoryError

    monkeypatch.setattr(server, "prepare", fail)
    assert server.run(NANO_MODEL) == 1
    assert only_error(capfd) == "error: MemoryError"


def test_processes_end_with_the_code(tmp_path: Path) -> None:
    """As processes: MLX's threads abort an interpreter that leaves in any other way than `main` does."""
    (tmp_path / "file").touch()
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        cases = (
            (["--model", "nano", "--port", port], "Address already in use"),
            ([*NANO_MODEL, "--prompt-cache-dir", str(tmp_path / "file")], "cannot be used"),
        )
        for arguments, reason in cases:
            command = [sys.executable, "-m", "mlx_step35.server", *arguments]
            result = subprocess.run(command, capture_output=True, text=True, env=dict(os.environ))
            assert result.returncode == 2, result.stderr
            assert reason in result.stderr and "is ready" not in result.stderr
            assert "Traceback" not in result.stderr


def test_every_address_of_a_name_gets_the_same_port() -> None:
    listeners = bind("localhost", 0)
    try:
        assert len({listener.getsockname()[1] for listener in listeners}) == 1
        assert address_of(listeners[0]).rpartition(":")[0] in ("127.0.0.1", "[::1]")
        listeners[0].listen()
        with pytest.raises(RequestError, match="cannot listen"):
            bind("localhost", listeners[0].getsockname()[1])
    finally:
        for listener in listeners:
            listener.close()


def only_error(capfd: pytest.CaptureFixture[str]) -> str:
    """The one line that says why; log lines begin with a date."""
    lines = capfd.readouterr().err.splitlines()
    errors = [line for line in lines if not line[:4].isdecimal()]
    assert len(errors) == 1 and errors[0].startswith("error: "), lines
    return errors[0]
