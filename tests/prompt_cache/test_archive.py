"""`generate --prompt-cache-file`: the same text as without, from fewer tokens."""

import json
from pathlib import Path
from typing import Any

import pytest

from mlx_step35.generate.cli import run

SYSTEM = "You answer in one short sentence. " * 12


def generate(tmp_path: Path, prompt: str, *flags: str) -> dict[str, Any]:
    stats = tmp_path / "stats.json"
    arguments = ["--model", "nano", "--temp", "0", "--max-tokens", "12", "--system-prompt", SYSTEM]
    assert run([*arguments, "--prompt", prompt, "--stats", str(stats), *flags]) == 0
    found: dict[str, Any] = json.loads(stats.read_text())
    return found


def test_a_second_run_continues(tmp_path: Path) -> None:
    flags = ("--prompt-cache-file", str(tmp_path / "cache"))
    cold = {prompt: generate(tmp_path, prompt) for prompt in ("What is blue?", "Why?")}
    first = generate(tmp_path, "What is blue?", *flags)
    assert first["cached_tokens"] == 0
    assert (tmp_path / "cache").stat().st_mode & 0o777 == 0o600
    for prompt in ("What is blue?", "Why?", "What is blue?"):
        again = generate(tmp_path, prompt, *flags)
        assert again["token_ids"] == cold[prompt]["token_ids"]
        assert again["prompt_tokens"] == cold[prompt]["prompt_tokens"]
        # At least the system prompt.
        assert again["cached_tokens"] > 50


def test_a_file_that_cannot_be_used(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / "cache"
    flags = ("--prompt-cache-file", str(file))
    whole = generate(tmp_path, "What is blue?", *flags)
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    for damaged in (bytes(data), bytes(data[:-100])):
        file.write_bytes(damaged)
        caplog.clear()
        again = generate(tmp_path, "What is blue?", *flags)
        assert (again["token_ids"], again["cached_tokens"]) == (whole["token_ids"], 0)
        assert "is not used" in caplog.text
    file.write_text("my thesis")
    assert run(["--model", "nano", "--prompt", "x", *flags]) == 2
    assert "is not a prompt cache" in capsys.readouterr().err
    assert file.read_text() == "my thesis"
    assert run(["--model", "nano", "--prompt", "x", "--prompt-cache-file", str(tmp_path / "no" / "f")]) == 2
