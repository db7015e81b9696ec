"""The files with which a party proves who it is, looked at before they are used and again when they change."""

from __future__ import annotations

import logging
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import noren.wire.identity.files as files
from noren.errors import ConfigError
from noren.wire.identity.certificates import check_dates, check_use, identity_of, signer
from noren.wire.identity.names import NEW_AUTHORITY, Identity, Use, issue_command

if TYPE_CHECKING:
    import grpc

log = logging.getLogger("noren.wire")

WAITS = (0.01, 0.03, 0.1)
"""Seconds between attempts to read files that are being replaced: two renames are not one."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Credentials:
    """The three files with which a party proves who it is, and checks who its peer is.

    `ca` may hold several authorities one after another, while a federation moves from one to the next.
    gRPC reports a wrong file as "handshake failed" at best, so the files are looked at before they are used.
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
        return self._settled(use)[0]

    def server(self) -> grpc.ServerCredentials:
        """Return credentials to accept connections with; a peer without a certificate of `ca` is refused.

        When the files change, the next handshake uses the new ones. Files that cannot be used, like a pair of which
        one half is written, are passed over: those before stay in use, and an error is logged once.

        Raises ConfigError as `check` does.
        """
        import grpc

        source = _Rotating(self)
        return grpc.dynamic_ssl_server_credentials(source.first, source.changed, require_client_authentication=True)

    def client(self) -> grpc.ChannelCredentials:
        """Return credentials to open connections with; a server without a certificate of `ca` is refused.

        The files are read now: call this for each connection. Raises ConfigError as `check` does.
        """
        import grpc

        _, ca, certificate, key = self._settled("client")
        return grpc.ssl_channel_credentials(ca, private_key=key, certificate_chain=certificate)

    def _signature(self) -> files.Signature:
        """Return what changes when one of the files does."""
        return files.signature(self.ca, self.certificate, self.key)

    def _load(self, use: Use) -> tuple[Identity, bytes, bytes, bytes]:
        """Read each file once, so that what was checked is what is used: identity, then `ca`, `certificate`, `key`.

        Raises ConfigError as `check` does, also for files that are just being replaced.
        """
        folder = self.certificate.parent
        again = f"`{issue_command(self.certificate.stem, use, folder)}`"
        from_init = "copy ca.crt from the folder where `noren keys init` was run"
        ca_pem = files.read(self.ca, "authority's certificate", from_init)
        certificate_pem = files.read(self.certificate, "certificate", f"make it with {again}")
        key_pem = files.read(self.key, "private key", f"it belongs beside the certificate; make both with {again}")

        authorities = files.certificates(self.ca, ca_pem, from_init)
        certificate = files.certificates(self.certificate, certificate_pem, f"remove it and run {again}")[0]
        identity = identity_of(self.certificate, certificate)
        again = f"`{issue_command(identity.name, identity.role, folder)}`"

        authority = signer(self.certificate, certificate, self.ca, authorities)
        check_dates(self.ca, authority, f"{NEW_AUTHORITY}, and issue every certificate from it")
        check_dates(self.certificate, certificate, f"issue it again with {again}")
        if files.private_key(self.key, key_pem).public_key() != certificate.public_key():
            raise ConfigError(
                f"{self.key} is not the private key of {self.certificate}: name the two files that were "
                f"issued together, or issue both again with {again}"
            )
        check_use(self.certificate, certificate, identity, use)
        return identity, ca_pem, certificate_pem, key_pem

    def _settled(self, use: Use) -> tuple[Identity, bytes, bytes, bytes]:
        """Load the files; if they cannot be used but were replaced a moment ago, wait for the other half."""
        for wait in WAITS:
            try:
                return self._load(use)
            except ConfigError:
                if not self._just_replaced():
                    raise
                time.sleep(wait)
        return self._load(use)

    def _just_replaced(self) -> bool:
        changed = [max(times[:2]) for times in self._signature() if len(times) > 2]
        return max(changed, default=0) > time.time_ns() - 1_000_000_000


class _Rotating:
    """A server's files at each handshake. gRPC asks from threads of its own, where nothing may be raised."""

    def __init__(self, credentials: Credentials) -> None:
        self._credentials = credentials
        self._lock = threading.Lock()
        self._complaint = ""
        self._used = credentials._signature()
        self.first = _configuration(credentials._settled("server"))

    def changed(self) -> grpc.ServerCertificateConfiguration | None:
        """Return the files as they are now if they can be used and are not in use; else None."""
        with self._lock:
            found = self._credentials._signature()
            if found == self._used:
                return None
            try:
                configuration = _configuration(self._credentials._load("server"))
            except ConfigError as error:
                if str(error) != self._complaint:
                    log.error("certificate as before: %s", error)
                self._complaint = str(error)
                return None
            self._used, self._complaint = found, ""
            log.info("the certificate files have changed: connections from now on use the new ones")
            return configuration


def _configuration(loaded: tuple[Identity, bytes, bytes, bytes]) -> grpc.ServerCertificateConfiguration:
    import grpc

    _, ca, certificate, key = loaded
    return grpc.ssl_server_certificate_configuration([(key, certificate)], root_certificates=ca)


@dataclass(frozen=True, kw_only=True, slots=True)
class Insecure:
    """Stands where Credentials would, and means none: plaintext, and peers that nobody has named."""

    federation: str = "noren"

    def check(self, use: Use) -> Identity:
        """Return the identity of whoever uses this."""
        return Identity("anonymous", use, self.federation)

    def warn(self, what: str) -> None:
        """Log a warning, each time. `what` is about to happen, e.g. "serving at 127.0.0.1:50051"."""
        log.warning(
            "%s: no TLS: anyone on the path can read and change what crosses, and nobody's identity is checked", what
        )
