"""The server's end of the links: accepts connections, names their owners by certificate, answers their messages.

Each connection has a thread of gRPC's pool. A second thread looks after all of them: it ends those whose certificate
was revoked or has run out, those that stand still in the middle of a message, and those that never say hello.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, NoReturn, Protocol

import grpc
import torch

from noren.errors import ConfigError, Denied, NorenError, Overloaded, PeerError, ProtocolError, to_wire
from noren.types import Backward, Failure, Message
from noren.wire import access
from noren.wire.envelope import Header, Incoming, Packed, pack
from noren.wire.grpc_link import CODE_HEADER, KEY_HEADER, METHOD, options, rounding_seed
from noren.wire.identity import Credentials, Identity, Insecure, Peer, Revocations, peer_of
from noren.wire.observe import Observed, add_health, reason_of
from noren.wire.seal import Seal
from noren.wire.settings import Doors, codecs_for

LEAST_RATE = 10_000
"""Bytes a second below which a message is too slow, after `Doors.stall_seconds`."""

HELLO, ANSWERING = "waiting for a hello", "not reading its answer"
"""What a connection may be busy with, beside the middle of a message."""

log = logging.getLogger("noren.wire")


class Answers(Protocol):
    """The Handler of one connection."""

    @property
    def codecs(self) -> tuple[str, str]:
        """Codecs of activations and gradients, as agreed in the hello."""

    @property
    def in_run(self) -> bool:
        """Whether a hello was accepted."""

    def __call__(self, message: Message) -> Message:
        """Answer a message."""

    def expect(self, header: Header) -> None:
        """Raise PeerError unless this header is one that was agreed; its body has not been read."""

    def disconnect(self) -> None:
        """The connection is over."""


Connect = Callable[[Identity], Answers]
"""Makes the Handler of a new connection, given who it comes from."""


@dataclass(eq=False)
class _Visit:
    """One connection, as the thread that looks after them sees it."""

    peer: Peer
    context: grpc.ServicerContext
    since: float = field(default_factory=time.monotonic)
    busy: str = HELLO  # "" between messages and while an answer is worked out
    crossed: int = 0  # bytes of the message that have crossed
    ended: str = ""
    no_hello: float | None = field(default_factory=time.monotonic)  # since when there is no run; None in one

    def at(self, busy: str, crossed: int = 0) -> None:
        """Note what the connection is doing, with a message of which so many bytes have crossed.

        Whoever is without a run is so from connecting on, whatever else is asked meanwhile.
        """
        self.crossed, now = crossed, time.monotonic()
        if not busy and self.busy == ANSWERING:  # with an answer read, and no hello awaited
            self.no_hello = None
        if busy == HELLO:
            self.no_hello = now if self.no_hello is None else self.no_hello
            self.busy, self.since = busy, self.no_hello
        elif busy != self.busy or not busy:
            self.busy, self.since = busy, now

    def end(self, why: str) -> None:
        """Cut the connection."""
        self.ended = why
        log.warning("cut off %s: %s", self.peer.identity.name, why)
        self.context.cancel()


class GrpcServer:
    """Serves `connect` at `address` ("host:port", port 0 for any). Use as a context manager, or `start` and `stop`.

    `tick` is called every `tick_seconds` (to end what has expired).
    """

    def __init__(
        self,
        address: str,
        credentials: Credentials | Insecure,
        connect: Connect,
        *,
        doors: Doors | None = None,
        keepalive: float = 10.0,
        tick: Callable[[], None] | None = None,
        tick_seconds: float = 5.0,
        observed: Observed | None = None,
        watch_seconds: float = 0.5,
    ) -> None:
        self._identity = credentials.check("server")
        self._address, self._credentials, self._connect = address, credentials, connect
        self._revoked = Revocations(credentials.ca) if isinstance(credentials, Credentials) else None
        self._doors, self._keepalive = doors or Doors(), keepalive
        self.observed = observed or Observed()
        self.observed.watch("noren_connections", lambda: len(self._visits))
        self._health: Any = None
        self._tick, self._tick_seconds, self._watch_seconds = tick, tick_seconds, watch_seconds
        self._visits: set[_Visit] = set()
        self._lock = threading.Lock()
        self._over = threading.Event()
        self._server: grpc.Server | None = None
        self.port = 0

    @property
    def connections(self) -> int:
        """Connections that are open."""
        return len(self._visits)

    def start(self) -> GrpcServer:
        """Listen. Raises ConfigError if the address cannot be used."""
        most = self._doors.connections
        pool = ThreadPoolExecutor(most + 8, thread_name_prefix="noren-connection")
        settings = [
            *options(self._keepalive),
            ("grpc.so_reuseport", 0),
            ("grpc.http2.min_recv_ping_interval_without_data_ms", 50),
            ("grpc.http2.max_ping_strikes", 0),
            ("grpc.server_handshake_timeout_ms", int(self._doors.hello_seconds * 1000)),
            ("grpc.max_connection_idle_ms", int(self._doors.hello_seconds * 1000)),  # no stream on it
            ("grpc.max_concurrent_streams", self._doors.connections_each),
        ]
        self._server = server = grpc.server(pool, options=settings, maximum_concurrent_rpcs=most + 8)
        service, _, method = METHOD.strip("/").partition("/")
        handler = grpc.stream_stream_rpc_method_handler(self._exchange)
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, {method: handler}),))
        self._health = add_health(server, self._may_ask)
        try:
            if isinstance(self._credentials, Insecure):
                self._credentials.warn(f"serving at {self._address}")
                self.port = server.add_insecure_port(self._address)
            else:
                self.port = server.add_secure_port(self._address, self._credentials.server())
        except RuntimeError:
            self.port = 0
        if not self.port:
            raise ConfigError(f"cannot listen on {self._address}; is the port taken, the address one of this machine?")
        server.start()
        threading.Thread(target=self._look_after, name="noren-doors", daemon=True).start()
        if self._tick is not None:
            threading.Thread(target=self._keep_ticking, args=(self._tick,), name="noren-tick", daemon=True).start()
        return self

    def drain(self, seconds: float, hurry: Callable[[], bool] = lambda: False) -> None:
        """Say at once that this party is about to stop; then wait, at most so long, until nobody is connected.

        Those who are connected are served meanwhile; `hurry` ends the wait.
        """
        if self._health is not None:
            self._health.enter_graceful_shutdown()
        end = time.monotonic() + seconds
        while self._visits and time.monotonic() < end and not hurry():
            time.sleep(0.05)

    def stop(self, grace: float = 1.0) -> None:
        """Stop listening, give running answers `grace` seconds."""
        self.drain(0.0)
        self._over.set()
        if self._server is not None:
            self._server.stop(grace).wait(grace + 5)

    def __enter__(self) -> GrpcServer:
        return self.start()

    def __exit__(self, *exc: object) -> None:
        self.stop()

    def _look_after(self) -> None:
        while not self._over.wait(self._watch_seconds):
            for visit in list(self._visits):
                if not visit.ended and (why := self._why_not(visit)):
                    visit.end(why)

    def _keep_ticking(self, tick: Callable[[], None]) -> None:
        """A thread of its own: a tick waits for what is being computed, and the doors must not."""
        while not self._over.wait(self._tick_seconds):
            try:
                tick()
            except Exception:
                log.exception("ending what has expired failed")

    def _why_not(self, visit: _Visit) -> str:
        """Say why a connection must end now; "" if it may stay."""
        try:
            self._check_certificate(visit.peer)
        except Denied as error:
            return str(error)
        seconds = self._doors.hello_seconds if visit.busy == HELLO else self._doors.stall_seconds
        seconds += visit.crossed / LEAST_RATE
        if visit.busy and time.monotonic() - visit.since > seconds:
            return f"{visit.busy} for more than {seconds:.0f} s"
        return ""

    def _check_certificate(self, peer: Peer) -> None:
        if self._revoked is not None and self._revoked.revoked(peer.serial):
            raise Denied(f"the certificate of {peer.identity.name!r} was revoked")
        if peer.not_after <= datetime.now(UTC):
            raise Denied(f"the certificate of {peer.identity.name!r} has expired")

    def _admit(self, context: grpc.ServicerContext) -> tuple[Peer, Seal]:
        """Return who has connected, and the connection's seal. Raises Denied, Overloaded or ProtocolError."""
        doors = self._doors
        peer = self._peer(context)
        self._check_certificate(peer)
        name = peer.identity.name
        if doors.clients and name not in doors.clients:
            raise Denied(f"{name!r} is not among the clients of this party")
        metadata = {key: value for key, value in context.invocation_metadata()}
        key = metadata.get(KEY_HEADER, b"")
        seal = Seal(key if isinstance(key, bytes) else b"", client=False)
        if len(self._visits) >= doors.connections:
            raise Overloaded(f"{doors.connections} connections are open, which is the limit")
        if sum(visit.peer.identity.name == name for visit in list(self._visits)) >= doors.connections_each:
            raise Overloaded(f"{name!r} has {doors.connections_each} connections open, the limit for one client")
        return peer, seal

    def _may_ask(self, context: grpc.ServicerContext) -> None:
        """Raise Denied unless this peer may ask how the party is."""
        self._check_certificate(self._peer(context))

    def _peer(self, context: grpc.ServicerContext) -> Peer:
        if isinstance(self._credentials, Insecure):
            return Peer(Identity("anonymous", "client", self._identity.federation), 0, datetime.max.replace(tzinfo=UTC))
        certificates = context.auth_context().get("x509_pem_cert") or [b""]
        try:
            peer = peer_of(certificates[0])
        except ConfigError as error:
            raise Denied(f"the client's certificate names no party of this federation: {error}") from error
        if peer.identity.federation != self._identity.federation:
            raise Denied("the client's certificate names no party of this federation")
        return peer

    def _exchange(self, requests: Iterator[bytes], context: grpc.ServicerContext) -> Iterator[bytes]:
        try:
            with self._lock:
                peer, seal = self._admit(context)
                visit = _Visit(peer, context)
                self._visits.add(visit)
        except PeerError as error:
            self.observed.refused("revoked" if "revoked" in str(error) else reason_of(error))
            log.warning("turned away: %s", error)
            _abort(context, error)
        who = {"owner": peer.identity.name, "role": peer.identity.role}
        log.info("connected", extra=who)
        connection = self._connect(peer.identity)
        torch.set_grad_enabled(False)  # of this thread
        try:
            yield from self._converse(visit, connection, seal, requests)
        except NorenError as error:  # the frames make no message: nothing after them can be read either
            reason = "malformed" if isinstance(error, ProtocolError) else reason_of(error)
            self.observed.refused(reason)
            log.warning("refused bytes: %s", error, extra=who | {"reason": reason})
            _abort(context, error)
        except grpc.RpcError:
            pass  # the client has gone
        finally:
            self._visits.discard(visit)
            connection.disconnect()
            log.info("disconnected", extra=who)

    def _converse(self, visit: _Visit, connection: Answers, seal: Seal, requests: Iterator[bytes]) -> Iterator[bytes]:
        def expect(header: Header) -> None:
            access.check(header.kind, visit.peer.identity.role, in_run=connection.in_run)
            connection.expect(header)

        incoming = Incoming(seal, expect, self._doors.message_bytes)
        for frame in requests:
            message = incoming.feed(frame)
            if message is None:
                visit.at("in the middle of a message", incoming.nbytes)
                continue
            visit.at("")
            started, down = time.perf_counter(), 0
            answer = self._answer(connection, message, visit.peer.identity)
            seconds = time.perf_counter() - started
            packed = pack_answer(message, answer, connection.codecs)
            for out in packed.frames(incoming.request, seal):
                visit.at("not reading its answer", down)
                down += len(out)
                yield out
            role = visit.peer.identity.role
            self.observed.answered(message.kind, role, seconds, incoming.nbytes, down)
            if log.isEnabledFor(logging.DEBUG):
                log.debug("answered", extra=_facts(visit, message, seconds) | {"up": incoming.nbytes, "down": down})
            visit.at("" if connection.in_run else "waiting for a hello")
            incoming = Incoming(seal, expect, self._doors.message_bytes)
        if incoming.nbytes:
            raise ProtocolError("the stream ended in the middle of a message")

    def _answer(self, connection: Answers, message: Message, owner: Identity) -> Message:
        try:
            return connection(message)
        except Exception as error:
            reason = reason_of(error)
            self.observed.refused(reason)
            who = {"owner": owner.name, "role": owner.role, "kind": message.kind, "reason": reason}
            if isinstance(error, NorenError):
                level = logging.INFO if isinstance(error, Overloaded) else logging.WARNING  # it will be asked again
                log.log(level, "refused: %s", error, extra=who)
            else:
                log.exception("could not answer", extra=who)
            return failure(error)


def _facts(visit: _Visit, message: Message, seconds: float) -> dict[str, Any]:
    identity = visit.peer.identity
    return {"owner": identity.name, "role": identity.role, "kind": message.kind, "seconds": round(seconds, 6)}


def pack_answer(request: Message, answer: Message, codecs: tuple[str, str]) -> Packed:
    """Return an answer as bytes: the same for the same request and answer."""
    seed = rounding_seed(request.meta.session, answer.kind) if isinstance(request.meta, Backward) else None
    return pack(answer, codecs_for(answer.kind, *codecs), seed)


def failure(error: BaseException) -> Message:
    """Return the message by which an error crosses."""
    code, sentence = to_wire(error)
    return Message(Failure(code=code, sentence=sentence[:4000], retry_after=getattr(error, "retry_after", 0.0)))


STATUS = {
    "denied": grpc.StatusCode.PERMISSION_DENIED,
    "overloaded": grpc.StatusCode.RESOURCE_EXHAUSTED,
    "over-budget": grpc.StatusCode.RESOURCE_EXHAUSTED,
}


def _abort(context: grpc.ServicerContext, error: NorenError) -> NoReturn:
    """End a stream with an error, which is raised at the other end as it was raised here."""
    code, sentence = to_wire(error)
    context.set_trailing_metadata(((CODE_HEADER, code),))
    context.abort(STATUS.get(code, grpc.StatusCode.INVALID_ARGUMENT), sentence[:1000])
    raise AssertionError("abort returned")
