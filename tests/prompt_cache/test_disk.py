"""The directory of saved states: exact after a restart, and every kind of damage is a miss, never a token."""

import errno
import logging
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mlx_step35.engine.session import Session
from mlx_step35.errors import RequestError
from mlx_step35.model import Model
from mlx_step35.prompt_cache import files
from mlx_step35.prompt_cache.disk import DiskTier
from mlx_step35.prompt_cache.store import PromptCacheStore
from tests.prompt_cache.conversations import Conversation, assert_same, run, run_cold

PLENTY = 10**9
FINGERPRINT = "f" * 40


class Opened:
    """A session over a directory, as a process would have it; closing it is its end."""

    def __init__(self, model: Model, directory: Path, limit: int = PLENTY, memory: int = PLENTY) -> None:
        self.disk = DiskTier(directory, limit, FINGERPRINT)
        self.session = Session(model, PromptCacheStore(memory), self.disk, interval=50, block_tokens=16)

    def __enter__(self) -> Session:
        return self.session

    def __exit__(self, *_: object) -> None:
        self.disk.close()


def prompt_of(seed: int, length: int = 120) -> list[int]:
    rng = random.Random(seed)
    return [rng.randint(8, 30) for _ in range(length)]


def test_equal_across_restarts(tiny_model: Model, tmp_path: Path) -> None:
    rng = random.Random(1)
    conversation = Conversation(rng, prompt_of(1, 60))
    from_disk = 0
    for _ in range(4):
        with Opened(tiny_model, tmp_path / "cache") as session:
            for _ in range(3):
                conversation.edit()
                prompt, boundaries = conversation.prompt()
                warm = run(session, tiny_model, prompt, boundaries)
                assert_same(warm, run_cold(tiny_model, prompt))
                from_disk += warm.reuse.source == "disk"
                conversation.answer(warm.tokens)
    assert from_disk >= 3


def test_random_conversations_through_a_small_memory(tiny_model: Model, tmp_path: Path) -> None:
    """What memory drops comes back from disk."""
    rng = random.Random(2)
    conversations = [Conversation(rng, prompt_of(seed, 70)) for seed in range(3)]
    sources = []
    with Opened(tiny_model, tmp_path / "cache", memory=60_000) as session:
        for _ in range(15):
            conversation = rng.choice(conversations)
            conversation.edit()
            prompt, boundaries = conversation.prompt()
            warm = run(session, tiny_model, prompt, boundaries)
            assert_same(warm, run_cold(tiny_model, prompt))
            assert session.store.nbytes <= 60_000
            sources.append(warm.reuse.source)
            conversation.answer(warm.tokens)
            wait_for_writes(session)
    assert "disk" in sources


def test_the_first_draft_after_a_hit_uses_restored_state(tiny_model: Model, tmp_path: Path) -> None:
    prompt = prompt_of(3)
    with Opened(tiny_model, tmp_path / "cache") as session:
        run(session, tiny_model, prompt, mtp=3)
    with Opened(tiny_model, tmp_path / "cache") as session:
        assert session.sync(prompt).source == "disk"
        assert session.cache.mtp is not None
        assert session.cache.mtp.end == len(prompt) - 1


def test_files_are_private_and_say_nothing(tiny_model: Model, tmp_path: Path) -> None:
    old = os.umask(0)
    try:
        with Opened(tiny_model, tmp_path / "cache") as session:
            run(session, tiny_model, prompt_of(4))
    finally:
        os.umask(old)
    assert (tmp_path / "cache").stat().st_mode & 0o777 == 0o700
    names = [path.name for path in (tmp_path / "cache").iterdir()]
    assert len(names) > 3
    for path in (tmp_path / "cache").iterdir():
        assert path.stat().st_mode & 0o777 == 0o600
        assert path.name == "lock" or path.name.startswith(("kv-block-", "kv-snapshot-"))


def test_every_damage_is_a_miss(tiny_model: Model, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Flipped bytes, cut and lengthened files, and files in each other's place."""
    directory = tmp_path / "cache"
    prompt = prompt_of(5)
    cold = run_cold(tiny_model, prompt)
    rng = random.Random(5)

    def flip(path: Path) -> None:
        data = bytearray(path.read_bytes())
        at = rng.randrange(len(data))
        data[at] ^= 1 << rng.randrange(8)
        path.write_bytes(data)

    def cut(path: Path) -> None:
        path.write_bytes(path.read_bytes()[: rng.randrange(path.stat().st_size)])

    def lengthen(path: Path) -> None:
        path.write_bytes(path.read_bytes() + bytes(rng.randrange(1, 100)))

    def exchange(path: Path) -> None:
        kind = path.name.split("-")[1]
        others = [other for other in sorted(directory.glob(f"kv-{kind}-*")) if other != path]
        if others:
            path.write_bytes(rng.choice(others).read_bytes())
        else:
            flip(path)

    served = 0
    for damage in [flip, cut, lengthen, exchange] * 6:
        with Opened(tiny_model, directory) as session:
            run(session, tiny_model, prompt, [40, 80])
        for kind in ("block", "snapshot"):
            paths = sorted(directory.glob(f"kv-{kind}-*"))
            for path in rng.sample(paths, min(2, len(paths))):
                damage(path)
        caplog.clear()
        with caplog.at_level(logging.WARNING), Opened(tiny_model, directory) as session:
            warm = run(session, tiny_model, prompt, [40, 80])
            assert_same(warm, cold)
            served += warm.reuse.source == "disk"
    assert served, "nothing whole was ever served"


def test_another_models_files_are_skipped(
    tiny_model: Model, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with Opened(tiny_model, tmp_path) as session:
        run(session, tiny_model, prompt_of(6))
    disk = DiskTier(tmp_path, PLENTY, "0" * 40)
    assert list(disk.boundaries()) == []
    disk.close()
    assert "another model" in caplog.text


def test_strangers_in_the_directory_stay(tiny_model: Model, tmp_path: Path) -> None:
    stranger = tmp_path / "model.safetensors"
    stranger.write_bytes(b"weights")
    with Opened(tiny_model, tmp_path, limit=60_000) as session:
        for seed in range(6):
            run(session, tiny_model, prompt_of(seed))
            wait_for_writes(session)
    assert stranger.read_bytes() == b"weights"


def test_the_limit_holds(tiny_model: Model, tmp_path: Path) -> None:
    limit = 100_000
    with Opened(tiny_model, tmp_path, limit=limit) as session:
        for seed in range(12):
            run(session, tiny_model, prompt_of(seed, 60))
            wait_for_writes(session)
            data = sum(path.stat().st_size for path in tmp_path.glob("kv-*"))
            assert session._disk is not None and data == session._disk.nbytes <= limit
        assert any(session.store._index.items())
    with Opened(tiny_model, tmp_path, limit=limit // 4) as session:
        assert sum(path.stat().st_size for path in tmp_path.glob("kv-*")) <= limit // 4


def test_a_second_process_is_refused(tiny_model: Model, tmp_path: Path) -> None:
    with Opened(tiny_model, tmp_path), pytest.raises(RequestError, match="another process"):
        DiskTier(tmp_path, PLENTY, FINGERPRINT)
    DiskTier(tmp_path, PLENTY, FINGERPRINT).close()


def test_a_directory_that_cannot_be_used(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RequestError, match="cannot be used"):
        DiskTier(tmp_path / "file" / "cache", PLENTY, FINGERPRINT)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EACCES, errno.EIO])
def test_write_errors_cost_nothing_but_the_file(
    tiny_model: Model,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    number: int,
) -> None:
    """The disk fills up in the middle of a file, and has room again later."""
    real, room = os.write, [30_000]

    def write(descriptor: int, data: memoryview) -> int:
        if room[0] < len(data):
            raise OSError(number, os.strerror(number))
        room[0] -= len(data)
        return real(descriptor, data)

    monkeypatch.setattr(files.os, "write", write)
    with Opened(tiny_model, tmp_path) as session:
        for seed in (1, 2, 1):
            warm = run(session, tiny_model, prompt_of(seed))
            assert_same(warm, run_cold(tiny_model, prompt_of(seed)))
            wait_for_writes(session)
        assert "could not write" in caplog.text
        room[0] = PLENTY
        run(session, tiny_model, prompt_of(3))
    assert not list(tmp_path.glob(".*"))
    with Opened(tiny_model, tmp_path) as session:
        for seed in (1, 2, 3):
            warm = run(session, tiny_model, prompt_of(seed))
            assert_same(warm, run_cold(tiny_model, prompt_of(seed)))
            assert seed != 3 or warm.reuse.source == "disk"


WRITER = """
import sys
from pathlib import Path
from mlx_step35.checkpoint import load_checkpoint
from tests.prompt_cache.conversations import run
from tests.prompt_cache.test_disk import Opened, prompt_of
model = load_checkpoint(Path(sys.argv[1]))
session = Opened(model, Path(sys.argv[2])).session
print("ready", flush=True)
for seed in range(int(sys.argv[3]), 10**6):
    run(session, model, prompt_of(seed % 40), [40, 80])
"""


def kill_while_writing(model: Model, checkpoint: Path, directory: Path, times: int) -> None:
    rng = random.Random(times)
    for round_number in range(times):
        arguments = [sys.executable, "-c", WRITER, str(checkpoint), str(directory), str(round_number)]
        with subprocess.Popen(arguments, stdout=subprocess.PIPE, cwd=Path(__file__).parents[2]) as process:
            assert process.stdout is not None and process.stdout.readline() == b"ready\n"
            time.sleep(rng.uniform(0.05, 0.6))
            process.send_signal(signal.SIGKILL)
        num_served = 0
        with Opened(model, directory) as session:
            assert not list(directory.glob(".*"))
            for seed in range(round_number, round_number + 3):
                warm = run(session, model, prompt_of(seed % 40), [40, 80])
                assert_same(warm, run_cold(model, prompt_of(seed % 40)))
                num_served += warm.reuse.source == "disk"
        assert num_served, "nothing survived"


def test_kill_while_writing(tiny_model: Model, tiny_path: Path, tmp_path: Path) -> None:
    kill_while_writing(tiny_model, tiny_path, tmp_path, times=2)


@pytest.mark.exhaustive
def test_kill_while_writing_often(tiny_model: Model, tiny_path: Path, tmp_path: Path) -> None:
    kill_while_writing(tiny_model, tiny_path, tmp_path, times=20)


def wait_for_writes(session: Session) -> None:
    """Until the writer is done, and the session knows it."""
    assert session._disk is not None
    while session._disk._waiting_bytes:
        session._poll()
        time.sleep(0.002)


def test_a_live_cache_that_cannot_go_back_is_no_reason_not_to_load(tiny_model: Model, tmp_path: Path) -> None:
    prompt = prompt_of(8, 200)
    with Opened(tiny_model, tmp_path) as session:
        run(session, tiny_model, prompt[:100])
    with Opened(tiny_model, tmp_path, memory=20_000) as session:
        # More of it is live than is on disk, but too far beyond the place where the next prompt leaves.
        session.sync(prompt)
        run(session, tiny_model, prompt)
        session.store.clear()
        assert session.sync([*prompt[:120], 7, 7]).source == "disk"
