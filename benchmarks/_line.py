"""A line between two machines, as a process of its own: so much delay, so many bits a second, each way at once.

    with Line("127.0.0.1:7420") as line:  # let the client connect to line.address
        line.set(round_trip=0.08, bits=50e6)

Every byte waits until the bytes before it are through, then crosses for half the round trip. What waits to get through
is held back at the sender, as the queue of a network card would, beyond 256 KiB.
"""

from __future__ import annotations

import asyncio
import subprocess
import sys
from contextlib import suppress
from typing import Self

BLOCK, QUEUE = 1 << 16, 1 << 18


class Line:
    """The process. A new setting holds for what comes after it."""

    def __init__(self, upstream: str) -> None:
        command = [sys.executable, __file__, upstream]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.address = self._said()

    def set(self, *, round_trip: float, bits: float) -> None:
        """Seconds of a round trip; bits a second each way, 0 for no limit."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{round_trip / 2} {bits / 8}\n")
        self._process.stdin.flush()
        self._said()

    def _said(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline().strip()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self._process.terminate()
        self._process.wait(timeout=20)


class _Lanes:
    """The process's inside: `delay` in seconds and `rate` in bytes a second, each way."""

    def __init__(self) -> None:
        self.delay = self.rate = 0.0

    async def take(self, source: asyncio.StreamReader, lane: asyncio.Queue[tuple[float, bytes]]) -> None:
        """Take bytes in as the line has room for them, and note when each block arrives."""
        clock, free = asyncio.get_running_loop().time, 0.0
        while block := await source.read(BLOCK):
            now = clock()
            free = max(now, free) + (len(block) / self.rate if self.rate else 0.0)
            lane.put_nowait((free + self.delay, block))
            if self.rate and (ahead := free - now - QUEUE / self.rate) > 0:
                await asyncio.sleep(ahead)
        lane.put_nowait((free + self.delay, b""))

    async def give(self, sink: asyncio.StreamWriter, lane: asyncio.Queue[tuple[float, bytes]]) -> None:
        """Give out each block when it arrives."""
        clock = asyncio.get_running_loop().time
        while True:
            due, block = await lane.get()
            if (left := due - clock()) > 0:
                await asyncio.sleep(left)
            if not block:
                sink.close()
                return
            sink.write(block)
            await sink.drain()

    async def listen(self, upstream: str) -> None:
        """Join each connection with one of its own to `upstream`."""
        host, _, port = upstream.rpartition(":")

        async def join(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            far_reader, far_writer = await asyncio.open_connection(host, int(port), limit=BLOCK)
            up, down = asyncio.Queue[tuple[float, bytes]](), asyncio.Queue[tuple[float, bytes]]()
            with suppress(OSError):
                await asyncio.gather(
                    self.take(reader, up), self.give(far_writer, up),
                    self.take(far_reader, down), self.give(writer, down),
                )  # fmt: skip

        server = await asyncio.start_server(join, "127.0.0.1", 0, limit=BLOCK)
        print(f"127.0.0.1:{server.sockets[0].getsockname()[1]}", flush=True)
        settings = asyncio.StreamReader()
        await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(settings), sys.stdin)
        while words := (await settings.readline()).split():
            self.delay, self.rate = float(words[0]), float(words[1])
            print("set", flush=True)


if __name__ == "__main__":
    asyncio.run(_Lanes().listen(sys.argv[1]))
