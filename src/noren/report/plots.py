"""Plots as inline SVG that follows the page: its colours, its font, light and dark.

matplotlib draws with stand-in colours, which become the page's CSS variables afterwards. The background is
transparent, text stays text, and ids are made unique to each plot, so several fit on one page.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING, Any

from noren.report import words
from noren.report.result import ClientResult, UserResult

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLOURS = ("client-0", "client-1", "client-2", "client-3", "server-0", "server-1", "server-2", "whole")
"""Names of the CSS variables that parties may have as their colour."""

_VARIABLES = ("ink", "muted", "line", *COLOURS)
_STAND_IN = {name: f"#0102{number + 16:02x}" for number, name in enumerate(_VARIABLES)}
_WIDTH = 4.6  # inches: 331 points, so that text keeps its size on a telephone


@dataclass(frozen=True, kw_only=True)
class Bar:
    """One bar: `value` and, for a second, darker bar inside it, `inner`."""

    label: str
    value: float
    text: str
    colour: str
    inner: float | None = None


def losses(client: ClientResult, colour: str, name: str, top: float | None = None) -> str:
    """Draw both losses of a client a step, the whole model's thick and pale beneath the thin one over the cut.

    Diamonds stand for the held-out losses before and after. The axis of the loss goes from 0 to `top`, so that the
    plots of several clients compare; `name` is unique on the page.
    """
    with _drawing(2.5) as (figure, axes):
        for side, width, alpha, mark in ((client.whole, 6.0, 0.28, 9.0), (client.split, 1.3, 1.0, 4.5)):
            steps = range(1, len(side.losses) + 1)
            axes.plot(steps, side.losses, color=_STAND_IN[colour], linewidth=width, alpha=alpha)
            ends = ((0, side.held_out_before), (max(client.steps, len(side.losses)), side.held_out_after))
            axes.plot(
                *zip(*ends, strict=True), "D", color=_STAND_IN["ink"], markersize=mark, alpha=alpha, clip_on=False
            )
        for end, where in zip(ends, ("left", "right"), strict=True):
            if math.isfinite(end[1]):
                axes.annotate(words.decimal(end[1]), end, (0, 8), textcoords="offset points", ha=where)
        axes.set_xlabel("step")
        axes.set_ylabel("loss")
        axes.set_xlim(0, ends[1][0])
        axes.set_ylim(0, top)
        axes.yaxis.grid(True)
        figure.subplots_adjust(left=0.12, right=0.96, top=0.95, bottom=0.19)
        first, last = client.split.held_out_before, client.split.held_out_after
        return _svg(
            figure,
            name,
            f"Loss of {client.name} at each of {client.steps} steps, over the cut and in one process; on held-out text "
            f"it went from {words.decimal(first)} to {words.decimal(last)}",
        )


def disturbed(user: UserResult, colour: str, name: str, top: float | None = None) -> str:
    """Draw a user's loss a step, that of an undisturbed run pale beneath it, and where its edge died."""
    with _drawing(2.1) as (figure, axes):
        for losses, width, alpha in ((user.undisturbed, 6.0, 0.28), (user.losses, 1.3, 1.0)):
            axes.plot(range(1, len(losses) + 1), losses, color=_STAND_IN[colour], linewidth=width, alpha=alpha)
        if user.moved_at:
            axes.axvline(user.moved_at, color=_STAND_IN["ink"], linewidth=0.8, linestyle="--")
            axes.annotate(f"{user.edge} killed", (user.moved_at, 0), (4, 6), textcoords="offset points")
        axes.set_xlabel("step")
        axes.set_ylabel("loss")
        axes.set_ylim(0, top)
        axes.yaxis.grid(True)
        figure.subplots_adjust(left=0.12, right=0.96, top=0.95, bottom=0.22)
        return _svg(figure, name, f"Loss of {user.name} at each of {len(user.losses)} steps, and in an undisturbed run")


def bars(rows: Sequence[Bar], name: str, label: str) -> str:
    """Draw horizontal bars with their names above and their values in words behind them."""
    with _drawing(0.52 * len(rows) + 0.12) as (figure, axes):
        most = max((row.value for row in rows), default=1.0) or 1.0
        for place, row in enumerate(rows):
            colour = _STAND_IN[row.colour]
            axes.barh(place, row.value, 0.42, color=colour, alpha=1.0 if row.inner is None else 0.4, linewidth=0)
            if row.inner is not None:
                axes.barh(place, row.inner, 0.42, color=colour, linewidth=0)
            axes.annotate(row.label, (0, place - 0.28), (0, 2), textcoords="offset points", va="bottom")
            axes.annotate(
                row.text, (most, place - 0.28), (0, 2), textcoords="offset points", va="bottom", ha="right"
            ).set_color(_STAND_IN["muted"])
        axes.set_xlim(0, most)
        axes.set_ylim(len(rows) - 0.7, -0.75)
        axes.axis("off")
        figure.subplots_adjust(left=0.005, right=0.995, top=1, bottom=0)
        return _svg(figure, name, label)


@contextmanager
def _drawing(height: float) -> Iterator[tuple[Figure, Any]]:
    import matplotlib  # here, not above: it takes half a second that other commands need not wait for
    from matplotlib.figure import Figure

    ink, muted, line = _STAND_IN["ink"], _STAND_IN["muted"], _STAND_IN["line"]
    style = {
        "svg.fonttype": "none",
        "svg.hashsalt": "noren",
        "font.family": "sans-serif",
        "font.size": 9,
        "text.color": ink,
        "text.parse_math": False,
        "axes.labelcolor": muted,
        "axes.edgecolor": line,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.spines.left": False,
        "axes.axisbelow": True,
        "axes.facecolor": "none",
        "figure.facecolor": "none",
        "xtick.color": line,
        "ytick.color": line,
        "xtick.labelcolor": muted,
        "ytick.labelcolor": muted,
        "ytick.major.size": 0,
        "grid.color": line,
        "grid.linewidth": 0.6,
        "lines.solid_joinstyle": "round",
        "lines.markeredgewidth": 0,
    }
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(_WIDTH, height))
        yield figure, figure.add_subplot()


def _svg(figure: Figure, name: str, label: str) -> str:
    from matplotlib.backends.backend_svg import FigureCanvasSVG

    buffer = io.StringIO()
    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    FigureCanvasSVG(figure).print_svg(buffer, metadata=nothing)
    text = buffer.getvalue()
    view = re.search(r'viewBox="[^"]*"', text)
    assert view is not None, "matplotlib writes the size of its drawing"
    body = text[text.index(">", view.start()) + 1 :]
    body = re.sub(r"<(metadata|style)\b.*?</\1>|<!--.*?-->", "", body, flags=re.DOTALL)
    prefix = re.sub(r"[^a-z0-9]+", "-", name.lower())
    body = re.sub(r'(\bid="|xlink:href="#|url\(#)', rf"\g<1>{prefix}-", body)
    for variable, colour in _STAND_IN.items():
        body = body.replace(colour, f"var(--{variable})")
    return f'<svg class="plot" {view[0]} role="img" aria-label="{escape(label)}">{body.strip()}'
