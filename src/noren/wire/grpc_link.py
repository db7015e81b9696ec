"""The link between machines: one gRPC bidirectional stream a connection, raw frames of at most 1 MiB, mutual TLS.

A `GrpcLink` is a plain function to its caller; the event loop lives in one background thread of the process. A broken
line is connected again, greeted again, and the request is sent again: every request of the protocol may be repeated.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Callable, Coroutine, Iterable
from typing import Any, TypeVar

import grpc
from tenacity import Retrying, retry_if_exception_type, stop_after_delay, wait_random_exponential

from noren.errors import LinkError, PeerError, ProtocolError, from_wire
from noren.types import Failure, Message
from noren.wire.envelope import Incoming, encode
from noren.wire.identity import Credentials
from noren.wire.traffic import Traffic

METHOD = "/noren.Party/Exchange"
OPTIONS: list[tuple[str, Any]] = [
    ("grpc.max_receive_message_length", 4 << 20),
    ("grpc.max_send_message_length", 4 << 20),
    ("grpc.keepalive_time_ms", 20_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.min_reconnect_backoff_ms", 100),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 2_000),
]
T = TypeVar("T")
log = logging.getLogger("noren.link")


class _Loop:
    """One event loop in a daemon thread, started at first use."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._loop: asyncio.AbstractEventLoop | None = None

    def get(self) -> asyncio.AbstractEventLoop:
        with self._lock:
            if self._loop is None:
                self._loop = asyncio.new_event_loop()
                threading.Thread(target=self._loop.run_forever, name="noren-wire", daemon=True).start()
            return self._loop

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Run a coroutine from another thread and wait for it; an interrupt cancels it."""
        future = asyncio.run_coroutine_threadsafe(work, self.get())
        try:
            return future.result()
        except BaseException:
            future.cancel()
            raise


LOOP = _Loop()


class GrpcLink:
    """A Handler at `address` ("host:port").

    `greet` makes the message that opens every connection (the handshake); `greeted` checks its answer, and gives what
    else must be sent before the line is used. `first_seconds` bounds the first connecting,
    `patience` the time for which a line that once worked is tried again; `deadline` one request.
    """

    def __init__(
        self,
        address: str,
        credentials: Credentials,
        *,
        greet: Callable[[], Message] | None = None,
        greeted: Callable[[Message], Iterable[Message]] = lambda welcome: (),
        first_seconds: float = 8.0,
        patience: float = 120.0,
        deadline: float = 600.0,
    ) -> None:
        credentials.check("client")
        self.address, self.welcome = address, Message(Failure(code="refused", sentence="not connected"))
        self.traffic = Traffic()
        self.connections = 0
        self._credentials, self._greet, self._greeted = credentials, greet, greeted
        self._first, self.patience, self._deadline = first_seconds, patience, deadline
        self._request = 0
        self._channel: grpc.aio.Channel | None = None
        self._stream: Any = None
        self._one_at_a_time = threading.Lock()

    def __call__(self, message: Message) -> Message:
        """Send a message and return the answer.

        Raises LinkError if the peer cannot be reached for long enough, or PeerError as the peer raised it.
        """
        with self._one_at_a_time:
            seconds = self.patience if self.connections else self._first
            tries = Retrying(
                retry=retry_if_exception_type(_Broken),
                stop=stop_after_delay(seconds),
                wait=wait_random_exponential(multiplier=0.05, max=2.0),
                before_sleep=lambda state: self._tell(state.attempt_number, seconds),
                reraise=True,
            )
            try:
                return tries(self._try, message)
            except _Broken as error:
                raise LinkError(f"{self.address}: no answer for {seconds:.0f} s: {error}") from None

    def _tell(self, attempt: int, seconds: float) -> None:
        if attempt == 1 and self.connections:
            log.error("the line to %s broke; trying again for %.0f s", self.address, seconds)

    def connect(self) -> Message:
        """Connect now, and return the answer to the greeting. Raises as a call does."""
        if self._greet is None:
            raise ProtocolError("this link has no greeting")
        return self(self._greet())

    def close(self) -> None:
        """End the connection. Safe to call twice."""
        with self._one_at_a_time:
            LOOP.run(self._drop())

    def _try(self, message: Message) -> Message:
        try:
            reply = LOOP.run(self._exchange(message))
        except grpc.aio.AioRpcError as error:
            LOOP.run(self._drop())
            raise self._explained(error) from error
        except TimeoutError as error:
            LOOP.run(self._drop())
            raise LinkError(f"{self.address}: no answer to a {message.kind!r} within {self._deadline:.0f} s") from error
        except (_Broken, PeerError, KeyboardInterrupt):
            LOOP.run(self._drop())
            raise
        if isinstance(reply.meta, Failure):
            raise from_wire(reply.meta.code, reply.meta.sentence, self.address)
        return reply

    async def _exchange(self, message: Message) -> Message:
        async with asyncio.timeout(self._deadline):
            if self._stream is None:
                await self._open()
                if self._greet is not None:
                    self.welcome = await self._ask(self._greet())
                    if isinstance(self.welcome.meta, Failure):
                        await self._drop()
                        return self.welcome
                    self.connections += 1
                    if message.kind == "hello":
                        return self.welcome
                    for more in self._greeted(self.welcome):
                        if isinstance((answer := await self._ask(more)).meta, Failure):
                            await self._drop()
                            return answer
                else:
                    self.connections += 1
            return await self._ask(message)

    async def _open(self) -> None:
        self._channel = grpc.aio.secure_channel(self.address, self._credentials.client(), options=OPTIONS)
        self._stream = self._channel.stream_stream(METHOD)()

    async def _ask(self, message: Message) -> Message:
        self._request += 1
        sent = 0
        for frame in encode(message, self._request):
            try:
                await self._stream.write(bytes(frame))
            except asyncio.InvalidStateError:
                raise _Broken("the peer has ended the connection") from None
            sent += len(frame)
        incoming = Incoming()
        while True:
            frame = await self._stream.read()
            if frame is grpc.aio.EOF:
                raise _Broken("the peer ended the connection")
            if (reply := incoming.feed(frame)) is not None:
                break
        if incoming.request != self._request:
            raise ProtocolError(f"{self.address} answered request {incoming.request}, asked was {self._request}")
        self.traffic.note(message.kind, sent, incoming.nbytes)
        return reply

    async def _drop(self) -> None:
        stream, channel, self._stream, self._channel = self._stream, self._channel, None, None
        if stream is not None:
            stream.cancel()
        if channel is not None:
            await channel.close()

    def _explained(self, error: grpc.aio.AioRpcError) -> Exception:
        text = f"{error.details()} {error.debug_error_string() or ''}"
        if "WRONG_VERSION_NUMBER" in text:
            return LinkError(f"{self.address} does not speak TLS, so it is no Noren party; is this the right port?")
        if "CERTIFICATE_VERIFY_FAILED" in text or "SSL_ERROR" in text or "certificate" in text.lower():
            return LinkError(
                f"{self.address}: the TLS handshake failed: the server's certificate is not signed by "
                f"{self._credentials.ca}, or not made for this host name; get the right ca.crt from the operator, or "
                "issue the server's certificate with `--host`"
            )
        if error.code() in (grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.PERMISSION_DENIED):
            return PeerError(f"{self.address}: {error.details()}")
        if error.code() is grpc.StatusCode.UNIMPLEMENTED:
            return ProtocolError(f"{self.address} speaks gRPC but is no Noren party; is this the right port?")
        hint = ""
        if "Socket closed" in text and not self.connections:
            hint = " (it hangs up during the handshake: it may not accept this client's certificate)"
        return _Broken(f"{error.code().name.lower()}: {error.details()}{hint}; is the server running there?")


class _Broken(Exception):
    """The line broke; the request may be sent again."""
