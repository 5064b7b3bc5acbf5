"""The command itself, as a process on the bundled model."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import openai
import pytest

from mlx_step35.server import run

START_S = 120


@pytest.fixture(scope="module")
def nano_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[subprocess.Popen[str], str]]:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    log = tmp_path_factory.mktemp("log") / "server.log"
    command = [sys.executable, "-m", "mlx_step35.server", "--model", "nano", "--port", str(port)]
    with log.open("w") as output:
        process = subprocess.Popen([*command, "--temp", "0"], stdout=output, stderr=output, text=True)
    base = f"http://127.0.0.1:{port}"
    end = time.monotonic() + START_S
    while time.monotonic() < end and process.poll() is None:
        try:
            if httpx.get(base + "/health", verify=False).status_code == 200:
                break
        except httpx.ConnectError:
            pass
        time.sleep(0.1)
    else:
        pytest.fail(log.read_text())
    yield process, base
    if process.poll() is None:
        process.kill()
    process.wait()


def test_nano_answers_both_ways_alike(nano_server: tuple[subprocess.Popen[str], str]) -> None:
    client = openai.OpenAI(base_url=nano_server[1] + "/v1", api_key="any", max_retries=0)
    message: openai.types.chat.ChatCompletionUserMessageParam = {"role": "user", "content": "Hello!"}
    whole = client.chat.completions.create(model="nano", messages=[message], max_tokens=40)
    stream = client.chat.completions.create(model="nano", messages=[message], max_tokens=40, stream=True)
    streamed = "".join(chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices)
    assert streamed == (whole.choices[0].message.content or "")
    assert whole.usage and whole.usage.completion_tokens > 0


def test_a_signal_ends_it_with_zero(nano_server: tuple[subprocess.Popen[str], str]) -> None:
    process, base = nano_server
    body = {"model": "nano", "messages": [{"role": "user", "content": "hi"}], "stream": True}
    with httpx.stream("POST", base + "/v1/chat/completions", json=body, verify=False) as answer:
        next(answer.iter_lines())
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0


def test_a_model_that_cannot_be_loaded_is_a_failure(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MLX_STEP35_API_KEY", raising=False)
    assert run(["--model", str(tmp_path)]) == 1
    assert run(["--model", str(tmp_path / "nothing")]) == 2
    assert run(["--model", "nano", "--host", "0.0.0.0"]) == 2
    errors = capfd.readouterr().err
    assert errors.count("error: ") == 3 and "--api-key" in errors


def test_help_is_quick_and_clean() -> None:
    command = [sys.executable, "-m", "mlx_step35.server", "--help"]
    result = subprocess.run(command, capture_output=True, text=True, env=dict(os.environ))
    assert result.returncode == 0 and not result.stderr and "--prompt-cache-dir" in result.stdout
