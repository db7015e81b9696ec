"""An authority's folder: make it, issue from it, list what it issued, move to a new authority."""

from __future__ import annotations

import math
from collections.abc import Sequence
from datetime import datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING

import noren.wire.identity.clock as clock
import noren.wire.identity.files as files
from noren.errors import ConfigError
from noren.wire.identity.certificates import (
    alternative_names,
    builder,
    identity_of,
    key_usage,
    names,
    purpose,
    read_certificate,
    read_identity,
)
from noren.wire.identity.credentials import Credentials
from noren.wire.identity.keyring import Authority, earlier, issuing, new_authority, require_authority, trusted
from noren.wire.identity.lists import CRL
from noren.wire.identity.names import (
    LEAF_DAYS,
    LOOPBACK,
    NEW_AUTHORITY,
    RESERVED,
    USES,
    Identity,
    Issued,
    Role,
    check_name,
    host_names,
    issue_command,
    with_article,
)
from noren.wire.identity.record import all_rows, row_of, rows_in_files, with_rows
from noren.wire.identity.revocation import list_file, lists_in

if TYPE_CHECKING:
    from cryptography import x509


def create_authority(folder: Path, federation: str = "noren") -> None:
    """Make a federation's authority: `ca.crt` and `ca.key` in `folder`, which only its owner can open.

    Raises ConfigError if the folder holds an authority already (none is ever overwritten), is open to others
    and holds other files, or cannot be written, or if `federation` is not a name.
    """
    check_name(federation, "federation")
    certificate_path, key_path = folder / "ca.crt", folder / "ca.key"
    for path in (key_path, certificate_path):
        if path.exists():
            raise ConfigError(
                f"{path} exists already, and an authority is never overwritten: issue from it with "
                f"`{issue_command('NAME', 'ROLE', folder)}`, or {NEW_AUTHORITY}"
            )
    files.make_private(folder)
    made = new_authority(federation)
    files.write(
        {
            key_path: (files.key_pem(made.key), 0o600),
            certificate_path: (files.certificate_pem(made.certificate), 0o644),
        }
    )


def issue(folder: Path, name: str, role: Role, hosts: Sequence[str] = LOOPBACK, days: float = LEAF_DAYS) -> Path:
    """Write `<name>.crt` and `<name>.key`, signed by the authority in `folder`; return the former's path.

    An earlier pair of that name and role is replaced, and stays valid until it expires or is revoked. `hosts` are the
    DNS names and IP addresses at which a server or an edge is reached; a client's certificate has none.

    Raises ConfigError if there is no authority or it is out of date, if the name, role, a host or the days
    cannot be, if the name is held by another role, or if the folder cannot be written.
    """
    check_name(name, "party")
    if name in RESERVED:
        raise ConfigError(f"the name {name!r} is the authority's own (ca.crt, ca.key): choose another name")
    if role not in USES:
        raise ConfigError(f"role {role!r} is unknown: choose one of {', '.join(USES)}")
    if not (math.isfinite(days) and days > 0):
        raise ConfigError(f"a certificate cannot be valid for {days} days: ask for more than 0")
    reached_at = host_names(hosts) if "server" in USES[role] else []
    require_authority(folder, "ca.crt", "ca.key")
    with files.alone(folder):
        authority, federation = issuing(folder)
        end = authority.certificate.not_valid_after_utc
        left = end - clock.now()
        if days > left / timedelta(days=1):
            raise ConfigError(
                f"{days:g} days would outlive the authority {folder / 'ca.crt'}, which ends on "
                f"{clock.date(end)}: ask for at most {left.days} days, or {NEW_AUTHORITY}"
            )
        certificate_path, key_path = folder / f"{name}.crt", folder / f"{name}.key"
        replaced = []
        if certificate_path.exists():
            if (held := read_identity(certificate_path).role) != role:
                raise ConfigError(
                    f"{certificate_path} is {with_article(held)}'s, and a name has one role: choose another name, "
                    f"or remove {name}.crt and {name}.key first"
                )
            replaced = [row_of(certificate_path, read_certificate(certificate_path))]
        made = _leaf(authority, Identity(name, role, federation), reached_at, days)
        rows = [*replaced, row_of(certificate_path, made.certificate)]
        files.write(
            with_rows(folder, rows)
            | {
                key_path: (files.key_pem(made.key), 0o600),
                certificate_path: (files.certificate_pem(made.certificate), 0o644),
            }
        )
    return certificate_path


def _leaf(authority: Authority, identity: Identity, hosts: Sequence[x509.GeneralName], days: float) -> Authority:
    """Return a party's certificate and its key."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.x509.oid import NameOID

    now = clock.now()
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, identity.name)])
    certificate = (
        builder(subject, key, authority.certificate.subject, authority.key)
        .not_valid_before(max(now - clock.CLOCK_SKEW, authority.certificate.not_valid_before_utc))
        .not_valid_after(now + timedelta(days=days))
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(key_usage(authority=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage([purpose(use) for use in USES[identity.role]]), critical=False)
        .add_extension(names(identity.uri, hosts), critical=False)
        .sign(authority.key, hashes.SHA256())
    )
    return Authority(certificate, key)


def ensure(
    folder: Path, name: str, role: Role, hosts: Sequence[str] = LOOPBACK, days: float = LEAF_DAYS
) -> Credentials:
    """Return usable credentials from `folder`, making what is missing: the folder, the authority, the pair of files.

    A pair that has expired, was revoked, or lacks one of the hosts is issued again. Only one process at a time may
    call this for a folder.

    Raises ConfigError as `create_authority`, `issue` and `Credentials.check` do.
    """
    credentials = Credentials(ca=folder / "ca.crt", certificate=folder / f"{name}.crt", key=folder / f"{name}.key")
    if not credentials.ca.exists() and not (folder / "ca.key").exists():
        create_authority(folder)
    if not _serves(credentials, role, hosts):
        issue(folder, name, role, hosts, days)
    for use in USES[role]:
        credentials.check(use)
    return credentials


def _serves(credentials: Credentials, role: Role, hosts: Sequence[str]) -> bool:
    """Say whether there is a pair of files for that role and those hosts which has not expired and is not revoked."""
    if not credentials.certificate.exists() or not credentials.key.exists():
        return False
    certificate = read_certificate(credentials.certificate)
    if certificate.not_valid_after_utc <= clock.now():
        return False
    if identity_of(credentials.certificate, certificate).role != role:
        return False  # and issue() will say that a name has one role
    if certificate.serial_number in lists_in(credentials.ca.parent).serials:
        return False
    if "server" not in USES[role]:
        return True
    return set(host_names(hosts)) <= set(alternative_names(certificate) or ())


def listing(folder: Path) -> list[Issued]:
    """Return the certificates that the authority in `folder` issued, by name and end, without the authority's own.

    Those are the ones in the folder, and of those that were issued and are no longer there, all that have not expired.

    Raises ConfigError if there is no authority, if a `.crt` file there is no certificate with an identity, or if the
    record or the revocation list is damaged.
    """
    require_authority(folder, "ca.crt")
    now, revoked = clock.now(), lists_in(folder).serials
    present = {row.serial for row in rows_in_files(folder)}
    rows = [row for row in all_rows(folder) if row.serial in present or row.not_after > now]
    rows.sort(key=lambda row: (row.name, row.not_after))
    return [
        Issued(row.name, row.role, row.not_after, row.serial, row.not_after <= now, int(row.serial, 16) in revoked)
        for row in rows
    ]


def roll_over(folder: Path) -> datetime:
    """Make a new authority that issues from now on, and return when the one before it ends; until then both count.

    `ca.crt` then holds the new certificate and those before it that have not expired, newest first, and is to be
    given to every party before one comes with a certificate of the new authority. The old key moves to `ca-old.key`:
    what it signed can still be revoked. A crash leaves an authority that issues, the old or the new one.

    Raises ConfigError if there is no authority, it is out of date, or the folder cannot be written.
    """
    require_authority(folder, "ca.crt", "ca.key")
    with files.alone(folder):
        current, federation = issuing(folder)
        new, old = new_authority(federation), [current, *earlier(folder)]
        now = clock.now()
        kept = [one for one in trusted(folder) if one.not_valid_after_utc > now]
        last_list = list_file(folder, old, lists_in(folder)) if (folder / CRL).exists() else {}
        files.write(
            last_list  # first: it is signed by authorities that both the old and the new ca.crt hold
            | {
                folder / "ca-old.key": (b"".join(files.key_pem(one.key) for one in old), 0o600),
                folder / "ca.crt": (b"".join(map(files.certificate_pem, [new.certificate, *kept])), 0o644),
                folder / "ca.key": (files.key_pem(new.key), 0o600),
            }
        )
    return current.certificate.not_valid_after_utc
