"""Where a party computes, what it shows to others, and a client's line to them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial

import torch

from noren.config import Document
from noren.errors import ConfigError
from noren.parties.edges import AnyOf
from noren.partition.plan import Plan
from noren.types import Message
from noren.wire.envelope import Expect
from noren.wire.grpc_link import GrpcLink
from noren.wire.identity import Credentials, Insecure


def pick_device(wanted: str) -> torch.device:
    """Return the device that a document asks for; "auto" is a GPU if there is one. Raises ConfigError."""
    if wanted == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.empty(0, device=wanted).device
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"device {wanted!r} cannot be used here: {str(error).splitlines()[0]}") from error


def credentials_for(document: Document, party: str, *, insecure: bool = False) -> Credentials | Insecure:
    """Return the certificate that a party of the run presents; with `insecure`, none: the line is plain text."""
    if insecure:
        return Insecure()
    folder, name = document.path(document.run.keys.dir), document.run.keys.name or party
    return Credentials(ca=folder / "ca.crt", certificate=folder / f"{name}.crt", key=folder / f"{name}.key")


def line_to(
    document: Document,
    plan: Plan,
    *,
    greet: Callable[[], Message],
    greeted: Callable[[Message], Iterable[Message]],
    expect: Callable[[Message], Expect],
    insecure: bool,
) -> GrpcLink | AnyOf:
    """Return the client's line to the first remote party (see GrpcLink for `greet`, `greeted` and `expect`).

    To any of them if the document names several. Raises ConfigError.
    """
    run, party = document.run, plan.remote[0].party
    addresses = document.addresses(party)
    if not addresses:
        raise ConfigError(f'links: no address for the party {party!r}; add `{party} = "host:port"` under [links]')
    credentials = credentials_for(document, plan.client, insecure=insecure)
    line = partial(GrpcLink, credentials=credentials, greet=greet, greeted=greeted, expect=expect, wire=run.wire)
    if len(addresses) == 1:
        return line(addresses[0])
    ask = partial(GrpcLink, credentials=credentials, first_seconds=2.0)
    name = f"{credentials.certificate.name if isinstance(credentials, Credentials) else ''} {run.name}"
    return AnyOf(addresses, line, run.edges, ask=ask, name=name, patience=run.wire.patience_seconds)


def replaceable(document: Document, plan: Plan) -> bool:
    """Whether the first remote party is one of several, and another one after it can keep its state."""
    return len(plan.remote) > 1 and len(document.addresses(plan.remote[0].party)) > 1
