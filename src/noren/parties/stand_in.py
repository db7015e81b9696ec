"""A party that holds another's layers too, in case all of those who serve them are gone: loaded when first needed."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import msgspec

from noren.errors import Overloaded, ProtocolError
from noren.parties.runs import Following, Greet, Greeted
from noren.parties.server import SpanServer
from noren.types import Condition, Handler, Hello, Message, Status
from noren.wire.envelope import Expect, Header
from noren.wire.identity import Identity
from noren.wire.local import LocalLink
from noren.wire.schema import nothing_agreed
from noren.wire.settings import Wire


class StandIn:
    """Serves a span that `make` loads at the first hello. `condition`: how it is until then."""

    def __init__(self, make: Callable[[], SpanServer], condition: Callable[[], Condition]) -> None:
        self._make, self._condition = make, condition
        self._server: SpanServer | None = None
        self._draining = False
        self._lock = threading.Lock()

    def connect(self, owner: Identity) -> Waiting:
        """Return the Handler for a new connection of `owner`."""
        return Waiting(self, owner)

    def loaded(self) -> SpanServer:
        """Return the server, loaded now if it is not yet. Raises Overloaded if it is about to stop."""
        with self._lock:
            if self._draining:
                raise Overloaded("this party is about to stop; it takes no new connections", 2.0)
            self._server = self._server or self._make()
            return self._server

    def condition(self) -> Condition:
        """How it is."""
        if self._server is not None:
            return msgspec.structs.replace(self._server.condition(), spare=True)
        return msgspec.structs.replace(self._condition(), spare=True, runs=0, sessions=0)

    def expire(self) -> None:
        """End what clients have left."""
        if self._server is not None:
            self._server.expire()

    def drain(self) -> None:
        """Take no new runs."""
        with self._lock:
            self._draining = True
            if self._server is not None:
                self._server.draining = True

    def close(self) -> None:
        """End the server, if there is one."""
        if self._server is not None:
            self._server.close()


class Waiting:
    """The Handler of one connection: asked how it is, it says so; a hello makes the stand-in load its layers."""

    def __init__(self, stand_in: StandIn, owner: Identity) -> None:
        self._stand_in, self._owner = stand_in, owner
        self._connection: Any = None
        self._gone = False

    @property
    def in_run(self) -> bool:
        """Whether a hello was accepted."""
        return self._connection is not None and self._connection.in_run

    @property
    def codecs(self) -> tuple[str, str]:
        """Codecs of what is sent back."""
        return self._connection.codecs if self._connection is not None else ("raw", "raw")

    def expect(self, header: Header) -> None:
        """Raise PeerError unless this header is one that was agreed."""
        if self._connection is not None:
            self._connection.expect(header)
        else:
            nothing_agreed(header)

    def __call__(self, message: Message) -> Message:
        """Answer one message. Raises PeerError."""
        if isinstance(message.meta, Status):
            return Message(self._stand_in.condition())
        if self._connection is None and isinstance(message.meta, Hello):
            self._connection = self._stand_in.loaded().connect(self._owner)
            if self._gone:
                self._connection.disconnect()
        if self._connection is None:
            raise ProtocolError(f"{message.kind!r} before 'hello'")
        answer: Message = self._connection(message)
        return answer

    def disconnect(self) -> None:
        """The connection has ended."""
        self._gone = True
        if self._connection is not None:
            self._connection.disconnect()


def beside(server: SpanServer, name: str) -> Following:
    """Return what makes lines to a party in this process, for one that stands in for the party before it."""

    def line(greet: Greet, greeted: Greeted, expect: Callable[[Message], Expect]) -> Handler:
        hello = greet().meta
        assert isinstance(hello, Hello)
        wire = Wire(activations=hello.terms.activations, gradients=hello.terms.gradients)
        return LocalLink(server.connect(Identity(name, "edge", "")), wire=wire, expect=expect)

    return line
