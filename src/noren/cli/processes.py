"""The processes that a demonstration starts, and ends."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path


def start(arguments: list[str], log: Path) -> subprocess.Popen[str]:
    """Start a Python process whose stdout is read, whose stderr goes to a log, with one compute thread."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    with log.open("w") as words:
        return subprocess.Popen(
            [sys.executable, *arguments], stdout=subprocess.PIPE, stderr=words, text=True, env=environment
        )


def end(process: subprocess.Popen[str]) -> None:
    """End a process: asked first, then made to."""
    process.terminate()
    try:
        process.wait(timeout=5)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def last_words(log: Path) -> str:
    """Say what a process that failed wrote last."""
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return f"its last words: {lines[-1] if lines else 'none'} (all of them: {log})"


def peak(pid: int) -> int:
    """Peak memory of a process, in bytes."""
    from noren.metrics import peak_memory

    return peak_memory(pid)
