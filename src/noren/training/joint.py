"""Many clients' batches as one: a shared adapter stepped with the gradient of their joined loss.

Client i's loss L_i is a mean over n_i targets. The joined loss is the mean over all of them, L = sum_i (n_i / n) L_i
with n = sum_i n_i. What client i sends, dL_i/dh, is taken back times n_i, and their sum is divided by n once the step
is made: nobody needs to know before who will be in it. What goes back to a client is the gradient of its own L_i: its
own adapters learn from its own loss.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import msgspec
from torch import Tensor

from noren.errors import ProtocolError
from noren.training.passes import Pass, Passes
from noren.training.share import Share
from noren.training.span_trainer import SpanTrainer
from noren.types import Optimizer, Update

log = logging.getLogger("noren.training")


@dataclass(eq=False)
class Part:
    """One client's part of a joined backward pass."""

    share: Share
    kept: Pass
    gradient: Tensor  # of the client's own loss
    targets: float  # that its loss is a mean over; above 0


class Joint:
    """The shared adapter. All methods are called in the one thread that computes.

    Everyone's step is one step of the adapter, made with the settings of those who have made theirs. `clip`: most L2
    norm of the joined gradient; 0: any.
    """

    def __init__(self, body: SpanTrainer, clip: float) -> None:
        self.body, self._clip = body, clip
        self.waiting: dict[str, Optimizer | None] = {}  # who has contributed to the step; its settings, once it steps
        self.targets: dict[str, float] = {}
        self._settings: Optimizer | None = (
            None  # of the group, but for the learning rate: as the first to step had them
        )

    def share(self, name: str) -> Share:
        """A client's part."""
        return Share(self.body, name, lambda update: self._confirm(name, update.optimizer))

    def _confirm(self, name: str, settings: Optimizer) -> None:
        group = self._settings = self._settings or settings
        if msgspec.structs.replace(settings, lr=group.lr) != group:
            raise ProtocolError(f"the group's optimiser is {group}, this client's {settings}; give all one [training]")
        if name in self.waiting:
            self.waiting[name] = settings

    def step(self) -> None:
        """Make the step that was contributed to, if any."""
        if not self.targets:
            return
        made = {name: settings for name, settings in self.waiting.items() if settings is not None}
        weights, all_targets = {name: self.targets[name] for name in made}, sum(self.targets.values())
        self.waiting, self.targets = {}, {}
        if not made:
            log.warning("a step is dropped: all who contributed to it have gone")
            self.body.discard()
            return
        rates = {name: settings.lr for name, settings in made.items()}
        first = next(iter(made.values()))
        total = sum(weights.values()) or 1.0
        lr = first.lr if len(set(rates.values())) == 1 else sum(rates[n] * w for n, w in weights.items()) / total
        norm = self.body.square_norm() ** 0.5 / all_targets
        clipped = min(1.0, self._clip / (norm + 1e-6)) if self._clip else 1.0  # as torch.nn.utils.clip_grad_norm_
        settings = msgspec.structs.replace(first, lr=lr)
        self.body.update(Update(step=self.body.step + 1, scale=clipped / all_targets, optimizer=settings))

    def backward(self, passes: Passes, parts: Sequence[Part]) -> list[Tensor]:
        """Take the clients' gradients back together; returns that of each one's input, of its own loss."""
        backs = passes.backward([(part.kept, part.gradient * part.targets) for part in parts])
        for part in parts:
            part.share.forget()
            self.waiting[part.share.name] = None
            self.targets[part.share.name] = self.targets.get(part.share.name, 0.0) + part.targets
        return [back / part.targets for back, part in zip(backs, parts, strict=True)]
