"""Micro-batches: parts of a batch under way at once give what they give one after another, whatever comes when."""

from __future__ import annotations

import random
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from conftest import PLANS, U_SHAPED, Parties, credentials
from fault_schedules import Schedule
from faults import FaultProxy
from noren.adapters.checkpoint import same_values
from noren.config import Document
from noren.errors import LinkError, ProtocolError
from noren.parties.client import Client
from noren.parties.server import SpanServer
from noren.partition.stage import Stage
from noren.training.loop import Trainer, Training
from noren.training.overlap import Baton, cut, side_by_side
from noren.types import Backward, Forward, Message
from noren.wire.grpc_server import GrpcServer
from test_crossing import ADAPTER, rows
from test_nemesis import Field, interrupted_run, place, zygote  # noqa: F401
from zygote import Zygote

PARTS, STEPS = 3, 4
ROUNDING = 2e-5
"""After so many steps of AdamW in fp32 at lr 1e-2, which move a weight by up to 4e-2: a mean is summed part by part,
which changes a gradient's last digits, and Adam divides it by a root of its own size, however small it is."""


def trainer(client: Client, micro_batches: int = PARTS, **more: Any) -> Trainer:
    fields = {"steps": STEPS, "batch_size": 6, "lr": 1e-2, "clip": 0.05} | more
    settings = Training(micro_batches=micro_batches, **fields)  # type: ignore[arg-type]
    return Trainer(client.model, rows(), [], settings, pad_id=0, seed=3, remote=client.remote())


def trained(client: Client, **more: Any) -> dict[str, Tensor]:
    """The adapters after some steps on the same rows in the same order."""
    loop = trainer(client, **more)
    for _ in range(STEPS):
        loop.step([rows()])
    return client.adapter_state()


def largest_difference(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    assert a.keys() == b.keys()
    return max(float((a[name] - b[name]).abs().max()) for name in a)


def part_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("noren-part")]


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory, llama_folder: Path) -> Iterator[dict[str, Tensor]]:
    """What an undisturbed run over a local link comes to."""
    with ExitStack() as stack:
        client = Parties("local", tmp_path_factory.mktemp("none"), stack).client(llama_folder, adapter=ADAPTER)
        yield trained(client)


@pytest.mark.parametrize("micro_batches", [2, PARTS, 50])
def test_equal_to_one_batch(micro_batches: int, parties: Parties, llama_folder: Path) -> None:
    """Of ragged rows, and with more parts than rows; a second run is the same bit for bit."""
    found = []
    for number, count in enumerate([1, micro_batches, micro_batches]):
        client = parties.client(llama_folder, adapter=ADAPTER, name=f"run{number}")
        outcome = trainer(client, count).run()
        found.append((client.adapter_state(), outcome.losses))
    assert largest_difference(found[0][0], found[1][0]) <= ROUNDING
    assert max(abs(a - b) for a, b in zip(found[0][1], found[1][1], strict=True)) <= 1e-5
    assert same_values(found[1][0], found[2][0]) and found[1][1] == found[2][1]


def test_the_same_over_any_link(parties: Parties, llama_folder: Path, expected: dict[str, Tensor]) -> None:
    client = parties.client(llama_folder, adapter=ADAPTER)
    assert same_values(trained(client), expected)
    assert not part_threads()


@pytest.mark.parametrize("stages", PLANS)
def test_equal_to_accumulated_batches(stages: int, parties: Parties, llama_folder: Path) -> None:
    """The same parts one after another, and side by side: bit for bit, in every kind of plan."""
    parts = [rows()[part] for part in cut([len(row["input_ids"]) for row in rows()], PARTS)]
    found = []
    for name, micro_batches, batch in (("after", 1, [*parts, *parts]), ("beside", PARTS, [rows(), rows()])):
        client = parties.client(llama_folder, plan=PLANS[stages], adapter=ADAPTER, name=name)
        loop = trainer(client, micro_batches)
        losses = [loop.step(batch)[:2] for _ in range(STEPS)]
        found.append((client.adapter_state(), losses))
    assert same_values(found[0][0], found[1][0]) and found[0][1] == found[1][1]


def test_what_rides_along(parties: Parties, llama_folder: Path) -> None:
    """Requests in their order, two for each part and no others; the step rides with the next one's first part."""
    client = parties.client(llama_folder, adapter=ADAPTER)
    loop = trainer(client)
    for _ in range(2):
        loop.step([rows()])
    training = [m.meta for m in parties.seen if isinstance(m.meta, Forward | Backward)]
    names = [(meta.__struct_config__.tag, meta.session) for meta in training]
    assert names == [(kind, f"{step}.{n}") for step in (1, 2) for kind in ("forward", "backward") for n in range(PARTS)]
    assert [meta.after for meta in training if isinstance(meta, Backward)] == ["", "1.0", "1.1", "", "2.0", "2.1"]
    first, *_ = [meta for meta in training if meta.session == "2.0"]
    assert isinstance(first, Forward) and first.update is not None and first.update.step == 1
    assert client.traffic.by_kind.total() == 1 + 4 * PARTS, "a hello, and nothing beside"
    assert loop.exposed >= 0


def test_dropout_is_drawn_in_one_order(local_parties: Parties, llama_folder: Path) -> None:
    found = []
    for name in ("first", "second"):
        client = local_parties.client(llama_folder, adapter=ADAPTER | {"dropout": 0.2}, name=name)
        torch.manual_seed(1)
        found.append(trained(client))
    assert same_values(*found)


@pytest.mark.parametrize("tokens", [[5], [7, 7, 7, 7], [20, 18, 16, 14, 12, 10], [1, 1, 1, 90, 1, 1], [90, 1, 1, 1, 1]])
@pytest.mark.parametrize("parts", [1, 2, 3, 4, 9])
def test_cut(tokens: list[int], parts: int) -> None:
    slices = cut(tokens, parts)
    assert [i for one in slices for i in range(len(tokens))[one]] == list(range(len(tokens)))
    assert len(slices) == min(parts, len(tokens)) and all(tokens[one] for one in slices)
    assert max(sum(tokens[one]) for one in slices) <= sum(tokens) / len(slices) + max(tokens)


class Tampered:
    """A server that does something before it answers its N-th training request, once."""

    def __init__(self, server: SpanServer, number: int, action: Callable[[], None]) -> None:
        self.server, self.left, self.action = server, number, action

    def connect(self, owner: Any) -> Any:
        tampered, inner = self, self.server.connect(owner)

        class Line:
            def __getattr__(self, name: str) -> Any:
                return getattr(inner, name)

            def __call__(self, message: Message) -> Message:
                if message.kind in ("forward", "backward"):
                    tampered.left -= 1
                    if tampered.left == -1:
                        tampered.action()
                return inner(message)

        return Line()


@pytest.fixture
def stage(llama_folder: Path) -> Stage:
    return Stage.load(llama_folder, U_SHAPED, "server", "causal-lm")


@pytest.fixture
def document(llama_folder: Path, keys: Path, tmp_path: Path) -> Callable[..., Document]:
    def made(address: str, **more: Any) -> Document:
        values = {"model": str(llama_folder), "plan": U_SHAPED, "adapter": ADAPTER, "keys": {"dir": str(keys)}}
        return Document.of(values | {"links": {"server": address}} | more, tmp_path)

    return made


@pytest.mark.parametrize("number", range(2 * PARTS, 4 * PARTS))
def test_a_server_that_lost_its_activations(
    number: int, stage: Stage, keys: Path, document: Callable[..., Document], expected: dict[str, Tensor]
) -> None:
    """Before any request of the second step: passes are made again, and gradients still add up in their order."""
    server = SpanServer(stage, lora=document("h:1").run.adapter)

    def lose() -> None:
        next(iter(server.runs.values())).trainer.forget_passes()  # type: ignore[union-attr]

    tampered = Tampered(server, number, lose)
    with GrpcServer("127.0.0.1:0", credentials(keys, "server"), tampered.connect) as listening:
        client = Client(document(f"127.0.0.1:{listening.port}"))
        assert same_values(trained(client), expected)
        assert client.span.replays == (min(PARTS, 4 * PARTS - number) if number > 2 * PARTS else 0)
        client.close()


@pytest.mark.parametrize("seed", range(3))
def test_a_line_that_breaks(
    seed: int, stage: Stage, keys: Path, document: Callable[..., Document], expected: dict[str, Tensor]
) -> None:
    """Resets at random bytes, black holes, slow and sliced lines: what has no answer is sent again, and counts once."""
    server, draw = SpanServer(stage, lora=document("h:1").run.adapter), random.Random(seed)
    wire = {"keepalive_seconds": 0.5, "patience_seconds": 30.0}
    with (
        GrpcServer("127.0.0.1:0", credentials(keys, "server"), server.connect) as listening,
        FaultProxy(f"127.0.0.1:{listening.port}", seed) as proxy,
    ):
        client = Client(document(proxy.address, wire=wire))
        loop = trainer(client)
        proxy.play(Schedule(seed, count=3, kinds=("slice", "black_hole", "delay"), within_bytes=200_000))
        for _ in range(STEPS):
            proxy.reset_after(draw.randint(1, 150_000), "both")
            loop.step([rows()])
        assert proxy.resets >= 2
        proxy.calm()
        assert same_values(client.adapter_state(), expected)
        [run] = server.runs.values()
        assert run.trainer.step == STEPS
        client.close()


def test_a_line_that_breaks_sends_the_same_bytes(
    stage: Stage, keys: Path, document: Callable[..., Document], monkeypatch: pytest.MonkeyPatch
) -> None:
    """All that has no answer goes again, in its order, from the same packed bytes."""
    server = SpanServer(stage, lora=document("h:1").run.adapter)
    proxies: list[FaultProxy] = []
    tampered = Tampered(server, PARTS, lambda: proxies[0].reset())  # B.0 is there, and no other answer comes
    with (
        GrpcServer("127.0.0.1:0", credentials(keys, "server"), tampered.connect) as listening,
        FaultProxy(f"127.0.0.1:{listening.port}", 0) as proxy,
    ):
        proxies.append(proxy)
        client = Client(document(proxy.address))
        sent: list[tuple[int, Any]] = []
        send = type(client.link._line).send  # type: ignore[union-attr]

        def watched(line: Any, request: Any) -> None:
            send(line, request)
            sent.append((id(line), request.packed))

        monkeypatch.setattr(type(client.link._line), "send", watched)  # type: ignore[union-attr]
        trainer(client).step([rows()])
        client.close()
    lines = list(dict.fromkeys(line for line, _ in sent))
    assert len(lines) == 2
    before, after = ([packed for at, packed in sent if at == line] for line in lines)
    again = [packed for packed in after if any(packed is one for one in before)]
    assert again and all(a is b for a, b in zip(again, before[-len(again) :], strict=True))
    assert after[1 : 1 + len(again)] == again, "behind the hello, and before what is new"


def fail(*args: Any) -> None:
    raise ProtocolError("no more")


@pytest.mark.parametrize("kind", ["forward", "backward"])
@pytest.mark.parametrize("session", ["2.0", "2.1", "2.2"])
@pytest.mark.parametrize("where", ["client", "server"])
def test_an_error_in_one_part(
    where: str, session: str, kind: str, parties: Parties, llama_folder: Path, expected: dict[str, Tensor]
) -> None:
    """It ends all parts and is raised as it is; a step that is then made anew is what it would have been."""
    client = parties.client(llama_folder, adapter=ADAPTER)
    loop, left = trainer(client), [1]
    loop.step([rows()])

    def failing(message: Message) -> None:
        if (message.kind, getattr(message.meta, "session", "")) == (kind, session) and left:
            left.pop()
            fail()

    if where == "client":
        release = client.span.release
        client.span.release = lambda message: (failing(message), release(message))[1]
    else:
        parties.seen = Watching(failing)  # type: ignore[assignment]
    with pytest.raises(ProtocolError, match="no more"):
        loop.step([rows()])
    assert not part_threads()
    client.span.release = client.releases
    while loop.schedule.last_epoch < STEPS:
        loop.step([rows()])
    assert same_values(client.adapter_state(), expected)


class Watching(list[Message]):
    """What a server has seen, which may be too much for it."""

    def __init__(self, failing: Callable[[Message], None]) -> None:
        super().__init__()
        self._failing = failing

    def append(self, message: Message) -> None:
        self._failing(message)


def test_ctrl_c_while_all_wait(stage: Stage, keys: Path, document: Callable[..., Document]) -> None:
    """The second Ctrl-C: nobody waits any longer, and the client can still say goodbye."""
    free = threading.Event()
    server = SpanServer(stage, lora=document("h:1").run.adapter)

    def stand_still() -> None:
        threading.Timer(0.2, lambda: signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)).start()
        free.wait(20)

    tampered = Tampered(server, 1, stand_still)
    with GrpcServer("127.0.0.1:0", credentials(keys, "server"), tampered.connect) as listening:
        client = Client(document(f"127.0.0.1:{listening.port}"))
        before = signal.signal(signal.SIGINT, signal.default_int_handler)  # whatever tests before this one have left
        try:
            with pytest.raises(KeyboardInterrupt):
                trainer(client).step([rows()])
        finally:
            signal.signal(signal.SIGINT, before)
        assert not part_threads()
        free.set()
        client.close()
        assert not server.runs


def test_a_server_that_is_gone(stage: Stage, keys: Path, document: Callable[..., Document]) -> None:
    server, listening = SpanServer(stage, lora=document("h:1").run.adapter), []
    tampered = Tampered(server, 1, lambda: listening[0]._server.stop(0))
    with GrpcServer("127.0.0.1:0", credentials(keys, "server"), tampered.connect) as at:
        listening.append(at)
        client = Client(document(f"127.0.0.1:{at.port}", wire={"patience_seconds": 0.3}))
        with pytest.raises(LinkError, match="no answer for"):
            trainer(client).step([rows()])
        assert not part_threads()
        client.close()


def test_a_baton_goes_round_in_order() -> None:
    """Whatever takes how long: the order of turns is fixed, and a repair keeps the turn."""
    for seed in range(5):
        draw, told, baton = random.Random(seed), list[str](), Baton(PARTS)

        def part(number: int, baton: Baton = baton, told: list[str] = told, draw: random.Random = draw) -> None:
            for turn in range(2):
                told.append(f"{number} computes {turn}")
                with baton.crossing():
                    with baton.waiting():
                        threading.Event().wait(draw.uniform(0, 0.01))
                    if number == 1:
                        with baton.waiting():
                            told.append("1 repairs")
            told.append(f"{number} ends")

        side_by_side(baton, [lambda n=n: part(n) for n in range(PARTS)], lambda: None)  # type: ignore[misc]
        turns = [f"{n} computes {turn}" for turn in range(2) for n in range(PARTS)] + [
            f"{n} ends" for n in range(PARTS)
        ]
        for at in (4, 8):
            turns.insert(at, "1 repairs")
        assert told == turns
        assert baton.exposed > 0


def test_resume_is_bit_identical(llama_folder: Path, tmp_path: Path) -> None:
    """Ended after a step; goes on from the journals, or from the checkpoint if the server lost its own."""
    hashes = {
        interrupted_run(llama_folder, tmp_path / str(case), 6, stop, lost, micro_batches=2)
        for case, (stop, lost) in enumerate([(0, False), (2, False), (5, True)])
    }
    assert len(hashes) == 1


@pytest.mark.timeout(600)
def test_processes_that_are_killed(zygote: Zygote, place: Path) -> None:  # noqa: F811
    """Client, edge and server, in the middle of steps: the same adapters, with dropout at every party."""
    steps, kills, draw = 14, 5, random.Random(5)
    fields = [
        Field(zygote, place / name, place / "keys", steps, micro_batches=2).write() for name in ("calm", "killed")
    ]
    fields[0].run()
    field = fields[1]
    for party in ("server", "edge", "client"):
        field.start(party)
    field.next_step()
    for _ in range(kills):
        threading.Event().wait(draw.uniform(0, 0.2))
        party = draw.choice(["client", "edge", "server"])
        if steps - (field.lines() or [0])[-1] < 2 or not field.children[party].alive:
            break
        field.children[party].kill()
        with suppress(TimeoutError):
            field.children[party].wait(timeout=10)
        field.start(party)
        field.next_step()
    field.finish()
    assert field.result() == fields[0].result()
