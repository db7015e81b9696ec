"""Real handshakes: whom a server refuses, and certificates and authorities that change while it serves."""

from __future__ import annotations

import logging
import os
import shutil
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path

import grpc
import pytest
from cryptography import x509

from noren.errors import ConfigError
from noren.wire.identity import (
    Credentials,
    Identity,
    Insecure,
    Peer,
    create_authority,
    issue,
    listing,
    peer_of,
    revoke,
    roll_over,
)
from tls import ago, ask, held, load, pair, raw_client, serial, served_serial, serving


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    create_authority(tmp_path / "keys")
    return tmp_path / "keys"


def refused(port: int, credentials: grpc.ChannelCredentials | None) -> str:
    with pytest.raises(grpc.RpcError) as caught:
        ask(port, credentials)
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
    return str(caught.value.details())


# Whom a server refuses. `raw_client` hands the files to gRPC as they are, as a peer that checks nothing would.


def nobody(folder: Path, other: Path) -> grpc.ChannelCredentials:
    return grpc.ssl_channel_credentials((folder / "ca.crt").read_bytes())


def other_ca(folder: Path, other: Path) -> grpc.ChannelCredentials:
    create_authority(other)
    issue(other, "alpha", "client")
    return raw_client(held(other, "alpha", ca=folder))


def expired(folder: Path, other: Path) -> grpc.ChannelCredentials:
    with ago(2):
        return raw_client(pair(folder, "late", "client", days=1))


def not_yet_valid(folder: Path, other: Path) -> grpc.ChannelCredentials:
    with ago(-2):
        return raw_client(pair(folder, "early", "client", days=1))


def wrong_use(folder: Path, other: Path) -> grpc.ChannelCredentials:
    return raw_client(held(folder, "server"))


def plaintext(folder: Path, other: Path) -> None:
    return None


CELLS = [nobody, other_ca, expired, not_yet_valid, wrong_use, plaintext]


@pytest.mark.parametrize("cell", CELLS, ids=lambda cell: cell.__name__)
@pytest.mark.parametrize("rotated", [False, True], ids=["first", "rotated"])
def test_T5_handshake_refuses(
    tmp_path: Path, cell: Callable[[Path, Path], grpc.ChannelCredentials | None], rotated: bool
) -> None:
    """No bad cell reaches a method; the control does, before and after. Also with files that have been replaced."""
    folder, reached = tmp_path / "keys", []
    with ago(3):
        create_authority(folder)
    server, control = pair(folder, "server", "server"), pair(folder, "alpha", "client")
    with serving(server.server(), reached.append) as port:
        if rotated:
            issue(folder, "server", "server")
            assert served_serial(port, control) == serial(server.certificate)
        assert ask(port, control.client()) == ["spiffe://noren/client/alpha"]
        why = refused(port, cell(folder, tmp_path / "other"))
        assert len(reached) == 1
        assert ask(port, control.client()) == ["spiffe://noren/client/alpha"]
    print(f"{cell.__name__}: {why[:100]}")


# Who the peer is.


def test_the_peer_of_a_connection(folder: Path) -> None:
    server, client = pair(folder, "server", "server"), pair(folder, "alpha", "client")
    seen: list[Peer] = []
    certificate = load(client.certificate)

    def see(context: grpc.ServicerContext) -> None:
        seen.append(peer_of(context.auth_context()["x509_pem_cert"][0], "noren"))

    with serving(server.server(), see) as port:
        ask(port, client.client())
    assert seen == [
        Peer(Identity("alpha", "client", "noren"), certificate.serial_number, certificate.not_valid_after_utc)
    ]
    assert seen[0].not_after > datetime.now(UTC)


def test_a_peer_that_is_none(folder: Path) -> None:
    for pem in (b"", b"junk", (folder / "ca.key").read_bytes()):
        with pytest.raises(ConfigError, match="the peer's certificate is not a certificate in PEM form"):
            peer_of(pem)
    with pytest.raises(ConfigError, match=r"the peer's certificate: 'spiffe://noren' is not an identity"):
        peer_of((folder / "ca.crt").read_bytes())
    issue(folder, "alpha", "client")
    with pytest.raises(ConfigError, match=r"names spiffe://noren/client/alpha, which is not of .*'clinics'"):
        peer_of((folder / "alpha.crt").read_bytes(), "clinics")


def test_plaintext_warns_every_time(caplog: pytest.LogCaptureFixture) -> None:
    insecure = Insecure()
    for _ in range(2):
        insecure.warn("serving at 127.0.0.1:50051")
    assert [(line.levelname, line.getMessage()) for line in caplog.records] == 2 * [
        (
            "WARNING",
            "serving at 127.0.0.1:50051: no TLS: anyone on the path can read and change what crosses, "
            "and nobody's identity is checked",
        )
    ]
    assert insecure.check("server") == Identity("anonymous", "server", "noren")


# Certificates that change while a server serves.


def test_T25_rotation_under_load(folder: Path) -> None:
    """Server's and client's pairs are replaced 20 times while 3 clients open new connections."""
    server, client = pair(folder, "server", "server"), pair(folder, "alpha", "client")
    watcher = pair(folder, "watcher", "client")
    progress, failures, served = threading.Condition(), [], 0
    over = threading.Event()

    def keep_asking() -> None:
        nonlocal served
        while not over.is_set():
            try:
                assert ask(port, client.client()) == ["spiffe://noren/client/alpha"]
            except Exception as error:
                failures.append(repr(error))
            with progress:
                served += 1
                progress.notify_all()

    shown = set()
    with serving(server.server()) as port, ThreadPoolExecutor(3) as pool:
        try:
            asking = [pool.submit(keep_asking) for _ in range(3)]
            for _ in range(20):
                with progress:
                    enough = served + 4
                    assert progress.wait_for(lambda enough=enough: served >= enough, timeout=30)
                issue(folder, "server", "server")
                issue(folder, "alpha", "client")
                shown.add(served_serial(port, watcher))
                assert serial(server.certificate) in shown
        finally:
            over.set()
        for one in asking:
            one.result()
        last = served_serial(port, watcher)
    print(f"{served} connections, {len(shown)} certificates shown, {len(failures)} failures")
    assert failures == []
    assert len(shown) == 20 and last == serial(server.certificate)


def test_T25_a_pair_half_replaced_is_not_used(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    server, client = pair(folder, "server", "server"), pair(folder, "alpha", "client")
    before = serial(server.certificate)
    kept = {path: path.read_bytes() for path in (server.ca, server.certificate, server.key)}
    issue(folder, "server", "server")
    new = {path: path.read_bytes() for path in kept}
    create_authority(folder.parent / "other")
    issue(folder.parent / "other", "server", "server")
    junk = b"-----BEGIN CERTIFICATE-----\n"
    halves: list[dict[Path, bytes]] = [
        {server.key: new[server.key]},
        {server.certificate: new[server.certificate][:300]},
        {server.key: b""},
        {server.ca: junk},
        {server.certificate: client.certificate.read_bytes(), server.key: client.key.read_bytes()},
        {server.ca: (folder.parent / "other/ca.crt").read_bytes()},
    ]
    trusting = Credentials(ca=folder / "trusted.crt", certificate=client.certificate, key=client.key)
    trusting.ca.write_bytes(kept[server.ca])

    def put(files: dict[Path, bytes]) -> None:
        for path, content in files.items():
            path.write_bytes(content)

    put(kept)
    with serving(server.server()) as port:
        for number, half in enumerate(halves, start=1):
            put(half)
            for _ in range(3):
                assert served_serial(port, trusting) == before
                assert ask(port, trusting.client()) == ["spiffe://noren/client/alpha"]
            errors = [line for line in caplog.records if line.levelno == logging.ERROR]
            assert len(errors) == number and "certificate as before" in errors[-1].getMessage()
            put(kept)
        put(new)
        assert served_serial(port, trusting) == serial(server.certificate) != before


def test_T25_a_pair_replaced_before_the_first_connection(folder: Path) -> None:
    server, client = pair(folder, "server", "server"), pair(folder, "alpha", "client")
    with serving(server.server()) as port:
        issue(folder, "server", "server")
        assert served_serial(port, client) == serial(server.certificate)


def test_a_client_waits_for_the_other_half(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A pair is two renames: who reads between them gets the new key with the old certificate."""
    client = pair(folder, "alpha", "client")
    rename, between, read = os.replace, threading.Event(), threading.Event()

    def slowly(source: str, target: Path) -> None:
        if target == client.certificate:
            between.set()
            assert read.wait(10)
        rename(source, target)

    load_files = Credentials._load

    def noticed(self: Credentials, use: str) -> tuple[Identity, bytes, bytes, bytes]:
        try:
            return load_files(self, use)  # type: ignore[arg-type]
        except ConfigError:
            read.set()
            raise

    monkeypatch.setattr(os, "replace", slowly)
    monkeypatch.setattr(Credentials, "_load", noticed)
    with ThreadPoolExecutor(1) as pool:
        issuing = pool.submit(issue, folder, "alpha", "client")
        assert between.wait(10)
        assert client.check("client").name == "alpha"
        issuing.result()
    assert read.is_set()


# Authorities that change while a server serves.


def place(source: Path, target: Path, name: str, *names: str) -> Credentials:
    """Copy files of a party to its own machine, beside and renamed."""
    target.mkdir(exist_ok=True)
    for file in names:
        shutil.copy(source / file, target / f".{file}")
        os.replace(target / f".{file}", target / file)
    return held(target, name)


def test_T25_ca_roll_over_with_overlap(folder: Path, tmp_path: Path) -> None:
    """The order that `noren keys roll` tells: ca.crt everywhere, then certificates. Nobody is ever locked out."""
    names = ("server", "alpha", "beta")
    machines = {name: tmp_path / name for name in names}
    for name in names:
        issue(folder, name, "server" if name == "server" else "client")
    parties = {n: place(folder, machines[n], n, "ca.crt", f"{n}.crt", f"{n}.key") for n in names}
    failures, asked = [], 0

    def everybody() -> None:
        nonlocal asked
        for name in ("alpha", "beta"):
            asked += 1
            try:
                assert ask(port, parties[name].client()) == [f"spiffe://noren/client/{name}"]
            except Exception as error:
                failures.append(f"{name}: {error!r}")

    with serving(parties["server"].server()) as port:
        everybody()
        old_end = load(folder / "ca.crt").not_valid_after_utc
        assert roll_over(folder) == old_end
        everybody()
        for name in names:
            place(folder, machines[name], name, "ca.crt")
            everybody()
        for name in ("beta", "server", "alpha"):  # a new client at an old server, then an old one at a new server
            issue(folder, name, "server" if name == "server" else "client")
            place(folder, machines[name], name, f"{name}.crt", f"{name}.key")
            everybody()
        assert served_serial(port, parties["alpha"]) == serial(folder / "server.crt")
        assert failures == [], failures

        _, new, old = (folder / "ca.crt").read_text().split("-----BEGIN")
        (machines["server"] / "ca.crt").write_text("-----BEGIN" + new)  # the overlap ends
        everybody()
        assert failures == [], failures
        issue(folder, "gamma", "client")
        behind = place(folder, tmp_path / "gamma", "gamma", "gamma.crt", "gamma.key")
        behind.ca.write_text("-----BEGIN" + old)  # has missed the new ca.crt
        assert "CERTIFICATE_VERIFY_FAILED" in refused(port, raw_client(behind))
    print(f"{asked} connections over the roll-over, {len(failures)} failures")


def test_T25_the_old_authority_is_out_after_the_overlap(folder: Path) -> None:
    server, old_client = pair(folder, "server", "server"), pair(folder, "alpha", "client")
    roll_over(folder)
    issue(folder, "server", "server")
    new_client = pair(folder, "beta", "client")
    with serving(server.server()) as port:
        for client in (old_client, new_client):
            assert ask(port, client.client())
        both = raw_client(old_client)
        (folder / "ca.crt").write_text("-----BEGIN" + (folder / "ca.crt").read_text().split("-----BEGIN")[1])
        refused(port, both)
        assert ask(port, new_client.client())


def test_expired_authorities_are_left_out(tmp_path: Path) -> None:
    with ago(300):
        create_authority(tmp_path)
    first = load(tmp_path / "ca.crt")
    with ago(100):
        roll_over(tmp_path)
        assert len(x509.load_pem_x509_certificates((tmp_path / "ca.crt").read_bytes())) == 2
        assert load(tmp_path / "ca.crt") != first
    with ago(-80):  # the first has ended
        roll_over(tmp_path)
        assert len(x509.load_pem_x509_certificates((tmp_path / "ca.crt").read_bytes())) == 2
    assert (tmp_path / "ca-old.key").read_text().count("BEGIN PRIVATE KEY") == 1
    assert oct((tmp_path / "ca-old.key").stat().st_mode & 0o777) == oct(0o600)


@pytest.mark.parametrize("last", range(4))
def test_a_crash_in_a_roll_over(folder: Path, last: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whichever rename it comes after, the folder issues, what it issues is trusted, and it can roll over again."""
    alpha = pair(folder, "alpha", "client")
    revoke(folder, "alpha")
    rename, done = os.replace, 0

    def crash(source: str, target: Path) -> None:
        nonlocal done
        if done == last:
            raise OSError(5, "crash")
        done += 1
        rename(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", crash)
        with pytest.raises(ConfigError, match="crash"):
            roll_over(folder)
    assert [row.revoked for row in listing(folder)] == [True]
    assert alpha.check("client")
    assert pair(folder, "beta", "client").check("client")
    roll_over(folder)
    assert alpha.check("client") and held(folder, "beta").check("client")
    assert len(revoke(folder, "beta")) == 1
    assert {row.name: row.revoked for row in listing(folder)} == {"alpha": True, "beta": True}


@pytest.mark.parametrize("name", ["ca", "ca-old"])
def test_names_of_the_authority(folder: Path, name: str) -> None:
    with pytest.raises(ConfigError, match="authority's own"):
        issue(folder, name, "client")
