"""A link within one process. It goes through the same bytes as a link between machines."""

from __future__ import annotations

import torch

from noren.errors import NorenError, from_wire, to_wire
from noren.types import Failure, Handler, Message
from noren.wire.envelope import decode, encode
from noren.wire.traffic import Traffic


class LocalLink:
    """Carries messages to a Handler in this process, encoded and decoded, with gradients switched off as remotely."""

    def __init__(self, handler: Handler, peer: str = "local") -> None:
        self._handler, self._peer = handler, peer
        self.traffic = Traffic()

    def __call__(self, message: Message) -> Message:
        """Send a message and return the answer. Raises PeerError as the peer raised it."""
        frames = [bytes(frame) for frame in encode(message, 0)]
        answer = [bytes(frame) for frame in encode(self._answer(decode(frames)), 0)]
        self.traffic.note(message.kind, sum(map(len, frames)), sum(map(len, answer)))
        reply = decode(answer)
        if isinstance(reply.meta, Failure):
            raise from_wire(reply.meta.code, reply.meta.sentence, self._peer)
        return reply

    def _answer(self, message: Message) -> Message:
        try:
            with torch.no_grad():
                return self._handler(message)
        except NorenError as error:
            code, sentence = to_wire(error)
            return Message(Failure(code=code, sentence=sentence))

    def close(self) -> None:
        """Tell the other end that the connection is over."""
        disconnect = getattr(self._handler, "disconnect", None)
        if disconnect is not None:
            disconnect()
