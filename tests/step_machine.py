"""A client, a bad network and a server that crashes, over the real step protocol, moved by Hypothesis.

The client repeats what it sent until it is answered, byte for byte, and gives a lost graph back by the same forward
pass again. The network loses requests and answers and delivers duplicates, at once or much later, on the connection in
use or on one that the client has given up. The server crashes before the commit, after it, and between requests; a new
one opens the same journal. After every rule the server must hold exactly what an undisturbed one holds after the same
requests, and a repeated request must be answered with the same bytes.
"""

from __future__ import annotations

import copy
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path

import msgspec
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from conftest import identity
from noren.parties.connection import Connection
from noren.parties.runs import Run
from noren.parties.server import SpanServer
from noren.partition.stage import Stage
from noren.types import Backward, Failure, Message, State, Welcome
from noren.wire.envelope import reopen
from noren.wire.journal import Change, Journal
from step_tape import OWNER, PULL, RUN, TAPES, Bytes, Snapshot, Tape, as_bytes, ask, digest, tape

SHARED_MEMORY = Path("/dev/shm")
GIVEN_UP = 2
"""So many connections that the client has given up are still open at the server."""

EVENTS = (
    *["answered"] * 12, *["answered twice"] * 2, "request lost", *["answer lost"] * 3, *["crash before the commit"] * 2,
    *["crash after the commit"] * 2, "crash", *["duplicate"] * 4, "idle",
)  # fmt: skip
"""What may happen next, each as often as it stands here."""


class Violation(AssertionError):
    """A request counted twice, or not at all, or was answered otherwise."""


class Crash(BaseException):
    """The server's process ends here."""


class BreakingJournal(Journal):
    """A journal whose process ends before or after its next commit."""

    crash = ""

    def write_all(self, changes: Mapping[str, Change]) -> None:
        if self.crash == "before":
            raise Crash
        super().write_all(changes)
        if self.crash == "after":
            raise Crash


class Steps(RuleBasedStateMachine):
    """The machine. `told` counts what was done, over all runs."""

    stage: Stage
    told: Counter[str]

    def __init__(self) -> None:
        super().__init__()
        place = SHARED_MEMORY if SHARED_MEMORY.is_dir() else None
        self.folder = Path(tempfile.mkdtemp(prefix="noren-steps-", dir=place))
        self.now = 0.0
        self.violated = False
        self.server: SpanServer | None = None

    @initialize(seed=st.integers(0, TAPES - 1))
    def begin(self, seed: int) -> None:
        self.tape: Tape = tape(self.stage, seed)
        self.cursor = self.sent = 0  # the request to be answered next; those before `sent` have left at least once
        self.replay: int | None = None  # a forward pass that is to be made again before it
        self.floor = 0  # requests whose effect was seen
        self.incarnation = ""
        self.connection: Connection | None = None
        self.given_up: list[Connection] = []
        self.start()
        self.told["runs"] += 1

    def start(self) -> None:
        self.journal = BreakingJournal(self.folder)
        self.server = SpanServer(
            copy.deepcopy(self.stage), lora=self.tape.lora, journal=self.journal, clock=lambda: self.now
        )

    def stop(self) -> None:
        if self.server is not None:
            self.server.close()
            self.journal.close()
        self.server, self.connection, self.given_up = None, None, []

    def restart(self) -> None:
        self.told["crashes"] += 1
        self.stop()
        self.start()

    def check(self, holds: bool, what: str) -> None:
        if not holds:
            self.violated = True
            raise Violation(f"request {self.cursor}: {what}")

    @property
    def run(self) -> Run | None:
        assert self.server is not None
        return self.server.runs.get((OWNER, RUN))

    def connected(self) -> Connection:
        """The connection in use; a new one says hello with what it knows of the run."""
        assert self.server is not None
        if self.connection is None:
            self.connection = self.server.connect(identity(OWNER))
            hello = Message(msgspec.structs.replace(self.tape.hello, resume=self.incarnation))
            answer = ask(self.connection, as_bytes(hello, ("raw", "raw")))
            welcome = reopen(*answer).meta
            self.check(isinstance(welcome, Welcome), f"the hello was answered with {answer[0]!r}")
            assert isinstance(welcome, Welcome)
            known, self.incarnation = self.incarnation or welcome.incarnation, welcome.incarnation
            self.check(known == self.incarnation, "the run was lost")
            self.check(welcome.step in {state.step for state in self.possible()}, f"welcomed at step {welcome.step}")
        return self.connection

    def break_line(self) -> None:
        """The client gives its connection up; the server does not know of it yet."""
        if self.connection is not None:
            self.given_up.append(self.connection)
        self.connection = None
        while len(self.given_up) > GIVEN_UP:
            self.given_up.pop(0).disconnect()

    def possible(self) -> list[Snapshot]:
        """What the server may hold now: the effect of all that was answered, and perhaps of what was sent since."""
        return self.tape.states[max(self.cursor, self.floor) : self.sent + 1] or [self.tape.states[self.cursor]]

    def deliver(self, index: int, connection: Connection, crash: str = "") -> Bytes:
        """The server handles a request; checks its answer. Raises Crash."""
        self.sent = max(self.sent, index + 1)
        self.told["requests"] += 1
        self.journal.crash = crash
        live = self.run
        current = live is not None and self.tape.trains(index) and self.tape.step_of(index) == live.trainer.step + 1
        must = current and index < max(self.cursor, self.floor)  # it was answered, and its step is not over
        got = ask(connection, self.tape.requests[index])
        self.journal.crash = ""
        meta = reopen(*got).meta
        if isinstance(meta, Failure):
            self.check(meta.code == "session-lost" and not must, f"refused: {meta.code}: {meta.sentence}")
        elif index == self.cursor or not self.tape.computed(index):
            self.check(got == self.tape.answers[index], f"request {index} was answered otherwise than at first")
        return got

    def receive(self, index: int, got: Bytes) -> None:
        """The client has an answer."""
        self.told["answers"] += 1
        if isinstance(reopen(*got).meta, Failure):
            lost = index == self.cursor and isinstance(self.tape.metas[index], Backward)
            self.check(lost, f"request {index} was refused: {got[0]!r}")
            self.told["graphs lost"] += 1
            self.replay = self.tape.forward_of(index)
        elif self.replay is not None:
            self.replay = None
        else:
            self.cursor += 1

    def request(self, fate: str) -> None:
        """The client sends its next request, or the last one again."""
        index = self.cursor if self.replay is None else self.replay
        if fate == "request lost":
            self.told["lost"] += 1
            return self.break_line()
        crash = fate.split()[1] if fate.startswith("crash") else ""
        try:
            got = self.deliver(index, self.connected(), crash)
        except Crash:
            return self.restart()
        if crash:  # there was nothing to commit
            return self.restart()
        if fate == "answer lost":
            self.told["lost"] += 1
            return self.break_line()
        if fate == "answered twice":
            again = self.deliver(index, self.connected())
            same = again == got or isinstance(reopen(*got).meta, Failure)
            self.check(same, f"request {index} was answered otherwise at once")
        self.receive(index, got)
        return None

    def duplicate(self, back: int, line: int) -> None:
        """A copy of a request that was sent before arrives, on any connection that is open; nobody hears the answer."""
        if self.sent:
            self.told["duplicates"] += 1
            lines = [*self.given_up, self.connected()]
            self.deliver(max(0, self.sent - 1 - back), lines[line % len(lines)])

    def idle(self, seconds: float) -> None:
        """All connections end; the server drops kept graphs after a while, then the run from its memory."""
        assert self.server is not None
        self.told["idle"] += 1
        self.break_line()
        while self.given_up:
            self.given_up.pop().disconnect()
        self.now += seconds
        self.server.expire()

    @rule(event=st.sampled_from(EVENTS), back=st.integers(0, 12), line=st.integers(0, GIVEN_UP))
    def happens(self, event: str, back: int, line: int) -> None:
        """One thing of those that happen."""
        match event:
            case "crash":
                self.restart()
            case "duplicate":
                self.duplicate(back, line)
            case "idle":
                self.idle(31.0 if back % 2 else 3601.0)
            case _ if self.cursor < len(self.tape.requests):
                self.request(event)

    @invariant()
    def holds_what_was_asked(self) -> None:
        """The server is where an undisturbed one is, bit for bit, and never goes back."""
        if self.server is None or (live := self.run) is None:
            return
        found, possible = Snapshot.of(live), self.possible()
        self.check(found in possible, f"the server holds step {found.step} in a state of no undisturbed run")
        first = self.sent + 1 - len(possible)
        self.floor = max(self.floor, first + possible.index(found))

    def teardown(self) -> None:
        try:
            if self.server is not None and not self.violated:
                self.finish()
        finally:
            self.stop()
            shutil.rmtree(self.folder)

    def finish(self) -> None:
        """What was begun is answered, and a last restart gives the state of the undisturbed run."""
        target = self.sent
        while self.cursor < target:
            self.request("answered")
        self.restart()
        answer = reopen(*ask(self.connected(), as_bytes(PULL, ("raw", "raw"))))
        expected = self.tape.states[self.cursor]
        assert isinstance(answer.meta, State)
        same = answer.meta.step == expected.step and digest(dict(answer.tensors)) == expected.state
        self.check(same, "at the end, adapter and moments are not those of the undisturbed run")
        self.told["runs ended bit for bit as the undisturbed"] += 1


def machine(stage: Stage, told: Counter[str]) -> Callable[[], Steps]:
    """Return the machine for a stage, as Hypothesis takes it."""
    return type("StepProtocol", (Steps,), {"stage": stage, "told": told})
