"""The time, by which certificates begin and end."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

CLOCK_SKEW = timedelta(minutes=5)
"""Certificates begin this much early, for peers whose clocks are behind."""


def now() -> datetime:
    """Return this machine's time, in UTC."""
    return datetime.now(UTC)


def date(moment: datetime) -> str:
    """Return a moment as people read it."""
    return f"{moment:%Y-%m-%d %H:%M} UTC"
