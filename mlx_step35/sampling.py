"""From logits to tokens: filters, noise, and the rules by which drafts are accepted.

Everything here only builds graphs, one row of logits per position. Noise is keyed by (seed, position), so a
token never depends on how many positions were computed together. Three rules keep the model's distribution,
and greedy decoding is the limit of each:

- with a seed, target and draft both take the argmax of log p + noise of that position; a draft is accepted
  while equal, so the output is that of plain decoding at every depth;
- without one, a draft is accepted with probability min(1, p / q), else the residual max(p - q, 0) is sampled;
- with a caller's `sampler`, the target is sampled at every position and a draft accepted while equal.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import mlx.core as mx
import numpy as np

from mlx_step35.errors import RequestError

# mlx-lm's types: log-probabilities (B, V) to token ids (B,); (past tokens, logits (1, V)) to logits (1, V).
SamplerFunction = Callable[[mx.array], mx.array]
LogitsProcessor = Callable[[mx.array, mx.array], mx.array]

# Noise rows kept for the verify that follows a draft, which spans at most 16 positions.
MAX_SHARED_ROWS = 32

# Below this, log-probabilities divided by it leave float32 and nothing but the best token could win anyway.
LOWEST_TEMPERATURE = 1e-5

# What a random number is for; each purpose has its own stream.
Purpose = Literal["token", "draft", "accept", "residual"]
_PURPOSES: tuple[Purpose, ...] = ("token", "draft", "accept", "residual")


# The parameters that are numbers; a seed may also be absent.
_NUMBERS: Mapping[str, Any] = {
    **dict.fromkeys(("temperature", "top_p", "min_p", "repetition_penalty"), int | float),
    **dict.fromkeys(("presence_penalty", "frequency_penalty"), int | float),
    **dict.fromkeys(("top_k", "min_tokens_to_keep", "penalty_context_size"), int),
    "seed": int | None,
}


class Constraint(Protocol):
    """Which tokens may come next, following the tokens given to `advance`; `rollback` forgets the newest."""

    def mask(self) -> np.ndarray | None:
        """True per allowed token id, at most one entry per vocabulary entry; None allows everything."""

    def advance(self, token: int) -> None: ...

    def rollback(self, num_tokens: int) -> None: ...


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """mlx-lm's parameters with mlx-lm's meaning: filters act on the distribution before the temperature.

    Raises RequestError naming the field that is out of range.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    min_tokens_to_keep: int = 1
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    penalty_context_size: int = 20
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    seed: int | None = None

    def __post_init__(self) -> None:
        for name, kind in _NUMBERS.items():
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, kind):
                whole = "a number" if kind == int | float else "a whole number"
                raise RequestError(f"{name} must be {whole}, found {value!r}", field=name)
        checks = (
            ("temperature", self.temperature, 0 <= self.temperature < float("inf"), "at least 0"),
            ("top_p", self.top_p, 0 <= self.top_p <= 1, "between 0 and 1"),
            ("top_k", self.top_k, self.top_k >= 0, "at least 0"),
            ("min_p", self.min_p, 0 <= self.min_p <= 1, "between 0 and 1"),
            ("min_tokens_to_keep", self.min_tokens_to_keep, self.min_tokens_to_keep >= 1, "at least 1"),
            ("repetition_penalty", self.repetition_penalty, self.repetition_penalty > 0, "above 0"),
            ("penalty_context_size", self.penalty_context_size, self.penalty_context_size > 0, "above 0"),
        )
        for name, value, is_valid, expected in checks:
            if not is_valid:
                raise RequestError(f"{name} must be {expected}, found {value}", field=name)

    @property
    def is_greedy(self) -> bool:
        return self.temperature < LOWEST_TEMPERATURE

    def processors(self) -> list[LogitsProcessor]:
        """mlx-lm's logits processors for the bias and the penalties."""
        penalty = None if self.repetition_penalty == 1 else self.repetition_penalty
        if not (self.logit_bias or penalty or self.presence_penalty or self.frequency_penalty):
            return []
        # Importing mlx-lm takes over a second; most requests do without.
        from mlx_lm.sample_utils import make_logits_processors

        made: list[LogitsProcessor] = make_logits_processors(
            logit_bias=dict(self.logit_bias),
            repetition_penalty=penalty,
            repetition_context_size=self.penalty_context_size,
            presence_penalty=self.presence_penalty,
            presence_context_size=self.penalty_context_size,
            frequency_penalty=self.frequency_penalty,
            frequency_context_size=self.penalty_context_size,
        )
        return made

    def filter(self, logprobs: mx.array) -> mx.array:
        """Log-probabilities (L, V) with everything the filters drop at -inf, in mlx-lm's order."""
        has_top_p, has_top_k = 0 < self.top_p < 1, 0 < self.top_k < logprobs.shape[-1]
        if not (has_top_p or has_top_k or self.min_p):
            return logprobs
        from mlx_lm.sample_utils import apply_min_p, apply_top_k, apply_top_p

        if has_top_p:
            logprobs = apply_top_p(logprobs, self.top_p)
        if self.min_p:
            logprobs = apply_min_p(logprobs, self.min_p, self.min_tokens_to_keep)
        return apply_top_k(logprobs, self.top_k) if has_top_k else logprobs


@dataclass(frozen=True, slots=True)
class CustomSampling:
    """mlx-lm callables: `sampler` replaces filters and noise, `processors` run after the penalties."""

    params: SamplingParams = field(default_factory=SamplingParams)
    sampler: SamplerFunction | None = None
    processors: tuple[LogitsProcessor, ...] = ()


@dataclass(frozen=True, slots=True)
class Proposal:
    """Drafts to verify: `tokens` (d,); `logprobs` (d, V) they were sampled from, None for certain guesses."""

    tokens: mx.array
    logprobs: mx.array | None


class Chooser:
    """Samples tokens and drafts of one request; `noise_seed` serves when the request has no seed."""

    def __init__(self, sampling: SamplingParams | CustomSampling, noise_seed: int = 0) -> None:
        custom = sampling if isinstance(sampling, CustomSampling) else CustomSampling(sampling)
        self._params = custom.params
        self._sampler = custom.sampler
        self._processors = self._params.processors()
        self._custom_processors = custom.processors
        seed = self._params.seed
        self._noise = Noise(noise_seed if seed is None else seed)
        is_exact = self._sampler is not None or self._params.is_greedy or seed is not None
        # Whether drafts are sampled from their own distribution and accepted by probability.
        self._rejects = not is_exact
        self._past = mx.array([], dtype=mx.uint32)

    @property
    def is_deterministic(self) -> bool:
        """Plain argmax: neither noise nor a sampler."""
        return self._sampler is None and self._params.is_greedy

    def process(
        self,
        logits: mx.array,
        past: Sequence[int],
        fresh: mx.array,
        masks: Sequence[np.ndarray | None] | None = None,
    ) -> mx.array:
        """Apply bias, penalties, processors and masks to logits (L, V), each row with its own history.

        `past` and then `fresh` (F,) are the tokens before the last row; the row before it lacks the newest.
        """
        num_rows = logits.shape[0]
        if self._processors or self._custom_processors:
            tail = self._history(past)
            rows = []
            for row in range(num_rows):
                known = fresh[: fresh.shape[0] - (num_rows - 1 - row)]
                row_logits = logits[row : row + 1]
                for processor in (*self._processors, *self._custom_processors):
                    row_logits = processor(mx.concatenate([tail, known]), row_logits)
                rows.append(row_logits)
            logits = mx.concatenate(rows)
        return logits if masks is None else apply_masks(logits, masks)

    def draw(self, logits: mx.array, position: int) -> mx.array:
        """One token (L,) per row of processed logits; the first row chooses the token at `position`."""
        if self._sampler is not None:
            logprobs = log_softmax(logits)
            return mx.concatenate([self._sampler(row[None]) for row in logprobs]).astype(mx.uint32)
        if self._params.is_greedy:
            return mx.argmax(logits, axis=-1)
        positions = range(position, position + logits.shape[0])
        return mx.argmax(
            self.scaled(logits) + self._noise.gumbel("token", positions, logits.shape[1]), axis=-1
        )

    def draft(self, logits: mx.array, position: int) -> tuple[mx.array, mx.array | None]:
        """A draft (1,) for `position` from processed draft logits (1, V), and the log-probabilities (1, V)
        it was sampled from if acceptance needs them."""
        if self._sampler is not None or self._params.is_greedy:
            return mx.argmax(logits, axis=-1), None
        if not self._rejects:
            return self.draw(logits, position), None
        logprobs = log_softmax(self.scaled(logits))
        noise = self._noise.gumbel("draft", range(position, position + 1), logits.shape[1])
        return mx.argmax(logprobs + noise, axis=-1), logprobs

    def verify(self, logits: mx.array, proposal: Proposal, position: int) -> mx.array:
        """How many of d drafts are accepted, then d + 1 tokens of which that many and one more count.

        `logits` (d + 1, V) are processed; the first draft is for `position`.
        """
        drafts = proposal.tokens
        if proposal.logprobs is None or not self._rejects:
            # A certain guess is accepted with probability p: drawing from p and comparing does just that.
            tokens = self.draw(logits, position)
            num_accepted = mx.cumprod((tokens[:-1] == drafts).astype(mx.uint32)).sum(keepdims=True)
            return mx.concatenate([num_accepted, tokens]).astype(mx.uint32)
        uniform = self._noise.uniform("accept", position, drafts.shape[0])
        gumbel = self._noise.gumbel("residual", range(position, position + 1), logits.shape[1])[0]
        num_accepted, token = accept(
            log_softmax(self.scaled(logits)), proposal.logprobs, drafts, uniform, gumbel
        )
        places = mx.arange(drafts.shape[0])
        tokens = mx.where(places < num_accepted, drafts, token)
        return mx.concatenate([num_accepted[None], tokens, token[None]]).astype(mx.uint32)

    def scaled(self, logits: mx.array) -> mx.array:
        """Filtered log-probabilities over the temperature, float32, not normalised."""
        return self._params.filter(log_softmax(logits)) * (1 / self._params.temperature)

    def _history(self, past: Sequence[int]) -> mx.array:
        """Past tokens as an array: all of them for a caller's processors, else what the penalties look at."""
        if not self._custom_processors:
            return mx.array(list(past[-self._params.penalty_context_size :]), dtype=mx.uint32)
        known = self._past.shape[0]
        if known < len(past):
            self._past = mx.concatenate([self._past, mx.array(list(past[known:]), dtype=mx.uint32)])
        return self._past[: len(past)]


class Noise:
    """Random numbers as a function of (seed, purpose, position)."""

    def __init__(self, seed: int) -> None:
        self._seed = _mix(seed)
        self._rows: dict[int, mx.array] = {}

    def gumbel(self, purpose: Purpose, positions: range, vocab_size: int) -> mx.array:
        """One row (V,) of standard Gumbel noise per position; a row never depends on the others."""
        if purpose != "token":
            return mx.stack([self._gumbel(purpose, position, vocab_size) for position in positions])
        for position in positions:
            if position not in self._rows:
                self._rows[position] = self._gumbel(purpose, position, vocab_size)
        rows = mx.stack([self._rows[position] for position in positions])
        # A draft and its verify share a row; rows further back are not asked for again.
        while len(self._rows) > MAX_SHARED_ROWS:
            del self._rows[next(iter(self._rows))]
        return rows

    def uniform(self, purpose: Purpose, position: int, count: int) -> mx.array:
        """`count` numbers in [0, 1), a stream of their own per position."""
        return mx.random.uniform(shape=(count,), key=self._key(purpose, position))

    def _gumbel(self, purpose: Purpose, position: int, vocab_size: int) -> mx.array:
        return mx.random.gumbel(shape=(vocab_size,), key=self._key(purpose, position))

    def _key(self, purpose: Purpose, position: int) -> mx.array:
        return mx.random.key(_mix(_mix(self._seed + position) + _PURPOSES.index(purpose)))


def log_softmax(logits: mx.array) -> mx.array:
    """Log-probabilities in float32: bfloat16 has too few digits to compare probabilities."""
    logits = logits.astype(mx.float32)
    return logits - mx.logsumexp(logits, axis=-1, keepdims=True)


def accept(
    target: mx.array, draft: mx.array, drafts: mx.array, uniform: mx.array, gumbel: mx.array
) -> tuple[mx.array, mx.array]:
    """How many drafts are accepted, and the token that follows them: speculative sampling's rule.

    `target` (d + 1, V) and `draft` (d, V) are normalised log-probabilities, `drafts` (d,) was sampled from
    `draft`, `uniform` (d,) and `gumbel` (V,) are fresh noise.
    """
    num_drafts = drafts.shape[0]
    places = drafts[:, None].astype(mx.int32)
    log_p = mx.take_along_axis(target[:num_drafts], places, axis=-1)[:, 0]
    log_q = mx.take_along_axis(draft, places, axis=-1)[:, 0]
    accepted = mx.cumprod((mx.log(uniform) < log_p - log_q).astype(mx.int32))
    num_accepted = accepted.sum()
    # After the last draft nothing was proposed, so its residual is the target itself.
    p = mx.exp(mx.take(target, num_accepted, axis=0))
    q = mx.exp(mx.take(draft, mx.minimum(num_accepted, num_drafts - 1), axis=0))
    residual = mx.maximum(p - mx.where(num_accepted < num_drafts, q, 0), 0)
    # Rounding can reject a draft although both distributions are equal; then nothing is left of them.
    residual = mx.where(residual.sum() > 0, residual, p)
    return num_accepted, mx.argmax(mx.log(residual) + gumbel)


def apply_masks(logits: mx.array, masks: Sequence[np.ndarray | None]) -> mx.array:
    """Logits (L, V) with every token at -inf that the row's mask does not allow; a mask may be shorter."""
    if all(mask is None for mask in masks):
        return logits
    allowed = np.zeros(logits.shape, dtype=bool)
    for row, mask in zip(allowed, masks, strict=True):
        if mask is None:
            row[:] = True
        else:
            row[: len(mask)] = mask[: len(row)]
    return mx.where(mx.array(allowed), logits, -mx.inf)


def _mix(value: int) -> int:
    """SplitMix64: neighbouring values, and negative or very large ones, give unrelated 64-bit numbers."""
    value = (value + 0x9E3779B97F4A7C15) & 0xFFFFFFFFFFFFFFFF
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & 0xFFFFFFFFFFFFFFFF
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & 0xFFFFFFFFFFFFFFFF
    return value ^ (value >> 31)
