"""The cut as a picture: the owner's layers on the left of a curtain, everybody else's on the right.

Data runs downwards; the curtain parts only where a message crosses. Colours are the page's CSS variables.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from itertools import pairwise

from noren.report import words

WIDTH = 400
LEFT, RIGHT, CURTAIN = 88, 312, 200  # middles of the two lanes and of the curtain
BOX, ROW, PITCH = 124, 23, 28  # width and height of a layer's box, and from one to the next
PAD, HEAD, GAP = 10, 27, 82  # inside a block, above its first box, and between blocks
MOST = 8  # a block of more boxes than this leaves out its middle

_SPAN = re.compile(r"^\s*(\S+)\s+(\d+):(\d+)\s*$")


@dataclass(frozen=True, kw_only=True)
class _Block:
    party: str
    names: tuple[tuple[str, str], ...]  # each with its colour
    rows: tuple[tuple[str, bool], ...]  # text, and whether it is of the model (or the owner's data)
    left: bool
    colour: str
    behind: str | None  # colour of a second client, whose copy stands behind
    top: int

    @property
    def bottom(self) -> int:
        return self.top + HEAD + PITCH * len(self.rows) - (PITCH - ROW) + PAD

    @property
    def x(self) -> int:
        return LEFT if self.left else RIGHT


def cut(plan: Sequence[str], clients: Sequence[str], colours: Mapping[str, str]) -> str:
    """Draw the cut. `clients` are the names behind the plan's first party; `colours` names each one's CSS variable.

    Spans of a plan are read as "party start:end"; a plan that reads otherwise gives an empty string.
    """
    blocks = _blocks(plan, clients, colours)
    if not blocks:
        return ""
    height = blocks[-1].bottom + 14
    parts = [_curtain(blocks, height)]
    for above, below in pairwise(blocks):
        raw = below.party == blocks[0].party and not below.rows[0][1]
        parts.append(_crossing(above, below, "output of the head" if raw else "hidden states"))
    parts.extend(_block(block) for block in blocks)
    label = f"The cut: {words.listed(plan)}. Hidden states cross downwards, gradients come back upwards"
    head = f'<svg class="cut" viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{escape(label)}">'
    return "".join((head, *parts, "</svg>"))


def _blocks(plan: Sequence[str], clients: Sequence[str], colours: Mapping[str, str]) -> list[_Block]:
    spans = [(m[1], int(m[2]), int(m[3])) for m in map(_SPAN.match, plan) if m]
    if not spans or len(spans) != len(plan):
        return []
    owner = spans[0][0]
    contents: list[tuple[str, list[tuple[str, bool]]]] = []
    for party, start, end in spans:
        layers = [(f"layer {n}", True) for n in range(start, end)]
        if len(layers) > MOST:
            layers[2:-1] = [(f"{len(layers) - 3} more layers", True)]
        contents.append((party, layers))
    contents[0][1][:0] = [("text, token ids", False), ("embedding", True)]
    contents[-1][1].append(("norm and head", True))
    if contents[-1][0] == owner:
        contents[-1][1].append(("labels, loss", False))
    else:
        contents.append((owner, [("labels, loss", False)]))
    blocks: list[_Block] = []
    top = 34
    for party, rows in contents:
        left = party == owner
        names = list(clients) if left and clients else [party]
        shades = [colours.get(name, "whole") for name in names]
        blocks.append(
            _Block(
                party=party,
                names=tuple(zip(names, shades, strict=True)),
                rows=tuple(rows),
                left=left,
                colour=shades[0],
                behind=shades[1] if len(shades) > 1 else None,
                top=top,
            )
        )
        top = blocks[-1].bottom + GAP
    return blocks


def _block(block: _Block) -> str:
    x, width, height = block.x - BOX // 2 - PAD, BOX + 2 * PAD, block.bottom - block.top
    sheet = '<rect x="{}" y="{}" width="{}" height="{}" rx="8" class="sheet" style="--c:var(--{})"/>'
    parts = [sheet.format(x - 6, block.top + 6, width, height, block.behind)] if block.behind else []
    parts.append(sheet.format(x, block.top, width, height, block.colour))
    if sum(len(name) + 3 for name, _ in block.names) <= 25:
        name = " · ".join(f'<tspan style="--c:var(--{c})">{escape(name)}</tspan>' for name, c in block.names)
    else:
        name = f"each of {len(block.names)} clients" if len(block.names) > 1 else f"{escape(block.names[0][0][:20])}…"
    parts.append(f'<text x="{block.x}" y="{block.top + 18}" class="name">{name}</text>')
    for number, (text, of_model) in enumerate(block.rows):
        y = block.top + HEAD + number * PITCH
        parts.append(
            f'<rect x="{block.x - BOX // 2}" y="{y}" width="{BOX}" height="{ROW}" rx="4" '
            f'class="{"layer" if of_model else "data"}" style="--c:var(--{block.colour})"/>'
            f'<text x="{block.x}" y="{y + 16}" class="row">{escape(text)}</text>'
        )
    return "".join(parts)


def _crossing(above: _Block, below: _Block, forward: str) -> str:
    """Draw the way down of what goes forward and, nested in it, the way back up of its gradient."""
    start, end = above.bottom, below.top
    if above.left == below.left:  # two remote parties: straight down and up
        middle = (start + end) // 2
        down, up = above.x - 66, above.x + 27
        return (
            f'<path class="forward" d="M{down} {start}V{end - 3}"/>{_head(down, end, 1)}'
            f'<path class="backward" d="M{up} {end}V{start + 9}"/>{_head(up, start + 6, -1)}'
            f'<text x="{down + 8}" y="{middle + 4}" class="down start">{forward}</text>'
            f'<text x="{up + 8}" y="{middle + 4}" class="up start">gradient</text>'
        )
    side = 1 if above.left else -1
    go, back = start + 24, end - 24
    return (
        f'<path class="forward" d="M{above.x + 12 * side} {start}V{go}H{below.x + 12 * side}V{end - 3}"/>'
        f"{_head(below.x + 12 * side, end, 1)}"
        f'<path class="backward" d="M{below.x - 12 * side} {end}V{back}H{above.x - 12 * side}V{start + 9}"/>'
        f"{_head(above.x - 12 * side, start + 6, -1)}"
        f'<text x="{CURTAIN}" y="{go - 6}" class="down">{forward}</text>'
        f'<text x="{CURTAIN}" y="{back + 15}" class="up">gradient</text>'
    )


def _head(x: int, y: int, way: int) -> str:
    return f'<path class="arrow" d="M{x - 5} {y - 8 * way}L{x} {y - way}L{x + 5} {y - 8 * way}Z"/>'


def _curtain(blocks: Sequence[_Block], height: int) -> str:
    """Draw rod and cloth, parted between blocks that stand on different sides."""
    parts = [f'<rect class="rod" x="{CURTAIN - 36}" y="22" width="72" height="4" rx="2"/>']
    edges = [26]
    for above, below in pairwise(blocks):
        if above.left != below.left:
            edges += [above.bottom + 4, below.top - 2]
    edges.append(height - 4)
    for number, (top, bottom) in enumerate(pairwise(edges)):
        for left in (CURTAIN - 27, CURTAIN - 8, CURTAIN + 11):
            end = f"V{bottom - 4}q8 7 16 0V{top}" if bottom == edges[-1] else f"V{bottom}h16V{top}"
            parts.append(f'<path class="cloth{" open" if number % 2 else ""}" d="M{left} {top}{end}Z"/>')
    parts.append(f'<text x="{LEFT}" y="14" class="lane">the owner of the data</text>')
    parts.append(f'<text x="{RIGHT}" y="14" class="lane">elsewhere</text>')
    return "".join(parts)
