"""One client's run at a remote party, and the names under which it is known here and at the next one."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

import msgspec
import torch

from noren.errors import HandshakeRefused, SessionLost
from noren.parties.groups import Group
from noren.parties.ledger import Begun, Ledger
from noren.partition.stage import Stage
from noren.training.share import Share
from noren.training.span_trainer import SpanTrainer
from noren.types import Forward, Handler, Hello, Message, Terms, Welcome
from noren.wire.codecs.delta import DeltaReceiver
from noren.wire.envelope import Expect
from noren.wire.grpc_link import any_answer
from noren.wire.schema import Schema


@runtime_checkable
class Onward(Protocol):
    """The line to the next party of the chain, for one run."""

    def __call__(self, message: Message) -> Message:
        """Send a message."""

    def close(self) -> None:
        """End the connection."""


Greet = Callable[[], Message]
Greeted = Callable[[Message], Iterable[Message]]
Following = Callable[[Greet, Greeted, Callable[[Message], Expect]], Handler]
"""Makes the line to the next party, as a GrpcLink takes the three."""


@dataclass
class Run:
    """One client's run here: its adapter and optimiser, its ledger, its line to the next party, its connections."""

    trainer: SpanTrainer | Share
    ledger: Ledger
    begun: Begun
    member: str = ""  # its name among the runs of its group
    opener: int = 0  # number of the latest connection that has opened it
    following: Handler | None = None
    further: dict[str, list[int]] = field(default_factory=dict)  # adapters of the parties beyond
    connections: int = 0
    left: float = 0.0
    closed: bool = False
    moving: bool = False  # this party has just taken another's place, and has not asked the next one for its state yet
    group: Group | None = None  # with whom it trains
    deltas: DeltaReceiver | None = None  # what this party holds of the client's samples, under "delta"
    lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def adapter(self) -> dict[str, list[int]]:
        """Shapes of all that is trained for this run, here and beyond."""
        return self.trainer.shapes() | self.further

    @property
    def replaceable(self) -> bool:
        """Whether this party, which has another after it, keeps its state there too."""
        return self.begun.hello.terms.replaceable and self.following is not None and bool(self.trainer.shapes())

    @property
    def before(self) -> dict[str, list[int]]:
        """Shapes of what the parties before this one train for the run."""
        return self.begun.hello.before

    @property
    def told(self) -> dict[str, list[int]]:
        """Shapes of what this party trains for the run, as far as the next one needs to know them."""
        terms = self.begun.hello.terms
        tell = terms.replaceable or terms.together.mode == "server-hierarchical"
        return self.trainer.shapes() if tell else {}

    def values(self, message: Message, stage: Stage) -> Message:
        """Return a training pass with the values that its differences stand for; as it is if it has none.

        Raises SessionLost if what they build on is not held here, or ProtocolError.
        """
        meta = message.meta
        if not isinstance(meta, Forward) or meta.deltas is None:
            return message
        if self.deltas is None:
            self.deltas = DeltaReceiver(self.begun.hello.terms.delta_bytes)
        hidden = self.deltas.decode(meta.deltas, message.tensors["hidden"], stage.hidden_size, stage.dtype)
        return Message(msgspec.structs.replace(meta, deltas=None), {"hidden": hidden})

    def schema(self, stage: Stage, tokens: int) -> Schema:
        """What requests of this run may look like."""
        return self._schema(stage, tokens, self.adapter)

    def onward_schema(self, stage: Stage, asked: Message) -> Expect:
        """What the next party's answer to a message may look like."""
        if asked.kind == "hello":
            return any_answer(asked)
        return self._schema(stage, 1 << 30, self.further, onward=True).answer(asked)

    def _schema(self, stage: Stage, tokens: int, adapter: dict[str, list[int]], *, onward: bool = False) -> Schema:
        terms, before = self.begun.hello.terms, self.before
        back = None if stage.plan.holds_head(stage.plan.remote[-1].party) else stage.hidden_size
        return Schema(
            dtype=dtype_name(stage.dtype), width=stage.hidden_size, back=back, activations=terms.activations,
            gradients=terms.gradients, adapter=adapter, tokens=tokens, own=self.begun.hello.own,
            before=before | self.told if onward else before, labels=terms.loss_at == "cloud",
        )  # fmt: skip


def same_state(run: Run) -> Greeted:
    """Check that the next party still holds what the run built on, after a new connection to it."""

    def check(welcome: Message) -> tuple[Message, ...]:
        assert isinstance(welcome.meta, Welcome)
        known = run.begun.next_incarnation
        if known and welcome.meta.incarnation != known:
            raise SessionLost(f"the next party, {welcome.meta.party!r}, was restarted and lost this run")
        return ()

    return check


def label_of(owner: str, run: str) -> str:
    """Name of a run in the journal."""
    return f"{owner}/{run}"


def continues(hello: Hello, before: Begun) -> bool:
    """Whether a hello goes on with a run. Raises HandshakeRefused if it does so under other terms."""
    if not before.incarnation or not hello.resume.startswith(before.incarnation):
        return False
    if odd := [k for k in Terms.__struct_fields__ if getattr(hello.terms, k) != getattr(before.hello.terms, k)]:
        raise HandshakeRefused(
            f"run {hello.run!r} was begun with another {' and '.join(odd)}; start it anew, or undo the change"
        )
    return True


def onward_hello(owner: str, run: Run) -> Message:
    """The hello for the next party, to which this one is the owner of all its clients' runs: it tells them apart."""
    hello = run.begun.hello
    name = f"{owner}/{hello.run}"
    if len(name) > 200:
        name = f"{owner}/{hashlib.sha256(name.encode()).hexdigest()}"
    return Message(
        msgspec.structs.replace(
            hello, run=name, resume=run.begun.next_incarnation, before=run.before | run.told, moved=run.moving
        )
    )


def dtype_name(dtype: torch.dtype) -> str:
    """Return a dtype's name without the prefix, e.g. "bfloat16"."""
    return str(dtype).removeprefix("torch.")
