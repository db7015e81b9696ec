"""The journal under SIGKILL and failing disks: at every system call, and at any time."""

from __future__ import annotations

import random
import re
import shutil
import subprocess
import time
from pathlib import Path

import pytest

from crash_points import STEPS, Call, Ground, assert_tidy, commits, environment, kill, last_acknowledged, worker
from crash_worker import REFUSED, found
from noren.wire.journal import Journal

SEED = 20260

pytestmark = pytest.mark.usefixtures("strace")


@pytest.fixture(scope="module")
def strace() -> None:
    if shutil.which("strace") is None:
        pytest.skip("strace is not installed: crash points cannot be enumerated")
    tried = subprocess.run(["strace", "-f", "-o", "/dev/null", "true"], capture_output=True, text=True)
    if tried.returncode:
        pytest.skip(f"strace may not trace here: {tried.stderr.strip()[:200]}")


def kill_at(ground: Ground, points: list[Call]) -> None:
    for call in points:
        ground.reset()
        status, acked, said = ground.run(*kill(call))
        assert status == -9, f"not killed at {call.line}: {said}"
        ground.check(acked, f"SIGKILL at {call.line}")


def fail_at(ground: Ground, points: list[tuple[Call, str, int]]) -> int:
    """Let single calls fail; returns how often the journal refused."""
    refusals = 0
    for call, error, stop in points:
        ground.reset()
        inject = f"inject={call.name}:error={error}:when={call.nth}"
        status, acked, said = ground.run("-e", inject, stop=stop)
        what = f"{error} at {call.line}"
        refusals += "refused" in said
        if status == REFUSED and stop:
            ground.check(acked, what)
        else:
            assert (status, acked) == (0, ground.goal), f"{what}: {said}"
            ground.check(ground.goal, what)
    return refusals


@pytest.mark.parametrize("crashed", [False, True], ids=["fresh", "after a crash"])
def test_T4_crash_points(crashed: bool, tmp_path: Path) -> None:
    ground = Ground(tmp_path, crashed)
    points = ground.sample(random.Random(SEED), 12)
    assert len(commits(ground.points)) == STEPS
    kill_at(ground, points)
    print(f"seed {SEED}: {len(points)} of {len(ground.points)} crash points, 0 torn, 0 acknowledged steps lost")


@pytest.mark.nightly
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("crashed", [False, True], ids=["fresh", "after a crash"])
def test_T4_every_crash_point(crashed: bool, tmp_path: Path) -> None:
    ground = Ground(tmp_path, crashed)
    kill_at(ground, ground.points)
    for name, count in {call.name: call.nth for call in ground.points}.items():
        ground.reset()
        status, acked, said = ground.run("-e", f"inject={name}:signal=SIGKILL:when={count + 1}")
        assert (status, acked) == (0, ground.goal), f"there is a {name} beyond the last one: {said}"
    print(f"{len(ground.points)} crash points, all there are: 0 torn, 0 acknowledged steps lost")


def faults(points: list[Call]) -> list[tuple[Call, str, int]]:
    on_disk = [call for call in points if "acknowledgement" not in call.group]
    return [(call, error, stop) for call in on_disk for error in ("ENOSPC", "EIO") for stop in (0, 1)]


@pytest.mark.parametrize("crashed", [False, True], ids=["fresh", "after a crash"])
def test_T4_failing_disk(crashed: bool, tmp_path: Path) -> None:
    ground = Ground(tmp_path, crashed)
    rng = random.Random(SEED)
    chosen = [rng.choice(faults([call])) for call in ground.sample(rng, 12) if faults([call])]
    chosen += [(call, "EIO", 1) for call in commits(ground.points)]
    chosen += [(call, "EIO", 0) for call in ground.points if call.group == "openat /journal.db-wal"]
    refusals = fail_at(ground, chosen)
    assert refusals > len(chosen) // 3
    print(f"seed {SEED}: {len(chosen)} faults, {refusals} refusals, 0 torn")


def test_T4_two_faults(tmp_path: Path) -> None:
    """A commit fails and may be in the log all the same; the next try fails too, and then the process is killed."""
    ground = Ground(tmp_path, crashed=False)
    for commit in commits(ground.points):
        before = [call for call in ground.points[: ground.points.index(commit)] if call.name == "fsync"]
        ground.reset()
        first = f"inject=fdatasync:error=EIO:when={commit.nth}"
        second = f"inject=fsync:error=ENOSPC:when={before[-1].nth + 2}"
        status, acked, said = ground.run("-e", first, "-e", second, stop=2)
        assert status == REFUSED and said.split("\n")[-3:-1] == ["refused ModelError", "refused OverBudget"], said
        ground.check(acked, f"EIO at {commit.line}, then ENOSPC")


@pytest.mark.nightly
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("crashed", [False, True], ids=["fresh", "after a crash"])
def test_T4_every_failing_call(crashed: bool, tmp_path: Path) -> None:
    ground = Ground(tmp_path, crashed)
    chosen = faults(ground.points)
    print(f"{len(chosen)} faults, {fail_at(ground, chosen)} refusals, 0 torn")


def test_T4_full_disk_can_be_read(tmp_path: Path) -> None:
    """Every write fails from the start: what is there is found all the same, and nothing is acknowledged."""
    ground = Ground(tmp_path, crashed=True)
    ground.reset()
    inject = [f"inject={name}:error=ENOSPC:when=1+" for name in ("pwrite64", "ftruncate")]
    status, acked, said = ground.run(*[x for one in inject for x in ("-e", one)], stop=1)
    assert (status, acked, said.splitlines()) == (REFUSED, 0, ["found 2", "refused OverBudget"])
    ground.check(2, "a full disk")


@pytest.mark.parametrize("crashed", [False, True], ids=["fresh", "after a crash"])
def test_T4_order_of_syncs(crashed: bool, tmp_path: Path) -> None:
    """As a power cut sees it: a body and its name are durable before the pointer is written, that before it counts."""
    ground = Ground(tmp_path, crashed)
    log = str(ground.folder / "journal.db-wal")
    unsynced = {log} if crashed else set()  # files written and folders changed, and not fsynced since
    acknowledged = unlinked = 0
    for call in ground.points:
        paths = re.findall(rf"({re.escape(str(ground.folder.parent))}[^\">]*)[\">]", call.line)
        objects = {path for path in unsynced if "/objects" in path}
        if call.name in ("write", "pwrite64") and "acknowledgement" not in call.group:
            unsynced.add(paths[0])
            assert paths[0] != log or not objects, f"{call.line} points to what is not durable: {objects}"
        elif call.name in ("fsync", "fdatasync"):
            unsynced.discard(paths[0])
        elif call.name == "mkdir":
            unsynced.add(str(Path(paths[0]).parent))
        elif call.name == "rename":
            assert paths[0] not in unsynced, f"{call.line}: the body is not durable"
            unsynced.add(str(Path(paths[1]).parent))
        elif "acknowledgement" in call.group or (call.name == "unlink" and objects_of(call)):
            late = {path for path in unsynced if not path.endswith(("/lock", "/journal.db"))}
            assert not late, f"{call.line}: not durable: {late}"
            acknowledged += "acknowledgement" in call.group
            unlinked += call.name == "unlink"
    assert (acknowledged, unlinked) == (STEPS, 2 * STEPS + 3 if crashed else 2 * (STEPS - 1))


def objects_of(call: Call) -> bool:
    return "/objects/" in call.line


def random_kills(folder: Path, rounds: int) -> None:
    rng = random.Random(SEED)
    acked = opened = 0
    for _ in range(rounds):
        process = subprocess.Popen(
            worker(folder, steps=10**6), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment()
        )
        assert process.stdout is not None
        said = ""
        if rng.random() < 0.8:
            said = "".join(process.stdout.readline() for _ in range(rng.randint(1, 5)))  # so many commits, at least
            time.sleep(rng.uniform(0, 0.02))
        else:
            time.sleep(rng.uniform(0.1, 0.4))  # while it starts, opens and recovers
        process.kill()
        rest, complaint = process.communicate()
        assert process.returncode == -9 and not complaint, complaint
        acked = max(acked, last_acknowledged(said + rest))
        if rng.random() < 0.5:  # else the next worker finds it as it is
            opened += 1
            with Journal(folder) as journal:
                step = found(journal)
                assert acked <= step <= acked + 1, f"step {step} is there, {acked} was acknowledged"
                assert_tidy(folder, step)
                acked = step
    assert acked > rounds and opened
    print(f"seed {SEED}: {rounds} SIGKILLs over {acked} steps, 0 torn, 0 acknowledged steps lost")


def test_T4_random_kill(tmp_path: Path) -> None:
    random_kills(tmp_path / "journal", 20)


@pytest.mark.nightly
@pytest.mark.timeout(900)
def test_T4_random_kill_200(tmp_path: Path) -> None:
    random_kills(tmp_path / "journal", 200)
