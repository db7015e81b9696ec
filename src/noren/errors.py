"""Every error that Noren raises on purpose, in one tree.

    NorenError
    ├── ConfigError          a run document, a flag or a file that it names is wrong
    │   ├── PlanError        a cut that cannot be (gap, overlap, out of range, no such party)
    │   └── DataError        private data that cannot be read as said
    ├── ModelError           a model folder, hub id or URL that cannot be read (missing shard, truncated file)
    │   └── UnfitModel       an architecture that was checked, and cannot be cut exactly
    ├── LinkError            the peer cannot be reached, or the line broke; trying again may help
    └── PeerError            the peer answered, and the answer is no
        ├── HandshakeRefused the two sides were set up for different things
        ├── ProtocolError    bytes or fields that are not what the protocol says
        ├── TooLate          the others of the group went on without this step; it is made again in the next
        ├── SessionLost      the peer no longer holds what a step builds on; the sender replays or restarts
        ├── OverBudget       the peer's limit of bytes, sessions or time was reached
        ├── Unreachable      the peer needs another party, which it cannot reach
        ├── Overloaded       the peer has too much to do at this moment; it says when to come back
        ├── Denied           this identity may not do this
        └── PolicyRefused    the client's own policy forbids what it was asked for; nothing was sent

An error says what is wrong, with the numbers, and what to do. Those below PeerError cross the wire as a code and a
sentence, and are raised again at the other end as the same class (`to_wire`, `from_wire`).
"""

from __future__ import annotations


class NorenError(Exception):
    """The root of all errors that Noren raises on purpose."""


class ConfigError(NorenError):
    """A run document, a flag, or a file that one of them names, is wrong."""


class PlanError(ConfigError):
    """A cut that cannot be: a gap, an overlap, layers out of range, an unknown party."""


class DataError(ConfigError):
    """Private data that cannot be read as the run document says."""


class ModelError(NorenError):
    """A model folder, hub id or URL that cannot be read as a model."""


class UnfitModel(ModelError):
    """An architecture that was checked and cannot be cut with exact results."""


class LinkError(NorenError):
    """The peer cannot be reached or the line broke; the same request may be sent again."""


class PeerError(NorenError):
    """The peer answered, and the answer is no."""


class HandshakeRefused(PeerError):
    """The two sides were set up for different things; both values are in the sentence."""


class ProtocolError(PeerError):
    """Bytes or fields that are not what the protocol says."""


class SessionLost(PeerError):
    """The peer no longer holds the state that this step builds on."""


class TooLate(PeerError):
    """Those who train together went on without this client's step; it counts if it is made again."""


class OverBudget(PeerError):
    """A limit of the peer (bytes, sessions, time) was reached."""


class Overloaded(PeerError):
    """The peer has too much to do; the same request may be sent again after `retry_after` seconds."""

    def __init__(self, sentence: str, retry_after: float = 1.0) -> None:
        super().__init__(sentence)
        self.retry_after = retry_after


class Unreachable(PeerError):
    """The peer could not reach the party that comes after it."""


class Denied(PeerError):
    """The peer knows who asks, and that identity may not do this."""


class PolicyRefused(PeerError):
    """The party's own policy forbids what a peer or a run document asks for; no tensor has left."""


WIRE_CODES: dict[str, type[PeerError]] = {
    "refused": PeerError,
    "handshake": HandshakeRefused,
    "protocol": ProtocolError,
    "session-lost": SessionLost,
    "too-late": TooLate,
    "over-budget": OverBudget,
    "overloaded": Overloaded,
    "unreachable": Unreachable,
    "denied": Denied,
    "policy": PolicyRefused,
}


def to_wire(error: BaseException) -> tuple[str, str]:
    """Return the code and sentence under which an error crosses to the peer.

    All others cross as a bare class name: their text may hold data of the party that raised them.
    """
    for code, cls in WIRE_CODES.items():
        if type(error) is cls:
            return code, str(error)
    if isinstance(error, LinkError):
        return "unreachable", "the party that comes after it cannot be reached; which and where is in its own log"
    return "refused", f"internal error ({type(error).__name__}); the peer's log has the details"


def from_wire(code: str, sentence: str, peer: str, retry_after: float = 0.0) -> PeerError:
    """Return the error that a peer sent, as the class it had there, naming the peer."""
    text = f"{peer}: " + "".join(c if c.isprintable() else " " for c in sentence)
    cls = WIRE_CODES.get(code, PeerError)
    return Overloaded(text, min(max(retry_after, 0.05), 60.0)) if cls is Overloaded else cls(text)
