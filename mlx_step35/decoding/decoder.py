"""The decode loop: one object per call of `decode`."""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import cast

import mlx.core as mx
import numpy as np

from mlx_step35.cache import LayerSnapshot, ModelCache
from mlx_step35.decoding.records import Decoded, DecodeOptions, DecodeStats, Drafter, PrefillCallback
from mlx_step35.decoding.setup import (
    fit,
    make_controller,
    make_drafter,
    noise_seed,
)
from mlx_step35.depth import PLAIN, DepthController, Offer, Plan
from mlx_step35.errors import PromptTooLongError, RequestError
from mlx_step35.lookup import LookupIndex
from mlx_step35.model import Model
from mlx_step35.sampling import Chooser, Constraint, CustomSampling, Proposal, SamplingParams, log_softmax

# MLX keeps freed buffers for reuse; sizes drift as the context grows.
CLEAR_CACHE_TOKENS = 256
# No verify is wider, so every cache can roll back a whole round.
MAX_DRAFTS = 15
# Older text is rarely copied, and indexing it takes a microsecond a token.
LOOKUP_TOKENS = 65536

_NO_TOKENS = mx.array([], dtype=mx.uint32)


@dataclass(frozen=True, slots=True)
class _Step:
    """A pass under way: its logits (1, V), and the token (1,) drawn from them unless that must wait."""

    logits: mx.array
    token: mx.array | None
    # The pass's hidden row and its position; None after a prefill, which keeps its own.
    row: tuple[mx.array, int] | None


class Decoder:
    """One run of `decode`."""

    def __init__(
        self,
        model: Model,
        cache: ModelCache,
        sampling: SamplingParams | CustomSampling,
        options: DecodeOptions,
        constraint: Constraint | None,
        stats: DecodeStats,
    ) -> None:
        if cache.offset != len(cache.tokens):
            message = f"the cache covers {cache.offset} tokens, of which {len(cache.tokens)} are known"
            raise RequestError(message, field="prompt_cache")
        self._model = model
        self._cache = cache
        self._options = options
        self._constraint = constraint
        self._stats = stats
        self._chooser = Chooser(sampling, noise_seed(sampling))
        self._drafter: Drafter | None = None
        # Every token given to or by the model, the pending one included.
        self._known: list[int] = [*cache.tokens, *cache.pending]
        self._lookup: LookupIndex | None = None
        self._num_left = 0
        self._step_size = options.prefill_step_size
        self._round_start_s = 0.0

    def use_drafts(self, drafter: Drafter | None, controller: DepthController | None) -> None:
        """Set up where drafts come from. Raises RequestError for a depth that the model does not have."""
        options = self._options
        self._drafter = drafter or make_drafter(self._model, self._cache, options, self._stats)
        depth = options.mtp if isinstance(options.mtp, int) else 0
        deepest = self._drafter.max_depth if self._drafter else 0
        if depth > deepest:
            raise RequestError(f"mtp={depth}, but the model has {deepest} MTP layers", field="mtp")
        self._depths = (depth,) if depth else tuple(range(deepest + 1))
        self._controller = controller or make_controller(self._model)

    def run(self, prompt: Sequence[int], on_prefill: PrefillCallback) -> Iterator[Decoded]:
        """Prefill and decode until `max_tokens` or the end of the context."""
        cache, limit = self._cache, self._model.config.context_length
        num_tokens = len(self._known) + len(prompt)
        if len(cache.pending) + len(prompt) == 0:
            raise RequestError("the prompt is empty", field="prompt")
        if num_tokens >= limit:
            raise PromptTooLongError(num_tokens, limit - 1)
        # MLX reads beyond the embedding for an id that it does not have.
        vocab_size = self._model.config.vocab_size
        if unknown := [token for token in prompt if not 0 <= token < vocab_size]:
            raise RequestError(f"the model has {vocab_size} tokens, none is {unknown[0]}", field="prompt")
        max_tokens = self._options.max_tokens
        num_wanted = min(max_tokens, limit - num_tokens) if max_tokens > 0 else limit - num_tokens
        step_size = self._options.prefill_step_size
        self._step_size, self._num_left = fit(self._model, cache.offset, num_tokens, num_wanted, step_size)
        self._stats.token_limit = self._num_left
        self._stats.prompt_tokens += len(prompt)
        num_cached = len(cache.tokens)
        self._stats.cached_tokens += num_cached
        start_s = time.perf_counter()
        step = self._sample(self._prefill(prompt, on_prefill), _NO_TOKENS, None)
        mx.eval(step.logits if step.token is None else step.token)
        on_prefill(num_tokens - num_cached, num_tokens - num_cached)
        self._round_start_s = time.perf_counter()
        self._stats.prompt_s += self._round_start_s - start_s
        yield from self._plain(step)
        while self._num_left:
            plan, drafts, offer = self._choose()
            if plan.depth:
                yield from self._speculate(plan, drafts, offer)
            else:
                pending = mx.array(cache.pending, dtype=mx.uint32)
                yield from self._plain(self._forward(pending, _NO_TOKENS))

    def finish(self) -> None:
        """Leave every layer at the tokens given out, also after an interruption between two layers.

        A prefill chunk that broke off cannot be taken back, and then the cache is left empty.
        """
        cache = self._cache
        excess = [layer.offset - len(cache.tokens) for layer in cache]
        if all(layer.can_rollback(count) for layer, count in zip(cache, excess, strict=True)):
            for layer, count in zip(cache, excess, strict=True):
                layer.rollback(count)
            return
        for layer in cache:
            layer.restore(LayerSnapshot(0, None, None))
        cache.tokens, cache.pending, cache.mtp = [], [], None

    def _prefill(self, prompt: Sequence[int], on_prefill: PrefillCallback) -> mx.array:
        """Run the pending token and the prompt in chunks; returns the last hidden row (1, 1, D)."""
        cache, options = self._cache, self._options
        ids = [*cache.pending, *prompt]
        start, end = len(cache.tokens), len(cache.tokens) + len(ids)
        num_kept = self._drafter.num_kept_rows if self._drafter else 0
        on_prefill(0, len(ids))
        at = start
        while True:
            stops = [stop for stop in options.prefill_boundaries if stop > at]
            stop = min(end, at + self._step_size, *stops)
            chunk = ids[at - start : stop - start]
            hidden = self._model.hidden(mx.array(chunk, dtype=mx.uint32)[None], cache)
            cache.tokens += chunk
            cache.pending = []
            # Rows further back than this are of no use to any draft from the next boundary or the end on.
            useful = min([end, *(goal for goal in options.prefill_boundaries if goal >= stop)]) - num_kept
            if self._drafter and stop > useful:
                first = max(useful, at)
                self._drafter.extend(hidden[:, first - at :], first)
            if stop == end:
                self._known += prompt
                self._lookup = LookupIndex(self._known[-LOOKUP_TOKENS:]) if options.lookup else None
                return hidden[:, -1:]
            mx.eval(cache.state, hidden if stop > useful else [])
            mx.clear_cache()
            at = stop
            on_prefill(at - start, len(ids))

    def _forward(self, token: mx.array, fresh: mx.array) -> _Step:
        """Launch a plain pass over `token` (1,); `fresh` is that token if it is not known to the host yet."""
        at = self._cache.offset
        hidden = self._model.hidden(token[None], self._cache)
        return self._sample(hidden, fresh, (hidden, at))

    def _sample(self, hidden: mx.array, fresh: mx.array, row: tuple[mx.array, int] | None) -> _Step:
        """Launch the choice of the next token; under a constraint only the logits, its mask has to wait."""
        logits = self._model.logits(hidden)[0]
        if self._constraint is not None:
            mx.async_eval(logits)
            return _Step(logits, None, row)
        logits = self._chooser.process(logits, self._known, fresh)
        token = self._chooser.draw(logits, len(self._known) + fresh.shape[0])
        mx.async_eval(token)
        return _Step(logits, token, row)

    def _plain(self, step: _Step) -> Iterator[Decoded]:
        """Tokens without drafts until the controller wants some, one pass ahead of the host."""
        is_first = True
        while True:
            logits, token = step.logits, step.token
            if token is None:
                mask = self._constraint.mask() if self._constraint else None
                logits = self._chooser.process(logits, self._known, _NO_TOKENS, [mask])
                token = self._chooser.draw(logits, len(self._known))
            stays = self._num_left > 1 and self._choose()[0] == PLAIN
            follow = self._forward(token, token) if stays else None
            [token_id] = _read(token)
            self._stats.count_round(PLAIN)
            self._accept(token_id)
            if self._drafter and step.row:
                self._drafter.extend(*step.row)
            yield Decoded(token_id, log_softmax(logits)[0], False)
            # Only in the steady state does one turn of this loop take as long as one pass.
            self._observe(PLAIN, is_typical=follow is not None and not is_first)
            is_first = False
            if follow is None:
                return
            step = follow

    def _speculate(self, plan: Plan, drafts: Sequence[int], offer: Offer) -> Iterator[Decoded]:
        """One round: draft, verify in one pass, give out what was accepted and one token more."""
        at, caught_up = self._cache.offset, offer.catch_up_rows(plan)
        hidden = mx.zeros((1, 0, 0))
        num_accepted = num_given = 0
        try:
            hidden, logits, [num_accepted, *tokens] = self._verify(plan, drafts)
            for token in tokens[: min(num_accepted + 1, self._num_left)]:
                self._accept(token)
                from_draft = num_given < num_accepted
                if from_draft:
                    self._stats.accepted[plan.source][num_given] += 1
                num_given += 1
                yield Decoded(token, log_softmax(logits[num_given - 1]), from_draft)
        finally:
            self.finish()
            if self._drafter:
                if plan.source == "mtp":
                    self._drafter.settle(min(num_accepted, num_given))
                if num_given:
                    self._drafter.extend(hidden[:, :num_given], at)
        self._observe(plan, num_accepted, offer.match_length, caught_up)

    def _verify(self, plan: Plan, drafts: Sequence[int]) -> tuple[mx.array, mx.array, list[int]]:
        """Hidden rows, processed logits, and the outcome of a round as `Chooser.verify` gives it."""
        if plan.source == "mtp":
            assert self._drafter is not None
            proposal = self._drafter.propose(plan.depth, self._known, self._choose_draft)
        else:
            proposal = Proposal(mx.array(list(drafts[: plan.depth]), dtype=mx.uint32), None)
        # The device drafts while the host builds the graph of the verify.
        mx.async_eval(proposal.tokens)
        pending = mx.array(self._cache.pending, dtype=mx.uint32)
        hidden = self._model.hidden(mx.concatenate([pending, proposal.tokens])[None], self._cache)
        logits = self._model.logits(hidden)[0]
        masks = self._masks(logits, proposal) if self._constraint else None
        logits = self._chooser.process(logits, self._known, proposal.tokens, masks)
        outcome = _read(self._chooser.verify(logits, proposal, len(self._known)))
        self._stats.count_round(plan)
        return hidden, logits, outcome

    def _choose(self) -> tuple[Plan, Sequence[int], Offer]:
        """The next round's plan, the drafts that lookup has for it, and what the controller was offered."""
        most = min(self._num_left, self._cache.slack, MAX_DRAFTS + 1) - 1
        found = self._lookup.propose(most) if self._lookup else None
        drafts: Sequence[int] = found.tokens if found else ()
        offer = Offer(
            self._depths,
            len(drafts),
            found.match_length if found else 0,
            self._drafter.rows_behind if self._drafter else None,
        )
        plan = self._controller.choose(self._cache.offset, offer)
        if plan.depth > most:
            plan = Plan(plan.source, most) if most > 0 else PLAIN
        return plan, drafts, offer

    def _choose_draft(self, logits: mx.array, drafts: Sequence[mx.array]) -> tuple[mx.array, mx.array | None]:
        """Sample the next draft as the verify will sample the token it stands for."""
        fresh = mx.concatenate(list(drafts)) if drafts else _NO_TOKENS
        logits = self._chooser.process(logits, self._known, fresh)
        return self._chooser.draft(logits, len(self._known) + len(drafts))

    def _masks(self, logits: mx.array, proposal: Proposal) -> list[np.ndarray | None]:
        """The mask at every verified position; the device computes the logits meanwhile."""
        assert self._constraint is not None
        mx.async_eval(logits)
        masks = [self._constraint.mask()]
        num_advanced = 0
        for token in _read(proposal.tokens):
            mask = masks[-1]
            if mask is not None and not (token < len(mask) and mask[token]):
                break
            self._constraint.advance(token)
            num_advanced += 1
            masks.append(self._constraint.mask())
        self._constraint.rollback(num_advanced)
        # Behind a draft that is not allowed nothing can be accepted, so nothing needs a mask.
        return masks + [None] * (logits.shape[0] - len(masks))

    def _accept(self, token: int) -> None:
        """Take a token as given out: the one before it is covered by the cache now, this one is pending."""
        self._cache.tokens += self._cache.pending
        self._cache.pending = [token]
        self._known.append(token)
        self._num_left -= 1
        self._stats.generated_tokens += 1
        if self._lookup:
            self._lookup.extend([token])
        if self._constraint:
            self._constraint.advance(token)
        if self._stats.generated_tokens % CLEAR_CACHE_TOKENS == 0:
            mx.clear_cache()

    def _observe(
        self,
        plan: Plan,
        num_accepted: int = 0,
        match_length: int = 0,
        caught_up: int = 0,
        is_typical: bool = True,
    ) -> None:
        """Let the controller learn from a round; the time of whoever takes the tokens is part of it."""
        now_s = time.perf_counter()
        seconds = now_s - self._round_start_s
        self._round_start_s = now_s
        self._stats.generation_s += seconds
        if is_typical:
            self._controller.observe(plan, num_accepted, seconds, self._cache.offset, match_length, caught_up)


def _read(ids: mx.array) -> list[int]:
    """Token ids as integers; blocks until the device has them."""
    return cast(list[int], ids.tolist())
