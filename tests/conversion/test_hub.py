"""Fetching from a hub, by the real huggingface_hub, from a small one that runs here."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from socket import socket
from threading import Thread

import mlx.core as mx
import pytest

from mlx_step35.checkpoint import load_checkpoint
from mlx_step35.convert import convert as convert_here

COMMIT = "0123456789abcdef0123456789abcdef01234567"
REPO = "somebody/step"


class Hub(BaseHTTPRequestHandler):
    """One repository with one commit; writes down how many bytes of which file it gave away."""

    protocol_version = "HTTP/1.1"

    def __init__(self, directory: Path, given: dict[str, int], *rest: object) -> None:
        self.directory, self.given = directory, given
        super().__init__(*rest)  # type: ignore[arg-type]

    def do_GET(self) -> None:
        names = sorted(file.name for file in self.directory.iterdir())
        if re.fullmatch(rf"/api/models/{REPO}(/revision/\w+)?(\?.*)?", self.path):
            siblings = [{"rfilename": name} for name in names]
            self._answer(200, json.dumps({"id": REPO, "sha": COMMIT, "siblings": siblings}).encode())
        elif re.fullmatch(rf"/api/models/{REPO}/tree/\w+\?.*", self.path):
            sizes = {name: (self.directory / name).stat().st_size for name in names}
            files = [
                {"type": "file", "path": name, "size": size, "oid": name} for name, size in sizes.items()
            ]
            self._answer(200, json.dumps(files).encode())
        elif match := re.fullmatch(rf"/{REPO}/resolve/\w+/([\w.-]+)", self.path):
            self._file(match[1], names)
        else:
            self._answer(404, b"{}", {"X-Error-Code": "RepoNotFound"})

    do_HEAD = do_GET

    def _file(self, name: str, names: list[str]) -> None:
        if name not in names:
            self._answer(404, b"", {"X-Error-Code": "EntryNotFound"})
            return
        data, status, headers = (self.directory / name).read_bytes(), 200, {}
        size = len(data)
        if wanted := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            first, last = int(wanted[1]), min(int(wanted[2] or size - 1), size - 1)
            data, status = data[first : last + 1], 206
            headers["Content-Range"] = f"bytes {first}-{last}/{size}"
        if self.command == "GET":
            self.given[name] = self.given.get(name, 0) + len(data)
        self._answer(status, data, {**headers, "ETag": f'"{name}"', "X-Repo-Commit": COMMIT})

    def _answer(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for key, value in (headers or {}).items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Say nothing."""


@pytest.fixture
def given() -> dict[str, int]:
    return {}


@pytest.fixture
def single_file(release_source: Path, tmp_path: Path) -> Path:
    """The release in one file without an index, as small uploads are."""
    directory = tmp_path / "upload"
    directory.mkdir()
    tensors: dict[str, mx.array] = {}
    for file in release_source.glob("*.safetensors"):
        tensors |= mx.load(str(file))
    mx.save_safetensors(str(directory / "model.safetensors"), tensors)
    for file in release_source.iterdir():
        if file.suffix != ".safetensors" and "index" not in file.name:
            (directory / file.name).write_bytes(file.read_bytes())
    return directory


@pytest.fixture
def endpoint(single_file: Path, given: dict[str, int]) -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Hub, single_file, given)) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.fixture
def nowhere() -> str:
    """An address where nothing listens: a port that was free a moment ago."""
    with socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{probe.getsockname()[1]}"


def convert(endpoint: str, home: Path, *arguments: str) -> "subprocess.CompletedProcess[str]":
    return run_python(endpoint, home, "-m", "mlx_step35.convert", *arguments)


def run_python(endpoint: str, home: Path, *arguments: str) -> "subprocess.CompletedProcess[str]":
    env = {
        **os.environ,
        "HF_ENDPOINT": endpoint,
        "HF_HOME": str(home),
        "HF_TOKEN": "hf_of_nobody",
        "HF_HUB_DISABLE_TELEMETRY": "1",
    }
    command = [sys.executable, *arguments]
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)


def test_a_dry_run_reads_the_header_of_a_single_file(
    endpoint: str, single_file: Path, tmp_path: Path, given: dict[str, int]
) -> None:
    done = convert(endpoint, tmp_path / "home", "--hf-path", REPO, "-q", "--dry-run")
    assert done.returncode == 0, done.stderr
    assert "experts" in done.stdout
    assert 0 < given["model.safetensors"] < (single_file / "model.safetensors").stat().st_size / 2


def test_a_dry_run_reads_the_header_of_a_sidecar(
    endpoint: str, single_file: Path, release_source: Path, tmp_path: Path, given: dict[str, int]
) -> None:
    converted = tmp_path / "converted"
    convert_here(str(release_source), converted)
    for file in single_file.iterdir():
        file.unlink()
    for file in converted.iterdir():
        (single_file / file.name).write_bytes(file.read_bytes())
    done = convert(endpoint, tmp_path / "home", "--hf-path", REPO, "-q", "--dry-run")
    assert done.returncode == 0, done.stderr
    assert "mtp head" in done.stdout
    assert 0 < given["mtp.safetensors"] < (single_file / "mtp.safetensors").stat().st_size / 2
    assert "model.safetensors" not in given


def test_a_conversion_from_the_hub_equals_the_local_one(
    endpoint: str, single_file: Path, tmp_path: Path
) -> None:
    for target, source in (("remote", REPO), ("local", str(single_file))):
        done = convert(
            endpoint, tmp_path / "home", "--hf-path", source, "-q", "--mlx-path", str(tmp_path / target)
        )
        assert done.returncode == 0, done.stderr
    for file in (tmp_path / "local").glob("*.safetensors"):
        if file.name.startswith("model"):
            assert (tmp_path / "remote" / file.name).read_bytes() == file.read_bytes()
    card = (tmp_path / "remote" / "README.md").read_text()
    assert COMMIT in card
    assert "license: apache-2.0" in card and "The original card" not in card


def test_an_unknown_repository_is_one_line(endpoint: str, tmp_path: Path) -> None:
    done = convert(endpoint, tmp_path / "home", "--hf-path", "nobody/nothing", "--dry-run")
    assert done.returncode == 1
    assert (
        done.stderr.strip()
        .splitlines()[-1]
        .endswith("the hub has no nobody/nothing, or this token may not see it")
    )
    assert "Traceback" not in done.stderr


def test_without_a_network_an_upload_is_one_line_and_the_result_stays(
    nowhere: str, release_source: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    arguments = ["--hf-path", str(release_source), "--mlx-path", str(out), "--upload-repo", "me/model"]
    done = convert(nowhere, tmp_path / "home", *arguments)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1].startswith("error: the hub cannot be reached for me/model")
    load_checkpoint(out)


def test_without_a_network_a_header_is_one_line(nowhere: str, tmp_path: Path) -> None:
    # The small files are there from an earlier run; the weights' header is asked for again.
    script = """
import sys
from pathlib import Path
from mlx_step35.conversion.hub import HubError, announced
try:
    announced("somebody/step", Path(sys.argv[1]))
except HubError as error:
    print(error)
"""
    (tmp_path / "small").mkdir()
    done = run_python(nowhere, tmp_path / "home", "-c", script, str(tmp_path / "small"))
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("the hub cannot be reached for somebody/step")
    assert done.stdout.count("\n") == 1


def test_starting_does_not_import_the_hub(tmp_path: Path) -> None:
    script = "import sys, mlx_step35.convert, mlx_step35.quality; print('huggingface_hub' in sys.modules)"
    done = run_python("http://127.0.0.1", tmp_path, "-c", script)
    assert done.stdout == "False\n", done.stderr
