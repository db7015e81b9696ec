"""How a line behaves: the codecs of what crosses, and how long it waits for what."""

from __future__ import annotations

import msgspec

from noren.errors import ConfigError
from noren.wire.codecs import codec

DELTA = "delta"
"""Not a codec of one tensor: it keeps state between epochs (see codecs.delta)."""

MOST_BYTES = 4 << 30
"""No message may be larger, whatever a document says."""


class Wire(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The line between parties (`[wire]` in a run document).

    With `activations = "delta"` (for `noren train`), a training pass sends each sample as its difference from what the
    first remote party holds of it since the last epoch, a byte a value; all else crosses raw: answers, what an edge
    sends on, evaluation, generation. That party learns which of the client's samples, by number, a batch is made of.
    """

    activations: str = "raw"  # codec of hidden states, both ways; or "delta", see below
    gradients: str = "raw"  # codec of their gradients, rounded stochastically
    keepalive_seconds: float = 10.0  # a silent peer is asked so often whether it is there, and has as long to answer
    patience_seconds: float = 120.0  # a line that once worked is tried again for so long
    deadline_seconds: float = 600.0  # of one request
    delta_bytes: int = 256 << 20  # under "delta", of the samples that either end holds; beyond it, they go whole

    def __post_init__(self) -> None:
        for name in ("keepalive_seconds", "patience_seconds", "deadline_seconds"):
            if not 0.05 <= getattr(self, name) <= 86_400:
                raise ValueError(f"{name} must be between 0.05 and 86400")
        if self.gradients == DELTA:
            raise ValueError('gradients cannot be "delta", which is for activations only; "int8-group" is as small')
        if not 0 < self.delta_bytes < 1 << 48:
            raise ValueError("delta_bytes must be above 0 and below 2^48")
        for name in ("activations", "gradients"):
            try:
                codec("raw" if (chosen := getattr(self, name)) == DELTA else chosen)
            except ConfigError as error:
                raise ValueError(f"{name}: {error}") from None


class Doors(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How many may come in, and how long they may stand in the door (`[doors]` in a run document)."""

    connections: int = 128  # at once, of all clients
    connections_each: int = 16  # of one client
    message_bytes: int = 1 << 30  # of one message
    stall_seconds: float = 30.0  # for one message to cross, either way; larger ones have longer, at 10 kB/s
    hello_seconds: float = 15.0  # from connecting to hello
    clients: list[str] = []  # names that may connect; empty: every client of the federation

    def __post_init__(self) -> None:
        for name in ("connections", "connections_each", "message_bytes", "stall_seconds", "hello_seconds"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be above 0")
        if self.message_bytes > MOST_BYTES:
            raise ValueError(f"message_bytes must be at most {MOST_BYTES}")


def codecs_for(kind: str, activations: str, gradients: str) -> dict[str, str]:
    """Return tensor name -> codec for a kind of message. Adapters and their moments always cross as they are.

    Under "delta" too: differences are made before, and are a tensor of bytes.
    """
    if kind in ("forward", "hidden"):
        return {"hidden": "raw" if activations == DELTA else activations}
    return {"gradient": gradients} if kind in ("backward", "gradient") else {}
