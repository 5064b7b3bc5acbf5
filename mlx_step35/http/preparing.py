"""From a parsed request to one for the engine: prompt, limits, sampling, grammar. Text work, no arrays."""

import logging
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from mlx_step35.api.history import without_billing_headers
from mlx_step35.api.types import ChatRequest, CompletionRequest, GenerationRequest
from mlx_step35.chat.boundaries import prompt_boundaries
from mlx_step35.chat.grammar import GrammarCompiler
from mlx_step35.chat.output import OutputParser, PlainParser
from mlx_step35.chat.replay import LIMIT_BYTES, TurnMemory
from mlx_step35.chat.template import ChatTemplate
from mlx_step35.chat.text_stream import TextStream
from mlx_step35.chat.tokenizer import Tokenizer
from mlx_step35.engine.request import Candidate, Finished, Request
from mlx_step35.engine.session import Reuse
from mlx_step35.errors import PromptTooLongError, RequestError
from mlx_step35.http.settings import GenerationDefaults
from mlx_step35.sampling import SamplingParams

logger = logging.getLogger(__name__)

# Ends of turns that are worth a saved state beside the first, which is the system prompt's with the tools.
NUM_LAST_BOUNDARIES = 4


# Shorter than the longest token of any tokenizer, so that most requests need not look for that.
MIN_LONGEST_TOKEN = 8


@dataclass(frozen=True, slots=True)
class Prompt:
    """A conversation as token ids."""

    ids: list[int]
    starts_in_reasoning: bool


class Preparer:
    """Everything about text that requests share. Its methods may run on any thread."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        template: ChatTemplate,
        defaults: GenerationDefaults,
        context_length: int,
        turn_memory_bytes: int = LIMIT_BYTES,
    ) -> None:
        self.tokenizer = tokenizer
        self._turns = TurnMemory(tokenizer, template, turn_memory_bytes)
        self._defaults = defaults
        self._context_length = context_length
        self._grammar = GrammarCompiler(tokenizer)

    def prompt(self, request: ChatRequest) -> Prompt:
        """A conversation's prompt. Raises RequestError."""
        self._check_length(request)
        variables = dict(request.template_variables)
        # The template's own words for "no thinking", whatever the request called it.
        if not request.thinking.is_on:
            variables["enable_thinking"] = False
        tools = () if request.tool_choice.mode == "none" else request.tools
        messages = request.messages
        if not self._defaults.keeps_billing_header:
            messages = without_billing_headers(messages)
        ids, rendered = self._turns.encode(messages, tools or None, variables=variables)
        return Prompt(ids, rendered.starts_in_reasoning)

    def explain(self, reuse: Reuse) -> None:
        """Say at debug level what a prompt could reuse, and where and why it leaves what is known."""
        if logger.isEnabledFor(logging.DEBUG):
            texts = [
                "nothing" if token is None else repr(self.tokenizer.decode([token]))
                for token in (reuse.found, reuse.given)
            ]
            logger.debug(
                "prompt of %d tokens: %d reused (%s), limited by %s; %d are known, then %s was, %s is given",
                reuse.prompt_tokens,
                reuse.cached_tokens,
                reuse.source,
                reuse.limited_by,
                reuse.common_tokens,
                *texts,
            )

    def remember(self, candidate: Candidate, event: Finished) -> None:
        """Keep the sampled tokens of a turn, for when the client sends it back in its own spelling."""
        # Behind a stop string there are tokens that the client did not see.
        if event.stop_sequence is None:
            self._turns.remember(candidate.prompt, event.tokens, event.output)

    def chat(self, request: ChatRequest, call_prefix: str, client: str) -> Request:
        """A chat for the engine; ids of calls start with `call_prefix`. Raises RequestError."""
        prompt = self.prompt(request)
        max_tokens = self._max_tokens(request, len(prompt.ids))
        tools = () if request.tool_choice.mode == "none" else request.tools
        ends = [end.position for end in prompt_boundaries(prompt.ids, self.tokenizer)]
        boundaries = tuple(sorted({*ends[:1], *ends[-NUM_LAST_BOUNDARIES:]}))
        candidates = []
        for index in range(request.num_choices):
            parser = OutputParser(
                tools, prompt.starts_in_reasoning, lambda: f"{call_prefix}{uuid.uuid4().hex[:24]}"
            )
            candidates.append(
                Candidate(
                    prompt=prompt.ids,
                    output=TextStream(self.tokenizer, parser, request.stop),
                    sampling=self._sampling(request, index),
                    max_tokens=max_tokens,
                    constraint=self._constraint(request, prompt.starts_in_reasoning),
                    boundaries=boundaries,
                )
            )
        return self._request(request, candidates, client)

    def completion(self, request: CompletionRequest, client: str) -> Request:
        """Texts to continue for the engine: all choices of the first prompt, then of the next."""
        candidates = []
        for prompt in request.prompts:
            ids = self._completion_ids(prompt)
            max_tokens = self._max_tokens(request, len(ids))
            candidates += [
                Candidate(
                    prompt=ids,
                    output=TextStream(self.tokenizer, PlainParser(), request.stop),
                    sampling=self._sampling(request, index),
                    max_tokens=max_tokens,
                )
                for index in range(request.num_choices)
            ]
        return self._request(request, candidates, client)

    def echoes(self, request: CompletionRequest) -> list[str]:
        """The prompts to repeat, one per choice; none unless asked for."""
        if not request.echoes_prompt:
            return []
        texts = [text if isinstance(text, str) else self.tokenizer.decode(text) for text in request.prompts]
        return [text for text in texts for _ in range(request.num_choices)]

    def _check_length(self, request: ChatRequest) -> None:
        """Raises PromptTooLongError for texts that no tokenizer could make short enough.

        Tokenising 10 MB takes a minute, and the worst such text is one word.
        """
        length = sum(len(message["content"]) for message in request.messages)
        if length > self._context_length * MIN_LONGEST_TOKEN:
            num_tokens = -(-length // self._longest_token)
            if num_tokens >= self._context_length:
                error = PromptTooLongError(num_tokens, self._context_length - 1)
                error.field = "messages"
                raise error

    @cached_property
    def _longest_token(self) -> int:
        """Characters of the longest token there is."""
        tokenizer = self.tokenizer
        return max(len(tokenizer.decode([token])) for token in range(tokenizer.vocab_size))

    def _request(self, request: GenerationRequest, candidates: Sequence[Candidate], client: str) -> Request:
        return Request(
            candidates=tuple(candidates),
            mtp=self._defaults.mtp,
            lookup=self._defaults.lookup,
            top_logprobs=request.top_logprobs,
            client=client,
        )

    def _max_tokens(self, request: GenerationRequest, num_tokens: int) -> int:
        """What the request asks for, as far as the context reaches. Raises PromptTooLongError."""
        room = self._context_length - num_tokens
        if room < 1:
            raise PromptTooLongError(num_tokens, self._context_length - 1)
        wanted = request.max_tokens or self._defaults.max_tokens or room
        return min(wanted, room)

    def _sampling(self, request: GenerationRequest, index: int) -> SamplingParams:
        """The sampling of one choice; with a seed every choice has a seed of its own."""
        asked, defaults = request.sampling, self._defaults
        too_high = [token for token in asked.logit_bias if token >= self.tokenizer.vocab_size]
        if too_high:
            field = f"logit_bias.{too_high[0]}"
            raise RequestError(f"{field}: the vocabulary has no such token", field, "invalid_value")
        return SamplingParams(
            temperature=_or(asked.temperature, defaults.temperature),
            top_p=_or(asked.top_p, defaults.top_p),
            top_k=_or(asked.top_k, 0),
            min_p=_or(asked.min_p, 0.0),
            repetition_penalty=_or(asked.repetition_penalty, 1.0),
            presence_penalty=_or(asked.presence_penalty, 0.0),
            frequency_penalty=_or(asked.frequency_penalty, 0.0),
            logit_bias=asked.logit_bias,
            seed=None if asked.seed is None else asked.seed + index,
        )

    def _constraint(self, request: ChatRequest, starts_in_reasoning: bool) -> Any:
        choice = request.tool_choice
        return self._grammar.constraint(
            schema=request.schema,
            tools=[_enforced(tool, request.strict_tools) for tool in request.tools],
            tool_choice="none" if choice.mode == "none" else "required" if choice.mode != "auto" else "auto",
            tool_name=choice.name,
            parallel=request.has_parallel_calls,
            starts_in_reasoning=starts_in_reasoning,
            max_thinking_tokens=request.thinking.budget,
        )

    def _completion_ids(self, prompt: str | tuple[int, ...]) -> list[int]:
        """Raw text starts like every text the model was trained on, with the begin token."""
        if isinstance(prompt, str):
            ids = self.tokenizer.encode(prompt)
            bos = self.tokenizer.bos_token_id
            return ids if bos is None or ids[:1] == [bos] else [bos, *ids]
        if max(prompt) >= self.tokenizer.vocab_size:
            raise RequestError(f"prompt: the vocabulary has no token {max(prompt)}", "prompt")
        return list(prompt)


def _enforced(tool: Mapping[str, Any], strict_tools: frozenset[str]) -> Mapping[str, Any]:
    function = tool["function"]
    if function["name"] not in strict_tools:
        return tool
    return {**tool, "function": {**function, "strict": True}}


def _or(value: Any, default: Any) -> Any:
    return default if value is None else value
