"""`noren keys`: make the authority of a federation, issue certificates from it, list and revoke them."""

from __future__ import annotations

import dataclasses
import json
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Column, Table

from noren.errors import ConfigError
from noren.wire import identity

app = typer.Typer(no_args_is_help=True, help="Certificates by which the parties of a federation know each other.")

Folder = Annotated[Path, typer.Option("--dir", help="The authority's folder.")]


class RoleName(StrEnum):
    """The roles as choices of the command line (see identity.Role)."""

    client = "client"
    edge = "edge"
    server = "server"


def _say(line: str) -> None:
    Console(highlight=False).print(line, markup=False, soft_wrap=True)


@app.command("init")
def init(
    folder: Folder = Path("keys"),
    federation: Annotated[str, typer.Option(help="The name that stands in every identity.")] = "noren",
) -> None:
    """Make the federation's authority."""
    identity.create_authority(folder, federation)
    _say(f"{folder / 'ca.crt'}: give it to every party, by a way that nobody can tamper with")
    _say(f"{folder / 'ca.key'}: keep it here; whoever has it can be any party")


@app.command("issue")
def issue(
    name: Annotated[str, typer.Argument(help="The party's name.")],
    role: Annotated[RoleName, typer.Option(help="client connects, server is connected to, edge is both.")],
    host: Annotated[
        list[str] | None,
        typer.Option(help="DNS name or IP address of a server or edge; repeat it. Default: loopback."),
    ] = None,
    days: Annotated[float, typer.Option(help="How long the certificate is valid.")] = identity.LEAF_DAYS,
    folder: Folder = Path("keys"),
) -> None:
    """Issue a certificate and its private key; an earlier pair of that name is replaced."""
    if host and role is RoleName.client:
        raise ConfigError("a client is not connected to, so its certificate has no host: leave --host out")
    certificate = identity.issue(folder, name, role.value, tuple(host or identity.LOOPBACK), days)
    _say(f"{certificate}: {identity.read_identity(certificate).uri}, valid for {days:g} days")
    _say(f"{certificate.with_suffix('.key')}: its private key; only {name} needs it")


@app.command("revoke")
def revoke(
    name: Annotated[str, typer.Argument(help="The party's name.")],
    folder: Folder = Path("keys"),
) -> None:
    """Revoke all certificates of a party that have not expired."""
    serials = identity.revoke(folder, name)
    if not serials:
        _say(f"{name} has no certificate that has neither expired nor been revoked: nothing was changed")
        return
    for serial in serials:
        _say(f"revoked {serial} of {name}")
    _say(f"{folder / 'crl.pem'}: copy it beside ca.crt on each server; there it ends {name}'s connections in seconds")
    _say(f"to let {name} in again, issue it a new certificate")


@app.command("roll")
def roll(folder: Folder = Path("keys")) -> None:
    """Make a new authority; the old one's certificates stay valid until they expire."""
    end = identity.roll_over(folder)
    _say(f"1. {folder / 'ca.crt'} holds the new authority and the old: give it to every party, by a safe way")
    _say("2. after that, issue each party's certificate again: new ones are the new authority's")
    _say(f"the old authority is trusted until {end:%Y-%m-%d %H:%M} UTC; to end that sooner, take its certificate (the")
    _say("second) out of every ca.crt once no party uses one that it issued")
    _say(f"{folder / 'ca-old.key'}: keep it here; revoking what the old authority issued needs it")


@app.command("list")
def list_(
    folder: Folder = Path("keys"),
    as_json: Annotated[bool, typer.Option("--json", help="Print a JSON array.")] = False,
) -> None:
    """List the certificates issued, also those that others have replaced, until they expire."""
    rows = identity.listing(folder)
    if as_json:
        records = [dataclasses.asdict(row) | {"not_after": row.not_after.isoformat()} for row in rows]
        typer.echo(json.dumps(records))
        return
    table = Table("name", "role", "valid until", Column("serial", overflow="fold"), box=None)
    for row in rows:
        state = " (revoked)" if row.revoked else " (expired)" if row.expired else ""
        table.add_row(row.name, row.role, f"{row.not_after:%Y-%m-%d %H:%M} UTC{state}", row.serial)
    Console(highlight=False).print(table)
