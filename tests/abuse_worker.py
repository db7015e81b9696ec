"""A client with a good certificate that abuses a party, in a process of its own. Ends when its input does.

Run as `python abuse_worker.py ADDRESS KEYS NAME TERMS MODE...`; it prints a line when all of its modes are at work, and
at its end a line of JSON with what came of them. It is nice to others, as a machine elsewhere would be.
"""

from __future__ import annotations

import collections
import json
import os
import socket
import ssl
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import grpc
import msgspec
import torch

from noren.errors import NorenError, from_wire
from noren.types import PROTOCOL, Forward, Hello, Message, Terms, Welcome
from noren.wire.envelope import pack
from noren.wire.grpc_link import CODE_HEADER, KEY_HEADER, METHOD, GrpcLink
from noren.wire.identity import Credentials
from noren.wire.seal import Seal, new_key
from noren.wire.settings import Wire

ALONE = [("grpc.use_local_subchannel_pool", 1)]
LINES = 25
"""Lines that one thread holds half open."""


class Abuser:
    """What one client does to a party, in threads, until `over`. `outcomes` counts what came of it."""

    def __init__(self, address: str, credentials: Credentials, terms: Terms, tokens: int, width: int) -> None:
        self.address, self.credentials, self.terms = address, credentials, terms
        self.tokens, self.width = tokens, width
        self.over = threading.Event()
        self.outcomes: collections.Counter[str] = collections.Counter()
        self.threads: list[threading.Thread] = []
        self._resume: dict[str, str] = {}
        self._runs, self._kept = threading.RLock(), list[GrpcLink]()

    def begin(self, work: Callable[[int], None], count: int) -> None:
        """Run `work(number)` again and again in `count` threads."""

        def again(number: int) -> None:
            while not self.over.is_set():
                try:
                    work(number)
                except Exception as error:
                    self.outcomes[f"{work.__name__}: {type(error).__name__}"] += 1
                self.over.wait(0.05)

        self.threads += [threading.Thread(target=again, args=(n,), daemon=True) for n in range(count)]
        for thread in self.threads[-count:]:
            thread.start()

    def hello(self, run: str) -> Message:
        """To go on with a run; it begins if there is none."""
        with self._runs:
            if run not in self._resume:
                self._resume[run] = ""
                first = self.link(run)
                meta = first.connect().meta
                assert isinstance(meta, Welcome)
                self._resume[run] = meta.incarnation
                self._kept.append(first)
            return Message(Hello(protocol=PROTOCOL, run=run, terms=self.terms, resume=self._resume[run]))

    def forward(self, session: str, tokens: int, start: int = 0) -> Message:
        meta = Forward(session=session, start=start, lengths=[tokens], padding="left")
        return Message(meta, {"hidden": torch.ones(tokens, self.width)})

    def loris(self, number: int) -> None:
        """Ten streams of one connection: each says hello, begins a message of which one byte comes, and waits."""
        with grpc.secure_channel(self.address, self.credentials.client(), ALONE) as channel:
            streams = []
            for _ in range(10):
                key = new_key()
                seal = Seal(key, client=True)
                frames = [*pack(self.hello("abuse0")).frames(1, seal)]
                whole = b"".join(pack(self.forward("", self.tokens)).frames(2, seal))
                body = self.tokens * self.width * 4 + 16
                frames.append(whole[: len(whole) - body + 1])

                def one(frames: list[bytes] = frames) -> Iterator[bytes]:
                    yield from frames
                    self.over.wait()

                streams.append(channel.stream_stream(METHOD)(one(), metadata=((KEY_HEADER, key),), timeout=30))
            for stream in streams:
                try:
                    for _ in stream:
                        pass
                except grpc.RpcError as error:
                    self.count("loris", error)
            self.over.wait(0.5)

    def count(self, what: str, error: grpc.RpcError) -> None:
        sent = dict(error.trailing_metadata() or ()).get(CODE_HEADER)
        name = error.code().name if sent is None else type(from_wire(str(sent), "", "")).__name__
        self.outcomes[f"{what}: {name}"] += 1

    def half_open(self, number: int) -> None:
        """Many connections: some say nothing, some half a greeting of TLS, some nothing once it is finished."""
        host, _, port = self.address.rpartition(":")
        context = ssl.create_default_context(cafile=str(self.credentials.ca))
        context.load_cert_chain(self.credentials.certificate, self.credentials.key)
        context.set_alpn_protocols(["h2"])
        lines: list[socket.socket] = []
        with suppress(OSError):
            for place in range(LINES):
                line = socket.create_connection((host, int(port)), timeout=10)
                if place % 3 == 1:
                    line.sendall(b"\x16\x03\x01\x02\x00\x01\x00")
                elif place % 3 == 2:
                    line = context.wrap_socket(line, server_hostname="localhost")
                lines.append(line)
        self.outcomes["half_open: opened"] += len(lines)
        while lines and not self.over.wait(0.2):
            for line in lines[:]:
                line.settimeout(0.001)
                try:
                    ended = not line.recv(1 << 16)
                except TimeoutError:
                    continue
                except OSError:
                    ended = True
                if ended:
                    self.outcomes["half_open: ended"] += 1
                    lines.remove(line)
        for line in lines:
            line.close()

    def link(self, run: str) -> GrpcLink:
        return GrpcLink(self.address, self.credentials, greet=lambda: self.hello(run), wire=Wire(patience_seconds=0.1))

    def hog(self, number: int) -> None:
        """Sessions without end, each as long as may be, and none of them ended."""
        link = self.link(f"abuse{number % 4}")
        try:
            for session in range(1_000_000):
                if self.over.is_set():
                    break
                link(self.forward(f"{number}-{session}-{time.monotonic()}", self.tokens))
                self.outcomes["hog: sessions"] += 1
        finally:
            link.close()

    def flood(self, number: int) -> None:
        """The largest messages that may be sent, one after another."""
        link = self.link(f"abuse{number % 4}")
        message = self.forward("", self.tokens)
        try:
            while not self.over.is_set():
                link(message)
                self.outcomes["flood: answered"] += 1
        finally:
            link.close()

    def too_large(self, number: int) -> None:
        """Messages larger than may be."""
        link = self.link(f"abuse{number % 4}")
        try:
            link(self.forward("", self.tokens * 4))
        except NorenError as error:
            self.outcomes[f"too_large: {type(error).__name__}"] += 1
        finally:
            link.close()


def main() -> None:
    address, keys, name, about, *modes = sys.argv[1:]
    os.nice(19)
    torch.set_num_threads(1)
    folder, said = Path(keys), json.loads(about)
    credentials = Credentials(ca=folder / "ca.crt", certificate=folder / f"{name}.crt", key=folder / f"{name}.key")
    abuser = Abuser(
        address, credentials, msgspec.convert(said["terms"], Terms), int(said["tokens"]), int(said["width"])
    )
    for mode in modes:
        what, _, count = mode.partition("=")
        abuser.begin(getattr(abuser, what), int(count))
        time.sleep(0.3)  # the first are not kept out by those that come later
    time.sleep(1.0)
    print("at work", flush=True)
    sys.stdin.read()
    abuser.over.set()
    end = time.monotonic() + 5
    for thread in abuser.threads:
        thread.join(max(0.0, end - time.monotonic()))
    print(json.dumps(dict(abuser.outcomes)), flush=True)  # of a copy: some may be at work still
    os._exit(0)


if __name__ == "__main__":
    main()
