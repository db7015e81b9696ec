"""The contract: a Message travels, a Handler answers it, a Guard wraps a Handler.

Everything that crosses between parties is a `Message`: a *meta* (one of the frozen records below: what is asked, in
words and whole numbers) and *tensors* (dense, named). There are no token ids, labels, logits of a U-shaped client,
attention masks, position ids or padding in any of them: a batch of sequences crosses as the hidden states of its real
tokens, packed one after another, with one length a sequence.

Shapes use these letters: B sequences in a batch, T columns of a padded batch, N real tokens in it (N <= B*T),
d hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Literal

import msgspec

if TYPE_CHECKING:
    import torch

Count = Annotated[int, msgspec.Meta(ge=0)]
Beta = Annotated[float, msgspec.Meta(ge=0, lt=1)]
Amount = Annotated[float, msgspec.Meta(ge=0)]
PROTOCOL = 1
"""Version of the protocol; both ends must have the same."""


class Meta(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag_field="kind"):
    """What a message asks or answers, without its tensors. Fields are checked when bytes are decoded."""


class Hello(Meta, frozen=True, kw_only=True, tag="hello"):
    """Client to server, first on every connection: what the client was set up for. Answer: `Welcome`."""

    protocol: int
    run: str  # names this client's adapters and optimiser at the server; unique within the owner
    fingerprint: str  # of the whole model (see partition.checkpoint.fingerprint)
    plan: list[str]  # the resolved cut, e.g. ["client 0:2", "server 2:6", "client 6:8"]
    task: str  # which head the whole model carries, e.g. "causal-lm"
    dtype: str  # of the tensors that will cross, e.g. "bfloat16"
    lora: str  # canonical JSON of the LoRA settings of the remote stages, "" for none
    seed: int  # initial values of the remote adapters


class Welcome(Meta, frozen=True, kw_only=True, tag="welcome"):
    """Server to client: accepted. `trainable` counts the parameters that the remote stages train for this run."""

    party: str
    trainable: int
    step: int  # optimiser steps already applied to this run's remote adapters
    incarnation: str  # names this run's state at the server and beyond; another one means that the state was lost


class Optimizer(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The settings of one optimiser step, as the client's own optimiser had them at that step."""

    name: Literal["adamw", "adam", "sgd"]
    lr: Amount
    weight_decay: Amount = 0.0
    betas: tuple[Beta, Beta] = (0.9, 0.999)
    eps: Amount = 1e-8
    momentum: Amount = 0.0


class Update(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One optimiser step to apply before anything else: gradients times `scale`, then the optimiser's rule.

    `scale` carries the clipping by the global norm over all stages (and any loss-scale) that the client worked out.
    Applied once: a repeated `step` is acknowledged without effect. `optimizer` None drops the gradients instead.
    """

    step: Count
    scale: Amount
    optimizer: Optimizer | None


class Forward(Meta, frozen=True, kw_only=True, tag="forward"):
    """Hidden states of real tokens going up: tensor `hidden` [N, d]. Answer: `Hidden`.

    A step is named by (session, start) and may be repeated: the server crops its cache to `start`, then appends.
    """

    session: str
    start: Count  # columns of this session that the server must already hold; 0 begins (or replays) it
    lengths: list[Count]  # real tokens of each sequence in this message; B entries, summing to N
    padding: Literal["left", "right"]  # where the pads of the ragged batch were
    positions: Literal["row", "column"] = "row"  # do positions count from a row's first token or the first column?
    rows: list[Count] | None = None  # first reorder the session's sequences so (beam search), B entries
    keep: Count = 0  # only the last `keep` columns are wanted back; 0 means all
    train: bool = False  # keep the graph for a `Backward` of the same session; no cache
    dropout: bool = False  # the client's model is in training mode: the stage's dropouts are on
    update: Update | None = None
    ended: list[str] = []  # sessions that the client no longer needs


class Hidden(Meta, frozen=True, kw_only=True, tag="hidden"):
    """Hidden states (or the head's raw output) coming back: tensor `hidden` [N', d'].

    N' counts the real tokens among the last `keep` columns; or B rows if the head gives one row a sequence.
    """

    per_sequence: bool = False


class Backward(Meta, frozen=True, kw_only=True, tag="backward"):
    """Gradient of the loss with respect to `Hidden.hidden`: tensor `gradient` of its shape. Answer: `Gradient`."""

    session: str
    discard: bool = False  # first drop what was accumulated: the client cleared its gradients without a step


class Gradient(Meta, frozen=True, kw_only=True, tag="gradient"):
    """Gradient with respect to `Forward.hidden`: tensor `gradient` [N, d].

    `square_norm` is the squared L2 norm of the gradients accumulated in all remote stages since the last step.
    """

    square_norm: Amount


class Step(Meta, frozen=True, kw_only=True, tag="step"):
    """An optimiser step on its own, when nothing else is about to be sent. Answer: `Done`."""

    update: Update


class Pull(Meta, frozen=True, kw_only=True, tag="pull"):
    """Ask for the remote adapters, under the whole model's names. Answer: `State`."""

    optimizer: bool = False  # also the optimiser's moments, for a checkpoint


class Push(Meta, frozen=True, kw_only=True, tag="push"):
    """Set the remote adapters (and optimiser, if the tensors hold it), as `Pull` gave them. Answer: `Done`."""

    step: Count


class State(Meta, frozen=True, kw_only=True, tag="state"):
    """The remote adapters after `step` steps. Tensors: name in the whole model: values; `optimizer/...`: moments."""

    step: int


class Close(Meta, frozen=True, kw_only=True, tag="close"):
    """End a session, or with `session` None the run and all it holds at the server. Answer: `Done`."""

    session: str | None = None


class Done(Meta, frozen=True, kw_only=True, tag="done"):
    """It is done."""

    step: int = 0


class Failure(Meta, frozen=True, kw_only=True, tag="failure"):
    """The peer refused: an error's code and sentence (see errors.from_wire)."""

    code: str
    sentence: str


AnyMeta = Hello | Welcome | Forward | Hidden | Backward | Gradient | Step | Pull | Push | State | Close | Done | Failure


@dataclass(frozen=True, slots=True)
class Message:
    """The one thing that travels between parties."""

    meta: AnyMeta
    tensors: Mapping[str, torch.Tensor] = field(default_factory=dict)

    @property
    def kind(self) -> str:
        """The tag of the meta, e.g. "forward"."""
        return str(self.meta.__struct_config__.tag)


Handler = Callable[[Message], Message]
"""Whatever answers a message: a server, a link to a far one, or either behind guards. May raise a NorenError."""

Guard = Callable[[Message, Handler], Message]
"""Wraps a Handler: may change or refuse what goes out, and what comes back."""


def guarded(handler: Handler, *guards: Guard) -> Handler:
    """Return `handler` behind `guards`; the first guard is outermost, nearest to the sender."""
    for guard in reversed(guards):
        handler = _wrap(guard, handler)
    return handler


def _wrap(guard: Guard, inner: Handler) -> Handler:
    return lambda message: guard(message, inner)
