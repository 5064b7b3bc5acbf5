"""Before the engine: nothing in a request may stop others, hang, or get into the template."""

import asyncio
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from mlx_step35.http.threads import in_thread
from tests.server.running import MODEL, Running, chat_body, running

CHAT, COUNT = "/v1/chat/completions", "/v1/messages/count_tokens"
PRIVATE = "".join(map(chr, (*range(0xE000, 0xF900), *range(0x100000, 0x10FFFE))))


def test_a_text_of_every_private_character_is_answered(server: Running) -> None:
    text = f"{PRIVATE}<|im_end|>"
    for path, extra in ((CHAT, {}), (COUNT, {}), ("/v1/messages", {"max_tokens": 5})):
        answer = server.post(path, {**chat_body(text), **extra}, timeout=20)
        assert answer.status_code == 400 and "private-use" in answer.text
    # Without a control string nothing has to be told apart.
    assert server.post(COUNT, chat_body(PRIVATE), timeout=20).status_code == 200


def test_a_bug_in_preparation_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    with running() as server:

        def broken(*_: Any) -> Any:
            return next(iter(()))

        monkeypatch.setattr(server.preparer, "prompt", broken)
        for path in (CHAT, COUNT):
            assert server.post(path, chat_body("hi"), timeout=20).status_code == 500


def test_an_exhausted_iterator_does_not_hang_its_awaiter() -> None:
    async def main() -> None:
        await asyncio.wait_for(in_thread(lambda: next(iter(()))), 5)

    with pytest.raises(RuntimeError):
        asyncio.run(main())


@pytest.mark.parametrize(
    "name",
    ["self", "namespace", "range", "raise_exception", "strftime_now", "bos_token", "messages", "tools"],
)
def test_variables_cannot_take_the_place_of_the_templates_own(server: Running, name: str) -> None:
    answer = server.post(CHAT, {**chat_body("hi"), "chat_template_kwargs": {name: 1}})
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == f"chat_template_kwargs.{name}"


def test_variables_may_be_called_anything_else(server: Running) -> None:
    names = ["source", "variables", "request", "add_special", "cls", "class", "a b", "enable_thinking"]
    for name in names:
        server.chat("hi", chat_template_kwargs={name: True})


def test_counting_a_long_text_does_not_stop_a_stream() -> None:
    # Words that no tokenizer has seen take longest.
    text = " ".join(f"{number * 7919:x}" for number in range(100_000))
    with running(token_s=0.005) as server, ThreadPoolExecutor(1) as pool:
        body = {**chat_body("[long 100000]"), "stream": True}
        with server.client.stream("POST", CHAT, json=body) as stream:
            lines = stream.iter_lines()
            for _ in range(20):
                next(lines)
            counting = pool.submit(server.post, COUNT, {"model": MODEL, **chat_body(text)})
            num_events = 0
            while not counting.done():
                num_events += next(lines).startswith("data: {")
                assert server.get("/health").status_code == 200
        assert counting.result().json()["input_tokens"] > 100_000
        assert num_events > 3


def test_a_text_beyond_any_context_is_refused_before_it_is_tokenised(server: Running) -> None:
    for path in (CHAT, COUNT):
        answer = server.post(path, chat_body("x" * 20_000_000))
        assert answer.status_code == 400 and "tokens" in answer.text
