"""Conversations of random tokens, edited at random, and one generation over a session."""

import random
from collections.abc import Sequence
from dataclasses import dataclass, field

import mlx.core as mx

from mlx_step35.decoding import DecodeOptions, MTPChoice, decode
from mlx_step35.engine.session import Reuse, Session
from mlx_step35.model import Model
from mlx_step35.sampling import SamplingParams

# Stand in for <|im_start|> of a user's and of an assistant's turn, and for <think> and </think>.
USER, ASSISTANT, THINK, END_THINK = 3, 4, 5, 6
FIRST_WORD, LAST_WORD = 8, 30


@dataclass
class Turn:
    """A user's message, or an assistant's with its thinking."""

    words: list[int]
    thinking: list[int] | None = None

    def tokens(self) -> list[int]:
        if self.thinking is None:
            return [USER, *self.words]
        thinking = [THINK, *self.thinking, END_THINK] if self.thinking else []
        return [ASSISTANT, *thinking, *self.words]


@dataclass
class Conversation:
    """Turns behind a system prompt, and the edits clients make."""

    rng: random.Random
    system: list[int]
    turns: list[Turn] = field(default_factory=list)

    def words(self, most: int) -> list[int]:
        return [self.rng.randint(FIRST_WORD, LAST_WORD) for _ in range(self.rng.randint(1, most))]

    def prompt(self) -> tuple[list[int], list[int]]:
        """Token ids up to the generation prompt, and the ends of system and user turns."""
        tokens = list(self.system)
        boundaries = [len(tokens)]
        for turn in self.turns:
            tokens += turn.tokens()
            if turn.thinking is None:
                boundaries.append(len(tokens))
        return [*tokens, ASSISTANT, THINK], boundaries

    def answer(self, tokens: Sequence[int]) -> None:
        """Take a generation as the newest turn: half of it is called thinking."""
        half = len(tokens) // 2
        # What was generated is repeated exactly only while the thinking is shown.
        self.turns.append(Turn([*tokens[half:]], [*tokens[:half]]))

    def edit(self) -> str:
        """Change something, so that the next request asks with a user's turn at the end; says what."""
        kinds = ["extend", "extend", "edit", "cut", "drop thinking"]
        kind = self.rng.choice(kinds) if len(self.turns) > 2 else "extend"
        if kind == "edit":
            self.rng.choice(self.turns).words = self.words(30)
        elif kind == "cut":
            del self.turns[self.rng.randrange(1, len(self.turns)) :]
        elif kind == "drop thinking":
            for turn in self.turns:
                turn.thinking = None if turn.thinking is None else []
        if not self.turns or self.turns[-1].thinking is not None:
            self.turns.append(Turn(self.words(40)))
        return kind

    def branch(self) -> "Conversation":
        """Another conversation with the same turns so far."""
        turns = [Turn([*turn.words], turn.thinking and [*turn.thinking]) for turn in self.turns]
        return Conversation(self.rng, self.system, turns)


@dataclass
class Generation:
    tokens: list[int]
    logprobs: list[mx.array]
    reuse: Reuse
    stops: tuple[int, ...] = ()


def run(
    session: Session,
    model: Model,
    prompt: Sequence[int],
    boundaries: Sequence[int] = (),
    max_tokens: int = 8,
    mtp: MTPChoice = "auto",
    close_after: int | None = None,
) -> Generation:
    """One request as the worker serves it; `close_after` tokens the client is gone."""
    reuse = session.sync(prompt)
    stops = session.stops(boundaries)
    options = DecodeOptions(max_tokens, mtp, prefill_step_size=64, prefill_boundaries=stops)
    generation = Generation([], [], reuse, stops)
    stream = decode(
        model,
        prompt[reuse.cached_tokens :],
        session.cache,
        SamplingParams(),
        options,
        on_prefill=lambda done, total: session.reached(),
    )
    for decoded in stream:
        generation.tokens.append(decoded.token)
        generation.logprobs.append(decoded.logprobs)
        if close_after is not None and len(generation.tokens) >= close_after:
            stream.close()  # type: ignore[attr-defined]
    session.finish()
    return generation


def run_cold(model: Model, prompt: Sequence[int], max_tokens: int = 8) -> Generation:
    """The same without any cache and without drafts."""
    options = DecodeOptions(max_tokens, "off", lookup=False)
    decoded = list(decode(model, prompt, model.make_cache(), SamplingParams(), options))
    reuse = Reuse(len(prompt), 0, 0, None, None, "none")
    return Generation([one.token for one in decoded], [one.logprobs for one in decoded], reuse)


def assert_same(warm: Generation, cold: Generation) -> None:
    assert warm.tokens == cold.tokens
    for ours, theirs in zip(warm.logprobs, cold.logprobs, strict=True):
        assert mx.abs(ours - theirs).max().item() < 1e-4
