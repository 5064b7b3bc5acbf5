"""Who is next: first come, first served within a client, and clients take turns."""

import threading
from collections import OrderedDict, deque
from typing import Generic, TypeVar

Job = TypeVar("Job")


class FairQueue(Generic[Job]):
    """Jobs by client. Thread-safe."""

    def __init__(self) -> None:
        self._waiting: OrderedDict[str, deque[Job]] = OrderedDict()
        self._changed = threading.Condition()
        self._is_closed = False

    def __len__(self) -> int:
        with self._changed:
            return sum(map(len, self._waiting.values()))

    def put(self, client: str, job: Job) -> None:
        with self._changed:
            self._waiting.setdefault(client, deque()).append(job)
            self._changed.notify()

    def get(self) -> Job | None:
        """The next job, waiting for one; None once the queue is closed."""
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._is_closed)
            if self._is_closed:
                return None
            client, jobs = next(iter(self._waiting.items()))
            job = jobs.popleft()
            if jobs:
                self._waiting.move_to_end(client)
            else:
                del self._waiting[client]
            return job

    def remove(self, client: str, job: Job) -> bool:
        """Take a job out; False if it is not waiting any more."""
        with self._changed:
            jobs = self._waiting.get(client)
            if jobs is None or job not in jobs:
                return False
            jobs.remove(job)
            if not jobs:
                del self._waiting[client]
            return True

    def close(self) -> None:
        """Wake whoever waits; what is still queued is forgotten."""
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()
