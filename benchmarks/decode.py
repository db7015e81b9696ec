"""Decoding: a model cut over loopback gRPC with TLS against `generate` of the whole model, in the same run.

Prints tokens a second of both, their ratio (split / whole), bytes and round trips a token.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

import _rig as rig
import torch
from transformers import AutoModelForCausalLM

from noren.parties.client import Client

PROMPT, NEW, REPEATS, THREADS = 64, 48, 9, 2


def measured(model: Any) -> dict[str, Any]:
    """Generate once, greedily: tokens a second, and the tokens."""
    ids = torch.randint(3, 32_000, (1, PROMPT), generator=torch.Generator().manual_seed(1))
    started = time.perf_counter()
    out = model.generate(ids, max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False)
    return {"speed": NEW / (time.perf_counter() - started), "tokens": out[0].tolist()}


def whole(folder: str) -> None:
    """The baseline: the whole model in this process."""
    torch.set_num_threads(THREADS)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
    rig.answer(lambda: measured(model))


def main() -> None:
    """Measure and print."""
    torch.set_num_threads(THREADS)
    with rig.scratch() as scratch:
        folder = Path(scratch)
        model = rig.llama(folder, "160M")
        values = {"model": str(model), "plan": rig.PLAN, "dtype": "bfloat16"}
        with (
            rig.server(folder, values, THREADS) as document,
            rig.whole_in_a_process(__file__, str(model), threads=THREADS) as alone,
        ):
            client = Client(document)
            before = client.traffic.copy()
            split, whole = rig.alternate(REPEATS, lambda: measured(client.model), alone)
            crossed = client.traffic.since(before)
            client.close()
    tokens = NEW * (REPEATS + 1)
    speeds = [[one["speed"] for one in side] for side in (split, whole)]
    rig.show(
        benchmark="decode",
        shape="160M",
        dtype="bfloat16",
        ratio=rig.median_ratio(*speeds),
        split_tokens_per_second=median(speeds[0]),
        whole_tokens_per_second=median(speeds[1]),
        same_tokens=split[0]["tokens"] == whole[0]["tokens"],
        round_trips_per_token=crossed.round_trips / tokens,
        bytes_per_token=crossed.total_bytes / tokens,
        prompt_tokens=PROMPT,
        new_tokens=NEW,
        repeats=REPEATS,
        threads=THREADS,
    )


if __name__ == "__main__":
    whole(sys.argv[2]) if sys.argv[1:2] == ["whole"] else main()
