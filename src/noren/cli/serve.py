"""`noren serve`: hold one party's layers of a run, and answer its clients until told to stop."""

from __future__ import annotations

import json
import signal
import threading
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Annotated

import typer

from noren.cli.show import AsJson, RunFile, count_of, say

if TYPE_CHECKING:
    from noren.config import Document
    from noren.parties.server import Following
    from noren.partition.plan import Plan
    from noren.types import Handler, Message

EDGE_WORKERS = 16
"""Threads of a party that waits for the next one. A last party only computes, one thing at a time: one thread, so that
freed activations of one step are used again by the next, whoever's it is."""


def serve(
    run: RunFile,
    party: Annotated[str, typer.Option(help="Which party of the plan to be.")],
    listen: Annotated[str, typer.Option(help="host:port (port 0: any); default: the party's address in [links].")] = "",
    device: Annotated[str, typer.Option(help='Where to compute; default: "device" of the run document.')] = "",
    as_json: AsJson = False,
) -> None:
    """Serve one party's layers. Prints one line when it is ready; Ctrl-C or SIGTERM ends it."""
    from noren.config import Document
    from noren.errors import ConfigError, PlanError
    from noren.parties import fitness
    from noren.parties.client import credentials_for, pick_device
    from noren.parties.server import SpanServer
    from noren.partition.stage import Stage, open_slice
    from noren.wire.grpc_server import GrpcServer

    document = Document.read(run)
    settings = document.run
    names = list(dict.fromkeys(line.split()[0] for line in settings.plan if line.strip()))
    if party not in names[1:]:
        what = "is the client, which is not served" if party in names else "has no layers in the plan"
        raise PlanError(f"plan: {party!r} {what}; --party can be {', '.join(names[1:])}")
    address = listen or settings.links.get(party, "")
    credentials = credentials_for(document, party)
    credentials.check("server")
    part = open_slice(document.model, settings.plan, party, settings.task)
    if not address:
        raise ConfigError(f'links: no address for {party!r}; add `{party} = "host:port"` under [links], or --listen')
    fitness.require(part.whole, settings.task, part.location)
    place = pick_device(device or settings.device)

    import torch

    stage = Stage(part, getattr(torch, settings.dtype)).to(place)
    onward = following(document, part.plan, party)
    server = SpanServer(stage, lora=settings.adapter, limits=settings.serve, following=onward)
    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())
    workers = 1 if onward is None else EDGE_WORKERS
    with GrpcServer(address, credentials, server.connect, tick=server.expire, workers=workers) as listening:
        at = f"{address.rpartition(':')[0]}:{listening.port}"
        layers = ", ".join(f"{span.start}:{span.end}" for span in part.plan.remote if span.party == party)
        count = sum(tensor.numel() for tensor in part.tensors.values())
        if as_json:
            ready = {"ready": True, "party": party, "address": at, "port": listening.port, "device": str(place)}
            print(json.dumps(ready | {"layers": part.plan.kept(party), "parameters": count}), flush=True)
        else:
            print(f"ready: {party} on {at} (layers {layers}, {count_of(count)} parameters)", flush=True)
        while not stop.wait(timeout=0.5):  # a wait without end can miss a signal
            pass
    if not as_json:
        say("stopped")


def following(document: Document, plan: Plan, party: str) -> Following | None:
    """Return what opens a line to the party after `party` for each client's run; None for the last one.

    Raises ConfigError if that party's address is not known, or the certificate cannot be used for connecting to it.
    """
    from noren.errors import ConfigError
    from noren.parties.client import credentials_for
    from noren.wire.grpc_link import GrpcLink

    names = [span.party for span in plan.remote]
    if party == names[-1]:
        return None
    following = names[names.index(party) + 1]
    address = document.run.links.get(following)
    if address is None:
        raise ConfigError(f"links: no address for {following!r}, which comes after {party!r}; add it under [links]")
    credentials = credentials_for(document, party)
    credentials.check("client")

    def line(greet: Callable[[], Message], greeted: Callable[[Message], Iterable[Message]]) -> Handler:
        return GrpcLink(address, credentials, greet=greet, greeted=greeted)

    return line
