"""The engine's queue: fair, bounded, and free as soon as nobody waits for an answer."""

import asyncio
from typing import Any

import pytest

from mlx_step35.api.openai import parse_chat
from mlx_step35.engine.engine import Engine, OverloadedError
from mlx_step35.engine.queue import FairQueue
from mlx_step35.engine.request import Failed, Finished, Progress, Started, Token
from mlx_step35.errors import CheckpointError
from mlx_step35.http.preparing import Preparer
from mlx_step35.http.settings import GenerationDefaults
from tests.server.running import chat_body
from tests.server.scripted import nano_texts, scripted_runner

CONTEXT_LENGTH = 4096


def make_engine(max_queue: int = 4) -> tuple[Engine, Preparer]:
    tokenizer, template = nano_texts()
    preparer = Preparer(tokenizer, template, GenerationDefaults(), CONTEXT_LENGTH)
    return Engine(lambda: scripted_runner(tokenizer, CONTEXT_LENGTH), max_queue), preparer


def request(preparer: Preparer, text: str, client: str = "") -> Any:
    return preparer.chat(parse_chat(chat_body(text)), "call_", client)


async def events_of(submission: Any) -> list[Any]:
    events: list[Any] = []
    while not (events and isinstance(events[-1], Finished | Failed)):
        events += await submission.take(5)
    return events


def test_clients_take_turns() -> None:
    queue: FairQueue[str] = FairQueue()
    for job in ("a1", "a2", "a3", "b1", "c1", "b2"):
        queue.put(job[0], job)
    assert queue.remove("a", "a2") and not queue.remove("a", "a2")
    assert [queue.get() for _ in range(5)] == ["a1", "b1", "c1", "a3", "b2"]
    queue.close()
    assert queue.get() is None


def test_an_answer_is_started_made_and_finished() -> None:
    async def main() -> list[Any]:
        engine, preparer = make_engine()
        engine.start()
        events = await events_of(engine.submit(request(preparer, "[say hi]")))
        await asyncio.to_thread(engine.stop)
        return events

    events = asyncio.run(main())
    kinds = [type(event) for event in events]
    assert kinds[0] is Started and kinds[1] is Progress and kinds[-1] is Finished and Token in kinds
    assert events[-1].output.content == "hi" and len(events[-1].tokens) > 3


def test_requests_wait_while_the_model_loads_and_places_are_bounded() -> None:
    async def main() -> None:
        engine, preparer = make_engine(max_queue=2)
        first = engine.submit(request(preparer, "[say one]"))
        second = engine.submit(request(preparer, "[say two]"))
        with pytest.raises(OverloadedError):
            engine.submit(request(preparer, "[say three]"))
        second.cancel()
        assert engine.num_open == 1
        third = engine.submit(request(preparer, "[say three]"))
        engine.start()
        for submission, text in ((first, "one"), (third, "three")):
            assert (await events_of(submission))[-1].output.content == text
        await asyncio.to_thread(engine.stop)
        assert engine.num_open == 0
        with pytest.raises(OverloadedError):
            engine.submit(request(preparer, "late"))

    asyncio.run(main())


def test_cancelling_ends_a_prefill_and_a_generation() -> None:
    async def main() -> None:
        engine, preparer = make_engine()
        engine.start()
        for text in ("[slow 60]", "[long 3000]"):
            submission = engine.submit(request(preparer, text))
            while not any(
                isinstance(event, Started | Token | Progress) for event in await submission.take(5)
            ):
                pass
            submission.cancel()
            answer = engine.submit(request(preparer, "[say free]"))
            assert (await asyncio.wait_for(events_of(answer), 5))[-1].output.content == "free"
        await asyncio.to_thread(engine.stop)
        assert engine.num_open == 0

    asyncio.run(main())


def test_loading_that_fails_is_told() -> None:
    def load() -> Any:
        raise CheckpointError("no weights")

    async def main() -> None:
        engine = Engine(load)
        _, preparer = make_engine()
        waiting = engine.submit(request(preparer, "hi"))
        engine.start()
        assert isinstance((await waiting.take(5))[0], Failed) and engine.num_open == 0
        assert str(await engine.loaded()) == "no weights" and engine.state == "failed"
        await asyncio.to_thread(engine.stop)

    asyncio.run(main())
