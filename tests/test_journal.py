"""The journal: what is kept, what is refused, and that no name becomes a path."""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import sqlite3
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from sqlalchemy import event

from noren.errors import ConfigError, ModelError, OverBudget
from noren.wire import objects
from noren.wire.journal import Draft, Journal, Record


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "state" / "journal"


@pytest.fixture
def journal(folder: Path) -> Iterator[Journal]:
    with Journal(folder, max_bytes=10_000) as opened:
        yield opened


def object_files(folder: Path) -> list[Path]:
    return [path for path in (folder / "objects").rglob("*") if path.is_file()]


def object_of(folder: Path, body: bytes) -> Path:
    digest = hashlib.sha256(body).hexdigest()
    return folder / "objects" / digest[:2] / digest


def test_what_is_written_is_read_also_by_the_next_process(journal: Journal, folder: Path) -> None:
    puts: dict[str, Record | Draft] = {
        "words only": Record(b'{"n": 1}'),
        "empty body": Record(b"{}", b""),
        "body": Record(b"{}", b"abc"),
        "pieces": Draft(b"{}", [memoryview(b"ab"), memoryview(b""), memoryview(bytearray(b"cd")).cast("B")]),
        "view": Draft(b"{}", memoryview(b"wxyz").cast("H")),
    }
    journal.write("run", puts)
    assert journal.read("run", "nothing") is None and journal.read("other", "body") is None
    for turn in range(2):
        assert journal.keys("run") == sorted(puts) and journal.runs() == ["run"]
        assert journal.read("run", "words only") == Record(b'{"n": 1}', None)
        assert journal.read("run", "empty body") == Record(b"{}", b"")
        assert journal.read("run", "pieces") == Record(b"{}", b"abcd")
        assert journal.read("run", "view") == Record(b"{}", b"wxyz")
        assert journal.used == 11
        if turn == 0:
            journal.close()
            journal = Journal(folder)
    journal.close()
    journal.close()
    with pytest.raises(ModelError, match="was closed"):
        journal.read("run", "body")


def test_puts_and_drops_are_one(journal: Journal, folder: Path) -> None:
    journal.write("run", {"a": Record(b"1", b"A"), "b": Record(b"2", b"B")})
    journal.write("other", {"a": Record(b"3", b"C")})
    journal.write("run", {"b": Record(b"4", b"D"), "c": Record(b"5")}, drop=["a", "b", "never there"])
    assert journal.keys("run") == ["b", "c"] and journal.read("run", "b") == Record(b"4", b"D")
    journal.write("run", {"z": Record(b"6", b"E")}, drop_all=True)
    assert journal.keys("run") == ["z"] and journal.read("other", "a") == Record(b"3", b"C")
    assert sorted(path.read_bytes() for path in object_files(folder)) == [b"C", b"E"]
    journal.write("run", {}, drop=["z"])
    assert journal.runs() == ["other"]


def test_forget(journal: Journal, folder: Path) -> None:
    journal.write("run", {"a": Record(b"1", b"mine"), "b": Record(b"2", b"shared")})
    journal.write("other", {"a": Record(b"3", b"shared")})
    journal.forget("run")
    journal.forget("never there")
    assert journal.runs() == ["other"] and journal.keys("run") == [] and journal.touched("run") == math.inf
    assert journal.read("other", "a") == Record(b"3", b"shared")
    assert object_files(folder) == [object_of(folder, b"shared")] and journal.used == 6


def test_equal_bodies_are_written_once(journal: Journal, folder: Path) -> None:
    journal.write("run", {"a": Record(b"1", b"same"), "b": Record(b"2", b"same")})
    before = object_of(folder, b"same").stat()
    journal.write("other", {"a": Record(b"3", b"same")})
    journal.write("run", {"a": Record(b"4", b"same")}, drop_all=True)
    after = object_of(folder, b"same").stat()
    assert (before.st_ino, before.st_mtime_ns) == (after.st_ino, after.st_mtime_ns)
    assert journal.used == 4 and len(object_files(folder)) == 1


def test_budget(journal: Journal, folder: Path) -> None:
    journal.write("run", {"a": Record(b"1", bytes(6_000))})
    with pytest.raises(OverBudget, match=r"would take 10001 bytes, at most 10000"):
        journal.write("other", {"a": Record(b"2", b"x" * 4_001)}, drop=["b"])
    assert journal.runs() == ["run"] and journal.used == 6_000 and len(object_files(folder)) == 1
    journal.write("other", {"a": Record(b"2", b"x" * 4_000)})
    journal.write("run", {"a": Record(b"3", b"y" * 6_000)})  # what it replaces does not count
    with pytest.raises(OverBudget, match="words of"):
        journal.write("run", {"a": Record(bytes((1 << 20) + 1))})
    journal.close()
    with Journal(folder, max_bytes=100) as smaller:  # what is there can be read and dropped
        smaller.write("run", {}, drop=["a"])
        assert smaller.used == 4_000
        with pytest.raises(OverBudget):
            smaller.write("other", {"b": Record(b"4", b"z")})
    with pytest.raises(ConfigError, match="at most 0 bytes"):
        Journal(folder, max_bytes=0)


def test_how_much_is_used_is_known_without_asking(journal: Journal, folder: Path) -> None:
    """Whoever asks often costs the disk nothing, and nobody waits for a write that is under way."""
    asked: list[str] = []
    event.listen(journal._db.engine, "before_cursor_execute", lambda *given: asked.append(given[2]))
    sizes = [journal.used]
    with ThreadPoolExecutor(1) as pool, journal._lock:
        assert pool.submit(lambda: journal.used).result(5) == 0
    assert asked == []
    journal.write("run", {"a": Record(b"1", b"four"), "b": Record(b"1", b"four"), "c": Record(b"1", b"seven..")})
    sizes.append(journal.used)
    with pytest.raises(OverBudget):
        journal.write("run", {"d": Record(b"1", bytes(10_001))}, drop=["a", "b"])
    sizes.append(journal.used)
    journal.write("run", {}, drop=["a", "b"])
    sizes.append(journal.used)
    journal.close()
    with Journal(folder) as again:
        sizes.append(again.used)
        again.forget("run")
        sizes.append(again.used)
    assert sizes == [0, 11, 11, 7, 7, 0]


def test_a_second_opener_is_refused(journal: Journal, folder: Path) -> None:
    code = "import sys; from pathlib import Path; from noren.wire.journal import Journal; Journal(Path(sys.argv[1]))"
    tried = subprocess.run([sys.executable, "-c", code, str(folder)], capture_output=True, text=True)
    assert "ConfigError" in tried.stderr and f"{folder}: this journal is open in process {os.getpid()}" in tried.stderr
    with pytest.raises(ConfigError, match=f"process {os.getpid()}"):
        Journal(folder)
    journal.close()
    Journal(folder).close()


def test_the_folder_is_for_this_user_only(journal: Journal, folder: Path) -> None:
    journal.write("run", {"a": Record(b"1", b"A")})
    paths = [folder, *folder.rglob("*")]
    assert len(paths) == 7 and {stat.S_IMODE(path.stat().st_mode) & 0o077 for path in paths} == {0}


@pytest.mark.parametrize("how", ["flipped", "cut", "longer", "missing", "a link"])
def test_a_damaged_object_is_named(how: str, journal: Journal, folder: Path, tmp_path: Path) -> None:
    body = b"what was written"
    journal.write("run", {"a": Record(b"1", body), "b": Record(b"2", b"whole")})
    path = object_of(folder, body)
    if how in ("missing", "a link"):
        path.unlink()
    if how == "a link":
        (tmp_path / "elsewhere").write_bytes(body)
        path.symlink_to(tmp_path / "elsewhere")
    elif how != "missing":
        path.write_bytes({"flipped": b"What was written", "cut": body[:-1], "longer": body + b"!"}[how])
    with pytest.raises(ModelError, match=str(path)):
        journal.read("run", "a")
    assert journal.read("run", "b") == Record(b"2", b"whole")
    journal.write("run", {"c": Record(b"3", body)})  # whoever brings the same bytes mends it
    assert journal.read("run", "a") == Record(b"1", body) and not path.is_symlink()


def test_no_journal(folder: Path) -> None:
    folder.mkdir(parents=True)
    (folder / "journal.db").write_bytes(b"something else" * 100)
    for _ in range(2):  # a failed opening leaves no lock
        with pytest.raises(ModelError, match=r"journal\.db"):
            Journal(folder)
    (folder / "journal.db").unlink()
    (folder / "objects").rmdir()
    (folder / "objects").write_bytes(b"")
    with pytest.raises(ModelError, match="objects"):
        Journal(folder)


def test_a_later_format_is_refused(folder: Path) -> None:
    Journal(folder).close()
    later = sqlite3.connect(folder / "journal.db")
    later.execute("PRAGMA user_version = 99")
    later.close()
    with pytest.raises(ModelError, match="format 99, this version reads 1"):
        Journal(folder)


def test_objects_without_a_pointer_go_at_opening(folder: Path) -> None:
    with Journal(folder) as journal:
        journal.write("run", {"a": Record(b"1", b"needed")})
    stray, draft = object_of(folder, b"stray"), object_of(folder, b"needed").with_suffix(".part")
    stray.parent.mkdir()
    stray.write_bytes(b"stray")
    draft.write_bytes(b"need")
    with Journal(folder) as journal:
        assert object_files(folder) == [object_of(folder, b"needed")]
        assert journal.read("run", "a") == Record(b"1", b"needed")


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EIO])
def test_a_failed_write_changes_nothing(
    code: int, journal: Journal, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    journal.write("run", {"a": Record(b"1", b"old")})
    fsync, left = os.fsync, [1]

    def fail(handle: int) -> None:
        if not left:
            raise OSError(code, os.strerror(code))
        fsync(handle)
        left.pop()

    with monkeypatch.context() as patch:
        patch.setattr(objects.os, "fsync", fail)
        with pytest.raises(ModelError if code == errno.EIO else OverBudget, match=str(object_of(folder, b"newer"))):
            journal.write("run", {"a": Record(b"2", b"new"), "b": Record(b"2", b"newer")})
        assert journal.keys("run") == ["a"]
        assert journal.read("run", "a") == Record(b"1", b"old")
        assert object_files(folder) == [object_of(folder, b"old")]
    journal.write("run", {"a": Record(b"2", b"new")})
    assert journal.read("run", "a") == Record(b"2", b"new")


def test_a_failed_commit_keeps_its_objects_until_the_next(journal: Journal, folder: Path) -> None:
    """It may be in the log, and found there after a crash: only a later commit makes sure that it never will."""

    def fail(connection: object) -> None:
        raise sqlite3.OperationalError("disk I/O error")

    journal.write("run", {"a": Record(b"1", b"old")})
    event.listen(journal._db.engine, "commit", fail)
    for _ in range(2):
        with pytest.raises(ModelError, match=r"journal\.db.*disk I/O error"):
            journal.write("run", {"a": Record(b"2", b"new")})
    event.remove(journal._db.engine, "commit", fail)
    with pytest.raises(OverBudget):
        journal.write("run", {"a": Record(b"3", b"new"), "b": Record(b"3", bytes(10_001))})
    assert journal.read("run", "a") == Record(b"1", b"old") and journal.keys("run") == ["a"]
    assert set(object_files(folder)) == {object_of(folder, b"old"), object_of(folder, b"new")}
    journal.write("run", {"a": Record(b"4", b"newer")})
    assert object_files(folder) == [object_of(folder, b"newer")]


def test_how_long_ago(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The wall clock counts only while the journal is closed, and then not backwards."""
    with Journal(folder) as journal:
        journal.write("run", {"a": Record(b"1")})
        assert 0 <= journal.touched("run") < 5
        monkeypatch.setattr(time, "time", lambda at=time.time: at() + 600)
        assert journal.touched("run") < 5
        assert journal.touched("never there") == math.inf
    with Journal(folder) as journal:
        assert 600 <= journal.touched("run") < 605
    monkeypatch.setattr(time, "time", lambda: 0.0)
    with Journal(folder) as journal:
        assert 0 <= journal.touched("run") < 5


def test_four_threads(folder: Path) -> None:
    steps, problems = 15, []

    def work(name: str) -> None:
        try:
            for step in range(1, steps + 1):
                body = f"{name} {step}".encode() * 500
                journal.write(name, {"at": Record(str(step).encode(), body), "all": Record(b"{}", b"common" * 100)})
                seen = journal.read(name, "at")
                assert seen == Record(str(step).encode(), body), f"{name} {step}"
                for other in names:  # of others, any step, but a whole one
                    record = journal.read(other, "at")
                    assert record is None or record.body == f"{other} {json.loads(record.words)}".encode() * 500
        except BaseException as error:
            problems.append(error)

    names = [f"run {i}" for i in range(4)]
    with Journal(folder) as journal:
        threads = [threading.Thread(target=work, args=(name,)) for name in names]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert not problems and journal.runs() == names
        assert journal.used == 600 + sum(500 * len(f"{name} {steps}") for name in names)
        assert len(object_files(folder)) == 5
