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

Count = Annotated[int, msgspec.Meta(ge=0, lt=1 << 48)]
Seed = Annotated[int, msgspec.Meta(ge=-(1 << 63), le=(1 << 63) - 1)]
Version = Annotated[int, msgspec.Meta(ge=0, lt=1 << 62)]
Base = Annotated[int, msgspec.Meta(ge=-1, lt=1 << 62)]
Rows = Annotated[list[Count], msgspec.Meta(max_length=65_536)]
"""One number for each sequence of a batch."""
Beta = Annotated[float, msgspec.Meta(ge=0, lt=1)]
Amount = Annotated[float, msgspec.Meta(ge=0)]
PROTOCOL = 4
"""Version of the protocol; both ends must have the same."""

Label = Annotated[str, msgspec.Meta(max_length=200)]
"""A name that a peer chose: a label, never a path."""

TOKEN = 32
"""Characters of one party's part of a resume token: those of the parties beyond follow."""

KEPT = "kept/"
"""Begins the names of what an edge sends along: its adapter and moments, for whoever takes its place."""


class Meta(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag_field="kind"):
    """What a message asks or answers, without its tensors. Fields are checked when bytes are decoded."""


class Noise(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What the client does to every vector before it leaves: clips its L2 norm, adds Gaussian noise.

    Without an accountant this is no guarantee of anything.
    """

    clip: Amount = 0.0  # most L2 norm of a vector; 0: not clipped
    scale: Amount = 0.0  # standard deviation of the noise on each coordinate; 0: none


class Together(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How the clients of a group train the layers that they do not hold (`[together]` in a run document).

    "alone": each client for itself. "sequential": one after another, on one adapter that all share. "client-batch": on
    one shared adapter, with what all have sent joined into one batch, each client's part weighted by its targets.
    "server-hierarchical": each a replica of the adapter, and the replicas are averaged again and again.
    """

    mode: Literal["alone", "sequential", "client-batch", "server-hierarchical"] = "alone"
    group: Annotated[str, msgspec.Meta(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")] = "all"
    clients: Annotated[int, msgspec.Meta(ge=1, le=4096)] = 1  # nobody begins before so many of the group are there
    wait_seconds: Annotated[float, msgspec.Meta(ge=0.01, le=86_400)] = 30.0  # a slow client is waited for so long
    clip: Amount = 1.0  # client-batch: most L2 norm of the joined gradient of the adapter; 0: no clipping
    every: Annotated[int, msgspec.Meta(ge=1, le=1 << 30)] = 10  # server-hierarchical: steps between averages
    weights: Literal["tokens", "samples"] = "tokens"  # server-hierarchical: what a replica's weight counts
    ends: bool = False  # server-hierarchical: average the clients' own adapters too, which then leave them
    cloud_adapter: Literal["replica", "shared"] = "replica"  # server-hierarchical: of the last party


def joins(together: Together) -> bool:
    """Whether what the clients send is joined into one batch, at one party at least."""
    shared = together.mode == "server-hierarchical" and together.cloud_adapter == "shared"
    return shared or together.mode == "client-batch"


class Terms(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What two parties agree on before a tensor crosses. A run's terms never change."""

    fingerprint: Label  # of the whole model (see partition.checkpoint.fingerprint)
    plan: list[str]  # the resolved cut, e.g. ["client 0:2", "server 2:6", "client 6:8"]
    task: Label  # which head the whole model carries, e.g. "causal-lm"
    dtype: Label  # of the tensors as each side computes with them, e.g. "bfloat16"
    base: Label = "plain"  # how the remote parties hold their frozen weights (see partition.quantise)
    lora: str  # canonical JSON of the LoRA settings of the remote stages, "" for none
    seed: Seed  # initial values of the remote adapters
    activations: Label = "raw"  # codec of hidden states, both ways (see wire.codecs)
    delta_bytes: Count = 0  # under "delta", budget of the samples that either end holds; else 0
    gradients: Label = "raw"  # codec of their gradients
    noise: Noise = Noise()  # what the client does to what it sends
    logs: Literal["metadata", "debug"] = "metadata"  # what a party may write down: never contents, unless "debug"
    together: Together = Together()
    loss_at: Literal["client", "cloud"] = "client"  # "cloud": labels leave, for the last party
    replaceable: bool = False  # parties between keep their state at the last one too: another may take their place


class Hello(Meta, frozen=True, kw_only=True, tag="hello"):
    """Client to server, first on every connection: what the client was set up for. Answer: `Welcome`."""

    protocol: int
    run: Label  # names this client's adapters and optimiser at the server; unique within the owner
    terms: Terms
    resume: Label = ""  # `Welcome.incarnation` of the state to go on with; without it the run begins anew
    own: dict[Label, list[Count]] = {}  # shapes of the client's own adapters, if `Average` is to carry them
    before: dict[Label, list[Count]] = {}  # from an edge: shapes of what the parties before this one train for the run
    moved: bool = False  # go on at a party that does not hold the run, or was told of it by another; see parties.moving


class Welcome(Meta, frozen=True, kw_only=True, tag="welcome"):
    """Server to client: accepted. The terms are the server's own, for the client to compare."""

    protocol: int
    party: Label
    terms: Terms
    adapter: dict[str, list[Count]]  # shapes of what all remote stages train for this run, by the whole model's names
    step: Count  # optimiser steps already applied to this run's remote adapters
    incarnation: Label  # resume token: names this run's state, here and beyond; another one means that it was lost


class Status(Meta, frozen=True, kw_only=True, tag="status"):
    """Ask a party how it is. Answer: `Condition`."""


class Condition(Meta, frozen=True, kw_only=True, tag="condition"):
    """How a party is: what it serves, and what it holds for all its clients together."""

    party: Label
    version: Label
    protocol: int
    model: Label  # fingerprint
    plan: list[str]
    layers: list[str]  # spans, e.g. ["2:6"]
    uptime_seconds: Amount
    draining: bool
    connections: Count
    sessions: Count
    runs: Count
    cache_bytes: Count
    journal_bytes: Count
    rss_bytes: Count
    spare: bool = False  # it stands in for others of its layers, and has none of its own work yet


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
    Applied once: a repeated `step` is acknowledged without effect.
    """

    step: Count
    scale: Amount
    optimizer: Optimizer


class Deltas(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a payload of differences says of the samples in it, in their order (see wire.codecs.delta)."""

    samples: list[Count]  # which: a number of the client's choice; no sample twice
    lengths: list[Count]  # rows of each
    bases: list[Base]  # version that each builds on; -1: none
    version: Version  # what all of them are afterwards


class Forward(Meta, frozen=True, kw_only=True, tag="forward"):
    """Hidden states of real tokens going up: tensor `hidden` [N, d]. Answer: `Hidden`.

    With the loss at the cloud, in training, also `labels` [N], the token that is to follow each, or -100 for none.

    A step is named by (session, start) and may be repeated: the server crops its cache to `start`, then appends.
    With `deltas`, `hidden` is a payload of differences, uint8; it is the same step as the values that it stands for.
    """

    session: Label  # in training "STEP.N": the N-th forward pass towards optimiser step STEP of the run
    start: Count  # columns of this session that the server must already hold; 0 begins (or replays) it
    lengths: Rows  # real tokens of each sequence in this message; B entries, summing to N
    padding: Literal["left", "right"]  # where the pads of the ragged batch were
    positions: Literal["row", "column"] = "row"  # do positions count from a row's first token or the first column?
    rows: Rows | None = None  # first reorder the session's sequences so (beam search), B entries
    keep: Count = 0  # only the last `keep` columns are wanted back; 0 means all
    train: bool = False  # keep the graph for a `Backward` of the same session; no cache
    dropout: bool = False  # the client's model is in training mode: the stage's dropouts are on
    update: Update | None = None
    ended: Annotated[list[Label], msgspec.Meta(max_length=4096)] = []  # sessions that the client no longer needs
    deltas: Deltas | None = None  # in training, under the codec "delta": what `hidden` is a difference from
    weight: Count = 0  # in training together: targets that the step's loss is a mean over; 0, or too many: real tokens


class Hidden(Meta, frozen=True, kw_only=True, tag="hidden"):
    """Hidden states (or the head's raw output) coming back: tensor `hidden` [N', d'].

    N' counts the real tokens among the last `keep` columns; or B rows if the head gives one row a sequence. Where
    labels went up, it is the loss at each token instead, [N, 1].
    """

    per_sequence: bool = False


class Backward(Meta, frozen=True, kw_only=True, tag="backward"):
    """Gradient of the loss with respect to `Hidden.hidden`: tensor `gradient` of its shape. Answer: `Gradient`."""

    session: Label
    discard: bool = False  # first drop what was accumulated: the client cleared its gradients without a step
    after: Label = ""  # session of a gradient that must count before this one, if several are under way


class Gradient(Meta, frozen=True, kw_only=True, tag="gradient"):
    """Gradient with respect to `Forward.hidden`: tensor `gradient` [N, d].

    `square_norm` is the squared L2 norm of the gradients accumulated in all remote stages since the last step.
    """

    square_norm: Amount


class Step(Meta, frozen=True, kw_only=True, tag="step"):
    """An optimiser step on its own, when nothing else is about to be sent. Answer: `Done`."""

    update: Update


class Enter(Meta, frozen=True, kw_only=True, tag="enter"):
    """Take part in the group's training from now on. Answer: `Done`, once it is the client's turn.

    Until then it is refused with `Failure.retry_after`: too few are there, or another one is at work.
    """


class Leave(Meta, frozen=True, kw_only=True, tag="leave"):
    """Take no part any more: nobody waits for this client. Answer: `Done`."""


class Average(Meta, frozen=True, kw_only=True, tag="average"):
    """After `step` steps: average the replicas of all who take part. Tensors: the client's own adapters, if agreed.

    Answer: `State` with the average of those, once all have asked or were waited for long enough.
    """

    step: Count
    weight: Count  # of this client's replica
    update: Update | None = None  # the last step, if it was not sent yet


class Pull(Meta, frozen=True, kw_only=True, tag="pull"):
    """Ask for the remote adapters, under the whole model's names. Answer: `State`."""

    optimizer: bool = False  # also the optimiser's moments, for a checkpoint
    kept: bool = False  # from an edge: instead, what the parties before have kept here (see KEPT)


class Push(Meta, frozen=True, kw_only=True, tag="push"):
    """Set the remote adapters (and optimiser, if the tensors hold it), as `Pull` gave them. Answer: `Done`."""

    step: Count


class State(Meta, frozen=True, kw_only=True, tag="state"):
    """The remote adapters after `step` steps. Tensors: name in the whole model: values; `optimizer/...`: moments."""

    step: Count


class Close(Meta, frozen=True, kw_only=True, tag="close"):
    """End a session, or with `session` None the run and all it holds at the server. Answer: `Done`."""

    session: str | None = None


class Done(Meta, frozen=True, kw_only=True, tag="done"):
    """It is done."""

    step: Count = 0


class Failure(Meta, frozen=True, kw_only=True, tag="failure"):
    """The peer refused: an error's code and sentence (see errors.from_wire)."""

    code: str
    sentence: str
    retry_after: Amount = 0.0  # seconds; above 0, the same request may be sent again then


AnyMeta = (
    Hello | Welcome | Status | Condition | Forward | Hidden | Backward | Gradient | Step | Enter | Leave | Average
    | Pull | Push | State | Close | Done | Failure
)  # fmt: skip


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

Release = Callable[[Message], Message]
"""What is done once to a message before it leaves its party, however often it is then sent (see privacy.release)."""


def guarded(handler: Handler, *guards: Guard) -> Handler:
    """Return `handler` behind `guards`; the first guard is outermost, nearest to the sender."""
    for guard in reversed(guards):
        handler = _wrap(guard, handler)
    return handler


def _wrap(guard: Guard, inner: Handler) -> Handler:
    return lambda message: guard(message, inner)
