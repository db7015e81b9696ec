"""What an edge sends along with a step: its adapter and moments, for whoever takes its place."""

from __future__ import annotations

from torch import Tensor

from noren.types import KEPT, Message


def split_kept(message: Message) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return (state of the parties before, by its names, the other tensors) of a message."""
    kept = {name.removeprefix(KEPT): tensor for name, tensor in message.tensors.items() if name.startswith(KEPT)}
    return kept, {name: tensor for name, tensor in message.tensors.items() if not name.startswith(KEPT)}


def as_kept(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return a party's state under the names by which it goes along with a step."""
    return {f"{KEPT}{name}": tensor for name, tensor in sorted(state.items())}  # one order: a request has one digest
