"""What is kept of a training loop: its state after every step in a journal, and all parties' in a checkpoint."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from noren.adapters.checkpoint import replacing, settle
from noren.errors import ModelError
from noren.training.journal import Kept, StepJournal


class Outcome(Protocol):
    """What the loop has done (see loop.Outcome)."""

    losses: list[float]
    evaluations: dict[int, float]
    step: int


class Loop(Protocol):
    """What there is to keep (see loop.Trainer)."""

    parameters: dict[str, nn.Parameter]
    optimizer: torch.optim.Optimizer
    schedule: Any
    steps: int
    averaged: int
    since: tuple[int, int]

    @property
    def outcome(self) -> Outcome:
        """What the loop has done."""


class Remote(Protocol):
    """What the remote parties keep (see loop.Remote)."""

    def pull(self) -> dict[str, Tensor]:
        """Return adapters and optimiser moments of the remote stages."""

    def push(self, tensors: dict[str, Tensor], step: int) -> None:
        """Set what `pull` returned."""

    def flush(self) -> None:
        """Send a step that waits."""

    def position(self) -> bytes:
        """Return where the run stands at the remote parties."""

    def go_on(self, position: bytes) -> bool:
        """Go on from there; False if the remote parties hold another state by now."""


class Saved:
    """The state of one loop, in the folder `checkpoint` and in a journal; None: it is not kept there."""

    def __init__(self, loop: Loop, remote: Remote, checkpoint: Path | None, journal: StepJournal | None) -> None:
        self._loop, self._remote = loop, remote
        self._checkpoint, self._journal = checkpoint, journal

    def save(self) -> None:
        """Write the run's state as a checkpoint: adapters and optimisers of all parties, position, random numbers."""
        if self._checkpoint is None:
            return
        self._remote.flush()
        self.note()
        tensors = self._tensors() | {f"remote/{name}": t for name, t in self._remote.pull().items()}
        with replacing(self._checkpoint) as draft:
            save_file(tensors, draft / "state.safetensors")
            (draft / "state.json").write_text(json.dumps(self._words()) + "\n")

    def resume(self) -> int:
        """Continue a run that ended early: returns its step. Raises ModelError if what was kept does not fit this run.

        From the journal if the remote parties are where it left them; else all go back to the last checkpoint.
        """
        kept = self._journal.read() if self._journal is not None else None
        if kept is not None and self._remote.go_on(kept.position):
            self._set(kept.words, kept.tensors, str(self._journal))
            return self._loop.outcome.step
        if self._checkpoint is not None:
            settle(self._checkpoint)
        if self._checkpoint is None or not (self._checkpoint / "state.json").is_file():
            raise ModelError(
                f"{self._checkpoint}: no checkpoint to resume from"
                + (", and the servers no longer hold this run" if kept is not None else "")
                + "; start without --resume, under another name"
            )
        words = json.loads((self._checkpoint / "state.json").read_text())
        tensors = load_file(self._checkpoint / "state.safetensors")
        self._set(words, tensors, str(self._checkpoint))
        remote = {k.removeprefix("remote/"): t for k, t in tensors.items() if k.startswith("remote/")}
        self._remote.push(remote, words["step"])
        self.note(restarted=True)
        return self._loop.outcome.step

    def note(self, *, restarted: bool = False) -> None:
        """Keep this party's own state, and where the remote parties are."""
        if self._journal is not None:
            state = Kept(self._words(), self._tensors(), self._remote.position())
            self._journal.write(state, restarted=restarted)

    def _tensors(self) -> dict[str, Tensor]:
        """The adapters of this party, its optimiser's moments, and its random numbers."""
        loop = self._loop
        tensors = {f"client/{name}": p.detach().clone() for name, p in loop.parameters.items()}
        for name, parameter in loop.parameters.items():
            for kind, value in loop.optimizer.state.get(parameter, {}).items():
                if isinstance(value, Tensor):
                    tensors[f"moments/{kind}/{name}"] = value.detach().clone()
        tensors["losses"] = torch.tensor(loop.outcome.losses, dtype=torch.float64)
        return tensors | {"random": torch.get_rng_state()}

    def _words(self) -> dict[str, Any]:
        loop, done = self._loop, self._loop.outcome
        return {
            "step": done.step,
            "steps": loop.steps,
            "schedule": loop.schedule.state_dict(),
            "averaged": loop.averaged,
            "since": list(loop.since),
            "evaluations": {str(k): v for k, v in done.evaluations.items()},
        }

    def _set(self, words: dict[str, Any], tensors: dict[str, Tensor], where: str) -> None:
        loop, done = self._loop, self._loop.outcome
        for name, parameter in loop.parameters.items():
            saved = tensors.get(f"client/{name}")
            if saved is None or saved.shape != parameter.shape:
                raise ModelError(f"{where} is of another run: {name!r} is missing or has another shape")
        if words["steps"] != loop.steps:
            raise ModelError(f"{where} is of a run of {words['steps']} steps, this one has {loop.steps}")
        with torch.no_grad():
            for name, parameter in loop.parameters.items():
                parameter.copy_(tensors[f"client/{name}"])
        for name, parameter in loop.parameters.items():
            moments = {
                k.split("/")[1]: t for k, t in tensors.items() if k.startswith("moments/") and k.endswith(f"/{name}")
            }
            if moments:
                loop.optimizer.state[parameter] = moments
        loop.schedule.load_state_dict(words["schedule"])
        for group, rate in zip(loop.optimizer.param_groups, loop.schedule.get_last_lr(), strict=True):
            group["lr"] = rate
        torch.set_rng_state(tensors["random"])
        loop.averaged, loop.since = words.get("averaged", 0), tuple(words.get("since", (0, 0)))
        done.losses, done.step = tensors["losses"].tolist(), words["step"]
        done.evaluations = {int(k): v for k, v in words["evaluations"].items()}
