"""Events of the engine become what answers are written from: choices, log-probabilities, usage."""

from collections.abc import Sequence
from typing import Any, cast

from mlx_step35.api.types import Choice, FinishReason, TokenLogprob, Usage
from mlx_step35.chat.tokenizer import Tokenizer
from mlx_step35.engine.request import Finished, Logprobs, Request, Started, Token


class Collector:
    """What is known of one request's answers so far.

    Args:
        request: the request.
        num_choices: choices per prompt; they share its tokens.
        tokenizer: for the bytes of tokens in log-probabilities.
    """

    def __init__(self, request: Request, num_choices: int, tokenizer: Tokenizer) -> None:
        self._num_choices = num_choices
        self._tokenizer = tokenizer
        self._prompt_tokens = sum(len(candidate.prompt) for candidate in request.candidates[::num_choices])
        self._cached_tokens = 0
        self._num_tokens = 0
        self._num_reasoning = 0
        self._logprobs: list[list[TokenLogprob]] = [[] for _ in request.candidates]
        self._finished: list[Finished] = []
        self.choices: list[Choice] = []

    @property
    def usage(self) -> Usage:
        """Tokens so far; a prompt counts once for all of its choices."""
        return Usage(
            prompt_tokens=self._prompt_tokens,
            completion_tokens=self._num_tokens,
            cached_tokens=self._cached_tokens,
            reasoning_tokens=self._num_reasoning,
            speculation=self._speculation(),
        )

    def start(self, event: Started) -> None:
        """A candidate begins."""
        if event.index % self._num_choices == 0:
            self._cached_tokens += event.reuse.cached_tokens

    def count(self, event: Token) -> None:
        """A token was taken, also one whose text is held back."""
        self._num_tokens += 1
        self._num_reasoning += event.is_reasoning

    def logprobs(self, index: int, logprobs: Sequence[Logprobs]) -> Sequence[TokenLogprob]:
        """Log-probabilities of tokens with their bytes, kept for the whole answer."""
        to_bytes = self._tokenizer.token_bytes
        named = [
            TokenLogprob(
                to_bytes(one.token),
                one.logprob,
                tuple((to_bytes(token), logprob) for token, logprob in one.top),
            )
            for one in logprobs
        ]
        self._logprobs[index] += named
        return named

    def finish(self, event: Finished) -> Choice:
        """A candidate is done."""
        self._finished.append(event)
        choice = Choice(
            output=event.output,
            finish_reason=cast(FinishReason, event.output.finish_reason),
            stop_sequence=event.stop_sequence,
            logprobs=tuple(self._logprobs[event.index]),
        )
        self.choices.append(choice)
        return choice

    def _speculation(self) -> dict[str, Any] | None:
        """Our extension of usage: per answer, what drafting brought."""
        if not self._finished:
            return None
        entries = [
            {
                **event.stats.as_json(),
                "prompt_seconds": round(event.stats.prompt_s, 4),
                "generation_seconds": round(event.stats.generation_s, 4),
            }
            for event in self._finished
        ]
        return entries[0] if len(entries) == 1 else {"choices": entries}
