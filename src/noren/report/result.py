"""What one run did, in numbers: the only thing that the report is made from.

Everything here goes to JSON and comes back the same through msgspec, so that `result.json` beside a report is enough
to draw it again. Bytes are bytes, times are seconds, losses are nats per token unless a task says otherwise.
"""

from __future__ import annotations

from typing import Literal

import msgspec


class Part(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What one party held of the model."""

    party: str
    layers: list[int]  # counted from 0
    holds: list[str]  # besides the layers, in words, e.g. ["embedding", "head"]
    parameters: int
    file_bytes: int


class Sample(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Text that the model wrote after `prompt`, before and after it was tuned."""

    prompt: str
    before: str
    after: str


class Side(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One training run seen from outside: over the cut, or in one process."""

    losses: list[float]  # one a step
    held_out_before: float
    held_out_after: float
    peak_bytes: int  # peak resident memory of the process; 0 if it was not measured


class ClientResult(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What one client did, beside the same training in one process."""

    name: str
    site: str
    split: Side
    whole: Side
    largest_loss_difference: float  # over all steps
    largest_adapter_difference: float  # over all trained values
    steps: int
    tokens_per_step: float
    bytes_per_step: float  # all that crossed, headers included, both ways
    bytes_floor_per_step: float  # 4 x tokens x hidden size x bytes of an element
    round_trips_per_step: float
    generated_tokens: int
    round_trips_per_token: float
    bytes_per_token: float
    seconds: float
    samples: list[Sample]
    adapter: str  # folder


class Crossing(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One example of a kind of message that crossed. `direction` "up" is from client to server."""

    direction: Literal["up", "down"]
    kind: str
    fields: list[str]
    tensors: list[str]
    bytes: int


class DemoResult(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A whole run: the cut, every client, what crossed, and what it took."""

    title: str
    model: str
    model_parameters: int
    hidden_size: int
    layers: int
    plan: list[str]  # e.g. ["client 0:2", "server 2:6", "client 6:8"]
    dtype: str  # of what crosses
    parts: list[Part]
    clients: list[ClientResult]
    server_peak_bytes: int  # 0 if it was not measured
    whole_peak_bytes: int  # the same training in one process; 0 if it was not measured
    crossings: list[Crossing]
    absent: list[str]  # what was looked for in every message and not found, e.g. "token ids"
    seconds: float
    versions: dict[str, str]
    folder: str  # where the run's files are


class UserResult(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What one user of several tiers did, where its edge may have died, beside the same where none did."""

    name: str
    edge: str  # at first
    later: str  # the edge that it ended at
    moved_at: int  # step at hand when its edge died; 0 if it did not
    losses: list[float]  # one a step
    undisturbed: list[float]  # the same, where no edge died
    held_out_before: float
    held_out_after: float
    steps: list[int]  # that its record holds, in order
    adapter: str  # folder


class TiersResult(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A run over users, edges and a cloud of which one edge was killed, and the same run undisturbed."""

    title: str
    model: str
    plan: list[str]
    every: int  # steps between averages
    killed: str
    users: list[UserResult]
    largest_loss_difference: float  # between the two runs, over all users and steps
    largest_adapter_difference: float
    users_agree: bool  # whether all users ended with the same adapters
    peak_bytes: dict[str, int]  # of each process, by name; 0 if it was not measured
    seconds: float
    folder: str
