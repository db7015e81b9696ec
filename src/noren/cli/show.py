"""What the commands share: their common arguments, and how numbers are written for people."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console


class TaskName(StrEnum):
    """The tasks as choices of the command line (see config.Task)."""

    causal_lm = "causal-lm"
    sequence_classification = "sequence-classification"
    question_answering = "question-answering"


class DtypeName(StrEnum):
    """The types of what crosses, as choices of the command line (see config.Dtype)."""

    float32 = "float32"
    bfloat16 = "bfloat16"


Model = Annotated[str, typer.Argument(help='A model folder, a URL of one, a hub id, or "embedded".')]
RunFile = Annotated[Path, typer.Argument(metavar="RUN.toml", help="The run document.")]
Task = Annotated[TaskName, typer.Option(help="Which head the whole model carries.")]
Insecurely = Annotated[
    bool, typer.Option("--insecure", help="No TLS: plain text, and nobody's identity is checked. Warns every time.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")]


def place_of(model: str) -> str:
    """Return where a model that was named on the command line is."""
    from noren.config import EMBEDDED
    from noren.embedded import MODEL_DIR

    return str(MODEL_DIR) if model == EMBEDDED else model


def say(line: str, *, error: bool = False) -> None:
    """Print one line as it stands."""
    Console(highlight=False, stderr=error).print(line, markup=False, soft_wrap=True)


def bytes_of(count: float) -> str:
    """Write a number of bytes, e.g. "7.1 MB" (powers of 1000)."""
    return _scaled(count, ("B", "kB", "MB", "GB", "TB"))


def count_of(count: float) -> str:
    """Write a count, e.g. "2.4 M"."""
    return _scaled(count, ("", "k", "M", "G", "T")).strip()


def _scaled(count: float, units: tuple[str, ...]) -> str:
    for unit in units[:-1]:
        if abs(count) < 999.5:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} {units[-1]}"
