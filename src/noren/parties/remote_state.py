"""Where a client's run stands at the remote parties: their adapters for a checkpoint, its position for a journal."""

from __future__ import annotations

from typing import Protocol

import msgspec
from torch import Tensor

from noren.partition.remote import RemoteSpan
from noren.privacy.release import Releases
from noren.training.loop import Remote
from noren.types import Update, Welcome


class Client(Protocol):
    """What this needs of a client (see client.Client)."""

    span: RemoteSpan
    releases: Releases
    welcome: Welcome

    def pull(self, *, optimizer: bool) -> dict[str, Tensor]:
        """Return the remote adapters, and moments."""

    def push(self, tensors: dict[str, Tensor], step: int) -> None:
        """Set them."""


class RemoteState(Remote):
    """The remote parties of one client's run, for the training loop."""

    def __init__(self, client: Client) -> None:
        self._client = client

    def pull(self) -> dict[str, Tensor]:
        """Return adapters and optimiser moments of the remote stages."""
        return self._client.pull(optimizer=True)

    def push(self, tensors: dict[str, Tensor], step: int) -> None:
        """Set what `pull` returned."""
        self._client.push(tensors, step)

    def flush(self) -> None:
        """Send a step that waits."""
        self._client.span.flush()

    def samples(self, numbers: list[int]) -> None:
        """Say which rows the next forward pass is of."""
        self._client.releases.samples = numbers

    def position(self) -> bytes:
        """Return where the run stands."""
        client, steps = self._client, self._client.span.steps
        return msgspec.json.encode(_Position(client.welcome.incarnation, steps.applied, steps.pending))

    def go_on(self, position: bytes) -> bool:
        """Go on from there; False if the remote parties hold another state by now."""
        client, was = self._client, msgspec.json.decode(position, type=_Position)
        ahead = was.applied + (was.pending is not None and was.pending.optimizer is not None)
        if client.welcome.incarnation != was.incarnation or not was.applied <= client.welcome.step <= ahead:
            return False
        client.span.steps.restart(was.applied, was.pending)
        return True


class _Position(msgspec.Struct, frozen=True):
    """Where a run stands at the remote parties."""

    incarnation: str
    applied: int
    pending: Update | None


def incarnation_of(position: bytes) -> str:
    """The resume token in a kept position."""
    return msgspec.json.decode(position, type=_Position).incarnation
