"""RemoteStep: how an ordinary optimiser at the client also steps the adapters that other parties hold.

The client's model has one extra parameter of one number, `lora_remote`. After a backward pass its gradient is the L2
norm of the remote adapters' gradients, so `clip_grad_norm_` over the model's parameters clips by the norm over all
stages, and a loss scaler unscales it with the rest. When the optimiser that holds it steps, what has happened to that
one gradient (the factor by which it was scaled) and that optimiser's settings are all that the remote side needs to
make the same step with its own gradients; they travel with the next message. So any training loop that works for the
whole model works for the split one: plain PyTorch, accelerate, `transformers.Trainer`.
"""

from __future__ import annotations

import weakref
from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_pre_hook

from noren.errors import ConfigError, ProtocolError
from noren.types import Done, Handler, Message, Optimizer, Step, Update


class RemoteStep:
    """Watches the parameter that stands for the remote adapters, and says what their owners must do."""

    def __init__(self) -> None:
        self.handle: Tensor | None = None
        self.applied = 0  # steps that the remote side has confirmed
        self.pending: Update | None = None
        self._norm = 0.0  # of the remote gradients accumulated since the last step
        self._owing = False  # whether a gradient has left since then, be it answered or not
        self._passes = (0, 0)  # the step that forward passes are made for, and how many there were
        self._task: object = None  # the backward pass under way
        self._given = 0.0  # what the handle holds, or gets at its end

    def attach(self, handle: Tensor) -> None:
        """Watch `handle`: every optimiser that holds it also steps the remote side."""
        self.handle = handle
        _WATCHED[id(handle)] = self

    def next_session(self) -> str:
        """Name the next forward pass: "STEP.N", the N-th towards optimiser step STEP; the same in a resumed run."""
        step = self.applied + (2 if self.pending is not None else 1)
        number = self._passes[1] + 1 if self._passes[0] == step else 0
        self._passes = (step, number)
        return f"{step}.{number}"

    def accumulated(self, square_norm: float) -> Tensor:
        """Return what to add to the handle's gradient, so that it becomes the norm of all that was accumulated.

        Several forward passes may share a backward pass: their gradients meet in the handle only at its end.
        """
        assert self.handle is not None
        self._norm = square_norm**0.5
        before, self._given = self._given, self._norm
        return torch.full_like(self.handle, self._norm - before)

    def given(self) -> None:
        """A gradient is about to leave."""
        self._owing = True

    def add(self, square_norm: float) -> None:
        """Add that to the handle's gradient, outside of autograd."""
        assert self.handle is not None
        self._given = self._held()
        more = self.accumulated(square_norm)
        self.handle.grad = more if self.handle.grad is None else self.handle.grad.add_(more)

    def stepping(self, group: dict[str, Any], optimizer: torch.optim.Optimizer) -> None:
        """Called as an optimiser that holds the handle is about to step."""
        if self.handle is None or self.handle.grad is None:
            return
        if self.pending is not None:
            raise ProtocolError("two optimiser steps without a forward pass between them; the first was not sent yet")
        scale = float(self.handle.grad) / self._norm if self._norm else 1.0
        self.pending = Update(step=self.applied + 1, scale=scale, optimizer=settings(optimizer, group))
        self._norm, self._owing = 0.0, False

    def restart(self, step: int, pending: Update | None = None) -> None:
        """The remote side was set to its state after `step` steps; `pending` is to be applied next."""
        self.applied, self.pending, self._passes = step, pending, (0, 0)
        self._norm, self._owing = 0.0, False

    def sent(self, update: Update | None) -> None:
        """A message with `update` was answered, so the remote side has applied it."""
        if update is not None and update == self.pending:
            self.applied, self.pending = update.step, None

    @property
    def idle(self) -> bool:
        """Whether nothing is accumulated or waiting at the remote side."""
        return self.pending is None and not (self._norm and self._held())

    def cleared(self, task: object) -> bool:
        """Whether the client's gradients were cleared without a step, so that the remote side's must be too.

        Asked within a backward pass, `task`, for each forward pass that it crosses: true for the first of them at most.
        """
        if self._task == task:
            return False
        self._task, self._given = task, self._held()
        return self._owing and not self._given and self.pending is None

    def _held(self) -> float:
        """The handle's gradient."""
        return 0.0 if self.handle is None or self.handle.grad is None else float(self.handle.grad)

    def flush(self, handler: Handler) -> None:
        """Send a waiting step on its own."""
        if self.pending is None:
            return
        update = self.pending
        if not isinstance(handler(Message(Step(update=update))).meta, Done):
            raise ProtocolError("the peer did not confirm an optimiser step")
        self.sent(update)


_WATCHED: weakref.WeakValueDictionary[int, RemoteStep] = weakref.WeakValueDictionary()


def _before_step(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if (watcher := _WATCHED.get(id(parameter))) is not None:
                watcher.stepping(group, optimizer)


register_optimizer_step_pre_hook(_before_step)


def settings(optimizer: torch.optim.Optimizer, group: dict[str, Any]) -> Optimizer:
    """Return the settings of one optimiser step. Raises ConfigError for an optimiser that the remote side lacks."""
    rates = {float(other["lr"]) for other in optimizer.param_groups if other["params"]}
    if len(rates) > 1:
        raise ConfigError(
            f"parameter groups with different learning rates ({sorted(rates)}): the remote adapters follow one group "
            "only; give all groups the same"
        )
    if type(optimizer) is torch.optim.Adam and group.get("decoupled_weight_decay"):
        raise ConfigError("Adam with decoupled_weight_decay is not known to the remote side; use AdamW")
    if group.get("amsgrad") or group.get("maximize") or group.get("nesterov") or group.get("dampening"):
        raise ConfigError("amsgrad, maximize, nesterov and dampening are not known to the remote side")
    kind = type(optimizer)
    lr, decay = float(group["lr"]), float(group["weight_decay"])
    if issubclass(kind, torch.optim.AdamW) or kind is torch.optim.Adam:
        first, second = map(float, group["betas"])
        name: Literal["adamw", "adam"] = "adamw" if issubclass(kind, torch.optim.AdamW) else "adam"
        return Optimizer(name=name, lr=lr, weight_decay=decay, betas=(first, second), eps=float(group["eps"]))
    if kind is torch.optim.SGD:
        return Optimizer(name="sgd", lr=lr, weight_decay=decay, momentum=float(group["momentum"]))
    raise ConfigError(f"optimiser {kind.__name__} is not known to the remote side; use AdamW, Adam or SGD")
