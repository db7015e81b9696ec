"""Logs: one line an event, as JSON or for people, that never hold what the parties compute on.

A line has the fields below and no others. Whatever else a record carries stays out: tensors, bytes, lists and objects
show as the name of their type; the text of an error that Noren did not raise itself shows as the error's name; what
looks like a key or like a list of numbers is cut out of any text; no text is longer than `LONGEST`.

    time level logger event             of every line; time in UTC, ISO 8601
    owner role run kind reason          who asked for what, and why it was refused: from `extra`
    seconds up down                     how long it took, bytes each way: from `extra`
    trace                               where an unexpected error was raised: its name, files, lines and functions
"""

from __future__ import annotations

import logging
import re
import sys
import traceback
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path, PurePath
from typing import Any, Final, TextIO

import msgspec

from noren.errors import ConfigError, NorenError

LONGEST: Final = 200
"""Characters of a text in a line."""

FIELDS: Final[dict[str, tuple[type, ...]]] = {
    "owner": (str,),
    "role": (str,),
    "run": (str,),
    "kind": (str,),
    "seconds": (int, float),
    "up": (int,),
    "down": (int,),
    "reason": (str,),
}
"""What a caller may add to a line with `extra`, and of which types. Anything else is left out."""

_READ: Final = 4_000  # characters of a text that are looked at
_KEY = re.compile(r"-----BEGIN [^-]{1,60}-----.*?(?:-----END [^-]{1,60}-----|\Z)", re.DOTALL)
_ENCODED = re.compile(r"[A-Za-z0-9+/]{48,}={0,2}")
_NUMBER = r"[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?"
_NUMBERS = re.compile(rf"{_NUMBER}(?:[\s,;\[\]()]+{_NUMBER}){{3,}}")
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]+")


def setup_logs(json: bool = False, level: int | str = "INFO", *, stream: TextIO | None = None) -> logging.Handler:
    """Write this process's logs to stderr (or `stream`), and return the handler that does it.

    Args:
        json: one JSON object a line; else a line for people.
        level: of Noren's own logs, e.g. "DEBUG"; those of libraries show from WARNING on, or from `level` if higher.
        stream: where to write.

    May be called again: it takes the place of what it, or `logging.basicConfig`, has set up. Raises ConfigError.
    """
    number = logging.getLevelNamesMapping().get(level.upper()) if isinstance(level, str) else level
    if number is None:
        raise ConfigError(f"log level {level!r} is unknown: choose DEBUG, INFO, WARNING or ERROR")
    root, own = logging.getLogger(), logging.getLogger("noren")
    for old in [h for h in root.handlers if isinstance(h, _Lines) or type(h) is logging.StreamHandler]:
        root.removeHandler(old)
    handler = _Lines(stream or sys.stderr)
    handler.setFormatter(Redacted(json=json))
    root.addHandler(handler)
    root.setLevel(max(number, logging.WARNING))
    own.setLevel(number)
    return handler


class _Lines(logging.StreamHandler[TextIO]):
    """A line that cannot be written is lost; logging's own complaint about it would print the record's arguments."""

    def handleError(self, record: logging.LogRecord) -> None:
        """Say that a line was lost, and no more."""
        if sys.__stderr__ is not None:
            sys.__stderr__.write("a log line could not be written\n")


class Redacted(logging.Formatter):
    """Makes a line of a record (see the head of this module)."""

    def __init__(self, *, json: bool) -> None:
        super().__init__()
        self._json = json

    def format(self, record: logging.LogRecord) -> str:
        """Return the line, without its end."""
        line = redact(record)
        if self._json:
            return msgspec.json.encode(line).decode()
        head = f"{line.pop('time')} {line.pop('level')} {line.pop('logger')}: {line.pop('event')}"
        return " ".join([head, *(f"{name}={value}" for name, value in line.items())])


def redact(record: logging.LogRecord) -> dict[str, str | int | float]:
    """Return what may be told of a record: field -> value."""
    line: dict[str, str | int | float] = {
        "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
        "level": record.levelname,
        "logger": told(record.name),
        "event": _event(record),
    }
    for name, types in FIELDS.items():
        value: Any = getattr(record, name, None)
        if type(value) in types:
            line[name] = told(value) if isinstance(value, str) else value
    if record.exc_info and record.exc_info[0] is not None:
        line["trace"] = _trace(record.exc_info[0], record.exc_info[2])
    return line


def told(text: str) -> str:
    """Return a text as it may stand in a line: without keys, lists of numbers and line ends, and not too long."""
    short = text[:_READ]
    for pattern, instead in ((_KEY, "<key>"), (_ENCODED, _encoded), (_NUMBERS, "<numbers>"), (_CONTROL, " ")):
        short = pattern.sub(instead, short)
    return short if len(short) <= LONGEST else short[: LONGEST - 1] + "…"


def _encoded(found: re.Match[str]) -> str:
    """Digests name things and stay; other long runs of letters and digits may be a key."""
    text = found[0]
    return text if re.fullmatch(r"[0-9a-f]{64}", text) else "<encoded>"


def _event(record: logging.LogRecord) -> str:
    template = record.msg if isinstance(record.msg, str) else str(_shown(record.msg))
    if not record.args:
        return told(template)
    values: Any = record.args
    shown = {k: _shown(v) for k, v in values.items()} if isinstance(values, Mapping) else tuple(map(_shown, values))
    try:
        return told(template % shown)
    except (TypeError, ValueError, KeyError):  # "%d" of what is no number
        return told(template)


def _shown(value: object) -> object:
    """A value of a record's message as it may be shown."""
    if value is None or type(value) in (bool, int, float):
        return value
    if isinstance(value, str | PurePath | NorenError):
        return told(str(value))
    return f"<{type(value).__name__}>"


def _trace(kind: type[BaseException], trace: Any) -> str:
    """Where an error was raised, innermost first. Its text is left out: it may hold data."""
    frames = traceback.extract_tb(trace)[::-1]
    return told(" < ".join([kind.__name__, *(f"{Path(f.filename).name}:{f.lineno} {f.name}" for f in frames)]))
