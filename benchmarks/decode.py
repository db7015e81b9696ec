"""Decoding: a model cut over loopback gRPC with TLS against `generate` of the whole model, in the same run.

Prints tokens a second of both, their ratio (split / whole), bytes and round trips a token.
"""

from __future__ import annotations

import time
from pathlib import Path
from statistics import median
from typing import Any

import rig
import torch
from transformers import AutoModelForCausalLM

from noren.parties.client import Client

PROMPT, NEW, REPEATS, THREADS = 64, 48, 7, 2


def main() -> None:
    """Measure and print."""
    torch.set_num_threads(THREADS)
    with rig.scratch() as scratch:
        folder = Path(scratch)
        model = rig.llama(folder, "160M")
        whole = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16).eval()
        with rig.server(folder, {"model": str(model), "plan": rig.PLAN, "dtype": "bfloat16"}, THREADS) as document:
            client = Client(document)
            ids = torch.randint(3, 32_000, (1, PROMPT), generator=torch.Generator().manual_seed(1))
            outputs: dict[str, torch.Tensor] = {}

            def speed(name: str, chosen: Any) -> float:
                started = time.perf_counter()
                outputs[name] = chosen.generate(ids, max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False)
                return NEW / (time.perf_counter() - started)

            before = client.traffic.copy()
            split, alone = rig.alternate(
                REPEATS, lambda: speed("split", client.model), lambda: speed("whole", whole)
            )
            crossed = client.traffic.since(before)
            client.close()
    tokens = NEW * (REPEATS + 1)
    rig.show(
        benchmark="decode",
        shape="160M",
        dtype="bfloat16",
        ratio=rig.median_ratio(split, alone),
        split_tokens_per_second=median(split),
        whole_tokens_per_second=median(alone),
        same_tokens=bool(torch.equal(outputs["split"], outputs["whole"])),
        round_trips_per_token=crossed.round_trips / tokens,
        bytes_per_token=crossed.total_bytes / tokens,
        prompt_tokens=PROMPT,
        new_tokens=NEW,
        repeats=REPEATS,
        threads=THREADS,
    )


if __name__ == "__main__":
    main()
