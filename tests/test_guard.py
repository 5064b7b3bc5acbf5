"""Refusals before anything is allocated: with an injected limit, by library, command line and server."""

from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten

from mlx_step35 import guard, server
from mlx_step35.checkpoint import read_config, resolve_model
from mlx_step35.checkpoint.inventory import inventory
from mlx_step35.costs import readable_bytes
from mlx_step35.decoding import DecodeOptions, decode
from mlx_step35.errors import CapacityError, RequestError
from mlx_step35.generate import cli, load
from mlx_step35.generate.api import stream_tokens
from mlx_step35.guard import Headroom, answer_length, check_load, planner_of, prefill_chunk, shortage
from mlx_step35.memory import CPU, PREFILL_CHUNKS, Planner
from mlx_step35.model import Model
from mlx_step35.sampling import SamplingParams

SMALL = Headroom(limit=20_000_000, in_use=1_000_000, free=10**12)


@pytest.fixture
def nano() -> Planner:
    path = resolve_model("nano")
    config = read_config(path)
    return Planner.of_tensors(config, inventory(path, config), CPU)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> Headroom:
    """A device that nano does not fit."""
    monkeypatch.setattr(guard, "headroom", lambda: SMALL)
    return SMALL


def test_a_model_that_does_not_fit_is_refused_with_the_numbers(nano: Planner) -> None:
    path = resolve_model("nano")
    before = mx.get_active_memory()
    with pytest.raises(CapacityError) as refused:
        check_load(path, 4096, SMALL)
    needed = nano.footprint(4096, PREFILL_CHUNKS[-1]).peak
    for number in (nano.loaded_bytes, needed, SMALL.limit, SMALL.available):
        assert readable_bytes(number) in str(refused.value)
    assert mx.get_active_memory() == before
    check_load(path, 4096, Headroom(needed, 0, needed))
    with pytest.raises(CapacityError):
        check_load(path, 4096, Headroom(needed, 0, needed - 1))
    with pytest.raises(CapacityError):
        check_load(path, 4096, Headroom(needed, 1, needed))


def test_the_library_refuses(small: Headroom) -> None:
    with pytest.raises(CapacityError):
        load("nano")


def test_the_command_line_refuses(
    small: Headroom, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cli, "load_checkpoint", _never)
    assert cli.run(["--model", "nano", "--prompt", "hi"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and "19.0 MB are available" in error and error.count("\n") == 1


def test_the_command_line_keeps_to_max_context(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cli, "load_checkpoint", _never)
    assert cli.run(["--model", "nano", "--prompt", "hi " * 50, "--max-context", "10"]) == 2
    assert "the context holds 9" in capsys.readouterr().err


def test_the_server_refuses(
    small: Headroom, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(server, "load_checkpoint", _never)
    assert server.run(["--model", "nano"]) != 0
    assert "are available" in capsys.readouterr().err


def test_a_prefill_gets_the_widest_chunk_that_fits(nano: Planner) -> None:
    for chunk in PREFILL_CHUNKS:
        enough = nano.growth_bytes(0, 4096, chunk)
        assert prefill_chunk(nano, 0, 4096, 2048, Headroom(10**12, 0, enough)) == chunk
    assert prefill_chunk(nano, 0, 4096, 100, Headroom(10**12, 0, 10**12)) == 100


def test_a_context_that_can_never_fit_is_the_caller_s_fault(nano: Planner) -> None:
    limit = nano.footprint(4096, PREFILL_CHUNKS[-1]).peak
    room = Headroom(limit, nano.loaded_bytes, 10**12)
    with pytest.raises(RequestError, match="at most") as refused:
        prefill_chunk(nano, 0, 8192, 2048, room)
    assert refused.value.code == "context_length_exceeded"
    assert str(nano.max_context(limit, PREFILL_CHUNKS[-1])) in str(refused.value)


def test_a_context_that_does_not_fit_now_is_not(nano: Planner) -> None:
    with pytest.raises(CapacityError, match="free in the system"):
        prefill_chunk(nano, 0, 8192, 2048, Headroom(10**12, nano.loaded_bytes, 1000))


def test_a_decode_asks_before_it_touches_its_cache(
    tiny_model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    arrays: Any = tree_flatten(tiny_model.parameters())
    planner = planner_of(tiny_model.config, arrays)
    limit = planner.footprint(100, PREFILL_CHUNKS[-1]).peak
    monkeypatch.setattr(guard, "headroom", lambda: Headroom(limit, planner.loaded_bytes, 10**12))
    cache = tiny_model.make_cache()
    with pytest.raises(RequestError, match="at most"):
        next(decode(tiny_model, [1] * 3000, cache, SamplingParams(), DecodeOptions(4)))
    assert cache.nbytes == 0 and cache.tokens == [] and cache.pending == []


def test_an_answer_is_as_long_as_memory_allows(nano: Planner) -> None:
    enough = nano.growth_bytes(0, 1000 + 5000, 1)
    assert answer_length(nano, 0, 1000, 5000, Headroom(10**12, 0, enough)) == 5000
    fitting = answer_length(nano, 0, 1000, 5000, Headroom(10**12, 0, enough - 1))
    assert 4000 < fitting < 5000
    assert nano.growth_bytes(0, 1000 + fitting, 1) < enough <= nano.growth_bytes(0, 1001 + fitting, 1)
    assert answer_length(nano, 0, 1000, 5000, Headroom(10**12, 0, 0)) == 1


def test_a_decode_ends_before_memory_does(
    tiny_model: Model, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    arrays: Any = tree_flatten(tiny_model.parameters())
    planner = planner_of(tiny_model.config, arrays)
    enough = planner.growth_bytes(0, 300, 64)
    monkeypatch.setattr(guard, "headroom", lambda: Headroom(10**12, 0, enough))
    cache = tiny_model.make_cache()
    found = list(decode(tiny_model, [1] * 200, cache, SamplingParams(), DecodeOptions(1500)))
    assert len(found) == answer_length(planner, 0, 200, 1500) < 1500
    assert cache.nbytes <= enough
    assert f"after {len(found)} of at most 1500 tokens" in caplog.text


def test_no_more_is_freed_than_an_answer_needs(nano: Planner) -> None:
    needed = nano.growth_bytes(0, 1000 + 5000, 1)

    def missing(available: int, freeable: int) -> int:
        return shortage(nano, 0, 1000, 5000, freeable, Headroom(10**12, 10**11, available))

    assert missing(needed, 10**9) == 0
    assert missing(needed - 1000, 10**9) == 1000
    # For less than the whole answer: as much of it as can be.
    short = missing(needed // 2, needed // 4)
    assert 0 < short <= needed // 4
    assert answer_length(nano, 0, 1000, 5000, Headroom(10**12, 0, needed // 2 + short)) == answer_length(
        nano, 0, 1000, 5000, Headroom(10**12, 0, needed // 2 + needed // 4)
    )
    # The prompt does not fit whatever is freed.
    assert missing(0, 1000) == 0


def test_an_answer_that_memory_ends_has_a_reason_and_all_its_text(
    tiny_model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Letters:
        """Gives each token's letter out one token late."""

        def __init__(self) -> None:
            self._held = ""

        def add(self, token: int) -> str:
            self._held, ready = chr(64 + token), self._held
            return ready

        def finish(self) -> str:
            return self._held

    arrays: Any = tree_flatten(tiny_model.parameters())
    enough = planner_of(tiny_model.config, arrays).growth_bytes(0, 300, 64)
    monkeypatch.setattr(guard, "headroom", lambda: Headroom(10**12, 0, enough))
    parts = list(
        stream_tokens(tiny_model, [1] * 200, Letters(), frozenset(), SamplingParams(), DecodeOptions(1500))
    )
    assert len(parts) < 1500 and parts[-1].finish_reason == "length"
    assert [part.finish_reason for part in parts[:-1]] == [None] * (len(parts) - 1)
    assert "".join(part.text for part in parts) == "".join(chr(64 + part.token) for part in parts)


def test_vm_stat_is_understood() -> None:
    output = (
        "Mach Virtual Memory Statistics: (page size of 16384 bytes)\n"
        "Pages free:                              100.\nPages active:                          50000.\n"
        "Pages inactive:                           20.\nPages speculative:                         3.\n"
        'Pages purgeable:                           0.\n"Translation faults":                  123456.\n'
    )
    assert guard.parse_vm_stat(output) == 123 * 16384


def test_this_machine_has_limits() -> None:
    room = guard.headroom()
    assert 0 < room.available <= min(room.limit, guard.total_memory() * 2)


def _never(path: Path, *_: Any) -> Model:
    raise AssertionError(f"{path} was loaded")
