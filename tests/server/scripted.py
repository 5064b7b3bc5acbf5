"""A decode function that says what the last user text tells it to: the server above it is the real one.

It forces token ids, and keeps real caches at the offsets they would have, so that detokenising, stop strings,
the output parser and the prompt cache work as with a model. Directives, as in tests/clients/check.py:
[tool NAME {json}]  [tools2 NAME {json}]  [slow SECONDS]  [long N]  [say TEXT]  [fail]  [fail-prefill]
"""

import json
import re
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlx_step35.cache import ModelCache
from mlx_step35.chat.template import ChatTemplate
from mlx_step35.chat.tokenizer import Tokenizer
from mlx_step35.config import ModelConfig
from mlx_step35.decoding import Decoded, DecodeOptions, DecodeStats
from mlx_step35.engine.runner import Runner, Settings
from mlx_step35.engine.session import Session
from mlx_step35.model import Model
from mlx_step35.prompt_cache.store import PromptCacheStore
from tests.tiny import tiny_config

NANO = Path(__file__).parents[2] / "mlx_step35" / "nano"
PREFILL_TICK_S = 0.05
# Characters encoded at once.
CHUNK = 4096


@dataclass(frozen=True, slots=True)
class Conversation:
    """What a script sees: the whole prompt, and the user's last text in it."""

    text: str

    @property
    def turns(self) -> list[str]:
        """Every turn, the opened one of the answer last."""
        return self.text.split("<|im_start|>")

    @property
    def user_text(self) -> str:
        turn = next((turn for turn in reversed(self.turns) if turn.startswith("user\n")), "")
        return turn.removeprefix("user\n").split("<|im_end|>")[0]


# What to generate, from inside the thinking block on.
Script = Callable[[Conversation], str]


def nano_texts() -> tuple[Tokenizer, ChatTemplate]:
    return Tokenizer.from_directory(NANO), ChatTemplate.from_directory(NANO)


def obey(conversation: Conversation) -> str:
    """What check.py expects of a scripted engine."""
    thoughts, user_text = "Let me think.\n</think>\n", conversation.user_text
    if match := re.search(r"\[(tool|tools2) (\S+) (\{.*?\})\]", user_text):
        call = render_call(match[2], json.loads(match[3]))
        return thoughts + call * (2 if match[1] == "tools2" else 1)
    if match := re.search(r"\[long (\d+)\]", user_text):
        return thoughts + " ".join(f"w{number}" for number in range(int(match[1])))
    if match := re.search(r"\[say (.*?)\]", user_text, re.DOTALL):
        return thoughts + match[1]
    return thoughts + "Hello there."


def render_call(name: str, arguments: dict[str, Any]) -> str:
    """A call as the model writes it."""
    parameters = "".join(
        f"<parameter={key}>\n{value if isinstance(value, str) else json.dumps(value)}\n</parameter>\n"
        for key, value in arguments.items()
    )
    return f"<tool_call>\n<function={name}>\n{parameters}</function>\n</tool_call>"


class ScriptedDecode:
    """Stands in for `decoding.decode`."""

    def __init__(self, tokenizer: Tokenizer, script: Script = obey, token_s: float = 0.0) -> None:
        self._tokenizer = tokenizer
        self._script = script
        self._token_s = token_s
        self._logprobs: mx.array | None = None

    def __call__(
        self,
        model: Model,
        prompt: Sequence[int],
        cache: ModelCache,
        sampling: object,
        options: DecodeOptions,
        *,
        on_prefill: Callable[[int, int], None],
        constraint: Any,
        stats: DecodeStats,
        controller: object,
    ) -> Iterator[Decoded]:
        conversation = Conversation(self._tokenizer.decode([*cache.tokens, *cache.pending, *prompt]))
        user_text = conversation.user_text
        stats.prompt_tokens, stats.cached_tokens = len(prompt), len(cache.tokens)
        self._prefill(cache, [*cache.pending, *prompt], options, on_prefill, user_text)
        if "[fail-prefill]" in user_text:
            raise RuntimeError("the script says so")
        output = self._script(conversation)
        is_closed = conversation.text.rstrip().endswith("</think>")
        if is_closed:
            output = output.partition("</think>\n")[2]
        given: list[int] = []
        try:
            for token in self._allowed(self._tokens(output), constraint):
                if len(given) == options.max_tokens:
                    return
                if "[fail]" in user_text and len(given) == 5:
                    raise RuntimeError("the script says so")
                if self._token_s:
                    time.sleep(self._token_s)
                given.append(token)
                stats.generated_tokens += 1
                stats.forward_passes += 1
                if constraint is not None:
                    constraint.advance(token)
                yield Decoded(token, self._row(), False)
        finally:
            # All but the newest token have been run, as after a real decode.
            if len(given) > 1:
                _fill(cache, len(given) - 1)
            cache.tokens += given[:-1]
            cache.pending = given[-1:]

    def _tokens(self, output: str) -> Iterator[int]:
        """The output's tokens and the end; a long one is not encoded before it is needed."""
        for start in range(0, len(output), CHUNK):
            yield from self._tokenizer.encode(output[start : start + CHUNK])
        yield self._tokenizer.eos_token_ids[-1]

    def _allowed(self, tokens: Iterator[int], constraint: Any) -> Iterator[int]:
        """The script's tokens as long as the constraint allows them, then some way to the end."""
        encode, eos = self._tokenizer.encode, self._tokenizer.eos_token_ids[-1]
        if constraint is None:
            yield from tokens
            return
        queue = list(tokens)
        closing = encode("\n</parameter>\n</function>\n</tool_call>")
        others = [[*encode('{"title": "Hello"}'), eos]]
        while True:
            mask = constraint.mask()
            if mask is None:
                yield queue.pop(0) if queue else eos
                continue
            if queue and not mask[queue[0]]:
                queue = others.pop(0) if others else []
            if queue and mask[queue[0]]:
                yield queue.pop(0)
            elif mask[eos]:
                yield eos
            else:
                # Forced structure, or a value that may go on for ever: close whatever is open.
                queue = closing if mask[closing[0]] else []
                yield queue[0] if queue else int(mask.argmax())
                queue = queue[1:]

    def _prefill(
        self,
        cache: ModelCache,
        ids: Sequence[int],
        options: DecodeOptions,
        on_prefill: Callable[[int, int], None],
        user_text: str,
    ) -> None:
        if match := re.search(r"\[slow ([\d.]+)\]", user_text):
            end = time.monotonic() + float(match[1])
            while time.monotonic() < end:
                on_prefill(0, len(ids))
                time.sleep(PREFILL_TICK_S)
        start = cache.offset
        cache.pending = []
        at = 0
        on_prefill(0, len(ids))
        while at < len(ids):
            stops = [stop - start for stop in options.prefill_boundaries if stop - start > at]
            stop = min(len(ids), at + options.prefill_step_size, *stops)
            _fill(cache, stop - at)
            cache.tokens += ids[at:stop]
            mx.eval(cache.state)
            at = stop
            on_prefill(at, len(ids))

    def _row(self) -> mx.array:
        if self._logprobs is None:
            self._logprobs = mx.log(mx.full((self._tokenizer.vocab_size,), 1 / self._tokenizer.vocab_size))
        return self._logprobs


def _fill(cache: ModelCache, num_tokens: int) -> None:
    """Advance every layer by rows that say nothing."""
    for layer in cache:
        rows = mx.zeros((1, 1, num_tokens, 4))
        layer.update(rows, rows)


def scripted_runner(
    tokenizer: Tokenizer,
    context_length: int,
    script: Script = obey,
    token_s: float = 0.0,
    prompt_cache_bytes: int = 10**9,
) -> Runner:
    """A runner whose model is never asked; to be made on the engine's thread."""
    raw = tiny_config(
        num_attention_heads=1,
        num_attention_groups=1,
        head_dim=4,
        max_seq_len=context_length,
        max_position_embeddings=context_length,
    )
    raw["attention_other_setting"] |= {"num_attention_heads": 1, "num_attention_groups": 1, "head_dim": 4}
    raw["attention_other_setting"]["true_head_dim"] = 4
    model = Model(ModelConfig.from_hf(raw))
    session = Session(model, PromptCacheStore(prompt_cache_bytes))
    return Runner(model, session, Settings(2048), ScriptedDecode(tokenizer, script, token_s))
