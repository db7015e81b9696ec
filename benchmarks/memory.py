"""Peak memory of each party that trains, against what `noren plan` predicts.

    python benchmarks/memory.py [--cases 0,1,2,3,4]

Real processes: clients that train (`memory.py client RUN.toml`), an edge and a server (`noren serve`). A party's peak
is its highest resident memory as the kernel has it (VmHWM), which counts pages that it shares with others; what it
shares with nobody at the end is told beside it. Weights are random, of Llama's shapes.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import _rig as rig
import torch

from noren.config import Document
from noren.metrics import peak_memory, private_memory
from noren.parties.client import Client
from noren.training.batches import Row
from noren.training.loop import Trainer, Training
from noren.wire.identity import ensure

PLAN = "client :2, edge 2:4, server 4:-2, client -2:"
CASES = [
    {"shape": "30M", "dtype": "float32", "file": "float32", "batch": 8, "clients": 1},
    {"shape": "30M", "dtype": "float32", "file": "float32", "batch": 8, "clients": 4},
    {"shape": "160M", "dtype": "bfloat16", "file": "bfloat16", "batch": 8, "clients": 1},
    {"shape": "160M", "dtype": "bfloat16", "file": "bfloat16", "batch": 4, "clients": 4},
    {"shape": "160M", "dtype": "float32", "file": "bfloat16", "batch": 2, "clients": 1},
]
LENGTH, STEPS = 128, 2
TARGETS = ["q_proj", "v_proj"]


def client(path: str) -> None:
    """Train a few steps, and print the peak."""
    document = Document.read(Path(path))
    settings: Training = document.run.training
    torch.set_num_threads(1)
    ids = torch.randint(3, 32_000, (settings.batch_size, LENGTH)).tolist()
    rows: list[Row] = [{"input_ids": row, "attention_mask": [1] * LENGTH, "labels": row} for row in ids]
    party = Client(document)
    trainer = Trainer(party.model, rows, [], settings, pad_id=0, seed=0, remote=party.remote())
    for _ in range(STEPS):
        trainer.step([rows])
    party.close()
    print(json.dumps({"peak": peak_memory(), "private": private_memory()}), flush=True)


def predicted(model: Path, case: dict[str, Any]) -> dict[str, int]:
    """What `noren plan` says, by party."""
    command = [sys.executable, "-m", "noren.cli.main", "plan", str(model), "--plan", PLAN, "--dtype", case["dtype"]]
    command += ["--batch", str(case["batch"]), "--length", str(LENGTH), "--clients", str(case["clients"]), "--json"]
    told = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    return {row["party"]: row["peak"] for row in told["memory"]}


def measured(folder: Path, model: Path, case: dict[str, Any]) -> dict[str, dict[str, int]]:
    """Peaks of real processes, by party; of several clients the highest."""
    values: dict[str, Any] = {
        "model": str(model), "plan": PLAN.split(", "), "dtype": case["dtype"],
        "adapter": {"r": 8, "targets": TARGETS}, "training": {"batch_size": case["batch"], "steps": STEPS},
    }  # fmt: skip
    pids: list[int] = []
    with ExitStack() as stack:
        for party in ("server", "edge"):
            document = stack.enter_context(rig.server(folder, values, 1, pids, party))
            values["links"] = document.run.links
        running = []
        for number in range(case["clients"]):
            ensure(folder / "keys", f"c{number}", "client")
            path = folder / f"c{number}.toml"
            keys = {"dir": str(folder / "keys"), "name": f"c{number}"}
            path.write_text(Document.of(values | {"keys": keys}, folder).to_toml())
            command = [sys.executable, __file__, "client", str(path)]
            environment = os.environ | {"OMP_NUM_THREADS": "1"}
            running.append(subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment))
        told = [json.loads(process.communicate()[0]) for process in running]
        out = {"client": max(told, key=lambda one: one["peak"])}
        for party, pid in zip(("server", "edge"), pids, strict=True):
            out[party] = {"peak": peak_memory(pid), "private": private_memory(pid)}
    return out


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", default=list(range(len(CASES))), type=lambda text: [int(n) for n in text.split(",")])
    rows: list[dict[str, Any]] = []
    for number in parser.parse_args().cases:
        case = CASES[number]
        with rig.scratch() as scratch:
            folder = Path(scratch)
            model = rig.llama(folder, str(case["shape"]), dtype=getattr(torch, str(case["file"])))
            said, found = predicted(model, case), measured(folder, model, case)
        for party, figures in found.items():
            row = {"party": party, "predicted": said[party], "measured": figures["peak"], "private": figures["private"]}
            rows.append(case | row | {"ratio": round(said[party] / figures["peak"], 3)})
    ratios = [row["ratio"] for row in rows]
    worst = max(ratios, key=lambda ratio: max(ratio, 1 / ratio))
    rig.show(benchmark="memory", length=LENGTH, plan=PLAN, worst_ratio=worst, rows=rows)


if __name__ == "__main__":
    client(sys.argv[2]) if sys.argv[1:2] == ["client"] else main()
