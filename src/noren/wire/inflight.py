"""Requests under way on one line, which is answered in the order in which it was asked.

Several threads may wait for answers at once. Each reads its own when it is its turn, so that none is in another's way
and no thread is needed beside them.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

from noren.errors import LinkError
from noren.types import Message
from noren.wire.envelope import Packed

Waiting = Callable[[], AbstractContextManager[None]]
"""Within it, a caller does nothing but wait for its answer (see training.overlap)."""


def at_once() -> AbstractContextManager[None]:
    """Waiting that nobody makes use of."""
    return nullcontext()


@dataclass(eq=False)
class Request:
    """A request that has no answer yet. `number`: that of its last sending on the line in use, 0 for none."""

    message: Message
    packed: Packed
    number: int = 0
    sent: int = 0  # bytes
    given_up: bool = False


class InFlight:
    """The requests of one link, the one whose answer comes next first. `lock` guards the line as well."""

    def __init__(self) -> None:
        self.lock = threading.Condition()
        self.requests: list[Request] = []

    def first(self, request: Request) -> None:
        """Wait until the answer to this request is the next. Raises LinkError if it was given up."""
        with self.lock:
            self.lock.wait_for(lambda: request.given_up or self.requests[0] is request)
        self.check(request)

    def pause(self, request: Request, seconds: float) -> None:
        """Wait so long. Raises LinkError if the request is given up meanwhile."""
        with self.lock:
            self.lock.wait_for(lambda: request.given_up, seconds)
        self.check(request)

    @staticmethod
    def check(request: Request) -> None:
        """Raise LinkError if a request was given up."""
        if request.given_up:
            raise LinkError(f"a {request.message.kind!r} was given up, since another one under way came to nothing")

    def ended(self, request: Request) -> None:
        """A request needs no answer any more."""
        with self.lock:
            self.requests.remove(request)
            self.lock.notify_all()

    def give_up(self) -> None:
        """Let nobody wait any more for what is under way now."""
        with self.lock:
            for request in self.requests:
                request.given_up = True
            self.lock.notify_all()
