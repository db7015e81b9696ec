"""The demonstration's watch at the client's door finds what may not cross."""

from __future__ import annotations

import pytest
import torch

from noren.cli.demo_worker import Watch
from noren.types import Backward, Forward, Hidden, Message

GOOD = torch.zeros(3, 4)


@pytest.mark.parametrize(
    ("tensor", "lengths", "found"),
    [
        (GOOD, [3], ""),
        (torch.zeros(3, 4, dtype=torch.int64), [3], "token ids"),
        (torch.zeros(3, 9), [3], "logits"),
        (torch.zeros(3, 1, 4), [3], "padding"),
        (GOOD, [2], "padding"),
    ],
)
def test_the_watch_finds_what_may_not_cross(tensor: torch.Tensor, lengths: list[int], found: str) -> None:
    watch = Watch(hidden_size=4)
    message = Message(Forward(session="s", start=0, lengths=lengths, padding="left"), {"hidden": tensor})
    watch(message, lambda sent: Message(Hidden(), {"hidden": GOOD}))
    assert bool(watch.found) == bool(found)
    assert all(found in sentence for sentence in watch.found)


def test_the_watch_looks_at_lists_too() -> None:
    watch = Watch(hidden_size=4)
    message = Message(Backward(session=[5, 17]), {"gradient": GOOD})  # type: ignore[arg-type]
    watch(message, lambda sent: Message(Hidden(), {"hidden": GOOD}))
    assert watch.found == {"whole numbers in the field 'session'"}
