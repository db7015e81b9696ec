"""A client's line to one of several parties that hold the same layers: chosen when it starts, left when it fails.

What is lost with such a party is at most the step at hand: its adapter after every step is also kept at the last party
of the chain (`Terms.replaceable`), and what the client has sent in the step at hand it sends again, as it was.
"""

from __future__ import annotations

import logging
import threading
import time
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Literal

import msgspec

from noren.errors import LinkError, NorenError, PeerError, ProtocolError, Unreachable
from noren.types import Backward, Condition, Forward, Message, Status, Update
from noren.wire.grpc_link import GrpcLink
from noren.wire.inflight import Waiting, at_once
from noren.wire.traffic import Traffic

FIRST = 8.0
"""Seconds for which all addresses are tried at first; what has once worked is tried again for longer."""
log = logging.getLogger("noren.client")


class Edges(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Which one of several addresses of the first remote party to use (`[edges]` in a run document)."""

    assign: Literal["first", "round-robin", "least-loaded"] = "least-loaded"  # "first": as [links] lists them
    switch_seconds: float = 10.0  # one that cannot be reached for so long is left for another

    def __post_init__(self) -> None:
        if not 0.05 <= self.switch_seconds <= 86_400:
            raise ValueError("switch_seconds must be between 0.05 and 86400")


class AnyOf:
    """A Handler at one of several addresses. `line` opens a line to one, `ask` one that does not greet.

    `name` tells clients apart. `sent` is what must be sent again to another party.

    Raises LinkError once none of them could be reached for `patience` seconds (at first `FIRST`).
    """

    def __init__(
        self,
        addresses: list[str],
        line: Callable[..., GrpcLink],
        edges: Edges,
        *,
        ask: Callable[[str], GrpcLink],
        name: str,
        patience: float,
    ) -> None:
        self._line, self._edges, self._patience = line, edges, patience
        self._ask = ask
        self.traffic, self.moves, self.sent = Traffic(), 0, Sent()
        self._waiting: Waiting = at_once
        self._left: list[GrpcLink] = []
        self._given_up = 0  # how often
        self._reached = False
        self._moving = threading.Lock()
        self._addresses = addresses if edges.assign == "first" else self._ranked(addresses, name)
        self._link = self._open()

    @property
    def address(self) -> str:
        """Of the party in use."""
        return self._addresses[0]

    @property
    def waiting(self) -> Waiting:
        """Within it, a caller does nothing but wait for its answer."""
        return self._waiting

    @waiting.setter
    def waiting(self, waiting: Waiting) -> None:
        self._waiting = self._link.waiting = waiting

    def __call__(self, message: Message) -> Message:
        """Send a message to the party in use, or to the next one that answers, and return the answer.

        Of several that were under way when a party failed, each is sent to the next one by its own caller.
        """
        started, given_up = time.monotonic(), self._given_up
        while True:
            link = self._link
            link.patience = min(self._edges.switch_seconds, self._patience)
            try:
                answer = link(message)
            except (LinkError, Unreachable) as error:
                seconds, patience = time.monotonic() - started, self._patience if self._reached else FIRST
                if self._given_up != given_up:
                    raise
                if seconds > patience and self.moves >= len(self._addresses) - 1:
                    raise self._hopeless(seconds, error) from None
                self._move(link, error)
            else:
                self._reached = True
                self.sent.note(message)
                return answer

    def _hopeless(self, seconds: float, error: NorenError) -> LinkError:
        all_of_them = ", ".join(sorted(self._addresses))
        return LinkError(f"none of {all_of_them} answered for {seconds:.0f} s; of the last one: {error}")

    @property
    def patience(self) -> float:
        """Seconds after which none of them is tried any more."""
        return self._patience

    @patience.setter
    def patience(self, seconds: float) -> None:
        self._patience = seconds

    def give_up(self) -> None:
        """Let nobody wait any more for what is under way."""
        self._given_up += 1
        self._link.give_up()

    def _move(self, failed: GrpcLink, error: NorenError) -> None:
        """Go on at the next address, unless another caller has moved already."""
        with self._moving:
            if self._link is not failed:
                return
            failed.give_up()
            self._left.append(failed)
            self._addresses.append(self._addresses.pop(0))
            self.moves += 1
            often = self.moves > 2 * len(self._addresses)  # nobody is there: said often enough
            log.log(logging.INFO if often else logging.WARNING, "%s; going on at %s", error, self.address)
            self._link = self._open()

    def _open(self) -> GrpcLink:
        seconds = self._edges.switch_seconds
        link = self._line(self.address, first_seconds=min(seconds, 8.0))
        link.patience, link.traffic, link.waiting = seconds, self.traffic, self._waiting
        return link

    def _ranked(self, addresses: list[str], name: str) -> list[str]:
        """The addresses in the order in which they are to be tried: stand-ins, then the silent ones, come last."""
        with ThreadPoolExecutor(len(addresses)) as pool:
            conditions = dict(zip(addresses, pool.map(self._condition, addresses), strict=True))
        there = {address: condition for address, condition in conditions.items() if condition is not None}
        spare = [address for address, condition in there.items() if condition.spare]
        last = spare + [address for address in addresses if address not in there]
        there = {address: condition for address, condition in there.items() if not condition.spare}
        if self._edges.assign == "round-robin":
            turn = sum(condition.runs for condition in there.values()) % max(len(there), 1)
            return [*list(there)[turn:], *list(there)[:turn], *last]

        def load(address: str) -> tuple[int, int, int]:
            """Those who start at one moment see the same loads: their names spread them."""
            return there[address].runs, there[address].connections, zlib.crc32(f"{name} {address}".encode())

        return [*sorted(there, key=load), *last]

    def _condition(self, address: str) -> Condition | None:
        link = self._ask(address)
        try:
            answer = link(Message(Status()))
        except (LinkError, PeerError):
            return None
        finally:
            link.close()
        if not isinstance(answer.meta, Condition):
            raise ProtocolError(f"{address} answered a status with {answer.kind!r}")
        return answer.meta if not answer.meta.draining else None

    def close(self) -> None:
        """End the connections. Safe to call twice."""
        for link in (*self._left, self._link):
            link.close()


class Sent:
    """What was sent and answered in the steps that are not confirmed yet, to be sent again to another party."""

    def __init__(self) -> None:
        self._messages: list[Message] = []

    def note(self, message: Message) -> None:
        """Note a request that was answered. A step in it is now made, so that nothing of it is sent again."""
        update: Update | None = getattr(message.meta, "update", None)
        if update is not None:
            self._messages = [one for one in self._messages if step_of(one) > update.step]
        if step_of(message):
            self._messages.append(message)

    def after(self, step: int) -> tuple[Message, ...]:
        """What was sent towards the steps after `step`, in order."""
        return tuple(message for message in self._messages if step_of(message) > step)


def step_of(message: Message) -> int:
    """The step towards which a training request is made; 0 for all other messages."""
    meta = message.meta
    named = isinstance(meta, Backward) or (isinstance(meta, Forward) and meta.train)
    return int(meta.session.partition(".")[0]) if named else 0  # type: ignore[union-attr]
