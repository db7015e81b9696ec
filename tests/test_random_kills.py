"""Clients, edge and server are killed at random moments, some in the middle of a write: the same adapters after all.

What each party has committed is noted by its own journal, step by step, so that a step that is lost or made twice is
seen as such, and not only by its weights.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load

from killing import Kill, Left, Runs, plan
from zygote import Zygote

CHAIN = ["client :2", "edge 2:4", "server 4:-2", "client -2:"]
U_SHAPED = ["client :2", "server 2:-2", "client -2:"]
CLOSE = 1e-4
"""A thirtieth of what a step moves a weight by: Adam divides rounding by its own size where gradients are nearly 0."""


def training(steps: int, **more: Any) -> dict[str, Any]:
    values = {"steps": steps, "batch_size": 2, "accumulate": 2, "lr": 3e-3, "weight_decay": 0.01}
    return values | {"evaluate_every": 3, "save_every": 5} | more


@pytest.fixture(scope="module")
def zygote() -> Iterator[Zygote]:
    with Zygote() as running:
        yield running


class Field:
    """Runs of one kind: undisturbed once, and with kills."""

    def __init__(self, zygote: Zygote, folder: Path, plan: list[str], clients: list[str], **values: Any) -> None:
        self.make = lambda name: Runs(zygote, folder / name, plan, clients, values)
        self.calm = self.make("calm").run([])
        check_steps(self.calm, values["training"]["steps"])

    def killed(self, seed: int, kills: list[Kill]) -> Left:
        runs = self.make(f"seed{seed}")
        try:
            left = runs.run(kills, seed)
        finally:
            print("\n| seed | victim | moment | last step | then |\n|---|---|---|---|---|", *runs.table, sep="\n")
        assert runs.kills == len(kills) and left.kept.keys() == self.calm.kept.keys()
        check_steps(left, runs.steps)
        return left


def check_steps(left: Left, steps: int) -> None:
    """Each step is there once, in order: in the metrics of each client, and in what each party has committed."""
    for client, metrics in left.metrics.items():
        assert [step for step, what, _ in metrics if what == "loss"] == list(range(1, steps + 1)), client
    for (party, run), lives in left.kept.items():
        first, *later = lives
        if party in left.metrics:  # a client notes its state several times within a step
            first = [step for step, _ in groupby(first)][1:]
        assert first == list(range(1, steps + 1)), (party, run, lives)
        # a client that was killed after it had closed the run sets it up again, as it was at its end
        assert all(life == [steps] for life in later), (party, run, lives)


def check_same(left: Left, calm: Left) -> None:
    """Bit for bit: adapters of all parties, moments, random numbers, losses, norms, evaluations."""
    assert left.metrics == calm.metrics
    assert left.adapters == calm.adapters
    for client, state in left.states.items():
        assert state.keys() == calm.states[client].keys()
        for name, tensor in state.items():
            assert torch.equal(tensor, calm.states[client][name]), name


@pytest.mark.parametrize(
    ("steps", "kills", "seeds"),
    [
        pytest.param(8, 4, [70], id="short"),
        pytest.param(30, 10, [101, 102, 103], id="long", marks=[pytest.mark.nightly]),
    ],
)
@pytest.mark.timeout(1800)
def test_kills_in_a_chain(steps: int, kills: int, seeds: list[int], zygote: Zygote, tmp_path: Path) -> None:
    values = {"adapter": {"r": 4, "dropout": 0.1}, "training": training(steps)}
    field = Field(zygote, tmp_path, CHAIN, ["client"], **values)
    for seed in seeds:
        left = field.killed(seed, plan(seed, kills, ["client", "edge", "server"], steps))
        check_same(left, field.calm)


def apart(left: Left, calm: Left) -> tuple[float, float]:
    """The largest differences from the undisturbed run: of a weight of an adapter, and of a step's loss.

    Not of an evaluation: in a client-batch, one that is made again may see the shared adapter a step later.
    """
    weights = losses = 0.0
    for client, files in left.adapters.items():
        mine, other = (load(files["adapter_model.safetensors"]) for files in (files, calm.adapters[client]))
        assert (
            mine.keys() == other.keys() and files["adapter_config.json"] == calm.adapters[client]["adapter_config.json"]
        )
        weights = max(weights, *(float((tensor - other[name]).abs().max()) for name, tensor in mine.items()))
        lines = zip(left.metrics[client], calm.metrics[client], strict=True)
        for (step, what, value), (step_there, what_there, value_there) in lines:
            assert (step, what) == (step_there, what_there)
            losses = max(losses, abs(value - value_there)) if what == "loss" else losses
    return weights, losses


GROUPS: dict[str, tuple[dict[str, Any], float, float, list[int]]] = {
    "hierarchical": ({"mode": "server-hierarchical", "every": 4}, 0.1, 0.0, [211, 212]),
    "hierarchical-joined": ({"mode": "server-hierarchical", "every": 4}, 0.0, CLOSE, [221, 222]),
    "batch": ({"mode": "client-batch"}, 0.1, CLOSE, [241, 245]),
}
"""[together], dropout, how far apart adapters and losses may be, and seeds.

Replicas that are computed each by itself (dropout draws from each run's own seed) and averaged in the order of their
names are the same bit for bit. What is computed in one pass with whoever waits at that moment, and gradients that are
summed as they come, are the same but for rounding.
"""


@pytest.mark.nightly
@pytest.mark.parametrize("kind", GROUPS)
@pytest.mark.timeout(1800)
def test_kills_in_a_group(kind: str, zygote: Zygote, tmp_path: Path) -> None:
    """Two clients that train together on one server: each step of each, and of what they share, is there once."""
    together, dropout, most, seeds = GROUPS[kind]
    steps, accumulate = 24, 1 if together["mode"] == "client-batch" else 2
    values = {"adapter": {"r": 4, "dropout": dropout}, "training": training(steps, accumulate=accumulate)}
    field = Field(zygote, tmp_path, U_SHAPED, ["c0", "c1"], **values, together=together | {"clients": 2})
    for seed in seeds:
        left = field.killed(seed, plan(seed, 5, ["c0", "c1", "server"], steps))
        weights, losses = apart(left, field.calm)
        print(f"{kind}, seed {seed}: apart by {weights:.1e} (weights), {losses:.1e} (losses)")
        assert max(weights, losses) <= most
        if not most:
            check_same(left, field.calm)
