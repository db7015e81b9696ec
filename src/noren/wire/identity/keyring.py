"""The authorities whose keys a folder holds: the one that issues, and those before it that are still trusted.

    ca.crt      certificates of all authorities that are trusted, the newest first
    ca.key      the key of the one that issues
    ca-old.key  keys of those before it, with which their certificates can still be revoked

Between the two renames of a roll-over `ca.crt` names an authority whose key is not there yet, so the one that issues
is the one whose key is in `ca.key`.
"""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

import noren.wire.identity.clock as clock
import noren.wire.identity.files as files
from noren.errors import ConfigError
from noren.wire.identity.certificates import builder, check_dates, key_id, key_usage, names, uris
from noren.wire.identity.names import NEW_AUTHORITY, federation_of

if TYPE_CHECKING:
    from cryptography import x509
    from cryptography.hazmat.primitives.asymmetric import ec

AUTHORITY_DAYS = 365


@dataclass(frozen=True, slots=True)
class Authority:
    """A certificate that signs others, and its key."""

    certificate: x509.Certificate
    key: ec.EllipticCurvePrivateKey

    @property
    def id(self) -> str:
        """The id of its key, in hexadecimal."""
        return key_id(self.certificate)

    @property
    def ended(self) -> bool:
        """Whether it has expired."""
        return self.certificate.not_valid_after_utc <= clock.now()


def new_authority(federation: str) -> Authority:
    """Return a new authority of a federation, valid from now on for `AUTHORITY_DAYS`."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.x509.oid import NameOID

    now = clock.now()
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name(
        [
            x509.NameAttribute(NameOID.ORGANIZATION_NAME, federation),
            x509.NameAttribute(NameOID.COMMON_NAME, "authority"),
        ]
    )
    certificate = (
        builder(subject, key, subject, key)
        .not_valid_before(now - clock.CLOCK_SKEW)
        .not_valid_after(now + timedelta(days=AUTHORITY_DAYS))
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(key_usage(authority=True), critical=True)
        .add_extension(names(f"spiffe://{federation}"), critical=False)
        .sign(key, hashes.SHA256())
    )
    return Authority(certificate, key)


def require_authority(folder: Path, *needed: str) -> None:
    """Raise ConfigError unless the authority in `folder` has those of its files."""
    missing = [name for name in needed if not (folder / name).exists()]
    if not missing:
        return
    if any((folder / name).exists() for name in ("ca.crt", "ca.key")):
        raise ConfigError(
            f"the authority in {folder} is not whole, {missing[0]} is missing: put it back (certificates are "
            f"issued where the authority was made), or {NEW_AUTHORITY}"
        )
    command = f"noren keys init --dir {shlex.quote(str(folder))}"
    raise ConfigError(f"there is no authority in {folder}: make one with `{command}`")


def trusted(folder: Path) -> list[x509.Certificate]:
    """Return the certificates in `ca.crt`. Raises ConfigError."""
    path = folder / "ca.crt"
    return files.certificates(path, files.read(path, "authority's certificate", NEW_AUTHORITY), NEW_AUTHORITY)


def issuing(folder: Path) -> tuple[Authority, str]:
    """Return the authority in `folder` that issues, and its federation.

    Raises ConfigError if it is not there, not whole, out of date, or no authority.
    """
    path, key_path = folder / "ca.crt", folder / "ca.key"
    require_authority(folder, "ca.crt", "ca.key")
    certificates = trusted(folder)
    key = files.private_key(key_path, files.read(key_path, "authority's private key", NEW_AUTHORITY))
    matching = [one for one in certificates if one.public_key() == key.public_key()]
    if not matching:
        raise ConfigError(
            f"{key_path} is not the private key of {path}: put back the two that belong together, or {NEW_AUTHORITY}"
        )
    certificate = matching[0]
    check_dates(path, certificate, NEW_AUTHORITY)
    federations = [federation for uri in uris(certificate) if (federation := federation_of(uri))]
    if len(federations) != 1:
        raise ConfigError(f"{path} does not say of which federation it is the authority: {NEW_AUTHORITY}")
    return Authority(certificate, key), federations[0]


def earlier(folder: Path) -> list[Authority]:
    """Return the authorities before the one that issues whose keys are in `ca-old.key`, newest first.

    Those that have expired are left out: so are all certificates that they signed. Raises ConfigError.
    """
    path = folder / "ca-old.key"
    if not path.exists():
        return []
    pem = files.read(path, "earlier authority's private key", "put it back, or remove it if the authority has expired")
    current, _ = issuing(folder)
    keys = files.private_keys(path, pem)
    found = [Authority(one, key) for key in keys for one in trusted(folder) if one.public_key() == key.public_key()]
    return [one for one in found if not one.ended and one.id != current.id]
