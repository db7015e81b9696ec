"""Certificates for tests, and a gRPC server that says whom it sees."""

from __future__ import annotations

import socket
import ssl
from collections.abc import Callable, Iterator
from concurrent import futures
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from unittest import mock

import grpc
from cryptography import x509

from noren.wire.identity import Credentials, Role, clock, issue


@contextmanager
def ago(days: float) -> Iterator[None]:
    """Issue as if it were some days ago."""
    now = clock.now() - timedelta(days=days)
    with mock.patch.object(clock, "now", lambda: now):
        yield


def held(folder: Path, name: str, ca: Path | None = None) -> Credentials:
    return Credentials(ca=(ca or folder) / "ca.crt", certificate=folder / f"{name}.crt", key=folder / f"{name}.key")


def pair(folder: Path, name: str, role: Role, **settings) -> Credentials:
    issue(folder, name, role, **settings)
    return held(folder, name)


def load(path: Path) -> x509.Certificate:
    return x509.load_pem_x509_certificate(path.read_bytes())


def serial(path: Path) -> int:
    return load(path).serial_number


def raw_server(credentials: Credentials) -> grpc.ServerCredentials:
    pairs = [(credentials.key.read_bytes(), credentials.certificate.read_bytes())]
    return grpc.ssl_server_credentials(pairs, credentials.ca.read_bytes(), require_client_auth=True)


def raw_client(credentials: Credentials) -> grpc.ChannelCredentials:
    key, certificate = credentials.key.read_bytes(), credentials.certificate.read_bytes()
    return grpc.ssl_channel_credentials(credentials.ca.read_bytes(), key, certificate)


@contextmanager
def serving(
    credentials: grpc.ServerCredentials, seen: Callable[[grpc.ServicerContext], object] = lambda context: None
) -> Iterator[int]:
    """A server whose one method answers with the identities of who asks, after `seen`; gives the port."""

    def whoami(request: bytes, context: grpc.ServicerContext) -> bytes:
        seen(context)
        return b"\n".join(context.peer_identities())

    handlers = {"WhoAmI": grpc.unary_unary_rpc_method_handler(whoami)}
    with futures.ThreadPoolExecutor(4) as pool:
        server = grpc.server(pool)
        server.add_generic_rpc_handlers([grpc.method_handlers_generic_handler("test", handlers)])
        port = server.add_secure_port("127.0.0.1:0", credentials)
        server.start()
        try:
            yield port
        finally:
            server.stop(None).wait()


ALONE = [("grpc.use_local_subchannel_pool", 1)]
"""Channels with this share no connection: each makes a handshake."""


def ask(port: int, credentials: grpc.ChannelCredentials | None) -> list[str]:
    """Connect, in plaintext if there are no credentials, and return what the server calls us."""
    target = f"127.0.0.1:{port}"
    made = grpc.secure_channel(target, credentials, ALONE) if credentials else grpc.insecure_channel(target, ALONE)
    with made as channel:
        answer: bytes = channel.unary_unary("/test/WhoAmI")(b"", timeout=10)
    return answer.decode().splitlines()


def served_serial(port: int, client: Credentials) -> int:
    """The serial of the certificate that the server shows in a handshake of now."""
    context = ssl.create_default_context(cafile=str(client.ca))
    context.load_cert_chain(client.certificate, client.key)
    context.set_alpn_protocols(["h2"])
    with (
        socket.create_connection(("127.0.0.1", port), timeout=10) as plain,
        context.wrap_socket(plain, server_hostname="localhost") as line,
    ):
        shown = line.getpeercert()
    assert shown is not None
    return int(str(shown["serialNumber"]), 16)
