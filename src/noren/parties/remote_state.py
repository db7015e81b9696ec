"""Where a client's run stands at the remote parties: their adapters for a checkpoint, its position for a journal."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

import msgspec
import torch
from torch import Tensor, nn

from noren.config import Document
from noren.errors import Overloaded, ProtocolError, UnfitModel
from noren.parties.edges import AnyOf, step_of
from noren.partition.remote import Overlap, RemoteSpan
from noren.privacy.release import Releases
from noren.training.batches import IGNORED
from noren.training.loop import Remote
from noren.training.overlap import Baton
from noren.types import Average, Enter, Leave, Message, State, Together, Update, Welcome, joins
from noren.wire.inflight import Waiting, at_once

log = logging.getLogger("noren.client")


class Line(Protocol):
    """The line to the first remote party."""

    waiting: Waiting

    def __call__(self, message: Message) -> Message:
        """Send a message and return the answer."""

    def give_up(self) -> None:
        """Let nobody wait any more for what is under way."""


class Client(Protocol):
    """What this needs of a client (see client.Client)."""

    span: RemoteSpan
    releases: Releases
    welcome: Welcome
    document: Document

    @property
    def link(self) -> Line:
        """The line to the first remote party."""

    def pull(self, *, optimizer: bool) -> dict[str, Tensor]:
        """Return the remote adapters, and moments."""

    def push(self, tensors: dict[str, Tensor], step: int) -> None:
        """Set them."""

    def same_run(self, incarnation: str) -> bool:
        """Whether the remote parties still hold the run of a resume token."""

    def own_state(self) -> dict[str, Tensor]:
        """Return the client's own adapters."""

    def set_own_state(self, tensors: dict[str, Tensor]) -> None:
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

    def batch(self, numbers: list[int] | None, targets: int) -> None:
        """Say which rows the next forward pass is of, and how many targets the step's loss is a mean over."""
        if numbers is not None:
            self._client.releases.samples = numbers
        self._client.span.targets = targets if joins(self._together) else 0

    def loss(self, model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
        """Return the mean loss over the targets of a batch: made at the last party, if labels go there to train."""
        if self._client.document.run.loss_at == "client" or not (model.training and torch.is_grad_enabled()):
            return super().loss(model, inputs)
        span, labels = self._client.span, inputs["labels"]
        following = torch.cat([labels[:, 1:], torch.full_like(labels[:, :1], IGNORED)], 1)
        span.labels = following
        losses = model(**{name: tensor for name, tensor in inputs.items() if name != "labels"}).logits
        if span.head_output is None or not torch.equal(losses, span.head_output):
            raise UnfitModel(
                'this architecture works on the head\'s output after the head, so loss_at = "cloud" would be another '
                'loss; leave it at "client"'
            )
        counted = following != IGNORED
        return losses[..., 0][counted].sum() / counted.sum().clamp_min(1)

    @contextmanager
    def overlapping(self, baton: Baton, parts: int) -> Iterator[None]:
        """Let the baton go round while answers are under way; of several parts, each one's graph ends at the cut."""
        link, span = self._client.link, self._client.span
        link.waiting, span.overlap = baton.waiting, Overlap() if parts > 1 else None
        try:
            yield
        finally:
            link.waiting, span.overlap = at_once, None

    def take_back(self) -> None:
        """Take the gradient of a part that ended at the cut across it, and back through the client's first layers."""
        self._client.span.take_back()

    def give_up(self) -> None:
        """Let nobody wait any more for an answer that is under way."""
        self._client.link.give_up()

    @property
    def _together(self) -> Together:
        return self._client.document.run.together

    def enter(self, stop: threading.Event) -> None:
        """Take part in the group's training: waits until it is this client's turn, or `stop`."""
        said = ""
        while self._together.mode != "alone" and not stop.is_set():
            try:
                self._client.link(Message(Enter()))
                return
            except Overloaded as error:
                if str(error) != said:
                    log.warning("waiting: %s", error)
                said = str(error)
                stop.wait(error.retry_after)

    def leave(self) -> None:
        """Take no part any more."""
        if self._together.mode != "alone":
            self._client.link(Message(Leave()))

    def averages_after(self, step: int) -> bool:
        """Whether the replicas are averaged after that step."""
        return self._together.mode == "server-hierarchical" and step % self._together.every == 0

    def average(self, step: int, tokens: int, samples: int) -> None:
        """Average this client's replica with those of the group, weighted by what it learned from since the last."""
        client, ends = self._client, self._together.ends
        update = client.span.steps.pending
        weight = tokens if self._together.weights == "tokens" else samples
        meta = Average(step=step, weight=weight, update=update)
        reply = client.link(Message(meta, client.own_state() if ends else {}))
        if not isinstance(reply.meta, State):
            raise ProtocolError(f"the peer answered an average with {reply.kind!r}")
        client.span.steps.sent(update)
        if ends:
            client.set_own_state(dict(reply.tensors))

    def position(self) -> bytes:
        """Return where the run stands."""
        client, steps = self._client, self._client.span.steps
        return msgspec.json.encode(_Position(client.welcome.incarnation, steps.applied, steps.pending))

    def go_on(self, position: bytes) -> bool:
        """Go on from there; False if the remote parties hold another state by now."""
        client, was = self._client, msgspec.json.decode(position, type=_Position)
        ahead = was.applied + (was.pending is not None and was.pending.optimizer is not None)
        if not client.same_run(was.incarnation) or not was.applied <= client.welcome.step <= ahead:
            return False
        client.span.steps.restart(was.applied, was.pending)
        if client.welcome.incarnation != was.incarnation and isinstance(client.link, AnyOf):
            for message in [one for one in client.releases.sent() if step_of(one) > client.welcome.step]:
                client.link(message)
        return True


class _Position(msgspec.Struct, frozen=True):
    """Where a run stands at the remote parties."""

    incarnation: str
    applied: int
    pending: Update | None


def incarnation_of(position: bytes) -> str:
    """The resume token in a kept position."""
    return msgspec.json.decode(position, type=_Position).incarnation
