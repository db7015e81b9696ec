"""`noren plan`: what a cut costs, before anything is downloaded or started."""

from __future__ import annotations

import dataclasses
import json
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Column, Table

from noren.cli.show import AsJson, DtypeName, Model, Task, TaskName, bytes_of, count_of, place_of, say

if TYPE_CHECKING:
    from noren.partition.checkpoint import Checkpoint
    from noren.partition.estimate import Cost
    from noren.training.footprint import Footprint


def plan(
    model: Model,
    cut: Annotated[str, typer.Option("--plan", help='The cut; default: "client :2, server 2:-2, client -2:".')] = "",
    task: Task = TaskName.causal_lm,
    dtype: Annotated[DtypeName, typer.Option(help="Of the weights, and of what crosses.")] = DtypeName.float32,
    batch: Annotated[int, typer.Option(min=1, help="Sequences in a training step.")] = 8,
    length: Annotated[int, typer.Option(min=1, help="Tokens in a sequence.")] = 128,
    clients: Annotated[int, typer.Option(min=1, help="Clients that train through the remote parties at once.")] = 1,
    as_json: AsJson = False,
) -> None:
    """Show what each party would hold and what would cross, from the config and the shards' headers alone."""
    from noren.adapters.lora import Lora, targets_for
    from noren.config import DEFAULT_PLAN
    from noren.partition.estimate import estimate
    from noren.partition.sources import open_checkpoint

    checkpoint = open_checkpoint(place_of(model))
    cost = estimate(
        checkpoint, cut or DEFAULT_PLAN, task=task.value, dtype=dtype.value, batch=batch, length=length,
        targets=lambda model_type: targets_for(Lora(), model_type),
    )  # fmt: skip
    memory = peaks(checkpoint, cost, clients)
    if as_json:
        rows = [dataclasses.asdict(row) | {"peak": row.peak} for row in memory]
        typer.echo(json.dumps(as_record(cost) | {"clients": clients, "memory": rows}))
    else:
        _print(cost)
        _print_memory(cost, memory, clients)


def peaks(checkpoint: Checkpoint, cost: Cost, clients: int) -> tuple[Footprint, ...]:
    """Predict the peak memory of each party in training, on this machine; nothing where it cannot be told."""
    import noren.parties.train  # what a party loads takes memory
    import noren.wire.grpc_server  # noqa: F401
    from noren.adapters.lora import Lora
    from noren.errors import ConfigError, UnfitModel
    from noren.parties.server import Limits
    from noren.partition.slices import load_config
    from noren.training.footprint import base_memory, footprints

    try:
        return footprints(
            checkpoint, cost.plan.lines(), lora=Lora(), base=base_memory(load_config(checkpoint)), task=cost.task,
            dtype=cost.dtype, batch=cost.batch, length=cost.length, clients=clients, graph_bytes=Limits().graph_bytes,
        )  # fmt: skip
    except (ConfigError, UnfitModel):  # no targets are known for the architecture, or it cannot be built small
        return ()


def as_record(cost: Cost) -> dict[str, Any]:
    """Return a cost as JSON can hold it; the plan as its resolved lines."""
    shallow = {field.name: getattr(cost, field.name) for field in dataclasses.fields(cost)}
    rows = {name: [dataclasses.asdict(row) for row in shallow[name]] for name in ("parties", "crossings")}
    return shallow | rows | {"plan": cost.plan.lines(), "layers": cost.plan.layers, "codecs": codec_bytes(cost)}


def codec_bytes(cost: Cost) -> dict[str, dict[str, float]]:
    """Return, for each codec, the bytes that cross one line: of a generated token, and of a training step.

    The step has the codec for activations and for gradients. "at_most": the codec's size depends on the values.
    """
    import torch

    from noren.wire.codecs import CODECS

    dtype = getattr(torch, cost.dtype)
    line, width, tokens = cost.crossings[0], cost.hidden_size, cost.batch * cost.length
    back = line.token_bytes // dtype.itemsize - width  # elements of an answer to one token
    rows = (line.step_bytes // (2 * dtype.itemsize) - tokens * width) // back
    out = {}
    for name, codec in CODECS.items():
        token = codec.size([1, width], dtype) + codec.size([1, back], dtype)
        step = 2 * (codec.size([tokens, width], dtype) + codec.size([rows, back], dtype))
        out[name] = {
            "token_bytes": token, "step_bytes": step, "of_raw": round(step / line.step_bytes, 4),
            "at_most": not codec.fixed,
        }  # fmt: skip
    return out


def _print(cost: Cost) -> None:
    say(f"{cost.model}: {cost.architecture}, {cost.plan.layers} layers, {count_of(cost.parameters)} parameters")
    say(f"plan: {cost.plan}")
    table = Table(
        "party",
        Column("holds", overflow="fold"),
        *(Column(name, justify="right") for name in ("parameters", "in files", "in memory", "KV a token", "LoRA r=8")),
        box=None,
    )
    for party in cost.parties:
        adapters = "-" if party.adapter_parameters is None else f"{party.adapter_parameters:,}"
        table.add_row(
            party.party, ", ".join(party.holds), f"{party.parameters:,}", bytes_of(party.file_bytes),
            bytes_of(party.memory_bytes), bytes_of(party.cache_bytes_per_token), adapters,
        )  # fmt: skip
    Console(highlight=False).print(table)
    say(f"memory, KV and what crosses: {cost.dtype}; a training step: {cost.batch} x {cost.length} tokens")
    for line in cost.crossings:
        say(
            f"{line.sender} <-> {line.receiver}: {bytes_of(line.token_bytes)} and {cost.token_round_trips} round trip "
            f"a generated token, {bytes_of(line.step_bytes)} and {cost.step_round_trips} round trips a training step"
        )
    codecs = Table("codec", *(Column(name, justify="right") for name in ("a token", "a step", "of raw")), box=None)
    for name, row in codec_bytes(cost).items():
        most = "<= " if row["at_most"] else ""
        codecs.add_row(name, bytes_of(row["token_bytes"]), most + bytes_of(row["step_bytes"]), f"{row['of_raw']:.1%}")
    Console(highlight=False).print(codecs)
    say("codecs: wire.activations and wire.gradients of the run document; what crosses one line with both set to it")
    if any(party.adapter_parameters is None for party in cost.parties):
        say("LoRA: no default targets for this architecture; name them as adapter.targets")


def _print_memory(cost: Cost, memory: tuple[Footprint, ...], clients: int) -> None:
    if not memory:
        say("memory at the peak of training: cannot be told for this architecture")
        return
    parts = ("base", "weights", "activations", "working", "adapters", "messages", "heap")
    table = Table("peak memory", *(Column(name, justify="right") for name in ("in all", *parts)), box=None)
    for row in memory:
        table.add_row(row.party, bytes_of(row.peak), *(bytes_of(getattr(row, name)) for name in parts))
    Console(highlight=False).print(table)
    say(
        f"peak memory: in training on a processor, {clients} client{'s' * (clients > 1)} at once, {cost.batch} x "
        f"{cost.length} tokens each; 'base' is Python and its libraries on this machine"
    )
