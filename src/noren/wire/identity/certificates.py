"""What a certificate says: whose it is, who signed it, how long it holds, and for which end of a connection."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

import noren.wire.identity.clock as clock
import noren.wire.identity.files as files
from noren.errors import ConfigError
from noren.wire.identity.names import USES, Identity, Use, issue_command, parse_identity, with_article

if TYPE_CHECKING:
    from cryptography import x509
    from cryptography.hazmat.primitives.asymmetric import ec


@dataclass(frozen=True, slots=True)
class Peer:
    """Who is at the other end of a connection, and by which certificate."""

    identity: Identity
    serial: int
    not_after: datetime


def peer_of(pem: bytes, federation: str | None = None) -> Peer:
    """Return whom a peer's certificate names; the handshake has checked who signed it.

    Args:
        pem: the leaf, as gRPC gives it in `context.auth_context()["x509_pem_cert"][0]`.
        federation: the one that the peer must be of; None for any.

    Raises ConfigError if it is no certificate, names no identity or several, or one of another federation.
    """
    from cryptography import x509

    where = "the peer's certificate"
    try:
        certificate = x509.load_pem_x509_certificate(pem)
    except ValueError:
        raise ConfigError(f"{where} is not a certificate in PEM form: connect with mutual TLS") from None
    identity = identity_of(where, certificate)
    if federation is not None and identity.federation != federation:
        raise ConfigError(
            f"{where} names {identity.uri}, which is not of the federation {federation!r}: "
            "use one that was issued by this federation's authority"
        )
    return Peer(identity, certificate.serial_number, certificate.not_valid_after_utc)


def read_certificate(path: Path) -> x509.Certificate:
    """Return the certificate of a party. Raises ConfigError if the file is missing or holds none."""
    command = f"`{issue_command(path.stem, 'ROLE', path.parent)}`"
    pem = files.read(path, "certificate", f"make it with {command}")
    return files.certificates(path, pem, f"remove it and run {command}")[0]


def read_identity(certificate: Path) -> Identity:
    """Return the identity that a certificate names, without checking who signed it or when.

    Raises ConfigError if the file is missing, is not a certificate, or does not hold exactly one identity.
    """
    return identity_of(certificate, read_certificate(certificate))


def identity_of(where: Path | str, certificate: x509.Certificate) -> Identity:
    """Return the one identity that a certificate names. Raises ConfigError, which begins with `where`."""
    found = [uri for uri in uris(certificate) if uri.startswith("spiffe://")]
    if len(found) != 1:
        raise ConfigError(
            f"{where} names {len(found)} identities (spiffe:// URIs), and must name exactly one: "
            "use a certificate that `noren keys issue` made"
        )
    try:
        return parse_identity(found[0])
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}; use a certificate that `noren keys issue` made") from None


def uris(certificate: x509.Certificate) -> list[str]:
    """Return the URIs that a certificate names."""
    from cryptography import x509

    names = alternative_names(certificate)
    return names.get_values_for_type(x509.UniformResourceIdentifier) if names else []


def alternative_names(certificate: x509.Certificate) -> x509.SubjectAlternativeName | None:
    """Return all that a certificate names besides its subject, None if it names nothing that can be read."""
    from cryptography import x509

    try:
        return certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except (x509.ExtensionNotFound, ValueError):
        return None


def key_id(certificate: x509.Certificate) -> str:
    """Return the id of a certificate's own key, in hexadecimal."""
    from cryptography import x509

    return x509.SubjectKeyIdentifier.from_public_key(certificate.public_key()).digest.hex()


def issuer_id(certificate: x509.Certificate) -> str | None:
    """Return the id of the key that a certificate says it was signed with, in hexadecimal; None if it does not say."""
    from cryptography import x509

    try:
        extension = certificate.extensions.get_extension_for_class(x509.AuthorityKeyIdentifier)
    except (x509.ExtensionNotFound, ValueError):
        return None
    return extension.value.key_identifier.hex() if extension.value.key_identifier else None


def signer(
    path: Path, certificate: x509.Certificate, ca: Path, authorities: Sequence[x509.Certificate]
) -> x509.Certificate:
    """Return the one of `authorities`, which stand in `ca`, that signed a certificate. Raises ConfigError."""
    from cryptography.exceptions import InvalidSignature

    for authority in authorities:
        with contextlib.suppress(ValueError, TypeError, InvalidSignature):
            certificate.verify_directly_issued_by(authority)
            return authority
    issuer = _described(certificate.issuer, issuer_id(certificate))
    found = " and ".join(_described(one.subject, key_id(one)) for one in authorities)
    raise ConfigError(
        f"wrong CA: {path} was issued by {issuer}, but {ca} is {found}: "
        f"name the ca.crt that came with {path}, or have {path} issued again by the authority of {ca}"
    )


def _described(name: x509.Name, key: str | None) -> str:
    return f"{name.rfc4514_string()} (key id {key or 'unknown'})"


def check_dates(path: Path, certificate: x509.Certificate, remedy: str) -> None:
    """Raise ConfigError with the remedy unless a certificate is valid now."""
    now = clock.now()
    if now >= certificate.not_valid_after_utc:
        raise ConfigError(f"{path} expired on {clock.date(certificate.not_valid_after_utc)}: {remedy}")
    if now < certificate.not_valid_before_utc:
        raise ConfigError(
            f"{path} is valid only from {clock.date(certificate.not_valid_before_utc)}, and this machine's clock "
            f"says {clock.date(now)}: set the clock, or {remedy}"
        )


def check_use(path: Path, certificate: x509.Certificate, identity: Identity, use: Use) -> None:
    """Raise ConfigError unless a certificate is for that end of a connection."""
    from cryptography import x509

    try:
        usage = certificate.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
    except (x509.ExtensionNotFound, ValueError):
        usage = None
    if use in USES[identity.role] and usage is not None and purpose(use) in usage:
        return
    verb = {"client": "open", "server": "accept"}[use]
    raise ConfigError(
        f"{path} is {with_article(identity.role)}'s certificate, and cannot be used to {verb} connections: "
        f"issue one with `{issue_command('NAME', use, path.parent)}` (or --role edge, for both ends)"
    )


def builder(
    subject: x509.Name,
    key: ec.EllipticCurvePrivateKey,
    issuer: x509.Name,
    issuer_key: ec.EllipticCurvePrivateKey,
) -> x509.CertificateBuilder:
    """Begin a certificate: names, key, a random serial, the ids of both keys."""
    from cryptography import x509

    own_id = x509.SubjectKeyIdentifier.from_public_key(key.public_key())
    issuer_key_id = x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer_key.public_key())
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .add_extension(own_id, critical=False)
        .add_extension(issuer_key_id, critical=False)
    )


def names(uri: str, hosts: Sequence[x509.GeneralName] = ()) -> x509.SubjectAlternativeName:
    """Return the extension that names an identity and the hosts at which it is reached."""
    from cryptography import x509

    return x509.SubjectAlternativeName([x509.UniformResourceIdentifier(uri), *hosts])


def purpose(use: Use) -> x509.ObjectIdentifier:
    """Return the extended key usage of one end of a connection."""
    from cryptography.x509.oid import ExtendedKeyUsageOID

    return ExtendedKeyUsageOID.CLIENT_AUTH if use == "client" else ExtendedKeyUsageOID.SERVER_AUTH


def key_usage(*, authority: bool) -> x509.KeyUsage:
    """Return what a key may sign: certificates and lists of them, or handshakes."""
    from cryptography import x509

    return x509.KeyUsage(
        digital_signature=not authority,
        key_cert_sign=authority,
        crl_sign=authority,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )
