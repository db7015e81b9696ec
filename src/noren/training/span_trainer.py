"""Training of a remote stage's adapter for one client: graphs between forward and backward, one optimiser, steps.

An optimiser step is applied once, by its number. A forward pass may be computed again, with the same dropout, to get
back a graph that was lost. That a backward pass counts once is the ledger's business (parties.ledger).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from noren.adapters import lora as adapters
from noren.adapters.lora import Lora
from noren.errors import OverBudget, ProtocolError, SessionLost
from noren.partition.stage import Frame, Stage
from noren.types import Message, Optimizer, Update


@dataclass
class Graph:
    """A forward pass that waits for its backward: packed input and output, and the bytes that it keeps alive."""

    inputs: Tensor
    outputs: Tensor
    nbytes: int
    onward: Message | None = None  # what was sent to the next party, which may lose its own graph


class SpanTrainer:
    """One run's adapter in a shared stage. Its methods are called under the stage's lock."""

    def __init__(self, stage: Stage, lora: Lora | None, adapter: str, seed: int, max_bytes: int) -> None:
        self._stage, self.adapter, self._max_bytes = stage, adapter, max_bytes
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
        self._graphs: dict[str, Graph] = {}

    @property
    def trainable(self) -> int:
        """Number of parameters that this stage trains for the run."""
        return sum(p.numel() for p in self.parameters)

    @property
    def nbytes(self) -> int:
        """Bytes of activations kept for backward passes to come."""
        return sum(graph.nbytes for graph in self._graphs.values())

    def use(self, *, dropout: bool) -> None:
        """Make this run's adapter the one that acts in the shared stage, unless it is already."""
        wanted = (self.adapter if self.parameters else None, dropout)
        if self._stage.in_use != wanted:
            adapters.activate(self._stage.model, wanted[0])
            self._stage.train(dropout)
            self._stage.in_use = wanted

    def forward(self, session: str, frame: Frame, *, dropout: bool) -> Tensor:
        """Run the stage, keep the graph; returns the padded output, detached."""
        self.use(dropout=dropout)
        self._graphs.pop(session, None)
        frame.hidden = frame.hidden.detach().requires_grad_()
        count = _SavedBytes(self._stage)
        hooks = torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor)
        with self._random(session, dropout), torch.enable_grad(), hooks:
            out: Tensor = self._stage(frame.padded(), frame.real, positions=frame.positions)
            packed = out if out.dim() == 2 else frame.packed(out)
        while self._graphs and self.nbytes + count.total > self._max_bytes:
            del self._graphs[next(iter(self._graphs))]  # the oldest; most likely its backward will never come
        if count.total > self._max_bytes:
            raise OverBudget(
                f"this batch keeps {count.total} bytes for its backward, the limit is {self._max_bytes}; use a smaller "
                "batch"
            )
        self._graphs[session] = Graph(frame.hidden, packed, count.total)
        return out.detach()

    @contextmanager
    def _random(self, session: str, dropout: bool) -> Iterator[None]:
        """Draw dropout from the run's seed and the forward pass's name: the same whenever it is computed."""
        if not dropout:
            yield
            return
        devices = [p.device for p in self._stage.parameters()][:1]
        with torch.random.fork_rng([d for d in devices if d.type == "cuda"]):
            torch.manual_seed(int.from_bytes(hashlib.sha256(f"{self._seed}/{session}".encode()).digest()[:7], "big"))
            yield

    def holds(self, session: str) -> bool:
        """Whether the graph of a forward pass is kept."""
        return session in self._graphs

    def outputs(self, session: str) -> Tensor:
        """What a kept forward pass gave, packed. Raises SessionLost."""
        return self._graph(session).outputs.detach()

    def sent_on(self, session: str, message: Message) -> None:
        """Remember what a kept forward pass sent to the next party."""
        self._graph(session).onward = message

    def onward(self, session: str) -> Message | None:
        """What a kept forward pass sent to the next party."""
        return self._graph(session).onward

    def _graph(self, session: str) -> Graph:
        graph = self._graphs.get(session)
        if graph is None:
            raise SessionLost("this forward pass is not kept here (restarted, expired or closed); repeat the step")
        return graph

    def backward(self, session: str, gradient: Tensor) -> Tensor:
        """Take a gradient through the kept graph; returns the gradient of the stage's packed input."""
        graph = self._graph(session)
        if gradient.shape != graph.outputs.shape:
            raise ProtocolError(f"gradient {list(gradient.shape)} for an output {list(graph.outputs.shape)}")
        self.use(dropout=self._stage.training)
        torch.autograd.backward(graph.outputs, gradient.to(graph.outputs.dtype))
        del self._graphs[session]
        out = graph.inputs.grad
        return torch.zeros_like(graph.inputs) if out is None else out

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
        self._graphs.clear()  # they belong to the weights before the step
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
        """Drop kept graphs (of one session, or all) and, with all of them, the gradients."""
        if session is not None:
            self._graphs.pop(session, None)
            return
        self._graphs.clear()
        self._zero()

    def forget_graphs(self) -> None:
        """Drop all kept graphs; adapter, gradients and optimiser stay."""
        self._graphs.clear()

    def close(self) -> None:
        """Take the run's adapter out of the stage."""
        self.forget()
        if self.parameters:
            adapters.remove(self._stage.model, self.adapter)
            self._stage.in_use = None


class _SavedBytes:
    """Counts the bytes that a graph keeps alive, weights left out."""

    def __init__(self, stage: Stage) -> None:
        self.total = 0
        self._weights = {p.untyped_storage().data_ptr() for p in stage.parameters()}
        self._seen: set[int] = set()

    def __call__(self, tensor: Tensor) -> Tensor:
        place = tensor.untyped_storage().data_ptr()
        if place not in self._weights and place not in self._seen:
            self._seen.add(place)
            self.total += tensor.untyped_storage().nbytes()
        return tensor
