"""A party's runs: what one owner's may take on the disk, and how they are opened."""

from __future__ import annotations

import copy
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import msgspec
import pytest

from conftest import identity
from noren.errors import OverBudget, SessionLost
from noren.parties.connection import Connection
from noren.parties.ledger import Ledger, Saved
from noren.parties.server import Limits, SpanServer
from noren.partition.stage import Stage
from noren.types import Message, Welcome
from noren.wire.envelope import reopen
from noren.wire.journal import Journal
from step_tape import Snapshot, Tape, build_stages, tape


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Stage:
    return build_stages(tmp_path_factory.mktemp("runs"), ["client :1", "server 1:2", "client 2:"])["server"]


def enter(server: SpanServer, owner: str, name: str, recorded: Tape) -> Connection:
    """A connection that has opened a run."""
    connection = server.connect(identity(owner))
    connection(Message(msgspec.structs.replace(recorded.hello, run=name)))
    return connection


def train(connection: Connection, recorded: Tape, first: int = 0, last: int = 12) -> None:
    """Ask what was recorded. Raises PeerError."""
    for request in recorded.requests[first:last]:
        connection(reopen(*request))


def test_an_owner_has_a_quota_of_the_journal(stage: Stage, tmp_path: Path) -> None:
    """All runs of an owner count together, and no other's do; what has been kept stays."""
    recorded = tape(stage, 0)
    with Journal(tmp_path / "measured") as journal:
        server = SpanServer(copy.deepcopy(stage), lora=recorded.lora, journal=journal)
        train(enter(server, "alpha", "one", recorded), recorded)
        size = journal.used_by("alpha/")
        server.close()
    most = 3 * size  # a step is written before what it replaces is dropped
    with Journal(tmp_path / "journal") as journal:
        limits = Limits(journal_bytes_each=most)
        server = SpanServer(copy.deepcopy(stage), lora=recorded.lora, journal=journal, limits=limits)
        train(enter(server, "alpha", "one", recorded), recorded)
        with pytest.raises(OverBudget, match=f"for 'alpha', and the limit for one owner is {most}"):
            for name in ("two", "three", "four"):
                train(enter(server, "alpha", name, recorded), recorded)
        left = [run for owner, run in server.runs if owner == "alpha"]
        assert "one" in left and journal.used_by("alpha/") == len(left) * size <= most, "what was too much is gone"
        for owner in ("beta", "alpha-2"):
            train(enter(server, owner, "one", recorded), recorded)
            assert journal.used_by(f"{owner}/") == size
        assert server.runs["alpha", "one"].trainer.step == server.runs["beta", "one"].trainer.step > 0
        server.close()


@pytest.fixture
def recorded(stage: Stage) -> Tape:
    return tape(stage, 0)


@pytest.fixture
def served(stage: Stage, recorded: Tape, tmp_path: Path) -> Iterator[SpanServer]:
    with Journal(tmp_path / "journal") as journal:
        limits = Limits(runs=2)
        server = SpanServer(copy.deepcopy(stage), lora=recorded.lora, journal=journal, limits=limits)
        yield server
        server.close()


def instead(monkeypatch: pytest.MonkeyPatch, name: str, act: Callable[[Ledger], None]) -> None:
    """Do something before each call of a ledger's method."""
    method: Any = getattr(Ledger, name)

    def call(self: Ledger, *arguments: Any, **named: Any) -> Any:
        act(self)
        return method(self, *arguments, **named)

    monkeypatch.setattr(Ledger, name, call)


def test_a_run_that_is_slow_to_open_keeps_nobody_waiting(
    served: SpanServer, recorded: Tape, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While its journal is read, others come, train, go and are counted."""
    reading, read = threading.Event(), threading.Event()

    def slow(ledger: Ledger) -> None:
        if ledger._run == "alpha/slow":
            reading.set()
            assert read.wait(30)

    instead(monkeypatch, "saved", slow)
    with ThreadPoolExecutor(2) as pool:
        try:
            opening = pool.submit(enter, served, "alpha", "slow", recorded)
            assert reading.wait(10)

            def others() -> None:
                for owner, name in (("alpha", "quick"), ("beta", "slow")):
                    connection = enter(served, owner, name, recorded)
                    train(connection, recorded)
                    connection.disconnect()
                served.expire()

            pool.submit(others).result(10)
            assert served.condition().runs == 2 and not opening.done()
        finally:
            read.set()
        assert opening.result(10).in_run and served.condition().runs == 3


def test_the_limit_of_runs_holds_in_a_race(served: SpanServer, recorded: Tape, monkeypatch: pytest.MonkeyPatch) -> None:
    instead(monkeypatch, "saved", lambda ledger: time.sleep(0.1))
    start = threading.Barrier(8)

    def one(name: str) -> bool:
        start.wait(10)
        try:
            return enter(served, "alpha", name, recorded).in_run
        except OverBudget:
            return False

    with ThreadPoolExecutor(8) as pool:
        inside = list(pool.map(one, [f"run{i}" for i in range(8)]))
    assert sum(inside) == len(served.runs) == 2
    served.close_run("alpha", next(iter(served.runs))[1], forget=True)
    assert enter(served, "alpha", "afterwards", recorded).in_run, "no place is lost"


def test_a_run_is_brought_back_once(served: SpanServer, recorded: Tape, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many connections ask for it at once."""
    first = served.connect(identity("alpha"))
    welcome = first(Message(recorded.hello)).meta
    assert isinstance(welcome, Welcome)
    train(first, recorded)
    served.close_run("alpha", recorded.hello.run, forget=False)
    again = msgspec.structs.replace(recorded.hello, resume=welcome.incarnation)
    made: list[Ledger] = []
    instead(monkeypatch, "saved", lambda ledger: (made.append(ledger), time.sleep(0.1), None)[-1])
    start = threading.Barrier(4)

    def one(connection: Connection) -> Any:
        start.wait(10)
        return connection(Message(again)).meta

    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(one, [served.connect(identity("alpha")) for _ in range(4)]))
    [run] = served.runs.values()
    assert len(made) == 1 and run.connections == 4
    assert all(answer.incarnation == welcome.incarnation and answer.step == run.trainer.step for answer in answers)


def test_a_hello_that_was_overtaken_begins_nothing(served: SpanServer, recorded: Tape) -> None:
    """The client's next connection has opened the run meanwhile; only a later one may begin it anew."""
    early, late = (served.connect(identity("alpha")) for _ in range(2))
    late(Message(recorded.hello))
    train(late, recorded)
    [run] = served.runs.values()
    before = Snapshot.of(run)
    with pytest.raises(SessionLost, match="begun anew by a later connection"):
        early(Message(recorded.hello))
    assert [*served.runs.values()] == [run] and Snapshot.of(run) == before and not early.in_run
    train(late, recorded, 12, 24)
    again = served.connect(identity("alpha"))
    again(Message(recorded.hello))
    assert run.closed and [*served.runs.values()] != [run]


def test_a_request_under_way_writes_nothing_into_the_run_after_its_own(
    served: SpanServer, recorded: Tape, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was computed, and its client began anew before the answer was kept."""
    first = served.connect(identity("alpha"))
    first(Message(recorded.hello))
    computed, begun = threading.Event(), threading.Event()

    def slow(ledger: Ledger) -> None:
        if not computed.is_set():
            computed.set()
            assert begun.wait(30)

    instead(monkeypatch, "keep", slow)
    with ThreadPoolExecutor(1) as pool:
        under_way = pool.submit(train, first, recorded, 0, 1)
        assert computed.wait(10)
        second = served.connect(identity("alpha"))
        second(Message(recorded.hello))
        [run] = served.runs.values()
        begun.set()
        with pytest.raises(SessionLost, match="closed by another connection"):
            under_way.result(10)
    assert [*served.runs.values()] == [run] and not run.closed
    saved = run.ledger.saved()
    assert isinstance(saved, Saved) and saved.begun == run.begun
    assert run.ledger._keys() == ["run"], "nothing but how it began"
    train(second, recorded)


def test_connections_are_counted_right(stage: Stage) -> None:
    """From many threads, where another comes between reading the count and writing it."""

    class Slow(SpanServer):
        @property
        def connections(self) -> int:
            found = self._open
            time.sleep(0.001)
            return found

        @connections.setter
        def connections(self, value: int) -> None:
            self._open = value

    server = Slow(copy.deepcopy(stage))

    def come_and_go(name: str) -> Connection:
        server.connect(identity(name)).disconnect()
        return server.connect(identity(name))

    with ThreadPoolExecutor(8) as pool:
        left = list(pool.map(come_and_go, ["alpha"] * 40))
    assert server.connections == 40
    for connection in left:
        connection.disconnect()
        connection.disconnect()
    assert server.connections == 0
    server.close()
