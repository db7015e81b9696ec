"""`noren check`: is a cut of this architecture exactly the whole model?"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Column, Table

from noren.cli.show import AsJson, Task, TaskName, place_of, say

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from noren.parties.fitness import Verdict


def check(
    model: Annotated[str, typer.Argument(help='A model as in `noren plan`, or an architecture\'s name, e.g. "llama".')],
    task: Task = TaskName.causal_lm,
    as_json: AsJson = False,
) -> None:
    """Compare split with whole on a small random model of the architecture; exit code 3 if they differ."""
    from noren.parties import fitness

    verdict = fitness.check(config_of(model), task.value)
    if as_json:
        import msgspec

        typer.echo(json.dumps(msgspec.to_builtins(verdict)))
    else:
        _print(verdict, fitness.TOLERANCE)
    if not verdict.fit:
        raise typer.Exit(3)


def config_of(model: str) -> PretrainedConfig:
    """Return the config of a model, or transformers' default one of an architecture. Raises ModelError, UnfitModel."""
    from transformers import CONFIG_MAPPING

    from noren.partition.slices import load_config
    from noren.partition.sources import open_checkpoint

    if model not in CONFIG_MAPPING or Path(model).exists():
        return load_config(open_checkpoint(place_of(model)))
    with tempfile.TemporaryDirectory(prefix="noren-check-") as folder:
        CONFIG_MAPPING[model]().save_pretrained(folder)
        checkpoint = open_checkpoint(folder)
        checkpoint.location = model
        return load_config(checkpoint)


def _print(verdict: Verdict, tolerance: float) -> None:
    if verdict.differences:
        say(f"{verdict.architecture}, {verdict.task}: largest differences between split and whole")
    table = Table("comparison", Column("difference", justify="right"), box=None, show_header=False)
    for name, value in verdict.differences.items():
        table.add_row(name, "bitwise" if value == 0.0 else f"{value:.2g}")
    Console(highlight=False).print(table)
    if not verdict.fit:
        say(f"unfit: {verdict.architecture} ({verdict.task}): {verdict.reason}")
        return
    say(f"fit: nothing differs by more than {tolerance:g}, relative to the largest value")
    if not verdict.trainable:
        say("its layers share their weights, so it cannot be trained across a cut")
