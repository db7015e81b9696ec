"""A line between two machines, as a process of its own: so much delay, so many bits a second, each way at once.

    with line("127.0.0.1:7420", round_trip=0.08, bits=50e6) as address: ...

Every byte waits until the bytes before it are through, then crosses for half the round trip. What waits to get through
is held back at the sender, as the queue of a network card would, beyond 256 KiB.
"""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress

BLOCK, QUEUE = 1 << 16, 1 << 18
Lane = asyncio.Queue[tuple[float, bytes]]


@contextmanager
def line(upstream: str, *, round_trip: float, bits: float) -> Iterator[str]:
    """Run a line to `upstream`; yields its near end. `bits`: a second each way, 0 for no limit."""
    command = [sys.executable, __file__, upstream, str(round_trip / 2), str(bits / 8)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        yield process.stdout.readline().strip()
    finally:
        process.terminate()
        process.wait(timeout=20)


async def _take(source: asyncio.StreamReader, lane: Lane, delay: float, rate: float) -> None:
    """Take bytes in as the line has room for them, and note when each block arrives."""
    clock, free = asyncio.get_running_loop().time, 0.0
    while block := await source.read(BLOCK):
        now = clock()
        free = max(now, free) + (len(block) / rate if rate else 0.0)
        lane.put_nowait((free + delay, block))
        if rate and (ahead := free - now - QUEUE / rate) > 0:
            await asyncio.sleep(ahead)
    lane.put_nowait((free + delay, b""))


async def _give(sink: asyncio.StreamWriter, lane: Lane) -> None:
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


async def _serve(upstream: str, delay: float, rate: float) -> None:
    host, _, port = upstream.rpartition(":")

    async def join(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        far_reader, far_writer = await asyncio.open_connection(host, int(port), limit=BLOCK)
        up, down = Lane(), Lane()
        with suppress(OSError):
            await asyncio.gather(
                _take(reader, up, delay, rate), _give(far_writer, up),
                _take(far_reader, down, delay, rate), _give(writer, down),
            )  # fmt: skip

    server = await asyncio.start_server(join, "127.0.0.1", 0, limit=BLOCK)
    print(f"127.0.0.1:{server.sockets[0].getsockname()[1]}", flush=True)
    await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(_serve(sys.argv[1], float(sys.argv[2]), float(sys.argv[3])))
