"""What leaves a party leaves once.

`Releases` does to a message what the run's terms say (clipping, noise), counts the vectors in it against the budget,
and, with a journal, writes both down before the message goes: a step that is sent again, after a lost answer, a
restart or a peer's claim that it got nothing, is sent as it was, value for value. Noise that were drawn anew at every
retry could be averaged away. Of a step that is computed again, from a checkpoint or because a group went on without it,
the noise is the same if what it is added to is the same: it is drawn by a secret of the run, which the journal keeps.

With a `DeltaSender`, what leaves in a training pass is what the peer will put together from differences; that is what
is kept and counted. The differences themselves are sent once, and the values wherever the peer cannot use them.
"""

from __future__ import annotations

import secrets
import struct
from collections.abc import Iterator

import msgspec

from noren.errors import ConfigError, PolicyRefused, SessionLost
from noren.privacy.noise import Gaussian
from noren.types import Backward, Forward, Handler, Message, Noise
from noren.wire.codecs.delta import DeltaSender
from noren.wire.envelope import pack, reopen
from noren.wire.journal import Draft, Journal, Record

LENGTH = struct.Struct("<I")
TENSORS: dict[str, str | None] = {
    "forward": "hidden",
    "backward": "gradient",
    "hello": None,
    "status": None,
    "step": None,
    "pull": None,
    "push": "",  # adapters: they are the run's product, and go to whoever holds those layers
    "close": None,
}
"""What a client's message carries that was computed from its data: a tensor's name, None for nothing."""


class Spent(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Position of the count of released vectors."""

    vectors: int = 0


class Releases:
    """The one way out for what a client computed from its data. Use as `RemoteSpan.release`.

    `most`: vectors that may be released in the run, 0 for no limit, and `rule` says where that stands. Raises
    PolicyRefused at the first that is too many. `steps`: of so many, what has left stays in the journal.
    `delta`: makes differences of training passes; `samples` must then be set before each, and `compactly` be a guard of
    whatever the messages are sent by. Raises ConfigError where samples are not set.
    """

    def __init__(
        self,
        noise: Noise,
        *,
        most: int = 0,
        journal: Journal | None = None,
        run: str = "",
        delta: DeltaSender | None = None,
        rule: str = "",
        steps: int = 1,
    ) -> None:
        self._rule, self._steps = rule, steps
        self._most, self._journal, self._run, self._delta = most, journal, run, delta
        self.samples: list[int] | None = None  # numbers of the sequences of the next training pass
        self._compact: tuple[Message, Message] | None = None  # what was released last, and its differences
        self._noise = Gaussian(noise, self._secret()) if noise.clip or noise.scale else None
        found = journal.read(run, "spent") if journal is not None else None
        self.spent = msgspec.json.decode(found.words, type=Spent).vectors if found else 0

    def __call__(self, message: Message) -> Message:
        """Return the message as it may leave; the same for the same step and phase."""
        key = self._key(message)
        samples, self.samples = self.samples, None
        if key and self._journal is not None and (kept := self._journal.read(self._run, key)) is not None:
            return _reopened(kept)
        name = TENSORS[message.kind]
        if not name:
            return message
        vectors = message.tensors[name]
        spent = self.spent + len(vectors)
        if self._most and spent > self._most:
            raise PolicyRefused(
                f"{spent} vectors would have left, and the policy's budget is {self._most}; nothing was sent "
                f"{self._rule}"
            )
        if self._noise is not None:
            message = Message(message.meta, {**message.tensors, name: self._noise(vectors, _pass(key))})
        if key and self._delta is not None and isinstance(message.meta, Forward):
            message = self._encode(message, message.meta, samples, self._delta)
        self._write(message, key, spent)
        self.spent = spent
        return message

    def compactly(self, message: Message, handler: Handler) -> Message:
        """Guard: send the differences of the message that was released last, in its place, the first time.

        If the peer lacks what they build on (it was restarted, say), the values go, and samples begin anew.
        """
        compact, self._compact = self._compact, None
        if compact is None or compact[0] is not message or self._delta is None:
            return handler(message)
        try:
            return handler(compact[1])
        except SessionLost:
            self._delta.forget()
            return handler(message)

    def sent(self) -> Iterator[Message]:
        """What has left in the latest steps, in order, as the journal has it."""
        keys = [key for key in self._journal.keys(self._run) if key.startswith("sent/")] if self._journal else []
        for key in sorted(keys, key=_order):
            kept = self._journal.read(self._run, key) if self._journal else None
            if kept is not None:
                yield _reopened(kept)

    def _encode(self, message: Message, meta: Forward, samples: list[int] | None, delta: DeltaSender) -> Message:
        """Return a training pass with the values that the peer will put together; `compactly` has the differences."""
        if samples is None:
            raise ConfigError(
                'wire: activations = "delta" needs `noren train`, which says what samples a batch is made of; '
                'take another codec for other training loops, e.g. "int8-group"'
            )
        vectors = message.tensors["hidden"]
        deltas, payload = delta.encode(samples, meta.lengths, vectors)
        message = Message(meta, {"hidden": delta.sent.to(vectors.device)})
        self._compact = message, Message(msgspec.structs.replace(meta, deltas=deltas), {"hidden": payload})
        return message

    def _secret(self) -> bytes:
        """The run's own, kept in its journal; without one, of this object alone."""
        if self._journal is None:
            return secrets.token_bytes(32)
        if (found := self._journal.read(self._run, "secret")) is not None and found.body:
            return found.body
        secret = secrets.token_bytes(32)
        self._journal.write(self._run, {"secret": Draft(b"{}", secret)})
        return secret

    def _key(self, message: Message) -> str:
        meta = message.meta
        named = isinstance(meta, Backward) or (isinstance(meta, Forward) and meta.train)
        return f"sent/{meta.session}/{message.kind}" if named else ""  # type: ignore[union-attr]

    def _write(self, message: Message, key: str, spent: int) -> None:
        """Debit, and keep what is about to leave, in one transaction."""
        if self._journal is None:
            return
        puts = {"spent": Draft(msgspec.json.encode(Spent(spent)))}
        drop: list[str] = []
        if key:
            packed = pack(message)
            head = memoryview(LENGTH.pack(len(packed.header)) + packed.header)
            puts[key] = Draft(b"{}", [head, *packed.bodies])
            drop = [old for old in self._journal.keys(self._run) if _step(old) <= _step(key) - self._steps]
        elif self._noise is None and not self._most:
            return
        self._journal.write(self._run, puts, drop=drop)


def _reopened(kept: Record) -> Message:
    body = bytes(kept.body or b"")
    (length,) = LENGTH.unpack_from(body)
    return reopen(body[LENGTH.size : LENGTH.size + length], body[LENGTH.size + length :])


def _order(key: str) -> tuple[int, int, bool]:
    """By step, by number, forward before backward."""
    _, session, kind = key.split("/")
    step, _, number = session.partition(".")
    return int(step), int(number), kind == "backward"


def _pass(key: str) -> str:
    """What noise is drawn by: step and phase. A step that is made again has another number, and the same noise."""
    sent, _, kind = key.rpartition("/")
    return f"{sent.rpartition('.')[0]}/{kind}" if key else ""


def _step(key: str) -> float:
    """The step that a key is of; infinity for other keys."""
    parts = key.split("/")
    return int(parts[1].partition(".")[0]) if parts[0] == "sent" else float("inf")
