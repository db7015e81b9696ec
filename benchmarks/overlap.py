"""A LoRA training step over a slow line, with the batch in one piece and in micro-batches: does the line show?

    python benchmarks/overlap.py [--micro-batches 8] [--repeats 5]

Client and server are two processes with one compute thread each, as if each were a machine of its own; between them are
mutual TLS, gRPC, and a third process that delays every byte and lets only so many through (see _line.py). `exposed` is
what a step over 80 ms and 50 Mbit/s takes beyond the larger of what cannot be hidden: the same step over a line without
delay or limit, and its bytes at 50 Mbit/s in the busier direction.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from statistics import median
from typing import Any

import _rig as rig
import msgspec
import torch
from _line import line

from noren.config import Document
from noren.parties.client import Client
from noren.training.batches import Row
from noren.training.loop import Trainer, Training

BATCH, LENGTH, THREADS = 8, 128, 1
LINKS = [(0.0, 0.0), *((round_trip, bits) for bits in (1e9, 50e6) for round_trip in (0.0, 0.02, 0.08))]
"""Seconds of a round trip, bits a second each way; 0 for no limit."""


def rows() -> list[Row]:
    """One batch of random tokens."""
    ids = torch.randint(3, 32_000, (BATCH, LENGTH), generator=torch.Generator().manual_seed(1)).tolist()
    return [{"input_ids": row, "attention_mask": [1] * LENGTH, "labels": row} for row in ids]


def measure(run: Document, round_trip: float, bits: float, parts: list[int], repeats: int) -> list[dict[str, Any]]:
    """Steps over one line: for each number of micro-batches, the medians of so many after one that is not counted."""
    out = []
    with line(run.run.links["server"], round_trip=round_trip, bits=bits) as address:
        for micro_batches in parts:
            near = Document(msgspec.structs.replace(run.run, links={"server": address}), run.base)
            client = Client(near)
            settings = Training(steps=1000, batch_size=BATCH, lr=1e-4, micro_batches=micro_batches)
            trainer = Trainer(client.model, rows(), [], settings, pad_id=0, seed=0, remote=client.remote())
            seconds, exposed = [], []
            trainer.step([rows()])
            before = client.traffic.copy()
            for _ in range(repeats):
                started = time.perf_counter()
                trainer.step([rows()])
                seconds.append(time.perf_counter() - started)
                exposed.append(trainer.exposed)
            crossed = client.traffic.since(before)
            client.close()
            out.append({
                "round_trip_ms": round_trip * 1000, "mbit": bits / 1e6 or None, "micro_batches": micro_batches,
                "seconds": median(seconds), "exposed_seconds": median(exposed),
                "bytes_one_way": max(crossed.sent_bytes, crossed.received_bytes) / repeats,
                "round_trips": crossed.round_trips / repeats,
            })  # fmt: skip
    return out


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--micro-batches", default=8, type=int)
    parser.add_argument("--repeats", default=5, type=int)
    arguments = parser.parse_args()
    torch.set_num_threads(THREADS)
    parts = [1, arguments.micro_batches]
    steps: list[dict[str, Any]] = []
    with rig.scratch() as scratch:
        folder = Path(scratch)
        model = rig.llama(folder, "160M")
        adapter = {"r": 8, "targets": ["q_proj", "v_proj"]}
        values = {"model": str(model), "plan": rig.PLAN, "dtype": "bfloat16", "adapter": adapter}
        with rig.server(folder, values, THREADS) as run:
            for round_trip, bits in LINKS:
                steps += measure(run, round_trip, bits, parts, arguments.repeats)
    found = {(s["round_trip_ms"], s["mbit"], s["micro_batches"]): s for s in steps}
    figures = {}
    for name, count in (("exposed", parts[1]), ("exposed_in_one_piece", 1)):
        worst = found[80.0, 50.0, count]
        alone, bytes_seconds = found[0.0, None, count]["seconds"], worst["bytes_one_way"] * 8 / 50e6
        figures[name] = worst["seconds"] / max(alone, bytes_seconds) - 1
        figures[f"{name}_over_fastest"] = (
            worst["seconds"] / max(min(found[0.0, None, n]["seconds"] for n in parts), bytes_seconds) - 1
        )
    rig.show(
        benchmark="overlap", shape="160M", dtype="bfloat16", batch=BATCH, length=LENGTH, threads=THREADS, **figures,
        bytes_at_50_mbit_seconds=found[80.0, 50.0, parts[1]]["bytes_one_way"] * 8 / 50e6, repeats=arguments.repeats,
        steps=[{k: round(v, 4) if isinstance(v, float) else v for k, v in one.items()} for one in steps],
    )  # fmt: skip


if __name__ == "__main__":
    main()
