"""Where the journal's worker is killed: its system calls, and the folder that is looked at afterwards."""

from __future__ import annotations

import os
import random
import re
import shutil
import subprocess
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from crash_worker import commit, found
from noren.wire.journal import Journal

WORKER = Path(__file__).with_name("crash_worker.py")
CALLS = "write,pwrite64,fsync,fdatasync,rename,renameat2,unlink,ftruncate,openat,mkdir"
STEPS = 3


def worker(folder: Path, *more: str, steps: int = STEPS) -> list[str]:
    return [sys.executable, str(WORKER), str(folder), str(steps), *more]


def environment() -> dict[str, str]:
    """The same system calls in every run of the worker."""
    return os.environ | {"PYTHONHASHSEED": "0", "PYTHONDONTWRITEBYTECODE": "1"}


@dataclass(frozen=True)
class Call:
    """One system call of the worker on its folder, or on its standard output."""

    name: str
    nth: int  # of the calls of this name, from 1
    line: str  # as strace wrote it
    group: str  # calls that do the same: name, and what kind of file


def trace(folder: Path, log: Path, *options: str, stop: int = 0, steps: int = STEPS) -> tuple[int, int, str]:
    """Run the worker under strace; returns its status, the last step that it acknowledged, and what it said."""
    fast = [] if any("signal" in option for option in options) else ["--seccomp-bpf"]  # which injects no signals
    command = ["strace", "-f", *fast, "-y", "-s", "12", "-o", str(log), "-e", f"trace={CALLS}", *options]
    ran = subprocess.run(
        [*command, *worker(folder, str(stop), steps=steps)],
        capture_output=True,
        text=True,
        env=environment(),
        timeout=60,
    )
    return ran.returncode, last_acknowledged(ran.stdout), ran.stdout + ran.stderr


def last_acknowledged(said: str) -> int:
    return max((int(step) for step in re.findall(r"^ack (\d+)\n", said, re.MULTILINE)), default=0)


def calls(log: Path, folder: Path) -> Iterator[Call]:
    """Yield the calls in a trace that touch `folder` or its parent, and those that acknowledge."""
    seen: Counter[str] = Counter()
    home = str(folder.parent)
    for line in log.read_text(errors="replace").splitlines():
        match = re.match(r"\d+ +(\w+)\(", line)
        if match is None:
            continue
        name = match[1]
        seen[name] += 1
        if home in line:
            path = re.split('[">]', line.split(home, 1)[1])[0].removeprefix(f"/{folder.name}")
            kind = re.sub("/[0-9a-f]{2}(?=/|$)", "/xx", re.sub("[0-9a-f]{64}", "HASH", path))
            yield Call(name, seen[name], line, f"{name} {kind}")
        elif name == "write" and '"ack ' in line:
            yield Call(name, seen[name], line, "write acknowledgement")


def commits(points: list[Call]) -> list[Call]:
    """The fsyncs that make a step's transaction durable: the last of the log before a step is acknowledged."""
    found, last = [], None
    for call in points:
        if call.group == "fdatasync /journal.db-wal":
            last = call
        elif call.group == "write acknowledgement" and last is not None:
            found.append(last)
    return found


class Ground:
    """Where the worker runs: a fresh folder, or one in which a process was killed between commit and clean-up."""

    def __init__(self, tmp_path: Path, crashed: bool) -> None:
        self.folder, self.log = tmp_path / "work" / "journal", tmp_path / "log"
        self.template: Path | None = None
        self.reset()
        if crashed:
            status, _, said = trace(self.folder, self.log)
            assert status == 0, said
            unlink = next(call for call in calls(self.log, self.folder) if "unlink /objects" in call.group)
            self.reset()
            status, acked, said = trace(self.folder, self.log, *kill(unlink))
            assert (status, acked) == (-9, 1), said  # and step 2 is committed
            (self.folder / "objects" / "ab").mkdir(exist_ok=True)
            (self.folder / "objects" / "ab" / f"{'ab' * 32}.part").write_bytes(b"cut sho")
            self.template = tmp_path / "template"
            shutil.copytree(self.folder, self.template)
            self.reset()
        self.before, self.goal = (2, 2 + STEPS) if crashed else (0, STEPS)
        status, acked, said = self.run()
        assert (status, acked) == (0, self.goal), said
        self.points = list(calls(self.log, self.folder))

    def reset(self) -> None:
        shutil.rmtree(self.folder.parent, ignore_errors=True)
        self.folder.parent.mkdir()
        if self.template is not None:
            shutil.copytree(self.template, self.folder)

    def run(self, *options: str, stop: int = 0) -> tuple[int, int, str]:
        return trace(self.folder, self.log, *options, stop=stop, steps=self.goal)

    def check(self, acked: int, what: str) -> None:
        """Open what is left: it is the step acknowledged last or the next, whole, and nothing else is there."""
        acked = max(acked, self.before)
        try:
            with Journal(self.folder) as journal:
                step = found(journal)
                assert acked <= step <= acked + 1, f"step {step} is there, {acked} was acknowledged"
                assert_tidy(self.folder, step)
                commit(journal, step + 1)
                assert found(journal) == step + 1
        except Exception as error:
            raise AssertionError(f"after {what}: {error!r}") from error

    def sample(self, rng: random.Random, size: int) -> list[Call]:
        """The commits, and one call of each of `size` groups."""
        groups: defaultdict[str, list[Call]] = defaultdict(list)
        for call in self.points:
            groups[call.group].append(call)
        chosen = [rng.choice(groups[name]) for name in rng.sample(sorted(groups), size)]
        return list(dict.fromkeys([*commits(self.points), *chosen]))


def assert_tidy(folder: Path, step: int) -> None:
    objects = [path for path in (folder / "objects").rglob("*") if path.is_file()]
    assert len(objects) == (3 if step else 0), objects
    assert all(path.name.startswith(path.parent.name) and len(path.name) == 64 for path in objects)


def kill(call: Call) -> list[str]:
    return ["-e", f"inject={call.name}:signal=SIGKILL:when={call.nth}"]
