"""What a process took: memory, seen from inside or outside."""

from __future__ import annotations

import ctypes
import sys
from pathlib import Path

import psutil

SLACK = 8 << 20
"""Bytes by which a process may grow before what its heap does not need is looked for."""


def peak_memory(pid: int | None = None) -> int:
    """Return the peak resident memory of a process in bytes (this one by default).

    Where the system does not tell a peak (other than Linux), the memory resident now.
    """
    status = Path(f"/proc/{pid or 'self'}/status")
    if status.is_file():
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return int(psutil.Process(pid).memory_info().rss)


def current_memory() -> int:
    """Return the memory of this process that is resident now, in bytes."""
    return int(psutil.Process().memory_info().rss)


def private_memory(pid: int | None = None) -> int:
    """Return the memory in bytes that a process (this one by default) shares with no other: Linux only.

    Pages of a file that several processes have mapped, such as weights, are not in it.
    """
    rollup = Path(f"/proc/{pid or 'self'}/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) * 1024 for line in rollup if line.startswith("Private_"))


class Heap:
    """Gives back to the system what the C library's heap keeps of freed memory (glibc; elsewhere it does nothing).

    glibc gives back only what lies above all that is in use. Where things that stay are made between large ones that go
    again, as adapters between activations, it keeps most of what was ever in use at once.
    """

    def __init__(self, slack: int = SLACK) -> None:
        self._slack, self._least = slack, 0
        self._trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None

    def trim(self) -> None:
        """Give back what is free, if the process has grown by more than `slack` since the last time."""
        if self._trim is not None and current_memory() - self._least > self._slack:
            self._trim(0)
            self._least = current_memory()
