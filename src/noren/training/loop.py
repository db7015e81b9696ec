"""The client's training loop: an ordinary PyTorch loop, which does not know that the model is cut.

The same loop trains the whole model in one process; that is how the two are compared. Stepping the remote adapters is
the optimiser's own doing (partition.steps).
"""

from __future__ import annotations

import logging
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

import msgspec
import torch
from torch import Tensor, nn

from noren.errors import ConfigError, TooLate
from noren.training.batches import IGNORED, Row, batches, collate
from noren.training.journal import StepJournal
from noren.training.overlap import Baton, cut, side_by_side
from noren.training.saved import Saved

TOO_OFTEN = 5
log = logging.getLogger("noren.training")


class Training(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How to train (`[training]` in a run document)."""

    epochs: float = 1.0
    steps: int | None = None  # optimiser steps; if given, `epochs` is not used
    batch_size: int = 8
    accumulate: int = 1  # batches whose gradients make one step
    micro_batches: int = 1  # parts of each batch that are under way at once, so that nobody waits for the link
    lr: float = 2e-4
    optimizer: Literal["adamw", "adam", "sgd"] = "adamw"
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    schedule: Literal["constant", "linear", "cosine", "constant_with_warmup"] = "linear"
    warmup: int = 0  # steps
    clip: float = 1.0  # of the gradient's L2 norm over all stages; 0: no clipping
    save_every: int = 50  # steps between checkpoints; 0: only at the end
    evaluate_every: int = 0  # steps between evaluations on the held-out data; 0: only before and after

    def __post_init__(self) -> None:
        for name in ("batch_size", "accumulate", "micro_batches"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1")
        for name in ("weight_decay", "clip", "warmup", "save_every", "evaluate_every"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative")
        if not (self.lr > 0 and math.isfinite(self.lr)):
            raise ValueError("lr must be above 0")
        if not all(math.isfinite(value) for value in (self.clip, self.weight_decay, self.epochs)):
            raise ValueError("clip, weight_decay and epochs must be finite")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas {list(self.betas)} must be at least 0 and below 1")
        if (self.steps is not None and self.steps < 1) or self.epochs <= 0:
            raise ValueError("steps must be at least 1, epochs above 0")


@dataclass(frozen=True)
class Progress:
    """One optimiser step that is done."""

    step: int
    steps: int
    loss: float
    norm: float  # of the gradient over all stages, before clipping
    tokens: int  # real tokens in the step
    seconds: float


@dataclass
class Outcome:
    """What a training run did."""

    losses: list[float] = field(default_factory=list)  # one a step
    evaluations: dict[int, float] = field(default_factory=dict)  # step -> mean loss on held-out data
    step: int = 0
    interrupted: bool = False


class Remote:
    """What the loop needs of, and says about, the remote parties. The whole model has none."""

    def pull(self) -> dict[str, Tensor]:
        """Return adapters and optimiser moments of the remote stages."""
        return {}

    def push(self, tensors: dict[str, Tensor], step: int) -> None:
        """Set what `pull` returned."""

    def flush(self) -> None:
        """Send a step that waits."""

    def batch(self, numbers: list[int] | None, targets: int) -> None:
        """Say which rows the next forward pass is of, by their place in the data, and the targets of the whole step."""

    def loss(self, model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
        """Return the mean loss over the targets of a batch."""
        result: Tensor = model(**inputs).loss
        return result

    @contextmanager
    def overlapping(self, baton: Baton, parts: int) -> Iterator[None]:
        """Within it, answers are waited for with `baton.waiting`, and graphs of several parts end at the cut."""
        yield

    def take_back(self) -> None:
        """Take the gradient of a part that ended at the cut across it, and back through this party's first layers."""

    def give_up(self) -> None:
        """Let nobody wait any more for an answer that is under way."""

    def enter(self, stop: threading.Event) -> None:
        """Take part in the training of a group, once it is this client's turn; or not, if `stop` is set before."""

    def leave(self) -> None:
        """Take no part any more."""

    def averages_after(self, step: int) -> bool:
        """Whether what the group's clients have learned is averaged after that step."""
        return False

    def average(self, step: int, tokens: int, samples: int) -> None:
        """Average it, weighted by what this client learned from since the last time."""

    def position(self) -> bytes:
        """Return where the run stands at the remote parties, for `go_on`."""
        return b""

    def go_on(self, position: bytes) -> bool:
        """Go on from there; False if the remote parties hold another state by now."""
        return True


class Trainer:
    """Trains the parameters of `model` that require gradients on `rows`.

    `checkpoint`: the folder of the run's state (written whole or not at all), None to keep none. `journal` keeps this
    party's own state after every step, so that a run which was killed goes on from the step it was in.
    """

    def __init__(
        self,
        model: nn.Module,
        rows: Sequence[Row],
        held_out: Sequence[Row],
        settings: Training,
        *,
        pad_id: int,
        seed: int,
        remote: Remote | None = None,
        checkpoint: Path | None = None,
        journal: StepJournal | None = None,
        report: Callable[[Progress], None] | None = None,
    ) -> None:
        if not rows:
            raise ConfigError("data: there is nothing to train on")
        self.model, self.rows, self.held_out, self.settings = model, rows, held_out, settings
        self._pad, self._seed, self._remote = pad_id, seed, remote or Remote()
        self._report = report or (lambda progress: None)
        self.parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
        if not self.parameters:
            raise ConfigError("nothing to train: no party has an adapter; give the run document an [adapter]")
        per_epoch = math.ceil(math.ceil(len(rows) / settings.batch_size) / settings.accumulate)
        self.steps = settings.steps or max(1, math.ceil(settings.epochs * per_epoch))
        self.optimizer = self._make_optimizer()
        self.schedule = self._make_schedule()
        self.outcome = Outcome()
        self.averaged, self.since = 0, (0, 0)  # step of the last average; tokens and samples since
        self.exposed = 0.0  # seconds of the last step in which this party did nothing but wait for an answer
        self._saved = Saved(self, self._remote, checkpoint, journal)
        self._stop = threading.Event()

    def _make_optimizer(self) -> torch.optim.Optimizer:
        s, parameters = self.settings, list(self.parameters.values())
        if s.optimizer == "sgd":
            return torch.optim.SGD(parameters, lr=s.lr, weight_decay=s.weight_decay)
        kind = torch.optim.AdamW if s.optimizer == "adamw" else torch.optim.Adam
        return kind(parameters, lr=s.lr, weight_decay=s.weight_decay, betas=s.betas)

    def _make_schedule(self) -> Any:
        from transformers import get_scheduler

        s = self.settings
        return get_scheduler(s.schedule, self.optimizer, num_warmup_steps=s.warmup, num_training_steps=self.steps)

    def run(self) -> Outcome:
        """Train to the last step, evaluating before and after; returns what happened.

        Ctrl-C finishes the step at hand, writes a checkpoint and returns with `interrupted` set.
        """
        if self.outcome.step == 0 and not self.outcome.evaluations:
            self.evaluate()
            self._saved.note()
        with _interrupts(self._stop):
            if self.outcome.step < self.steps:  # else nobody need be waited for
                self._remote.enter(self._stop)
            if stopped := self._stop.is_set():  # before its turn came
                self.outcome.interrupted = self.outcome.step < self.steps
            else:
                self._between_steps()  # if the run was ended just before that
            for numbers in () if stopped else self._plan():
                started = time.perf_counter()
                loss, norm, tokens = self._made([[self.rows[i] for i in batch] for batch in numbers], numbers)
                done = self.outcome
                done.losses.append(loss)
                done.step += 1
                self.since = (self.since[0] + tokens, self.since[1] + sum(map(len, numbers)))
                self._report(Progress(done.step, self.steps, loss, norm, tokens, time.perf_counter() - started))
                self._saved.note()
                self._between_steps()
                if self._stop.is_set():
                    done.interrupted = done.step < self.steps
                    break
                if (every := self.settings.save_every) and done.step % every == 0 and done.step < self.steps:
                    self.save()
            self._remote.flush()
            self._saved.note()
            self._remote.leave()
            if not self.outcome.interrupted:
                self.evaluate()
            self.save()
        return self.outcome

    def _made(self, batch: list[list[Row]], numbers: list[list[int]]) -> tuple[float, float, int]:
        """Make a step; again, with the same dropout, if the group went on without it."""
        random = torch.get_rng_state()
        for _ in range(TOO_OFTEN):
            try:
                return self.step(batch, numbers)
            except TooLate as error:
                log.warning("%s", error)
                torch.set_rng_state(random)
        return self.step(batch, numbers)

    def _between_steps(self) -> None:
        """Average with the group, and evaluate, where that is due and was not done."""
        step, every = self.outcome.step, self.settings.evaluate_every
        if step and self.averaged != step and self._remote.averages_after(step):
            self._remote.average(step, *self.since)
            self.averaged, self.since = step, (0, 0)
            self._saved.note()
        if every and 0 < step < self.steps and step % every == 0 and step not in self.outcome.evaluations:
            self.evaluate()

    def step(self, batch: list[list[Row]], numbers: list[list[int]] | None = None) -> tuple[float, float, int]:
        """One optimiser step on some batches of rows: returns (loss, gradient norm before clipping, real tokens).

        `numbers`: the rows' places in the data, if that is where they are from.
        """
        self.model.train()
        self.optimizer.zero_grad()
        total = sum(_targets(row) for rows in batch for row in rows)
        loss, self.exposed = 0.0, 0.0
        for i, rows in enumerate(batch):
            for share in self._learn(rows, numbers[i] if numbers is not None else None, total):
                loss += share
        limit = self.settings.clip or math.inf
        norm = float(nn.utils.clip_grad_norm_(list(self.parameters.values()), limit))
        self.optimizer.step()
        self.schedule.step()
        return loss, norm, sum(len(row["input_ids"]) for rows in batch for row in rows)

    def _learn(self, rows: list[Row], numbers: list[int] | None, targets: int) -> list[float]:
        """Add the gradients of a batch to those of the step; returns the share of each of its parts in the loss."""
        parts = cut([len(row["input_ids"]) for row in rows], self.settings.micro_batches)
        baton, shares = Baton(len(parts)), [0.0] * len(parts)

        def forward(part: slice) -> Tensor:
            self._remote.batch(numbers[part] if numbers is not None else None, targets)
            return self.loss(rows[part]) * (sum(map(_targets, rows[part])) / max(targets, 1))

        def work(number: int) -> None:
            with baton.crossing():
                share = forward(parts[number])
            share.backward(retain_graph=True)  # what layers on both sides of the cut share is used again
            shares[number] = float(share.detach())
            del share
            with baton.crossing():
                self._remote.take_back()

        with self._remote.overlapping(baton, len(parts)):
            if len(parts) > 1:
                side_by_side(baton, [partial(work, number) for number in range(len(parts))], self._remote.give_up)
            else:
                share = forward(parts[0])
                share.backward()
                shares = [float(share.detach())]
        self.exposed += baton.exposed
        return shares

    def loss(self, rows: list[Row]) -> Tensor:
        """Mean loss over the targets of some rows."""
        device = next(iter(self.parameters.values())).device
        inputs = {k: v.to(device) for k, v in collate(rows, self._pad).items()}
        return self._remote.loss(self.model, inputs)

    @torch.no_grad()
    def evaluate(self) -> float | None:
        """Return (and note) the mean loss over the targets of the held-out rows; None without any."""
        if not self.held_out:
            return None
        self.model.eval()
        size, total, targets = self.settings.batch_size, 0.0, 0
        for start in range(0, len(self.held_out), size):
            rows = list(self.held_out[start : start + size])
            count = sum(_targets(row) for row in rows)
            total += float(self.loss(rows)) * count
            targets += count
        self.outcome.evaluations[self.outcome.step] = total / max(targets, 1)
        return total / max(targets, 1)

    def _plan(self) -> Iterator[list[list[int]]]:
        """The batches of every step still to do, as numbers of rows; the same for the same seed, wherever resumed."""
        step, epoch = 0, 0
        while step < self.steps:
            order = batches(self.rows, self.settings.batch_size, self._seed, epoch)
            for start in range(0, len(order), self.settings.accumulate):
                if step >= self.steps:
                    return
                if step >= self.outcome.step:
                    yield order[start : start + self.settings.accumulate]
                step += 1
            epoch += 1

    def save(self) -> None:
        """Write the run's state as a checkpoint: adapters and optimisers of all parties, position, random numbers."""
        self._saved.save()

    def resume(self) -> int:
        """Continue a run that ended early: returns its step. Raises ModelError if what was kept does not fit this run.

        From the journal if the remote parties are where it left them; else all go back to the last checkpoint.
        """
        return self._saved.resume()


def _targets(row: Row) -> int:
    """How many predictions of a row count in the loss."""
    labels = row.get("labels")
    return 1 if labels is None else sum(label != IGNORED for label in labels[1:])


@contextmanager
def _interrupts(stop: threading.Event) -> Iterator[None]:
    """Turn the first Ctrl-C into a request to stop; the second interrupts at once."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(signal.SIGINT)

    def ask(number: int, frame: Any) -> None:
        stop.set()
        signal.signal(signal.SIGINT, before)

    signal.signal(signal.SIGINT, ask)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
