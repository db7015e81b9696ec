"""One page that shows what a run did: `report.html`, with everything in it and nothing fetched.

The page promises to say what the numbers say. Whether split and whole agree is worked out here, from the losses, the
held-out losses and the trained values, and disagreement is the first thing on the page.
"""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined, Template
from markupsafe import Markup

from noren.report import diagram, plots, words
from noren.report.result import ClientResult, DemoResult, Side

AGREEMENT = 1e-3
"""Split and whole agree if no loss and no trained value differ by more than this."""

EMBEDDED = "embedded"
ELEMENT_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """The sentence on top of the page."""

    agree: bool
    sentence: str
    difference: str


@dataclass(frozen=True, kw_only=True)
class Row:
    """One line of a client's table: the same measure of both sides."""

    measure: str
    split: str
    whole: str
    difference: str


def render(result: DemoResult) -> str:
    """Return the whole page as HTML; all text of the run is escaped."""
    colours = _colours(result)
    top = _axis_top(result.clients)
    return template("report.html").render(
        run=result,
        verdict=verdict(result),
        agreement=AGREEMENT,
        learned=[(client, client.split.held_out_after < client.split.held_out_before) for client in result.clients],
        colours=colours,
        cut=Markup(diagram.cut(result.plan, [client.name for client in result.clients], colours)),
        losses=[
            Markup(plots.losses(client, colours[client.name], f"losses-{number}", top))
            for number, client in enumerate(result.clients)
        ],
        rows=[_rows(client) for client in result.clients],
        traffic=Markup(_traffic(result, colours)),
        memory=Markup(_memory(result, colours)),
        costs={
            "bytes": _distinct(words.size(client.bytes_per_step) for client in result.clients),
            "step": _distinct(words.count(client.round_trips_per_step) for client in result.clients),
            "token": _distinct(words.count(client.round_trips_per_token) for client in result.clients),
        },
        u_shaped=len({span.partition(" ")[0] for span in (*result.plan[:1], *result.plan[-1:])}) == 1,
        weights_bytes=result.model_parameters * ELEMENT_BYTES.get(result.dtype, 4),
        loader=_loader(result.model),
    )


def template(name: str) -> Template:
    """Return a page's template, with what all pages need to write numbers."""
    environment = Environment(
        loader=PackageLoader("noren", "report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(
        size=words.size,
        count=words.count,
        duration=words.duration,
        decimal=words.decimal,
        difference=words.difference,
        ranges=words.ranges,
        listed=words.listed,
        pythonic=repr,
    )
    return environment.get_template(name)


def write_report(result: DemoResult, path: Path) -> Path:
    """Write the page to `path` and return `path`."""
    return write_page(render(result), path)


def write_page(page: str, path: Path) -> Path:
    """Write a page to `path`, whole or not at all, and return `path`.

    The file is readable by its owner alone, for it quotes what the model wrote after private text.
    """
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(page)
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
    return path


def verdict(result: DemoResult) -> Verdict:
    """Say whether split and whole agree, by the largest difference of anything that was compared."""
    found = [(value, what) for client in result.clients for value, what in _differences(client)]
    if not found:
        return Verdict(agree=False, sentence="No client finished, so there is nothing to compare.", difference="–")  # noqa: RUF001
    value, what = max(found, key=lambda pair: _badness(pair[0]))
    shown = words.difference(value)
    uneven = [client.name for client in result.clients if len(client.split.losses) != len(client.whole.losses)]
    if uneven:
        sentence = f"Split and whole cannot be compared: they took different numbers of steps ({words.listed(uneven)})."
    elif value == 0:
        sentence = "Split and whole agree exactly: no loss and no trained value differs at all."
    elif value <= AGREEMENT:
        sentence = f"Split and whole agree: the largest difference is {shown}, in {what}."
    else:
        sentence = f"Split and whole do not agree: they differ by {shown} in {what}."
    return Verdict(agree=not uneven and value <= AGREEMENT, sentence=sentence, difference=shown)


def _badness(difference: float) -> float:
    return math.inf if math.isnan(difference) else difference


def _differences(client: ClientResult) -> list[tuple[float, str]]:
    split, whole = client.split, client.whole
    steps = [abs(a - b) for a, b in zip(split.losses, whole.losses, strict=False)]
    return [
        (max([client.largest_loss_difference, *steps], key=_badness), f"the training loss of {client.name}"),
        (abs(split.held_out_before - whole.held_out_before), f"the held-out loss of {client.name} before training"),
        (abs(split.held_out_after - whole.held_out_after), f"the held-out loss of {client.name} after training"),
        (client.largest_adapter_difference, f"the trained values of {client.name}"),
    ]


def _distinct(values: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(values))


def _rows(client: ClientResult) -> list[Row]:
    def row(measure: str, of: tuple[float, float]) -> Row:
        return Row(
            measure=measure,
            split=words.decimal(of[0]),
            whole=words.decimal(of[1]),
            difference=words.difference(abs(of[0] - of[1])),
        )

    def both(name: str) -> tuple[float, float]:
        return getattr(client.split, name), getattr(client.whole, name)

    def step(side: Side, number: int) -> float:
        return side.losses[number] if side.losses else math.nan

    return [
        row("held out, before", both("held_out_before")),
        row("held out, after", both("held_out_after")),
        row("first step", (step(client.split, 0), step(client.whole, 0))),
        row("last step", (step(client.split, -1), step(client.whole, -1))),
    ]


def _colours(result: DemoResult) -> dict[str, str]:
    """Give every party a colour: warm ones for the plan's first party and its clients, cool ones for the rest."""
    names = [span.split()[0] for span in result.plan if span.split()]
    owner = names[0] if names else "client"
    colours = {client.name: f"client-{number % 4}" for number, client in enumerate(result.clients)}
    colours.setdefault(owner, "client-0")
    for part in result.parts:  # a part may be called "clinic" or "client clinic"
        if mine := [client.name for client in result.clients if client.name in part.party.split()]:
            colours.setdefault(part.party, colours[mine[0]])
    for name in [*names, *(part.party for part in result.parts), "server"]:
        others = sum(colour.startswith("server") for colour in colours.values())
        colours.setdefault(name, f"server-{others % 3}")
    return colours


def _axis_top(clients: Sequence[ClientResult]) -> float | None:
    sides = [side for client in clients for side in (client.split, client.whole)]
    values = [value for side in sides for value in (*side.losses, side.held_out_before, side.held_out_after)]
    finite = [value for value in values if abs(value) < 1e6]
    return max(finite) * 1.12 if finite else None


def _traffic(result: DemoResult, colours: dict[str, str]) -> str:
    rows = []
    for client in result.clients:
        floor, sent = client.bytes_floor_per_step, client.bytes_per_step
        above = f", {100 * (sent / floor - 1):.2g} % above the floor" if floor > 0 else ""
        text = f"{words.size(sent)} a step{above}"
        rows.append(plots.Bar(label=client.name, value=sent, inner=floor, text=text, colour=colours[client.name]))
    spoken = "; ".join(f"{row.label}: {row.text}" for row in rows)
    return plots.bars(rows, "traffic", f"Bytes of a training step. {spoken}") if rows else ""


def _memory(result: DemoResult, colours: dict[str, str]) -> str:
    measured = [(f"client {client.name}", client.split.peak_bytes, colours[client.name]) for client in result.clients]
    measured.append(("server", result.server_peak_bytes, "server-0"))
    measured.append(("whole model in one process", result.whole_peak_bytes, "whole"))
    rows = [plots.Bar(label=a, value=max(b, 0), text=words.size(b), colour=c) for a, b, c in measured]
    spoken = "; ".join(f"{row.label}: {row.text}" for row in rows)
    return plots.bars(rows, "memory", f"Peak memory of each process. {spoken}")


def _loader(model: str) -> str:
    """Return the line of Python that loads the base model."""
    if model == EMBEDDED:
        return "from noren.embedded import MODEL_DIR\n\nbase = AutoModelForCausalLM.from_pretrained(MODEL_DIR)"
    return f"\nbase = AutoModelForCausalLM.from_pretrained({model!r})"
