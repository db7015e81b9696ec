"""Certificate revocation lists (RFC 5280): `crl.pem`, one list an authority, one after another in one file.

The lists of one file have one number, which grows with every change. A file counts only as a whole: each list in it
must be signed by an authority of `ca.crt`, and nothing may stand between or after them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

import noren.wire.identity.clock as clock
import noren.wire.identity.files as files
from noren.errors import ConfigError
from noren.wire.identity.certificates import key_id
from noren.wire.identity.keyring import Authority

if TYPE_CHECKING:
    from cryptography import x509

CRL = "crl.pem"
_BLOCK = re.compile(rb"-----BEGIN X509 CRL-----\s.*?-----END X509 CRL-----", re.DOTALL)
REMEDY = "copy crl.pem and ca.crt from the authority's folder again"


@dataclass(frozen=True, slots=True)
class Lists:
    """What a `crl.pem` says, by the id of the authority's key: the number of its list, and serial -> when revoked."""

    numbers: Mapping[str, int] = field(default_factory=dict)
    entries: Mapping[str, Mapping[int, datetime]] = field(default_factory=dict)

    @property
    def serials(self) -> frozenset[int]:
        """All serials that are revoked."""
        return frozenset(serial for entries in self.entries.values() for serial in entries)


def read_lists(path: Path, authorities: Sequence[x509.Certificate]) -> Lists:
    """Return the lists of a file, all of them signed by one of `authorities`.

    Raises ConfigError if the file cannot be read, is damaged or cut short, or holds a list of anybody else.
    """
    from cryptography import x509

    pem = files.read(path, "revocation list", REMEDY)
    blocks = _BLOCK.findall(pem)
    if not blocks or _BLOCK.sub(b"", pem).strip():
        raise ConfigError(f"{path} is damaged or cut short, no list of revoked certificates in PEM form: {REMEDY}")
    numbers: dict[str, int] = {}
    entries: dict[str, dict[int, datetime]] = {}
    for block in blocks:
        try:
            crl = x509.load_pem_x509_crl(block)
            number = crl.extensions.get_extension_for_class(x509.CRLNumber).value.crl_number
            revoked = {entry.serial_number: entry.revocation_date_utc for entry in crl}
        except (ValueError, x509.ExtensionNotFound):
            raise ConfigError(f"{path} is damaged, no list of revoked certificates with a number: {REMEDY}") from None
        signed_by = [one for one in authorities if _signed(crl, one)]
        if not signed_by:
            raise ConfigError(f"{path} is not signed by an authority of the ca.crt beside it: {REMEDY}")
        authority = key_id(signed_by[0])
        if authority in numbers:
            raise ConfigError(f"{path} holds two lists of one authority: {REMEDY}")
        numbers[authority], entries[authority] = number, revoked
    return Lists(numbers, entries)


def _signed(crl: x509.CertificateRevocationList, authority: x509.Certificate) -> bool:
    try:
        return crl.is_signature_valid(authority.public_key())  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return False


def check_not_older(path: Path, new: Lists, last: Lists, authorities: Sequence[x509.Certificate]) -> None:
    """Raise ConfigError if `new` takes anything back: a smaller number, or no list of an authority that had one.

    Only the authorities that are trusted now count: with one that is not, its certificates have gone too.
    """
    now = {key_id(one) for one in authorities}
    for authority, number in last.numbers.items():
        found = new.numbers.get(authority)
        if authority in now and (found is None or found < number):
            instead = "lacks a list of that authority" if found is None else f"is number {found}"
            raise ConfigError(f"{path} {instead}, older than number {number}, which is in force: {REMEDY}")


def signed_lists(authorities: Sequence[Authority], entries: Mapping[str, Mapping[int, datetime]], number: int) -> bytes:
    """Return a `crl.pem`: of each authority a list of its `entries`, signed by it, that holds as long as it does."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes
    from cryptography.hazmat.primitives.serialization import Encoding

    blocks = []
    for authority in authorities:
        builder = (
            x509.CertificateRevocationListBuilder()
            .issuer_name(authority.certificate.subject)
            .last_update(clock.now() - clock.CLOCK_SKEW)
            .next_update(authority.certificate.not_valid_after_utc)
            .add_extension(x509.CRLNumber(number), critical=False)
            .add_extension(
                x509.AuthorityKeyIdentifier.from_issuer_public_key(authority.key.public_key()), critical=False
            )
        )
        for serial, moment in sorted(entries.get(authority.id, {}).items()):
            revoked = x509.RevokedCertificateBuilder().serial_number(serial).revocation_date(moment).build()
            builder = builder.add_revoked_certificate(revoked)
        blocks.append(builder.sign(authority.key, hashes.SHA256()).public_bytes(Encoding.PEM))
    return b"".join(blocks)
