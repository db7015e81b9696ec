"""What is revoked, by whom, and which lists a server believes."""

from __future__ import annotations

import json
import logging
import os
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from cryptography import x509

from noren.errors import ConfigError
from noren.wire.identity import (
    Revocations,
    create_authority,
    ensure,
    files,
    issue,
    keyring,
    listing,
    lists,
    revoke,
    roll_over,
)
from noren.wire.identity.record import RECORD, recorded
from test_identity import noren_keys
from tls import ago, held, pair, serial


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    create_authority(tmp_path / "keys")
    return tmp_path / "keys"


@pytest.fixture
def server(tmp_path: Path) -> Path:
    """The folder of a server's machine."""
    (tmp_path / "server").mkdir()
    return tmp_path / "server"


def copy(source: Path, target: Path, *names: str) -> None:
    """As an operator or a tool does it: beside, then renamed."""
    for name in names or ("ca.crt", "crl.pem"):
        shutil.copy(source / name, target / f".{name}")
        os.replace(target / f".{name}", target / name)


def replace(path: Path, content: bytes) -> None:
    beside = path.with_name(f".{path.name}")
    beside.write_bytes(content)
    os.replace(beside, path)


def hexadecimal(number: int) -> str:
    return f"{number:X}"


# Revoking.


def test_revoked_then_issued_again(folder: Path) -> None:
    first = serial(issue(folder, "alpha", "client"))
    second = serial(issue(folder, "alpha", "client"))
    other = serial(issue(folder, "beta", "client"))
    assert set(revoke(folder, "alpha")) == {hexadecimal(first), hexadecimal(second)}
    third = serial(issue(folder, "alpha", "client"))
    revocations = Revocations(folder / "ca.crt")
    assert [revocations.revoked(one) for one in (first, second, third, other)] == [True, True, False, False]
    assert held(folder, "alpha").check("client").name == "alpha"
    shown = {row.serial: (row.name, row.revoked, row.expired) for row in listing(folder)}
    assert shown == {
        hexadecimal(first): ("alpha", True, False),
        hexadecimal(second): ("alpha", True, False),
        hexadecimal(third): ("alpha", False, False),
        hexadecimal(other): ("beta", False, False),
    }
    assert revoke(folder, "alpha") == [hexadecimal(third)]
    before = (folder / "crl.pem").read_bytes()
    assert revoke(folder, "alpha") == []
    assert (folder / "crl.pem").read_bytes() == before


def test_what_has_expired_is_not_revoked(folder: Path, tmp_path: Path) -> None:
    with ago(2):
        create_authority(tmp_path / "old")
        gone = serial(issue(tmp_path / "old", "alpha", "client", days=1))
    now = serial(issue(tmp_path / "old", "alpha", "client"))
    assert revoke(tmp_path / "old", "alpha") == [hexadecimal(now)]
    assert hexadecimal(gone) not in {row.serial for row in listing(tmp_path / "old")}


def test_unknown_names(folder: Path) -> None:
    with pytest.raises(ConfigError, match="'alpha' has no certificate .*: it has issued to nobody yet"):
        revoke(folder, "alpha")
    issue(folder, "beta", "server")
    issue(folder, "gamma", "client")
    with pytest.raises(ConfigError, match="it has issued to beta, gamma$"):
        revoke(folder, "alpha")
    assert not (folder / "crl.pem").exists()
    with pytest.raises(ConfigError, match="no authority in .*absent"):
        revoke(folder / "absent", "alpha")
    assert not (folder / "absent").exists()


def test_the_list_is_one_that_openssl_reads(folder: Path) -> None:
    issue(folder, "alpha", "client")
    issue(folder, "beta", "client")
    revoke(folder, "alpha")
    authority = x509.load_pem_x509_certificate((folder / "ca.crt").read_bytes())
    crl = x509.load_pem_x509_crl((folder / "crl.pem").read_bytes())
    assert crl.is_signature_valid(authority.public_key())  # type: ignore[arg-type]
    assert crl.next_update_utc == authority.not_valid_after_utc
    assert crl.get_revoked_certificate_by_serial_number(serial(folder / "alpha.crt")) is not None
    if shutil.which("openssl") is None:
        return
    ca, revoked = ("-CAfile", folder / "ca.crt"), folder / "crl.pem"
    read = subprocess.run(["openssl", "crl", "-in", revoked, *ca, "-noout"], capture_output=True, text=True)
    assert read.returncode == 0 and "verify OK" in read.stderr + read.stdout
    for name, verdict in (("alpha", "certificate revoked"), ("beta", "OK")):
        command = ["openssl", "verify", "-crl_check", *ca, "-CRLfile", revoked, folder / f"{name}.crt"]
        checked = subprocess.run(command, capture_output=True, text=True)
        assert verdict in checked.stdout + checked.stderr


def test_numbers_grow(folder: Path) -> None:
    numbers = []
    for _ in range(3):
        issue(folder, "alpha", "client")
        revoke(folder, "alpha")
        crl = x509.load_pem_x509_crl((folder / "crl.pem").read_bytes())
        numbers.append(crl.extensions.get_extension_for_class(x509.CRLNumber).value.crl_number)
        assert len(crl) == len(numbers)
    assert numbers == [1, 2, 3]


def test_ensure_replaces_what_was_revoked(tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    before = serial(ensure(keys, "alpha", "client").certificate)
    revoke(keys, "alpha")
    after = serial(ensure(keys, "alpha", "client").certificate)
    assert after != before and not Revocations(keys / "ca.crt").revoked(after)
    assert serial(ensure(keys, "alpha", "client").certificate) == after


# The record.


def test_folders_from_before_the_record(folder: Path) -> None:
    first = serial(issue(folder, "alpha", "client"))
    (folder / RECORD).unlink()
    second = serial(issue(folder, "alpha", "client"))
    assert [row.serial for row in recorded(folder)] == [hexadecimal(first), hexadecimal(second)]
    (folder / RECORD).unlink()
    assert revoke(folder, "alpha") == [hexadecimal(second)]
    assert Revocations(folder / "ca.crt").revoked(second)


def test_the_record_tells_what_was_issued(folder: Path) -> None:
    issue(folder, "alpha", "client")
    before = (folder / RECORD).read_bytes()
    issue(folder, "beta", "edge")
    assert (folder / RECORD).read_bytes().startswith(before)
    row = json.loads((folder / RECORD).read_text().splitlines()[1])
    assert (row["name"], row["role"], int(row["serial"], 16)) == ("beta", "edge", serial(folder / "beta.crt"))
    assert row["not_after"].endswith("Z")


@pytest.mark.parametrize("damage", [b"{", b"\xff\n", b'{"name": "a"}\n', b"[]\n\n"])
def test_a_damaged_record_stops_everything(folder: Path, damage: bytes) -> None:
    issue(folder, "alpha", "client")
    with (folder / RECORD).open("ab") as file:
        file.write(damage)
    for act in (listing, lambda folder: issue(folder, "beta", "client"), lambda folder: revoke(folder, "alpha")):
        with pytest.raises(ConfigError, match=r"line 2 of .*issued\.jsonl is damaged .*put back a copy"):
            act(folder)
    assert not (folder / "beta.crt").exists()


def test_nothing_issued_goes_unrecorded(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whichever rename a crash comes after, a certificate that is there can be revoked."""
    rename = os.replace
    for last in range(4):
        done = 0

        def crash(source: str, target: Path, last: int = last) -> None:
            nonlocal done
            if done == last:
                raise OSError(5, "crash")
            done += 1
            rename(source, target)

        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", crash)
            if last < 3:
                with pytest.raises(ConfigError, match="crash"):
                    issue(folder, "alpha", "client")
            else:
                issue(folder, "alpha", "client")
        known = {row.serial for row in recorded(folder)}
        assert last == 0 or len(known) == last
        if (folder / "alpha.crt").exists():
            assert hexadecimal(serial(folder / "alpha.crt")) in known


def test_issuing_at_once_records_all(folder: Path) -> None:
    names = [f"party-{number}" for number in range(16)]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda name: issue(folder, name, "client"), names))
    assert {row.name for row in recorded(folder)} == set(names)


def test_a_folder_in_use(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "LOCK_SECONDS", 0.1)
    with (
        files.alone(folder),
        pytest.raises(ConfigError, match=r"another process has been writing in .*keys for 0\.1 s"),
    ):
        issue(folder, "alpha", "client")


# Which lists are believed.


def flipped(content: bytes) -> bytes:
    """One letter in the middle of the last block is another."""
    at = len(content) - 90
    while content[at : at + 1] in b"\n":
        at += 1
    return content[:at] + (b"A" if content[at : at + 1] != b"A" else b"B") + content[at + 1 :]


def other_list(tmp_path: Path, revoked: int) -> bytes:
    """The list of another authority of the same name, with a high number."""
    create_authority(tmp_path / "other")
    authority, _ = keyring.issuing(tmp_path / "other")
    entries = {authority.id: {revoked: authority.certificate.not_valid_before_utc}}
    return lists.signed_lists([authority], entries, number=99)


@pytest.mark.parametrize(
    "kind", ["missing", "tampered", "cut short", "empty", "junk", "more", "twice", "foreign", "older"]
)
def test_a_list_that_is_not_believed(
    folder: Path, server: Path, tmp_path: Path, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    alpha, beta = serial(issue(folder, "alpha", "client")), serial(issue(folder, "beta", "client"))
    revoke(folder, "alpha")
    older = (folder / "crl.pem").read_bytes()
    revoke(folder, "beta")
    copy(folder, server)
    revocations = Revocations(server / "ca.crt")
    good = (server / "crl.pem").read_bytes()
    path = server / "crl.pem"
    bad = {
        "missing": b"", "tampered": flipped(good), "cut short": good[: len(good) // 2], "empty": b"",
        "junk": b"\xff\x00", "more": good + b"-----BEGIN X509 CRL-----\n", "foreign": other_list(tmp_path, 5),
        "twice": good + older,
        "older": older,
    }[kind]  # fmt: skip
    with caplog.at_level(logging.ERROR, "noren.wire"):
        if kind == "missing":
            path.unlink()
        else:
            replace(path, bad)
        for _ in range(3):
            assert revocations.revoked(alpha) and revocations.revoked(beta) and not revocations.revoked(5)
    (line,) = caplog.records
    assert "revocations as before" in line.getMessage() and str(path) in line.getMessage()

    if kind not in ("missing", "older"):  # they may be all there is
        with pytest.raises(ConfigError, match=r"crl\.pem .*copy crl\.pem and ca\.crt from the authority's folder"):
            Revocations(server / "ca.crt")

    gamma = serial(issue(folder, "gamma", "client"))
    assert not revocations.revoked(gamma)
    revoke(folder, "gamma")
    copy(folder, server)
    assert revocations.revoked(gamma) and revocations.revoked(alpha)


def test_a_list_that_comes_later(folder: Path, server: Path) -> None:
    alpha = serial(issue(folder, "alpha", "client"))
    copy(folder, server, "ca.crt")
    revocations = Revocations(server / "ca.crt")
    assert not revocations.revoked(alpha)
    revoke(folder, "alpha")
    assert not revocations.revoked(alpha)
    copy(folder, server)
    assert revocations.revoked(alpha)


def test_no_list_is_read_twice(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    alpha = serial(issue(folder, "alpha", "client"))
    revoke(folder, "alpha")
    revocations = Revocations(folder / "ca.crt")
    monkeypatch.setattr(files, "read", lambda *_: pytest.fail("read again"))
    assert all(revocations.revoked(alpha) for _ in range(100))


def test_a_folder_with_a_damaged_list(folder: Path) -> None:
    issue(folder, "alpha", "client")
    revoke(folder, "alpha")
    replace(folder / "crl.pem", flipped((folder / "crl.pem").read_bytes()))
    before = (folder / "crl.pem").read_bytes()
    issue(folder, "alpha", "client")
    for act in (listing, roll_over, lambda folder: revoke(folder, "alpha")):
        with pytest.raises(ConfigError, match=r"crl\.pem"):
            act(folder)
    assert (folder / "crl.pem").read_bytes() == before


# Authorities in turn.


def test_each_authority_signs_its_own_list(folder: Path, server: Path) -> None:
    old = serial(issue(folder, "alpha", "client"))
    copy(folder, server, "ca.crt")
    revocations = Revocations(server / "ca.crt")
    roll_over(folder)
    new = serial(issue(folder, "alpha", "client"))
    assert set(revoke(folder, "alpha")) == {hexadecimal(old), hexadecimal(new)}
    assert (folder / "crl.pem").read_bytes().count(b"BEGIN X509 CRL") == 2
    copy(folder, server, "crl.pem")
    assert not revocations.revoked(old)  # signed by an authority of which the server has not heard
    copy(folder, server, "ca.crt")
    assert revocations.revoked(old) and revocations.revoked(new)
    for name in ("ca.crt", "crl.pem"):  # each list is of the authority whose certificates it names
        (folder / name).rename(folder / f"all-{name}")
    authorities = x509.load_pem_x509_certificates((folder / "all-ca.crt").read_bytes())
    for pem, ca, number in zip(
        (folder / "all-crl.pem").read_text().split("-----BEGIN")[1:], authorities, (new, old), strict=True
    ):
        crl = x509.load_pem_x509_crl(b"-----BEGIN" + pem.encode())
        assert crl.is_signature_valid(ca.public_key())  # type: ignore[arg-type]
        assert [entry.serial_number for entry in crl] == [number]


def test_a_list_of_one_authority_less_is_older(folder: Path, server: Path) -> None:
    issue(folder, "alpha", "client")
    roll_over(folder)
    issue(folder, "beta", "client")
    revoke(folder, "alpha")
    revoke(folder, "beta")
    copy(folder, server)
    revocations = Revocations(server / "ca.crt")
    first, second = (f"-----BEGIN{part}" for part in (folder / "crl.pem").read_text().split("-----BEGIN")[1:])
    for part in (first, second):
        replace(server / "crl.pem", part.encode())
        assert revocations.revoked(serial(folder / "alpha.crt")) and revocations.revoked(serial(folder / "beta.crt"))


def test_a_key_that_is_needed_for_its_list(folder: Path) -> None:
    issue(folder, "alpha", "client")
    roll_over(folder)
    old_key = (folder / "ca-old.key").rename(folder / "elsewhere")
    with pytest.raises(ConfigError, match=r"ca-old\.key lacks the key of an authority in ca\.crt .*put the key back"):
        revoke(folder, "alpha")
    assert not (folder / "crl.pem").exists()
    old_key.rename(folder / "ca-old.key")
    revoke(folder, "alpha")


def test_revocations_survive_two_roll_overs(folder: Path) -> None:
    alpha = serial(issue(folder, "alpha", "client"))
    revoke(folder, "alpha")
    watching = Revocations(folder / "ca.crt")
    for _ in range(2):
        roll_over(folder)
        assert watching.revoked(alpha) and Revocations(folder / "ca.crt").revoked(alpha)
    beta = serial(issue(folder, "beta", "client"))
    revoke(folder, "beta")
    assert watching.revoked(alpha) and watching.revoked(beta)


# The command line.


def test_commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    noren_keys("init")
    noren_keys("issue", "alpha", "--role", "client")
    first = hexadecimal(serial(tmp_path / "keys/alpha.crt"))
    told = noren_keys("revoke", "alpha")
    assert f"revoked {first} of alpha" in told and "keys/crl.pem: copy it beside ca.crt on each server" in told
    assert "nothing was changed" in noren_keys("revoke", "alpha")
    noren_keys("issue", "alpha", "--role", "client")
    rows = json.loads(noren_keys("list", "--json"))
    assert [row["revoked"] for row in rows] == [row["serial"] == first for row in rows]
    assert len(rows) == 2 and noren_keys("list").count("(revoked)") == 1
    assert "keys/ca-old.key" in noren_keys("roll")
    assert pair(tmp_path / "keys", "beta", "client").check("client").name == "beta"
    with pytest.raises(ConfigError, match="it has issued to alpha, beta"):
        noren_keys("revoke", "gamma")
