"""RemoteSpan: the module that stands where the missing layers stood.

It sends the hidden states that reach it to a Handler and returns what comes back, packed to the real tokens. With
gradients it is an autograd function whose backward is a second message (one round trip each way: two a step); for a
loop that has several batches under way, the graph ends here, and goes on when the loop says so (`Overlap`). With a
cache it is a layer of that cache: positions that were appended, cropped or reordered there are so at the server too,
because every message says where it starts. What was sent is kept, so that a server that lost its cache is refilled.
"""

from __future__ import annotations

import weakref
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from noren.errors import NorenError, ProtocolError, SessionLost
from noren.partition.cache import RemoteLayer
from noren.partition.stage import pack, unpack
from noren.partition.steps import RemoteStep
from noren.types import Backward, Close, Done, Forward, Gradient, Handler, Hidden, Message, Release


@dataclass
class Call:
    """What the span needs to know of the forward pass it is in, gathered before the first layer."""

    mask: Tensor | None  # [B, S + T] as the model was called, or None
    layer: RemoteLayer | None  # its place in the cache, or None without a cache
    keep: int  # only the last `keep` columns are needed back; 0 means all
    positions: str = "row"  # do positions count from a row's first real token, or from the first "column"?


class RemoteSpan(nn.Module):
    """Stands for layers that other parties hold. `handler` answers its messages.

    `lora_remote` (one number, if the remote stages train) stands for their adapters in the client's optimiser: its
    gradient is the norm of theirs, so that clipping by the global norm works; see steps.RemoteStep.
    """

    def __init__(self, handler: Handler, *, answers_head: bool, tuple_size: int, attention_type: str) -> None:
        super().__init__()
        self.handler = handler
        self.release: Release = lambda message: message  # what is done to a message before it leaves
        self.answers_head = answers_head  # head-tail: what comes back is the head's raw output
        self.tuple_size = tuple_size  # 0: the replaced block returns a tensor, else a tuple of so many
        self.attention_type = self.layer_type = attention_type  # some models read these of their layers
        self.head_output: Tensor | None = None
        self.call: Call | None = None
        self.steps = RemoteStep()
        self.replays = 0
        self.ended: list[str] = []
        self.graphs: dict[str, int] = {}  # training sessions whose graph the client still has
        self.targets = 0  # that the step's loss is a mean over, if whoever trains says so
        self.overlap: Overlap | None = None  # the batches of which several are under way, if any
        self.labels: Tensor | None = None  # [B, T], to go along with the next training pass
        self._left: Tensor | None = None  # what the last training pass sent, packed
        self._per_token = True
        self.register_parameter("lora_remote", None)

    def graph_gone(self, session: str, number: int) -> None:
        """The client's graph of a session is gone: the server may forget its part, unless the name is in use again."""
        if self.graphs.get(session) == number:
            del self.graphs[session]
            self.ended.append(session)

    def train_remote(self) -> None:
        """Declare that the remote stages hold adapters to be trained."""
        self.lora_remote = nn.Parameter(torch.zeros(1))
        self.steps.attach(self.lora_remote)

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor | tuple[Tensor | None, ...]:
        """Take hidden states [B, T, d] through the remote layers: [B, T, d] back, zero at pads."""
        call, self.call = self.call, None
        if call is None:
            raise ProtocolError(
                "the layers were run outside of the model's own forward pass, so their mask is not known"
            )
        real = self._real(hidden_states, call.mask)
        packed = pack(hidden_states, real)
        layer = call.layer
        handle = self.lora_remote
        wants_grad = torch.is_grad_enabled() and (packed.requires_grad or (handle is not None and handle.requires_grad))
        if wants_grad:
            if layer is not None and layer.length:
                raise ProtocolError(
                    "a forward pass that continues a cache cannot carry gradients across the cut; "
                    "call it under torch.no_grad(), or with use_cache=False"
                )
            keep = 0
            if self.overlap is None:
                out = _Crossing.apply(packed, handle, self, real, call.positions)
            else:
                out = self.overlap.cut(_Pass(self, packed, real, call.positions), packed)
            if layer is not None:
                assert self._left is not None
                self._note(layer, unpack(self._left, real), real)
                self._left = None
        else:
            keep = call.keep if bool(real[:, -call.keep :].any(0).all()) else 0
            more = {"positions": call.positions, "keep": keep}
            if layer is None:
                message = self.release(self._forward_message(packed, real, "", 0, **more))
                out = self._send(message, int(real[:, -keep:].sum()))
            else:
                out = self._cached(layer, packed, real, more)
        return self._answer(out, hidden_states, real, keep)

    @staticmethod
    def _real(hidden_states: Tensor, mask: Tensor | None) -> Tensor:
        """Return which of the batch's tokens are real [B, T]."""
        batch, columns = hidden_states.shape[:2]
        if mask is None:
            return torch.ones(batch, columns, dtype=torch.bool, device=hidden_states.device)
        real = mask[:, -columns:].bool()
        if real.shape != (batch, columns):
            raise ProtocolError(f"attention mask of shape {list(mask.shape)} for a batch of {batch} x {columns}")
        return real

    def _answer(
        self, out: Tensor, hidden_states: Tensor, real: Tensor, keep: int
    ) -> Tensor | tuple[Tensor | None, ...]:
        """Lay the packed answer out as the replaced block would have returned it."""
        wanted = real[:, -keep:]
        padded = unpack(out, wanted) if self._per_token else out
        if self.answers_head:
            self.head_output, padded = padded, hidden_states
        elif missing := real.shape[1] - wanted.shape[1]:
            padded = torch.cat([padded.new_zeros(len(real), missing, padded.shape[2]), padded], 1)
        return (padded, *[None] * (self.tuple_size - 1)) if self.tuple_size else padded

    def _forward_message(self, packed: Tensor, real: Tensor, session: str, start: int, **more: Any) -> Message:
        meta = Forward(
            session=session,
            start=start,
            lengths=real.sum(1).tolist(),
            padding=padding_side(real),
            update=self.steps.pending,
            ended=self.ended[:4096],
            **more,
        )
        return Message(meta, {"hidden": packed.detach()})

    def _send(self, message: Message, rows: int) -> Tensor:
        """Send a Forward and return what comes back, packed: [N', d] with N' = `rows`, or one row a sequence."""
        reply = self.handler(message)
        if not isinstance(reply.meta, Hidden) or "hidden" not in reply.tensors:
            raise ProtocolError(f"the peer answered a forward with {reply.kind!r}")
        assert isinstance(message.meta, Forward)
        self.steps.sent(message.meta.update)
        for session in message.meta.ended:  # named by several messages, if several are under way
            with suppress(ValueError):
                self.ended.remove(session)
        if reply.meta.per_sequence and not self.answers_head:
            raise ProtocolError("the peer sent back one row a sequence, but holds no head")
        self._per_token = not reply.meta.per_sequence
        sent, hidden = message.tensors["hidden"], reply.tensors["hidden"]
        width = 1 if "labels" in message.tensors else sent.shape[1] if not self.answers_head else hidden.shape[-1]
        _check_answer(hidden, sent.dtype, (rows if self._per_token else len(message.meta.lengths), width))
        return hidden.to(sent.device)

    def _cached(self, layer: RemoteLayer, packed: Tensor, real: Tensor, more: dict[str, Any]) -> Tensor:
        """A step of a session. A server that lost the session gets all of it again, as it left before."""
        start = sum(layer.columns)
        rows = layer.rows.tolist() if layer.rows is not None and start else None
        message = self.release(self._forward_message(packed, real, layer.session, start, rows=rows, **more))
        self._note(layer, unpack(message.tensors["hidden"], real), real)
        wanted = int(real[:, -more["keep"] :].sum())
        try:
            return self._send(message, wanted)
        except SessionLost:
            if not start:
                raise
            self.replays += 1
            sent, every = layer.history.all()
            more["keep"] = more["keep"] or int(real.any(0).sum())
            return self._send(self._forward_message(pack(sent, every), every, layer.session, 0, **more), wanted)
        except NorenError:
            layer.crop(real.shape[1])
            raise

    @staticmethod
    def _note(layer: RemoteLayer, hidden_states: Tensor, real: Tensor) -> None:
        """Keep what is being sent, in the server's columns (those that hold a real token)."""
        if layer.rows is not None:
            layer.history.reorder(layer.rows.to(hidden_states.device))
            layer.rows = None
        used = real.any(0)
        layer.history.append(hidden_states[:, used], real[:, used], sum(layer.columns))
        layer.columns += used.tolist()

    def take_back(self) -> None:
        """Send the gradient that has reached the cut, and take the answer back through the client's first layers."""
        assert self.overlap is not None
        self.overlap.take_back(self)

    def flush(self) -> None:
        """Send an optimiser step that is still waiting for the next message."""
        self.steps.flush(self.handler)

    def close(self) -> None:
        """End all sessions and the run at the remote parties."""
        if not isinstance(self.handler(Message(Close())).meta, Done):
            raise ProtocolError("the peer did not confirm the end of the run")

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        """A client's checkpoint holds no trace of the layers it does not own."""


def padding_side(real: Tensor) -> Any:
    """Return "left" or "right" for real [B, T]. Raises ProtocolError where real tokens have gaps between them."""
    steps = real[:, 1:].int() - real[:, :-1].int()
    if not bool((steps < 0).any()):
        return "left"
    if not bool((steps > 0).any()):
        return "right"
    raise ProtocolError(
        "the attention mask has pads between real tokens, or pads at the left of one row and at the right of another; "
        "pad all rows of a batch on one side"
    )


def _check_answer(tensor: Tensor, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    """Raise ProtocolError unless what a peer sent back is of the right type and shape, and finite."""
    if tuple(tensor.shape) != shape or tensor.dtype != dtype:
        raise ProtocolError(
            f"the peer sent back {list(tensor.shape)} of {tensor.dtype}, expected {list(shape)} of {dtype}"
        )
    if not bool(torch.isfinite(tensor).all()):
        raise ProtocolError("the peer sent back values that are not finite; lower the learning rate or use fp32")


class _Pass:
    """A training pass that has crossed and waits for its gradient; it lives as long as the client's graph of it."""

    def __init__(self, span: RemoteSpan, packed: Tensor, real: Tensor, positions: str) -> None:
        self.session = session = span.steps.next_session()
        span.graphs[session] = id(self)
        weakref.finalize(self, span.graph_gone, session, id(self))
        more = {"positions": positions, "train": True, "dropout": span.training, "weight": span.targets}
        message, labels = span._forward_message(packed, real, session, 0, **more), span.labels
        if labels is not None:
            message, span.labels = Message(message.meta, {**message.tensors, "labels": labels[real]}), None
        sent = span.release(message)
        self._forward: Message | None = sent
        self._span, self._shape, self._dtype = span, tuple(packed.shape), packed.dtype
        self.out = span._send(sent, len(packed))
        span._left = sent.tensors["hidden"]

    def back(self, gradient: Tensor, *, discard: bool, after: str = "") -> tuple[Tensor, float]:
        """Send the gradient of what came back; returns that of what was sent, and the remote squared norm."""
        span, forward, self._forward = self._span, self._forward, None
        if forward is None:
            raise ProtocolError(
                "a second backward over one forward pass does not cross the cut; add the losses up, or run it again"
            )
        meta = Backward(session=self.session, discard=discard, after=after)
        message = span.release(Message(meta, {"gradient": gradient.contiguous()}))
        span.steps.given()
        try:
            reply = span.handler(message)
        except SessionLost:  # the graph was lost, not the run: the same forward pass again, under the same name
            span.replays += 1
            span.handler(forward)
            reply = span.handler(message)
        if not isinstance(reply.meta, Gradient) or "gradient" not in reply.tensors:
            raise ProtocolError(f"the peer answered a backward with {reply.kind!r}")
        _check_answer(reply.tensors["gradient"], self._dtype, self._shape)
        return reply.tensors["gradient"].to(gradient.device), reply.meta.square_norm


class _Crossing(torch.autograd.Function):
    """Packed hidden states [N, d] through the remote layers, with gradients."""

    @staticmethod
    def forward(
        ctx: Any, packed: Tensor, handle: Tensor | None, span: RemoteSpan, real: Tensor, positions: str
    ) -> Tensor:
        ctx.span, ctx.one = span, _Pass(span, packed, real, positions)
        out: Tensor = ctx.one.out
        del ctx.one.out
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        span: RemoteSpan = ctx.span
        discard = span.steps.cleared(torch._C._current_graph_task_id())
        back, square_norm = ctx.one.back(gradients[0], discard=discard)
        norm = None if span.lora_remote is None else span.steps.accumulated(square_norm)
        return back, norm, None, None, None


class Overlap:
    """Some batches of one step, of which several are under way at once. Each one's graph is cut at the span.

    The graph cannot wait for an answer by itself: on a GPU, autograd has one thread for all backward passes.
    """

    def __init__(self) -> None:
        self._now: tuple[_Pass, Tensor, Tensor] | None = None
        self._before = ""  # session of the gradient that was sent last

    def cut(self, one: _Pass, packed: Tensor) -> Tensor:
        """Return what came back of a pass, as the beginning of another graph."""
        out = one.out.requires_grad_()
        self._now = one, packed, out
        return out

    def take_back(self, span: RemoteSpan) -> None:
        """Send the gradient that the last pass's output has, then take the answer back through its input's graph.

        A gradient counts only after the one before it: so they add up in the same order whatever is lost.
        """
        if self._now is None:  # nothing before the cut is trained
            return
        (one, packed, out), self._now = self._now, None
        gradient = out.grad if out.grad is not None else torch.zeros_like(out)
        out.grad = None
        after, self._before = self._before, one.session
        back, square_norm = one.back(gradient, discard=span.steps.cleared(self), after=after)
        if span.lora_remote is not None:
            span.steps.add(square_norm)
        if packed.requires_grad:
            packed.backward(back)
