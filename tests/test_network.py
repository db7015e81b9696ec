"""The faults that other tests make really happen: each is seen at the sockets of a client and of a server."""

from __future__ import annotations

import select
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from conftest import credentials
from faults import KINDS, FaultProxy, Schedule
from namespaces import Namespaces, remove_left_behind
from noren.types import Close, Done, Message
from noren.wire.grpc_link import GrpcLink
from noren.wire.grpc_server import GrpcServer


class Taken:
    """What a server saw of one connection."""

    def __init__(self, line: socket.socket) -> None:
        self.line, self.reads = line, list[bytes]()
        self.ended = ""  # "closed" or "reset", once it has

    @property
    def data(self) -> bytes:
        return b"".join(self.reads)


class Server:
    """Takes connections in threads, notes what comes, and sends it back if `echo`; over TLS if given a context."""

    def __init__(self, echo: bool = True, tls: ssl.SSLContext | None = None) -> None:
        self._echo, self._tls = echo, tls
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"
        self.taken: list[Taken] = []
        self._threads = [threading.Thread(target=self._accept, daemon=True)]
        self._threads[0].start()

    def saw(self, number: int) -> Taken:
        """What was seen of a connection, which may only be on its way yet."""
        assert soon(lambda: len(self.taken) > number)
        return self.taken[number]

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *exc: object) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for one in self.taken:
            with suppress(OSError):
                one.line.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join(timeout=5)

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                one = Taken(self._listener.accept()[0])
                self.taken.append(one)
                self._threads.append(threading.Thread(target=self._answer, args=(one,), daemon=True))
                self._threads[-1].start()

    def _answer(self, one: Taken) -> None:
        with one.line:
            try:
                if self._tls is not None:
                    one.line = self._tls.wrap_socket(one.line, server_side=True)
                with one.line:
                    while block := one.line.recv(1 << 16):
                        one.reads.append(block)
                        if self._echo:
                            one.line.sendall(block)
                one.ended = "closed"
            except ssl.SSLError as error:
                one.ended = f"tls: {error.reason}"
            except OSError:
                one.ended = "reset"


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as started:
        yield started


def dial(proxy: FaultProxy, seconds: float = 5.0) -> socket.socket:
    host, _, port = proxy.address.rpartition(":")
    return socket.create_connection((host, int(port)), timeout=seconds)


def take(line: socket.socket, count: int) -> bytes:
    """Read so many bytes."""
    data = b""
    while len(data) < count and (block := line.recv(count - len(data))):
        data += block
    return data


def ask(line: socket.socket, data: bytes) -> tuple[bytes, float]:
    """Send, read as much back, and return it with the seconds that it took."""
    start = time.monotonic()
    sender = threading.Thread(target=line.sendall, args=(data,))
    sender.start()
    answer = take(line, len(data))
    sender.join()
    return answer, time.monotonic() - start


def silent(line: socket.socket, seconds: float = 0.15) -> bool:
    """Whether nothing comes, not even an end."""
    line.settimeout(seconds)
    try:
        line.recv(1)
    except TimeoutError:
        return True
    finally:
        line.settimeout(5)
    return False


def soon(condition: Callable[[], bool], seconds: float = 5.0) -> bool:
    end = time.monotonic() + seconds
    while not (met := condition()) and time.monotonic() < end:
        time.sleep(0.002)
    return met


def test_a_calm_proxy_is_only_a_line(server: Server) -> None:
    data = bytes(range(256)) * 20_000
    with FaultProxy(server.address) as proxy, dial(proxy) as one, dial(proxy) as two:
        answer, seconds = ask(one, data)
        assert answer == data and ask(two, b"two")[0] == b"two"
        assert (proxy.connections, proxy.open, proxy.resets) == (2, 2, 0)
        assert proxy.bytes_up == proxy.bytes_down == len(data) + 3
        one.shutdown(socket.SHUT_WR)  # the end travels too: one way, then back
        assert one.recv(1) == b"" and soon(lambda: server.saw(0).ended == "closed")
        assert soon(lambda: proxy.open == 1)
    print(f"{len(data) / 1e6:.1f} MB there and back in {seconds * 1e3:.0f} ms")


def test_delay_each_way(server: Server) -> None:
    with FaultProxy(server.address) as proxy, dial(proxy) as line:
        quick = ask(line, b"x")[1]
        proxy.delay = 0.1
        slow = ask(line, b"x")[1]
        many = ask(line, b"x" * 1_000_000)[1]  # a delay is no limit: what follows does not wait for what is ahead
        proxy.delay = 0.0
        again = ask(line, b"x")[1]
    print(f"round trip {quick * 1e3:.2f} ms, with 100 ms each way {slow * 1e3:.1f} ms, 1 MB {many * 1e3:.0f} ms")
    assert max(quick, again) < 0.1 and 0.2 <= slow < 0.4 and 0.2 <= many < 1.0


def test_a_shorter_delay_is_felt_at_once(server: Server) -> None:
    with FaultProxy(server.address) as proxy, dial(proxy) as line:
        proxy.delay = 30.0
        line.sendall(b"x")
        assert silent(line)
        proxy.delay = 0.0
        assert line.recv(1) == b"x"


def test_rate(server: Server) -> None:
    with FaultProxy(server.address) as proxy, dial(proxy) as line, dial(proxy) as other:
        proxy.rate = 200_000
        seconds = ask(line, b"x" * 60_000)[1]
        start = time.monotonic()  # two connections share the line
        both = [threading.Thread(target=ask, args=(one, b"x" * 30_000)) for one in (line, other)]
        for one in both:
            one.start()
        for one in both:
            one.join()
        shared = time.monotonic() - start
    print(f"60,000 bytes at 200,000 bytes/s: {seconds:.3f} s; shared by two connections: {shared:.3f} s")
    assert 0.25 <= seconds < 0.6 and 0.25 <= shared < 0.6


def test_slices_of_one_byte(server: Server) -> None:
    data = bytes(range(250)) * 16
    with FaultProxy(server.address) as proxy, dial(proxy) as line:
        proxy.slice = 1
        assert ask(line, data)[0] == data
        reads = server.saw(0).reads
    print(f"{len(data)} bytes came in {len(reads)} reads, the largest {max(map(len, reads))}")
    assert len(reads) > len(data) / 100  # a reader that is slow finds several together; unsliced they are one or two


def test_random_slices_are_those_of_the_seed() -> None:
    def sizes(seed: int) -> list[int]:
        proxy = FaultProxy("127.0.0.1:1", seed)
        proxy.slice = (1, 9)
        return [proxy.flow.piece("up", 1000) for _ in range(200)]

    assert sizes(1) == sizes(1) != sizes(2)
    assert set(sizes(1)) == set(range(1, 10))


@pytest.mark.parametrize("way", ["up", "down", "both"])
def test_black_hole_holds_and_heals(server: Server, way: str) -> None:
    with FaultProxy(server.address) as proxy, dial(proxy) as line:
        assert ask(line, b"before")[0] == b"before"
        proxy.black_hole = way
        line.sendall(b"in the hole")
        assert silent(line)
        assert server.saw(0).data == (b"beforein the hole" if way == "down" else b"before")
        assert server.saw(0).ended == ""
        proxy.black_hole = None
        assert take(line, 11) == b"in the hole"


def test_black_hole_swallows_ends_and_new_connections(server: Server) -> None:
    with FaultProxy(server.address) as proxy:
        with dial(proxy) as line:
            ask(line, b"x")
            proxy.black_hole = "both"
        with dial(proxy) as late:
            late.sendall(b"late")
            assert silent(late)
            assert len(server.taken) == 1 and server.saw(0).ended == ""
            proxy.black_hole = None
            assert take(late, 4) == b"late"
            assert soon(lambda: server.saw(0).ended == "closed")


def test_black_hole_can_lose(server: Server) -> None:
    with FaultProxy(server.address) as proxy, dial(proxy) as line:
        ask(line, b"kept")
        proxy.black_hole, proxy.lose = "up", True
        line.sendall(b"lost")
        assert silent(line)
        proxy.black_hole = None
        assert ask(line, b"too")[0] == b"too" and server.saw(0).data == b"kepttoo"


def test_reset_reaches_both_ends(server: Server) -> None:
    with FaultProxy(server.address) as proxy, dial(proxy) as line:
        ask(line, b"x")
        proxy.reset()
        with pytest.raises(ConnectionResetError):
            line.recv(1)
        assert soon(lambda: server.saw(0).ended == "reset")
        assert (proxy.resets, proxy.open) == (1, 0)
        with dial(proxy) as again:
            assert ask(again, b"again")[0] == b"again"


@pytest.mark.parametrize("count", [1, 4095, 70_001])
def test_reset_at_a_byte(count: int) -> None:
    with Server(echo=False) as server, FaultProxy(server.address) as proxy, dial(proxy) as line:
        line.sendall(b"12345")
        assert soon(lambda: proxy.bytes_up == 5)
        proxy.reset_after(count)
        with pytest.raises(ConnectionResetError):
            line.sendall(b"x" * 200_000)
            line.recv(1)
        assert proxy.bytes_up == 5 + count
        assert soon(lambda: server.saw(0).ended == "reset") and len(server.saw(0).data) <= 5 + count
        with dial(proxy) as again:  # once only
            again.sendall(b"x" * 200_000)
            assert soon(lambda: len(server.saw(1).data) == 200_000)


def test_a_reset_of_an_end_is_handed_on(server: Server) -> None:
    with FaultProxy(server.address) as proxy:
        line = dial(proxy)
        ask(line, b"x")
        line.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        line.close()
        assert soon(lambda: server.saw(0).ended == "reset" and proxy.open == 0)
        proxy.upstream = "127.0.0.1:9"  # nobody
        with pytest.raises(ConnectionResetError), dial(proxy) as nobody:  # which may come before the line is there
            nobody.recv(1)
        assert proxy.resets == 0  # none was made on purpose


@pytest.mark.parametrize("gone", ["upstream", "client"])
def test_half_open(server: Server, gone: str) -> None:
    with FaultProxy(server.address) as proxy, dial(proxy) as line:
        ask(line, b"x")
        proxy.half_open(gone)  # type: ignore[arg-type]
        if gone == "upstream":
            line.sendall(b"to nobody" * 2_000_000)  # more than the system's buffers hold
            assert soon(lambda: server.saw(0).ended == "closed") and silent(line)
        else:
            assert line.recv(1) == b""
            time.sleep(0.15)
            assert server.saw(0).ended == ""
        assert server.saw(0).data == b"x" and proxy.open == 1
        (line if gone == "upstream" else server.saw(0).line).shutdown(socket.SHUT_RDWR)
        assert soon(lambda: proxy.open == 0)


def contexts(keys: Path) -> tuple[ssl.SSLContext, ssl.SSLContext]:
    """A server's and a client's, each asking for the other's certificate."""
    out = []
    for name, protocol in (("server", ssl.PROTOCOL_TLS_SERVER), ("client", ssl.PROTOCOL_TLS_CLIENT)):
        context = ssl.SSLContext(protocol)
        context.check_hostname = False
        context.verify_mode = ssl.CERT_REQUIRED
        context.load_verify_locations(keys / "ca.crt")
        context.load_cert_chain(keys / f"{name}.crt", keys / f"{name}.key")
        out.append(context)
    return out[0], out[1]


def test_replayed_bytes_are_accepted_in_the_clear_and_refused_by_tls(server: Server, keys: Path) -> None:
    with FaultProxy(server.address, capture=True) as proxy:
        with dial(proxy) as line:
            ask(line, b"pay 10")
        replayed = proxy.replay(seconds=0.3)
        assert (replayed.sent, replayed.received, replayed.ended) == (6, b"pay 10", "open")
        assert [one.data for one in server.taken] == [b"pay 10", b"pay 10"] and proxy.captured == b"pay 10"
    own, theirs = contexts(keys)
    with Server(tls=own) as safe, FaultProxy(safe.address, capture=True) as proxy:
        with dial(proxy) as line, theirs.wrap_socket(line) as tls:
            tls.sendall(b"pay 10")
            assert take(tls, 6) == b"pay 10"
        assert b"pay 10" not in proxy.captured
        replayed = proxy.replay()
        assert replayed.sent == len(proxy.captured) > 500 and replayed.ended in ("closed", "reset")
        assert soon(lambda: safe.saw(1).ended.startswith("tls: "))
        assert safe.saw(0).data == b"pay 10" and safe.saw(1).data == b""
        print(f"TLS says {safe.saw(1).ended}")


def test_settings_that_mean_nothing_are_refused(server: Server) -> None:
    proxy = FaultProxy(server.address)
    for name, value in (("delay", -1), ("rate", 0), ("slice", 0), ("slice", (5, 2)), ("black_hole", "left")):
        with pytest.raises(ValueError, match=name):
            setattr(proxy, name, value)
    with pytest.raises(ValueError, match="kinds"):
        Schedule(1, kinds=("typo",))
    with pytest.raises(RuntimeError, match="capture"):
        _ = proxy.captured


def test_schedules_are_those_of_their_seed() -> None:
    assert str(Schedule(3)) == str(Schedule(3)) != str(Schedule(4))
    assert (
        eval(str(Schedule(3, count=9, longest=0.2)).split(": ")[0]).faults == Schedule(3, count=9, longest=0.2).faults
    )
    faults = [fault for seed in range(100) for fault in Schedule(seed).faults]
    assert {fault.kind for fault in faults} == set(KINDS) and {fault.unit for fault in faults} == {"bytes", "seconds"}
    assert all(fault.seconds <= 0.5 for fault in faults)


def test_a_schedule_is_played_and_ends(server: Server) -> None:
    schedule = Schedule(11, count=12, kinds=("delay", "rate", "slice", "black_hole"), within_seconds=0.3, longest=0.1)
    print(schedule)
    data = b"x" * 60_000
    with FaultProxy(server.address) as proxy, dial(proxy) as line:
        proxy.delay = 0.001
        proxy.play(schedule)
        assert ask(line, data)[0] == data
        assert soon(lambda: len(proxy.applied) == 12)
        assert sorted(map(str, proxy.applied)) == sorted(map(str, schedule.faults))
        assert soon(lambda: (proxy.delay, proxy.rate, proxy.slice, proxy.black_hole) == (0.001, None, None, None), 1)
        proxy.calm()
        assert proxy.delay == 0.0


def test_a_scheduled_reset_comes_at_its_byte(server: Server) -> None:
    schedule = next(
        s for s in (Schedule(n, count=1, kinds=("reset",)) for n in range(99)) if s.faults[0].unit == "bytes"
    )
    with FaultProxy(server.address) as proxy, dial(proxy) as line:
        proxy.play(schedule)
        with suppress(ConnectionError):
            ask(line, b"x" * 200_000)
        assert soon(lambda: proxy.resets == 1) and proxy.bytes_up + proxy.bytes_down == schedule.faults[0].moment


def test_a_link_crosses_the_proxy(keys: Path) -> None:
    """Mutual TLS and gRPC in slices of one byte; then a reset, after which the link finds its way again."""

    class Answers:
        codecs, in_run = ("raw", "raw"), True

        def expect(self, header: object) -> None: ...

        def __call__(self, message: Message) -> Message:
            return Message(Done(step=7))

        def disconnect(self) -> None: ...

    with (
        GrpcServer("127.0.0.1:0", credentials(keys, "server"), lambda owner: Answers()) as server,
        FaultProxy(f"127.0.0.1:{server.port}") as proxy,
    ):
        proxy.slice = 1
        link = GrpcLink(proxy.address, credentials(keys, "client"))
        assert link(Message(Close())).meta == Done(step=7)
        before, proxy.slice = proxy.connections, None
        proxy.reset()
        assert link(Message(Close())).meta == Done(step=7) and proxy.connections > before
        link.close()


LISTEN = """
import socket, sys, time
line = socket.create_server((sys.argv[1], 5000)).accept()[0]
start, count = None, 0
while block := line.recv(65536):
    start = start or time.monotonic()
    count += len(block)
    print(count, round(time.monotonic() - start, 3), flush=True)
"""
SEND = """
import socket, sys, time
for _ in range(100):
    try:
        line = socket.create_connection((sys.argv[1], 5000), timeout=5)
        break
    except ConnectionRefusedError:
        time.sleep(0.02)
line.sendall(b"x" * int(sys.argv[2]))
for word in sys.stdin:
    line.sendall(b"y")
"""


def between(net: Namespaces, count: int) -> tuple[subprocess.Popen[str], subprocess.Popen[str]]:
    """A process on the left that listens, and one on the right that sends it `count` bytes, and one a line of input."""
    pipe = subprocess.PIPE
    listening = net.run(net.left, [sys.executable, "-c", LISTEN, net.left.address], stdout=pipe, text=True)
    words = [sys.executable, "-c", SEND, net.left.address, str(count)]
    return listening, net.run(net.right, words, stdin=pipe, text=True)


def test_namespaces_have_a_line_of_a_given_rate() -> None:
    with Namespaces(rate="8mbit") as net:
        listening, sending = between(net, 500_000)
        assert sending.stdin is not None and listening.stdout is not None
        sending.stdin.close()
        count, seconds = listening.stdout.read().split("\n")[-2].split()
        print(f"{count} bytes at 8 Mbit/s: {seconds} s")
        assert int(count) == 500_000 and 0.4 < float(seconds) < 1.5
        assert not any(Path("/sys/class/net/veth0").parent.glob("veth0"))  # nothing of it is outside
        names = (net.left.name, net.right.name)
    assert not any(Path("/run/netns", name).exists() for name in names)


def test_a_partition_of_namespaces_is_silent_and_heals() -> None:
    with Namespaces() as net:
        listening, sending = between(net, 1)
        assert sending.stdin is not None and listening.stdout is not None
        assert listening.stdout.readline().startswith("1 ")
        net.partition(net.right)
        sending.stdin.write("\n")
        sending.stdin.flush()
        assert not select.select([listening.stdout], [], [], 0.3)[0]  # nothing came
        assert sending.poll() is None and listening.poll() is None  # neither end was told
        start = time.monotonic()
        net.heal()
        assert listening.stdout.readline().startswith("2 ")
        print(f"TCP sent it again {time.monotonic() - start:.2f} s after healing")


def test_namespaces_are_removed_after_an_error() -> None:
    names = []
    with pytest.raises(ZeroDivisionError), Namespaces() as net:
        names += [net.left.name, net.right.name]
        running = net.run(net.left, ["sleep", "100"])
        _ = 1 / 0
    assert running.returncode != 0 and len(names) == 2
    assert not any(Path("/run/netns", name).exists() for name in names)


def test_namespaces_of_a_killed_process_are_removed() -> None:
    with Namespaces():
        ended = subprocess.Popen(["true"])
        ended.wait()
        name = f"noren-{ended.pid}-0l"
        subprocess.run(["ip", "netns", "add", name], check=True)
        remove_left_behind()
        assert not Path("/run/netns", name).exists()
