"""A LoRA training step: cut over loopback gRPC with TLS against the same step of the whole model, in the same run.

Prints the ratio of speeds (whole's seconds / split's), bytes a step against their floor, and round trips a step.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

import _rig as rig
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from noren.parties.client import Client
from noren.training.batches import Row
from noren.training.loop import Trainer, Training

BATCH, LENGTH, REPEATS, THREADS = 8, 128, 7, 2
HIDDEN, WIDTH = 768, 2  # elements a token, bytes an element
SETTINGS = Training(steps=1000, batch_size=BATCH, lr=1e-4)


def rows() -> list[Row]:
    """One batch of random tokens."""
    ids = torch.randint(3, 32_000, (BATCH, LENGTH), generator=torch.Generator().manual_seed(1)).tolist()
    return [{"input_ids": row, "attention_mask": [1] * LENGTH, "labels": row} for row in ids]


def measured(trainer: Trainer) -> dict[str, Any]:
    """One step: its seconds and its loss."""
    started = time.perf_counter()
    loss = trainer.step([rows()])[0]
    return {"seconds": time.perf_counter() - started, "loss": loss}


def whole(folder: str, adapter: str) -> None:
    """The baseline: the whole model in this process, from the same first adapter."""
    torch.set_num_threads(THREADS)
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    model = PeftModel.from_pretrained(base, adapter, is_trainable=True)
    trainer = Trainer(model, rows(), [], SETTINGS, pad_id=0, seed=0)
    rig.answer(lambda: measured(trainer))


def main() -> None:
    """Measure and print."""
    torch.set_num_threads(THREADS)
    adapter = {"r": 8, "targets": ["q_proj", "v_proj"]}
    with rig.scratch() as scratch:
        folder = Path(scratch)
        model = rig.llama(folder, "160M")
        values = {"model": str(model), "plan": rig.PLAN, "dtype": "bfloat16", "adapter": adapter}
        with rig.server(folder, values, THREADS) as document:
            client = Client(document)
            initial = client.save_adapter(folder / "initial")
            trainer = Trainer(client.model, rows(), [], SETTINGS, pad_id=0, seed=0, remote=client.remote())
            with rig.whole_in_a_process(__file__, str(model), str(initial), threads=THREADS) as alone:
                before = client.traffic.copy()
                split, whole = rig.alternate(REPEATS, lambda: measured(trainer), alone)
                crossed = client.traffic.since(before)
            client.close()
    steps, floor = REPEATS + 1, 4 * BATCH * LENGTH * HIDDEN * WIDTH
    seconds = [[one["seconds"] for one in side] for side in (split, whole)]
    rig.show(
        benchmark="step",
        shape="160M",
        dtype="bfloat16",
        ratio=rig.median_ratio(seconds[1], seconds[0]),
        split_seconds=median(seconds[0]),
        whole_seconds=median(seconds[1]),
        round_trips_per_step=crossed.round_trips / steps,
        bytes_per_step=crossed.total_bytes / steps,
        bytes_over_floor=crossed.total_bytes / steps / floor,
        largest_loss_difference=max(abs(a["loss"] - b["loss"]) for a, b in zip(split, whole, strict=True)),
        batch=BATCH,
        length=LENGTH,
        repeats=REPEATS,
        threads=THREADS,
    )


if __name__ == "__main__":
    whole(*sys.argv[2:]) if sys.argv[1:2] == ["whole"] else main()
