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
