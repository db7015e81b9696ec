"""A LoRA training step over a slow line, with the batch in one piece and in micro-batches: does the line show?

    python benchmarks/overlap.py [--micro-batches 8] [--repeats 5] [--threads 1]

Client and server are two processes, with one compute thread each as if each were a machine of its own. Between them are
mutual TLS, gRPC, and a third process that delays every byte and lets only so many through (see _line.py). Each round
makes one step of each kind over each line in turn, so that what else this machine does is spread over all of them.

`exposed` is what a step over 80 ms and 50 Mbit/s takes beyond the larger of what cannot be hidden: the same step over a
line without delay or limit, and its bytes at 50 Mbit/s in the busier direction; the median over the rounds.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from statistics import median

import _rig as rig
import msgspec
import torch
from _line import Line

from noren.config import Document
from noren.parties.client import Client
from noren.training.batches import Row
from noren.training.loop import Trainer, Training

Steps = dict[tuple[float, float, int], list[dict[str, float]]]
"""By round trip, bits a second and micro-batches: what each round's step took."""

BATCH, LENGTH = 8, 128
FREE, SLOW = (0.0, 0.0), (0.08, 50e6)
LINKS = [FREE, *((round_trip, bits) for bits in (1e9, 50e6) for round_trip in (0.0, 0.02, 0.08))]
"""Seconds of a round trip, bits a second each way; 0 for no limit."""


class Side:
    """A client that cuts its batch into so many micro-batches."""

    def __init__(self, run: Document, address: str, micro_batches: int) -> None:
        document = Document(
            msgspec.structs.replace(run.run, links={"server": address}, name=f"m{micro_batches}"), run.base
        )
        self.client, self.micro_batches = Client(document), micro_batches
        settings = Training(steps=1000, batch_size=BATCH, lr=1e-4, micro_batches=micro_batches)
        self._trainer = Trainer(self.client.model, rows(), [], settings, pad_id=0, seed=0, remote=self.client.remote())

    def step(self) -> dict[str, float]:
        """One step: its seconds, those of waiting, what crossed."""
        before, started = self.client.traffic.copy(), time.perf_counter()
        self._trainer.step([rows()])
        seconds, crossed = time.perf_counter() - started, self.client.traffic.since(before)
        return {
            "seconds": seconds, "exposed_seconds": self._trainer.exposed, "round_trips": crossed.round_trips,
            "bytes_one_way": max(crossed.sent_bytes, crossed.received_bytes),
        }  # fmt: skip


def rows() -> list[Row]:
    """One batch of random tokens."""
    ids = torch.randint(3, 32_000, (BATCH, LENGTH), generator=torch.Generator().manual_seed(1)).tolist()
    return [{"input_ids": row, "attention_mask": [1] * LENGTH, "labels": row} for row in ids]


def measure(run: Document, parts: list[int], links: list[tuple[float, float]], repeats: int) -> Steps:
    """Make so many rounds, after one that is not counted."""
    found: Steps = {(*link, count): [] for link in links for count in parts}
    with Line(run.addresses("server")[0]) as line:
        sides = [Side(run, line.address, count) for count in parts]
        for number in range(repeats + 1):
            for link in links:
                line.set(round_trip=link[0], bits=link[1])
                for side in sides:
                    step = side.step()
                    if number:
                        found[(*link, side.micro_batches)].append(step)
        line.set(round_trip=0.0, bits=0.0)
        for side in sides:
            side.client.close()
    return found


def exposed(found: Steps, count: int) -> float:
    """What is not hidden of the slow line, as a share of what cannot be."""
    pairs = zip(found[(*SLOW, count)], found[(*FREE, count)], strict=True)
    least = [(slow, max(free["seconds"], slow["bytes_one_way"] * 8 / SLOW[1])) for slow, free in pairs]
    return median(slow["seconds"] / seconds - 1 for slow, seconds in least)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--micro-batches", default=8, type=int)
    parser.add_argument("--repeats", default=5, type=int)
    parser.add_argument("--threads", default=1, type=int)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    parts = [1, arguments.micro_batches]
    with rig.scratch() as scratch:
        folder = Path(scratch)
        model = rig.llama(folder, "160M")
        adapter = {"r": 8, "targets": ["q_proj", "v_proj"]}
        values = {"model": str(model), "plan": rig.PLAN, "dtype": "bfloat16", "adapter": adapter}
        with rig.server(folder, values, arguments.threads) as run:
            found = measure(run, parts, LINKS, arguments.repeats)
    steps = [
        {"round_trip_ms": round_trip * 1000, "mbit": bits / 1e6 or None, "micro_batches": count}
        | {name: round(median(one[name] for one in made), 4) for name in made[0]}
        for (round_trip, bits, count), made in found.items()
    ]
    rig.show(
        benchmark="overlap", shape="160M", dtype="bfloat16", batch=BATCH, length=LENGTH, threads=arguments.threads,
        micro_batches=parts[1], repeats=arguments.repeats, exposed=exposed(found, parts[1]),
        exposed_in_one_piece=exposed(found, 1),
        speedup=median(one["seconds"] / many["seconds"] for one, many in zip(
            found[(*SLOW, 1)], found[(*SLOW, parts[1])], strict=True)),
        steps=steps,
    )  # fmt: skip


if __name__ == "__main__":
    main()
