"""Many clients on one server, in the three modes: tokens a second, the server's peak memory, bytes.

    python benchmarks/parallel.py [--clients 1,2,4,8,16] [--steps 4]

The server is a real one, `noren serve` in a process of its own, with the middle of a random-weight Llama of 160M. The
clients are load generators: real connections with mTLS, each with a certificate of its own, that send recorded hidden
states and gradients, and wait as long as a client's own layers would compute elsewhere, and as the link would take
(20 ms there and back, 1000 Mbit/s each way). So this machine's cores do the server's work and little else.

What a client's own layers take is measured before, with a real client: its step less what its remote party takes. No
way of serving n clients can beat min(n, (client + link + server) / server) times one client's speed, where `server` is
the time of one client's step at the server alone; `of_bound_8` is the share of that which 8 clients get.
"""

from __future__ import annotations

import argparse
import statistics
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import _rig as rig
import msgspec
import torch

from noren.config import Document
from noren.metrics import peak_memory
from noren.parties.client import Client
from noren.parties.lines import credentials_for as _credentials
from noren.training.batches import Row
from noren.training.loop import Trainer, Training
from noren.types import Backward, Close, Forward, Hello, Leave, Message, Optimizer, Status, Update
from noren.wire.grpc_link import GrpcLink
from noren.wire.identity import ensure

BATCH, LENGTH, WIDTH, THREADS = 8, 128, 768, 2
ROUND_TRIP, BITS = 0.020, 1e9
"""Seconds of the link, both ways together; bits a second each way."""
TOKENS = BATCH * LENGTH
GRAPH_BYTES = 160 << 20
"""The server's budget of activations: not enough for one client's batch, so that blocks are computed again."""
FEDSEA = {"sequential": 689.2, "client-batch": {2: 630.0, 4: 542.2, 8: 488.6},
          "server-hierarchical": {2: 348.2, 4: 173.5, 8: 86.4}}  # fmt: skip
"""Seconds of FedSEA-LLaMA's Table 7 (arXiv 2505.15683, appendix), with one copy of the base for each client there."""


def document(model: Path, mode: str, clients: int) -> dict[str, Any]:
    """The values of a run document."""
    return {
        "model": str(model), "plan": rig.PLAN, "dtype": "bfloat16",
        "adapter": {"r": 8, "targets": ["q_proj", "v_proj"]},
        "together": {"mode": mode, "clients": clients, "every": 1_000_000, "wait_seconds": 60.0},
        "serve": {"graph_bytes": GRAPH_BYTES, "journal": "", "joined_tokens": TOKENS},
    }  # fmt: skip


def link_seconds(nbytes: int) -> float:
    """What a message and its answer of so many bytes each take on the link."""
    return ROUND_TRIP + nbytes * 8 / BITS * 2


class Generator:
    """A client that computes nothing."""

    def __init__(self, run: Document, number: int, hello: Hello, head: float, ends: float) -> None:
        ensure(run.path(run.run.keys.dir), f"c{number}", "client")
        credentials = _credentials(Document(msgspec.structs.replace(
            run.run, keys=msgspec.structs.replace(run.run.keys, name=f"c{number}")), run.base), "client")  # fmt: skip
        self.hello = Message(msgspec.structs.replace(hello, run=f"load{number}"))
        self.link = GrpcLink(run.addresses("server")[0], credentials, greet=lambda: self.hello, wire=run.run.wire)
        generator = torch.Generator().manual_seed(number)
        self.hidden, self.gradient = (
            torch.randn(TOKENS, WIDTH, generator=generator).to(torch.bfloat16) for _ in range(2)
        )
        self.head, self.ends = head, ends  # seconds: the last layers; the first ones and what is before them
        self.step = 0
        self.link.connect()

    def wait(self, seconds: float) -> None:
        """Compute elsewhere, and let the message cross."""
        time.sleep(seconds)

    def steps(self, count: int) -> None:
        """Make some steps."""
        optimizer = Optimizer(name="adamw", lr=1e-4)
        crossing = link_seconds(self.hidden.nbytes)
        for _ in range(count):
            self.step += 1
            session = f"{self.step}.0"
            update = Update(step=self.step - 1, scale=1.0, optimizer=optimizer) if self.step > 1 else None
            forward = Forward(
                session=session, start=0, lengths=[LENGTH] * BATCH, padding="left", train=True, update=update
            )
            self.link(Message(forward, {"hidden": self.hidden}))
            self.wait(crossing + self.head)
            self.link(Message(Backward(session=session), {"gradient": self.gradient}))
            self.wait(crossing + self.ends)

    def take_part(self, count: int) -> None:
        """Make some steps with the group."""
        rig.enter(self.link)
        self.steps(count)
        self.link(Message(Leave()))

    def close(self) -> None:
        """End the run."""
        self.link(Message(Close()))
        self.link.close()


def hello_of(run: Document) -> Hello:
    """A real client's hello."""
    client = Client(run)
    hello = client.hello().meta
    client.close()
    assert isinstance(hello, Hello)
    return msgspec.structs.replace(hello, resume="")


def measure_client(folder: Path, model: Path) -> tuple[float, float]:
    """Seconds of a real client's step, of which at the remote party."""
    ids = torch.randint(3, 32_000, (BATCH, LENGTH), generator=torch.Generator().manual_seed(1)).tolist()
    rows: list[Row] = [{"input_ids": row, "attention_mask": [1] * LENGTH, "labels": row} for row in ids]
    with rig.server(folder, document(model, "alone", 1), THREADS) as run:
        client = Client(run)
        remote: list[float] = []
        client.span.handler = rig.timed(client.span.handler, remote)
        trainer = Trainer(
            client.model, rows, [], Training(steps=100, batch_size=BATCH), pad_id=0, seed=0, remote=client.remote()
        )
        whole = []
        for _ in range(6):
            started = time.perf_counter()
            trainer.step([rows])
            whole.append(time.perf_counter() - started)
        client.close()
    served = [sum(remote[i : i + 2]) for i in range(0, len(remote), 2)]
    return statistics.median(whole[1:]), statistics.median(served[1:])


def measure(folder: Path, model: Path, mode: str, clients: int, steps: int, own: float) -> dict[str, Any]:
    """Tokens a second of all clients, the server's peak memory, and bytes a token."""
    pids: list[int] = []
    with rig.server(folder, document(model, mode, clients), THREADS, pids) as run:
        hello = hello_of(run)
        base = peak_memory(pids[0])
        load = [Generator(run, number, hello, own / 2, own / 2) for number in range(clients)]
        begun, times = threading.Barrier(clients), list[tuple[float, float]]()

        def work(one: Generator) -> None:
            if mode == "sequential":
                one.take_part(steps)
                return
            rig.enter(one.link)
            one.steps(1)  # the first step of all is not counted
            begun.wait()
            started = time.perf_counter()
            one.steps(steps)
            times.append((started, time.perf_counter()))
            one.link(Message(Leave()))

        started = time.perf_counter()
        with ThreadPoolExecutor(clients) as pool:
            list(pool.map(work, load))
        seconds = time.perf_counter() - started
        if mode != "sequential":
            seconds = statistics.mean(end - start for start, end in times)
        crossed = sum(one.link.traffic.total_bytes for one in load) / sum(one.step for one in load) / TOKENS
        rss = load[0].link(Message(Status())).meta.rss_bytes  # type: ignore[union-attr]
        peak = peak_memory(pids[0])
        for one in load:
            one.close()
    return {
        "mode": mode, "clients": clients, "tokens_per_second": clients * steps * TOKENS / seconds,
        "server_peak_bytes": peak, "server_rss_bytes": rss, "server_base_bytes": base, "bytes_per_token": crossed,
    }  # fmt: skip


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", default="1,2,4,8,16", type=lambda text: [int(n) for n in text.split(",")])
    parser.add_argument("--steps", default=4, type=int)
    arguments = parser.parse_args()
    torch.set_num_threads(THREADS)
    rows: list[dict[str, Any]] = []
    with rig.scratch() as scratch:
        folder = Path(scratch)
        model = rig.llama(folder, "160M")
        step, served = measure_client(folder, model)
        own, link = step - served, 2 * link_seconds(TOKENS * WIDTH * 2)
        for clients in arguments.clients:
            for mode in ("sequential", "client-batch", "server-hierarchical"):
                rows.append(measure(folder, model, mode, clients, arguments.steps, own))
    speed = {(row["mode"], row["clients"]): row["tokens_per_second"] for row in rows}
    memory = {(row["mode"], row["clients"]): row["server_peak_bytes"] for row in rows}
    out: dict[str, Any] = {}
    for row in rows:
        if row["mode"] != "sequential":
            one = speed[row["mode"], 1] if (row["mode"], 1) in speed else float("nan")
            server = TOKENS / one - own - link  # of one client's step
            row["bound"] = min(row["clients"], (own + link + server) / server)
            row["of_bound"] = row["tokens_per_second"] / (one * row["bound"])
            row["over_sequential"] = row["tokens_per_second"] / speed["sequential", row["clients"]]
    eight = [row for row in rows if row["clients"] == 8 and "bound" in row]
    if eight and ("server-hierarchical", 1) in memory:
        out = {
            "of_bound_8": min(row["of_bound"] for row in eight),
            "speedup_8": min(row["over_sequential"] for row in eight),
            "server_memory_8_over_1": memory["server-hierarchical", 8] / memory["server-hierarchical", 1],
        }
    rig.show(
        benchmark="parallel", shape="160M", dtype="bfloat16", batch=BATCH, length=LENGTH, client_seconds=own,
        link_seconds=link, server_seconds=served, graph_bytes=GRAPH_BYTES, **out,
        rows=[{k: round(v, 4) if isinstance(v, float) else v for k, v in row.items()} for row in rows],
        fedsea_table_7_seconds=FEDSEA,
    )  # fmt: skip


if __name__ == "__main__":
    main()
