"""The durable store of what counts once: after `write` returns, a crash or a power cut loses nothing of it.

    journal.db     SQLite (WAL, synchronous=FULL): keys, words, and pointers to bodies
    objects/ab/... bodies, named by their SHA-256: written aside, fsynced, renamed, and their folder fsynced, all
                   before the transaction that points to them commits
    lock           held by the one process that has the journal open

A write is one transaction: all of it or none, whatever happens. A body is removed only when no committed transaction
can need it: after the commit that dropped it, or at opening. Names of runs and keys are values in SQLite and never
part of a path. How old a run is, is told by the monotonic clock while the journal is open.
"""

from __future__ import annotations

import hashlib
import math
import os
import sqlite3
import threading
import time
from collections.abc import Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Self

import sqlalchemy as sa
from sqlalchemy.dialects.sqlite import insert

from noren.errors import ConfigError, ModelError, OverBudget
from noren.wire.objects import Objects, Parts, durable_sqlite, lock_file, make_folder, plain, size_of, sync

MAX_NAME = 300
MAX_WORDS = 1 << 20
FORMAT = 1
Body = bytes | memoryview | list[memoryview]

_TABLES = sa.MetaData()
_RUNS = sa.Table(
    "runs", _TABLES, sa.Column("run", sa.Text, primary_key=True), sa.Column("written", sa.Float, nullable=False)
)
_OBJECTS = sa.Table(
    "objects", _TABLES, sa.Column("digest", sa.Text, primary_key=True), sa.Column("size", sa.Integer, nullable=False)
)
_ENTRIES = sa.Table(
    "entries",
    _TABLES,
    sa.Column("run", sa.Text, sa.ForeignKey(_RUNS.c.run, ondelete="CASCADE"), primary_key=True),
    sa.Column("key", sa.Text, primary_key=True),
    sa.Column("words", sa.LargeBinary, nullable=False),
    sa.Column("digest", sa.Text, sa.ForeignKey(_OBJECTS.c.digest), index=True),
)
_EMPTY_RUNS = sa.delete(_RUNS).where(~sa.exists().where(_ENTRIES.c.run == _RUNS.c.run))
_NEEDLESS = sa.delete(_OBJECTS).where(~sa.exists().where(_ENTRIES.c.digest == _OBJECTS.c.digest))


@dataclass(frozen=True, slots=True)
class Record:
    """What is kept under a key: words (JSON, at most 1 MiB), and a body or none."""

    words: bytes
    body: bytes | None = None


@dataclass(frozen=True, slots=True)
class Draft:
    """A record to be written, whose body may be in pieces that are not copied together first."""

    words: bytes
    body: Body | None = None


@dataclass(frozen=True, slots=True)
class Change:
    """What becomes of a run's records. Drops come first: `drop_all` with `puts` replaces all that the run has."""

    puts: Mapping[str, Record | Draft]
    drop: Collection[str] = ()
    drop_all: bool = False


class Journal:
    """One folder of records, open in one process at a time. Thread-safe. A context manager."""

    def __init__(self, folder: Path, *, max_bytes: int = 8 << 30) -> None:
        """Open the journal in `folder`, which is made for this user only if it is not there.

        `max_bytes`: most bytes of bodies, of all runs together. Raises ConfigError if another process has it open,
        ModelError if what is there cannot be read as a journal, OverBudget if the disk is full.
        """
        if max_bytes <= 0:
            raise ConfigError(f"{folder}: a journal of at most {max_bytes} bytes can hold nothing; set a larger limit")
        self.folder, self.max_bytes = folder, max_bytes
        self._path = folder / "journal.db"
        self._lock = threading.RLock()
        self._strays: set[str] = set()  # objects of a commit that failed, and that a crash may yet bring to light
        self._written: dict[str, float] = {}  # when each run was last written, on this process's monotonic clock
        self._undo: ExitStack | None = None
        with ExitStack() as undo:
            with plain(folder):
                make_folder(folder)
                undo.callback(os.close, lock_file(folder / "lock"))
                self._objects = Objects(folder / "objects")
                os.close(os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600))
                sync(folder)
            with plain(self._path):
                connect = partial(durable_sqlite, self._path)
                engine = sa.create_engine("sqlite://", creator=connect, poolclass=sa.StaticPool, hide_parameters=True)
                # IMMEDIATE refuses a log that SQLite could open for reading only, and would go on with for good
                sa.event.listen(engine, "begin", lambda connection: connection.exec_driver_sql("BEGIN IMMEDIATE"))
                undo.callback(engine.dispose)
                self._db = undo.enter_context(engine.connect())
                self._prepare()
            self._undo = undo.pop_all()

    def _prepare(self) -> None:
        """Make the tables, learn the runs' ages, and remove the objects that nothing points to."""
        with self._db.begin():
            found = self._db.exec_driver_sql("PRAGMA user_version").scalar_one()
            if found not in (0, FORMAT):
                raise ModelError(f"{self._path} is of format {found}, this version reads {FORMAT}; update Noren")
            if found == 0:
                _TABLES.create_all(self._db)
                self._db.exec_driver_sql(f"PRAGMA user_version = {FORMAT}")
            now, instant = time.time(), time.monotonic()
            for run, written in self._db.execute(sa.select(_RUNS.c.run, _RUNS.c.written)).tuples():
                self._written[run] = instant - max(0.0, now - written)
            needed = set(self._db.scalars(sa.select(_OBJECTS.c.digest)))
            self._bytes = self._used()
        log = self._path.with_name(f"{self._path.name}-wal")
        if log.exists():  # what a crash left there must be on the disk before what it replaced goes
            sync(log)
        self._objects.keep_only(needed)

    def read(self, run: str, key: str) -> Record | None:
        """Return the record under `key`, or None. Raises ModelError if its body is missing or damaged."""
        query = (
            sa.select(_ENTRIES.c.words, _ENTRIES.c.digest, _OBJECTS.c.size)
            .join_from(_ENTRIES, _OBJECTS, isouter=True)
            .where(_ENTRIES.c.run == _name(run), _ENTRIES.c.key == _name(key))
        )
        with self._transaction():
            row = self._db.execute(query).one_or_none()
            if row is None or row.digest is None:
                return row and Record(row.words)
            handle = self._objects.open(row.digest)
        with handle:  # outside the lock: an object that is dropped meanwhile can still be read
            return Record(row.words, self._objects.verified(handle, row.digest, row.size))

    def keys(self, run: str) -> list[str]:
        """Return the keys of a run, sorted."""
        with self._transaction():
            query = sa.select(_ENTRIES.c.key).where(_ENTRIES.c.run == _name(run))
            return list(self._db.scalars(query.order_by(_ENTRIES.c.key)))

    def runs(self) -> list[str]:
        """Return the names of the runs that have a record, sorted."""
        with self._transaction():
            return list(self._db.scalars(sa.select(_RUNS.c.run).order_by(_RUNS.c.run)))

    @property
    def used(self) -> int:
        """Bytes of all bodies that are pointed to; equal bodies count once. Known without asking the disk."""
        return self._bytes

    def used_by(self, prefix: str) -> int:
        """Bytes of the bodies of all runs whose name begins so; a body that several point to counts for each."""
        rows = sa.select(sa.func.coalesce(sa.func.sum(_OBJECTS.c.size), 0)).select_from(
            _ENTRIES.join(_OBJECTS, _ENTRIES.c.digest == _OBJECTS.c.digest)
        )
        with self._transaction():
            return int(self._db.scalar(rows.where(_ENTRIES.c.run.startswith(prefix, autoescape=True))) or 0)

    def touched(self, run: str) -> float:
        """Return the seconds since a run was last written; infinity if there is no such run."""
        return time.monotonic() - self._written.get(run, -math.inf)

    def write(
        self, run: str, puts: Mapping[str, Record | Draft], drop: Collection[str] = (), drop_all: bool = False
    ) -> None:
        """Put and drop records of one run, as `write_all`."""
        self.write_all({run: Change(puts, drop, drop_all)})

    def write_all(self, changes: Mapping[str, Change]) -> None:
        """Change the records of some runs: all of it, or on any error nothing. Durable once it returns.

        A run without a record is no run. Raises OverBudget if the bodies would exceed `max_bytes` or the disk is full,
        ModelError if writing fails, ConfigError for a name that is no text of at most 300 characters.
        """
        rows: dict[str, list[dict[str, Any]]] = {}
        bodies: dict[str, Parts] = {}
        for run, change in changes.items():
            rows[run], more = _digested(_name(run), change.puts)
            bodies |= more
        dropped = {run: [{"dropped": _name(key)} for key in change.drop] for run, change in changes.items()}
        new: set[str] = set()
        committing = False
        with self._lock:
            try:
                with self._transaction():
                    for run, change in changes.items():
                        self._drop(run, dropped[run], change.drop_all)
                        self._touch(run)
                    new = self._add(bodies)
                    for run in changes:
                        self._point(rows[run])
                    needless = set(self._db.scalars(_NEEDLESS.returning(_OBJECTS.c.digest)))
                    empty = set(self._db.scalars(_EMPTY_RUNS.returning(_RUNS.c.run)))
                    after = self._within_budget()
                    self._objects.store(bodies, new)
                    needless |= self._strays - set(self._db.scalars(sa.select(_OBJECTS.c.digest)))
                    committing = True
            except BaseException:
                if committing:  # it may still be found in the log after a crash, and must find its objects then
                    self._strays |= new
                self._objects.remove(new - self._strays)
                raise
            self._bytes = after
            self._strays.clear()
            self._objects.remove(needless)
            self._written |= dict.fromkeys(changes, time.monotonic())
            for gone in empty:
                self._written.pop(gone, None)

    def rename(self, run: str, to: str) -> None:
        """Give a run's records another name, in place of what stands under that. All of it, or on any error nothing."""
        with self._transaction():
            self._db.execute(sa.delete(_RUNS).where(_RUNS.c.run == _name(to)))
            self._touch(to)
            self._db.execute(sa.update(_ENTRIES).where(_ENTRIES.c.run == _name(run)).values(run=to))
            self._db.execute(sa.delete(_RUNS).where(_RUNS.c.run == run))
            self._written.pop(run, None)
            self._written[to] = time.monotonic()

    def forget(self, run: str) -> None:
        """Drop all records of a run, and the run."""
        self.write(run, {}, drop_all=True)

    def _drop(self, run: str, dropped: list[dict[str, str]], drop_all: bool) -> None:
        statement = sa.delete(_ENTRIES).where(_ENTRIES.c.run == run)
        if drop_all:
            self._db.execute(statement)
        elif dropped:
            self._db.execute(statement.where(_ENTRIES.c.key == sa.bindparam("dropped")), dropped)

    def _touch(self, run: str) -> None:
        """Note a run as written now."""
        at: dict[str, Any] = {"written": time.time()}
        self._db.execute(insert(_RUNS).values(run=run, **at).on_conflict_do_update(set_=at))

    def _add(self, bodies: Mapping[str, Parts]) -> set[str]:
        """Note bodies; returns the digests of those that no row pointed to before."""
        sizes = [{"digest": digest, "size": size_of(parts)} for digest, parts in bodies.items()]
        adding = insert(_OBJECTS).on_conflict_do_nothing().returning(_OBJECTS.c.digest)
        return set(self._db.scalars(adding, sizes)) if sizes else set()

    def _point(self, rows: list[dict[str, Any]]) -> None:
        """Write rows, which point to bodies."""
        if rows:
            upsert = insert(_ENTRIES)
            later = {"words": upsert.excluded.words, "digest": upsert.excluded.digest}
            self._db.execute(upsert.on_conflict_do_update(set_=later), rows)

    def _used(self) -> int:
        return int(self._db.scalar(sa.select(sa.func.coalesce(sa.func.sum(_OBJECTS.c.size), 0))) or 0)

    def _within_budget(self) -> int:
        """Return the bytes of all bodies as they will be. Raises OverBudget."""
        after = self._used()
        if after > max(
            self.max_bytes, self._bytes
        ):  # what only shrinks is allowed, also under a limit that was lowered
            raise OverBudget(
                f"{self.folder}: the bodies of all runs would take {after} bytes, at most {self.max_bytes} may be kept;"
                " forget runs that have ended, or raise the limit"
            )
        return after

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        with self._lock, plain(self._path):
            if self._undo is None:
                raise ModelError(f"{self.folder}: the journal was closed; open it again")
            try:
                with self._db.begin():
                    yield
            except BaseException:
                with suppress(sqlite3.Error):  # a commit that failed may have left the transaction open
                    self._db.connection.rollback()
                raise

    def close(self) -> None:
        """Close the journal; a second time does nothing."""
        with self._lock, plain(self._path):
            undo, self._undo = self._undo, None
            if undo is not None:
                undo.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def _digested(run: str, puts: Mapping[str, Record | Draft]) -> tuple[list[dict[str, Any]], dict[str, Parts]]:
    """Return the rows to write, and the bodies they point to by their SHA-256."""
    rows: list[dict[str, Any]] = []
    bodies: dict[str, Parts] = {}
    for key, record in puts.items():
        if len(record.words) > MAX_WORDS:
            raise OverBudget(f"words of {len(record.words)} bytes; a record has at most {MAX_WORDS}, use a body")
        digest = None
        if record.body is not None:
            pieces = record.body if isinstance(record.body, list) else [memoryview(record.body)]
            parts = [piece.cast("B") for piece in pieces if piece.nbytes]
            hashed = hashlib.sha256()
            for part in parts:
                hashed.update(part)
            digest = hashed.hexdigest()
            bodies[digest] = parts
        rows.append({"run": run, "key": _name(key), "words": bytes(record.words), "digest": digest})
    return rows, bodies


def _name(text: str) -> str:
    """Return a run's or key's name, which may be any text: it is a value, never a path."""
    if not isinstance(text, str) or len(text) > MAX_NAME:
        raise ConfigError(f"{text!r:.80} is no name: it must be a text of at most {MAX_NAME} characters")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ConfigError(f"{text!r:.80} is no name: it holds half of a surrogate pair") from error
    return text
