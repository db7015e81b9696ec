"""The runs of a party: begun, gone on with, taken over by another edge, left alone, ended.

A run is known by its owner, which the transport names, and its name. It is in memory while it is used, and in the
journal as long as somebody may come back to it.
"""

from __future__ import annotations

import dataclasses
import sys
import threading
import uuid
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from typing import Any, Protocol, TypeVar

from noren.errors import OverBudget, SessionLost
from noren.inference.sessions import Sessions
from noren.parties.alone import Alone
from noren.parties.groups import Group, Groups
from noren.parties.ledger import Begun, Ledger, keep_all
from noren.parties.runs import Following, Onward, Run, continues, label_of, onward_hello, same_state
from noren.partition.stage import Stage
from noren.training.share import Share
from noren.training.span_trainer import SpanTrainer
from noren.types import TOKEN, Hello, Terms
from noren.wire.journal import Journal

T = TypeVar("T")
Key = tuple[str, str]
"""A run's owner and name."""
LATEST = sys.maxsize


class Host(Protocol):
    """What the table needs of the party (see server.SpanServer)."""

    stage: Stage
    sessions: Sessions
    groups: Groups
    limits: Any
    following: Following | None

    def compute(self, work: Callable[[], T], owner: str = "") -> T:
        """Run in the thread that computes."""

    def trainer_of(self, name: str, terms: Terms, group: Group | None = None) -> SpanTrainer | Share:
        """Return a trainer for a run."""


class Table:
    """The runs that are in memory, and the way to those that are in the journal."""

    def __init__(self, host: Host, journal: Journal | None, clock: Callable[[], float]) -> None:
        self._host, self._journal, self._clock = host, journal, clock
        self.runs: dict[Key, Run] = {}
        self._lock = threading.Lock()  # of the table; never held for long
        self._opening = Alone()  # a run is opened by one at a time, and nobody waits who wants another
        self._coming: set[Key] = set()  # runs that are being made

    def open(self, owner: str, hello: Hello, number: int = LATEST, *, edge: bool = False) -> Run:
        """Return the owner's run of that name with one more connection (see `release`).

        It goes on as it was left if the hello has its resume token, else it begins anew. `number`: of the connection.
        A hello of a connection that is older than the run, and does not go on with it, was overtaken by the client's
        next one while it was worked on, and changes nothing. `edge`: the owner is one, and may take over a run that
        another had before it. Raises HandshakeRefused, SessionLost or OverBudget.
        """
        key = (owner, hello.run)
        if hello.moved and edge:
            self._take_over(key, hello)
        with self._opening(key):
            run = self.runs.get(key)
            if run is not None and not continues(hello, run.begun):
                if number < run.opener:
                    raise SessionLost("this run was begun anew by a later connection of its owner")
                self._drop(key, forget=True)
            with self._lock:
                if (run := self.runs.get(key)) is not None:
                    run.connections += 1
                    run.opener = max(run.opener, number)
                    return run
                if sum(k[0] == owner for k in self.runs.keys() | self._coming) >= self._host.limits.runs:
                    most = self._host.limits.runs
                    raise OverBudget(f"{owner} has {most} runs here already, which is the limit; close one")
                self._coming.add(key)
            try:
                run = self._make(owner, hello, number)
                with self._lock:
                    self.runs[key] = run
                return run
            finally:
                with self._lock:
                    self._coming.discard(key)

    def _make(self, owner: str, hello: Hello, number: int) -> Run:
        """Return a run that is not in memory, with one connection: from the journal, or new."""
        host, label = self._host, label_of(owner, hello.run)
        ledger = Ledger(self._journal, label, host.limits.journal_bytes_each)
        saved, given_up = ledger.saved(), ""
        if saved is not None and not continues(hello, saved.begun):
            ledger.forget()
            given_up = saved.begun.member
            saved = None
        group = host.groups.enter(hello.terms) if hello.terms.together.mode != "alone" else None
        begun = saved.begun if saved is not None else self._begin(label, hello, group)
        try:
            trainer = host.trainer_of(begun.member, hello.terms, group)
        except BaseException:
            host.groups.leave(group, forget=False)
            raise
        try:
            if saved is None:
                ledger.begin(begun)
            else:
                host.compute(lambda: trainer.restore(saved.state, saved.gradients, saved.step))
        except BaseException:
            host.compute(trainer.close)
            host.groups.leave(group, forget=False)
            raise
        run = Run(
            trainer, ledger, begun, member=begun.member, opener=number, connections=1, left=self._clock(), group=group,
            moving=saved is None and bool(begun.next_incarnation),
        )  # fmt: skip
        if group is not None:
            if given_up:  # nor does it take part still
                group.leave(given_up)
            group.join(run.member, run)
        if host.following is not None:
            run.following = host.following(
                lambda: onward_hello(owner, run), same_state(run), lambda asked: run.onward_schema(host.stage, asked)
            )
        return run

    def _begin(self, label: str, hello: Hello, group: Group | None) -> Begun:
        """How a new run begins. One that another edge had goes on with what the parties beyond hold of it."""
        incarnation = uuid.uuid4().hex
        if group is not None and label in group.runs:  # one that was begun under this name goes on under another
            label = f"{label}#{incarnation[:8]}"
        beyond = hello.resume[TOKEN:] if hello.moved and self._host.following is not None else ""
        return Begun(hello=hello, incarnation=incarnation, next_incarnation=beyond, member=label)

    def _take_over(self, key: Key, hello: Hello) -> None:
        """Give an edge the run that another had before it, if it has that run's token; begin the step at hand again.

        What the former edge asked for is finished first, and what it asks from now on is refused.
        """
        while (former := self._former(hello)) is not None:
            with ExitStack() as held:
                run = self.runs.get(former)
                if run is not None:  # before the keys, as a request holds it that ends its run
                    held.enter_context(run.lock)
                for one in sorted({former, key}):
                    held.enter_context(self._opening(one))
                if self.runs.get(former) is not run:
                    continue
                if run is not None:
                    self._move(run, former, key)
                elif self._journal is not None:
                    ledger = Ledger(self._journal, label_of(*former))
                    if not self._host.groups.shares(hello.terms):
                        keep_all([(ledger, ledger.again())])
                    if former != key:
                        ledger.rename(label_of(*key))
                return

    def _move(self, run: Run, former: Key, key: Key) -> None:
        """Hold a run under another owner's name, and begin its unfinished step again."""
        if run.group is None or run.group.body is None:  # what counts in a shared adapter counts for good
            keep_all([(run.ledger, run.ledger.again())])
            self._host.compute(run.trainer.forget)
        self._host.compute(partial(self._host.sessions.end, *former))
        if former != key:
            self._drop(key, forget=True)
            run.ledger.rename(label_of(*key))
        run.closed = True
        fresh = dataclasses.replace(run, closed=False, connections=0, left=self._clock(), lock=threading.Lock())
        with self._lock:
            del self.runs[former]
            self.runs[key] = fresh
        if run.group is not None:
            run.group.join(run.member, fresh)

    def _former(self, hello: Hello) -> Key | None:
        """Under which owner the run of a token is held here."""
        with self._lock:
            held = [key for key, run in self.runs.items() if key[1] == hello.run and continues(hello, run.begun)]
        if held or self._journal is None:
            return held[0] if held else None
        for label in self._journal.runs():
            owner, _, name = label.partition("/")
            if name == hello.run:
                saved = Ledger(self._journal, label).saved()
                if saved is not None and continues(hello, saved.begun):
                    return owner, name
        return None

    def close(self, owner: str, name: str, *, forget: bool, run: Run | None = None) -> None:
        """End a run and all that memory holds for it; with `forget`, what the journal holds too.

        `run`: only if it is this one still, and not one that was begun in its place.
        """
        with self._opening((owner, name)):
            self._drop((owner, name), forget=forget, only=run)

    def _drop(self, key: Key, *, forget: bool, only: Run | None = None, idle: bool = False) -> None:
        with self._lock:
            run = self.runs.get(key)
            if run is None or (only is not None and only is not run) or (idle and run.connections):
                return
            del self.runs[key]
        run.closed = True
        run.deltas = None
        self._host.compute(run.trainer.close)
        self._host.compute(partial(self._host.sessions.end, *key))
        run.ledger.end(forget=forget)
        if run.group is not None:
            run.group.part(run.member, run)
            self._host.groups.leave(run.group, forget=forget)
        if isinstance(run.following, Onward):
            run.following.close()

    def release(self, run: Run) -> None:
        """A connection of the run has ended."""
        with self._lock:
            run.connections -= 1
            run.left = self._clock()

    def expire(self) -> None:
        """End runs whose clients have gone. One that is in the journal can still be come back to."""
        now, limits = self._clock(), self._host.limits
        with self._lock:
            gone = [(key, run) for key, run in self.runs.items() if not run.connections]
        for key, run in gone:
            if run.left < now - limits.grace_seconds and not run.connections:
                self._host.compute(partial(self._let_go, key, run))
            if run.left < now - limits.run_seconds:
                self._drop(key, forget=False, only=run, idle=True)
        if self._journal is not None:
            for name in self._journal.runs():
                if self._journal.touched(name) > limits.journal_days * 86_400 and not self._is_live(name):
                    self._journal.forget(name)

    def _let_go(self, key: Key, run: Run) -> None:
        self._host.sessions.end(*key)
        run.trainer.forget_passes()
        run.deltas = None

    def _is_live(self, label: str) -> bool:
        with self._lock:
            return any(label_of(*key) == label for key in (*self.runs, *self._coming))

    def hang_up(self) -> None:
        """End the lines to the next party."""
        for run in self.runs.values():
            if isinstance(run.following, Onward):
                run.following.close()
