"""Who is who: a local certificate authority, and mutually authenticated TLS for gRPC.

A federation has one authority (`ca.crt` for everybody, `ca.key` for whoever issues). It issues each party a
short-lived certificate that means one thing to Noren, its URI `spiffe://<federation>/<role>/<name>`: a peer's
identity comes from there, never from a field of a message. A client's certificate opens connections, a
server's accepts them, and an edge's does both. Keys are ECDSA P-256, and readable by their owner alone.

gRPC reports a wrong file as "handshake failed" at best, so `Credentials` looks at its three files before it
connects, and says which one is wrong and what to do.
"""

from __future__ import annotations

import contextlib
import ipaddress
import math
import os
import re
import shlex
import stat
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Literal, cast, get_args

from noren.errors import ConfigError

if TYPE_CHECKING:
    import grpc
    from cryptography import x509
    from cryptography.hazmat.primitives.asymmetric import ec

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
AUTHORITY_DAYS = 365
CLOCK_SKEW = timedelta(minutes=5)  # certificates begin this much early, for peers whose clocks are behind

_NEW_AUTHORITY = "make a new authority with `noren keys init --dir NEW_FOLDER`"
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
    """A certificate in an authority's folder. `serial` is hexadecimal, as openssl prints it."""

    name: str
    role: Role
    not_after: datetime
    serial: str
    expired: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class Credentials:
    """The three files with which a party proves who it is, and checks who its peer is.

    `ca` may hold several authorities one after another, while a federation moves from one to the next.
    """

    ca: Path
    certificate: Path
    key: Path

    def check(self, use: Use) -> Identity:
        """Return this party's identity if the files can be used at that end of a connection.

        Raises ConfigError, naming the file and the remedy, if a file is missing or cannot be read, or if the
        certificate was not signed by `ca`, is out of date, belongs to another key, names no identity, or is
        for the other end.
        """
        return self._load(use)[0]

    def server(self) -> grpc.ServerCredentials:
        """Return credentials to accept connections with; a peer without a certificate of `ca` is refused.

        Raises ConfigError as `check` does.
        """
        import grpc

        _, ca, certificate, key = self._load("server")
        pairs = [(key, certificate)]
        return grpc.ssl_server_credentials(pairs, root_certificates=ca, require_client_auth=True)

    def client(self) -> grpc.ChannelCredentials:
        """Return credentials to open connections with; a server without a certificate of `ca` is refused.

        Raises ConfigError as `check` does.
        """
        import grpc

        _, ca, certificate, key = self._load("client")
        return grpc.ssl_channel_credentials(ca, private_key=key, certificate_chain=certificate)

    def _load(self, use: Use) -> tuple[Identity, bytes, bytes, bytes]:
        """Read each file once, so that what was checked is what is used."""
        folder = self.certificate.parent
        again = f"`{_issue_command(self.certificate.stem, use, folder)}`"
        from_init = "copy ca.crt from the folder where `noren keys init` was run"
        ca_pem = _read(self.ca, "authority's certificate", from_init)
        certificate_pem = _read(self.certificate, "certificate", f"make it with {again}")
        key_pem = _read(self.key, "private key", f"it belongs beside the certificate; make both with {again}")

        authorities = _certificates(self.ca, ca_pem, from_init)
        certificate = _certificates(self.certificate, certificate_pem, f"remove it and run {again}")[0]
        identity = _identity(self.certificate, certificate)
        again = f"`{_issue_command(identity.name, identity.role, folder)}`"

        authority = _signer(self.certificate, certificate, self.ca, authorities)
        _check_dates(self.ca, authority, f"{_NEW_AUTHORITY}, and issue every certificate from it")
        _check_dates(self.certificate, certificate, f"issue it again with {again}")
        if _private_key(self.key, key_pem).public_key() != certificate.public_key():
            raise ConfigError(
                f"{self.key} is not the private key of {self.certificate}: name the two files that were "
                f"issued together, or issue both again with {again}"
            )
        _check_use(self.certificate, certificate, identity, use)
        return identity, ca_pem, certificate_pem, key_pem


def create_authority(folder: Path, federation: str = "noren") -> None:
    """Make a federation's authority: `ca.crt` and `ca.key` in `folder`, which only its owner can open.

    Raises ConfigError if the folder holds an authority already (none is ever overwritten), is open to others
    and holds other files, or cannot be written, or if `federation` is not a name.
    """
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.x509.oid import NameOID

    _check_name(federation, "federation")
    certificate_path, key_path = folder / "ca.crt", folder / "ca.key"
    for path in (key_path, certificate_path):
        if path.exists():
            raise ConfigError(
                f"{path} exists already, and an authority is never overwritten: issue from it with "
                f"`{_issue_command('NAME', 'ROLE', folder)}`, or {_NEW_AUTHORITY}"
            )
    _make_private(folder)

    now = _now()
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name(
        [
            x509.NameAttribute(NameOID.ORGANIZATION_NAME, federation),
            x509.NameAttribute(NameOID.COMMON_NAME, "authority"),
        ]
    )
    certificate = (
        _builder(subject, key, subject, key)
        .not_valid_before(now - CLOCK_SKEW)
        .not_valid_after(now + timedelta(days=AUTHORITY_DAYS))
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_key_usage(authority=True), critical=True)
        .add_extension(_names(f"spiffe://{federation}"), critical=False)
        .sign(key, hashes.SHA256())
    )
    _write({key_path: (_key_pem(key), 0o600), certificate_path: (_certificate_pem(certificate), 0o644)})


def issue(folder: Path, name: str, role: Role, hosts: Sequence[str] = LOOPBACK, days: float = 30) -> Path:
    """Write `<name>.crt` and `<name>.key`, signed by the authority in `folder`; return the former's path.

    An earlier pair of that name and role is replaced, and stays valid until it expires. `hosts` are the DNS
    names and IP addresses at which a server or an edge is reached; a client's certificate has none.

    Raises ConfigError if there is no authority or it is out of date, if the name, role, a host or the days
    cannot be, if the name is held by another role, or if the folder cannot be written.
    """
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.x509.oid import NameOID

    _check_name(name, "party")
    if name == "ca":
        raise ConfigError("the name 'ca' is the authority's own (ca.crt, ca.key): choose another name")
    if role not in USES:
        raise ConfigError(f"role {role!r} is unknown: choose one of {', '.join(USES)}")
    if not (math.isfinite(days) and days > 0):
        raise ConfigError(f"a certificate cannot be valid for {days} days: ask for more than 0")
    reached_at = _host_names(hosts) if "server" in USES[role] else []

    authority, authority_key, federation = _authority(folder)
    now = _now()
    left = authority.not_valid_after_utc - now
    if days > left / timedelta(days=1):
        raise ConfigError(
            f"{days:g} days would outlive the authority {folder / 'ca.crt'}, which ends on "
            f"{_date(authority.not_valid_after_utc)}: ask for at most {left.days} days, or {_NEW_AUTHORITY}"
        )
    certificate_path, key_path = folder / f"{name}.crt", folder / f"{name}.key"
    if certificate_path.exists() and (held := read_identity(certificate_path).role) != role:
        raise ConfigError(
            f"{certificate_path} is {_a(held)}'s, and a name has one role: choose another name, "
            f"or remove {name}.crt and {name}.key first"
        )

    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    certificate = (
        _builder(subject, key, authority.subject, authority_key)
        .not_valid_before(max(now - CLOCK_SKEW, authority.not_valid_before_utc))
        .not_valid_after(now + timedelta(days=days))
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_key_usage(authority=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage([_purpose(use) for use in USES[role]]), critical=False)
        .add_extension(_names(Identity(name, role, federation).uri, reached_at), critical=False)
        .sign(authority_key, hashes.SHA256())
    )
    _write({key_path: (_key_pem(key), 0o600), certificate_path: (_certificate_pem(certificate), 0o644)})
    return certificate_path


def ensure(folder: Path, name: str, role: Role, hosts: Sequence[str] = LOOPBACK, days: float = 30) -> Credentials:
    """Return usable credentials from `folder`, making what is missing: the authority, the pair of files.

    A pair that has expired, or that lacks one of the hosts, is issued again. Only one process at a time may
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


def listing(folder: Path) -> list[Issued]:
    """Return the certificates in `folder` by name, without the authority's.

    Raises ConfigError if there is no authority, or if a `.crt` file there is no certificate with an identity.
    """
    _require_authority(folder, "ca.crt")
    now = _now()
    rows = []
    for path in sorted(folder.glob("*.crt")):
        if path.name == "ca.crt":
            continue
        certificate = _read_certificate(path)
        identity = _identity(path, certificate)
        end = certificate.not_valid_after_utc
        rows.append(Issued(identity.name, identity.role, end, f"{certificate.serial_number:X}", end <= now))
    return rows


def parse_identity(uri: str) -> Identity:
    """Return the identity that a SPIFFE URI names. Raises ConfigError if it has another form."""
    match = _URI.fullmatch(uri)
    if match is None:
        raise ConfigError(
            f"{uri!r} is not an identity: it must read spiffe://<federation>/<{'|'.join(USES)}>/<name>, "
            f"with names of the form {_NAME}"
        )
    return Identity(match[3], cast(Role, match[2]), match[1])


def read_identity(certificate: Path) -> Identity:
    """Return the identity that a certificate names, without checking who signed it or when.

    Raises ConfigError if the file is missing, is not a certificate, or does not hold exactly one identity.
    """
    return _identity(certificate, _read_certificate(certificate))


def _now() -> datetime:
    return datetime.now(UTC)


def _date(moment: datetime) -> str:
    return f"{moment:%Y-%m-%d %H:%M} UTC"


def _a(role: Role) -> str:
    return f"an {role}" if role == "edge" else f"a {role}"


def _issue_command(name: str, role: str, folder: Path) -> str:
    return f"noren keys issue {name} --role {role} --dir {shlex.quote(str(folder))}"


# What may be asked for.


def _check_name(name: str, what: str) -> None:
    if not re.fullmatch(_NAME, name):
        raise ConfigError(
            f"{name!r} cannot name a {what}: a name must match {_NAME} "
            "(1 to 63 lower-case letters, digits and hyphens, not beginning with a hyphen)"
        )


def _host_names(hosts: Sequence[str]) -> list[x509.GeneralName]:
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


# What a certificate says.


def _builder(
    subject: x509.Name,
    key: ec.EllipticCurvePrivateKey,
    issuer: x509.Name,
    issuer_key: ec.EllipticCurvePrivateKey,
) -> x509.CertificateBuilder:
    from cryptography import x509

    key_id = x509.SubjectKeyIdentifier.from_public_key(key.public_key())
    issuer_key_id = x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer_key.public_key())
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .add_extension(key_id, critical=False)
        .add_extension(issuer_key_id, critical=False)
    )


def _names(uri: str, hosts: Sequence[x509.GeneralName] = ()) -> x509.SubjectAlternativeName:
    from cryptography import x509

    return x509.SubjectAlternativeName([x509.UniformResourceIdentifier(uri), *hosts])


def _purpose(use: Use) -> x509.ObjectIdentifier:
    from cryptography.x509.oid import ExtendedKeyUsageOID

    return ExtendedKeyUsageOID.CLIENT_AUTH if use == "client" else ExtendedKeyUsageOID.SERVER_AUTH


def _key_usage(*, authority: bool) -> x509.KeyUsage:
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


def _identity(path: Path, certificate: x509.Certificate) -> Identity:
    uris = [uri for uri in _uris(certificate) if uri.startswith("spiffe://")]
    if len(uris) != 1:
        raise ConfigError(
            f"{path} names {len(uris)} identities (spiffe:// URIs), and must name exactly one: "
            "use a certificate that `noren keys issue` made"
        )
    try:
        return parse_identity(uris[0])
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}; use a certificate that `noren keys issue` made") from None


def _uris(certificate: x509.Certificate) -> list[str]:
    from cryptography import x509

    names = _alternative_names(certificate)
    return names.get_values_for_type(x509.UniformResourceIdentifier) if names else []


def _alternative_names(certificate: x509.Certificate) -> x509.SubjectAlternativeName | None:
    from cryptography import x509

    try:
        return certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except (x509.ExtensionNotFound, ValueError):
        return None


def _signer(
    path: Path, certificate: x509.Certificate, ca: Path, authorities: Sequence[x509.Certificate]
) -> x509.Certificate:
    from cryptography import x509
    from cryptography.exceptions import InvalidSignature

    for authority in authorities:
        with contextlib.suppress(ValueError, TypeError, InvalidSignature):
            certificate.verify_directly_issued_by(authority)
            return authority
    try:
        extension = certificate.extensions.get_extension_for_class(x509.AuthorityKeyIdentifier)
        issuer = _described(certificate.issuer, extension.value.key_identifier)
    except (x509.ExtensionNotFound, ValueError):
        issuer = _described(certificate.issuer, None)
    found = " and ".join(
        _described(one.subject, x509.SubjectKeyIdentifier.from_public_key(one.public_key()).digest)
        for one in authorities
    )
    raise ConfigError(
        f"wrong CA: {path} was issued by {issuer}, but {ca} is {found}: "
        f"name the ca.crt that came with {path}, or have {path} issued again by the authority of {ca}"
    )


def _described(name: x509.Name, key_id: bytes | None) -> str:
    return f"{name.rfc4514_string()} (key id {key_id.hex() if key_id else 'unknown'})"


def _check_dates(path: Path, certificate: x509.Certificate, remedy: str) -> None:
    now = _now()
    if now >= certificate.not_valid_after_utc:
        raise ConfigError(f"{path} expired on {_date(certificate.not_valid_after_utc)}: {remedy}")
    if now < certificate.not_valid_before_utc:
        raise ConfigError(
            f"{path} is valid only from {_date(certificate.not_valid_before_utc)}, and this machine's clock "
            f"says {_date(now)}: set the clock, or {remedy}"
        )


def _check_use(path: Path, certificate: x509.Certificate, identity: Identity, use: Use) -> None:
    from cryptography import x509

    try:
        usage = certificate.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
    except (x509.ExtensionNotFound, ValueError):
        usage = None
    if use in USES[identity.role] and usage is not None and _purpose(use) in usage:
        return
    verb = {"client": "open", "server": "accept"}[use]
    raise ConfigError(
        f"{path} is {_a(identity.role)}'s certificate, and cannot be used to {verb} connections: "
        f"issue one with `{_issue_command('NAME', use, path.parent)}` (or --role edge, for both ends)"
    )


def _serves(credentials: Credentials, role: Role, hosts: Sequence[str]) -> bool:
    """Say whether there is a pair of files for that role and those hosts which has not expired."""
    if not credentials.certificate.exists() or not credentials.key.exists():
        return False
    certificate = _read_certificate(credentials.certificate)
    if certificate.not_valid_after_utc <= _now():
        return False
    if _identity(credentials.certificate, certificate).role != role:
        return False  # and issue() will say that a name has one role
    if "server" not in USES[role]:
        return True
    return set(_host_names(hosts)) <= set(_alternative_names(certificate) or ())


# Files.


def _authority(folder: Path) -> tuple[x509.Certificate, ec.EllipticCurvePrivateKey, str]:
    """Return the certificate, private key and federation of the authority in `folder`."""
    path, key_path = folder / "ca.crt", folder / "ca.key"
    _require_authority(folder, "ca.crt", "ca.key")
    pem = _read(path, "authority's certificate", _NEW_AUTHORITY)
    certificate = _certificates(path, pem, _NEW_AUTHORITY)[0]
    key = _private_key(key_path, _read(key_path, "authority's private key", _NEW_AUTHORITY))
    if key.public_key() != certificate.public_key():
        raise ConfigError(
            f"{key_path} is not the private key of {path}: put back the two that belong together, or {_NEW_AUTHORITY}"
        )
    _check_dates(path, certificate, _NEW_AUTHORITY)
    federations = [match[1] for uri in _uris(certificate) if (match := _AUTHORITY_URI.fullmatch(uri))]
    if len(federations) != 1:
        raise ConfigError(f"{path} does not say of which federation it is the authority: {_NEW_AUTHORITY}")
    return certificate, key, federations[0]


def _require_authority(folder: Path, *names: str) -> None:
    missing = [name for name in names if not (folder / name).exists()]
    if not missing:
        return
    if any((folder / name).exists() for name in ("ca.crt", "ca.key")):
        raise ConfigError(
            f"the authority in {folder} is not whole, {missing[0]} is missing: put it back (certificates are "
            f"issued where the authority was made), or {_NEW_AUTHORITY}"
        )
    command = f"noren keys init --dir {shlex.quote(str(folder))}"
    raise ConfigError(f"there is no authority in {folder}: make one with `{command}`")


def _read(path: Path, what: str, remedy: str) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise ConfigError(f"the {what} {path} is missing: {remedy}") from None
    except OSError as error:
        raise ConfigError(f"the {what} {path} cannot be read ({error.strerror}): {remedy}") from None


def _read_certificate(path: Path) -> x509.Certificate:
    command = f"`{_issue_command(path.stem, 'ROLE', path.parent)}`"
    pem = _read(path, "certificate", f"make it with {command}")
    return _certificates(path, pem, f"remove it and run {command}")[0]


def _certificates(path: Path, pem: bytes, remedy: str) -> list[x509.Certificate]:
    from cryptography import x509

    try:
        return x509.load_pem_x509_certificates(pem)
    except ValueError:
        raise ConfigError(f"{path} is not a certificate in PEM form: {remedy}") from None


def _private_key(path: Path, pem: bytes) -> ec.EllipticCurvePrivateKey:
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    remedy = "use the file that was written beside the certificate"
    try:
        key = load_pem_private_key(pem, password=None)
    except TypeError:
        raise ConfigError(f"{path} is encrypted, which is not supported: {remedy}") from None
    except (ValueError, UnsupportedAlgorithm):
        raise ConfigError(f"{path} is not a private key in PEM form: {remedy}") from None
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise ConfigError(f"{path} is not an ECDSA key: {remedy}")
    return key


def _certificate_pem(certificate: x509.Certificate) -> bytes:
    from cryptography.hazmat.primitives.serialization import Encoding

    return certificate.public_bytes(Encoding.PEM)


def _key_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


def _make_private(folder: Path) -> None:
    """Make `folder` with mode 0700; one that exists is closed to others only if it is empty."""
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        mode = stat.S_IMODE(folder.stat().st_mode)
        if os.name != "posix" or not mode & 0o077:
            return
        if any(folder.iterdir()):
            raise ConfigError(
                f"{folder} is open to others (mode {mode:04o}) and holds other files: choose a new folder "
                f"with --dir, or close it with `chmod 700 {shlex.quote(str(folder))}`"
            )
        folder.chmod(0o700)
    except OSError as error:
        raise ConfigError(
            f"the folder {folder} cannot be made ({error.strerror}): choose another one with --dir"
        ) from None


def _write(files: Mapping[Path, tuple[bytes, int]]) -> None:
    """Write files of one folder, each whole or not at all: temporary files, fsync, then renames in order."""
    folder = next(iter(files)).parent
    temporary: dict[Path, str] = {}
    try:
        for path, (data, mode) in files.items():
            descriptor, temporary[path] = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=folder)
            with os.fdopen(descriptor, "wb") as file:  # mkstemp made it 0600
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.chmod(temporary[path], mode)
        for path in files:
            os.replace(temporary[path], path)
            del temporary[path]
        if os.name == "posix":
            descriptor = os.open(folder, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
    except OSError as error:
        raise ConfigError(
            f"cannot write in {folder} ({error.strerror}): make it writable, or choose another one with --dir"
        ) from None
    finally:
        for leftover in temporary.values():
            with contextlib.suppress(OSError):
                os.unlink(leftover)
