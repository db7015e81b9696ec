"""A training run from its document: data, client, loop, and the files that are kept.

`train` is the whole of it; the command line and the demonstration only report. In `document.out` are kept:

    run.toml          the document with every value filled in
    metrics.jsonl     one line a step, then one line an evaluation
    journal/          this party's state after every step, and what it sent in the step at hand
    checkpoint/       all parties' state, for when the servers lost theirs
    adapter/          the adapters of all parties, a PEFT folder for the whole model
    labels.json       sequence-classification: the label names, in the order of their numbers
"""

from __future__ import annotations

import json
import math
import os
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from noren.adapters.checkpoint import settle
from noren.config import Document
from noren.errors import ConfigError, ModelError
from noren.parties.client import Client
from noren.parties.policy import read_policy
from noren.parties.remote_state import incarnation_of
from noren.partition.slices import SIDE_FILES
from noren.partition.sources import open_checkpoint
from noren.training.batches import Row, collate, encode, padding_id
from noren.training.data import read_examples, split_holdout
from noren.training.journal import StepJournal
from noren.training.loop import Outcome, Progress, Trainer
from noren.types import Handler
from noren.wire.journal import Journal
from noren.wire.traffic import Traffic


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """Private data as rows of tokens. `labels` are those of sequence-classification, else empty."""

    rows: list[Row]
    held_out: list[Row]
    labels: list[str]
    pad_id: int
    dropped: int
    truncated: int


@dataclass(frozen=True, kw_only=True)
class Metrics:
    """One optimiser step: its loss, and what it took."""

    step: int
    loss: float
    norm: float  # of the gradient over all stages, before clipping
    tokens_per_second: float
    bytes_up: int
    bytes_down: int
    round_trips: int
    exposed_seconds: float  # in which the client did nothing but wait for the link


@dataclass(frozen=True, kw_only=True)
class Trained:
    """A training run that is over, or that was interrupted (`outcome.interrupted`)."""

    outcome: Outcome
    steps: int
    out: Path
    adapter: Path | None  # None if interrupted
    accuracy: dict[int, float]  # step -> share of held-out rows classified right; sequence-classification only
    prepared: Prepared
    traffic: Traffic
    exposed_seconds: float  # of its steps, in which the client did nothing but wait for the link


Report = Callable[[Metrics, Progress], None]


def train(
    document: Document,
    *,
    resume: bool = False,
    report: Report | None = None,
    handler: Handler | None = None,
    tokenizer: Any = None,
    insecure: bool = False,
) -> Trained:
    """Train as a run document says, and keep the run in `document.out`.

    Args:
        document: the run; needs [data] and [adapter].
        resume: continue a run that was interrupted or killed.
        report: called after every step.
        handler: answers in place of the network (see `Client`).
        tokenizer: of the model, if the caller has it already.
        insecure: connect in plain text, without certificates.

    Ctrl-C finishes the step at hand, writes a checkpoint and returns with `outcome.interrupted` set. Raises
    ConfigError (also for a run that is there already), DataError, ModelError, LinkError, or PeerError.
    """
    out, checkpoint = document.out, document.out / "checkpoint"
    _check(document, checkpoint, resume)
    prepared = prepare(document, tokenizer or load_tokenizer(document.model))
    policy = read_policy()
    policy.check_epochs(epochs(document, len(prepared.rows)))
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"out: {out} cannot be a folder for the run ({error.strerror}); name another") from error
    with Journal(out / "journal") as journal:
        kept = StepJournal(journal, document.run.name).read()
        if kept is None:  # what an attempt that came to nothing has left
            stale = [key for key in journal.keys(document.run.name) if key.startswith("sent/")]
            if not resume and journal.runs() not in ([], [document.run.name]):
                raise _there_already(document)
            journal.write(document.run.name, {}, drop=stale)  # the count of what has left, and the secret, stay
        elif not resume:
            raise _there_already(document)
        client = Client(
            document, handler, labels=prepared.labels or None, pad_id=prepared.pad_id, policy=policy, journal=journal,
            resume=incarnation_of(kept.position) if kept else "", insecure=insecure,
        )  # fmt: skip
        return _train(document, client, prepared, journal, resume, report)


def _train(
    document: Document, client: Client, prepared: Prepared, journal: Journal, resume: bool, report: Report | None
) -> Trained:
    out = document.out
    try:
        metrics = out / "metrics.jsonl"
        trainer = MeasuredTrainer(
            client.model, prepared.rows, prepared.held_out, document.run.training, pad_id=prepared.pad_id,
            seed=document.run.seed, remote=client.remote(), checkpoint=out / "checkpoint",
            journal=StepJournal(journal, document.run.name),
            report=lambda progress: note(progress),
        )  # fmt: skip
        trainer.traffic = client.traffic

        def note(progress: Progress) -> None:
            line = trainer.measured(progress)
            _append(metrics, asdict(line))
            if report is not None:
                report(line, progress)

        if (done := _over(StepJournal(journal, document.run.name), out)) is not None:
            return Trained(
                outcome=done, steps=done.step, out=out, adapter=out / "adapter", accuracy={}, prepared=prepared,
                traffic=client.traffic.copy(), exposed_seconds=0.0,
            )  # fmt: skip
        _keep_steps(metrics, trainer.resume() if resume else 0)
        (out / "run.toml").write_text(document.to_toml(), encoding="utf-8")
        if prepared.labels:
            (out / "labels.json").write_text(json.dumps(prepared.labels, ensure_ascii=False) + "\n", encoding="utf-8")
        accuracy = {} if trainer.outcome.evaluations else _accuracy(trainer, prepared)
        outcome = trainer.run()
        adapter = None
        if not outcome.interrupted:
            accuracy |= _accuracy(trainer, prepared)
            _append(metrics, *_evaluations(outcome, accuracy))
            adapter = client.save_adapter(out / "adapter")  # the last that is written: where it is, the run is over
        return Trained(
            outcome=outcome, steps=trainer.steps, out=out, adapter=adapter, accuracy=accuracy, prepared=prepared,
            traffic=client.traffic.copy(), exposed_seconds=trainer.waited,
        )  # fmt: skip
    finally:
        client.close()


def _over(journal: StepJournal, out: Path) -> Outcome | None:
    """What a run has come to that was killed when all of it was here; the servers need not hold it any more."""
    kept = journal.read()
    settle(out / "adapter")
    if kept is None or kept.words["step"] < kept.words["steps"] or not (out / "adapter").is_dir():
        return None
    evaluations = {int(step): loss for step, loss in kept.words["evaluations"].items()}
    return Outcome(kept.tensors["losses"].tolist(), evaluations, kept.words["step"])


def prepare(document: Document, tokenizer: Any) -> Prepared:
    """Read the private data of a run as rows of tokens. Raises ConfigError or DataError."""
    run = document.run
    if run.data is None:
        raise ConfigError('the run document has no [data]; say where it is, e.g. path = "notes.jsonl"')
    examples, labels = read_examples(run.data, run.task, document.base)
    if run.task == "sequence-classification" and len(labels) < 2:
        raise ConfigError(f"data: the column {run.data.label!r} holds one label, {labels[0]!r}; two or more are needed")
    learned, kept = split_holdout(examples, run.data.holdout, run.seed)
    rows = encode(learned, tokenizer, run.task, run.data.max_length)
    held_out = encode(kept, tokenizer, run.task, run.data.max_length)
    return Prepared(
        rows=rows.rows, held_out=held_out.rows, labels=labels, pad_id=padding_id(tokenizer),
        dropped=rows.dropped + held_out.dropped, truncated=rows.truncated + held_out.truncated,
    )  # fmt: skip


def load_tokenizer(model: str) -> Any:
    """Return the tokenizer of a model: a folder, a hub id, or a URL. Raises ModelError if it has none."""
    from transformers import AutoTokenizer

    try:
        if not model.startswith(("http://", "https://")):
            return AutoTokenizer.from_pretrained(model)
        checkpoint = open_checkpoint(model)
        with tempfile.TemporaryDirectory(prefix="noren-tokenizer-") as folder:
            for name in ("config.json", *(name for name in SIDE_FILES if not name.endswith(".model"))):
                if (text := checkpoint.text(name)) is not None:
                    (Path(folder) / name).write_text(text, encoding="utf-8")
            return AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError, KeyError) as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ModelError(f"{model}: its tokenizer cannot be read ({first}); is tokenizer.json there?") from error


def _check(document: Document, checkpoint: Path, resume: bool) -> None:
    """Raise ConfigError for what can be seen before anything is read or connected."""
    if document.run.adapter is None:
        raise ConfigError("the run document has no [adapter], so there is nothing to train; add one, e.g. r = 8")
    if checkpoint.parent.is_dir():
        settle(checkpoint)
    there = (checkpoint / "state.json").is_file()
    if there and not resume:
        raise _there_already(document)
    ours = there or (document.out / "journal" / "lock").is_file()
    held = sorted(path.name for path in document.out.iterdir()) if document.out.is_dir() else []
    if held and not ours:
        raise ConfigError(
            f"out: {document.out} is not empty (it holds {held[0]!r}), and what it holds is no run that could go on; "
            "name another folder, or empty this one"
        )
    if resume and not there and not (document.out / "journal").is_dir():
        raise ConfigError(f"{checkpoint}: no checkpoint to resume from; start without --resume")


def _there_already(document: Document) -> ConfigError:
    return ConfigError(f"{document.out} holds a run already; continue it with --resume, or choose another name")


def epochs(document: Document, rows: int) -> float:
    """How often a run goes over its data."""
    settings = document.run.training
    if settings.steps is None:
        return settings.epochs
    return settings.steps * settings.accumulate / math.ceil(rows / settings.batch_size)


class MeasuredTrainer(Trainer):
    """The training loop, noting what crosses in each step, evaluations and checkpoints left out."""

    traffic: Traffic
    waited = 0.0  # seconds of all steps in which the client did nothing but wait for the link

    def step(self, batch: list[list[Row]], numbers: list[list[int]] | None = None) -> tuple[float, float, int]:
        """One optimiser step, counted."""
        before = self.traffic.copy()
        result = super().step(batch, numbers)
        self._crossed = self.traffic.since(before)
        self.waited += self.exposed
        return result

    def measured(self, progress: Progress) -> Metrics:
        """Return the metrics of the step that was done last."""
        return Metrics(
            step=progress.step, loss=progress.loss, norm=progress.norm,
            tokens_per_second=progress.tokens / max(progress.seconds, 1e-9),
            bytes_up=self._crossed.sent_bytes, bytes_down=self._crossed.received_bytes,
            round_trips=self._crossed.round_trips, exposed_seconds=self.exposed,
        )  # fmt: skip


def _append(path: Path, *records: dict[str, Any]) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.writelines(json.dumps(record) + "\n" for record in records)


def _keep_steps(metrics: Path, step: int) -> None:
    """Drop the lines of steps after `step`, which will be made again."""
    lines = metrics.read_text(encoding="utf-8").splitlines() if metrics.is_file() and step else []
    kept = [line for line in lines if "loss" in (record := json.loads(line)) and record["step"] <= step]
    draft = metrics.with_name(f".{metrics.name}-draft")  # killed in the middle, it leaves the lines as they were
    draft.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")
    os.replace(draft, metrics)


def _evaluations(outcome: Outcome, accuracy: dict[int, float]) -> list[dict[str, Any]]:
    return [
        {"step": step, "held_out_loss": loss} | ({"accuracy": accuracy[step]} if step in accuracy else {})
        for step, loss in sorted(outcome.evaluations.items())
    ]


@torch.no_grad()
def _accuracy(trainer: Trainer, prepared: Prepared) -> dict[int, float]:
    """Return {step: share of the held-out rows that are classified right}; {} for other tasks."""
    if not prepared.labels or not prepared.held_out:
        return {}
    trainer.model.eval()
    device = next(iter(trainer.parameters.values())).device
    right, size = 0, trainer.settings.batch_size
    for start in range(0, len(prepared.held_out), size):
        inputs = collate(prepared.held_out[start : start + size], prepared.pad_id)
        targets = inputs.pop("labels")
        scores = trainer.model(**{name: tensor.to(device) for name, tensor in inputs.items()}).logits
        right += int((scores.argmax(-1).cpu() == targets).sum())
    return {trainer.outcome.step: right / len(prepared.held_out)}
