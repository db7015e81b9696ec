"""Counting what crosses: messages and bytes, by kind and direction."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field


@dataclass
class Traffic:
    """What one link has carried. Bytes are those of Noren's own frames (headers included, gRPC's and TLS's not)."""

    sent_bytes: int = 0
    received_bytes: int = 0
    round_trips: int = 0
    by_kind: Counter[str] = field(default_factory=Counter)  # requests

    def note(self, kind: str, sent: int, received: int) -> None:
        """Count one request and its answer."""
        self.sent_bytes += sent
        self.received_bytes += received
        self.round_trips += 1
        self.by_kind[kind] += 1

    @property
    def total_bytes(self) -> int:
        """Bytes both ways."""
        return self.sent_bytes + self.received_bytes

    def since(self, earlier: Traffic) -> Traffic:
        """What was carried after `earlier` (a `copy` of this)."""
        return Traffic(
            self.sent_bytes - earlier.sent_bytes,
            self.received_bytes - earlier.received_bytes,
            self.round_trips - earlier.round_trips,
            self.by_kind - earlier.by_kind,
        )

    def copy(self) -> Traffic:
        """The counts so far."""
        return Traffic(self.sent_bytes, self.received_bytes, self.round_trips, Counter(self.by_kind))
