"""A party that holds a middle (or last) span: a server, or an edge that forwards to the next.

One frozen base serves all clients. Each client's run has an adapter and an optimiser of its own; its messages are told
apart by the owner that the transport names, never by a field of a message. What a run must not lose is in its ledger.
"""

from __future__ import annotations

import itertools
import threading
import time
import weakref
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, TypeVar

import msgspec
import torch

from noren import __version__
from noren.adapters.lora import Lora
from noren.errors import ConfigError, HandshakeRefused, Overloaded, PeerError
from noren.inference.sessions import Sessions
from noren.metrics import current_memory
from noren.parties.connection import Connection
from noren.parties.groups import Group, Groups, mode_at
from noren.parties.runs import Following, Run, dtype_name
from noren.parties.table import LATEST, Table
from noren.parties.turns import Turns
from noren.partition.stage import Stage
from noren.training.passes import Passes
from noren.training.share import Share
from noren.training.span_trainer import SpanTrainer
from noren.types import PROTOCOL, Condition, Hello, Terms
from noren.wire.codecs import CODECS
from noren.wire.identity import Identity
from noren.wire.journal import Journal

T = TypeVar("T")


class Limits(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What one owner may make this party hold, and for how long (`[serve]` in a run document)."""

    cache_bytes: int = 2 << 30  # keys and values of all its sessions
    graph_bytes: int = 4 << 30  # activations kept for backward passes, of all runs; beyond it, computed again
    tokens: int = 65_536  # in one message
    joined_tokens: int = 16_384  # of clients that train together, computed at once
    delta_bytes: int = 256 << 20  # samples held for a run under the codec "delta"; one that asks for more is refused
    runs: int = 4  # adapters held at once
    waiting: int = 64  # requests of all clients that may wait to be computed; more are told when to come back
    session_seconds: float = 600.0  # an unused session ends after this
    grace_seconds: float = 30.0  # sessions and kept activations of a client whose connection has ended
    run_seconds: float = 3600.0  # a run whose client is gone leaves memory after this
    drain_seconds: float = 5.0  # a party that was told to stop goes on for so long with those who are connected
    journal: str = "journal/{party}"  # folder of what outlives the process; "" for none
    journal_bytes: int = 8 << 30  # of all clients
    journal_bytes_each: int = 2 << 30
    journal_days: float = 7.0  # a run that nobody came back to is forgotten after this

    def __post_init__(self) -> None:
        for name in self.__struct_fields__:
            if name != "journal" and not getattr(self, name) > 0:
                raise ValueError(f"{name} must be above 0")


class SpanServer:
    """A stage at work. `connect` gives the Handler for one connection of one owner.

    `following(greet, greeted, expect)` makes the line to the next party of the chain for one client's run, as a
    GrpcLink takes them (None: this party is the last one). `journal` keeps what outlives the process
    (None: nothing does).
    """

    def __init__(
        self,
        stage: Stage,
        *,
        lora: Lora | None = None,
        limits: Limits | None = None,
        following: Following | None = None,
        journal: Journal | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.stage, self.lora, self.limits = stage, lora, limits or Limits()
        self.sessions = Sessions(
            stage, bytes_per_owner=self.limits.cache_bytes, seconds=self.limits.session_seconds, clock=clock
        )
        self.groups = Groups(self.trainer_of, self.compute, journal, partial(mode_at, stage.plan, stage.party))
        self.table = Table(self, journal, clock)
        self.passes = Passes(stage, self.limits.graph_bytes, self.limits.joined_tokens)
        self.following, self._journal, self._clock = following, journal, clock
        self.connections = self.steps = 0  # open now; optimiser steps since the process began
        self.draining = False
        self._began = clock()
        self._numbers = itertools.count(1)
        self._computer = Turns("noren-compute")
        weakref.finalize(self, self._computer.end)
        self._waiting = 0
        self._count = threading.Lock()

    def come(self) -> int:
        """Count a connection; returns its number, which is higher than those of all before it."""
        with self._count:
            self.connections += 1
            return next(self._numbers)

    def go(self) -> None:
        """Count a connection off."""
        with self._count:
            self.connections -= 1

    def connect(self, owner: Identity) -> Connection:
        """Return the Handler for a new connection of `owner`, as the transport has identified it."""
        return Connection(self, owner)

    def compute(self, work: Callable[[], T], owner: str = "") -> T:
        """Run `work` in the one thread that computes, when it is the owner's turn.

        One thread: adapters are switched in a shared stage, and freed activations of one step are used again by the
        next. Raises Overloaded if too much waits already.
        """
        with self._counted(owner):
            return self._computer.submit(owner, partial(_without_gradients, work)).result()

    def compute_together(
        self, kind: Hashable, item: Any, work: Callable[[list[Any]], list[T | PeerError]], owner: str
    ) -> T:
        """Run `work` as `compute` does, for `item` and those that others of the same kind wait with."""
        with self._counted(owner):
            return self._computer.together(owner, kind, item, partial(_without_gradients, work)).result()

    @contextmanager
    def _counted(self, owner: str) -> Iterator[None]:
        with self._count:
            if owner and self._waiting >= self.limits.waiting:  # the party's own work is never refused
                raise Overloaded(f"{self._waiting} requests wait at {self.stage.party!r} already", 1.0)
            self._waiting += 1
        try:
            yield
        finally:
            with self._count:
                self._waiting -= 1

    @property
    def waiting(self) -> int:
        """Requests that wait to be computed, or are."""
        return self._waiting

    def condition(self) -> Condition:
        """How this party is."""
        return Condition(
            party=self.stage.party, version=__version__, protocol=PROTOCOL, model=self.stage.fingerprint[:200],
            plan=self.stage.plan.lines(),
            layers=[f"{s.start}:{s.end}" for s in self.stage.plan.remote if s.party == self.stage.party],
            uptime_seconds=self._clock() - self._began, draining=self.draining, connections=self.connections,
            sessions=len(self.sessions), runs=len(self.runs), cache_bytes=self.sessions.nbytes(),
            journal_bytes=self._journal.used if self._journal else 0, rss_bytes=current_memory(),
        )  # fmt: skip

    def expire(self) -> None:
        """End sessions and runs whose clients have gone. A run that is in the journal can still be come back to."""
        self.compute(self.sessions.expire)
        self.table.expire()

    @property
    def runs(self) -> dict[tuple[str, str], Run]:
        """The runs in memory, by owner and name."""
        return self.table.runs

    def open_run(self, owner: str, hello: Hello, number: int = LATEST, *, edge: bool = False) -> Run:
        """Return a run with one more connection (see table.Table.open), for a hello that fits this party."""
        self._check(hello)
        self.expire()
        return self.table.open(owner, hello, number, edge=edge)

    def trainer_of(self, name: str, terms: Terms, group: Group | None = None) -> SpanTrainer | Share:
        """Return a trainer for a run: of an adapter of its own, or its share in that of its group."""
        if group is not None and group.body is not None:
            joint = group.joint if group.mode == "client-batch" else None
            return joint.share(name) if joint is not None else Share(group.body, name)
        lora, adapter = self.lora if terms.lora else None, f"run{next(self._numbers)}"
        try:
            return self.compute(lambda: SpanTrainer(self.passes, lora, adapter, terms.seed))
        except ConfigError as error:
            raise HandshakeRefused(f"{self.stage.party!r} cannot make this adapter: {error}") from error

    def end_sessions(self, owner: str, name: str, run: Run, ended: list[str]) -> None:
        """Forget sessions, and what they keep for a backward pass."""
        for session in ended:
            self.sessions.end(owner, name, session)
            run.trainer.forget(session)

    def close_run(self, owner: str, name: str, *, forget: bool, run: Run | None = None) -> None:
        """End a run (see table.Table.close)."""
        self.table.close(owner, name, forget=forget, run=run)

    def release(self, run: Run) -> None:
        """A connection of the run has ended."""
        self.table.release(run)

    def close(self) -> None:
        """End the thread that computes, and the lines to the next party."""
        self._computer.close()
        self.table.hang_up()

    def terms(self, asked: Terms) -> Terms:
        """The party's own terms for a run: what it was started with, and what is the client's to choose."""
        stage = self.stage
        return msgspec.structs.replace(
            asked, fingerprint=stage.fingerprint, plan=stage.plan.lines(), task=stage.task,
            dtype=dtype_name(stage.dtype), base=stage.base,
            lora=self.lora.canonical() if self.lora and asked.lora else "",
            delta_bytes=min(asked.delta_bytes, self.limits.delta_bytes), logs="metadata",
        )  # fmt: skip

    def _check(self, hello: Hello) -> None:
        if self.draining:
            raise Overloaded(f"{self.stage.party!r} is about to stop; it takes no new connections", 2.0)
        if hello.protocol != PROTOCOL:
            raise HandshakeRefused(
                f"protocol version differs: {self.stage.party!r} has {PROTOCOL}, the client has {hello.protocol}; "
                "update the older one"
            )
        asked = (hello.terms.activations if hello.terms.activations != "delta" else "raw", hello.terms.gradients)
        for name in asked:
            if name not in CODECS:
                raise HandshakeRefused(f"codec {name!r} is unknown to {self.stage.party!r}; it has {', '.join(CODECS)}")
        mine, names = self.terms(hello.terms), {"fingerprint": "model fingerprint", "lora": "adapter settings"}
        for what in Terms.__struct_fields__:
            own, theirs = getattr(mine, what), getattr(hello.terms, what)
            if own != theirs:
                raise HandshakeRefused(
                    f"{names.get(what, what)} differs: {self.stage.party!r} has {own or 'none'}, the client has "
                    f"{theirs}; give both the same run document and model"
                )


def _without_gradients(work: Callable[..., T], *given: Any) -> T:
    with torch.no_grad():
        return work(*given)
