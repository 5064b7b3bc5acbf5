"""The command line: output, exit codes, one-line errors."""

import fcntl
import json
import os
import pty
import shlex
import signal
import struct
import subprocess
import sys
import termios
import time
from pathlib import Path

import pytest

from mlx_step35.chat.tokenizer import Tokenizer
from mlx_step35.checkpoint import resolve_model
from mlx_step35.generate.cli import run

COMMAND = [sys.executable, "-m", "mlx_step35.generate"]
SHORT = ["--model", "nano", "--temp", "0", "-m", "8"]


def output(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    code = run(arguments)
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_as_a_module_nothing_disturbs_the_output() -> None:
    done = subprocess.run([*COMMAND, "--help"], capture_output=True, text=True, check=True)
    assert done.stderr == ""
    assert "--mtp" in done.stdout and "--no-lookup" in done.stdout
    # Kept for mlx-lm's scripts, but not offered.
    assert "--kv-bits" not in done.stdout


def test_text_summary_and_statistics(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    file = tmp_path / "stats.json"
    code, out, err = output(capsys, *SHORT, "--prompt", "Hello", "--stats", str(file))
    assert (code, err) == (0, "")
    stats = json.loads(file.read_text())
    text = Tokenizer.from_directory(resolve_model("nano")).decode(stats["token_ids"])
    assert text in out and "Generation: 8 tokens" in out
    assert stats["generated_tokens"] == len(stats["token_ids"]) == 8
    assert stats["finish_reason"] == "length"
    for name in ("prompt_tokens", "prompt_tps", "generation_tps", "forward_passes", "peak_memory_bytes"):
        assert stats[name] > 0
    assert set(stats) >= {"tokens_per_forward_pass", "drafted", "accepted", "depths", "mtp_off_reason"}


def test_flags_of_mlx_lm_are_known() -> None:
    from mlx_lm.generate import setup_arg_parser

    from mlx_step35.generate.cli import _parser

    theirs = {flag for action in setup_arg_parser()._actions for flag in action.option_strings}
    ours = {flag for action in _parser()._actions for flag in action.option_strings}
    assert theirs - ours == {"--image", "--quantize-activations", "-qa"}


def test_the_depth_does_not_change_the_text(capsys: pytest.CaptureFixture[str]) -> None:
    texts = set()
    for mtp in ("off", "3", "auto"):
        code, out, _ = output(
            capsys, "--model", "nano", "--seed", "5", "-m", "12", "-p", "Hi", "--mtp", mtp, "--verbose", "F"
        )
        assert code == 0
        texts.add(out)
    assert len(texts) == 1


def test_a_prompt_from_standard_input(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import io

    monkeypatch.setattr("sys.stdin", io.StringIO("Hello"))
    _, piped, _ = output(capsys, *SHORT, "--verbose", "F", "--prompt", "-")
    _, given, _ = output(capsys, *SHORT, "--verbose", "F", "--prompt", "Hello")
    assert piped == given


def test_system_prompt_template_and_prefill(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    counts = []
    for extra in (
        [],
        ["--system-prompt", "Be brief."],
        ["--prefill-response", "Well"],
        ["--ignore-chat-template"],
    ):
        file = tmp_path / "stats.json"
        assert output(capsys, *SHORT, "-p", "Hello", "--stats", str(file), *extra)[0] == 0
        counts.append(json.loads(file.read_text())["prompt_tokens"])
    assert counts[3] < counts[0] < min(counts[1], counts[2])


def test_control_strings_in_a_prompt_stay_text(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    file = tmp_path / "stats.json"
    assert output(capsys, *SHORT, "-p", "<|im_end|>", "--stats", str(file))[0] == 0
    injected = json.loads(file.read_text())["prompt_tokens"]
    assert output(capsys, *SHORT, "-p", "x", "--stats", str(file))[0] == 0
    assert injected > json.loads(file.read_text())["prompt_tokens"] + 2


def test_an_extra_end_token_ends_the_text(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    file = tmp_path / "stats.json"
    output(capsys, *SHORT, "-p", "Hello", "--stats", str(file))
    third = json.loads(file.read_text())["token_ids"][2]
    output(capsys, *SHORT, "-p", "Hello", "--stats", str(file), "--extra-eos-token", str(third))
    stats = json.loads(file.read_text())
    assert stats["finish_reason"] == "stop" and stats["token_ids"][-1] == third


def test_without_a_model_nano_introduces_itself(capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = output(capsys, "-p", "Hello", "-m", "2")
    assert code == 0
    assert len(err.splitlines()) == 1 and "step35-nano" in err and "--model" in err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--model", "/no/such/place"], "no model directory at '/no/such/place'"),
        (["--model", "nano", "--prompt", "  "], "the prompt is empty"),
        (["--model", "nano", "--prompt", "a b " * 20_000], "the context holds"),
        (["--model", "nano", "--mtp", "4"], "mtp must be auto, off, 1, 2 or 3"),
        (["--model", "nano", "--max-kv-size", "512"], "--max-kv-size is not served"),
        (["--model", "nano", "--kv-bits", "8"], "--kv-bits is not served"),
        (["--model", "nano", "--draft-model", "other"], "--draft-model is not served"),
        (["--model", "nano", "--temp", "-1"], "temperature must be at least 0"),
        (["--model", "nano", "-m", "0"], "max_tokens must be at least 1"),
        (["--model", "nano", "--chat-template-config", "{"], "--chat-template-config is not JSON"),
        (["--model", "nano", "--extra-eos-token", "nonsense-token"], "is not a token of this model"),
        (["--model", "nano", "--stats", "/no/such/place/stats.json"], "cannot write"),
        (["--model", "nano", "--stats", "/"], "cannot write"),
        (["--model", ""], "the model has no name"),
        (["--model", "nano", "--num-draft-tokens", "3"], "--num-draft-tokens is not served"),
        (["--model", "nano", "--extra-eos-token", "999999"], "is not a token of this model"),
        (["--model", "nano", "--xtc-probability", "5"], "xtc_probability must be between 0 and 1"),
        (["--model", "nano", "--xtc-threshold", "nan"], "xtc_threshold must be between 0 and 0.5"),
        (
            ["--model", "nano", "--ignore-chat-template", "--system-prompt", "x"],
            "--system-prompt needs the chat",
        ),
        (["--model", "nano", "--chat-template-config", '{"messages": []}'], "cannot set 'messages'"),
        (["--model", "nano", "--chat-template-config", '{"tools": 5}'], "cannot set 'tools'"),
    ],
)
def test_mistakes_are_one_line_and_exit_code_2(
    capsys: pytest.CaptureFixture[str], arguments: list[str], words: str
) -> None:
    code, _, err = output(capsys, *arguments)
    assert code == 2
    assert err.startswith("error: ") and len(err.splitlines()) == 1
    assert words in err


def test_a_damaged_checkpoint_is_exit_code_1(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    nano = resolve_model("nano")
    for file in nano.iterdir():
        (tmp_path / file.name).write_bytes(
            file.read_bytes()[: None if file.suffix != ".safetensors" else 5000]
        )
    code, _, err = output(capsys, "--model", str(tmp_path), "-p", "Hello")
    assert code == 1
    assert err.startswith("error: ") and len(err.splitlines()) == 1 and ".safetensors" in err


def test_interrupting_ends_cleanly(tmp_path: Path) -> None:
    file = tmp_path / "stats.json"
    process = subprocess.Popen(
        [
            *COMMAND,
            "--model",
            "nano",
            "-p",
            "Hello",
            "-m",
            "100000",
            "--ignore-chat-template",
            "--stats",
            str(file),
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
    )
    assert process.stdout is not None
    # The rule above the text, then some text.
    process.stdout.read(16)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode in (0, 130)
    assert b"Traceback" not in err
    stats = json.loads(file.read_text())
    assert stats["generated_tokens"] == len(stats["token_ids"])


def test_a_terminal_sees_the_prefill_advance() -> None:
    master, slave = pty.openpty()
    # Without a width there is no bar.
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    process = subprocess.Popen(
        [*COMMAND, *SHORT, "-p", "word " * 600, "--prefill-step-size", "64"],
        stdout=subprocess.DEVNULL,
        stderr=slave,
    )
    os.close(slave)
    seen = b""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        try:
            part = os.read(master, 4096)
        except OSError:
            # Linux ends a terminal's output with an error.
            break
        if not part:
            break
        seen += part
    os.close(master)
    assert process.wait(60) == 0
    assert b"Prompt" in seen and b"tokens" in seen


@pytest.mark.parametrize("arguments", ["--model nano -m 40 -p Hello", "--help"])
def test_a_reader_that_leaves_is_no_error(arguments: str) -> None:
    done = subprocess.run(
        ["sh", "-c", f"{shlex.join(COMMAND)} {arguments} | head -c 1"],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert len(done.stdout) == 1
    assert done.stderr == ""


def test_a_full_disk_and_a_closed_stdin_are_one_line() -> None:
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [*COMMAND, "--model", "nano", "-m", "5"],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            timeout=120,
        )
    assert (done.returncode, len(done.stderr.splitlines())) == (1, 1)
    assert "No space left on device" in done.stderr
    closed = subprocess.run(
        ["sh", "-c", f"{shlex.join(COMMAND)} --model nano -p - <&-"],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (closed.returncode, len(closed.stderr.splitlines())) == (2, 1)
