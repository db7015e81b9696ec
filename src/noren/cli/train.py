"""`noren train`: fine-tune the adapters of all parties on this party's private data."""

from __future__ import annotations

import dataclasses
import json
import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

from noren.cli.show import AsJson, Insecurely, RunFile, bytes_of, say

if TYPE_CHECKING:
    from rich.progress import TaskID

    from noren.parties.train import Metrics, Trained
    from noren.training.loop import Progress as Step

PLAIN_LINES = 20
"""How many lines of progress a run prints where there is no terminal."""


def train(
    run: RunFile,
    resume: Annotated[bool, typer.Option("--resume", help="Continue from the run's checkpoint.")] = False,
    insecure: Insecurely = False,
    as_json: AsJson = False,
) -> None:
    """Train as the run document says. Ctrl-C finishes the step, writes a checkpoint and says how to go on."""
    from noren.config import Document
    from noren.parties.train import train as train_run

    document = Document.read(run)
    if as_json:
        done = train_run(document, resume=resume, insecure=insecure, report=_print_json)
    else:
        with _Bar() as bar:
            done = train_run(document, resume=resume, insecure=insecure, report=bar)
    if as_json:
        print(json.dumps(summary(done)), flush=True)
    else:
        _print(done, f"noren train {run} --resume")
    if done.outcome.interrupted:
        raise typer.Exit(130)


def summary(done: Trained) -> dict[str, Any]:
    """Return what a run came to, as JSON can hold it."""
    return {
        "step": done.outcome.step,
        "steps": done.steps,
        "interrupted": done.outcome.interrupted,
        "final_loss": done.outcome.losses[-1] if done.outcome.losses else None,
        "held_out": {str(step): loss for step, loss in done.outcome.evaluations.items()},
        "accuracy": {str(step): share for step, share in done.accuracy.items()},
        "rows": len(done.prepared.rows),
        "held_out_rows": len(done.prepared.held_out),
        "dropped": done.prepared.dropped,
        "truncated": done.prepared.truncated,
        "bytes_up": done.traffic.sent_bytes,
        "bytes_down": done.traffic.received_bytes,
        "exposed_seconds": done.exposed_seconds,
        "out": str(done.out),
        "adapter": str(done.adapter) if done.adapter else None,
    }


def _print_json(metrics: Metrics, step: Step) -> None:
    print(json.dumps(dataclasses.asdict(metrics)), flush=True)


def _print(done: Trained, again: str) -> None:
    data = done.prepared
    say(
        f"{len(data.rows)} examples to learn, {len(data.held_out)} held out"
        + (f", {data.dropped} dropped" if data.dropped else "")
        + (f", {data.truncated} cut short at max_length" if data.truncated else "")
    )
    evaluations = sorted(done.outcome.evaluations.items())
    for step, loss in evaluations[:1] + evaluations[1:][-1:]:  # all of them are in metrics.jsonl
        right = f", accuracy {done.accuracy[step]:.1%}" if step in done.accuracy else ""
        say(f"held-out loss after step {step}: {loss:.4f}{right}")
    say(f"crossed: {bytes_of(done.traffic.sent_bytes)} up, {bytes_of(done.traffic.received_bytes)} down")
    say(f"waited for the link, with nothing to compute: {done.exposed_seconds:.1f} s")
    if done.outcome.interrupted:
        say(f"interrupted after step {done.outcome.step} of {done.steps}; continue with `{again}`")
    else:
        say(f"adapter: {done.adapter}")


class _Bar:
    """The progress of a run on stderr: a bar on a terminal, else a line now and then."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        self._live = sys.stderr.isatty()
        self._bar = Progress(
            MofNCompleteColumn(), BarColumn(bar_width=8), TextColumn("{task.description}"), TimeRemainingColumn(),
            console=Console(stderr=True), disable=not self._live,
        )  # fmt: skip
        self._task: TaskID | None = None
        self._up = self._down = 0

    def __enter__(self) -> _Bar:
        self._bar.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._bar.stop()

    def __call__(self, metrics: Metrics, step: Step) -> None:
        """Show one more step."""
        self._up, self._down = self._up + metrics.bytes_up, self._down + metrics.bytes_down
        words = (
            f"loss {metrics.loss:.3f}  {metrics.tokens_per_second:,.0f} tok/s  "
            f"{bytes_of(self._up)} up  {bytes_of(self._down)} down"
        )
        if self._live:
            if self._task is None:
                self._task = self._bar.add_task(words, total=step.steps)
            self._bar.update(self._task, completed=step.step, description=words)
        elif step.step % max(1, step.steps // PLAIN_LINES) == 0 or step.step == step.steps:
            say(f"step {step.step}/{step.steps}  {words}", error=True)
