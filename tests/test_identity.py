"""Certificates, the errors that they give, and who refuses whom in real TLS handshakes on loopback."""

import json
import os
import stat
from collections.abc import Callable
from contextlib import AbstractContextManager
from datetime import timedelta
from pathlib import Path

import grpc
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.x509.oid import ExtendedKeyUsageOID
from typer.testing import CliRunner

import tls
from noren.cli.keys import app
from noren.errors import ConfigError, LinkError
from noren.types import Message, Status
from noren.wire import identity
from noren.wire.grpc_link import GrpcLink
from noren.wire.identity import Credentials, Identity, clock, create_authority, ensure, issue, listing
from tls import ask, held, load, pair, raw_server, serving


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    create_authority(tmp_path / "keys")
    return tmp_path / "keys"


@pytest.fixture
def other(tmp_path: Path) -> Path:
    """The folder of another authority, of a federation with the same name."""
    create_authority(tmp_path / "other")
    return tmp_path / "other"


@pytest.fixture
def ago() -> Callable[[float], AbstractContextManager[None]]:
    """Issue as if it were some days ago."""
    return tls.ago


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


# What is written.


def test_authority(folder: Path) -> None:
    certificate = load(folder / "ca.crt")
    certificate.verify_directly_issued_by(certificate)
    constraints = certificate.extensions.get_extension_for_class(x509.BasicConstraints)
    assert constraints.critical and constraints.value == x509.BasicConstraints(ca=True, path_length=0)
    usage = certificate.extensions.get_extension_for_class(x509.KeyUsage)
    assert usage.critical and usage.value.key_cert_sign and not usage.value.digital_signature
    assert certificate.extensions.get_extension_for_class(x509.SubjectKeyIdentifier)
    valid = certificate.not_valid_after_utc - certificate.not_valid_before_utc
    assert valid == timedelta(days=365) + identity.CLOCK_SKEW


@pytest.mark.parametrize(
    ("role", "purposes", "hosts"),
    [
        ("client", [ExtendedKeyUsageOID.CLIENT_AUTH], set()),
        ("server", [ExtendedKeyUsageOID.SERVER_AUTH], {"gpu-1.example.org", "10.0.0.7"}),
        (
            "edge",
            [ExtendedKeyUsageOID.CLIENT_AUTH, ExtendedKeyUsageOID.SERVER_AUTH],
            {"gpu-1.example.org", "10.0.0.7"},
        ),
    ],
)
def test_leaf(tmp_path: Path, role: identity.Role, purposes: list, hosts: set[str]) -> None:
    create_authority(tmp_path, "clinics")
    path = issue(tmp_path, "alpha", role, hosts=("gpu-1.example.org", "10.0.0.7"), days=2)
    assert path == tmp_path / "alpha.crt"
    certificate = load(path)
    certificate.verify_directly_issued_by(load(tmp_path / "ca.crt"))
    assert isinstance(certificate.public_key(), ec.EllipticCurvePublicKey)
    assert list(certificate.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value) == purposes
    assert not certificate.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.UniformResourceIdentifier) == [f"spiffe://clinics/{role}/alpha"]
    addresses = {str(address) for address in names.get_values_for_type(x509.IPAddress)}
    assert set(names.get_values_for_type(x509.DNSName)) | addresses == hosts
    assert identity.read_identity(path) == Identity("alpha", role, "clinics")
    assert timedelta(days=1.9) < certificate.not_valid_after_utc - clock.now() <= timedelta(days=2)


@pytest.mark.skipif(os.name != "posix", reason="modes are of POSIX")
def test_modes(tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.mkdir(mode=0o755)
    before = os.umask(0)
    try:
        create_authority(keys)
        issue(keys, "alpha", "client")
    finally:
        os.umask(before)
    assert mode(keys) == 0o700
    assert mode(keys / "ca.key") == mode(keys / "alpha.key") == mode(keys / "issued.jsonl") == 0o600
    assert sorted(path.name for path in keys.iterdir()) == [
        ".lock", "alpha.crt", "alpha.key", "ca.crt", "ca.key", "issued.jsonl",
    ]  # fmt: skip


def test_a_failed_write_leaves_the_earlier_pair(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    credentials = pair(folder, "alpha", "client")
    files = {path: path.read_bytes() for path in folder.iterdir()}

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(ConfigError, match=r"cannot write in .*keys \(No space left.*--dir"):
            issue(folder, "alpha", "client")
    assert {path: path.read_bytes() for path in folder.iterdir()} == files
    credentials.check("client")


def test_issuing_again_replaces_the_pair(folder: Path) -> None:
    credentials = pair(folder, "alpha", "client")
    serial = load(credentials.certificate).serial_number
    issue(folder, "alpha", "client")
    assert load(credentials.certificate).serial_number != serial
    credentials.check("client")


def test_listing(folder: Path, tmp_path: Path, ago) -> None:
    assert listing(folder) == []
    issue(folder, "beta", "server")
    with ago(2):
        create_authority(tmp_path / "old")
        issue(tmp_path / "old", "alpha", "client", days=1)
    for suffix in (".crt", ".key"):
        (tmp_path / f"old/alpha{suffix}").rename(folder / f"alpha{suffix}")
    alpha, beta = listing(folder)
    assert (alpha.name, alpha.role, alpha.expired) == ("alpha", "client", True)
    assert (beta.name, beta.role, beta.expired) == ("beta", "server", False)
    assert int(beta.serial, 16) == load(folder / "beta.crt").serial_number
    assert beta.not_after == load(folder / "beta.crt").not_valid_after_utc


def test_parse_identity() -> None:
    assert identity.parse_identity("spiffe://noren/edge/ward-3") == Identity("ward-3", "edge", "noren")
    assert identity.parse_identity(Identity("a", "client", "b").uri) == Identity("a", "client", "b")


@pytest.mark.parametrize(
    "uri",
    [
        "",
        "spiffe://noren/client",
        "spiffe://noren/owner/alpha",
        "spiffe://noren/client/Alpha",
        "spiffe://noren/client/alpha\n",
        "spiffe://noren/client/alpha/more",
        "https://noren/client/alpha",
    ],
)
def test_parse_identity_refuses(uri: str) -> None:
    with pytest.raises(ConfigError, match=r"must read spiffe://<federation>/<client\|edge\|server>/<name>"):
        identity.parse_identity(uri)


# What is refused when it is made.


@pytest.mark.parametrize("present", ["ca.crt", "ca.key"])
def test_an_authority_is_never_overwritten(folder: Path, present: str) -> None:
    absent = {"ca.crt": "ca.key", "ca.key": "ca.crt"}[present]
    (folder / absent).unlink()
    before = (folder / present).read_bytes()
    with pytest.raises(ConfigError, match=rf"{present} exists already.*noren keys issue .*noren keys init --dir"):
        create_authority(folder)
    assert (folder / present).read_bytes() == before


@pytest.mark.skipif(os.name != "posix", reason="modes are of POSIX")
def test_a_shared_folder_is_refused(tmp_path: Path) -> None:
    shared = tmp_path / "shared"
    shared.mkdir(mode=0o755)
    (shared / "notes.txt").touch()
    with pytest.raises(ConfigError, match=r"open to others \(mode 0755\).*--dir, or close it with `chmod 700 "):
        create_authority(shared)
    assert mode(shared) == 0o755
    shared.chmod(0o700)
    create_authority(shared)


def test_a_folder_that_cannot_be(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"cannot be made.*choose another one with --dir"):
        create_authority(tmp_path / "file/keys")


@pytest.mark.parametrize("name", ["", "Alpha", "-alpha", "a_b", "a/b", "..", "a" * 64, "alpha\n", "ä"])
def test_names(folder: Path, tmp_path: Path, name: str) -> None:
    rule = r"must match \[a-z0-9\]\[a-z0-9-\]\{0,62\} \(1 to 63 lower-case letters, digits and hyphens"
    with pytest.raises(ConfigError, match=rf"cannot name a party: .*{rule}"):
        issue(folder, name, "client")
    with pytest.raises(ConfigError, match=rf"cannot name a federation: .*{rule}"):
        create_authority(tmp_path / "new", name)


def test_the_longest_names(tmp_path: Path) -> None:
    create_authority(tmp_path, "f" * 63)
    issue(tmp_path, "n" * 63, "edge")
    assert held(tmp_path, "n" * 63).check("server") == Identity("n" * 63, "edge", "f" * 63)


def test_the_name_of_the_authority(folder: Path) -> None:
    before = (folder / "ca.crt").read_bytes()
    with pytest.raises(ConfigError, match=r"authority's own.*choose another name"):
        issue(folder, "ca", "client")
    assert (folder / "ca.crt").read_bytes() == before


def test_a_name_has_one_role(folder: Path) -> None:
    issue(folder, "alpha", "edge")
    with pytest.raises(ConfigError, match=r"alpha\.crt is an edge's.*choose another name, or remove alpha\.crt and"):
        issue(folder, "alpha", "client")
    with pytest.raises(ConfigError, match="a name has one role"):
        ensure(folder, "alpha", "server")


def test_unknown_role(folder: Path) -> None:
    with pytest.raises(ConfigError, match="'owner' is unknown: choose one of client, edge, server"):
        issue(folder, "alpha", "owner")  # type: ignore[arg-type]


@pytest.mark.parametrize("days", [0, -1, float("nan"), float("inf")])
def test_days(folder: Path, days: float) -> None:
    with pytest.raises(ConfigError, match="ask for more than 0"):
        issue(folder, "alpha", "client", days=days)


def test_days_beyond_the_authority(folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"366 days would outlive .*ca\.crt.*at most 364 days.*noren keys init"):
        issue(folder, "alpha", "client", days=366)


@pytest.mark.parametrize("host", ["", "http://a", "a:80", "[::1]", "*.example.org", "spiffe://noren/server/x", "-a"])
def test_hosts(folder: Path, host: str) -> None:
    with pytest.raises(ConfigError, match="neither a DNS name nor an IP address: give it without scheme, port"):
        issue(folder, "alpha", "server", hosts=("localhost", host))


def test_no_host(folder: Path) -> None:
    with pytest.raises(ConfigError, match="name each with --host"):
        issue(folder, "alpha", "edge", hosts=())
    issue(folder, "beta", "client", hosts=())


def test_no_authority(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no authority in .*absent: make one with `noren keys init --dir .*absent`"):
        issue(tmp_path / "absent", "alpha", "client")
    with pytest.raises(ConfigError, match=r"`noren keys init --dir .*absent`"):
        listing(tmp_path / "absent")


@pytest.mark.parametrize("missing", ["ca.crt", "ca.key"])
def test_half_an_authority(folder: Path, missing: str) -> None:
    (folder / missing).unlink()
    with pytest.raises(ConfigError, match=rf"not whole, {missing} is missing: put it back.*noren keys init"):
        issue(folder, "alpha", "client")


def test_an_authority_with_another_key(folder: Path, other: Path) -> None:
    (other / "ca.key").replace(folder / "ca.key")
    with pytest.raises(ConfigError, match=r"ca\.key is not the private key of .*ca\.crt: put back the two"):
        issue(folder, "alpha", "client")


def test_an_authority_out_of_date(tmp_path: Path, ago) -> None:
    with ago(366):
        create_authority(tmp_path)
        issue(tmp_path, "alpha", "client", days=364)
    with pytest.raises(ConfigError, match=r"ca\.crt expired on \d{4}-.* UTC: make a new .*`noren keys init --dir"):
        issue(tmp_path, "beta", "client")
    with pytest.raises(ConfigError, match=r"ca\.crt expired on .*issue every certificate from it"):
        held(tmp_path, "alpha").check("client")


def test_a_certificate_that_is_not_an_authority(folder: Path) -> None:
    issue(folder, "alpha", "client")
    for suffix in (".crt", ".key"):
        (folder / f"alpha{suffix}").replace(folder / f"ca{suffix}")
    with pytest.raises(ConfigError, match=r"does not say of which federation.*noren keys init"):
        issue(folder, "beta", "client")


# What is refused before connecting.


@pytest.mark.parametrize(
    ("file", "remedy"),
    [
        ("ca.crt", "copy ca.crt from the folder where `noren keys init` was run"),
        ("alpha.crt", "make it with `noren keys issue alpha --role client --dir "),
        ("alpha.key", "make both with `noren keys issue alpha --role client --dir "),
    ],
)
def test_missing_file(folder: Path, file: str, remedy: str) -> None:
    credentials = pair(folder, "alpha", "client")
    (folder / file).unlink()
    with pytest.raises(ConfigError, match=rf"{file} is missing: .*{remedy}"):
        credentials.client()
    (folder / file).mkdir()
    with pytest.raises(ConfigError, match=rf"{file} cannot be read \(.*\): .*{remedy}"):
        credentials.client()


@pytest.mark.parametrize(
    ("file", "sentence"),
    [
        ("ca.crt", r"ca\.crt is not a certificate in PEM form: copy ca\.crt"),
        (
            "alpha.crt",
            r"alpha\.crt is not a certificate in PEM form: remove it and run `noren keys issue alpha",
        ),
        ("alpha.key", r"alpha\.key is not a private key in PEM form: use the file that was written beside"),
    ],
)
def test_damaged_file(folder: Path, file: str, sentence: str) -> None:
    credentials = pair(folder, "alpha", "client")
    for damage in (b"", b"-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n", b"\xff\x00"):
        (folder / file).write_bytes(damage)
        with pytest.raises(ConfigError, match=sentence):
            credentials.client()


def test_unusable_keys(folder: Path) -> None:
    credentials = pair(folder, "alpha", "client")
    key = serialization.load_pem_private_key(credentials.key.read_bytes(), None)
    pem, pkcs8 = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8
    locked = key.private_bytes(pem, pkcs8, serialization.BestAvailableEncryption(b"secret"))
    credentials.key.write_bytes(locked)
    with pytest.raises(ConfigError, match=r"alpha\.key is encrypted, which is not supported: use the file"):
        credentials.check("client")
    foreign = rsa.generate_private_key(65537, 2048).private_bytes(pem, pkcs8, serialization.NoEncryption())
    credentials.key.write_bytes(foreign)
    with pytest.raises(ConfigError, match=r"alpha\.key is not an ECDSA key: use the file"):
        credentials.check("client")


def test_wrong_authority(folder: Path, other: Path) -> None:
    issue(folder, "alpha", "client")
    ours, theirs = (
        load(path / "ca.crt").extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value.digest.hex()
        for path in (folder, other)
    )
    with pytest.raises(ConfigError) as caught:
        held(folder, "alpha", ca=other).client()
    sentence = str(caught.value)
    assert sentence.startswith(f"wrong CA: {folder / 'alpha.crt'} was issued by CN=authority,O=noren (key id {ours})")
    assert f"{other / 'ca.crt'} is CN=authority,O=noren (key id {theirs})" in sentence
    assert f"name the ca.crt that came with {folder / 'alpha.crt'}" in sentence


def test_two_authorities_in_one_file(folder: Path, other: Path) -> None:
    credentials = pair(folder, "alpha", "client")
    credentials.ca.write_bytes((other / "ca.crt").read_bytes() + credentials.ca.read_bytes())
    credentials.check("client")


def test_out_of_date(tmp_path: Path, ago) -> None:
    with ago(2):
        create_authority(tmp_path)
        credentials = pair(tmp_path, "alpha", "client", days=1)
    with pytest.raises(ConfigError, match=r"alpha\.crt expired on .* UTC: issue it again with `noren keys issue alpha"):
        credentials.client()
    issue(tmp_path, "alpha", "client")
    credentials.client()
    with (
        ago(1),
        pytest.raises(ConfigError, match=r"alpha\.crt is valid only from .*this machine's clock says .*: set the"),
    ):
        credentials.client()


def test_a_key_of_another_certificate(folder: Path) -> None:
    credentials = pair(folder, "alpha", "client")
    issue(folder, "beta", "client")
    (folder / "beta.key").replace(folder / "alpha.key")
    with pytest.raises(
        ConfigError,
        match=r"alpha\.key is not the private key of .*alpha\.crt: .*`noren keys issue alpha --role client",
    ):
        credentials.client()


def test_the_other_end(folder: Path) -> None:
    client, server = pair(folder, "alpha", "client"), pair(folder, "beta", "server")
    with pytest.raises(
        ConfigError, match=r"a client's .*cannot be used to accept .*`noren keys issue NAME --role server"
    ):
        client.server()
    with pytest.raises(
        ConfigError, match=r"a server's .*cannot be used to open .*`noren keys issue NAME --role client"
    ):
        server.client()
    edge = pair(folder, "gamma", "edge")
    assert edge.check("client") == edge.check("server") == Identity("gamma", "edge", "noren")


def sign(folder: Path, name: str, *extensions: x509.ExtensionType) -> Credentials:
    """A certificate of the authority in `folder` as `issue` would not make it."""
    credentials = pair(folder, name, "client")
    old = load(credentials.certificate)
    builder = x509.CertificateBuilder(
        old.issuer,
        old.subject,
        old.public_key(),  # type: ignore[arg-type]
        old.serial_number,
        old.not_valid_before_utc,
        old.not_valid_after_utc,
    )
    for extension in extensions:
        builder = builder.add_extension(extension, critical=False)
    key = serialization.load_pem_private_key((folder / "ca.key").read_bytes(), None)
    assert isinstance(key, ec.EllipticCurvePrivateKey)
    signed = builder.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)
    credentials.certificate.write_bytes(signed)
    return credentials


@pytest.mark.parametrize(
    ("uris", "sentence"),
    [
        ([], r"alpha\.crt names 0 identities.*use a certificate that `noren keys issue` made"),
        (
            ["spiffe://noren/client/a", "spiffe://noren/client/b"],
            r"alpha\.crt names 2 identities.*`noren keys issue`",
        ),
        (
            ["spiffe://noren/root/a"],
            r"alpha\.crt: 'spiffe://noren/root/a' is not an identity.*`noren keys issue`",
        ),
    ],
)
def test_a_certificate_without_one_identity(folder: Path, uris: list[str], sentence: str) -> None:
    names = [x509.SubjectAlternativeName([x509.UniformResourceIdentifier(uri) for uri in uris])] if uris else []
    credentials = sign(folder, "alpha", *names)
    with pytest.raises(ConfigError, match=sentence):
        credentials.check("client")
    with pytest.raises(ConfigError, match=sentence):
        identity.read_identity(credentials.certificate)
    with pytest.raises(ConfigError, match=sentence):
        listing(folder)


def test_a_role_without_its_key_usage(folder: Path) -> None:
    names = x509.SubjectAlternativeName([x509.UniformResourceIdentifier("spiffe://noren/client/alpha")])
    with pytest.raises(ConfigError, match=r"alpha\.crt .*cannot be used to open connections: issue one with"):
        sign(folder, "alpha", names).check("client")


def test_read_identity_of_no_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"alpha\.crt is missing: make it with `noren keys issue alpha"):
        identity.read_identity(tmp_path / "alpha.crt")


def test_ensure(tmp_path: Path, ago) -> None:
    keys = tmp_path / "demo keys"
    with ago(31):
        ensure(keys, "alpha", "edge")
    authority = (keys / "ca.crt").read_bytes()
    expired = (keys / "alpha.crt").read_bytes()
    credentials = ensure(keys, "alpha", "edge")
    assert credentials.certificate.read_bytes() != expired
    kept = credentials.certificate.read_bytes()
    assert ensure(keys, "alpha", "edge") == credentials
    assert credentials.certificate.read_bytes() == kept
    ensure(keys, "alpha", "edge", hosts=("10.0.0.7",))
    assert credentials.certificate.read_bytes() != kept
    assert (keys / "ca.crt").read_bytes() == authority
    credentials.key.unlink()
    ensure(keys, "alpha", "edge", hosts=("10.0.0.7",))
    (keys / "ca.key").unlink()
    ensure(keys, "alpha", "edge", hosts=("10.0.0.7",))  # nothing to make
    with pytest.raises(ConfigError, match=r"not whole, ca\.key is missing"):
        ensure(keys, "beta", "client")


# Handshakes in which it is the client that refuses. For the server's refusals see test_identity_wire.py.


def assert_refused(port: int, credentials: grpc.ChannelCredentials, reason: str) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        ask(port, credentials)
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
    assert reason in caught.value.details()


def test_the_server_sees_who_asks(folder: Path) -> None:
    server, client, edge = (pair(folder, name, name) for name in ("server", "client", "edge"))
    with serving(server.server()) as port:
        assert ask(port, client.client()) == ["spiffe://noren/client/client"]
        assert "spiffe://noren/edge/edge" in ask(port, edge.client())
    with serving(edge.server()) as port:
        assert ask(port, client.client()) == ["spiffe://noren/client/client"]


def test_a_server_of_another_authority_is_refused(folder: Path, other: Path) -> None:
    client = pair(folder, "alpha", "client")
    issue(other, "beta", "server")
    with serving(raw_server(held(other, "beta", ca=folder))) as port:
        assert_refused(port, client.client(), "CERTIFICATE_VERIFY_FAILED")


def test_an_expired_server_is_refused(tmp_path: Path, ago) -> None:
    with ago(2):
        create_authority(tmp_path)
        old_server = pair(tmp_path, "old-server", "server", days=1)
    client = pair(tmp_path, "alpha", "client")
    with serving(raw_server(old_server)) as port:
        assert_refused(port, client.client(), "certificate has expired")


def test_a_client_in_the_place_of_a_server_is_refused(folder: Path) -> None:
    client = pair(folder, "alpha", "client")
    with serving(raw_server(client)) as port:
        assert_refused(port, client.client(), "unsupported certificate purpose")


def test_a_host_that_is_not_named_is_refused(folder: Path) -> None:
    server = pair(folder, "beta", "server", hosts=("gpu-1.example.org",))
    with serving(server.server()) as port:
        client = pair(folder, "alpha", "client")
        assert_refused(port, client.client(), "Hostname Verification")
        link = GrpcLink(f"localhost:{port}", client, greet=lambda: Message(Status()))
        with pytest.raises(LinkError, match="not made for this host name"):
            link.connect()
        link.close()


# The command line.


def noren_keys(*arguments: str) -> str:
    result = CliRunner().invoke(app, list(arguments), catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def test_commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert "keys/ca.key" in noren_keys("init")
    assert "spiffe://noren/client/alpha, valid for 7 days" in noren_keys("issue", "alpha", "--role", "client")
    noren_keys("issue", "beta", "--role", "server", "--host", "10.0.0.7", "--host", "gpu-1", "--days", "0.5")
    hosts = load(tmp_path / "keys/beta.crt").extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert hosts.get_values_for_type(x509.DNSName) == ["gpu-1"]
    assert [str(address) for address in hosts.get_values_for_type(x509.IPAddress)] == ["10.0.0.7"]
    rows = json.loads(noren_keys("list", "--json"))
    assert [(row["name"], row["role"], row["expired"]) for row in rows] == [
        ("alpha", "client", False),
        ("beta", "server", False),
    ]
    assert set(rows[0]) == {"name", "role", "not_after", "serial", "expired", "revoked"}
    table = noren_keys("list")
    assert "alpha" in table and rows[1]["serial"] in table


def test_commands_let_errors_through(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="noren keys init --dir"):
        noren_keys("issue", "alpha", "--role", "client", "--dir", str(tmp_path / "absent"))
    with pytest.raises(ConfigError, match="leave --host out"):
        noren_keys("issue", "alpha", "--role", "client", "--host", "localhost")
