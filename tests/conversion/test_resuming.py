"""Crashes at any moment, full disks, others' directories: nothing is lost and nothing foreign is touched."""

import errno
import json
import os
import random
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from mlx_step35.conversion import run as conversion_run
from mlx_step35.conversion.journal import locked
from mlx_step35.convert import convert, main
from mlx_step35.errors import RequestError, Step35Error
from tests.release import (
    digests,
    read_output,
)

SCRIPT = """
import os, signal, sys
from pathlib import Path
import mlx_step35.conversion.plan as plan
import mlx_step35.conversion.transform as transform
from mlx_step35.convert import main

plan.MAX_SHARD_BYTES = 1_000_000
transform.SLICE_ELEMENTS = 50_000
left = int(sys.argv[1])

def dying(call):
    def wrapper(*arguments, **options):
        global left
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return call(*arguments, **options)
    return wrapper

# Everything that changes the disk may be the last thing the process does.
for name in ("pwrite", "fsync", "open", "ftruncate"):
    setattr(os, name, dying(getattr(os, name)))
Path.replace = dying(Path.replace)
main(sys.argv[2:])
print("calls", -left, file=sys.stderr)
"""


def run_and_die(after: int, arguments: list[str]) -> tuple[int, int]:
    """Run the converter until a system call; returns the exit status and how many calls a whole run makes."""
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(after), *arguments], capture_output=True, text=True, check=False
    )
    assert done.returncode in (0, -signal.SIGKILL), done.stderr
    calls = int(done.stderr.split("calls ")[1]) if done.returncode == 0 else 0
    return done.returncode, calls


@pytest.mark.parametrize("kills", [3, pytest.param(20, marks=pytest.mark.exhaustive)])
def test_killed_at_random_moments_it_resumes_to_the_same_bytes(
    release_source: Path, tmp_path: Path, kills: int
) -> None:
    # The same name, since the card's title is the directory's.
    (tmp_path / "a").mkdir()
    arguments = ["--hf-path", str(release_source), "-q", "--mlx-path", "out"]
    here = Path.cwd()
    random.seed(kills)
    try:
        os.chdir(tmp_path / "a")
        _, calls = run_and_die(0, arguments)
        expected = digests(tmp_path / "a" / "out")
        (tmp_path / "b").mkdir()
        os.chdir(tmp_path / "b")
        killed = 0
        while killed < kills:
            # Runs get shorter as shards are finished; one that ends before its moment begins a new round.
            status, _ = run_and_die(random.randint(1, calls), arguments)
            if status == 0:
                assert digests(tmp_path / "b" / "out") == expected
                for file in (tmp_path / "b" / "out").iterdir():
                    file.unlink()
            else:
                killed += 1
        assert run_and_die(0, arguments)[0] == 0
    finally:
        os.chdir(here)
    assert digests(tmp_path / "b" / "out") == expected


def test_a_full_disk_is_one_line_and_resumes(
    release_source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("mlx_step35.conversion.plan.MAX_SHARD_BYTES", 1_000_000)
    arguments = ["--hf-path", str(release_source), "-q", "--mlx-path", str(tmp_path / "out")]
    room = 2_000_000
    pwrite = os.pwrite

    def full(fd: int, data: Any, offset: int) -> int:
        nonlocal room
        room -= len(data)
        if room < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return pwrite(fd, data, offset)

    with monkeypatch.context() as patch, pytest.raises(SystemExit) as exited:
        patch.setattr(os, "pwrite", full)
        main(arguments)
    assert exited.value.code == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: No space left on device") and "same command" in error
    assert not list((tmp_path / "out").glob(".*.partial"))
    done = set((tmp_path / "out").glob("model-*.safetensors"))
    assert done
    times = {file: file.stat().st_mtime_ns for file in done}
    main(arguments)
    assert {file: file.stat().st_mtime_ns for file in done} == times
    convert(str(release_source), tmp_path / "fresh", True)
    assert read_output(tmp_path / "fresh") == read_output(tmp_path / "out")
    assert not list((tmp_path / "out").glob(".*"))


def test_too_small_a_disk_is_refused_before_writing(
    release_source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    usage = type("Usage", (), {"free": 1000})()
    monkeypatch.setattr(conversion_run.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(SystemExit) as exited:
        main(["--hf-path", str(release_source), "--mlx-path", str(tmp_path / "out")])
    assert exited.value.code == 2
    assert "MB more, its disk has 1.0 kB free" in capsys.readouterr().err


def test_a_finished_conversion_is_left_alone(release_source: Path, tmp_path: Path) -> None:
    convert(str(release_source), tmp_path / "out", True)
    (tmp_path / "out" / "README.md").write_text("my own words")
    before = digests(tmp_path / "out")
    convert(str(release_source), tmp_path / "out", True)
    assert digests(tmp_path / "out") == before


@pytest.mark.parametrize(
    "gone", ["model.safetensors", "mtp.safetensors", "config.json", "chat_template.jinja", "README.md"]
)
def test_what_is_gone_from_a_finished_conversion_is_written_again(
    release_source: Path, tmp_path: Path, gone: str, capsys: pytest.CaptureFixture[str]
) -> None:
    convert(str(release_source), tmp_path / "out", True)
    before = digests(tmp_path / "out")
    (tmp_path / "out" / gone).unlink()
    capsys.readouterr()
    convert(str(release_source), tmp_path / "out", True)
    assert "complete already" not in capsys.readouterr().out
    assert digests(tmp_path / "out") == before


def test_a_cut_shard_of_a_finished_conversion_is_written_again(release_source: Path, tmp_path: Path) -> None:
    convert(str(release_source), tmp_path / "out", True)
    before = digests(tmp_path / "out")
    shard = tmp_path / "out" / "model.safetensors"
    shard.write_bytes(shard.read_bytes()[:-100])
    convert(str(release_source), tmp_path / "out", True)
    assert digests(tmp_path / "out") == before


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("identity", [], "another source"),
        ("identity", 3, "is damaged"),
        ("identity", "x", "is damaged"),
        ("checksums", [], "is damaged"),
        ("checksums", {"model.safetensors": 3}, "is damaged"),
        ("complete", "yes", "is damaged"),
        ("format", 99, "has format 99, this version continues 1"),
    ],
)
def test_a_journal_that_is_none_of_ours_is_one_line(
    release_source: Path, tmp_path: Path, field: str, value: object, message: str
) -> None:
    convert(str(release_source), tmp_path / "out", True)
    journal = tmp_path / "out" / "conversion.json"
    journal.write_text(json.dumps(json.loads(journal.read_text()) | {field: value}))
    before = digests(tmp_path / "out")
    with pytest.raises(Step35Error, match=message):
        convert(str(release_source), tmp_path / "out", True)
    assert digests(tmp_path / "out") == before


def test_foreign_directories_are_refused_untouched(release_source: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(RequestError, match=r"holds 'thesis\.txt' but no conversion\.json"):
        convert(str(release_source), tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["thesis.txt"]
    with pytest.raises(RequestError, match="is a file"):
        convert(str(release_source), tmp_path / "thesis.txt")


def test_another_recipe_or_source_is_refused(
    release_source: Path, float_source: Path, tmp_path: Path
) -> None:
    convert(str(release_source), tmp_path / "out", True)
    before = digests(tmp_path / "out")
    with pytest.raises(RequestError, match="another recipe"):
        convert(str(release_source), tmp_path / "out", True, q_bits=8)
    with pytest.raises(RequestError, match="another source"):
        convert(str(float_source), tmp_path / "out", True)
    assert digests(tmp_path / "out") == before


def test_a_second_converter_is_refused(release_source: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with locked(tmp_path / "out"), pytest.raises(RequestError, match="another conversion is writing"):
        convert(str(release_source), tmp_path / "out")
    convert(str(release_source), tmp_path / "out")
