"""The one thread that loads the model, owns all arrays and makes answers, one request at a time.

Arrays built on one thread cannot be evaluated on another, so nothing but plain values leaves it.
"""

import logging
import threading
from collections.abc import Callable
from typing import Protocol

from mlx_step35.engine.queue import FairQueue
from mlx_step35.engine.request import (
    CancelledError,
    Candidate,
    Event,
    Failed,
    Finished,
    Logprobs,
    Output,
    Progress,
    Request,
    Started,
    Token,
)
from mlx_step35.engine.runner import Run, Runner, read_logprobs
from mlx_step35.errors import RequestError

logger = logging.getLogger(__name__)


class Job(Protocol):
    """A request and where its events go."""

    @property
    def request(self) -> Request: ...
    def emit(self, event: Event) -> None: ...
    def close(self) -> None: ...


class Worker:
    """Runs jobs from a queue until that is closed.

    Args:
        load: makes the runner, on the worker's thread.
        on_loaded: told once: None, or why loading failed; then the thread ends.
    """

    def __init__(
        self,
        load: Callable[[], Runner],
        queue: FairQueue[Job],
        on_loaded: Callable[[Exception | None], None],
    ) -> None:
        self._load = load
        self._queue = queue
        self._on_loaded = on_loaded
        self._thread = threading.Thread(target=self._run, name="mlx_step35-worker", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def join(self, timeout_s: float) -> None:
        self._thread.join(timeout_s)

    def _run(self) -> None:
        try:
            runner = self._load()
        except Exception as error:  # The server has to say why, whatever it is, and to end.
            self._on_loaded(error)
            return
        self._on_loaded(None)
        while (job := self._queue.get()) is not None:
            try:
                self._serve(runner, job)
            except RequestError as error:
                job.emit(Failed(error))
            except Exception as error:  # A bug ends its own request and no other.
                logger.exception("a request failed")
                job.emit(Failed(error))
            finally:
                job.close()
        runner.close()

    def _serve(self, runner: Runner, job: Job) -> None:
        for index, candidate in enumerate(job.request.candidates):
            if job.request.cancelled.is_set():
                return
            self._answer(runner, job, index, candidate)

    def _answer(self, runner: Runner, job: Job, index: int, candidate: Candidate) -> None:
        request = job.request

        def on_prefill(done: int, total: int) -> None:
            if request.cancelled.is_set():
                raise CancelledError
            job.emit(Progress(index, done, total))

        run = runner.start(candidate, request.mtp, request.lookup, on_prefill)
        job.emit(Started(index, run.reuse))
        logprobs: dict[int, Logprobs] = {}
        try:
            sampled = self._generate(run, job, index, candidate, logprobs)
        except CancelledError:
            return
        if request.cancelled.is_set():
            return
        output = candidate.output
        deltas = output.finish("stop" if output.stopped else "length")
        job.emit(
            Finished(
                index=index,
                deltas=deltas,
                output=output.result,
                stop_sequence=output.stop_sequence,
                tokens=sampled,
                reasoning_tokens=output.reasoning_tokens,
                reuse=run.reuse,
                stats=run.stats,
                memory=runner.memory(),
                logprobs=_of_content(output, logprobs),
            )
        )

    def _generate(
        self, run: Run, job: Job, index: int, candidate: Candidate, logprobs: dict[int, Logprobs]
    ) -> list[int]:
        """Hand on tokens until the answer is over or its client gone; returns those taken.

        `logprobs` keeps what is known of tokens that may yet become content, by their number.
        """
        request, output = job.request, candidate.output
        tokens = run.tokens
        sampled: list[int] = []
        try:
            for decoded in tokens:
                if request.cancelled.is_set():
                    break
                sampled.append(decoded.token)
                # The token that ends the thinking belongs to it.
                was_reasoning = output.is_reasoning
                num_reasoning = output.reasoning_tokens
                deltas = output.push(decoded.token)
                if request.top_logprobs is not None and not was_reasoning:
                    logprobs[len(sampled) - 1] = read_logprobs(decoded, request.top_logprobs)
                shown = _of_content(output, logprobs)
                job.emit(Token(index, deltas, shown, output.reasoning_tokens > num_reasoning))
                if output.stopped:
                    break
        finally:
            tokens.close()
        return sampled


def _of_content(output: Output, logprobs: dict[int, Logprobs]) -> list[Logprobs]:
    """Log-probabilities of the tokens that have become content, taken out."""
    if not logprobs:
        return []
    return [logprobs.pop(number) for number in output.content_tokens() if number in logprobs]
