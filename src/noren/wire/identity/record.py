"""What an authority issued: `issued.jsonl`, one line a certificate, to which lines are only ever added.

A line is written with the certificate that it tells of or before it, so that there is none which could not be
revoked. Certificates in the folder that have no line (it is older than the record) count as well.
"""

from __future__ import annotations

from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import msgspec

import noren.wire.identity.files as files
from noren.errors import ConfigError
from noren.wire.identity.certificates import identity_of, issuer_id, read_certificate
from noren.wire.identity.names import Role

if TYPE_CHECKING:
    from cryptography import x509

RECORD = "issued.jsonl"


class Row(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A certificate that was issued. `serial` and `issuer`, the id of the authority's key, are hexadecimal."""

    name: str
    role: Role
    serial: Annotated[str, msgspec.Meta(pattern=r"\A[0-9A-F]{1,40}\Z")]
    not_after: Annotated[datetime, msgspec.Meta(tz=True)]
    issuer: str


def row_of(where: Path, certificate: x509.Certificate) -> Row:
    """Return the line of a certificate. Raises ConfigError if it names no identity."""
    identity = identity_of(where, certificate)
    serial, end = f"{certificate.serial_number:X}", certificate.not_valid_after_utc
    return Row(identity.name, identity.role, serial, end, issuer_id(certificate) or "")


def rows_in_files(folder: Path) -> list[Row]:
    """Return the parties' certificates that are in the folder, by file name. Raises ConfigError."""
    paths = [path for path in sorted(folder.glob("*.crt")) if path.name != "ca.crt"]
    return [row_of(path, read_certificate(path)) for path in paths]


def recorded(folder: Path) -> list[Row]:
    """Return the lines of the record, oldest first; none if there is no record. Raises ConfigError."""
    path = folder / RECORD
    rows = []
    for number, line in enumerate(_bytes(path).splitlines(), start=1):
        try:
            rows.append(msgspec.json.decode(line, type=Row))
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise ConfigError(
                f"line {number} of {path} is damaged ({error}): put back a copy of the file. "
                "Without that line, the certificate that it told of cannot be revoked"
            ) from None
    return rows


def all_rows(folder: Path) -> list[Row]:
    """Return all that is known to have been issued, each certificate once. Raises ConfigError."""
    rows = {row.serial: row for row in recorded(folder)}
    for row in rows_in_files(folder):
        rows.setdefault(row.serial, row)
    return list(rows.values())


def with_rows(folder: Path, added: list[Row]) -> dict[Path, tuple[bytes, int]]:
    """Return the record with further lines, as `files.write` takes it; lines that it has are not doubled."""
    known = {row.serial for row in recorded(folder)}
    before = _bytes(folder / RECORD)
    if before and not before.endswith(b"\n"):
        before += b"\n"
    lines = [msgspec.json.encode(row) + b"\n" for row in added if row.serial not in known]
    return {folder / RECORD: (before + b"".join(lines), 0o600)}


def _bytes(path: Path) -> bytes:
    if not path.exists():
        return b""
    return files.read(path, "record of what was issued", "put back a copy")
