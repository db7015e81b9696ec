"""Training runs over real processes, some of which are killed at moments that a seed draws; and what they have left.

A run is one server, perhaps an edge before it, and one client or several, each a process of its own that keeps a
journal. A kill is one SIGKILL: some time after a step that the clients have told of ("any time"), as soon as the
journal's log grows ("log grows"), at the entry of a system call that writes to disk ("call", by strace), or while the
process that was killed last starts again ("starting").
"""

from __future__ import annotations

import json
import random
import re
import shutil
import sqlite3
import subprocess
import time
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from noren.config import Document
from noren.embedded import MODEL_DIR
from noren.embedded.notes import notes
from noren.wire.identity import ensure
from noren.wire.journal import Journal
from test_kill import free_port
from zygote import Child, Zygote

PATIENCE = 90.0
"""Seconds without a step after which something hangs."""
CALLS = {"pwrite64": 16, "fdatasync": 3, "fsync": 4, "rename": 2, "unlink": 2}
"""System calls of the journal and of checkpoints: which of a thread's next calls is the last, at most."""
STEP = "json_extract(CAST(NEW.words AS TEXT), '$.step')"
LOOP_STEP = "json_extract(CAST(NEW.words AS TEXT), '$.loop.step')"
BEGUN = "(SELECT json_extract(CAST(words AS TEXT), '$.incarnation') FROM entries WHERE run = NEW.run AND key = 'run')"
NOTED = f"coalesce({BEGUN}, ''), coalesce({STEP}, {LOOP_STEP})"
AUDIT = "CREATE TABLE kept_steps (number INTEGER PRIMARY KEY, run TEXT, incarnation TEXT, step INTEGER);" + "".join(
    f"""
    CREATE TRIGGER audit_{event} AFTER {event} ON entries WHEN NEW.key = 'state'
    BEGIN INSERT INTO kept_steps (run, incarnation, step) VALUES (NEW.run, {NOTED}); END;"""
    for event in ("insert", "update")
)
"""Notes each state that a journal keeps, with its step, in the transaction that keeps it: what was committed, and only
that, is in the list, however often the process dies."""


@dataclass(frozen=True)
class Kill:
    """One SIGKILL that is to come."""

    victim: str
    step: int  # that was told before it
    moment: str
    seconds: float = 0.0  # "any time", "starting": after that step, or the start
    call: str = ""  # "call": which
    nth: int = 0  # "call": of the calls of a thread from then on

    def __str__(self) -> str:
        after = f" {self.call} {self.nth}" if self.call else f" +{self.seconds:.3f} s" if self.seconds else ""
        return self.moment + after


@cache
def can_trace() -> bool:
    """Whether strace is there, and may trace."""
    if shutil.which("strace") is None:
        return False
    return subprocess.run(["strace", "-f", "-o", "/dev/null", "true"], capture_output=True).returncode == 0


def plan(seed: int, kills: int, victims: list[str], steps: int) -> list[Kill]:
    """Draw kills over a whole run, in order."""
    draw, out = random.Random(seed), list[Kill]()
    for number, step in enumerate(sorted(draw.choices(range(steps), k=kills))):
        victim, moment = draw.choice(victims), draw.choices(["any time", "log grows", "call"], [4, 2, 4])[0]
        seconds, call = draw.uniform(0.0, 0.3), draw.choice(sorted(CALLS))
        nth = draw.randint(1, CALLS[call])
        if number and draw.random() < 0.15:
            out.append(Kill(out[-1].victim, out[-1].step, "starting", draw.uniform(0.0, 0.9)))
        elif moment == "call" and can_trace():
            out.append(Kill(victim, step, moment, 0.0, call, nth))
        elif moment == "any time":
            out.append(Kill(victim, step, moment, seconds))
        else:
            out.append(Kill(victim, step, "log grows"))
    return out


@dataclass(frozen=True)
class Left:
    """What a run has left: of each client the adapters of all parties, its state, and its losses."""

    adapters: dict[str, dict[str, bytes]]  # client -> file of its adapter folder -> content
    states: dict[str, dict[str, Tensor]]  # client -> checkpoint: adapters, moments, random numbers
    metrics: dict[str, list[tuple[int, str, float]]]  # client -> step, what, value
    kept: dict[tuple[str, str], list[list[int]]]  # party, run -> of each life of the run, the steps that were kept


@dataclass
class Runs:
    """Processes of one training run, and how they are killed and started again."""

    zygote: Zygote
    folder: Path
    plan: list[str]
    clients: list[str]
    values: dict[str, Any]  # of the run document
    children: dict[str, Child] = field(default_factory=dict)
    table: list[str] = field(default_factory=list)
    kills: int = 0
    recoveries: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        """Write keys, data and documents, and make the journals that will be audited."""
        self.parties = list(dict.fromkeys(line.split()[0] for line in self.plan))[1:]
        self.addresses = {party: f"127.0.0.1:{free_port()}" for party in self.parties}
        self.steps: int = self.values["training"]["steps"]
        self.folder.mkdir(parents=True)
        roles = {party: "edge" if party == "edge" else "server" for party in self.parties}
        for name, role in (roles | dict.fromkeys(self.clients, "client")).items():
            ensure(self.folder / "keys", name, role)  # type: ignore[arg-type]
        for number, name in enumerate(["server", *self.clients]):
            lines = [json.dumps({"text": note.text}) for note in notes("clinic", 24, seed=2 + number)]
            (self.folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
            values = {
                "model": str(MODEL_DIR), "name": "kills", "plan": self.plan, "out": f"out-{name}", "seed": 5,
                "links": self.addresses, "keys": {"dir": "keys", "name": name if name in self.clients else ""},
                "data": {"path": f"{name}.jsonl", "holdout": 0.1, "max_length": 24},
                "wire": {"keepalive_seconds": 1.0, "patience_seconds": 60.0},
            } | self.values  # fmt: skip
            (self.folder / f"{name}.toml").write_text(Document.of(values, self.folder).to_toml())
        for party in (*self.parties, *self.clients):
            Journal(self.journal(party)).close()
            connection = sqlite3.connect(self.journal(party) / "journal.db")
            connection.executescript(AUDIT)
            connection.close()

    def journal(self, party: str) -> Path:
        return self.folder / (f"out-{party}/journal" if party in self.clients else f"journal/{party}")

    def start(self, party: str, *, ready: bool = True) -> None:
        """Start a party, or start it again with the same command: the client with --resume."""
        if party in self.clients:
            words = ["train", f"{party}.toml", "--json"] + ["--resume"] * (party in self.children)
        else:
            words = ["serve", "server.toml", "--party", party, "--listen", self.addresses[party], "--json"]
        out, env = self.folder / f"{party}.out", {"NOREN_CACHE": str(self.folder / "cache")}
        self.children[party] = child = self.zygote.start(words, cwd=self.folder, stdout=out, env=env)
        if ready and party not in self.clients:
            assert json.loads(child.first_line())["ready"]

    def said(self, party: str) -> str:
        return (self.folder / f"{party}.out.err").read_text(errors="replace")[-3000:]

    def told(self, client: str) -> int:
        """The last step that a client has told of."""
        path = self.folder / f"{client}.out"
        lines = path.read_text().rpartition("\n")[0].splitlines() if path.is_file() else []
        return max((json.loads(line)["step"] for line in lines if '"loss"' in line), default=0)

    def wait_for(self, step: int, client: str) -> None:
        """Wait until a client has told of a step, or has ended."""
        last, since = -1, time.monotonic()
        while (now := self.told(client)) < step and self.goes_on(client):
            if now != last:
                last, since = now, time.monotonic()
            if time.monotonic() - since > PATIENCE:
                said = "\n".join(f"{party}: {self.said(party)}" for party in self.children)
                raise AssertionError(f"no step after {now}: a deadlock?\n{said}")
            time.sleep(0.01)

    def goes_on(self, client: str) -> bool:
        """Whether a client is at work; it was done, if not. One that was killed before it kept anything starts anew."""
        child = self.children[client]
        if child.alive:
            return True
        if child.exit != 0:
            assert self.told(client) == 0 and "start without --resume" in self.said(client), self.said(client)
            del self.children[client]
            self.start(client)
        return child.exit != 0

    def run(self, kills: list[Kill], seed: int = 0) -> Left:
        """Train, with these kills on the way."""
        for party in (*reversed(self.parties), *self.clients):
            self.start(party)
        for number, kill in enumerate(kills):
            victim = kill.victim
            watched = victim if victim in self.clients else self.clients[0]
            if kill.moment != "starting":
                self.wait_for(kill.step, watched)
            if not self.children[victim].alive:  # that client is done; the parties that serve are never
                victim = self.parties[-1]
            if not (how := self.kill(victim, kill)):
                how = self.kill(victim := self.parties[-1], Kill(victim, kill.step, "any time"))
            self.kills += 1
            before, ended = self.told(watched), time.monotonic()
            again = kills[number + 1 :][:1] and kills[number + 1].moment == "starting"
            self.start(victim, ready=not again)
            if not again:
                self.wait_for(min(before + 1, self.steps), watched)
                self.recoveries.append(time.monotonic() - ended)
            after = "killed again" if again else f"next step after {self.recoveries[-1]:.2f} s"
            self.table.append(f"| {seed} | {victim} | {how} | {before} | {after} |")
        for client in self.clients:
            self.wait_for(self.steps + 1, client)  # there is no such step: until it has ended
        for party in self.parties:
            self.children[party].terminate()
            assert self.children[party].wait(timeout=30) == 0, self.said(party)
        return self.left()

    def kill(self, victim: str, kill: Kill) -> str:
        """End a process at that moment; returns in words when that was, none for a client that was done just before."""
        child, log, how = self.children[victim], self.folder / "strace.log", str(kill)
        if kill.call:
            log.unlink(missing_ok=True)
            words = ["strace", "-f", "-qq", "-y", "-s", "8", "-o", str(log), "-e", f"trace={kill.call}", "-e"]
            words += [f"inject={kill.call}:signal=SIGKILL:when={kill.nth}", "-p", str(child.pid)]
            tracer = subprocess.Popen(words, stderr=subprocess.DEVNULL)
            try:
                child.wait(timeout=10)
            except TimeoutError:
                how = "any time (no such call came)"
            child.kill()
            tracer.wait(timeout=20)
            if found := re.findall(rf"{kill.call}\((.*?)[,)]", log.read_text()):
                how += f", {found[-1].replace(str(self.folder), '').strip('<>0123456789')[:40]}"
        elif kill.moment == "log grows":
            path = self.journal(victim) / "journal.db-wal"
            began, before = time.monotonic(), _mark(path)
            while _mark(path) == before and child.alive and time.monotonic() - began < 10:
                time.sleep(0.0002)
        else:
            time.sleep(kill.seconds)  # this moment is what the seed has drawn
        child.kill()
        code = child.wait(timeout=20)
        assert code in (0, -9), self.said(victim)
        return how if code else ""

    def left(self) -> Left:
        """Read what the run has left."""
        adapters, states, metrics = {}, {}, {}
        for client in self.clients:
            out = self.folder / f"out-{client}"
            adapters[client] = {file.name: file.read_bytes() for file in sorted((out / "adapter").iterdir())}
            states[client] = load_file(out / "checkpoint" / "state.safetensors")
            lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
            metrics[client] = [
                (line["step"], what, line[what])
                for line in lines
                for what in ("loss", "norm", "held_out_loss")
                if what in line
            ]
        kept: dict[tuple[str, str], list[list[int]]] = {}
        for party in (*self.parties, *self.clients):
            connection = sqlite3.connect(self.journal(party) / "journal.db")
            lives: dict[tuple[str, str], list[int]] = {}
            for run, incarnation, step in connection.execute(
                "SELECT run, incarnation, step FROM kept_steps ORDER BY number"
            ):
                lives.setdefault((run, incarnation), []).append(step)
            connection.close()
            for (run, _), steps in lives.items():
                kept.setdefault((party, run), []).append(steps)
        return Left(adapters, states, metrics, kept)


def _mark(path: Path) -> tuple[int, int]:
    """Changes whenever a file is written."""
    try:
        found = path.stat()
    except FileNotFoundError:
        return 0, 0
    return found.st_size, found.st_mtime_ns
