"""Plan: which party holds which layers of a model.

A plan is a chain of contiguous spans that covers every layer once, in order. The first span's party owns the data
(the *client*). If the last span is the client's too, the plan is U-shaped: embedding, first layers, last layers, head,
labels and loss stay with the client. If it is another party's, the plan is head-tail: that party holds the head and
returns its raw output; labels and loss still stay with the client.

Written as text: `client :2, server 2:-2, client -2:`. Ends are half-open as in Python slices, negative ones count from
the last layer, and a missing one is the model's first or last.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

from noren.errors import PlanError

_SPAN = re.compile(r"^\s*(?P<party>[a-z0-9][a-z0-9-]{0,62})\s+(?P<start>-?\d+)?\s*:\s*(?P<end>-?\d+)?\s*$")
EXAMPLE = '"client :2, server 2:-2, client -2:"'


@dataclass(frozen=True)
class Span:
    """Layers `start` (included) to `end` (excluded) of one party, counted from 0."""

    party: str
    start: int
    end: int

    def __len__(self) -> int:
        return self.end - self.start

    def __str__(self) -> str:
        return f"{self.party} {self.start}:{self.end}"


@dataclass(frozen=True)
class Plan:
    """A checked cut of a model of `layers` layers. Build it with `Plan.parse`."""

    spans: tuple[Span, ...]
    layers: int

    @classmethod
    def parse(cls, text: str | Iterable[str], layers: int) -> Plan:
        """Read a plan, given the number of layers of the model.

        Raises PlanError for text that is not a plan, a gap, an overlap, layers out of range, a party with two spans
        that is not the client, or a plan in which nothing is remote.
        """
        parts = text.split(",") if isinstance(text, str) else list(text)
        spans: list[Span] = []
        for part in parts:
            match = _SPAN.match(part)
            if match is None:
                raise PlanError(f"plan: {part.strip()!r} is not 'PARTY START:END'; write a plan like {EXAMPLE}")
            start = _resolve(match["start"], 0, layers, part)
            end = _resolve(match["end"], layers, layers, part)
            if end < start:
                raise PlanError(f"plan: {part.strip()!r} ends before it starts (layers {start} to {end})")
            spans.append(Span(match["party"], start, end))
        plan = cls(tuple(spans), layers)
        plan._check()
        return plan

    def _check(self) -> None:
        whole = f"layers 0 to {self.layers}"
        if len(self.spans) < 2:
            raise PlanError(f"plan: {self} has {len(self.spans)} span; a cut needs at least two, like {EXAMPLE}")
        position = 0
        for span in self.spans:
            if span.start > position:
                raise PlanError(f"plan: gap: nobody holds layers {position}:{span.start} (before '{span}'), of {whole}")
            if span.start < position:
                raise PlanError(
                    f"plan: overlap: layers {span.start}:{min(position, span.end)} are held twice ('{span}' begins "
                    f"before layer {position}), of {whole}"
                )
            position = span.end
        if position != self.layers:
            raise PlanError(f"plan: gap: nobody holds layers {position}:{self.layers}, of {whole}")
        for i, span in enumerate(self.spans):
            inner = 0 < i < len(self.spans) - 1
            if inner and span.party == self.client:
                raise PlanError(f"plan: '{span}': the client '{self.client}' may hold the first and the last span only")
            if not len(span) and (inner or span.party != self.client):
                raise PlanError(f"plan: '{span}' holds no layers; leave it out")
        names = [span.party for span in self.remote]
        if not names:
            raise PlanError(f"plan: {self} leaves nothing to another party; a cut looks like {EXAMPLE}")
        if twice := {name for name in names if names.count(name) > 1}:
            raise PlanError(f"plan: {', '.join(sorted(twice))}: a remote party may hold one span only")

    @property
    def client(self) -> str:
        """The party that owns the data."""
        return self.spans[0].party

    @property
    def u_shaped(self) -> bool:
        """Whether the client also holds the last layers and the head."""
        return self.spans[-1].party == self.client

    @cached_property
    def remote(self) -> tuple[Span, ...]:
        """The spans that are not the client's, in the order in which an activation passes them."""
        return tuple(span for span in self.spans if span.party != self.client)

    @property
    def parties(self) -> tuple[str, ...]:
        """All parties, the client first, in the order of the plan."""
        return (self.client, *(span.party for span in self.remote))

    def kept(self, party: str) -> list[int]:
        """The layers that `party` holds, as indices into the whole model. Raises PlanError for an unknown party."""
        if party not in self.parties:
            raise PlanError(f"plan: no party {party!r} in '{self}'; parties are {', '.join(self.parties)}")
        return [i for span in self.spans if span.party == party for i in range(span.start, span.end)]

    def holds_embedding(self, party: str) -> bool:
        """Whether `party` holds the token embedding."""
        return party == self.client

    def holds_head(self, party: str) -> bool:
        """Whether `party` holds the final norm and the head."""
        return party == self.spans[-1].party

    def lines(self) -> list[str]:
        """The plan with every end resolved, one string a span; `parse` reads it back."""
        return [str(span) for span in self.spans]

    def __str__(self) -> str:
        return ", ".join(self.lines())


def _resolve(text: str | None, default: int, layers: int, part: str) -> int:
    if text is None:
        return default
    value = int(text)
    resolved = value + layers if value < 0 or text.startswith("-") else value
    if not 0 <= resolved <= layers:
        raise PlanError(f"plan: {part.strip()!r}: {value} is out of range, the model has {layers} layers")
    return resolved
