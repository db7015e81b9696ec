"""What a process took: memory, seen from inside or outside."""

from __future__ import annotations

from pathlib import Path

import psutil


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
