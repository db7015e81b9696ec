"""Bodies on disk, each named by its SHA-256; and how files, their names and SQLite become durable."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import sqlite3
from collections.abc import Iterator, Mapping, Set
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from sqlalchemy.exc import DBAPIError

from noren.errors import ConfigError, ModelError, NorenError, OverBudget

PRAGMAS = {
    "busy_timeout": "5000",
    "locking_mode": "exclusive",  # no shared-memory file: this process is alone anyway
    "journal_mode": "wal",
    "synchronous": "full",
    "foreign_keys": "on",
    "journal_size_limit": str(16 << 20),
}

Parts = list[memoryview]
"""A body in pieces of bytes."""


class Objects:
    """The folder of bodies. A body's path comes from its hash alone."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._suspects: set[str] = set()  # found damaged: written again when the same body comes
        self._named: set[Path] = set()  # folders whose own name was made durable by this process
        root.mkdir(mode=0o700, exist_ok=True)

    def path(self, digest: str) -> Path:
        """Where a body is, or would be."""
        return self._root / digest[:2] / digest

    def store(self, bodies: Mapping[str, Parts], new: Set[str]) -> None:
        """Write the bodies that are new, missing or damaged; durable on return."""
        folders: set[Path] = set()
        for digest, parts in bodies.items():
            path = self.path(digest)
            with plain(path):
                if digest not in new and self._seems_whole(path, size_of(parts)):
                    continue
                path.parent.mkdir(mode=0o700, exist_ok=True)
                _write_aside(path, parts)
            folders.add(path.parent)
            self._suspects.discard(digest)
        for folder in {self._root, *folders} if folders - self._named else folders:
            with plain(folder):
                sync(folder)
        self._named |= folders

    def _seems_whole(self, path: Path, size: int) -> bool:
        return path.name not in self._suspects and path.is_file() and path.stat().st_size == size

    def open(self, digest: str) -> BinaryIO:
        """Return an object opened for reading. Raises ModelError if it is not there."""
        path = self.path(digest)
        try:
            return os.fdopen(os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW), "rb")
        except OSError as error:
            self._suspects.add(digest)
            raise told(path, error) from error

    def verified(self, handle: BinaryIO, digest: str, size: int) -> bytes:
        """Return what is in an open object. Raises ModelError if it is not what was written."""
        path = self.path(digest)
        with plain(path):
            found = os.fstat(handle.fileno()).st_size
            body = handle.read(size) if found == size else b""
        if found != size or hashlib.sha256(body).hexdigest() != digest:
            self._suspects.add(digest)
            raise ModelError(f"{path} is damaged ({found} bytes, {size} were written); restore it, or drop its record")
        return body

    def remove(self, digests: Set[str]) -> None:
        """Remove bodies as far as possible: what stays behind goes at the next opening."""
        for digest in digests:
            with suppress(OSError):
                self.path(digest).unlink()

    def keep_only(self, needed: Set[str]) -> None:
        """Remove all files that are none of the bodies needed."""
        with plain(self._root):
            for path in self._root.glob("*/*"):
                if path.name not in needed:
                    with suppress(OSError):
                        path.unlink()


def _write_aside(path: Path, parts: Parts) -> None:
    """Write a file that appears whole or not at all; its folder is still to be fsynced."""
    draft = path.with_name(f"{path.name}.part")
    try:
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW
        with os.fdopen(os.open(draft, flags, 0o600), "wb") as handle:
            for part in parts:
                handle.write(part)
            handle.flush()
            os.fsync(handle.fileno())
        os.replace(draft, path)
    except BaseException:
        with suppress(OSError):
            draft.unlink()
        raise


def sync(path: Path) -> None:
    """Make a file's contents, or the names in a folder, durable."""
    handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def plain(path: Path) -> Iterator[None]:
    """Raise what the system or SQLite has against `path` as an error of ours."""
    try:
        yield
    except (OSError, sqlite3.Error, DBAPIError) as error:
        raise told(path, error) from error


def told(path: Path, error: Exception) -> NorenError:
    """Return OverBudget if an error says that the disk is full, else ModelError."""
    cause = error.orig if isinstance(error, DBAPIError) else error
    full = isinstance(cause, OSError) and cause.errno in (errno.ENOSPC, errno.EDQUOT)
    if full or getattr(cause, "sqlite_errorcode", None) == sqlite3.SQLITE_FULL:
        return OverBudget(f"{path} cannot be written, the disk is full ({cause}); free some space, then try again")
    return ModelError(f"{path} cannot be read or written ({cause}); check the disk and the rights on this folder")


def size_of(parts: Parts) -> int:
    """Bytes of a body."""
    return sum(part.nbytes for part in parts)


def make_folder(folder: Path) -> None:
    """Make a folder, for this user only, and its name durable."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    for path in {folder, *missing}:
        with suppress(PermissionError):  # a parent that was there before, and that this user may not list
            sync(path.parent)


def lock_file(path: Path) -> int:
    """Return the descriptor that keeps other processes out, until it is closed. Raises ConfigError if one is in."""
    handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        with suppress(OSError):  # a full disk shall not keep anybody from reading
            os.ftruncate(handle, 0)
            os.write(handle, b"%d\n" % os.getpid())
    except BlockingIOError as error:
        holder = os.read(handle, 20).decode(errors="replace").strip() or "unknown"
        os.close(handle)
        raise ConfigError(
            f"{path.parent}: this journal is open in process {holder}; end it, or give this party a folder of its own"
        ) from error
    except BaseException:
        os.close(handle)
        raise
    return handle


def durable_sqlite(path: Path) -> sqlite3.Connection:
    """Return a connection on which what was committed is on the disk."""
    connection = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
    try:
        for name, value in PRAGMAS.items():
            connection.execute(f"PRAGMA {name} = {value}").fetchall()
        (mode,) = connection.execute("PRAGMA journal_mode").fetchone()
        if mode != "wal":
            raise sqlite3.OperationalError(f"the file system allows no write-ahead log (journal mode {mode})")
    except BaseException:
        connection.close()
        raise
    return connection
