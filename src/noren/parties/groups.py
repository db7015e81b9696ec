"""Clients that train together at a party: who takes part, who waits for whom, and for how long.

A group is known by its name; whoever may train here may join one. What its clients agree on is in their terms, and the
first who comes settles it for all.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

import msgspec

from noren.errors import HandshakeRefused, Overloaded, ProtocolError
from noren.parties.ledger import Begun, Ledger
from noren.partition.plan import Plan
from noren.training.joint import Joint
from noren.training.span_trainer import SpanTrainer
from noren.types import PROTOCOL, Hello, Terms, Together, joins
from noren.wire.journal import Journal

T = TypeVar("T")
SHARED = ("sequential", "client-batch")
"""Modes in which all clients train one adapter."""


def mode_at(plan: Plan, party: str, together: Together) -> str:
    """How a party trains a group: as the group does, but that the last of several may have one adapter for all."""
    return "client-batch" if joins(together) and plan.remote[-1].party == party else together.mode


RETRY = 0.5
LOOK = 0.1
"""Seconds after which a waiting client looks again who is still there."""


class Run(Protocol):
    """What a group knows of a client's run (see runs.Run)."""

    connections: int
    left: float
    group: Group | None


@dataclass(eq=False)
class _Meeting:
    """Some members' requests of one kind, which are answered together."""

    until: float
    items: dict[str, Any] = field(default_factory=dict)
    results: dict[str, Any] | None = None
    error: BaseException | None = None
    begun: bool = False


class Group:
    """The clients of one group. `body` and `ledger`: of the adapter that they share, if they do."""

    def __init__(
        self,
        name: str,
        terms: Terms,
        mode: str,
        body: SpanTrainer | None,
        ledger: Ledger,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.name, self.terms, self.together, self.mode = name, terms, terms.together, mode
        self.body, self.ledger, self._clock = body, ledger, clock
        self.joint = Joint(body, self.together.clip) if body is not None else None
        self.runs: dict[str, Run] = {}
        present, self._holder, self._started = ledger.group()
        self._present = set(present)  # who takes part now
        self._asked: dict[str, float] = {}  # sequential: who wants to be next, and when it last said so
        self._ready: set[str] = set()  # who has asked to take part before enough had
        self._begun = clock()
        self._meetings: dict[Hashable, _Meeting] = {}
        self._round, self._until, self._making = 0, 0.0, False  # client-batch: of the step that is due
        self._change = threading.Condition()

    def check(self, terms: Terms) -> None:
        """Raise HandshakeRefused unless a client's terms are those of the group."""
        for what in ("together", "lora", "seed"):
            mine, theirs = getattr(self.terms, what), getattr(terms, what)
            if mine != theirs:
                raise HandshakeRefused(
                    f"{what} differs: the group {self.together.group!r} has {mine}, the client has {theirs}; give all "
                    "clients of the group the same, or name another group"
                )

    def join(self, member: str, run: Run) -> None:
        """A client has opened its run."""
        with self._change:
            self.runs[member] = run

    def part(self, member: str, run: Run) -> None:
        """A client's run has ended."""
        with self._change:
            if self.runs.get(member) is not run:  # it was taken over meanwhile
                return
            del self.runs[member]
        self.leave(member)

    def enter(self, member: str) -> None:
        """Let a client take part. Raises Overloaded until it may."""
        with self._change:
            self._begin(member)
            if self.mode == "sequential":
                self._take_turn(member)
            if member not in self._present:
                self._present.add(member)
                self._note()
            self._change.notify_all()

    def _begin(self, member: str) -> None:
        """Begin once enough have come, and all of them at once. Raises Overloaded before.

        One that is connected may still have an evaluation to make: where all make their steps together, it has come
        only when it asks to take part, or else the others would begin without it. Who takes part already goes on.
        """
        if self._started or member in self._present:
            return
        self._ready.add(member)
        here = self.runs.keys() if self.mode == "sequential" else self._ready | self._present
        if len(here) < (wanted := self.together.clients):
            text = f"{len(here)} of the {wanted} clients of group {self.together.group!r} are here"
            raise Overloaded(text, LOOK)  # soon: from the moment that enough are here, this one is waited for
        self._started = True
        if self.mode != "sequential":
            self._present |= self._ready
        self._note()

    def _note(self) -> None:
        """Keep who takes part, and whose turn it is."""
        self.ledger.keep_group(sorted(self._present), self._holder, self._started)

    def _take_turn(self, member: str) -> None:
        """Give the shared adapter to one client at a time, in the order in which they first asked."""
        now, patience = self._clock(), self.together.wait_seconds
        if self._holder and not self._is_here(self._holder):
            self._holder = ""
        if self._holder == member:
            return
        self._asked = {who: when for who, when in self._asked.items() if now - when < 4 * RETRY + patience}
        self._asked[member] = now
        if self._holder or next(iter(self._asked)) != member:
            ahead = list(self._asked).index(member) + bool(self._holder)
            raise Overloaded(f"another client of group {self.together.group!r} is at work; {ahead} are before", RETRY)
        del self._asked[member]
        self._holder = member
        self._note()

    def must_hold(self, member: str) -> None:
        """Raise Overloaded unless it is this client's turn, as far as there are turns."""
        if self.mode == "sequential":
            self.enter(member)

    def leave(self, member: str) -> None:
        """Nobody waits for this client any more."""
        with self._change:
            self._present.discard(member)
            self._ready.discard(member)
            self._asked.pop(member, None)
            if self._holder == member:
                self._holder = ""
            self._note()
            self._change.notify_all()

    def _left(self, member: str) -> float:
        """When a client's last connection ended; for one that has not come back since a restart, when that was."""
        run = self.runs.get(member)
        return run.left if run is not None else self._begun

    def _is_here(self, member: str) -> bool:
        """Whether a client is connected, or may come back still."""
        run = self.runs.get(member)
        connected = run is not None and run.connections > 0
        return connected or self._clock() - self._left(member) <= self.together.wait_seconds

    def meet(self, kind: Hashable, member: str, item: Any, work: Callable[[dict[str, Any]], dict[str, T]]) -> T:
        """Wait until all who take part have brought an item of this kind, then return what `work` made of this one.

        `work` is given the items by member, in the order of their names, and is run once, by whoever sees that all are
        there. A member that is waited for longer than `wait_seconds` is done without, and not waited for again until
        it comes; it is then in the next meeting.
        """
        with self._change:
            self._present.add(member)
            meeting = self._meetings.get(kind)
            if meeting is None:
                meeting = self._meetings[kind] = _Meeting(self._clock() + self.together.wait_seconds)
            meeting.items[member] = item
            self._change.notify_all()
            while not meeting.begun:
                expected = {one for one in self._present if self._is_here(one)}
                if expected <= meeting.items.keys() or self._clock() >= meeting.until:
                    meeting.begun = True
                    del self._meetings[kind]
                    self._present -= expected - meeting.items.keys()
                    break
                self._change.wait(LOOK)
            else:
                return self._outcome(meeting, member)
        try:
            meeting.results = dict(work({one: meeting.items[one] for one in sorted(meeting.items)}))
        except BaseException as error:
            meeting.error = error
        with self._change:
            self._change.notify_all()
        return self._outcome(meeting, member)

    def notice(self) -> None:
        """Somebody has contributed to the step: whoever waits for it looks again."""
        with self._change:
            self._change.notify_all()

    def finish_round(self, member: str, make: Callable[[], None]) -> None:
        """Client-batch: if a member has contributed to the step that is due, wait until that is made.

        That is so once all who take part have contributed, or after `wait_seconds`; who has not is then not waited for
        again until it comes. `make` makes the step.
        """
        joint = self.joint
        assert joint is not None
        with self._change:
            self._present.add(member)
            if member not in joint.targets:
                return
            number = self._round
            self._until = self._until or self._clock() + self.together.wait_seconds
            while self._round == number:
                expected = {one for one in self._present if self._is_here(one)}
                if expected <= joint.targets.keys() or self._clock() >= self._until:
                    self._present -= expected - joint.targets.keys()
                    self._round, self._until = number + 1, 0.0
                    break
                self._change.wait(LOOK)
            else:
                while self._making:
                    self._change.wait(LOOK)
                return
            self._making = True
        try:
            make()
        finally:
            with self._change:
                self._making = False
                self._change.notify_all()

    def _outcome(self, meeting: _Meeting, member: str) -> Any:
        with self._change:
            while meeting.results is None and meeting.error is None:
                self._change.wait(LOOK)
        if meeting.error is not None:
            raise meeting.error
        assert meeting.results is not None
        if isinstance(result := meeting.results.get(member), BaseException):
            raise result
        return result


class Groups:
    """The groups of a party, by name. `make` gives a new trainer, `compute` runs something where it is computed."""

    def __init__(
        self,
        make: Callable[[str, Terms], Any],
        compute: Callable[..., Any],
        journal: Journal | None,
        mode: Callable[[Together], str],
    ) -> None:
        self._make, self._compute, self._journal, self._mode = make, compute, journal, mode
        self._groups: dict[str, tuple[Group, int]] = {}  # with how many are in it
        self._lock = threading.Lock()

    def shares(self, terms: Terms) -> bool:
        """Whether runs of some terms train one adapter here."""
        return self._mode(terms.together) in SHARED

    def enter(self, terms: Terms) -> Group:
        """Return the group that some terms name, with one more in it. Raises HandshakeRefused if it has others."""
        name = f"*group/{terms.together.group}"
        with self._lock:
            group, users = self._groups.get(name, (None, 0))
            if group is None:
                group = self._open(name, terms)
            group.check(terms)
            self._groups[name] = group, users + 1
            return group

    def _open(self, name: str, terms: Terms) -> Group:
        """A group that is not in memory: as the journal has it, or new."""
        ledger, mode = Ledger(self._journal, name), self._mode(terms.together)
        if mode not in SHARED:
            return Group(name, terms, mode, None, ledger)
        saved, body = ledger.saved(), self._make(name, terms)
        if saved is None or saved.begun.hello.terms != terms:
            ledger.forget()
            ledger.begin(Begun(hello=Hello(protocol=PROTOCOL, run="group", terms=terms), incarnation=""))
            return Group(name, terms, mode, body, ledger)
        group = Group(name, terms, mode, body, ledger)
        self._compute(lambda: body.restore(saved.state, saved.gradients, saved.step))
        assert group.joint is not None
        group.joint.targets = msgspec.json.decode(saved.about, type=dict[str, float])
        group.joint.waiting = dict.fromkeys(group.joint.targets)
        return group

    def leave(self, group: Group | None, *, forget: bool) -> None:
        """One is no longer in a group; with the last one it ends, and with `forget` what the journal holds of it."""
        if group is None:
            return
        with self._lock:
            users = self._groups[group.name][1] - 1
            if users:
                self._groups[group.name] = group, users
                return
            del self._groups[group.name]
        if group.body is not None:
            self._compute(group.body.close)
        group.ledger.end(forget=forget)


def group_of(run: Run) -> Group:
    """Return the group of a run. Raises ProtocolError if it trains alone."""
    if run.group is None:
        raise ProtocolError("this run trains alone; give the run document a [together]")
    return run.group
