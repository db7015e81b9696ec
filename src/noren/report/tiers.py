"""One page about users, edges and a cloud of which an edge was killed: what was lost, and how that was found out."""

from __future__ import annotations

import math
from pathlib import Path

from markupsafe import Markup

from noren.report import plots, words
from noren.report.page import AGREEMENT, Verdict, template, write_page
from noren.report.result import TiersResult


def verdict(result: TiersResult) -> Verdict:
    """Say whether the run came out as if nothing had happened, and each step was made once."""
    both = (result.largest_loss_difference, result.largest_adapter_difference)
    agrees, apart = all(one <= AGREEMENT for one in both), next(filter(math.isnan, both), max(both))
    shown = words.difference(apart)
    uneven = [user.name for user in result.users if user.steps != list(range(1, len(user.undisturbed) + 1))]
    if uneven:
        sentence = f"Steps are missing, or were made twice: {words.listed(uneven)}."
    elif not agrees:
        sentence = f"The run in which {result.killed} was killed does not agree with the undisturbed one: {shown}."
    elif not result.users_agree:
        sentence = "The users did not end with the same adapters."
    else:
        sentence = (
            f"{result.killed} was killed, and nothing was lost: every user made every step once, all ended with the "
            f"same adapters, and the largest difference from an undisturbed run is {shown}."
        )
    return Verdict(agree=not uneven and agrees and result.users_agree, sentence=sentence, difference=shown)


def write_tiers(result: TiersResult, path: Path) -> Path:
    """Write the page to `path`, whole or not at all, and return `path`."""
    colours = {user.name: f"client-{number % 4}" for number, user in enumerate(result.users)}
    values = [loss for user in result.users for loss in (*user.losses, *user.undisturbed)]
    top = max(values) * 1.12 if values else None
    shades = {name: colours.get(name, f"server-{n % 3}") for n, name in enumerate(result.peak_bytes)}
    memory = [
        plots.Bar(label=name, value=peak, text=words.size(peak), colour=shades[name])
        for name, peak in result.peak_bytes.items()
    ]
    page = template("tiers.html").render(
        run=result,
        verdict=verdict(result),
        colours=colours,
        losses=[
            Markup(plots.disturbed(user, colours[user.name], f"losses-{number}", top))
            for number, user in enumerate(result.users)
        ],
        memory=Markup(plots.bars(memory, "memory", "Peak memory of each process")),
    )
    return write_page(page, path)
