"""`noren demo --tiers`: four users, two edges and a cloud on this machine, of which one edge is killed on the way.

The same run is made once more without the kill, and the two are compared.
"""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from noren.cli.processes import end, last_words, peak, start
from noren.cli.show import bytes_of, say
from noren.errors import ConfigError, NorenError

USERS = {"clinic-1": ("clinic", 0), "clinic-2": ("clinic", 1), "desk-1": ("desk", 0), "desk-2": ("desk", 1)}
"""Whose notes each user has: a site's, and which half."""
EDGES = ("edge-a", "edge-b")
PLAN = ["client :2", "edge 2:4", "cloud 4:-2", "client -2:"]
NOTES, NOTES_SEED, EVERY = 120, 7, 5


@dataclass
class User:
    """One user's process, and what it has said."""

    edge: str
    process: subprocess.Popen[str]
    steps: list[dict[str, Any]] = field(default_factory=list)
    done: dict[str, Any] | None = None
    moved_at: int = 0

    def follow(self) -> None:
        """Read what the process says until it ends."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            words = json.loads(line)
            if "loss" in words:
                self.steps.append(words)
            else:
                self.done = words


def show(out: Path, steps: int) -> None:
    """Make both runs, compare them, and write the report."""
    started = time.monotonic()
    out = out.resolve()
    _clear(out)
    say(f"Four users, two edges, one cloud, one model (embedded), cut as: {', '.join(PLAN)}")
    disturbed = Tiers(out / "killed", steps).run(kill=EDGES[0])
    say("the same run once more, undisturbed")
    undisturbed = Tiers(out / "undisturbed", steps).run(kill="")
    _report(out, disturbed, undisturbed, time.monotonic() - started)


def _clear(out: Path) -> None:
    marker = out / ".noren-demo"
    if out.exists() and any(out.iterdir()) and not marker.is_file():
        raise ConfigError(f"{out} is not empty and no earlier demo's; give another folder with --out")
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    marker.touch()


class Tiers:
    """One run: its files, its processes, what came of it."""

    def __init__(self, out: Path, steps: int) -> None:
        self.out, self.steps = out, steps
        self.users: dict[str, User] = {}
        self.peaks: dict[str, int] = {}
        self._ports: dict[str, int] = {}
        self._servers: dict[str, subprocess.Popen[str]] = {}

    def run(self, kill: str) -> Tiers:
        """Train all users; with `kill`, that edge is killed once its users are halfway between two averages."""
        self._prepare()
        with ExitStack() as stack:
            for name in ("cloud", *EDGES):
                stack.enter_context(self._serve(name))
            say(f"ready: {', '.join(f'{name} on port {port}' for name, port in self._ports.items())}; now the users")
            followers = [self._train(name, stack) for name in USERS]
            if kill:
                self._kill(kill)
            for follower in followers:
                follower.join()
            self.peaks |= {name: peak(process.pid) for name, process in self._servers.items() if process.poll() is None}
        for name, user in self.users.items():
            if user.done is None:
                raise NorenError(f"user {name!r} ended early; {last_words(self.out / f'{name}.log')}")
        return self

    def _prepare(self) -> None:
        """Keys for all, and each user's own notes."""
        from noren.embedded.notes import notes
        from noren.wire.identity import ensure

        self.out.mkdir(parents=True)
        roles: dict[str, Any] = dict.fromkeys(USERS, "client") | dict.fromkeys(EDGES, "edge") | {"cloud": "server"}
        for name, role in roles.items():
            ensure(self.out / "keys", name, role)
        for name, (site, half) in USERS.items():
            lines = [json.dumps({"text": note.text}) for note in notes(site, 2 * NOTES, NOTES_SEED)[half::2]]
            (self.out / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")

    def _document(self, name: str, edges: tuple[str, ...] = ()) -> Path:
        """Write the run document of one process."""
        import tomli_w

        links: dict[str, Any] = {"cloud": f"127.0.0.1:{self._ports.get('cloud', 1)}"}
        if edges:
            links["edge"] = [f"127.0.0.1:{self._ports[edge]}" for edge in edges]
        values: dict[str, Any] = {
            "model": "embedded", "plan": PLAN, "name": name, "out": str(self.out / name), "links": links,
            "keys": {"dir": str(self.out / "keys"), "name": name}, "adapter": {"r": 8},
            "training": {"steps": self.steps, "batch_size": 8, "lr": 5e-3, "schedule": "constant", "save_every": 0},
            "together": {"mode": "server-hierarchical", "clients": len(USERS), "every": EVERY, "ends": True},
            "edges": {"assign": "first", "switch_seconds": 2.0},
            "serve": {"journal": str(self.out / "journal" / name)},
        }  # fmt: skip
        if name in USERS:
            values["data"] = {"path": str(self.out / f"{name}.jsonl"), "max_length": 160}
        path = self.out / f"{name}.toml"
        path.write_text(tomli_w.dumps(values), encoding="utf-8")
        return path

    @contextmanager
    def _serve(self, name: str) -> Iterator[None]:
        party = "cloud" if name == "cloud" else "edge"
        command = ["-m", "noren.cli.main", "serve", str(self._document(name)), "--party", party]
        log = self.out / f"{name}.log"
        process = self._servers[name] = start([*command, "--listen", "127.0.0.1:0", "--json"], log)
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            if not line.strip():
                raise NorenError(f"{name} did not start; {last_words(log)}")
            self._ports[name] = int(json.loads(line)["port"])
            yield
        finally:
            end(process)

    def _train(self, name: str, stack: ExitStack) -> threading.Thread:
        turn = list(USERS).index(name) % len(EDGES)
        path = self._document(name, (*EDGES[turn:], *EDGES[:turn]))
        process = start(["-m", "noren.cli.main", "train", str(path), "--json"], self.out / f"{name}.log")
        stack.callback(end, process)
        user = self.users[name] = User(EDGES[turn], process)
        follower = threading.Thread(target=user.follow)
        follower.start()
        return follower

    def _kill(self, edge: str) -> None:
        """Kill an edge in the middle of a step of its users, some steps after an average."""
        own = [user for user in self.users.values() if user.edge == edge]
        goal = min(self.steps - 1, EVERY + EVERY // 2)
        while any(len(user.steps) < goal and user.process.poll() is None for user in own):
            time.sleep(0.01)
        process = self._servers[edge]
        self.peaks[edge] = peak(process.pid)
        process.kill()
        process.wait()
        for user in own:
            user.moved_at = len(user.steps) + 1
        say(f"killed {edge} (process {process.pid}) after step {min(len(user.steps) for user in own)} of its users")


def _report(out: Path, disturbed: Tiers, undisturbed: Tiers, seconds: float) -> None:
    import msgspec
    from safetensors.torch import load_file

    from noren.report.result import TiersResult, UserResult
    from noren.report.tiers import verdict, write_tiers

    users, states, apart = [], [], list[float]()
    for name, user in disturbed.users.items():
        other = undisturbed.users[name]
        assert user.done is not None and other.done is not None
        found, calm = (
            load_file(Path(one.done["adapter"]) / "adapter_model.safetensors") for one in (user, other) if one.done
        )
        apart += [float((found[key] - tensor).abs().max()) for key, tensor in calm.items()]
        states.append(found)
        held_out = [user.done["held_out"][str(step)] for step in (0, disturbed.steps)]
        moved = "going on at" in (disturbed.out / f"{name}.log").read_text(encoding="utf-8")
        (elsewhere,) = (edge for edge in EDGES if edge != user.edge)
        users.append(
            UserResult(
                name=name, edge=user.edge, later=elsewhere if moved else user.edge, moved_at=user.moved_at,
                losses=[one["loss"] for one in user.steps], undisturbed=[one["loss"] for one in other.steps],
                held_out_before=held_out[0], held_out_after=held_out[1], steps=[one["step"] for one in user.steps],
                adapter=user.done["adapter"],
            )
        )  # fmt: skip
    result = TiersResult(
        title="Four users, two edges, one cloud", model="embedded", plan=PLAN, every=EVERY, killed=EDGES[0],
        users=users,
        largest_loss_difference=_largest(
            [abs(a - b) for user in users for a, b in zip(user.losses, user.undisturbed, strict=False)]
        ),
        largest_adapter_difference=_largest(apart),
        users_agree=all(bool((state[key] == tensor).all()) for state in states for key, tensor in states[0].items()),
        peak_bytes=disturbed.peaks, seconds=seconds, folder=str(out),
    )  # fmt: skip
    (out / "result.json").write_bytes(msgspec.json.format(msgspec.json.encode(result), indent=1))
    report = write_tiers(result, out / "report.html")
    for one in users:
        went = f"{one.edge}, then {one.later}" if one.later != one.edge else one.edge
        say(f"{one.name}: {len(one.steps)} steps over {went}; held-out loss "
            f"{one.held_out_before:.4f} before, {one.held_out_after:.4f} after")  # fmt: skip
    say(verdict(result).sentence)
    say("memory at the peak: " + ", ".join(f"{name} {bytes_of(value)}" for name, value in result.peak_bytes.items()))
    say("no guard was active: edges and cloud that know the base model can read much from hidden states")
    say(f"report: {report}  ({seconds:.0f} s in all)")


def _largest(values: list[float]) -> float:
    """The largest, or not a number if any is not."""
    return next((value for value in values if math.isnan(value)), max(values, default=0.0))
