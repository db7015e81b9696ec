"""Two machines in one: a pair of network namespaces joined by a cable, for tests that need real packets to go missing.

    with Namespaces(rate="1mbit") as net:       # root only; skips the test elsewhere
        server = net.run(net.left, [sys.executable, "server.py", net.left.address])
        client = net.run(net.right, [sys.executable, "client.py", net.left.address])
        net.partition(net.left)                 # what left sends is lost, without a word to anyone
        net.heal()

Whatever was started is ended and the namespaces are removed on leaving, also after an error. Those of a test process
that was killed are removed by the next one.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import re
import signal
import subprocess
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import pytest

DEVICE = "veth0"
NOWHERE = "02:00:00:00:00:99"
"""A hardware address that nobody has: what is sent to it is lost."""
_numbers = itertools.count()


@dataclass(frozen=True)
class Namespace:
    """One of the two: its name for `ip netns`, its address, and its cable's hardware address."""

    name: str
    address: str
    hardware: str


class Namespaces:
    """A context manager: namespaces `left` and `right`, each with its address on the cable between them.

    `rate` (as tc writes it, e.g. "1mbit") limits what each end sends, by a token bucket.
    """

    def __init__(self, rate: str | None = None) -> None:
        stem = f"noren-{os.getpid()}-{next(_numbers)}"
        self.left = Namespace(f"{stem}l", "10.213.0.1", "02:00:00:00:00:01")
        self.right = Namespace(f"{stem}r", "10.213.0.2", "02:00:00:00:00:02")
        self._rate = rate
        self._running: list[subprocess.Popen[Any]] = []

    def __enter__(self) -> Self:
        remove_left_behind()
        try:
            for end in (self.left, self.right):
                _ip("netns", "add", end.name)
        except (OSError, subprocess.CalledProcessError) as error:
            self._remove()
            pytest.skip(f"network namespaces cannot be made here: {_reason(error)}")
        try:
            _ip(*f"link add {DEVICE} netns {self.left.name} type veth".split(),
                *f"peer name {DEVICE} netns {self.right.name}".split())  # fmt: skip
            for end in (self.left, self.right):
                self._inside(end, f"link set {DEVICE} address {end.hardware}")
                self._inside(end, f"addr add {end.address}/24 dev {DEVICE}")
                self._inside(end, "link set lo up")
                self._inside(end, f"link set {DEVICE} up")
            self.heal()
            self.rate(self._rate)
        except BaseException:
            self._remove()
            raise
        return self

    def __exit__(self, *exc: object) -> None:
        self._remove()

    def run(self, where: Namespace, argv: Sequence[str], **options: Any) -> subprocess.Popen[Any]:
        """Start a process in one of the namespaces; `options` are those of Popen. It is ended with the namespaces."""
        process = subprocess.Popen(["ip", "netns", "exec", where.name, *argv], **options)
        self._running.append(process)
        return process

    def rate(self, rate: str | None) -> None:
        """Limit what each end sends from now on ("1mbit", "256kbit"), or None: do not."""
        for end in (self.left, self.right):
            if rate is not None:
                _tc(end, f"qdisc replace dev {DEVICE} root tbf rate {rate} burst 16kb latency 400ms")
            elif "tbf" in _tc(end, f"qdisc show dev {DEVICE}"):
                _tc(end, f"qdisc del dev {DEVICE} root")

    def partition(self, *ends: Namespace) -> None:
        """Lose all that these ends send (both, if none is named). Connections stay; nobody is told."""
        for end in ends or (self.left, self.right):
            self._neighbour(end, NOWHERE)

    def heal(self) -> None:
        """End every partition."""
        for end in (self.left, self.right):
            self._neighbour(end, self._peer(end).hardware)

    def _peer(self, end: Namespace) -> Namespace:
        return self.right if end == self.left else self.left

    def _neighbour(self, end: Namespace, hardware: str) -> None:
        self._inside(end, f"neigh replace {self._peer(end).address} lladdr {hardware} nud permanent dev {DEVICE}")

    def _inside(self, end: Namespace, words: str) -> None:
        _ip("-n", end.name, *words.split())

    def _inhabitants(self, end: Namespace) -> list[int]:
        """The processes in a namespace: those that were started, and theirs."""
        try:
            return [int(word) for word in _ip("netns", "pids", end.name).split()]
        except (OSError, subprocess.CalledProcessError):  # it was not made
            return []

    def _remove(self) -> None:
        for pid in (*self._inhabitants(self.left), *self._inhabitants(self.right)):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        for process in self._running:
            process.kill()
        for process in self._running:
            process.wait()
            for stream in (process.stdin, process.stdout, process.stderr):
                if stream is not None:
                    stream.close()
        _remove(end.name for end in (self.left, self.right))


def remove_left_behind() -> None:
    """Remove the namespaces of test processes that are no more."""
    with contextlib.suppress(OSError):
        names = [path.name for path in Path("/run/netns").iterdir()]
        found = ((name, re.fullmatch(r"noren-(\d+)-\d+[lr]", name)) for name in names)
        _remove(name for name, match in found if match and not Path(f"/proc/{match[1]}").exists())


def _remove(names: Iterable[str]) -> None:
    for name in names:
        with contextlib.suppress(OSError, subprocess.CalledProcessError):
            _ip("netns", "del", name)


def _ip(*words: str) -> str:
    return _output("ip", *words)


def _tc(end: Namespace, words: str) -> str:
    return _output("tc", "-n", end.name, *words.split())


def _output(*argv: str) -> str:
    return subprocess.run(argv, check=True, capture_output=True, text=True).stdout


def _reason(error: Exception) -> str:
    said = error.stderr.strip() if isinstance(error, subprocess.CalledProcessError) else ""
    return said or str(error)
