"""The model at work on one answer: prompt reuse, decoding, log-probabilities; on the worker's thread."""

import logging
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from typing import cast

import mlx.core as mx

from mlx_step35.decoding import Decoded, DecodeOptions, DecodeStats, MTPChoice, decode, make_controller
from mlx_step35.decoding.setup import missing_bytes
from mlx_step35.engine.request import CancelledError, Candidate, Logprobs, Memory
from mlx_step35.engine.session import Reuse, Session
from mlx_step35.errors import CapacityError, RequestError
from mlx_step35.model import Model

# Saved prompts make room for answers of this length; few of those that may get longer do.
LIKELY_ANSWER = 8192

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Settings:
    """How to decode, beyond what a request asks for."""

    prefill_step_size: int = 2048


@dataclass(frozen=True, slots=True)
class Run:
    """One answer under way: what was reused, what happens, and the tokens."""

    reuse: Reuse
    stats: DecodeStats
    tokens: Generator[Decoded, None, None]


class Runner:
    """A loaded model with its session."""

    def __init__(
        self,
        model: Model,
        session: Session,
        settings: Settings | None = None,
        decode: Callable[..., Iterator[Decoded]] = decode,
    ) -> None:
        self._model = model
        self._session = session
        self._settings = settings or Settings()
        self._decode = decode
        self._controller = make_controller(model)

    def start(
        self,
        candidate: Candidate,
        mtp: MTPChoice,
        lookup: bool,
        on_prefill: Callable[[int, int], None],
    ) -> Run:
        """Look up what is known of the prompt; the tokens then come as the iterator is advanced.

        CancelledError from `on_prefill` ends the answer. The iterator must be closed; then the session holds
        what was done so far.
        """
        session = self._session
        reuse = session.sync(candidate.prompt)
        self._make_room(len(candidate.prompt), candidate.max_tokens)
        options = DecodeOptions(
            max_tokens=candidate.max_tokens,
            mtp=mtp,
            lookup=lookup,
            prefill_step_size=self._settings.prefill_step_size,
            prefill_boundaries=session.stops(candidate.boundaries),
        )

        def prefilled(done: int, total: int) -> None:
            session.reached()
            on_prefill(reuse.cached_tokens + done, reuse.cached_tokens + total)

        stats = DecodeStats()
        stream = self._decode(
            self._model,
            list(candidate.prompt[reuse.cached_tokens :]),
            session.cache,
            candidate.sampling,
            options,
            on_prefill=prefilled,
            constraint=candidate.constraint,
            stats=stats,
            controller=self._controller,
        )
        return Run(reuse, stats, self._guarded(stream))

    def _make_room(self, num_tokens: int, max_tokens: int) -> None:
        """Give up saved prompts, the least valuable first, where the memory for this answer is short."""
        cache, store = self._session.cache, self._session.store
        room = self._model.config.context_length - num_tokens
        num_wanted = max(min(max_tokens, LIKELY_ANSWER, room), 1)

        def missing() -> int:
            return missing_bytes(self._model, cache.offset, num_tokens, num_wanted, store.nbytes)

        # What is given up may be in use elsewhere and so free less than it counts.
        while store.nbytes and (num_bytes := missing()):
            store.shrink(max(store.nbytes - num_bytes, 0))

    def memory(self) -> Memory:
        """Bytes in use now, at most so far, and in saved prefixes."""
        return Memory(mx.get_active_memory(), mx.get_peak_memory(), self._session.store.nbytes)

    def close(self) -> None:
        """Finish what is being saved. The runner must not be used any more."""
        self._session.close()

    def _guarded(self, stream: Iterator[Decoded]) -> Generator[Decoded, None, None]:
        """The stream; at its end the session keeps the state, or gives it up if it cannot be trusted."""
        is_sound = False
        try:
            yield from stream
            is_sound = True
        except (GeneratorExit, CancelledError, RequestError, CapacityError):
            # The client left, or decoding refused before it changed anything.
            is_sound = True
            raise
        finally:
            if is_sound:
                self._session.finish()
            else:
                self._session.reset()


def read_logprobs(decoded: Decoded, num_top: int) -> Logprobs:
    """Numbers out of a token's log-probabilities; waits for the device."""
    row = decoded.logprobs
    logprob = cast(float, row[decoded.token].tolist())
    if not num_top:
        return Logprobs(decoded.token, logprob, ())
    likeliest = mx.argsort(-row)[:num_top]
    ids, values = cast(list[int], likeliest.tolist()), cast(list[float], row[likeliest].tolist())
    return Logprobs(decoded.token, logprob, tuple(zip(ids, values, strict=True)))
