"""One client that takes all it can, and an honest one beside it: bombs, floods, and lines that are held open."""

from __future__ import annotations

import json
import os
import select
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import grpc
import msgspec
import psutil
import pytest
import torch
import zstandard

from abuse_worker import LINES
from conftest import U_SHAPED, credentials
from noren.config import Document
from noren.errors import Overloaded
from noren.parties.client import Client
from noren.parties.server import Limits, SpanServer
from noren.partition.stage import Stage
from noren.types import PROTOCOL, Condition, Forward, Hello, Message, Status
from noren.wire.envelope import Entry, Header, Packed
from noren.wire.grpc_link import KEY_HEADER, METHOD
from noren.wire.grpc_server import GrpcServer
from noren.wire.seal import new_key
from test_doors import Caller
from tls import raw_client
from zygote import Child, Zygote

TOKENS = 16
"""At most so many in one message: as an operator would say who wants short waits for all."""
DOORS = {"stall_seconds": 2.0, "hello_seconds": 2.0, "message_bytes": 8 << 20}
SERVE = {"cache_bytes": 4 << 20, "tokens": TOKENS, "journal": ""}
FRAME = 4 << 20
"""Bytes that gRPC takes in one frame."""
LIMITLESS = [("grpc.use_local_subchannel_pool", 1), ("grpc.max_send_message_length", -1)]
WORKER = Path(__file__).with_name("abuse_worker.py")
MOST_SECONDS = 30.0
"""Nothing here waits longer for one thing that somebody else does."""
WIRE = {"patience_seconds": 20.0, "deadline_seconds": MOST_SECONDS}
pytestmark = pytest.mark.timeout(280)  # also where a run allows hours for each test


def until(true: Callable[[], bool]) -> None:
    """Wait for it."""
    end = time.monotonic() + MOST_SECONDS
    while not true():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.001)


@contextmanager
def holding() -> Iterator[threading.Event]:
    """What jobs wait for: it is set at the end, whatever happens, and whoever made the jobs can wait for them."""
    hold = threading.Event()
    try:
        yield hold
    finally:
        hold.set()


@dataclass
class Served:
    """A party in a process of its own, and an honest client of it."""

    child: Child
    address: str
    keys: Path
    client: Client
    abusers: list[subprocess.Popen[str]] = field(default_factory=list)

    @property
    def rss(self) -> int:
        return int(psutil.Process(self.child.pid).memory_info().rss)

    def condition(self) -> Condition:
        meta = self.client.link(Message(Status())).meta
        assert isinstance(meta, Condition)
        return meta

    def send(self, number: int, tokens: int = 1) -> float:
        """Seconds of one message: a token of a session of 40, or so many without one."""
        meta = Forward(
            session=f"s{number // 40}" if tokens == 1 else "", start=number % 40 if tokens == 1 else 0,
            lengths=[tokens], padding="left",
        )  # fmt: skip
        began = time.perf_counter()
        self.client.link(Message(meta, {"hidden": torch.ones(tokens, self.client._width)}))
        return time.perf_counter() - began

    def decode(self, count: int = 40) -> None:
        for number in range(count):
            self.send(number)

    def abuse(self, *modes: str) -> subprocess.Popen[str]:
        """Let the other client begin."""
        hello = self.client.hello().meta
        assert isinstance(hello, Hello)
        about = {"terms": msgspec.to_builtins(hello.terms), "tokens": TOKENS, "width": self.client._width}
        words = [sys.executable, str(WORKER), self.address, str(self.keys), "other", json.dumps(about), *modes]
        environment = os.environ | {"GRPC_VERBOSITY": "NONE", "PYTHONPATH": os.pathsep.join(sys.path)}
        pipe = subprocess.PIPE
        started = subprocess.Popen(words, stdin=pipe, stdout=pipe, text=True, env=environment)
        self.abusers.append(started)
        assert started.stdout is not None
        assert select.select([started.stdout], [], [], MOST_SECONDS)[0], "the other client does not begin"
        assert started.stdout.readline() == "at work\n"
        return started

    def end(self, abuser: subprocess.Popen[str]) -> dict[str, int]:
        out, _ = abuser.communicate(timeout=MOST_SECONDS)
        return dict(json.loads(out))


@pytest.fixture(scope="module")
def zygote() -> Iterator[Zygote]:
    with Zygote() as started:
        yield started


@contextmanager
def serving(zygote: Zygote, keys: Path, folder: Path, **serve: Any) -> Iterator[Served]:
    values: dict[str, Any] = {
        "model": "embedded", "plan": U_SHAPED, "keys": {"dir": str(keys)}, "doors": DOORS, "serve": SERVE | serve,
        "wire": WIRE,
    }  # fmt: skip
    (folder / "run.toml").write_text(Document.of(values, folder).to_toml())
    words = ["serve", "run.toml", "--party", "server", "--json", "--listen", "127.0.0.1:0"]
    child = zygote.start(words, cwd=folder, stdout=folder / "out", env={"NOREN_CACHE": os.environ["NOREN_CACHE"]})
    address = json.loads(child.first_line())["address"]
    client = Client(Document.of(values | {"links": {"server": address}}, folder))
    served = Served(child, address, keys, client)
    try:
        yield served
    finally:
        for abuser in served.abusers:
            abuser.kill()
            abuser.communicate(timeout=MOST_SECONDS)
        client.close()
        child.terminate()
    assert child.wait(timeout=20) == 0


@pytest.fixture
def served(zygote: Zygote, keys: Path, tmp_path: Path) -> Iterator[Served]:
    with serving(zygote, keys, tmp_path) as started:
        yield started


MODES = {
    "slow loris": (["loris=20"], "loris: Overloaded"),
    "half-open": (["half_open=4"], "half_open: ended"),
    "half-open, 1000": (["half_open=40"], "half_open: ended"),
    "cache hog": (["hog=4"], "hog: sessions"),
    "flood": (["flood=8", "too_large=2"], "too_large: OverBudget"),
    "all at once": (["flood=5", "hog=4", "too_large=2", "loris=20", "half_open=4"], "loris: Overloaded"),
}
SHORT = ("cache hog",)
"""Tried in the normal lane too: one round each time, judged by medians. In full, a mode takes half a minute or more."""
CASES = [pytest.param(mode, 3, 95, marks=pytest.mark.nightly, id=mode) for mode in MODES]
CASES += [pytest.param(mode, 1, 50, id=f"{mode}, short") for mode in SHORT]
MOST_RSS = 64 << 20
"""The server's memory may grow by so much: 16 connections of one client, their frames and its cache of 4 MiB."""
LINE = 128 << 10
"""And by so much for each line that has not shown a certificate: gRPC's buffers, and those of TLS."""


@dataclass
class Compared:
    """Percentiles of a token's seconds, medians of rounds: at the party that is abused, and at its quiet twin."""

    abused: float
    quiet: float
    largest: float  # a largest message's median seconds, at the twin

    def __str__(self) -> str:
        """In words."""
        return f"{self.abused * 1e3:.2f} ms ({self.quiet * 1e3:.2f} at its twin)"


def compare(served: Served, twin: Served, rounds: int = 3, percentile: int = 95) -> Compared:
    """Ask both in turns, token by token: what else the machine does comes upon both."""
    found: list[tuple[float, float]] = []
    largest: list[float] = []
    for _ in range(rounds):
        pairs = [(served.send(number), twin.send(number)) for number in range(120)]
        largest += [twin.send(0, TOKENS) for _ in range(5)]
        sides = zip(*pairs, strict=True)
        found.append(tuple(statistics.quantiles(side, n=100)[percentile - 1] for side in sides))  # type: ignore[arg-type]
    abused, quiet = (statistics.median(side) for side in zip(*found, strict=True))
    return Compared(abused, quiet, statistics.median(largest))


@pytest.fixture
def twin(zygote: Zygote, keys: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with serving(zygote, keys, tmp_path_factory.mktemp("twin")) as started:
        yield started


@pytest.mark.parametrize(("mode", "rounds", "percentile"), CASES)
def test_T23_abuse(served: Served, twin: Served, mode: str, rounds: int, percentile: int) -> None:
    """An honest client's tokens take at most twice as long as in quiet, and the one largest job that is under way."""
    modes, sign = MODES[mode]
    compare(served, twin, 1)
    before = served.rss
    abuser = served.abuse(*modes)
    first = compare(served, twin, rounds, percentile)
    time.sleep(DOORS["hello_seconds"])  # longer than anyone may stand in the door
    then, condition, top = compare(served, twin, rounds, percentile), served.condition(), served.rss
    outcomes = served.end(abuser)
    ended = time.monotonic()
    while True:
        after = compare(served, twin, rounds, percentile)
        if after.abused <= 1.5 * after.quiet and served.condition().connections == 1:
            break
        assert time.monotonic() < ended + 20, f"{after}, {served.condition()}"
    back = time.monotonic() - ended
    lines = sum(LINES * int(word.removeprefix("half_open=")) for word in modes if word.startswith("half_open="))
    print(
        f"{mode}: p{percentile} {first}, {then}, a largest message {then.largest * 1e3:.2f} ms; "
        f"{after} after {back:.1f} s; RSS +{(top - before) / 2**20:.0f} MiB; "
        f"{condition.connections} connections; {outcomes}"
    )
    assert min(one.abused - one.largest - 2 * one.quiet for one in (first, then)) <= 0
    assert top - before <= MOST_RSS + lines * LINE and condition.cache_bytes <= 2 * SERVE["cache_bytes"]
    assert condition.connections <= 17 and outcomes.get(sign, 0) > 0
    assert served.client.link.connections == 1


def test_T23_turns(llama_folder: Path) -> None:
    """Whoever asks for much does not make another wait for it: by the order of the jobs, whatever they take."""
    server = SpanServer(Stage.load(llama_folder, U_SHAPED, "server", "causal-lm"))
    done = list[str]()

    def job(name: str) -> None:
        hold.wait(MOST_SECONDS)
        time.sleep(0.002)
        done.append(name)

    with ThreadPoolExecutor(44) as pool, holding() as hold:
        asked = [pool.submit(server.compute, partial(job, "much"), "much") for _ in range(40)]
        until(lambda: server.waiting == 40)
        asked += [pool.submit(server.compute, partial(job, name), name) for name in ("little", "less")]
        until(lambda: server.waiting == 42)
        hold.set()
        for one in asked:
            one.result(MOST_SECONDS)
        assert max(done.index("little"), done.index("less")) <= 3, done
        asked = [pool.submit(server.compute, partial(job, "much"), "much") for _ in range(2)]  # time is not saved up
        asked.append(pool.submit(server.compute, partial(job, "new"), "new"))
        assert [one.result(MOST_SECONDS) for one in asked] == [None] * 3
    server.close()
    print(
        f"of 42 jobs, one owner's 40 came first: the others' were done as numbers {done.index('little') + 1} "
        f"and {done.index('less') + 1}"
    )


# Bombs.


def throw(address: str, keys: Path, how: grpc.Compression, size: int) -> str:
    """Send one frame of so many zeros, small on the wire: gRPC inflates it. Returns the status that comes of it."""
    shown = credentials(keys, "other").client()
    with grpc.secure_channel(address, shown, LIMITLESS, compression=how) as channel:
        method = channel.stream_stream(METHOD)
        with pytest.raises(grpc.RpcError) as caught:
            list(method(iter([bytes(size)]), metadata=((KEY_HEADER, new_key()),), timeout=120))
    return str(caught.value.code().name)


@contextmanager
def watched(served: Served) -> Iterator[list[int]]:
    """By how many bytes the server's resident memory has grown at most, meanwhile."""
    served.decode()
    before, growth, over = served.rss, [0], threading.Event()

    def look() -> None:
        while not over.wait(0.005):
            growth[0] = max(growth[0], served.rss - before)

    looking = threading.Thread(target=look, daemon=True)
    looking.start()
    try:
        yield growth
    finally:
        over.set()
        looking.join(MOST_SECONDS)
    served.decode()  # it is there still


@pytest.mark.parametrize("how", [grpc.Compression.Gzip, grpc.Compression.Deflate], ids=["gzip", "deflate"])
@pytest.mark.parametrize("size", [64 << 20, pytest.param(1 << 30, marks=pytest.mark.nightly)], ids=["64MiB", "1GiB"])
def test_T7_bombs_in_frames(served: Served, how: grpc.Compression, size: int) -> None:
    """Four at once: gRPC stops inflating at its limit."""
    assert throw(served.address, served.keys, how, FRAME - 100) == "INVALID_ARGUMENT"  # it is inflated, and read
    with watched(served) as growth, ThreadPoolExecutor(4) as pool:
        thrown = [pool.submit(throw, served.address, served.keys, how, size) for _ in range(4)]
        statuses = [one.result() for one in thrown]
    assert set(statuses) <= {"RESOURCE_EXHAUSTED", "CANCELLED"} and "RESOURCE_EXHAUSTED" in statuses
    assert growth[0] <= 2 * FRAME * 4
    print(f"4 x {size >> 20} MiB: {statuses}, RSS +{growth[0] / 2**20:.1f} MiB of at most {8 * FRAME >> 20}")


def zeros(size: int, announced: int) -> bytes:
    """So many zeros as one Zstandard frame that announces another size."""
    frame = bytearray(zstandard.ZstdCompressor(level=1, write_content_size=True).compress(bytes(size)))
    single, place = frame[4] >> 5 & 1, frame[4] >> 6
    assert place == 2  # the size has four bytes
    frame[6 - single : 10 - single] = announced.to_bytes(4, "little")
    return bytes(frame)


def test_T7_bombs_in_the_codec(zygote: Zygote, keys: Path, tmp_path: Path) -> None:
    """1 GiB in a Zstandard frame for a tensor of 48 KiB, four at once: one that says so, and one that does not."""
    tokens = 64
    with serving(zygote, keys, tmp_path, tokens=tokens) as served:
        hello, width = served.client.hello().meta, served.client._width
        assert isinstance(hello, Hello)
        due = tokens * width * 4
        terms = msgspec.structs.replace(hello.terms, activations="zstd")
        shown = raw_client(credentials(keys, "other"))

        def send(number: int, frame: bytes) -> str:
            meta = Forward(session="", start=0, lengths=[tokens], padding="left")
            header = Header(meta, [Entry("hidden", "f32", [tokens, width], "zstd", len(frame))])
            with Caller(int(served.address.rpartition(":")[2]), shown) as caller:
                assert caller.ask(Message(Hello(protocol=PROTOCOL, run=f"{number}", terms=terms))).kind == "welcome"
                try:
                    return caller.ask(Packed(msgspec.json.encode(header), [memoryview(frame)])).kind
                except grpc.RpcError as error:
                    return f"{error.code().name}: {error.details()}"

        honest = zstandard.ZstdCompressor(level=1, write_content_size=True).compress(bytes(due))
        assert send(0, honest) == "hidden"
        bombs = {"announced 1 GiB": zeros(1 << 30, 1 << 30), "announced what is due": zeros(1 << 30, due)}
        for what, bomb in bombs.items():
            assert len(bomb) < due
            with watched(served) as growth, ThreadPoolExecutor(4) as pool:
                said = [one.result() for one in [pool.submit(send, number, bomb) for number in range(4)]]
            assert all(line.startswith("INVALID_ARGUMENT: zstd: ") for line in said), said
            assert growth[0] <= 2 * FRAME * 4
            print(f"4 x 1 GiB in {len(bomb)} bytes, {what}: RSS +{growth[0] / 2**20:.1f} MiB; {said[0][:90]}")


# Too much at once.


def test_overload_says_when_to_come_back(llama_folder: Path, keys: Path) -> None:
    """More requests than may wait: the last is told so, waits as long as it was told, and succeeds by itself."""
    server = SpanServer(Stage.load(llama_folder, U_SHAPED, "server", "causal-lm"), limits=Limits(waiting=2))
    with GrpcServer("127.0.0.1:0", credentials(keys, "server"), server.connect) as listening:
        values = {"model": str(llama_folder), "plan": U_SHAPED, "keys": {"dir": str(keys)},
                  "links": {"server": f"127.0.0.1:{listening.port}"}, "wire": WIRE}  # fmt: skip
        client = Client(Document.of(values, Path.cwd()))
        message = Message(
            Forward(session="", start=0, lengths=[3], padding="left"), {"hidden": torch.ones(3, client._width)}
        )
        expected = client.link(message).tensors["hidden"]
        with ThreadPoolExecutor(3) as pool, holding() as hold:
            waiting = [pool.submit(server.compute, partial(hold.wait, MOST_SECONDS)) for _ in range(2)]
            until(lambda: server.waiting == 2)
            with pytest.raises(Overloaded, match="2 requests wait") as refused:
                server.compute(lambda: None, "one")
            assert refused.value.retry_after > 0
            before = client.traffic.copy()
            began, late = time.monotonic(), pool.submit(client.link, message)
            try:
                with pytest.raises(TimeoutError):
                    late.result(timeout=0.3)
            finally:
                hold.set()
            assert client.link.connections == 1
            assert torch.equal(late.result(timeout=30).tensors["hidden"], expected)
            seconds = time.monotonic() - began
            assert client.traffic.since(before).round_trips == 2, "once too early, and once when it was told to come"
            assert seconds >= refused.value.retry_after and all(one.result(MOST_SECONDS) for one in waiting)
        client.link.patience = 0.5  # and one that never gets its turn says so in the end
        with ThreadPoolExecutor(2) as pool, holding() as hold:
            waiting = [pool.submit(server.compute, partial(hold.wait, MOST_SECONDS)) for _ in range(2)]
            until(lambda: server.waiting == 2)
            with pytest.raises(Overloaded, match="requests wait at 'server'"):
                client.link(message)
        client.close()
    server.close()
    print(f"told to come back in {refused.value.retry_after:g} s, answered after {seconds:.2f} s")
