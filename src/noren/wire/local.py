"""A link within one process. It goes through the same bytes as a link between machines."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from noren.errors import NorenError, from_wire
from noren.types import Backward, Failure, Message
from noren.wire import access
from noren.wire.envelope import Expect, Header, decode, pack
from noren.wire.grpc_link import any_answer, rounding_seed
from noren.wire.grpc_server import failure, pack_answer
from noren.wire.inflight import Waiting, at_once
from noren.wire.seal import Seal, new_key
from noren.wire.settings import Wire, codecs_for
from noren.wire.traffic import Traffic


class LocalLink:
    """Carries messages to a Handler in this process, encoded and decoded, with gradients switched off as remotely."""

    def __init__(
        self,
        handler: Any,
        peer: str = "local",
        *,
        wire: Wire | None = None,
        expect: Callable[[Message], Expect] | None = None,
    ) -> None:
        self._handler, self._peer, self._wire = handler, peer, wire or Wire()
        self._expect = expect or any_answer
        self.traffic = Traffic()
        self.waiting: Waiting = at_once
        key = new_key()
        self._here, self._there, self._request = Seal(key, client=True), Seal(key, client=False), 0

    def __call__(self, message: Message) -> Message:
        """Send a message and return the answer. Raises PeerError as the peer raised it."""
        seed = rounding_seed(message.meta.session, message.kind) if isinstance(message.meta, Backward) else None
        codecs = codecs_for(message.kind, self._wire.activations, self._wire.gradients)
        self._request += 1
        frames = list(pack(message, codecs, seed).frames(self._request, self._here))
        answer = self._answer(frames)
        self.traffic.note(message.kind, sum(map(len, frames)), sum(map(len, answer)))
        reply = decode(answer, self._here, self._expect(message))
        with self.waiting():  # there is nothing to wait for: one process computes one thing at a time
            pass
        if isinstance(reply.meta, Failure):
            raise from_wire(reply.meta.code, reply.meta.sentence, self._peer, reply.meta.retry_after)
        return reply

    def _answer(self, frames: list[bytes]) -> list[bytes]:
        codecs = ("raw", "raw")
        request = Message(Failure(code="", sentence=""))
        try:
            request = decode(frames, self._there, self._judge)
            with torch.no_grad():
                answer = self._handler(request)
            codecs = getattr(self._handler, "codecs", codecs)
        except NorenError as error:
            answer = failure(error)
        return list(pack_answer(request, answer, codecs).frames(self._request, self._there))

    def _judge(self, header: Header) -> None:
        """What a server's door does: access, then what was agreed."""
        if (expect := getattr(self._handler, "expect", None)) is not None:
            access.check(header.kind, "client", in_run=self._handler.in_run)
            expect(header)

    def give_up(self) -> None:
        """Let nobody wait any more: nobody does."""

    def close(self) -> None:
        """Tell the other end that the connection is over."""
        disconnect = getattr(self._handler, "disconnect", None)
        if disconnect is not None:
            disconnect()
