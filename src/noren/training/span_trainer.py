"""Training of a remote stage's adapter for one client: passes between forward and backward, one optimiser, steps.

An optimiser step is applied once, by its number. A forward pass may be computed again, with the same dropout (see
passes.py). That a backward pass counts once is the ledger's business (parties.ledger).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from noren.adapters import lora as adapters
from noren.adapters.lora import Lora
from noren.errors import OverBudget, ProtocolError, SessionLost
from noren.partition.stage import Frame
from noren.training.passes import Pass, Passes
from noren.types import Optimizer, Update


class SpanTrainer:
    """One run's adapter in a shared stage. Its methods are called under the stage's lock."""

    def __init__(self, passes: Passes, lora: Lora | None, adapter: str, seed: int) -> None:
        self._computer, stage = passes, passes.stage
        self._stage, self.adapter = stage, adapter
        self.parameters: list[nn.Parameter] = []
        if lora is not None and lora.trained_by(stage.party):
            stage.in_use = None  # a new adapter is active until another is chosen
            self.parameters = adapters.inject(
                stage.model, lora, stage.party, stage.config.model_type, adapter, seed, stage.new_heads
            )
        self.step = 0
        self._seed = seed
        self._optimizer: torch.optim.Optimizer | None = None
        self._moments: dict[str, Tensor] = {}  # loaded from a checkpoint, for an optimiser not yet made
        self._passes: dict[str, Pass] = {}

    @property
    def trainable(self) -> int:
        """Number of parameters that this stage trains for the run."""
        return sum(p.numel() for p in self.parameters)

    def use(self, *, dropout: bool) -> None:
        """Make this run's adapter the one that acts in the shared stage, unless it is already."""
        wanted = (self.adapter if self.parameters else None, dropout)
        if self._stage.in_use != wanted:
            adapters.activate(self._stage.model, wanted[0])
            self._stage.train(dropout)
            self._stage.in_use = wanted

    def forward(self, session: str, frame: Frame, *, dropout: bool) -> Tensor:
        """Run the stage; returns the packed output [N, d] (or one row a sequence), detached."""
        return self._computer.forward([self.begin(session, frame, dropout=dropout)])[0]

    def begin(self, session: str, frame: Frame, *, dropout: bool) -> Pass:
        """Note a forward pass, which is then to be computed. Raises OverBudget."""
        self.forget(session)
        frame.hidden = frame.hidden.detach()
        most = self._computer.most
        if frame.hidden.nbytes > most:
            raise OverBudget(f"a batch of {frame.hidden.nbytes} bytes, the limit is {most}; use a smaller one")
        while self._passes and sum(one.nbytes for one in self._passes.values()) + frame.hidden.nbytes > most:
            self.forget(next(iter(self._passes)))  # the oldest; most likely its backward will never come
        self._passes[session] = one = Pass(self, session, frame, dropout)
        return one

    @contextmanager
    def random(self, session: str, dropout: bool) -> Iterator[None]:
        """Draw dropout from the run's seed and the forward pass's name: the same whenever it is computed."""
        if not dropout:
            yield
            return
        devices = [p.device for p in self._stage.parameters()][:1]
        with torch.random.fork_rng([d for d in devices if d.type == "cuda"]):
            torch.manual_seed(int.from_bytes(hashlib.sha256(f"{self._seed}/{session}".encode()).digest()[:7], "big"))
            yield

    def holds(self, session: str) -> bool:
        """Whether a forward pass is kept."""
        return session in self._passes

    def kept(self, session: str) -> Pass:
        """Return a forward pass that waits for its backward. Raises SessionLost."""
        one = self._passes.get(session)
        if one is None:
            raise SessionLost("this forward pass is not kept here (restarted, expired or closed); repeat the step")
        return one

    def backward(self, session: str, gradient: Tensor) -> Tensor:
        """Take a gradient [N, d] of a kept pass's output back; returns that of its input."""
        out = self._computer.backward([(self.kept(session), gradient)])[0]
        self.forget(session)
        return out

    def square_norm(self) -> float:
        """Squared L2 norm of the gradients accumulated since the last step."""
        return float(sum(p.grad.double().square().sum() for p in self.parameters if p.grad is not None))

    def update(self, update: Update) -> None:
        """Apply one optimiser step, once. Raises SessionLost if steps are missing before it."""
        if update.step <= self.step:
            return
        if update.step != self.step + 1:
            raise SessionLost(
                f"step {update.step} cannot follow step {self.step} of this run; resume from the last checkpoint"
            )
        optimizer = self._prepare(update.optimizer)
        for parameter in self.parameters:
            if parameter.grad is not None:
                parameter.grad.mul_(update.scale)
        if optimizer is not None:
            optimizer.step()
        self._zero()
        self.forget_passes()  # they belong to the weights before the step
        self.step = update.step

    def discard(self) -> None:
        """Drop the gradients accumulated so far."""
        self._zero()

    def _zero(self) -> None:
        for parameter in self.parameters:
            parameter.grad = None

    def _prepare(self, wanted: Optimizer) -> torch.optim.Optimizer | None:
        if not self.parameters:
            return None
        kind = {"adamw": torch.optim.AdamW, "adam": torch.optim.Adam, "sgd": torch.optim.SGD}[wanted.name]
        options: dict[str, Any] = {"lr": wanted.lr, "weight_decay": wanted.weight_decay}
        options |= {"momentum": wanted.momentum} if wanted.name == "sgd" else {"betas": wanted.betas, "eps": wanted.eps}
        if self._optimizer is None:
            self._optimizer = kind(self.parameters, **options)
            self._restore_moments()
        elif type(self._optimizer) is not kind:
            raise ProtocolError(f"this run's optimiser is {type(self._optimizer).__name__}, not {kind.__name__}")
        self._optimizer.param_groups[0].update(options)
        return self._optimizer

    def _named(self) -> list[tuple[str, nn.Parameter]]:
        pairs = adapters.adapter_parameters(self._stage.model, self.adapter)
        return [(self._stage.whole_name(name), p) for name, p in pairs]

    def adapter_state(self) -> dict[str, Tensor]:
        """Return copies of the adapter's tensors."""
        return self.state(optimizer=False)

    def set_adapter(self, tensors: dict[str, Tensor]) -> None:
        """Set the adapter's tensors; its optimiser goes on as it was."""
        adapters.load_state(self._stage.model, self.adapter, self._stage.whole_name, tensors)

    def state(self, *, optimizer: bool) -> dict[str, Tensor]:
        """Return the adapter, and if asked its optimiser's moments (`optimizer/NAME/KIND`)."""
        out = {name: p.detach().clone() for name, p in self._named()}
        if optimizer and self._optimizer is not None:
            for name, parameter in self._named():
                for kind, value in self._optimizer.state[parameter].items():
                    if isinstance(value, Tensor):
                        out[f"optimizer/{name}/{kind}"] = value.detach().clone()
        elif optimizer:
            out |= self._moments
        return out

    def shapes(self) -> dict[str, list[int]]:
        """Names in the whole model and shapes of what is trained here for the run."""
        return {name: list(p.shape) for name, p in self._named()}

    def gradients(self) -> dict[str, Tensor]:
        """Return the gradients accumulated since the last step."""
        return {name: p.grad.clone() for name, p in self._named() if p.grad is not None}

    def load_gradients(self, tensors: dict[str, Tensor]) -> None:
        """Set the accumulated gradients, as `gradients` gave them."""
        for name, parameter in self._named():
            gradient = tensors.get(name)
            parameter.grad = None if gradient is None else gradient.clone().to(parameter)

    def load(self, tensors: dict[str, Tensor], step: int) -> None:
        """Set adapter, moments and step number, as `state` gave them; forgets all graphs and gradients."""
        own = {name for name, _ in self._named()}
        moments = {k: v for k, v in tensors.items() if k.startswith("optimizer/")}
        state = {k: v for k, v in tensors.items() if k in own}
        adapters.load_state(self._stage.model, self.adapter, self._stage.whole_name, state)
        self._moments = {k: v for k, v in moments.items() if k.split("/")[1] in own}
        self._check_moments()
        self._optimizer, self.step = None, step
        self.forget()

    def restore(self, state: dict[str, Tensor], gradients: dict[str, Tensor], step: int) -> None:
        """Set all that `state` and `gradients` gave after `step`; without a state, the initial values stay."""
        if state:
            self.load(state, step)
        self.step = step
        self.load_gradients(gradients)

    def _check_moments(self) -> None:
        """Raise ProtocolError unless each parameter has all moments of one optimiser, of its shape, or none."""
        for name, parameter in self._named():
            prefix = f"optimizer/{name}/"
            found = {k.removeprefix(prefix): v for k, v in self._moments.items() if k.startswith(prefix)}
            if set(found) not in (set(), {"momentum_buffer"}, {"step", "exp_avg", "exp_avg_sq"}):
                raise ProtocolError(f"optimiser moments of {name!r} are {sorted(found)}")
            for kind, value in found.items():
                if (kind != "step" and value.shape != parameter.shape) or not bool(torch.isfinite(value).all()):
                    raise ProtocolError(f"optimiser moment {kind!r} of {name!r} is not finite, or of another shape")

    def _restore_moments(self) -> None:
        assert self._optimizer is not None
        for name, parameter in self._named():
            prefix = f"optimizer/{name}/"
            found = {k.removeprefix(prefix): v.clone() for k, v in self._moments.items() if k.startswith(prefix)}
            if found:
                self._optimizer.state[parameter] = found
        self._moments = {}

    def forget(self, session: str | None = None) -> None:
        """Drop a kept pass or, without a session, all of them and the gradients."""
        if session is None:
            self.forget_passes()
            self._zero()
        elif (one := self._passes.pop(session, None)) is not None:
            self._computer.drop(one)

    def forget_passes(self) -> None:
        """Drop all kept passes; adapter, gradients and optimiser stay."""
        for session in list(self._passes):
            self.forget(session)

    def close(self) -> None:
        """Take the run's adapter out of the stage."""
        self.forget()
        if self.parameters:
            adapters.remove(self._stage.model, self.adapter)
            self._stage.in_use = None
