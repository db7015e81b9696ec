"""Revoke: name the certificates that no longer count, and know which they are while connections are open."""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence
from pathlib import Path

import noren.wire.identity.clock as clock
import noren.wire.identity.files as files
from noren.errors import ConfigError
from noren.wire.identity.certificates import key_id
from noren.wire.identity.keyring import Authority, earlier, issuing, require_authority, trusted
from noren.wire.identity.lists import CRL, Lists, check_not_older, read_lists, signed_lists
from noren.wire.identity.record import all_rows

log = logging.getLogger("noren.wire")


def revoke(folder: Path, name: str) -> list[str]:
    """Revoke every certificate ever issued to `name` that has not expired; return their serials, in hexadecimal.

    Those that were revoked before are not named again. The list, `crl.pem`, is replaced whole; servers follow it once
    it lies beside their `ca.crt`. A certificate that is issued to the name afterwards is valid.

    Raises ConfigError if there is no authority, it has issued nothing to the name, or `crl.pem` is damaged.
    """
    require_authority(folder, "ca.crt", "ca.key")
    with files.alone(folder):
        current, _ = issuing(folder)
        authorities = [current, *earlier(folder)]
        trusted_ids = {key_id(one) for one in trusted(folder)}
        rows = all_rows(folder)
        if name not in {row.name for row in rows}:
            known = ", ".join(sorted({row.name for row in rows})) or "nobody yet"
            raise ConfigError(f"{name!r} has no certificate of the authority in {folder}: it has issued to {known}")
        now = clock.now()
        lists = lists_in(folder)
        valid = [row for row in rows if row.name == name and row.not_after > now and row.issuer in trusted_ids]
        fresh = [row for row in valid if int(row.serial, 16) not in lists.serials]
        if fresh:
            entries = {authority: dict(known) for authority, known in lists.entries.items()}
            for row in fresh:
                entries.setdefault(row.issuer, {})[int(row.serial, 16)] = now
            files.write(list_file(folder, authorities, Lists(lists.numbers, entries)))
    return [row.serial for row in fresh]


def lists_in(folder: Path) -> Lists:
    """Return what the authority in `folder` has revoked. Raises ConfigError if its `crl.pem` is damaged."""
    path = folder / CRL
    return read_lists(path, trusted(folder)) if path.exists() else Lists()


def list_file(folder: Path, authorities: Sequence[Authority], lists: Lists) -> dict[Path, tuple[bytes, int]]:
    """Return the next `crl.pem`, with the entries of `lists`, as `files.write` takes it.

    Raises ConfigError if the key of an authority that is still trusted and has entries is not among `authorities`.
    """
    held = {authority.id for authority in authorities}
    for one in trusted(folder):
        if key_id(one) not in held and one.not_valid_after_utc > clock.now() and lists.entries.get(key_id(one)):
            raise ConfigError(
                f"{folder / 'ca-old.key'} lacks the key of an authority in ca.crt (key id {key_id(one)}), which must "
                "sign its list of revoked certificates: put the key back, or take that authority out of every ca.crt"
            )
    number = max(lists.numbers.values(), default=0) + 1
    return {folder / CRL: (signed_lists(authorities, lists.entries, number), 0o644)}


class Revocations:
    """Which certificates are revoked: the `crl.pem` beside a `ca.crt`, as it is now. Thread-safe.

    The file is read again when it or `ca.crt` changes. One that is damaged, signed by nobody in `ca.crt`, older than
    the one in force, or gone is not used: what was revoked stays revoked, and an error is logged once.
    """

    def __init__(self, ca: Path) -> None:
        """Read the list beside `ca`; without one nothing is revoked.

        Raises ConfigError if there is one that cannot be used.
        """
        self._ca, self._path = ca, ca.with_name(CRL)
        self._lock = threading.Lock()
        self._complaint = ""
        self._seen = files.signature(self._path, self._ca)
        self._lists = Lists() if not self._seen[0] else self._read(Lists())
        self._serials = self._lists.serials

    def revoked(self, serial: int) -> bool:
        """Say whether the certificate with that serial is revoked now."""
        with self._lock:
            self._look()
            return serial in self._serials

    def _look(self) -> None:
        found = files.signature(self._path, self._ca)
        if found == self._seen:
            return
        self._seen = found
        if not found[0] and not self._lists.numbers:
            return
        try:
            self._lists = self._read(self._lists)
        except ConfigError as error:
            if str(error) != self._complaint:
                log.error("revocations as before: %s", error)
            self._complaint = str(error)
            return
        self._complaint = ""
        self._serials = self._lists.serials
        log.info("revocations read again: %d certificates are revoked", len(self._serials))

    def _read(self, last: Lists) -> Lists:
        pem = files.read(self._ca, "authority's certificate", "put it back")
        authorities = files.certificates(self._ca, pem, "put it back")
        lists = read_lists(self._path, authorities)
        check_not_older(self._path, lists, last, authorities)
        return lists
