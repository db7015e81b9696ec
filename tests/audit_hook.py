"""Writes down what a process makes into code or objects: unpickling, unmarshalling, compiling, executing.

Importing this module installs an audit hook for the rest of the process and for all that it forks. It is silent until
the environment names a file in NOREN_AUDIT; then each event is one line of JSON in it: the process, the event, what it
was about, and the functions that led to it, innermost first.
"""

from __future__ import annotations

import json
import os
import sys
import threading
from types import CodeType
from typing import Any

EVENTS = frozenset({"pickle.find_class", "marshal.loads", "marshal.load", "exec", "compile"})
DEPTH = 200
_busy = threading.local()


def _subject(event: str, args: tuple[Any, ...]) -> str:
    """What an event is about, in words."""
    if event == "exec" and args and isinstance(args[0], CodeType):
        return f"{args[0].co_filename}:{args[0].co_name}"
    if event == "compile":
        source, name = (*args, None, None)[:2]
        return f"{name}: {source if isinstance(source, str) else type(source).__name__:.60}"
    if event == "pickle.find_class":
        return ".".join(map(str, args))
    return f"{len(args[0])} bytes" if args and isinstance(args[0], bytes) else ""


def _note(event: str, args: tuple[Any, ...]) -> None:
    if event not in EVENTS or not (place := os.environ.get("NOREN_AUDIT")) or getattr(_busy, "now", False):
        return
    _busy.now = True
    try:
        frame, stack = sys._getframe(1), list[str]()
        while frame is not None and len(stack) < DEPTH:
            stack.append(f"{frame.f_code.co_filename}:{frame.f_code.co_name}")
            frame = frame.f_back  # type: ignore[assignment]
        line = {"process": os.getpid(), "event": event, "subject": _subject(event, args), "stack": stack}
        file = os.open(place, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        try:
            os.write(file, (json.dumps(line) + "\n").encode())
        finally:
            os.close(file)
    finally:
        _busy.now = False


sys.addaudithook(_note)
