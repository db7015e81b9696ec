"""The link between machines: one gRPC bidirectional stream a connection, raw frames of at most 1 MiB, mutual TLS.

A `GrpcLink` is a plain function to its caller, and it runs in the caller's thread. Several threads may ask at once:
their requests are under way together, and answered in order. A broken line is connected again, greeted again, and
whatever has no answer is sent again, in order: every request of the protocol may be repeated. What is sent again is
what was sent before, byte for byte, but for the request's number and tag.
"""

from __future__ import annotations

import hashlib
import logging
import queue
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import grpc
from tenacity import RetryCallState, Retrying, retry_if_exception_type, stop_after_delay, wait_random_exponential

from noren.errors import LinkError, Overloaded, ProtocolError, from_wire
from noren.types import Backward, Enter, Failure, Hello, Message, Welcome
from noren.wire.envelope import Expect, Header, Incoming, Packed, pack
from noren.wire.identity import Credentials, Insecure
from noren.wire.inflight import InFlight, Request, Waiting, at_once
from noren.wire.seal import Seal, new_key
from noren.wire.settings import Wire, codecs_for
from noren.wire.traffic import Traffic
from noren.wire.watchdog import WATCHDOG

METHOD = "/noren.Party/Exchange"
KEY_HEADER, CODE_HEADER = "noren-key-bin", "noren-code"
log = logging.getLogger("noren.link")


def options(keepalive: float) -> list[tuple[str, Any]]:
    """GRPC's settings at both ends: a peer that is silent for two `keepalive`s (seconds) is gone."""
    return [
        ("grpc.max_receive_message_length", 4 << 20),
        ("grpc.max_send_message_length", 4 << 20),
        ("grpc.keepalive_time_ms", int(keepalive * 1000)),
        ("grpc.keepalive_timeout_ms", int(keepalive * 1000)),
        ("grpc.http2.ping_timeout_ms", int(keepalive * 1000)),  # of other pings, which a keepalive may join
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.max_pings_without_data", 0),
        ("grpc.min_reconnect_backoff_ms", 5_000),  # gRPC takes it as the time that a TLS handshake may take, too
        ("grpc.initial_reconnect_backoff_ms", 100),
        ("grpc.max_reconnect_backoff_ms", 2_000),
        ("grpc.use_local_subchannel_pool", 1),  # a line is its own: a new certificate means a new connection
        ("grpc.enable_http_proxy", 0),
    ]


class GrpcLink:
    """A Handler at `address` ("host:port").

    `greet` makes the message that opens every connection (the handshake); `greeted` checks its answer, and gives what
    else must be sent before the line is used. `expect(request)` judges the header of its answer before memory is taken.
    `first_seconds` bounds the first connecting; `wire` says the rest.
    """

    def __init__(
        self,
        address: str,
        credentials: Credentials | Insecure,
        *,
        greet: Callable[[], Message] | None = None,
        greeted: Callable[[Message], Iterable[Message]] = lambda welcome: (),
        expect: Callable[[Message], Expect] | None = None,
        first_seconds: float = 8.0,
        wire: Wire | None = None,
    ) -> None:
        if isinstance(credentials, Credentials):
            credentials.check("client")
        self.address, self.welcome = address, Message(Failure(code="refused", sentence="not connected"))
        self.traffic, self.connections = Traffic(), 0
        self.wire = wire or Wire()
        self.patience = self.wire.patience_seconds
        self._credentials, self._greet, self._greeted = credentials, greet, greeted
        self._expect, self._first = expect, first_seconds
        self.waiting: Waiting = at_once
        self._line: _Line | None = None
        self._opened: _Line | None = None  # the latest, also while it is being greeted
        self._under_way = InFlight()

    def __call__(self, message: Message) -> Message:
        """Send a message and return the answer.

        Raises LinkError if the peer cannot be reached for long enough, or PeerError as the peer raised it.
        """
        request = Request(message, self._pack(message))
        with self._under_way.lock:
            self._under_way.requests.append(request)
            if self._line is not None:
                self._line.send(request)
        with self.waiting():
            try:
                self._under_way.first(request)
                try:
                    return self._try(request)
                except (_Broken, Overloaded) as error:
                    if isinstance(error, Overloaded) and isinstance(message.meta, Enter):
                        raise  # its turn has not come: whoever asks says so, and asks again
                    return self._try_again(request, error)
            finally:
                self._under_way.ended(request)

    def _try_again(self, request: Request, first: Exception) -> Message:
        seconds = self.patience if self.connections else self._first
        if self.connections and isinstance(first, _Broken):
            log.error("the line to %s broke; trying again for %.0f s", self.address, seconds)
        backoff = wait_random_exponential(multiplier=0.05, max=2.0)

        def pause(state: RetryCallState) -> float:
            error = state.outcome.exception() if state.outcome else None
            return backoff(state) + (error.retry_after if isinstance(error, Overloaded) else 0.0)

        tries = Retrying(
            retry=retry_if_exception_type((_Broken, Overloaded)),
            stop=stop_after_delay(seconds),
            wait=pause,
            sleep=partial(self._under_way.pause, request),
            reraise=True,
        )
        self._under_way.pause(request, first.retry_after if isinstance(first, Overloaded) else 0.02)
        try:
            return tries(self._try, request)
        except _Broken as error:
            raise LinkError(f"{self.address}: no answer for {seconds:.0f} s: {error}") from None

    def connect(self) -> Message:
        """Connect now, and return the answer to the greeting. Raises as a call does."""
        if self._greet is None:
            raise ProtocolError("this link has no greeting")
        return self(self._greet())

    def close(self) -> None:
        """End the connection, once nothing is under way. Safe to call twice."""
        with self._under_way.lock:
            self._under_way.lock.wait_for(lambda: not self._under_way.requests)
            self._drop()

    def give_up(self) -> None:
        """Let nobody wait any more for what is under way: they get LinkError. The next call connects again."""
        with self._under_way.lock:
            if self._under_way.requests:
                self._under_way.give_up()
                self._line = None
                if self._opened is not None:
                    self._opened.cancel()

    def _pack(self, message: Message) -> Packed:
        """The bytes of a message, the same at every attempt: stochastic rounding draws from the step's own name."""
        meta, wire = message.meta, self.wire
        seed = None
        if isinstance(meta, Backward):
            seed = rounding_seed(meta.session, message.kind)
        return pack(message, codecs_for(message.kind, wire.activations, wire.gradients), seed)

    def _try(self, request: Request) -> Message:
        self._under_way.check(request)
        try:
            reply = self._exchange(request)
        except grpc.RpcError as error:
            late = self._opened is not None and self._opened.late
            self._drop()
            self._under_way.check(request)
            if late:
                seconds = self.wire.deadline_seconds
                raise LinkError(
                    f"{self.address}: no answer to a {request.message.kind!r} within {seconds:g} s"
                ) from error
            raise self._explained(error) from error
        except BaseException:
            self._drop()
            raise
        if isinstance(reply.meta, Failure):
            raise from_wire(reply.meta.code, reply.meta.sentence, self.address, reply.meta.retry_after)
        return reply

    def _exchange(self, request: Request) -> Message:
        """Return the answer to a request whose turn it is, on a line that is made if there is none."""
        while not request.number:
            if self._line is None:
                if (answer := self._open(request)) is not None:
                    return answer
            else:  # refused before, to be sent again: after whatever was sent meanwhile
                with self._under_way.lock:
                    self._under_way.requests.remove(request)
                    self._under_way.requests.append(request)
                    self._line.send(request)
                    self._under_way.lock.notify_all()
                self._under_way.first(request)
        assert self._line is not None
        answer = self._answer(self._line, request)
        if self._greet is None and not self._line.answered:
            self.connections += 1
        self._line.answered = True
        return answer

    def _open(self, request: Request) -> Message | None:
        """Connect, greet, and send all that is under way; return the greeting's answer if that was all to be done."""
        self._drop()
        line = self._opened = _Line(self.address, self._credentials, self.wire)
        if self._greet is not None:
            self.welcome = self._ask(line, self._greet())
            if isinstance(self.welcome.meta, Failure):
                self._drop()
                return self.welcome
            self.connections += 1
        greeted = self._greet is not None and isinstance(request.message.meta, Hello)
        if self._greet is not None and not greeted:
            for more in self._greeted(self.welcome):
                if isinstance((answer := self._ask(line, more)).meta, Failure):
                    self._drop()
                    return answer
        with self._under_way.lock:
            self._under_way.check(request)
            for one in self._under_way.requests:
                if one is not request or not greeted:
                    line.send(one)
            self._line = line
        return self.welcome if greeted else None

    def _ask(self, line: _Line, message: Message) -> Message:
        request = Request(message, self._pack(message))
        line.send(request)
        return self._answer(line, request)

    def _answer(self, line: _Line, request: Request) -> Message:
        expect = self._expect(request.message) if self._expect is not None else any_answer(request.message)
        number, request.number = request.number, 0
        reply, received = line.receive(number, expect, self.wire.deadline_seconds)
        self.traffic.note(request.message.kind, request.sent, received)
        return reply

    def _drop(self) -> None:
        """End the line: all that is under way is to be sent again."""
        with self._under_way.lock:
            line, self._line, self._opened = self._opened, None, None
            for request in self._under_way.requests:
                request.number = 0
        if line is not None:
            line.close()

    def _explained(self, error: grpc.RpcError) -> Exception:
        code, details = error.code(), error.details() or ""
        text = f"{details} {getattr(error, 'debug_error_string', lambda: '')() or ''}"
        if "WRONG_VERSION_NUMBER" in text:
            return LinkError(
                f"{self.address} does not speak TLS: it is no Noren party, or one that serves with --insecure; is this "
                "the right port?"
            )
        signs = ("CERTIFICATE_VERIFY_FAILED", "SSL_ERROR", "certificate verify", "Hostname Verification")
        if any(sign.lower() in text.lower() for sign in signs):
            ca = getattr(self._credentials, "ca", "the authority")
            return LinkError(
                f"{self.address}: the TLS handshake failed: the server's certificate is not signed by "
                f"{ca}, or not made for this host name; get the right ca.crt from the operator, or "
                "issue the server's certificate with `--host`"
            )
        sent = dict(error.trailing_metadata() or ()).get(CODE_HEADER)
        if sent is not None:
            return from_wire(str(sent), details, self.address, 0.5)
        if code is grpc.StatusCode.RESOURCE_EXHAUSTED:
            return Overloaded(f"{self.address}: {details}", 0.5)
        if code is grpc.StatusCode.UNIMPLEMENTED:
            return ProtocolError(f"{self.address} speaks gRPC but is no Noren party; is this the right port?")
        hint = ""
        if "Socket closed" in text and not self.connections:
            hint = " (it hangs up during the handshake: it may not accept this client's certificate)"
        return _Broken(f"{code.name.lower()}: {details}{hint}; is the server running there?")


class _Line:
    """One connection: a channel, a stream on it, and its seal."""

    def __init__(self, address: str, credentials: Credentials | Insecure, wire: Wire) -> None:
        settings = options(wire.keepalive_seconds)
        if isinstance(credentials, Insecure):
            credentials.warn(f"connecting to {address}")
            self._channel = grpc.insecure_channel(address, settings)
        else:
            self._channel = grpc.secure_channel(address, credentials.client(), settings)
        self._frames: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        key = new_key()
        self._seal = Seal(key, client=True)
        self._request = 0
        self.late = self.answered = False
        method = self._channel.stream_stream(METHOD)
        self._stream: Any = method(iter(self._frames.get, None), metadata=((KEY_HEADER, key),))

    def send(self, request: Request) -> None:
        """Send a request; it gets its number on this line."""
        self._request += 1
        request.number, request.sent = self._request, 0
        for frame in request.packed.frames(self._request, self._seal):
            self._frames.put(frame)
            request.sent += len(frame)

    def receive(self, number: int, expect: Expect, seconds: float) -> tuple[Message, int]:
        """Return the answer to the oldest request, and its bytes. Raises RpcError, _Broken or PeerError."""
        limit = WATCHDOG.begin(seconds, self._expire)
        try:
            incoming = Incoming(self._seal, expect)
            for frame in self._stream:
                if (reply := incoming.feed(frame)) is not None:
                    break
            else:
                raise _Broken("the peer ended the connection")
        finally:
            WATCHDOG.end(limit)
        if incoming.request != number:
            raise ProtocolError(f"request {incoming.request} was answered, asked was {number}")
        return reply, incoming.nbytes

    def _expire(self) -> None:
        self.late = True
        self._stream.cancel()

    def cancel(self) -> None:
        """Let nobody wait for an answer."""
        self._stream.cancel()

    def close(self) -> None:
        """End the connection."""
        self._frames.put(None)
        self._stream.cancel()
        self._channel.close()


class _Broken(Exception):
    """The line broke; the request may be sent again."""


def rounding_seed(session: str, kind: str) -> int:
    """Seed of stochastic rounding for one message of one step."""
    return int.from_bytes(hashlib.sha256(f"{session}/{kind}".encode()).digest()[:7], "big")


ANSWERS = {"hello": "welcome", "forward": "hidden", "backward": "gradient", "pull": "state", "average": "state",
           "status": "condition"}  # fmt: skip
"""Kind of request -> kind of answer; "done" for all others."""


def any_answer(message: Message) -> Expect:
    """Expect the right kind of answer, whatever its shapes."""
    wanted = {ANSWERS.get(message.kind, "done"), "failure"}

    def expect(header: Header) -> None:
        if header.kind not in wanted:
            raise ProtocolError(f"the peer answered a {message.kind!r} with a {header.kind!r}")
        if isinstance(header.meta, Failure | Welcome) and header.tensors:
            raise ProtocolError(f"a {header.kind!r} carries no tensors")

    return expect
