"""Faults of a network: a seeded TCP proxy between a client and a server, and seeded schedules of what goes wrong.

    with FaultProxy(f"127.0.0.1:{server.port}", seed=7) as proxy:
        ...                             # let the client connect to proxy.address
        proxy.delay = 0.2               # settings may be changed at any time, from any thread
        proxy.reset_after(1500)         # actions happen once
        print(schedule := Schedule(seed=7))
        proxy.play(schedule)            # settings and actions at moments of their own, counted from here

The proxy moves bytes between sockets and does not know what they mean. "Up" is from the client to the server. It runs
in one thread of its own; all its methods may be called from any other thread.
"""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, Self, TypeVar

from fault_lines import BLOCK, Connection, Direction, Flow, Live
from fault_schedules import KINDS, Fault, Schedule

__all__ = ["KINDS", "Fault", "FaultProxy", "Replayed", "Schedule"]
T = TypeVar("T")


@dataclass(frozen=True)
class Replayed:
    """What came of sending recorded bytes again: bytes sent, bytes that the server answered, and how it ended."""

    sent: int
    received: bytes
    ended: Literal["closed", "reset", "open"]


def _positive(value: Any) -> bool:
    return value is None or (isinstance(value, int | float) and value > 0)


def _size(value: Any) -> bool:
    low, high = value if isinstance(value, tuple) else (value, value)
    return value is None or (isinstance(low, int) and isinstance(high, int) and 1 <= low <= high)


class FaultProxy:
    """A TCP proxy in front of `upstream` ("host:port"; may be set again, for connections that come later).

    `seed` decides the sizes of random slices. With `capture`, what clients send is kept. Counters: `connections` taken
    so far, `bytes_up` and `bytes_down` forwarded, `resets` of connections made on purpose, `applied` faults of the
    schedule that is played.
    """

    delay = Live[float](0.0, lambda v: isinstance(v, int | float) and v >= 0, "seconds of at least 0")
    """Seconds that every byte takes, each way."""
    rate = Live[float | None](None, _positive, "bytes a second above 0, or None")
    """Bytes a second each way, shared by all connections."""
    slice = Live[int | tuple[int, int] | None](None, _size, "a number of bytes above 0, a pair of them, or None")
    """At most so many bytes a write; a pair: a random size between the two, drawn anew for every write."""
    black_hole = Live[str | None](None, lambda v: v in (None, "up", "down", "both"), "'up', 'down', 'both' or None")
    """Nothing passes this way: no byte, no end, no reset, no new connection. Nothing is closed. What was held passes
    when the hole is gone, as after a cut that is healed."""
    lose = Live[bool](False, lambda v: isinstance(v, bool), "True or False")
    """Bytes that reach a black hole are dropped instead of held (a stream that nothing can mend)."""

    def __init__(self, upstream: str, seed: int = 0, *, capture: bool = False) -> None:
        self._loop: asyncio.AbstractEventLoop | None = None
        self.upstream, self.seed, self.address = upstream, seed, ""
        self.connections = self.resets = 0
        self.applied: list[Fault] = []
        self.flow, self.problems = Flow(self, seed), list[BaseException]()
        self._capture, self._recorded = capture, list[bytearray]()
        self._open: set[Connection] = set()
        self._timers: list[asyncio.TimerHandle] = []
        self._base: dict[str, Any] = {}
        self._last: dict[str, Fault] = {}

    def __enter__(self) -> Self:
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=512)
        self._listener.setblocking(False)
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"
        self._loop, self._stop = asyncio.new_event_loop(), asyncio.Event()
        self._thread = threading.Thread(target=self._run, name="fault-proxy", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        """End everything that is open. Raises what went wrong inside the proxy itself, if anything did."""
        self._call(self._shut)
        self._thread.join()
        self._loop = None
        self._listener.close()
        if self.problems:
            raise self.problems[0]

    # What tests see and do.

    @property
    def bytes_up(self) -> int:
        """Bytes handed on to the server so far."""
        return self.flow.moved["up"]

    @property
    def bytes_down(self) -> int:
        """Bytes handed on to clients so far."""
        return self.flow.moved["down"]

    @property
    def open(self) -> int:
        """Connections that are open now."""
        return len(self._open)

    @property
    def captured(self) -> bytes:
        """All that clients have sent, in the order of their connections. Needs `capture=True`."""
        return b"".join(self._all_captured())

    def reset(self) -> None:
        """Reset (RST) all connections now, at both ends."""
        self._call(self._reset)

    def reset_after(self, count: int, direction: Direction | Literal["both"] = "up") -> None:
        """Reset all connections once, when exactly `count` more bytes were forwarded in `direction`."""
        if count < 1:
            raise ValueError(f"reset_after: {count} is not a number of bytes above 0")
        self._call(lambda: self.flow.mark(direction, count, self._reset))

    def half_open(self, gone: Literal["upstream", "client"] = "upstream") -> None:
        """End the `gone` side of all connections; the other side is not told, and what it sends is lost."""
        self._call(lambda: self._half_open(gone))

    def replay(self, connection: int = 0, seconds: float = 5.0) -> Replayed:
        """Send what a captured connection's client sent once more, over a new line straight to the server.

        The line is then read until the server ends it, or for `seconds`. Needs `capture=True`.
        """
        data, received = self._all_captured()[connection], bytearray()
        ended: Literal["closed", "reset", "open"] = "closed"
        with socket.create_connection(self.target(), timeout=seconds) as line:
            try:
                line.sendall(data)
                while block := line.recv(BLOCK):
                    received += block
            except TimeoutError:
                ended = "open"
            except OSError:
                ended = "reset"
        return Replayed(len(data), bytes(received), ended)

    def play(self, schedule: Schedule) -> None:
        """Let the faults of a schedule happen, counted from now; each is noted in `applied` when it begins."""
        self._call(lambda: self._play(schedule))

    def calm(self) -> None:
        """Forget what is armed or left of a schedule, and end all faults that are settings."""
        self._call(self._forget_schedule)
        for name, setting in vars(FaultProxy).items():
            if isinstance(setting, Live):
                setattr(self, name, setting.calm)

    # What the lines ask.

    def holds(self, direction: Direction) -> bool:
        """Whether nothing passes in this direction now."""
        return self.black_hole in (direction, "both")

    def target(self) -> tuple[str, int]:
        """Where the server is now."""
        host, _, port = self.upstream.rpartition(":")
        return host, int(port)

    def wake(self) -> None:
        """Let all lines look at the settings again."""
        if self._loop is not None:
            self._loop.call_soon_threadsafe(self._wake)

    def forget(self, connection: Connection) -> None:
        """A connection is over."""
        self._open.discard(connection)

    # What happens in the proxy's thread.

    def _wake(self) -> None:
        for connection in self._open:
            connection.wake()

    def _run(self) -> None:
        with asyncio.Runner(loop_factory=lambda: self._loop) as runner:  # type: ignore[arg-type,return-value]
            runner.run(self._accept())

    async def _accept(self) -> None:
        accepting = asyncio.ensure_future(self._take_connections())
        await self._stop.wait()
        accepting.cancel()

    async def _take_connections(self) -> None:
        while True:
            client, _ = await asyncio.get_running_loop().sock_accept(self._listener)
            self.connections += 1
            self._recorded.append(bytearray())
            self._open.add(Connection(self, client, self._recorded[-1] if self._capture else None))

    def _shut(self) -> None:
        self._forget_schedule()
        for connection in list(self._open):
            connection.close()
        self._stop.set()

    def _call(self, action: Callable[[], T]) -> T:
        """Do something in the proxy's thread, and wait until it is done."""

        async def done() -> T:
            return action()

        if self._loop is None:
            raise RuntimeError("this proxy is not running; use it as a context manager")
        return asyncio.run_coroutine_threadsafe(done(), self._loop).result(timeout=10)

    def _all_captured(self) -> list[bytes]:
        if not self._capture:
            raise RuntimeError("nothing is captured; make the proxy with capture=True")
        return [bytes(one) for one in self._recorded]

    def _reset(self) -> None:
        for connection in list(self._open):
            self.resets += 1
            connection.close(reset=True)

    def _half_open(self, gone: Literal["upstream", "client"]) -> None:
        for connection in list(self._open):
            connection.half_open(gone)

    def _play(self, schedule: Schedule) -> None:
        self._base = {
            name: getattr(self, name) for name, setting in vars(FaultProxy).items() if isinstance(setting, Live)
        }
        for fault in schedule.faults:
            if fault.unit == "bytes":
                self.flow.mark("both", int(fault.moment), partial(self._begin, fault))
            else:
                self._later(fault.moment, self._begin, fault)

    def _begin(self, fault: Fault) -> None:
        self.applied.append(fault)
        if fault.kind == "reset":
            self._reset()
        elif fault.kind == "half_open":
            self._half_open("upstream")
        else:
            self._last[fault.kind] = fault
            setattr(self, fault.kind, fault.value)
            self._later(fault.seconds, self._end, fault)

    def _end(self, fault: Fault) -> None:
        if self._last.get(fault.kind) is fault:  # no later one of its kind has begun
            setattr(self, fault.kind, self._base[fault.kind])

    def _later(self, seconds: float, action: Callable[[Fault], None], fault: Fault) -> None:
        self._timers.append(asyncio.get_running_loop().call_later(seconds, action, fault))

    def _forget_schedule(self) -> None:
        for timer in self._timers:
            timer.cancel()
        self._timers.clear()
        self.flow.marks.clear()
