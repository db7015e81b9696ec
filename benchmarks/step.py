"""A LoRA training step: cut over loopback gRPC with TLS against the same step of the whole model, in the same run.

Prints the ratio of speeds (whole's seconds / split's), bytes a step against their floor, and round trips a step.
"""

from __future__ import annotations

import time
from pathlib import Path
from statistics import median

import rig
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from noren.parties.client import Client
from noren.training.loop import Trainer, Training

BATCH, LENGTH, REPEATS, THREADS = 8, 128, 5, 2
HIDDEN, WIDTH = 768, 2  # elements a token, bytes an element


def main() -> None:
    """Measure and print."""
    torch.set_num_threads(THREADS)
    adapter = {"r": 8, "targets": ["q_proj", "v_proj"]}
    settings = Training(steps=1000, batch_size=BATCH, lr=1e-4)
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 32_000, (BATCH, LENGTH), generator=generator).tolist()
    rows = [{"input_ids": row, "attention_mask": [1] * LENGTH, "labels": row} for row in ids]
    with rig.scratch() as scratch:
        folder = Path(scratch)
        model = rig.llama(folder, "160M")
        values = {"model": str(model), "plan": rig.PLAN, "dtype": "bfloat16", "adapter": adapter}
        with rig.server(folder, values, THREADS) as document:
            client = Client(document)
            initial = client.save_adapter(folder / "initial")
            base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16)
            whole = PeftModel.from_pretrained(base, initial, is_trainable=True)
            split_trainer = Trainer(client.model, rows, [], settings, pad_id=0, seed=0, remote=client.remote())
            whole_trainer = Trainer(whole, rows, [], settings, pad_id=0, seed=0)
            losses: dict[str, list[float]] = {"split": [], "whole": []}

            def seconds(name: str, trainer: Trainer) -> float:
                started = time.perf_counter()
                losses[name].append(trainer.step([rows])[0])
                return time.perf_counter() - started

            before = client.traffic.copy()
            split, alone = rig.alternate(
                REPEATS, lambda: seconds("split", split_trainer), lambda: seconds("whole", whole_trainer)
            )
            crossed = client.traffic.since(before)
            client.close()
    steps, floor = REPEATS + 1, 4 * BATCH * LENGTH * HIDDEN * WIDTH
    rig.show(
        benchmark="step",
        shape="160M",
        dtype="bfloat16",
        ratio=rig.median_ratio(alone, split),
        split_seconds=median(split),
        whole_seconds=median(alone),
        round_trips_per_step=crossed.round_trips / steps,
        bytes_per_step=crossed.total_bytes / steps,
        bytes_over_floor=crossed.total_bytes / steps / floor,
        largest_loss_difference=max(abs(a - b) for a, b in zip(losses["split"], losses["whole"], strict=True)),
        batch=BATCH,
        length=LENGTH,
        repeats=REPEATS,
        threads=THREADS,
    )


if __name__ == "__main__":
    main()
