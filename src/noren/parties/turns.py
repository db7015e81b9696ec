"""One thread that works for many owners, each in its turn: whoever asks for much does not make the others wait for it.

Next is always the owner who has had the least of the thread's time (start-time fair queueing, Goyal, Vin and Cheng
1996): one who asks for little waits for the job under way, not for all that others have asked for before.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, TypeVar

T = TypeVar("T")
FORGET = 256
"""So many owners' times are kept before those that no longer count are dropped."""


class Turns:
    """The thread. Jobs of one owner are done in their order."""

    def __init__(self, name: str) -> None:
        self._jobs: dict[str, deque[tuple[Future[Any], Callable[[], Any]]]] = {}
        self._had: dict[str, float] = {}  # seconds, on a clock that all owners share
        self._now = 0.0  # on that clock: where the job under way began
        self._change = threading.Condition()
        self._over = False
        self._thread = threading.Thread(target=self._work, name=name, daemon=True)
        self._thread.start()

    def __len__(self) -> int:
        """Jobs that wait."""
        return sum(map(len, self._jobs.values()))

    def submit(self, owner: str, work: Callable[[], T]) -> Future[T]:
        """Let `work` be done in the owner's turn. Raises RuntimeError if the thread has been closed."""
        future: Future[T] = Future()
        with self._change:
            if self._over:
                raise RuntimeError("no work is taken any more")
            if owner not in self._jobs:  # time that nobody asked for is not saved up
                self._jobs[owner] = deque()
                self._had[owner] = max(self._had.get(owner, 0.0), self._now)
            self._jobs[owner].append((future, work))
            self._change.notify()
        return future

    def end(self) -> None:
        """Take no more: the thread ends once it has done what waits."""
        with self._change:
            self._over = True
            self._change.notify()

    def close(self) -> None:
        """End, and wait until what waits is done."""
        self.end()
        self._thread.join()

    def _work(self) -> None:
        while (job := self._next()) is not None:
            owner, future, work = job
            began = time.perf_counter()
            try:
                future.set_result(work())
            except BaseException as error:
                future.set_exception(error)
            with self._change:
                self._had[owner] += time.perf_counter() - began
            del job, future, work  # what a job holds is not kept until the next one comes

    def _next(self) -> tuple[str, Future[Any], Callable[[], Any]] | None:
        with self._change:
            while not self._jobs:
                if self._over:
                    return None
                self._change.wait()
            owner = min(self._jobs, key=self._had.__getitem__)
            self._now = self._had[owner]
            future, work = self._jobs[owner].popleft()
            if not self._jobs[owner]:
                del self._jobs[owner]
            if len(self._had) > FORGET:
                self._had = {o: t for o, t in self._had.items() if o == owner or o in self._jobs or t > self._now}
            return owner, future, work
