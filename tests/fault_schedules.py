"""Seeded schedules of faults: what goes wrong on a line, at which byte or second, and for how long."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any, Literal

KINDS = ("delay", "rate", "slice", "black_hole", "reset", "half_open")
"""What a schedule can hold."""


@dataclass(frozen=True)
class Fault:
    """One fault: `setting` kinds hold `value` for `seconds`; "reset" and "half_open" happen once (value None)."""

    kind: str
    moment: float
    unit: Literal["bytes", "seconds"]
    value: float | int | str | None = None
    seconds: float = 0.0

    def __str__(self) -> str:
        at = f"at byte {self.moment:.0f}" if self.unit == "bytes" else f"at {self.moment:.3f} s"
        return f"{at} {self.kind}" if self.value is None else f"{at} {self.kind}={self.value} for {self.seconds:.3f} s"


class Schedule:
    """A random sequence of faults, the same for the same arguments; print it, so that a failing seed can be repeated.

    Half of the moments are bytes (of both directions together, below `within_bytes`), half are seconds (below
    `within_seconds`). Each lasts at most `longest` seconds, so that a line is whole again in the end.
    """

    def __init__(
        self,
        seed: int,
        *,
        count: int = 4,
        kinds: tuple[str, ...] = KINDS,
        within_bytes: int = 100_000,
        within_seconds: float = 2.0,
        longest: float = 0.5,
    ) -> None:
        if unknown := set(kinds) - set(KINDS):
            raise ValueError(f"no such kinds of fault: {sorted(unknown)}; there are {', '.join(KINDS)}")
        self.seed = seed
        self._arguments = f"count={count}, {kinds=}, {within_bytes=}, {within_seconds=}, {longest=}"
        draw = random.Random(seed)
        self.faults = tuple(self._draw(draw, kinds, within_bytes, within_seconds, longest) for _ in range(count))

    @staticmethod
    def _draw(
        draw: random.Random, kinds: tuple[str, ...], within_bytes: int, within_seconds: float, longest: float
    ) -> Fault:
        kind = draw.choice(kinds)
        values: dict[str, Any] = {
            "delay": round(draw.uniform(0.005, 0.2), 3),
            "rate": draw.choice([20_000, 125_000, 1_000_000]),
            "slice": draw.choice([1, 7, 100]),
            "black_hole": draw.choice(["up", "down", "both"]),
        }
        seconds = round(draw.uniform(0.02, longest), 3) if longest > 0.02 else longest
        at_bytes, at_seconds = draw.randint(1, within_bytes), round(draw.uniform(0, within_seconds), 3)
        moment, unit = draw.choice([(at_bytes, "bytes"), (at_seconds, "seconds")])
        value = values.get(kind)
        return Fault(kind, moment, unit, value, 0.0 if value is None else seconds)  # type: ignore[arg-type]

    def __str__(self) -> str:
        return f"Schedule(seed={self.seed}, {self._arguments}): " + "; ".join(map(str, self.faults))
