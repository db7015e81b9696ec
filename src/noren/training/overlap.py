"""Parts of a batch under way at once: while some are on the line or at a server, another computes here.

Each part is ordinary synchronous code in a thread of its own. A baton goes round: who holds it computes, and hands it
on when it begins to wait for an answer. The order is fixed (first layers of part 1, 2, ..., last layers of part 1, 2,
..., and back through the first layers of part 1, 2, ...) whatever comes when. So random numbers are drawn and gradients
are added up in the same order in every run.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager, suppress
from typing import TypeVar

T = TypeVar("T")


class Ended(Exception):
    """Another part came to nothing, so that this one need not go on."""


class Baton:
    """Handed round by the parts of a batch, from 0 on, for as long as each of them has something left to do.

    `exposed`: seconds in which nobody held it, or who held it did nothing but wait.
    """

    def __init__(self, parts: int = 0) -> None:
        self.exposed = 0.0
        self._next, self._left = 0, list(range(parts))  # whose turn it is; who is not done
        self._held = False
        self._free_since = time.perf_counter()
        self._failed = False
        self._change = threading.Condition()
        self._own = threading.local()

    @contextmanager
    def part(self, number: int) -> Iterator[None]:
        """All that this thread does for a part: begins with its turn, and ends with handing on for good."""
        self._own.number, self._own.hands_on = number, False
        self._take()
        try:
            yield
        finally:
            with self._change:
                self._hand_on()
                self._left.remove(number)

    @contextmanager
    def crossing(self) -> Iterator[None]:
        """Within it, the first wait hands on. Further ones are repairs, for which the baton is kept: in its turn."""
        self._own.hands_on = True
        try:
            yield
        finally:
            self._own.hands_on = False

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Within it, this thread does nothing but wait for an answer."""
        if getattr(self._own, "hands_on", False):
            self._own.hands_on = False
            with self._change:
                self._hand_on()
            try:
                yield
            finally:
                self._take()
            return
        started = time.perf_counter()
        try:
            yield
        finally:
            self.exposed += time.perf_counter() - started

    def fail(self) -> bool:
        """A part came to nothing: all others end at their next turn. Returns whether it is the first."""
        with self._change:
            first, self._failed = not self._failed, True
            self._change.notify_all()
            return first

    def _take(self) -> None:
        number = self._own.number
        with self._change:
            self._change.wait_for(lambda: self._failed or (not self._held and self._next == number))
            if self._failed:
                raise Ended
            self._held = True
            self.exposed += time.perf_counter() - self._free_since

    def _hand_on(self) -> None:
        place = self._left.index(self._own.number)
        self._next = self._left[(place + 1) % len(self._left)]
        self._held, self._free_since = False, time.perf_counter()
        self._change.notify_all()


def side_by_side(baton: Baton, work: Sequence[Callable[[], None]], give_up: Callable[[], None]) -> None:
    """Do the work of each part in a thread of its own, in turns. Raises the first error, once all threads have ended.

    `give_up` ends the waiting of those who wait for an answer; it is called if a part fails, or on Ctrl-C.
    """
    errors: list[BaseException] = []

    def fail(error: BaseException) -> None:
        if baton.fail():
            errors.append(error)
            give_up()

    def do(number: int, one: Callable[[], None]) -> None:
        with suppress(Ended), baton.part(number):
            try:
                one()
            except BaseException as error:
                fail(error)

    with ThreadPoolExecutor(len(work), "noren-part") as pool:
        futures = [pool.submit(do, number, one) for number, one in enumerate(work)]
        try:
            wait(futures)
        except BaseException as error:
            fail(error)
    if errors:
        raise errors[0]


def cut(tokens: Sequence[int], parts: int) -> list[slice]:
    """Cut rows of so many tokens into at most so many parts of neighbours, of about as many tokens each; none is empty.

    A function of the arguments alone.
    """
    count, total = min(parts, len(tokens)), sum(tokens)
    out, start, before = list[slice](), 0, 0
    for part in range(1, count + 1):
        end, had = start + 1, before + tokens[start]
        last = len(tokens) - (count - part)  # a row for each part that comes
        while end < last and (
            part == count or abs(had + tokens[end] - total * part / count) <= abs(had - total * part / count)
        ):
            had += tokens[end]
            end += 1
        out.append(slice(start, end))
        start, before = end, had
    return out
