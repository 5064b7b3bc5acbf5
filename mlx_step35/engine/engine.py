"""The engine as the server sees it: submit a request, take its events, cancel.

Everything here runs on the event loop, except what is named so; the worker's thread hands events over with
`call_soon_threadsafe`.
"""

import asyncio
import logging
import threading
from collections.abc import Callable
from typing import Literal

from mlx_step35.engine.queue import FairQueue
from mlx_step35.engine.request import Event, Failed, Request
from mlx_step35.engine.runner import Runner
from mlx_step35.engine.worker import Job, Worker
from mlx_step35.errors import Step35Error

logger = logging.getLogger(__name__)

State = Literal["loading", "ready", "failed", "stopping"]


class OverloadedError(Step35Error):
    """No room in the queue, or the server is on its way down."""


class Engine:
    """A model behind a bounded queue.

    Args:
        load: loads the model, on the worker's thread.
        max_queue: requests running and waiting together.
    """

    def __init__(self, load: Callable[[], Runner], max_queue: int = 32) -> None:
        self.max_queue = max_queue
        self.load_error: Exception | None = None
        self._state: State = "loading"
        self._queue: FairQueue[Job] = FairQueue()
        self._submissions: set[Submission] = set()
        # Guards the submissions: they are added on the loop and removed on the worker's thread.
        self._lock = threading.Lock()
        self._loaded = threading.Event()
        self._worker = Worker(load, self._queue, self._on_loaded)

    @property
    def state(self) -> State:
        return self._state

    @property
    def num_open(self) -> int:
        """Requests running and waiting."""
        with self._lock:
            return len(self._submissions)

    @property
    def num_waiting(self) -> int:
        return len(self._queue)

    def start(self) -> None:
        """Begin to load; requests may come at once, they wait."""
        self._worker.start()

    async def loaded(self) -> Exception | None:
        """Wait until loading ended; why it failed, if it did."""
        await asyncio.to_thread(self._loaded.wait)
        return self.load_error

    def submit(self, request: Request) -> "Submission":
        """Queue a request. Raises OverloadedError when there is no room."""
        if self._state in ("stopping", "failed"):
            raise OverloadedError(f"the server is {self._state}")
        submission = Submission(self, request, asyncio.get_running_loop())
        with self._lock:
            if len(self._submissions) >= self.max_queue:
                raise OverloadedError(f"{self.max_queue} requests are running or waiting already")
            self._submissions.add(submission)
        self._queue.put(request.client, submission)
        return submission

    def dismiss(self) -> None:
        """Take no more requests and end those that are open, each with an OverloadedError."""
        self._state = "stopping"
        with self._lock:
            open_submissions = list(self._submissions)
        for submission in open_submissions:
            submission.emit(Failed(OverloadedError("the server is shutting down")))
            submission.cancel()

    def stop(self, timeout_s: float = 10) -> None:
        """Dismiss everything and wait for the thread to end."""
        self.dismiss()
        self._queue.close()
        self._loaded.set()
        self._worker.join(timeout_s)

    def withdraw(self, submission: "Submission") -> None:
        """Forget a cancelled request that has not begun; one that runs ends by itself, within a round."""
        if self._queue.remove(submission.request.client, submission):
            self.forget(submission)

    def forget(self, submission: "Submission") -> None:
        """Free a request's place. May be called from any thread."""
        with self._lock:
            self._submissions.discard(submission)

    def _on_loaded(self, error: Exception | None) -> None:
        """Called on the worker's thread."""
        self.load_error = error
        if self._state == "loading":
            self._state = "ready" if error is None else "failed"
        if error is not None:
            with self._lock:
                waiting, self._submissions = self._submissions, set()
            for submission in waiting:
                submission.emit(Failed(error))
        self._loaded.set()


class Submission:
    """A request under way, and the events that came and were not taken yet."""

    def __init__(self, engine: Engine, request: Request, loop: asyncio.AbstractEventLoop) -> None:
        self.request = request
        self._engine = engine
        self._loop = loop
        self._events: list[Event] = []
        self._waiter: asyncio.Future[None] | None = None

    async def take(self, timeout_s: float) -> list[Event]:
        """All events that have come, waiting for one; none if the time is up first."""
        if not self._events:
            self._waiter = self._loop.create_future()
            timer = self._loop.call_later(timeout_s, self._wake)
            try:
                await self._waiter
            finally:
                timer.cancel()
                self._waiter = None
        return self.take_rest()

    def take_rest(self) -> list[Event]:
        """All events that have come."""
        events, self._events = self._events, []
        return events

    def cancel(self) -> None:
        """Stop working on it; no effect on a request that is done."""
        if not self.request.cancelled.is_set():
            self.request.cancelled.set()
            self._engine.withdraw(self)

    def emit(self, event: Event) -> None:
        """Hand over an event. Called on the worker's thread."""
        try:
            self._loop.call_soon_threadsafe(self._arrive, event)
        except RuntimeError:
            # The loop is closed: nobody is left to hear it.
            self.request.cancelled.set()

    def close(self) -> None:
        """The worker is done with it. Called on the worker's thread."""
        self._engine.forget(self)

    def _arrive(self, event: Event) -> None:
        self._events.append(event)
        self._wake()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)
