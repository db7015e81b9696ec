"""The server's end of the links: accepts connections, names their owners by certificate, answers their messages."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol

import grpc
import torch

from noren.errors import ConfigError, NorenError, to_wire
from noren.types import Failure, Message
from noren.wire.envelope import Incoming, encode
from noren.wire.grpc_link import LOOP, METHOD, OPTIONS
from noren.wire.identity import Credentials, Identity, parse_identity

log = logging.getLogger("noren.wire")


class Answers(Protocol):
    """The Handler of one connection."""

    def __call__(self, message: Message) -> Message:
        """Answer a message."""

    def disconnect(self) -> None:
        """The connection is over."""


Connect = Callable[[str], Answers]
"""Makes the Handler of a new connection, given its owner's name."""

SERVER_OPTIONS = [
    *OPTIONS,
    ("grpc.so_reuseport", 0),
    ("grpc.http2.min_recv_ping_interval_without_data_ms", 5_000),
    ("grpc.http2.max_ping_strikes", 0),
]


class GrpcServer:
    """Serves `connect` at `address` ("host:port", port 0 for any). Use as a context manager, or `start` and `stop`.

    `tick` is called every `tick_seconds` (to end what has expired).
    """

    def __init__(
        self,
        address: str,
        credentials: Credentials,
        connect: Connect,
        *,
        tick: Callable[[], None] | None = None,
        tick_seconds: float = 5.0,
        workers: int = 16,
    ) -> None:
        self._identity = credentials.check("server")
        self._address, self._credentials, self._connect = address, credentials, connect
        self._tick, self._tick_seconds = tick, tick_seconds
        self._workers = ThreadPoolExecutor(workers, thread_name_prefix="noren-answer")
        self._server: grpc.aio.Server | None = None
        self._ticking: asyncio.Task[None] | None = None
        self.port = 0

    def start(self) -> GrpcServer:
        """Listen. Raises ConfigError if the address cannot be used."""
        LOOP.run(self._start())
        return self

    def stop(self, grace: float = 1.0) -> None:
        """Stop listening, give running answers `grace` seconds."""
        LOOP.run(self._stop(grace))
        self._workers.shutdown(wait=False, cancel_futures=True)

    def __enter__(self) -> GrpcServer:
        return self.start()

    def __exit__(self, *exc: object) -> None:
        self.stop()

    async def _start(self) -> None:
        self._server = grpc.aio.server(options=SERVER_OPTIONS)
        handler = grpc.stream_stream_rpc_method_handler(self._exchange)
        service, _, method = METHOD.strip("/").partition("/")
        self._server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, {method: handler}),))
        try:
            self.port = self._server.add_secure_port(self._address, self._credentials.server())
        except RuntimeError as error:
            raise ConfigError(f"cannot listen on {self._address}: {error}; is the port taken?") from error
        if not self.port:
            raise ConfigError(f"cannot listen on {self._address}; is the port taken, the address of this machine?")
        await self._server.start()
        if self._tick is not None:
            self._ticking = asyncio.get_running_loop().create_task(self._keep_ticking(self._tick))

    async def _keep_ticking(self, tick: Callable[[], None]) -> None:
        while True:
            await asyncio.sleep(self._tick_seconds)
            await asyncio.get_running_loop().run_in_executor(self._workers, tick)

    async def _stop(self, grace: float) -> None:
        if self._ticking is not None:
            self._ticking.cancel()
        if self._server is not None:
            await self._server.stop(grace)

    async def _exchange(self, requests: Any, context: grpc.aio.ServicerContext[bytes, bytes]) -> None:
        owner = self._owner(context.peer_identities() or ())
        if owner is None:
            await context.abort(
                grpc.StatusCode.UNAUTHENTICATED, "the client's certificate names no party of this federation"
            )
            return
        log.info("connected: %s", owner.name)
        connection = self._connect(owner.name)
        loop = asyncio.get_running_loop()
        incoming = Incoming()
        try:
            async for frame in requests:
                try:
                    message = incoming.feed(frame)
                    if message is None:
                        continue
                    answer = await loop.run_in_executor(self._workers, self._answer, connection, message, owner)
                except NorenError as error:  # the frames make no message: nothing after them can be read either
                    answer = _failure(error)
                for out in encode(answer, incoming.request):
                    await context.write(bytes(out))
                if isinstance(answer.meta, Failure) and answer.meta.code == "protocol":
                    return
                incoming = Incoming()
        finally:
            connection.disconnect()
            log.info("disconnected: %s", owner.name)

    def _answer(self, connection: Answers, message: Message, owner: Identity) -> Message:
        try:
            with torch.no_grad():
                return connection(message)
        except NorenError as error:
            log.warning("refused %s of %s: %s", message.kind, owner.name, error)
            return _failure(error)
        except Exception as error:
            log.exception("could not answer %s of %s", message.kind, owner.name)
            return _failure(error)

    def _owner(self, identities: Any) -> Identity | None:
        for raw in identities:
            text = bytes(raw).decode("utf-8", "replace")
            if text.startswith("spiffe://"):
                try:
                    identity = parse_identity(text)
                except ConfigError:
                    return None
                return identity if identity.federation == self._identity.federation else None
        return None


def _failure(error: Exception) -> Message:
    code, sentence = to_wire(error)
    return Message(Failure(code=code, sentence=sentence[:4000]))
