"""`noren serve`: hold one party's layers of a run, and answer its clients until told to stop."""

from __future__ import annotations

import json
import logging
import signal
import time
from contextlib import ExitStack
from typing import Annotated

import typer

from noren.cli.show import AsJson, Insecurely, RunFile, count_of, say


def serve(
    run: RunFile,
    party: Annotated[str, typer.Option(help="Which party of the plan to be.")],
    listen: Annotated[str, typer.Option(help="host:port (port 0: any); default: the party's address in `links`.")] = "",
    device: Annotated[str, typer.Option(help='Where to compute; default: "device" of the run document.')] = "",
    metrics: Annotated[
        str, typer.Option(help='Show Prometheus metrics at "host:port" (":port": this machine only).')
    ] = "",
    stand_in: Annotated[
        str,
        typer.Option(
            help='"PARTY=host:port": also serve the layers of the party before this one, loaded when they are first '
            "needed; list that address last in the party's `links`."
        ),
    ] = "",
    log_json: Annotated[bool, typer.Option("--log-json", help="Write logs as JSON, one object a line.")] = False,
    insecure: Insecurely = False,
    as_json: AsJson = False,
) -> None:
    """Serve one party's layers. Prints one line when it is ready; Ctrl-C or SIGTERM ends it, a second one at once.

    It then takes no new runs, and serves those who are connected for `serve.drain_seconds`.
    """
    from noren.config import Document
    from noren.errors import ConfigError, PlanError
    from noren.parties import fitness
    from noren.parties.lines import credentials_for, pick_device
    from noren.parties.serving import Serving
    from noren.partition.stage import open_slice
    from noren.wire.logs import setup_logs
    from noren.wire.observe import serve_metrics

    document = Document.read(run)
    settings = document.run
    names = list(dict.fromkeys(line.split()[0] for line in settings.plan if line.strip()))
    if party not in names[1:]:
        what = "is the client, which is not served" if party in names else "has no layers in the plan"
        raise PlanError(f"plan: {party!r} {what}; --party can be {', '.join(names[1:])}")
    addresses = document.addresses(party)
    if len(addresses) > 1 and not listen:
        raise ConfigError(f"links: {party!r} has {len(addresses)} addresses; say which this one is, with --listen")
    address = listen or "".join(addresses)
    credentials_for(document, party, insecure=insecure).check("server")
    part = open_slice(document.model, settings.plan, party, settings.task)
    if not address:
        raise ConfigError(f'links: no address for {party!r}; add `{party} = "host:port"` under [links], or --listen')
    fitness.require(part.whole, settings.task, part.location)
    place = pick_device(device or settings.device)
    if log_json:
        logging.getLogger("noren").setLevel(min(logging.INFO, logging.getLogger("noren").getEffectiveLevel()))
    setup_logs(log_json, logging.getLogger("noren").getEffectiveLevel())
    signals: list[int] = []
    with Serving(document, part, place, insecure=insecure) as serving, ExitStack() as stack:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda received, _: signals.append(received))
        if metrics:
            stack.enter_context(serve_metrics(metrics, serving.observed))
        port = serving.listen(address)
        spare = serving.stand_in(stand_in) if stand_in else None
        at = f"{address.rpartition(':')[0]}:{port}"
        layers = ", ".join(f"{span.start}:{span.end}" for span in part.plan.remote if span.party == party)
        count = sum(tensor.numel() for tensor in part.tensors.values())
        if as_json:
            ready = {"ready": True, "party": party, "address": at, "port": port, "device": str(place)}
            ready |= {"stand_in_port": spare} if spare else {}
            print(json.dumps(ready | {"layers": part.plan.kept(party), "parameters": count}), flush=True)
        else:
            also = f", stands in for {stand_in.partition('=')[0]} on port {spare}" if spare else ""
            print(f"ready: {party} on {at} (layers {layers}, {count_of(count)} parameters){also}", flush=True)
        while not signals:  # no lock: a signal that comes while one is held would wait for it without end
            time.sleep(0.1)
        serving.drain(hurry=lambda: len(signals) > 1)
    if not as_json:
        say("stopped")
