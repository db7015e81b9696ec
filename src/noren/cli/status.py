"""`noren status`: how is the party at an address?"""

from __future__ import annotations

import json
from datetime import timedelta
from pathlib import Path
from time import sleep as _pause
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from noren.cli.show import AsJson, Insecurely, bytes_of, say
from noren.errors import LinkError, ProtocolError

if TYPE_CHECKING:
    from noren.types import Condition
    from noren.wire.identity import Credentials, Insecure

PATIENCE = 3.0
"""Seconds in which the party must answer."""


def status(
    address: Annotated[str, typer.Argument(help="host:port of the party.")],
    keys: Annotated[Path, typer.Option(help="The folder of ca.crt, NAME.crt and NAME.key.")] = Path("keys"),
    name: Annotated[str, typer.Option(help="Whose certificate to show: a client's or an edge's.")] = "client",
    watch: Annotated[
        float | None, typer.Option(min=0.1, metavar="SECONDS", help="Ask again so often, until Ctrl-C.")
    ] = None,
    insecure: Insecurely = False,
    as_json: AsJson = False,
) -> None:
    """Ask a party what it serves and holds; exit code 4 if it cannot be reached, 5 if it refuses."""
    from noren.wire.identity import Credentials, Insecure

    own = Credentials(ca=keys / "ca.crt", certificate=keys / f"{name}.crt", key=keys / f"{name}.key")
    credentials = Insecure() if insecure else own
    _tell(address, *_ask(address, credentials), as_json=as_json)
    while watch is not None:
        _pause(watch)
        try:
            answer = _ask(address, credentials)
        except LinkError as error:  # it was there a moment ago: that it is gone is what one watches for
            _tell_gone(address, error, as_json=as_json)
            continue
        _tell(address, *answer, as_json=as_json)


def _ask(address: str, credentials: Credentials | Insecure) -> tuple[Condition, str]:
    """Return the party's own answer, and that of its health service. Raises LinkError or PeerError."""
    from noren.types import Condition, Message, Status
    from noren.wire.grpc_link import GrpcLink
    from noren.wire.observe import check_health
    from noren.wire.settings import Wire

    link = GrpcLink(address, credentials, first_seconds=PATIENCE, wire=Wire(deadline_seconds=2 * PATIENCE))
    try:
        condition = link(Message(Status())).meta
    finally:
        link.close()
    if not isinstance(condition, Condition):
        raise ProtocolError(f"{address} answered a 'status' with something else; are both of one version of Noren?")
    return condition, check_health(address, credentials, PATIENCE)


def _tell(address: str, condition: Condition, health: str, *, as_json: bool) -> None:
    import msgspec

    if as_json:
        told: dict[str, Any] = {"address": address, "health": health, **msgspec.structs.asdict(condition)}
        typer.echo(json.dumps(told))
        return
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    for what, value in _rows(condition, health):
        table.add_row(what, value)
    say(f"{condition.party} at {address}")
    Console(highlight=False, markup=False).print(table)


def _tell_gone(address: str, error: LinkError, *, as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps({"address": address, "health": "UNREACHABLE", "message": str(error)}))
    else:
        say(f"cannot be reached: {error}")


def _rows(condition: Condition, health: str) -> list[tuple[str, str]]:
    state = "draining: it takes no new runs" if condition.draining else health.lower().replace("_", " ")
    return [
        ("health", state),
        ("version", f"{condition.version}, protocol {condition.protocol}"),
        ("model", condition.model),
        ("plan", ", ".join(condition.plan)),
        ("layers", ", ".join(condition.layers)),
        ("up for", str(timedelta(seconds=int(condition.uptime_seconds)))),
        ("connections", str(condition.connections)),
        ("sessions", str(condition.sessions)),
        ("runs", str(condition.runs)),
        ("cache", bytes_of(condition.cache_bytes)),
        ("journal", bytes_of(condition.journal_bytes)),
        ("memory", bytes_of(condition.rss_bytes)),
    ]
