"""What a party is called, and at which ends of a connection it may stand."""

from __future__ import annotations

import ipaddress
import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Literal, cast, get_args

from noren.errors import ConfigError

if TYPE_CHECKING:
    from cryptography import x509

Role = Literal["client", "edge", "server"]
"""What a party is: a client connects, a server is connected to, an edge is both."""

Use = Literal["client", "server"]
"""The end of a connection that a certificate is used at."""

USES: dict[Role, tuple[Use, ...]] = {
    "client": ("client",),
    "edge": ("client", "server"),
    "server": ("server",),
}
"""The ends at which each role may stand; the extended key usages of its certificate are exactly these."""

LOOPBACK = ("localhost", "127.0.0.1", "::1")
LEAF_DAYS = 7
"""How long a party's certificate is valid unless said otherwise."""

RESERVED = ("ca", "ca-old")
"""Names of the authority's own files, which no party may have."""

NEW_AUTHORITY = "make a new authority with `noren keys init --dir NEW_FOLDER`"
_NAME = r"[a-z0-9][a-z0-9-]{0,62}"
_URI = re.compile(rf"spiffe://({_NAME})/({'|'.join(get_args(Role))})/({_NAME})")
_AUTHORITY_URI = re.compile(rf"spiffe://({_NAME})")
_LABEL = r"[A-Za-z0-9]([A-Za-z0-9-]{0,61}[A-Za-z0-9])?"
_HOST = re.compile(rf"(?=.{{1,253}}$){_LABEL}(\.{_LABEL})*")


@dataclass(frozen=True, slots=True)
class Identity:
    """One party of one federation, as its certificate names it."""

    name: str
    role: Role
    federation: str

    @property
    def uri(self) -> str:
        """The SPIFFE URI that stands in the certificate."""
        return f"spiffe://{self.federation}/{self.role}/{self.name}"


@dataclass(frozen=True, slots=True)
class Issued:
    """A certificate that an authority issued. `serial` is hexadecimal, as openssl prints it."""

    name: str
    role: Role
    not_after: datetime
    serial: str
    expired: bool
    revoked: bool


def parse_identity(uri: str) -> Identity:
    """Return the identity that a SPIFFE URI names. Raises ConfigError if it has another form."""
    match = _URI.fullmatch(uri)
    if match is None:
        raise ConfigError(
            f"{uri!r} is not an identity: it must read spiffe://<federation>/<{'|'.join(USES)}>/<name>, "
            f"with names of the form {_NAME}"
        )
    return Identity(match[3], cast(Role, match[2]), match[1])


def federation_of(uri: str) -> str | None:
    """Return the federation whose authority a URI names, None if it names none."""
    match = _AUTHORITY_URI.fullmatch(uri)
    return match[1] if match else None


def check_name(name: str, what: str) -> None:
    """Raise ConfigError unless `name` may name a party or a federation."""
    if not re.fullmatch(_NAME, name):
        raise ConfigError(
            f"{name!r} cannot name a {what}: a name must match {_NAME} "
            "(1 to 63 lower-case letters, digits and hyphens, not beginning with a hyphen)"
        )


def host_names(hosts: Sequence[str]) -> list[x509.GeneralName]:
    """Return DNS names and IP addresses as they stand in a certificate. Raises ConfigError."""
    from cryptography import x509

    if not hosts:
        raise ConfigError("a server or an edge is reached at one host or more: name each with --host")
    names: list[x509.GeneralName] = []
    for host in hosts:
        try:
            names.append(x509.IPAddress(ipaddress.ip_address(host)))
        except ValueError:
            if not _HOST.fullmatch(host):
                raise ConfigError(
                    f"host {host!r} is neither a DNS name nor an IP address: "
                    "give it without scheme, port, brackets or wildcard"
                ) from None
            names.append(x509.DNSName(host))
    return names


def with_article(role: Role) -> str:
    """Return "a client", "an edge" or "a server"."""
    return f"an {role}" if role == "edge" else f"a {role}"


def issue_command(name: str, role: str, folder: Path) -> str:
    """Return the command that issues a certificate."""
    return f"noren keys issue {name} --role {role} --dir {shlex.quote(str(folder))}"
