"""Training while processes are killed and stopped, and while lines break: the same adapters, bit for bit."""

from __future__ import annotations

import hashlib
import json
import random
import statistics
import time
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save

from conftest import U_SHAPED, credentials, identity
from fault_schedules import Schedule
from faults import FaultProxy
from namespaces import Namespaces
from noren.config import Document
from noren.embedded import MODEL_DIR
from noren.embedded.notes import notes
from noren.errors import LinkError
from noren.parties.client import Client
from noren.parties.remote_state import incarnation_of
from noren.parties.server import SpanServer
from noren.partition.stage import Stage
from noren.training.journal import StepJournal
from noren.training.loop import Progress, Trainer, Training
from noren.types import Message, Status
from noren.wire.grpc_link import GrpcLink
from noren.wire.grpc_server import GrpcServer
from noren.wire.identity import ensure
from noren.wire.journal import Journal
from noren.wire.settings import Wire
from test_kill import free_port
from test_training import rows
from zygote import Child, Zygote

PLAN = ["client :2", "edge 2:4", "server 4:-2", "client -2:"]
KEEPALIVE = 1.0


class Field:
    """Client, edge and server of one training run, as processes that can be killed and started again."""

    def __init__(self, zygote: Zygote, folder: Path, keys: Path, steps: int, **training: Any) -> None:
        self.zygote, self.folder, self.steps, self.training = zygote, folder, steps, training
        folder.mkdir(parents=True)
        lines = [json.dumps({"text": note.text}) for note in notes("clinic", 24, seed=3)]
        (folder / "notes.jsonl").write_text("\n".join(lines) + "\n")
        self.ports = {"edge": free_port(), "server": free_port()}
        self.addresses = {party: f"127.0.0.1:{port}" for party, port in self.ports.items()}
        self.children: dict[str, Child] = {}
        self.keys = keys
        self.netns: dict[str, str] = {}

    def write(self, links: dict[str, str] | None = None) -> Field:
        """Write the run documents: the client's and the edge's may name other addresses (of proxies)."""
        values = {
            "model": str(MODEL_DIR), "name": "nemesis", "plan": PLAN, "out": "out", "keys": {"dir": str(self.keys)},
            "links": links or self.addresses, "adapter": {"r": 4, "dropout": 0.1}, "seed": 5,
            "data": {"path": "notes.jsonl", "holdout": 0.1, "max_length": 24},
            "training": {"steps": self.steps, "batch_size": 2, "lr": 3e-3, "save_every": 25} | self.training,
            "wire": {"keepalive_seconds": KEEPALIVE, "patience_seconds": 60.0},
        }  # fmt: skip
        (self.folder / "run.toml").write_text(Document.of(values, self.folder).to_toml())
        return self

    def start(self, party: str) -> None:
        """Start a party (again)."""
        if party == "client":
            words = ["train", "run.toml", "--json"]
            if (self.folder / "out" / "journal").is_dir() and self.lines():
                words.append("--resume")
        else:
            words = ["serve", "run.toml", "--party", party, "--listen", self.addresses[party], "--json"]
        self.children[party] = self.zygote.start(
            words, cwd=self.folder, stdout=self.folder / f"{party}.out", netns=self.netns.get(party),
            env={"NOREN_CACHE": str(self.folder / "cache")},
        )  # fmt: skip
        if party != "client":
            assert json.loads(self.children[party].first_line())["ready"]

    def lines(self) -> list[int]:
        """Steps that the client has told of, in the order of telling."""
        path = self.folder / "client.out"
        if not path.is_file():
            return []
        whole = path.read_text().rpartition("\n")[0].splitlines()
        return [json.loads(line)["step"] for line in whole if '"loss"' in line]

    def run(self) -> None:
        """Train undisturbed."""
        for party in ("server", "edge", "client"):
            self.start(party)
        self.finish()

    def finish(self) -> None:
        """Wait for the client's end, and end the others."""
        code = self.children["client"].wait(timeout=240)
        assert code == 0, (self.folder / "client.out.err").read_text()[-3000:]
        for party in ("edge", "server"):
            self.children[party].terminate()
            assert self.children[party].wait(timeout=20) == 0

    def next_step(self, seconds: float = 60.0) -> float:
        """Wait until the client tells of one more step, or is done; returns the seconds that took."""
        before, started = len(self.lines()), time.monotonic()
        while len(self.lines()) == before and self.children["client"].alive:
            assert time.monotonic() - started < seconds, "no step: a deadlock?"
            time.sleep(0.01)
        if not self.children["client"].alive:
            code = self.children["client"].wait(timeout=1)
            assert code in (0, -9), (self.folder / "client.out.err").read_text()[-3000:]
        return time.monotonic() - started

    def result(self) -> tuple[str, list[float]]:
        """SHA-256 of the final adapters of all parties, and the loss of every step."""
        weights = (self.folder / "out" / "adapter" / "adapter_model.safetensors").read_bytes()
        losses = load_file(self.folder / "out" / "checkpoint" / "state.safetensors")["losses"].tolist()
        assert len(losses) == self.steps
        steps = [json.loads(line) for line in (self.folder / "out" / "metrics.jsonl").read_text().splitlines()]
        assert [line["step"] for line in steps if "loss" in line] == list(range(1, self.steps + 1))
        return hashlib.sha256(weights).hexdigest(), losses


@pytest.fixture(scope="module")
def zygote() -> Iterator[Zygote]:
    with Zygote() as running:
        yield running


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("nemesis")
    for name, role in (("client", "client"), ("edge", "edge"), ("server", "server")):
        ensure(folder / "keys", name, role)  # type: ignore[arg-type]
    return folder


UNDISTURBED: dict[int, tuple[str, list[float]]] = {}


def undisturbed(zygote: Zygote, place: Path, steps: int) -> tuple[str, list[float]]:
    """The result of a run of so many steps without any fault."""
    if steps not in UNDISTURBED:
        field = Field(zygote, place / f"calm{steps}", place / "keys", steps).write()
        field.run()
        UNDISTURBED[steps] = field.result()
    return UNDISTURBED[steps]


@pytest.mark.parametrize(
    ("steps", "kills"),
    [pytest.param(40, 12, id="short"), pytest.param(500, 200, id="long", marks=[pytest.mark.nightly])],
)
@pytest.mark.timeout(3600)
def test_T1_kills(steps: int, kills: int, zygote: Zygote, place: Path) -> None:
    """SIGKILL and SIGSTOP of client, edge and server at random moments, inside commits too."""
    seed, expected = 20261, undisturbed(zygote, place, steps)
    draw, field = random.Random(seed), Field(zygote, place / f"kills{kills}", place / "keys", steps).write()
    for party in ("server", "edge", "client"):
        field.start(party)
    recoveries, done = [], {"kill": 0, "stop": 0}
    field.next_step()
    while sum(done.values()) < kills and field.children["client"].alive:
        left = steps - (field.lines() or [0])[-1]
        if left < 2:
            break
        time.sleep(draw.uniform(0.0, min(0.4, 0.02 * left)))
        party = draw.choice(["client", "edge", "server"])
        if not field.children[party].alive:
            break
        if draw.random() < 0.75:
            field.children[party].kill()
            field.children[party].wait(timeout=10)
            done["kill"] += 1
            started = time.monotonic()
            field.start(party)
        else:
            field.children[party].stop()
            time.sleep(draw.uniform(0.05, 2.5 * KEEPALIVE))
            field.children[party].cont()
            done["stop"] += 1
            started = time.monotonic()
        field.next_step()
        recoveries.append(time.monotonic() - started)
    field.finish()
    assert field.result() == expected
    p95 = statistics.quantiles(recoveries, n=20)[18]
    print(
        f"T1 seed {seed}: {steps} steps, {done}, recovery median {statistics.median(recoveries):.2f} s, p95 {p95:.2f} s"
    )
    assert sum(done.values()) >= kills // 2


@pytest.mark.parametrize(
    "seeds", [pytest.param(range(3), id="short"), pytest.param(range(100), id="long", marks=[pytest.mark.nightly])]
)
@pytest.mark.timeout(3600)
def test_T18_network(seeds: range, zygote: Zygote, place: Path) -> None:
    """Partitions, resets, 1-byte slices, delays, slow and half-open lines, by seeded schedules: the same adapters."""
    steps = 10
    expected = undisturbed(zygote, place, steps)
    for seed in seeds:
        field = Field(zygote, place / f"network{len(seeds)}-{seed}", place / "keys", steps)
        with ExitStack() as stack:
            proxies = {p: stack.enter_context(FaultProxy(field.addresses[p], seed)) for p in ("edge", "server")}
            field.write({party: proxy.address for party, proxy in proxies.items()})
            for party in ("server", "edge", "client"):
                field.start(party)
            schedules = []
            for number, proxy in enumerate(proxies.values()):
                schedule = Schedule(2 * seed + number, count=4, within_bytes=400_000, within_seconds=3.0, longest=2.5)
                proxy.play(schedule)
                schedules.append(str(schedule))
            field.finish()
            assert field.result() == expected, schedules
            print(f"T18 seed {seed}: {[len(p.applied) for p in proxies.values()]} faults, "
                  f"{[p.connections for p in proxies.values()]} connections")  # fmt: skip


@pytest.mark.parametrize("fault", ["black hole", "half open"])
def test_T18_a_dead_line_is_seen_within_two_keepalives(
    fault: str, keys: Path, llama_folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Nothing is closed and nothing answers: the link must notice by its own questions."""
    stage = Stage.load(llama_folder, U_SHAPED, "server", "causal-lm")
    wire = Wire(keepalive_seconds=KEEPALIVE, patience_seconds=0.05)
    with (
        GrpcServer("127.0.0.1:0", credentials(keys, "server"), SpanServer(stage).connect, keepalive=KEEPALIVE) as at,
        FaultProxy(f"127.0.0.1:{at.port}", 0) as proxy,
    ):
        link = GrpcLink(proxy.address, credentials(keys, "client"), wire=wire)
        link(Message(Status()))
        if fault == "black hole":
            proxy.black_hole = "both"
        else:
            proxy.half_open()
        started = time.time()
        with suppress(LinkError):  # after a half-open line, a new one works
            link(Message(Status()))
        [seen] = [record.created for record in caplog.records if "broke" in record.message]
        seconds = seen - started
        proxy.calm()
        print(f"T18 {fault}: seen after {seconds:.2f} s, keepalive {KEEPALIVE} s")
        assert seconds <= 2 * KEEPALIVE + 0.5, seconds  # half a second for threads to be scheduled on a busy machine
        link.close()


def test_T18_namespaces_with_a_slow_line(zygote: Zygote, place: Path, tmp_path: Path) -> None:
    """Client and edge on one host, the server on another behind 8 Mbit/s; the line is cut for a while."""
    steps = 10
    expected = undisturbed(zygote, place, steps)
    with Namespaces(rate="8mbit") as net:
        left, right = net.left.address, net.right.address
        for name, role, hosts in (("client", "client", []), ("edge", "edge", [left]), ("server", "server", [right])):
            ensure(tmp_path / "keys", name, role, hosts)  # type: ignore[arg-type]
        field = Field(zygote, tmp_path / "run", tmp_path / "keys", steps)
        field.addresses = {"edge": f"{left}:7431", "server": f"{right}:7432"}
        field.netns = {"client": net.left.name, "edge": net.left.name, "server": net.right.name}
        field.write()
        for party in ("server", "edge", "client"):
            field.start(party)
        field.next_step()
        net.partition()
        time.sleep(3 * KEEPALIVE)
        net.heal()
        field.finish()
        assert field.result() == expected
        print(f"T18 namespaces: {left} to {right} at 8 Mbit/s, cut for {3 * KEEPALIVE} s: same adapters")


class Killed(Exception):
    """Stands for the end of a process: nothing of what would have come after it is done."""


def test_T20_resume_is_bit_identical(llama_folder: Path, tmp_path: Path) -> None:
    """Ended after 20 random steps; goes on from the journals, or from the checkpoint if the server lost its own."""
    seed, steps = 20, 12
    draw, hashes, lost_count = random.Random(seed), set(), 0
    for case in range(21):
        stop = draw.randrange(2, steps) if case else 0
        lost = stop > 4 and draw.random() < 0.5
        lost_count += lost
        hashes.add(interrupted_run(llama_folder, tmp_path / str(case), steps, stop, lost))
    print(f"T20 seed {seed}: 20 interruptions, {lost_count} with the server's journal lost, {len(hashes)} hash")
    assert len(hashes) == 1 and 3 < lost_count < 17


def interrupted_run(model: Path, folder: Path, steps: int, stop: int, lost: bool, micro_batches: int = 1) -> str:
    values = {"model": str(model), "name": "t20", "plan": U_SHAPED, "adapter": {"r": 4, "dropout": 0.1}, "seed": 3}
    document = Document.of(values, folder)
    settings = Training(
        steps=steps, batch_size=2, accumulate=2, micro_batches=micro_batches, schedule="cosine", save_every=3, lr=1e-2
    )
    with Journal(folder / "server") as far, Journal(folder / "client") as near:

        def attempt(report: Any, resume: bool) -> str:
            stage = Stage.load(model, U_SHAPED, "server", "causal-lm")
            server = SpanServer(stage, lora=document.run.adapter, journal=far)
            kept = StepJournal(near, "t20")
            found = kept.read()
            token = incarnation_of(found.position) if found else ""
            client = Client(document, server.connect(identity("client")), journal=near, resume=token)
            torch.manual_seed(4)
            trainer = Trainer(
                client.model, rows(), [], settings, pad_id=0, seed=3, remote=client.remote(),
                checkpoint=folder / "checkpoint", journal=kept, report=report,
            )  # fmt: skip
            if resume:
                assert trainer.resume() == ((stop - 1) // 3 * 3 if lost else stop - 1)
            assert trainer.run().step == steps
            state = client.adapter_state()
            return hashlib.sha256(save({name: state[name] for name in sorted(state)})).hexdigest()

        def kill(progress: Progress) -> None:
            if progress.step == stop:
                raise Killed

        if not stop:
            return attempt(None, False)
        with pytest.raises(Killed):
            attempt(kill, False)
        if lost:
            far.forget("client/t20")
        return attempt(None, True)


@pytest.mark.parametrize(
    "orders", [pytest.param(10, id="short"), pytest.param(200, id="long", marks=[pytest.mark.nightly])]
)
def test_T20_order_of_clients(orders: int, llama_folder: Path) -> None:
    """Three clients of one server, their steps in another order each time: each ends with the same adapter."""
    draw, hashes = random.Random(7), set()
    stage = Stage.load(llama_folder, U_SHAPED, "server", "causal-lm")
    for order in range(orders):
        values = {"model": str(llama_folder), "plan": U_SHAPED, "adapter": {"r": 4}, "name": f"order{order}"}
        document = Document.of(values, Path.cwd())
        server = SpanServer(stage, lora=document.run.adapter)
        trainers = []
        for name in ("a", "b", "c"):
            client = Client(document, server.connect(identity(name)))
            settings = Training(steps=3, batch_size=3, lr=1e-2)
            trainers.append(
                (client, Trainer(client.model, rows()[:4], [], settings, pad_id=0, seed=3, remote=client.remote()))
            )
        turns = [number for number in range(3) for _ in range(3)]
        draw.shuffle(turns)
        for turn in turns:
            trainers[turn][1].step([rows()[turn : turn + 3]])
        found = []
        for client, _ in trainers:
            client.span.flush()
            state = client.adapter_state()
            found.append(hashlib.sha256(save({name: state[name] for name in sorted(state)})).hexdigest())
            client.close()
        server.close()
        hashes.add(tuple(found))
    print(f"T20 order: {orders} orders of 9 steps, {len(hashes)} result")
    assert len(hashes) == 1 and len(set(next(iter(hashes)))) == 3
