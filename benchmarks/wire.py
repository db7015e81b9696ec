"""Round trips over a link with mutual TLS, against a bare gRPC echo of the same bytes; codecs: bytes and error.

    python benchmarks/wire.py

The bare echo is gRPC's own stream of the same frames between the same two processes, with the same certificates, but
nothing of Noren: no header, no checks, no tag. The two are measured in turn. Codecs run on activations of the
embedded model's third layer for its own notes.
"""

from __future__ import annotations

import json
import queue
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import _rig
import grpc
import torch

from noren.embedded import MODEL_DIR
from noren.types import Forward, Hidden, Message
from noren.wire.codecs import CODECS
from noren.wire.envelope import pack
from noren.wire.grpc_link import GrpcLink, options
from noren.wire.grpc_server import GrpcServer
from noren.wire.identity import Credentials, Identity, ensure
from noren.wire.seal import Seal, new_key

SIZES = {"8KiB": (8 << 10, 400, 7), "16MiB": (16 << 20, 12, 7)}  # bytes, round trips in a turn, turns
KEEPALIVE = 10.0


class Echo:
    """A Handler that sends back what it gets."""

    codecs, in_run = ("raw", "raw"), True

    def __init__(self, owner: Identity) -> None:
        self.owner = owner

    def __call__(self, message: Message) -> Message:
        """Answer with the same."""
        return Message(Hidden(), message.tensors)

    def expect(self, header: Any) -> None:
        """Take everything."""

    def disconnect(self) -> None:
        """Nothing to do."""


def message(size: int) -> Message:
    rows = size // (4 * 512)
    return Message(Forward(session="s", start=0, lengths=[rows], padding="left"), {"hidden": torch.randn(rows, 512)})


def serve(keys: Path) -> None:
    """The far process: both servers, until stdin ends."""
    credentials = ensure(keys, "server", "server")
    bare = grpc.server(ThreadPoolExecutor(8), options=options(KEEPALIVE))
    handler = grpc.stream_stream_rpc_method_handler(_echo)
    bare.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("bare", {"echo": handler}),))
    port = bare.add_secure_port("127.0.0.1:0", credentials.server())
    bare.start()
    with GrpcServer("127.0.0.1:0", credentials, Echo, keepalive=KEEPALIVE) as server:
        print(json.dumps({"noren": server.port, "bare": port}), flush=True)
        sys.stdin.read()
    bare.stop(0)


def _echo(requests: Iterator[bytes], context: grpc.ServicerContext) -> Iterator[bytes]:
    for first in requests:
        count = int.from_bytes(first[:4], "little")
        frames = [first, *(next(requests) for _ in range(count - 1))]
        yield from frames


class Bare:
    """gRPC's own client of the bare echo."""

    def __init__(self, address: str, credentials: Credentials) -> None:
        self._channel = grpc.secure_channel(address, credentials.client(), options(KEEPALIVE))
        self._frames: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self._stream: Any = self._channel.stream_stream("/bare/echo")(iter(self._frames.get, None))

    def __call__(self, frames: list[bytes]) -> None:
        """Send frames, and take as many."""
        for frame in frames:
            self._frames.put(frame)
        for _ in frames:
            next(self._stream)

    def close(self) -> None:
        """End the stream."""
        self._frames.put(None)
        self._channel.close()


def timed(call: Callable[[], Any], count: int) -> list[float]:
    times = []
    for _ in range(count):
        started = time.perf_counter()
        call()
        times.append(time.perf_counter() - started)
    return times


@contextmanager
def far_process(keys: Path) -> Iterator[dict[str, int]]:
    process = subprocess.Popen(
        [sys.executable, __file__, "serve", str(keys)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None and process.stdin is not None
        yield json.loads(process.stdout.readline())
    finally:
        process.communicate(timeout=20)


def round_trips() -> dict[str, Any]:
    """Medians and 99th percentiles, and the ratio against the bare echo: the median over turns."""
    out: dict[str, Any] = {}
    with _rig.scratch() as folder:
        keys = Path(folder) / "keys"
        credentials = ensure(keys, "client", "client")
        ensure(keys, "server", "server")
        with far_process(keys) as ports:
            link = GrpcLink(f"127.0.0.1:{ports['noren']}", credentials)
            bare = Bare(f"127.0.0.1:{ports['bare']}", credentials)
            for name, (size, count, turns) in SIZES.items():
                asked = message(size)
                frames = list(pack(asked).frames(1, Seal(new_key(), client=True)))
                same = [len(frames).to_bytes(4, "little") + frames[0][4:], *frames[1:]]
                link(asked)
                bare(same)
                pairs = [(timed(partial(link, asked), count), timed(partial(bare, same), count)) for _ in range(turns)]
                ours, theirs = [t for a, _ in pairs for t in a], [t for _, b in pairs for t in b]
                out |= {
                    f"rtt_{name}_ms": 1e3 * statistics.median(ours),
                    f"rtt_{name}_p99_ms": 1e3 * statistics.quantiles(ours, n=100)[98],
                    f"bare_{name}_ms": 1e3 * statistics.median(theirs),
                    f"bare_{name}_p99_ms": 1e3 * statistics.quantiles(theirs, n=100)[98],
                    f"rtt_{name}_ratio": _rig.median_ratio(
                        [statistics.median(a) for a, _ in pairs], [statistics.median(b) for _, b in pairs]
                    ),
                }
                if size > 1 << 20:
                    out["megabytes_per_second"] = 2 * size / 1e6 / statistics.median(ours)
            link.close()
            bare.close()
    return out


def codecs() -> dict[str, Any]:
    """For each codec: bytes of a number, relative error (L2), and ms to encode and decode, on real activations."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from noren.embedded.notes import SITES, notes

    tokenizer, model = AutoTokenizer.from_pretrained(MODEL_DIR), AutoModelForCausalLM.from_pretrained(MODEL_DIR)
    texts = [note.text for site in SITES for note in notes(site, 16, seed=1)]
    rows = []
    with torch.no_grad():
        for text in texts:
            rows.append(model(**tokenizer(text, return_tensors="pt"), output_hidden_states=True).hidden_states[2][0])
    hidden = torch.cat(rows)[:1024].contiguous()
    out = {}
    for name, codec in CODECS.items():
        payload = codec.encode(hidden)
        back = codec.decode(payload, list(hidden.shape), hidden.dtype)
        out[name] = {
            "bytes_per_value": round(len(payload) / hidden.numel(), 4),
            "relative_error": float(f"{float((back - hidden).norm() / hidden.norm()):.3g}"),
            "encode_ms": round(1e3 * statistics.median(timed(lambda c=codec: c.encode(hidden), 9)), 3),  # type: ignore[misc]
            "decode_ms": round(
                1e3 * statistics.median(
                    timed(lambda c=codec, p=payload: c.decode(p, list(hidden.shape), hidden.dtype), 9)  # type: ignore[misc]
                ), 3,
            ),
        }  # fmt: skip
    return {"codec_input": list(hidden.shape), "codecs": out}


if __name__ == "__main__":
    if sys.argv[1:2] == ["serve"]:
        serve(Path(sys.argv[2]))
    else:
        _rig.show(**round_trips(), **codecs())
