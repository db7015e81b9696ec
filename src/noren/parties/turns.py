"""One thread that works for many owners, each in its turn: whoever asks for much does not make the others wait for it.

Next is always the owner who has had the least of the thread's time (start-time fair queueing, Goyal, Vin and Cheng
1996): one who asks for little waits for the job under way, not for all that others have asked for before. Jobs of one
kind that wait at the same time can be done together.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, TypeVar

T = TypeVar("T")
FORGET = 256
"""So many owners' times are kept before those that no longer count are dropped."""


@dataclass(slots=True)
class _Job:
    """Something to do. With `item`, `work` takes a list of items and returns a list of results."""

    work: Callable[..., Any]
    item: Any = None
    kind: Hashable = None
    future: Future[Any] = field(default_factory=Future)


class Turns:
    """The thread. Jobs of one owner are done in their order."""

    def __init__(self, name: str) -> None:
        self._jobs: dict[str, deque[_Job]] = {}
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
        return self._add(owner, _Job(work))

    def together(
        self, owner: str, kind: Hashable, item: Any, work: Callable[[list[Any]], Sequence[T | BaseException]]
    ) -> Future[T]:
        """Let `work` be done for `item` in the owner's turn, along with what others want of the same kind by then.

        `work` takes all of their items, and returns a result or an error for each; jobs of one kind have the same
        `work`.
        """
        return self._add(owner, _Job(work, item, kind))

    def _add(self, owner: str, job: _Job) -> Future[Any]:
        with self._change:
            if self._over:
                raise RuntimeError("no work is taken any more")
            if owner not in self._jobs:  # time that nobody asked for is not saved up
                self._jobs[owner] = deque()
                self._had[owner] = max(self._had.get(owner, 0.0), self._now)
            self._jobs[owner].append(job)
            self._change.notify()
        return job.future

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
        while jobs := self._next():
            began = time.perf_counter()
            _do(list(jobs.values()))
            with self._change:
                for owner in jobs:
                    self._had[owner] += (time.perf_counter() - began) / len(jobs)
            jobs.clear()  # what a job holds is not kept until the next one comes

    def _next(self) -> dict[str, _Job] | None:
        """The next job by its owner; with it, those of others that can be done together with it."""
        with self._change:
            while not self._jobs:
                if self._over:
                    return None
                self._change.wait()
            owner = min(self._jobs, key=self._had.__getitem__)
            self._now = self._had[owner]
            kind = self._jobs[owner][0].kind
            others = [o for o, jobs in self._jobs.items() if o != owner and jobs[0].kind == kind] if kind else []
            chosen = {o: self._jobs[o].popleft() for o in (owner, *others)}
            for o in chosen:
                if not self._jobs[o]:
                    del self._jobs[o]
            if len(self._had) > FORGET:
                self._had = {o: t for o, t in self._had.items() if o in chosen or o in self._jobs or t > self._now}
            return chosen


def _do(jobs: list[_Job]) -> None:
    """Do one job, or several together. What is done together is done once: a result that is an error is one job's."""
    work = jobs[0].work
    try:
        results = [work()] if jobs[0].kind is None else work([job.item for job in jobs])
    except BaseException as error:
        results = [error] * len(jobs)
    for job, result in zip(jobs, results, strict=True):
        if isinstance(result, BaseException):
            job.future.set_exception(result)
        else:
            job.future.set_result(result)
