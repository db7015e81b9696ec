"""`noren serve`: hold one party's layers of a run, and answer its clients until told to stop."""

from __future__ import annotations

import json
import logging
import signal
import time
from collections.abc import Callable
from contextlib import ExitStack
from typing import TYPE_CHECKING, Annotated

import typer

from noren.cli.show import AsJson, Insecurely, RunFile, count_of, say

if TYPE_CHECKING:
    from noren.config import Document
    from noren.parties.runs import Following, Greet, Greeted
    from noren.parties.server import SpanServer
    from noren.partition.plan import Plan
    from noren.types import Handler, Message
    from noren.wire.envelope import Expect
    from noren.wire.observe import Observed


def serve(
    run: RunFile,
    party: Annotated[str, typer.Option(help="Which party of the plan to be.")],
    listen: Annotated[str, typer.Option(help="host:port (port 0: any); default: the party's address in [links].")] = "",
    device: Annotated[str, typer.Option(help='Where to compute; default: "device" of the run document.')] = "",
    metrics: Annotated[
        str, typer.Option(help='Show Prometheus metrics at "host:port" (":port": this machine only).')
    ] = "",
    log_json: Annotated[bool, typer.Option("--log-json", help="Write logs as JSON, one object a line.")] = False,
    insecure: Insecurely = False,
    as_json: AsJson = False,
) -> None:
    """Serve one party's layers. Prints one line when it is ready; Ctrl-C or SIGTERM ends it, a second one at once.

    It then takes no new runs, and serves those who are connected for `drain_seconds` of [serve].
    """
    from noren.config import Document
    from noren.errors import ConfigError, PlanError
    from noren.parties import fitness
    from noren.parties.client import credentials_for, pick_device
    from noren.parties.server import SpanServer
    from noren.partition.stage import Stage, open_slice
    from noren.wire.grpc_server import GrpcServer
    from noren.wire.journal import Journal
    from noren.wire.logs import setup_logs
    from noren.wire.observe import Observed, serve_metrics

    document = Document.read(run)
    settings = document.run
    names = list(dict.fromkeys(line.split()[0] for line in settings.plan if line.strip()))
    if party not in names[1:]:
        what = "is the client, which is not served" if party in names else "has no layers in the plan"
        raise PlanError(f"plan: {party!r} {what}; --party can be {', '.join(names[1:])}")
    address = listen or settings.links.get(party, "")
    credentials = credentials_for(document, party, insecure=insecure)
    credentials.check("server")
    part = open_slice(document.model, settings.plan, party, settings.task)
    if not address:
        raise ConfigError(f'links: no address for {party!r}; add `{party} = "host:port"` under [links], or --listen')
    fitness.require(part.whole, settings.task, part.location)
    place = pick_device(device or settings.device)

    import torch

    stage = Stage(part, getattr(torch, settings.dtype), settings.base).to(place)
    part.let_go()
    onward = following(document, part.plan, party, insecure=insecure)
    if log_json:
        logging.getLogger("noren").setLevel(min(logging.INFO, logging.getLogger("noren").getEffectiveLevel()))
    setup_logs(log_json, logging.getLogger("noren").getEffectiveLevel())
    observed = Observed()
    signals: list[int] = []
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda received, _: signals.append(received))
    with ExitStack() as stack:
        journal = None
        if settings.serve.journal:
            folder = document.path(settings.serve.journal.replace("{party}", party))
            journal = stack.enter_context(Journal(folder, max_bytes=settings.serve.journal_bytes))
        server = SpanServer(stage, lora=settings.adapter, limits=settings.serve, following=onward, journal=journal)
        stack.callback(server.close)
        observe(observed, server)
        if metrics:
            stack.enter_context(serve_metrics(metrics, observed))
        listening = stack.enter_context(
            GrpcServer(
                address, credentials, server.connect, doors=settings.doors, tick=server.expire,
                keepalive=settings.wire.keepalive_seconds, observed=observed,
            )
        )  # fmt: skip
        at = f"{address.rpartition(':')[0]}:{listening.port}"
        layers = ", ".join(f"{span.start}:{span.end}" for span in part.plan.remote if span.party == party)
        count = sum(tensor.numel() for tensor in part.tensors.values())
        if as_json:
            ready = {"ready": True, "party": party, "address": at, "port": listening.port, "device": str(place)}
            print(json.dumps(ready | {"layers": part.plan.kept(party), "parameters": count}), flush=True)
        else:
            print(f"ready: {party} on {at} (layers {layers}, {count_of(count)} parameters)", flush=True)
        while not signals:  # no lock: a signal that comes while one is held would wait for it without end
            time.sleep(0.1)
        server.draining = True
        listening.drain(settings.serve.drain_seconds, hurry=lambda: len(signals) > 1)
    if not as_json:
        say("stopped")


def observe(observed: Observed, server: SpanServer) -> None:
    """Let the figures of a party be read."""
    for name in ("sessions", "runs", "cache_bytes", "journal_bytes"):
        observed.watch(f"noren_{name}", lambda name=name: getattr(server.condition(), name))  # type: ignore[misc]
    observed.watch("noren_steps_total", lambda: server.steps)


def following(document: Document, plan: Plan, party: str, *, insecure: bool) -> Following | None:
    """Return what opens a line to the party after `party` for each client's run; None for the last one.

    Raises ConfigError if that party's address is not known, or the certificate cannot be used for connecting to it.
    """
    import msgspec

    from noren.errors import ConfigError
    from noren.parties.client import credentials_for
    from noren.types import Hello
    from noren.wire.grpc_link import GrpcLink

    names = [span.party for span in plan.remote]
    if party == names[-1]:
        return None
    following = names[names.index(party) + 1]
    address = document.run.links.get(following)
    if address is None:
        raise ConfigError(f"links: no address for {following!r}, which comes after {party!r}; add it under [links]")
    credentials = credentials_for(document, party, insecure=insecure)
    credentials.check("client")

    def line(greet: Greet, greeted: Greeted, expect: Callable[[Message], Expect]) -> Handler:
        hello = greet().meta
        assert isinstance(hello, Hello)
        wire = msgspec.structs.replace(
            document.run.wire, activations=hello.terms.activations, gradients=hello.terms.gradients
        )
        return GrpcLink(address, credentials, greet=greet, greeted=greeted, expect=expect, wire=wire)

    return line
