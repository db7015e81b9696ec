"""Forward passes that wait for their backward pass, of all runs of a party: kept within one budget, or computed again.

A pass's packed input is always kept. Its activations are kept while they fit into the budget; or else what enters each
block, from which the block is computed again in the backward pass (gradient checkpointing, Chen et al. 2016, arXiv
1604.06174); or else nothing, and the whole pass is computed again when its gradient comes. All give the same numbers.

Passes of several runs may be computed together, with each row under its own run's adapter: they must be of the same
width, so that nobody pays for another's padding, and without dropout, which draws from each run's own seed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from noren.adapters import lora as adapters
from noren.errors import ProtocolError
from noren.metrics import Heap
from noren.partition.blocks import find_blocks
from noren.partition.quantise import plain_tensors
from noren.partition.stage import Frame, Stage
from noren.types import Message


class Run(Protocol):
    """Whose pass it is (see span_trainer.SpanTrainer)."""

    adapter: str
    parameters: list[nn.Parameter]

    def use(self, *, dropout: bool) -> None:
        """Let the run's adapter act in the stage."""

    def random(self, session: str, dropout: bool) -> AbstractContextManager[None]:
        """Draw dropout from the run's seed."""


@dataclass(eq=False)
class Pass:
    """One run's forward pass of a training session."""

    run: Run
    session: str
    frame: Frame
    dropout: bool
    drawn: str = ""  # what its dropout is drawn by, if not the session's name
    targets: float = 0.0  # that the client's loss is a mean over, in training together
    onward: Message | None = None  # what was sent to the next party, which may lose its own part
    graph: _Graph | None = field(default=None, repr=False)
    shape: tuple[int, ...] = ()  # of the packed output

    @property
    def nbytes(self) -> int:
        """Of the input that is kept."""
        return self.frame.hidden.nbytes

    def check(self, gradient: Tensor) -> None:
        """Raise ProtocolError unless a gradient is of this pass's output."""
        if tuple(gradient.shape) != self.shape:
            raise ProtocolError(f"gradient {list(gradient.shape)} for an output {list(self.shape)}")


@dataclass(eq=False)
class _Graph:
    """What autograd keeps of some passes that were computed together."""

    passes: list[Pass]
    inputs: Tensor  # packed, of all passes
    outputs: Tensor  # packed, or one row a sequence
    nbytes: int


HOW = ("whole", "by block")
"""What is kept of a pass."""


class Passes:
    """The passes of one stage. All methods are called in the one thread that computes.

    `most`: bytes of activations at once. `joined`: at most so many tokens are computed together.
    """

    def __init__(self, stage: Stage, most: int, joined: int = 1 << 14) -> None:
        self.stage, self.most, self.joined = stage, most, joined
        self.again = 0  # passes that were computed a second time as a whole
        self.by_block = 0  # passes that kept no more than what entered each block
        self.together = 0  # passes that were computed with others
        self.per_sequence = False  # whether the stage's head gives one row a sequence
        self._heap = Heap()
        self._graphs: list[_Graph] = []
        self._per_token = dict.fromkeys(HOW, 0.0)  # bytes that a token keeps alive, the most seen

    @property
    def nbytes(self) -> int:
        """Bytes of activations that are kept now."""
        return sum(graph.nbytes for graph in self._graphs)

    def forward(self, passes: Sequence[Pass]) -> list[Tensor]:
        """Compute some passes; returns their packed outputs [N, d] (or one row a sequence [B, K])."""
        out: dict[int, Tensor] = {}
        for some in self._split(passes):
            outputs = self._keep(some)
            for one, part in zip(some, _parts(some, outputs, self.per_sequence), strict=True):
                one.shape, out[id(one)] = tuple(part.shape), part.detach()
            self._heap.trim()
        return [out[id(one)] for one in passes]

    def backward(self, pairs: Sequence[tuple[Pass, Tensor]]) -> list[Tensor]:
        """Take gradients [N, d] of some passes' outputs back; returns those of their inputs, each once.

        Those of the adapters are added to what their runs have accumulated.
        """
        for one, gradient in pairs:
            one.check(gradient)
        given = {id(one): gradient for one, gradient in pairs}
        out: dict[int, Tensor] = {}
        for graph in [graph for graph in self._graphs if any(id(one) in given for one in graph.passes)]:
            out |= self._take_back(graph, given)
        for some in self._split([one for one, _ in pairs if id(one) not in out]):
            self.again += len(some)
            out |= self._take_back(self._compute_again(some), given)
        return [out[id(one)] for one, _ in pairs]

    def drop(self, one: Pass) -> None:
        """Forget a pass. What others have in common with it is computed again when they need it."""
        if one.graph is not None:
            self._free(one.graph)

    def _free(self, graph: _Graph) -> None:
        self._graphs.remove(graph)
        for one in graph.passes:
            one.graph = None

    def _take_back(self, graph: _Graph, given: dict[int, Tensor]) -> dict[int, Tensor]:
        self._act(graph.passes)
        gradient = torch.cat(
            [given.get(id(one), graph.outputs.new_zeros(one.shape)).to(graph.outputs) for one in graph.passes]
        )
        torch.autograd.backward(graph.outputs, gradient)
        whole = graph.inputs.grad
        parts = _parts(graph.passes, torch.zeros_like(graph.inputs) if whole is None else whole, False)
        out = {id(one): part for one, part in zip(graph.passes, parts, strict=True) if id(one) in given}
        if graph in self._graphs:
            self._free(graph)
        self._heap.trim()
        return out

    def _split(self, passes: Sequence[Pass]) -> list[list[Pass]]:
        """Sort passes into those that can be computed together."""
        least = self._per_token["by block"] or self._per_token["whole"]
        most = min(self.joined, self.most / least) if least else self.joined
        out: list[list[Pass]] = []
        like: list[tuple[object, ...]] = []
        for one in passes:
            frame = one.frame
            alone = id(one) if one.dropout and self._draws() else None
            key = (frame.real.shape[1], frame.padding, frame.positions, one.dropout, alone)
            for place, some in zip(like, out, strict=True):
                if place == key and sum(len(o.frame.hidden) for o in some) + len(frame.hidden) <= most:
                    some.append(one)
                    break
            else:
                out.append([one])
                like.append(key)
        return out

    def _draws(self) -> bool:
        """Whether any dropout of the stage is above 0."""
        rates = [module.p for module in self.stage.modules() if isinstance(module, nn.Dropout)]
        config = self.stage.config.to_dict()
        return any(rates) or any(value for name, value in config.items() if "drop" in name and name != "layerdrop")

    def _act(self, passes: Sequence[Pass]) -> None:
        """Let each row's adapter act."""
        first = passes[0]
        if len({one.run.adapter for one in passes}) == 1:
            first.run.use(dropout=first.dropout)
            return
        self.stage.in_use = None
        self.stage.train(first.dropout)
        adapters.activate(self.stage.model, first.run.adapter)
        names = [one.run.adapter for one in passes for _ in one.frame.lengths]
        adapters.by_rows(self.stage.model, names)
        for one in passes:
            for parameter in one.run.parameters:
                parameter.requires_grad_(True)

    def _keep(self, passes: list[Pass]) -> Tensor:
        """Compute passes, and keep their activations if they fit into what is left of the budget."""
        self.together += len(passes) if len(passes) > 1 else 0
        if (graph := self._compute(passes, self.most - self.nbytes)) is not None:
            for one in passes:
                one.graph = graph
            self._graphs.append(graph)
            return graph.outputs
        self._act(passes)
        with self._random(passes), torch.no_grad():
            return self._run(_joint(passes))

    def _compute(self, passes: list[Pass], room: float) -> _Graph | None:
        """Compute passes, and keep of them what fits into so many bytes. Returns None if nothing does."""
        tokens = sum(len(one.frame.hidden) for one in passes)
        for how in HOW:
            if self._per_token[how] * tokens > room:
                continue
            try:
                graph = self._try(passes, room, how)
            except _TooMuch:
                self._per_token[how] = max(self._per_token[how], 1.01 * room / tokens)
            else:
                self._per_token[how] = max(self._per_token[how], graph.nbytes / tokens)
                self.by_block += len(passes) if how != HOW[0] else 0
                return graph
        return None

    def _try(self, passes: list[Pass], room: float, how: str) -> _Graph:
        """Compute passes with what their gradient needs. Raises _TooMuch if that is more than `room` bytes."""
        self._act(passes)
        frame = _joint(passes)
        frame.hidden = frame.hidden.detach().requires_grad_()
        count = _SavedBytes(self.stage, room)
        blocks = _block_by_block(self.stage, count) if how == "by block" else nullcontext()
        hooks = torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor)
        with self._random(passes), torch.enable_grad(), hooks, blocks:
            outputs = self._run(frame)
        return _Graph(passes, frame.hidden, outputs, count.total)

    def _compute_again(self, passes: list[Pass]) -> _Graph:
        """Compute passes once more, for the gradient that is here now."""
        while (graph := self._compute(passes, self.most - self.nbytes)) is None and self._graphs:
            self._free(self._graphs[-1])  # the newest: its gradient comes last
        return graph if graph is not None else self._try(passes, float("inf"), "by block")

    def _run(self, frame: Frame) -> Tensor:
        out: Tensor = self.stage(frame.padded(), frame.real, positions=frame.positions)
        self.per_sequence = out.dim() == 2
        if frame.labels is not None:
            scores = frame.packed(out).float()
            return nn.functional.cross_entropy(scores, frame.labels, reduction="none")[:, None].to(out.dtype)
        return out if self.per_sequence else frame.packed(out)

    def _random(self, passes: list[Pass]) -> AbstractContextManager[None]:
        first = passes[0]
        return first.run.random(first.drawn or first.session, first.dropout)


def _joint(passes: Sequence[Pass]) -> Frame:
    """The batch of all passes' rows."""
    first = passes[0].frame
    lengths = [length for one in passes for length in one.frame.lengths]
    labels = [one.frame.labels for one in passes if one.frame.labels is not None]
    return Frame(
        torch.cat([one.frame.hidden for one in passes]), lengths, first.padding, first.positions,
        labels=torch.cat(labels) if labels else None,
    )  # fmt: skip


def _parts(passes: Sequence[Pass], joint: Tensor, per_sequence: bool) -> list[Tensor]:
    """Cut what was computed for all passes into each one's part."""
    return list(joint.split([len(one.frame.lengths if per_sequence else one.frame.hidden) for one in passes]))


class _TooMuch(Exception):
    """The activations do not fit."""


class _SavedBytes:
    """Counts the bytes that a graph keeps alive, weights left out. Raises _TooMuch above `most`.

    What is handed back to autograd is detached: an operation that keeps its own output would else hold itself through
    it, in a circle that only a backward pass breaks, and what is dropped before would never be freed.
    """

    def __init__(self, stage: Stage, most: float) -> None:
        self.total, self._most = 0, most
        self._seen = {plain.untyped_storage().data_ptr() for p in stage.parameters() for plain in plain_tensors(p)}

    def __call__(self, tensor: Tensor) -> Tensor:
        for plain in plain_tensors(tensor):
            place = plain.untyped_storage().data_ptr()
            if place not in self._seen:
                self._seen.add(place)
                self.total += plain.untyped_storage().nbytes()
                if self.total > self._most:
                    raise _TooMuch
        return tensor.detach()


@contextmanager
def _block_by_block(stage: Stage, count: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Keep no more than what enters each block, and compute the block again for its gradient."""

    def again(forward: Callable[..., Any], hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        count(hidden)
        return checkpoint(forward, hidden, *args, use_reentrant=False, **kwargs)

    blocks = set(find_blocks(stage.model.base_model)[1])
    for block in blocks:
        block.forward = partial(again, block.forward)
    try:
        yield
    finally:
        for block in blocks:
            del block.forward
