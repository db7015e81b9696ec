"""Each training request counts once, whatever is lost, repeated or crashes; and a ledger with less is found out."""

from __future__ import annotations

import copy
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import HealthCheck, Phase, Verbosity, seed, settings
from hypothesis.stateful import run_state_machine_as_test

from conftest import U_SHAPED, credentials, identity, local_line
from noren.adapters.checkpoint import same_values
from noren.adapters.lora import Lora
from noren.config import Document
from noren.errors import LinkError, Overloaded
from noren.parties.client import Client
from noren.parties.ledger import Ledger
from noren.parties.server import Limits, SpanServer
from noren.partition.stage import Stage
from noren.training.loop import Trainer, Training
from noren.types import Forward, Message, Step, Welcome
from noren.wire.grpc_server import GrpcServer
from noren.wire.journal import Journal
from step_machine import Violation, machine
from step_tape import OWNER, RUN, Snapshot, as_bytes, ask, build_stages, tape
from test_crossing import ADAPTER, rows


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Stage:
    return build_stages(tmp_path_factory.mktemp("steps"), ["client :1", "server 1:2", "client 2:"])["server"]


def explore(stage: Stage, number: int, runs: int, rules: int) -> Counter[str]:
    """Let Hypothesis move the machine; returns what was done. Raises what it finds."""
    told: Counter[str] = Counter()
    limits = settings(
        max_examples=runs, stateful_step_count=rules, deadline=None, database=None, verbosity=Verbosity.quiet,
        suppress_health_check=list(HealthCheck), phases=(Phase.generate,), report_multiple_bugs=False,
    )  # fmt: skip
    run_state_machine_as_test(seed(number)(machine(stage, told)), settings=limits)
    return told


@pytest.mark.parametrize(
    ("runs", "rules"),
    [(60, 25), pytest.param(3000, 40, marks=[pytest.mark.nightly, pytest.mark.timeout(3600)])],
    ids=["short", "nightly"],
)
def test_T2_step_protocol(stage: Stage, runs: int, rules: int) -> None:
    started = time.perf_counter()
    told = explore(stage, 2, runs, rules)
    print(f"T2: seed 2, {runs} runs x {rules} rules, {time.perf_counter() - started:.1f} s: {dict(told)}, 0 violations")
    assert told["runs ended bit for bit as the undisturbed"] == told["runs"] >= runs
    assert min(told[what] for what in ("crashes", "lost", "duplicates", "graphs lost", "idle")) > runs // 10


class NoAnswers(Ledger):
    """Naive: keeps state, but no answers."""

    def answer(self, request: Message) -> Message | None:
        return None

    def answered(self, session: str) -> bool:
        return False


class AnswersInMemory(Ledger):
    """Keeps the state on disk, the answers in memory only."""

    def __init__(self, journal: Any, run: str, most: int = 0) -> None:
        super().__init__(journal, run, most)
        self.other = Ledger(None, run)

    def answer(self, request: Message) -> Message | None:
        return self.other.answer(request)

    def answered(self, session: str) -> bool:
        return self.other.answered(session)

    def keep(self, request: Message | None = None, answer: Message | None = None, **state: Any) -> None:
        super().keep(**state)
        self.other.keep(request, answer, step=state.get("step"))


class StateThenAnswer(Ledger):
    """Two records: the state in one transaction, the answer in the next."""

    def keep(self, request: Message | None = None, answer: Message | None = None, **state: Any) -> None:
        super().keep(**state)
        if request is not None:
            super().keep(request, answer)


class AnswerThenState(Ledger):
    """Two records the other way round."""

    def keep(self, request: Message | None = None, answer: Message | None = None, **state: Any) -> None:
        if request is not None:
            super().keep(request, answer)
        super().keep(**state)


MUTANTS = {
    "naive": NoAnswers,
    "ram": AnswersInMemory,
    "two-records": StateThenAnswer,
    "two-records-reversed": AnswerThenState,
}


@pytest.mark.parametrize("name", MUTANTS)
def test_T2_mutants_are_caught(name: str, stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("noren.parties.table.Ledger", MUTANTS[name])
    started = time.process_time()
    with pytest.raises(Violation) as caught:
        explore(stage, 3, 200, 25)
    seconds = time.process_time() - started  # of this process, whatever else the machine does
    print(f"T2: {name}: seed 3, found in {seconds:.2f} s: {caught.value}")
    assert seconds < 5


def test_T2_another_request_under_the_same_name_is_refused(stage: Stage, tmp_path: Path) -> None:
    recorded = tape(stage, 0)
    with Journal(tmp_path / "journal") as journal:
        server = SpanServer(copy.deepcopy(stage), lora=recorded.lora, journal=journal)
        connection = server.connect(identity(OWNER))
        connection(Message(recorded.hello))
        answers = [ask(connection, request) for request in recorded.requests[:2]]
        before = Snapshot.of(server.runs[OWNER, RUN])
        for header, body in recorded.requests[:2]:
            other = bytearray(body)
            other[0] ^= 1
            refused = ask(connection, (header, bytes(other)))[0]
            assert b"was answered already, and this is another one" in refused
            assert Snapshot.of(server.runs[OWNER, RUN]) == before
        assert [ask(connection, request) for request in recorded.requests[:2]] == answers == recorded.answers[:2]
        server.close()


def test_T2_everything_again_much_later(stage: Stage) -> None:
    """After a whole run: a step is acknowledged as before, what trained is over; nothing changes."""
    recorded = tape(stage, 0)
    server = SpanServer(copy.deepcopy(stage), lora=recorded.lora)
    connection = server.connect(identity(OWNER))
    connection(Message(recorded.hello))
    assert [ask(connection, request) for request in recorded.requests] == recorded.answers
    before, told = Snapshot.of(server.runs[OWNER, RUN]), Counter[str]()
    for index, meta in enumerate(recorded.metas):
        answer = ask(connection, recorded.requests[index])
        if isinstance(meta, Step):
            assert answer == recorded.answers[index]
        elif recorded.trains(index) and recorded.step_of(index) <= before.step:
            assert b"that step is over" in answer[0]
        assert Snapshot.of(server.runs[OWNER, RUN]) == before
        told[type(meta).__name__] += 1
    server.close()
    print(f"T2: all {told.total()} requests of a run again at its end: 0 changes; {dict(told)}")
    assert told["Step"] > 1


def test_T2_a_step_is_kept_although_the_next_party_failed(tmp_path: Path) -> None:
    """An edge has stepped, the party after it does not answer, the request is repeated; then the edge crashes."""
    stages = build_stages(tmp_path / "model", ["client :1", "edge 1:2", "server 2:3", "client 3:"])
    recorded = tape(stages["server"], 0)
    server = SpanServer(stages["server"], lora=recorded.lora)
    down: list[str] = []

    def following(greet: Any, greeted: Any, expect: Any) -> Any:
        link = local_line(server.connect)(greet, greeted, expect)

        def forward(message: Message) -> Message:
            if message.kind in down:
                raise LinkError("the next party does not answer")
            return link(message)

        return forward

    def edge() -> tuple[SpanServer, Journal]:
        journal = Journal(tmp_path / "journal")
        stage = copy.deepcopy(stages["edge"])
        return SpanServer(stage, lora=recorded.lora, following=following, journal=journal), journal

    party, journal = edge()
    connection = party.connect(identity(OWNER))
    hello = Message(recorded.hello)
    welcome = connection(hello).meta
    assert isinstance(welcome, Welcome)
    first = next(i for i, m in enumerate(recorded.metas) if isinstance(m, Forward) and m.train and m.update)
    for request in recorded.requests[:first]:
        assert b"failure" not in ask(connection, request)[0]
    down.append("forward")
    assert b"cannot be reached" in ask(connection, recorded.requests[first])[0]
    down.clear()
    answer = ask(connection, recorded.requests[first])
    before = Snapshot.of(party.runs[OWNER, RUN])
    assert before.step == recorded.states[first + 1].step and b"hidden" in answer[0]
    party.close()
    journal.close()
    party, journal = edge()
    connection = party.connect(identity(OWNER))
    again = msgspec.structs.replace(recorded.hello, resume=welcome.incarnation)
    ask(connection, as_bytes(Message(again), ("raw", "raw")))
    assert Snapshot.of(party.runs[OWNER, RUN]) == before
    assert ask(connection, recorded.requests[first]) == answer
    party.close()
    journal.close()
    server.close()


REFUSED = {("forward", "1.1"), ("backward", "2.0"), ("forward", "3.0")}
LATE = {("backward", "1.0"), ("forward", "2.1")}


class Busy:
    """A server that has too much to do when it gets these messages, before (or `late`) after it has answered them."""

    def __init__(self, server: SpanServer, refused: set[tuple[str, str]], late: set[tuple[str, str]]) -> None:
        self.server, self.refused, self.late = server, set(refused), set(late)
        self.came: dict[tuple[str, str], list[float]] = {}

    def connect(self, owner: Any) -> Any:
        busy, inner = self, self.server.connect(owner)

        class Line:
            def __getattr__(self, name: str) -> Any:
                return getattr(inner, name)

            def __call__(self, message: Message) -> Message:
                name = (message.kind, getattr(message.meta, "session", ""))
                busy.came.setdefault(name, []).append(time.monotonic())
                with busy.others() if name in busy.refused else nullcontext():
                    busy.refused.discard(name)
                    answer = inner(message)
                if name in busy.late:
                    busy.late.remove(name)
                    raise Overloaded("the answer was lost on the way to you", 0.3)
                return answer

        return Line()

    @contextmanager
    def others(self) -> Iterator[None]:
        """Somebody else's request is being computed, and no more may wait."""
        free = threading.Event()
        other = threading.Thread(target=self.server.compute, args=(lambda: free.wait(20), "others"))
        other.start()
        while not self.server.waiting:
            time.sleep(0.001)
        try:
            yield
        finally:
            free.set()
            other.join()


def test_T2_overload_in_the_middle_of_a_step(llama_folder: Path, keys: Path, tmp_path: Path) -> None:
    """The client comes back when it was told to, and no step counts twice: the adapter is the undisturbed one."""

    def trained(name: str, refused: set[tuple[str, str]], late: set[tuple[str, str]]) -> tuple[Busy, Any, int]:
        made = {"model": str(llama_folder), "plan": U_SHAPED, "adapter": ADAPTER, "keys": {"dir": str(keys)}}
        stage, lora = Stage.load(llama_folder, U_SHAPED, "server", "causal-lm"), msgspec.convert(ADAPTER, Lora)
        with Journal(tmp_path / name) as journal:
            server = SpanServer(stage, lora=lora, journal=journal, limits=Limits(waiting=1))
            busy = Busy(server, refused, late)
            with GrpcServer("127.0.0.1:0", credentials(keys, "server"), busy.connect) as listening:
                links = {"server": f"127.0.0.1:{listening.port}"}
                client = Client(Document.of(made | {"links": links}, tmp_path))
                settings = Training(steps=3, batch_size=3, accumulate=2, lr=1e-2)
                Trainer(client.model, rows(6), [], settings, pad_id=0, seed=3, remote=client.remote()).run()
                [run] = server.runs.values()
                state, step = client.adapter_state(), run.trainer.step
                client.close()
            server.close()
        return busy, state, step

    quiet, expected, steps = trained("quiet", set(), set())
    busy, found, step = trained("busy", REFUSED, LATE)
    assert step == steps == 3 and same_values(found, expected)
    assert {name: len(times) - len(quiet.came[name]) for name, times in busy.came.items()} == {
        name: int(name in REFUSED | LATE) for name in quiet.came
    }
    waits = {name: busy.came[name][1] - busy.came[name][0] for name in REFUSED | LATE}
    assert all(waits[name] >= (1.0 if name in REFUSED else 0.3) for name in waits), waits
    waited = sum(waits.values())
    print(f"T2: {len(REFUSED)} refusals and {len(LATE)} lost answers, {waited:.1f} s of waiting, {step} steps")
