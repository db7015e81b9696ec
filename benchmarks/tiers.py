"""Peak memory of users, edges and a cloud, against federated learning and against a server replica a user.

    python benchmarks/tiers.py [--users 8] [--steps 3]

The model is a random-weight Llama of 160M in bf16 with LoRA on q and v; every user trains with batches of 8 x 128
tokens, all users at the same time, and a round is some steps and an average. Compared are

    tiers      user 0:2, edge 2:7, cloud 7:10, user 10:12; two edges; one frozen base at each party, an adapter a user
    replicas   user 0:2, server 2:10, user 10:12; a copy of the server's base for each user (two-tier split learning)
    federated  the whole model on each user

Cloud, replicas, one edge, one user and one whole model are real processes, whose peak memory is read from the system.
The round's time is the upper tier's: its users and edges are load generators with real connections that wait as long
as the layers elsewhere would compute (measured before, with a real user) and as the links would take (20 ms there and
back for each, 1000 Mbit/s each way). An edge computes for one of its users at a time.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import _rig as rig
import msgspec
import torch

from noren.config import Document
from noren.metrics import peak_memory
from noren.parties.client import Client
from noren.parties.lines import credentials_for
from noren.parties.server import Limits, SpanServer
from noren.partition.stage import Stage, open_slice
from noren.training.batches import Row
from noren.training.loop import Trainer, Training
from noren.types import (
    PROTOCOL,
    Average,
    Backward,
    Close,
    Forward,
    Hello,
    Message,
    Optimizer,
    State,
    Terms,
    Update,
)
from noren.wire.grpc_link import GrpcLink
from noren.wire.grpc_server import GrpcServer
from noren.wire.identity import ensure

BATCH, LENGTH, WIDTH, THREADS, EDGES = 8, 128, 768, 2, 2
TOKENS = BATCH * LENGTH
LINK = 0.020 + TOKENS * WIDTH * 2 * 8 / 1e9 * 2  # seconds of a message and its answer
TIERS = ["client :2", "edge 2:7", "cloud 7:10", "client 10:"]
TWO = ["client :2", "server 2:10", "client 10:"]
GRAPH_BYTES = 64 << 20
"""The cloud's budget of activations."""
SPLITLLM = 0.74
"""SplitLLM's headline: less memory at the peak (arXiv 2501.13318)."""


def document(folder: Path, plan: list[str], users: int, ports: dict[str, int], name: str = "client") -> Document:
    """A run document."""
    values = {
        "model": str(folder / "160M"), "plan": plan, "dtype": "bfloat16", "name": name,
        "adapter": {"r": 8, "targets": ["q_proj", "v_proj"]}, "keys": {"dir": str(folder / "keys"), "name": name},
        "together": {"mode": "server-hierarchical", "clients": users, "every": 1_000_000, "wait_seconds": 120.0},
        "serve": {"graph_bytes": GRAPH_BYTES, "journal": "", "runs": users, "joined_tokens": TOKENS},
        "links": {party: f"127.0.0.1:{port}" for party, port in ports.items()},
    }  # fmt: skip
    return Document.of(values, folder)


@contextmanager
def process(*arguments: str) -> Iterator[tuple[subprocess.Popen[str], dict[str, Any]]]:
    """A process of this script, or of noren, and the first line that it says."""
    environment = os.environ | {"OMP_NUM_THREADS": str(THREADS)}
    one = subprocess.Popen([sys.executable, *arguments], stdout=subprocess.PIPE, text=True, env=environment)
    try:
        assert one.stdout is not None
        yield one, json.loads(one.stdout.readline())
    finally:
        one.terminate()
        one.wait(timeout=20)


@contextmanager
def serving(folder: Path, party: str, plan: list[str], users: int, ports: dict[str, int]) -> Iterator[tuple[int, int]]:
    """Run `noren serve`; yields its port and process id."""
    path = folder / f"{party}.toml"
    path.write_text(document(folder, plan, users, {party: 1} | ports, party).to_toml())
    command = ("-m", "noren.cli.main", "serve", str(path), "--party", party, "--listen", "127.0.0.1:0", "--json")
    with process(*command) as (one, ready):
        yield int(ready["port"]), one.pid


def rows() -> list[Row]:
    """A batch."""
    ids = torch.randint(3, 32_000, (BATCH, LENGTH), generator=torch.Generator().manual_seed(1)).tolist()
    return [{"input_ids": row, "attention_mask": [1] * LENGTH, "labels": row} for row in ids]


def trained(model: Any, remote: Any, repeats: int) -> list[float]:
    """Seconds of some steps."""
    trainer = Trainer(model, rows(), [], Training(steps=100, batch_size=BATCH), pad_id=0, seed=0, remote=remote)
    seconds = []
    for _ in range(repeats):
        started = time.perf_counter()
        trainer.step([rows()])
        seconds.append(time.perf_counter() - started)
    return seconds[1:]


def user(path: str) -> None:
    """A real user in a process of its own: says what its steps took, of which elsewhere, and its peak memory."""
    client = Client(Document.read(Path(path)))
    elsewhere: list[float] = []
    client.span.handler = rig.timed(client.span.handler, elsewhere)
    rig.enter(client.link)
    step = statistics.median(trained(client.model, client.remote(), 5))
    beyond = statistics.median(sum(elsewhere[i : i + 2]) for i in range(2, len(elsewhere), 2))
    client.close()
    print(json.dumps({"own": step - beyond, "beyond": beyond, "peak": peak_memory()}), flush=True)


def whole(folder: str) -> None:
    """The whole model in a process of its own, as in federated learning."""
    import peft
    import transformers

    torch.set_num_threads(THREADS)
    base = transformers.AutoModelForCausalLM.from_pretrained(Path(folder) / "160M", dtype=torch.bfloat16)
    lora = peft.LoraConfig(r=8, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    step = statistics.median(trained(peft.get_peft_model(base, lora), None, 4))
    print(json.dumps({"step": step, "peak": peak_memory()}), flush=True)


def replicas(folder: str, users: int) -> None:
    """A server that holds a copy of its base for each user."""
    torch.set_num_threads(THREADS)
    run = document(Path(folder), TWO, 1, {}, "server")
    with ExitStack() as stack:
        ports = []
        for _ in range(users):
            stage = Stage(open_slice(run.model, TWO, "server", "causal-lm"), torch.bfloat16)
            for parameter in stage.parameters():
                parameter.data = parameter.data.clone()  # its own, not the file's pages
            server = SpanServer(stage, lora=run.run.adapter, limits=Limits(journal=""))
            stack.callback(server.close)
            door = GrpcServer("127.0.0.1:0", credentials_for(run, "server"), server.connect)
            ports.append(stack.enter_context(door).port)
        print(json.dumps({"ports": ports}), flush=True)
        sys.stdin.read()
        time.sleep(3600)


class User:
    """A user that computes nothing: what it and its edge would compute is waited for. `edge`: one user at a time."""

    def __init__(self, run: Document, party: str, hello: Hello, own: float, edge: tuple[threading.Lock, float] | None):
        self.link = GrpcLink(
            run.addresses(party)[0], credentials_for(run, run.run.name), greet=lambda: Message(hello), wire=run.run.wire
        )
        generator = torch.Generator().manual_seed(0)
        self.hidden, self.gradient = (
            torch.randn(TOKENS, WIDTH, generator=generator).to(torch.bfloat16) for _ in range(2)
        )
        self.own, self.edge, self.step = own, edge, 0
        self.before = {name: torch.zeros(shape) for name, shape in hello.before.items()}
        self.link.connect()

    def _edge(self, share: float) -> None:
        if self.edge is not None:
            with self.edge[0]:
                time.sleep(self.edge[1] * share)
            time.sleep(LINK)

    def steps(self, count: int) -> None:
        """Make some steps: forward a third of a party's time, backward the rest."""
        optimizer = Optimizer(name="adamw", lr=1e-4)
        for _ in range(count):
            self.step += 1
            session = f"{self.step}.0"
            update = Update(step=self.step - 1, scale=1.0, optimizer=optimizer) if self.step > 1 else None
            forward = Forward(
                session=session, start=0, lengths=[LENGTH] * BATCH, padding="left", train=True, update=update
            )
            self._edge(1 / 3)
            self.link(Message(forward, {"hidden": self.hidden}))
            time.sleep(LINK + self.own / 2)
            self.link(Message(Backward(session=session), {"gradient": self.gradient}))
            self._edge(2 / 3)
            time.sleep(LINK + self.own / 2)

    def average(self) -> None:
        """End the round."""
        update = Update(step=self.step, scale=1.0, optimizer=Optimizer(name="adamw", lr=1e-4))
        reply = self.link(Message(Average(step=self.step, weight=1, update=update), self.before))
        assert isinstance(reply.meta, State)

    def close(self) -> None:
        """End the run."""
        self.link(Message(Close()))
        self.link.close()


def a_round(users: list[User], steps: int, pid: int) -> dict[str, Any]:
    """Seconds of a round after one that is not counted, and the peak memory of a process."""

    def work(one: User) -> float:
        rig.enter(one.link)
        one.steps(1)
        one.average()
        started = time.perf_counter()
        one.steps(steps)
        one.average()
        return time.perf_counter() - started

    with ThreadPoolExecutor(len(users)) as pool:
        seconds = max(pool.map(work, users))
    peak = peak_memory(pid)
    for one in users:
        one.close()
    return {"round_seconds": seconds, "peak": peak}


def hello_for(run: Document, party: str, name: str, before: dict[str, list[int]], users: int) -> Hello:
    """What an edge (or a user of two tiers) would say for a user."""
    part = open_slice(run.model, run.run.plan, party, "causal-lm")
    assert run.run.adapter is not None
    terms = Terms(
        fingerprint=part.fingerprint, plan=part.plan.lines(), task="causal-lm", dtype="bfloat16",
        lora=run.run.adapter.canonical(), seed=0,
        together=msgspec.structs.replace(run.run.together, clients=users),
    )  # fmt: skip
    return Hello(protocol=PROTOCOL, run=name, terms=terms, before=before)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--users", default=8, type=int)
    parser.add_argument("--steps", default=3, type=int)
    arguments = parser.parse_args()
    users, steps = arguments.users, arguments.steps
    with rig.scratch() as scratch, ExitStack() as stack:
        folder = Path(scratch)
        rig.llama(folder, "160M")
        roles: dict[str, Any] = {"client": "client", "server": "server", "cloud": "server", "edge": "edge"}
        for n in range(max(users, EDGES)):
            roles |= {f"user{n}": "client", f"edge{n}": "edge"}
        for name, role in roles.items():
            ensure(folder / "keys", name, role)

        with process(__file__, "whole", str(folder)) as (_, federated):
            pass
        with ExitStack() as one:
            port, _ = one.enter_context(serving(folder, "cloud", TIERS, 1, {}))
            edge_port, edge_pid = one.enter_context(serving(folder, "edge", TIERS, 1, {"cloud": port}))
            path = folder / "user.toml"
            path.write_text(document(folder, TIERS, 1, {"edge": edge_port}).to_toml())
            _, real = one.enter_context(process(__file__, "user", str(path)))
            edge_peak = peak_memory(edge_pid)
        own, layer = real["own"], real["beyond"] / 8  # seconds; what 8 layers took, one user at a time
        edge_run = document(folder, TIERS, users, {}, "edge")
        edge_stage = Stage(open_slice(edge_run.model, TIERS, "edge", "causal-lm"), torch.bfloat16)
        shapes = SpanServer(edge_stage, lora=edge_run.run.adapter).trainer_of("x", _terms(edge_run)).shapes()

        port, pid = stack.enter_context(serving(folder, "cloud", TIERS, users, {}))
        locks = [threading.Lock() for _ in range(EDGES)]
        crowd = []
        for n in range(users):
            run = document(folder, TIERS, users, {"cloud": port}, f"edge{n % EDGES}")
            hello = hello_for(run, "cloud", f"user{n}/run", shapes, users)
            crowd.append(User(run, "cloud", hello, own, (locks[n % EDGES], 5 * layer)))
        tiers = a_round(crowd, steps, pid)
        stack.close()

        with process(__file__, "replicas", str(folder), str(users)) as (server, ready):
            crowd = []
            for n in range(users):
                run = document(folder, TWO, 1, {"server": ready["ports"][n]}, f"user{n}")
                crowd.append(User(run, "server", hello_for(run, "client", "run", {}, 1), own, None))
            two_tiers = a_round(crowd, steps, server.pid)
    rig.show(
        benchmark="tiers", shape="160M", dtype="bfloat16", users=users, batch=BATCH, length=LENGTH,
        cloud_peak_reduction=1 - tiers["peak"] / two_tiers["peak"],
        round_over_replicas=tiers["round_seconds"] / two_tiers["round_seconds"],
        user_peak_reduction=1 - real["peak"] / federated["peak"],
        peak_bytes={
            "user": real["peak"], "edge": edge_peak, "cloud": tiers["peak"], "replicas": two_tiers["peak"],
            "federated user": federated["peak"],
        },
        round_seconds={"tiers": round(tiers["round_seconds"], 3), "replicas": round(two_tiers["round_seconds"], 3)},
        splitllm_claims=SPLITLLM,
    )  # fmt: skip


def _terms(run: Document) -> Terms:
    return hello_for(run, "client", "x", {}, 1).terms


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["user", path]:
            user(path)
        case ["whole", place]:
            whole(place)
        case ["replicas", place, count]:
            replicas(place, int(count))
        case _:
            main()
