"""The moving parts of the fault proxy: settings that are live, the flow of bytes, and the lines that it joins.

All of it but `Live` runs in the proxy's own event loop.
"""

from __future__ import annotations

import asyncio
import math
import random
import socket
import struct
from collections import deque
from collections.abc import Callable, Coroutine
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, Literal, Self, TypeVar, overload

if TYPE_CHECKING:
    from faults import FaultProxy

Direction = Literal["up", "down"]
BLOCK = 1 << 16
HELD = 4 << 20
"""Bytes that one direction of one connection keeps back (delayed, or in a black hole) before it stops reading."""
BURST = 0.02
"""Seconds' worth of bytes that a limited line sends at once."""
RST = struct.pack("ii", 1, 0)
"""SO_LINGER with no time: closing sends a reset."""
T = TypeVar("T")


class Live(Generic[T]):
    """A setting of a proxy that takes effect at once, in whichever thread it is set. Raises ValueError."""

    def __init__(self, calm: T, allowed: Callable[[Any], bool], words: str) -> None:
        self.calm, self._allowed, self._words = calm, allowed, words

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    @overload
    def __get__(self, proxy: None, owner: type) -> Self: ...
    @overload
    def __get__(self, proxy: FaultProxy, owner: type) -> T: ...
    def __get__(self, proxy: FaultProxy | None, owner: type) -> T | Self:
        return self if proxy is None else proxy.__dict__.get(self._name, self.calm)

    def __set__(self, proxy: FaultProxy, value: T) -> None:
        if not self._allowed(value):
            raise ValueError(f"{self._name}: {value!r} is not {self._words}")
        proxy.__dict__[self._name] = value
        proxy.wake()


@dataclass(frozen=True)
class Mark:
    """A place in the bytes that are forwarded, at which something happens exactly."""

    direction: Direction | Literal["both"]
    at: int
    action: Callable[[], None]


class Flow:
    """What all lines of a proxy share: counted bytes, the marks among them, and the pace."""

    def __init__(self, proxy: FaultProxy, seed: int) -> None:
        self.moved: dict[str, int] = {"up": 0, "down": 0}
        self.marks: list[Mark] = []
        self._free: dict[str, float] = {"up": 0.0, "down": 0.0}
        self._proxy, self._draw = proxy, random.Random(seed)

    def mark(self, direction: Direction | Literal["both"], count: int, action: Callable[[], None]) -> None:
        """Do something when `count` more bytes have passed."""
        self.marks.append(Mark(direction, self._total(direction) + count, action))

    def piece(self, direction: str, waiting: int) -> int:
        """Return how many of the waiting bytes go in the next write."""
        size = waiting
        if (most := self._proxy.slice) is not None:
            size = min(size, most if isinstance(most, int) else self._draw.randint(*most))
        if (rate := self._proxy.rate) is not None:
            size = min(size, max(1, int(rate * BURST)))
        for mark in self.marks:
            if mark.direction in (direction, "both") and (left := mark.at - self._total(mark.direction)) > 0:
                size = min(size, left)
        return size

    async def pace(self, direction: str, size: int) -> None:
        """Wait until the limited line has room for `size` bytes."""
        if (rate := self._proxy.rate) is not None:
            now = asyncio.get_running_loop().time()
            self._free[direction] = max(now - BURST, self._free[direction]) + size / rate
            await asyncio.sleep(self._free[direction] - now)

    def passed(self) -> None:
        """Do what is to be done at the marks that were reached."""
        reached = [mark for mark in self.marks if mark.at <= self._total(mark.direction)]
        self.marks = [mark for mark in self.marks if mark not in reached]
        for mark in reached:
            mark.action()

    def _total(self, direction: str) -> int:
        return sum(self.moved.values()) if direction == "both" else self.moved[direction]


class Connection:
    """A client's line, and the line to the server that belongs to it. `recorded`, if given, takes what clients send."""

    def __init__(self, proxy: FaultProxy, client: socket.socket, recorded: bytearray | None) -> None:
        self.proxy, self.client, self.recorded = proxy, client, recorded
        self.upstream = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        for line in (client, self.upstream):
            line.setblocking(False)
            line.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.up = Pipe(self, "up", client, self.upstream)
        self.down = Pipe(self, "down", self.upstream, client)
        self._tasks: set[asyncio.Task[None]] = set()
        self._start(self._connect())

    def wake(self) -> None:
        """Let everything that waits look again: a setting has changed."""
        self.up.news.set()
        self.down.news.set()

    def close(self, *, reset: bool = False) -> None:
        """End both lines: with a reset, or as a process that closes its sockets."""
        self._end(self.client, reset)
        self._end(self.upstream, reset)
        self._cancel()
        self.proxy.forget(self)

    def half_open(self, gone: Literal["upstream", "client"]) -> None:
        """End one line; keep the other, on which nothing comes and all that is sent is lost."""
        self._cancel()
        self._end(self.upstream if gone == "upstream" else self.client, reset=False)
        self._start(self._drain(self.client if gone == "upstream" else self.upstream))

    def other(self, pipe: Pipe) -> Pipe:
        """The pipe of the other direction."""
        return self.down if pipe is self.up else self.up

    async def _connect(self) -> None:
        await until(self.up.news, lambda: math.inf if self.proxy.holds("up") else 0.0)
        try:
            await asyncio.get_running_loop().sock_connect(self.upstream, self.proxy.target())
        except OSError:
            return self.close(reset=True)
        for pipe in (self.up, self.down):
            self._start(pipe.read())
            self._start(pipe.write())

    async def _drain(self, line: socket.socket) -> None:
        with suppress(OSError):
            while await asyncio.get_running_loop().sock_recv(line, BLOCK):
                pass

    def _start(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._done)

    def _done(self, task: asyncio.Task[None]) -> None:
        if task.cancelled() or task not in self._tasks:
            return
        self._tasks.discard(task)
        if (problem := task.exception()) is not None:
            self.proxy.problems.append(problem)
            self.close(reset=True)
        elif not self._tasks:
            self.close()

    def _cancel(self) -> None:
        for task in self._tasks:
            task.cancel()
        self._tasks.clear()

    def _end(self, line: socket.socket, reset: bool) -> None:
        if line.fileno() >= 0:
            loop = asyncio.get_running_loop()
            loop.remove_reader(line)
            loop.remove_writer(line)
            if reset:
                line.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RST)
            line.close()


class Pipe:
    """One direction of a connection: blocks of bytes with the moment of their arrival, b"" the end, None a reset."""

    def __init__(
        self, connection: Connection, direction: Direction, source: socket.socket, sink: socket.socket
    ) -> None:
        self.news = asyncio.Event()
        self._connection, self._proxy, self._direction = connection, connection.proxy, direction
        self._source, self._sink = source, sink
        self._blocks: deque[tuple[float, bytes | None]] = deque()
        self._held = 0
        self._broken = self._ended = False

    def put(self, block: bytes | None) -> None:
        """Hand over what has arrived."""
        if self._ended and block is None:
            return self._connection.close(reset=True)
        self._blocks.append((asyncio.get_running_loop().time(), block))
        self._held += len(block or b"")
        self.news.set()

    async def read(self) -> None:
        """Take from the source until its end, but not more than can be held."""
        block: bytes | None = b" "
        while block:
            await until(self.news, lambda: math.inf if self._held >= HELD else 0.0)
            try:
                block = await asyncio.get_running_loop().sock_recv(self._source, BLOCK)
            except OSError:
                block = None
            if block and self._direction == "up" and self._connection.recorded is not None:
                self._connection.recorded.extend(block)
            if not (block and self._proxy.lose and self._proxy.holds(self._direction)):
                self.put(block)
            await asyncio.sleep(0)

    async def write(self) -> None:
        """Give to the sink what has waited long enough, in order, until the end."""
        while not self._ended:
            await until(self.news, self._seconds_left)
            block = self._blocks[0][1]
            if block is None:
                return self._connection.close(reset=True)
            if block and not self._broken:
                await self._send(block)
            elif not block:
                self._ended = True
                with suppress(OSError):
                    self._sink.shutdown(socket.SHUT_WR)
            self._blocks.popleft()
            self._held -= len(block)
            self.news.set()

    async def _send(self, block: bytes) -> None:
        flow, rest = self._proxy.flow, memoryview(block)
        while rest:
            size = flow.piece(self._direction, len(rest))
            await flow.pace(self._direction, size)
            await until(self.news, lambda: math.inf if self._proxy.holds(self._direction) else 0.0)
            flow.moved[self._direction] += size
            try:
                await asyncio.get_running_loop().sock_sendall(self._sink, rest[:size])
            except OSError:  # the far end was reset: so is the near one, after what is on its way there
                self._broken = True
                return self._connection.other(self).put(None)
            flow.passed()
            rest = rest[size:]
            await asyncio.sleep(0)

    def _seconds_left(self) -> float:
        if not self._blocks or self._proxy.holds(self._direction):
            return math.inf
        return self._blocks[0][0] + self._proxy.delay - asyncio.get_running_loop().time()


async def until(news: asyncio.Event, seconds_left: Callable[[], float]) -> None:
    """Wait until there are no seconds left, counting again at every news."""
    while (seconds := seconds_left()) > 0:
        news.clear()
        with suppress(TimeoutError):
            async with asyncio.timeout(None if seconds == math.inf else seconds):
                await news.wait()
