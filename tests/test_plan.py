"""Plans: what is read, what is refused and in which words, and that every layer has exactly one owner."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from noren.errors import PlanError
from noren.partition.plan import Plan, Span

READ = [
    ("client :2, server 2:-2, client -2:", 8, ["client 0:2", "server 2:6", "client 6:8"]),
    ("client :2, server 2:", 8, ["client 0:2", "server 2:8"]),
    ("client :1, edge 1:3, server 3:-1, client -1:", 6, ["client 0:1", "edge 1:3", "server 3:5", "client 5:6"]),
    ("client :0, server :", 3, ["client 0:0", "server 0:3"]),
    ("client :0, server :, client 3:", 3, ["client 0:0", "server 0:3", "client 3:3"]),
    ("client :0, server :-1, client -1:", 3, ["client 0:0", "server 0:2", "client 2:3"]),
    ("client :1, server 1:-0, client -0:", 3, ["client 0:1", "server 1:3", "client 3:3"]),
    (" a1-b : 2 ,s  -6 : 8 ", 8, ["a1-b 0:2", "s 2:8"]),
    ("me :-7,you -7:", 8, ["me 0:1", "you 1:8"]),
]


@pytest.mark.parametrize(("text", "layers", "lines"), READ)
def test_a_plan_is_read(text: str, layers: int, lines: list[str]) -> None:
    plan = Plan.parse(text, layers)
    assert plan.lines() == lines
    assert str(plan) == ", ".join(lines)
    assert Plan.parse(lines, layers) == plan == Plan.parse(str(plan), layers)


REFUSED = [
    ("client :2, server 3:", "gap: nobody holds layers 2:3 (before 'server 3:8'), of layers 0 to 8"),
    ("client 1:2, server 2:", "gap: nobody holds layers 0:1"),
    ("client :2, server 2:6", "gap: nobody holds layers 6:8"),
    ("client :3, server 2:", "overlap: layers 2:3 are held twice ('server 2:8' begins before layer 3)"),
    ("client :2, server 2:6, client 4:", "overlap: layers 4:6 are held twice"),
    ("client :2, server 2:9", "'server 2:9': 9 is out of range, the model has 8 layers"),
    ("client :2, server 2:-9", "-9 is out of range, the model has 8 layers"),
    ("client :2, server 6:2, client 2:", "'server 6:2' ends before it starts (layers 6 to 2)"),
    ("client :2, server 2:2, client 2:", "'server 2:2' holds no layers; leave it out"),
    ("client :8, server 8:", "'server 8:8' holds no layers"),
    ("client :2, server 2:4, edge 4:6, server 6:", "server: a remote party may hold one span only"),
    ("client :2, server 2:4, client 4:6, server 6:", "may hold the first and the last span only"),
    ("client :2, client 2:", "leaves nothing to another party"),
    ("client :", "has 1 span; a cut needs at least two"),
    ("", "is not 'PARTY START:END'"),
    ("client :2, server", "'server' is not 'PARTY START:END'; write a plan like"),
    ("client :2, server 2:4:6", "is not 'PARTY START:END'"),
    ("Client :2, server 2:", "'Client :2' is not 'PARTY START:END'"),
    ("client :2, ser_ver 2:", "is not 'PARTY START:END'"),
    ("client :2, -server 2:", "is not 'PARTY START:END'"),
    ("client :2.5, server 2:", "is not 'PARTY START:END'"),
    ("client :2, " + "s" * 64 + " 2:", "is not 'PARTY START:END'"),
]


@pytest.mark.parametrize(("text", "words"), REFUSED)
def test_a_wrong_plan_is_refused_in_words(text: str, words: str) -> None:
    with pytest.raises(PlanError) as caught:
        Plan.parse(text, 8)
    assert words in str(caught.value)


def test_no_spans_at_all() -> None:
    with pytest.raises(PlanError, match="0 span"):
        Plan.parse([], 8)


def test_who_holds_what() -> None:
    plan = Plan.parse("client :2, edge 2:3, server 3:-1, client -1:", 6)
    assert plan.client == "client" and plan.u_shaped
    assert plan.parties == ("client", "edge", "server")
    assert plan.remote == (Span("edge", 2, 3), Span("server", 3, 5))
    assert (plan.kept("client"), plan.kept("edge"), plan.kept("server")) == ([0, 1, 5], [2], [3, 4])
    assert [plan.holds_embedding(p) for p in plan.parties] == [True, False, False]
    assert [plan.holds_head(p) for p in plan.parties] == [True, False, False]
    tail = Plan.parse("client :2, server 2:", 6)
    assert not tail.u_shaped
    assert [tail.holds_head(p) for p in tail.parties] == [False, True]
    with pytest.raises(PlanError, match="no party 'other' in .*; parties are client, server"):
        tail.kept("other")


@st.composite
def chains(draw: st.DrawFn) -> tuple[list[str], int, list[tuple[str, int, int]]]:
    """(spans as text, layers, spans): any chain that a plan allows, its ends written in any of the ways."""
    layers = draw(st.integers(1, 40))
    remote = draw(st.integers(1, min(5, layers)))
    u_shaped = draw(st.booleans())
    cuts = sorted(draw(st.sets(st.integers(0, layers), min_size=remote + 1, max_size=remote + 1)))
    if not u_shaped:
        cuts[-1] = layers
    bounds = [0, *cuts, *([layers] if u_shaped else [])]
    names = ["client", *(f"party{i}" for i in range(remote)), *(["client"] if u_shaped else [])]
    spans = list(zip(names, bounds[:-1], bounds[1:], strict=True))

    def written(value: int, default: int) -> str:
        ways = [str(value), *([str(value - layers)] if value < layers else ["-0"]), *([""] if value == default else [])]
        return draw(st.sampled_from(ways))

    return [f"{name} {written(a, 0)}:{written(b, layers)}" for name, a, b in spans], layers, spans


@given(chains())
def test_every_layer_has_one_owner(chain: tuple[list[str], int, list[tuple[str, int, int]]]) -> None:
    text, layers, spans = chain
    plan = Plan.parse(", ".join(text), layers)
    assert [(s.party, s.start, s.end) for s in plan.spans] == spans
    assert Plan.parse(plan.lines(), layers) == plan
    held = [layer for party in plan.parties for layer in plan.kept(party)]
    assert sorted(held) == list(range(layers))
    assert sum(map(len, plan.spans)) == layers
    assert sum(plan.holds_head(p) for p in plan.parties) == 1
    assert [p for p in plan.parties if plan.holds_embedding(p)] == [plan.client]


@given(chains(), st.data())
def test_a_chain_with_one_wrong_end_is_refused(
    chain: tuple[list[str], int, list[tuple[str, int, int]]], data: st.DataObject
) -> None:
    _, layers, spans = chain
    at = data.draw(st.integers(0, len(spans) - 1))
    party, start, end = spans[at]
    wrong = data.draw(st.integers(-2 * layers, 2 * layers).filter(lambda v: v not in (end, end - layers)))
    lines = [f"{p} {a}:{b}" for p, a, b in spans]
    lines[at] = f"{party} {start}:{wrong}"
    with pytest.raises(PlanError):
        Plan.parse(lines, layers)
