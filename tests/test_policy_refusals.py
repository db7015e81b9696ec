"""Refusals say what they are by; and adapters that nobody asked for are refused before a tensor leaves."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest

from conftest import U_SHAPED
from noren.adapters.lora import Lora
from noren.config import Document
from noren.embedded import MODEL_DIR
from noren.errors import PolicyRefused
from noren.parties.client import Client
from noren.parties.policy import Policy
from noren.parties.server import SpanServer
from noren.parties.train import train
from noren.partition.stage import Stage
from noren.types import PROTOCOL, Welcome
from noren.wire.identity import Insecure
from test_policy import ADAPTER, CASES, LAYER, Trap, Twist, honest, judge, line, terms, values
from test_policy import policy as policy

MODULE = "model.layers.3.self_attn."


@contextmanager
def serving(adapter: dict[str, Any]) -> Iterator[Trap]:
    """A server that was set up for an adapter, and says what it likes."""
    stage = Stage.load(str(MODEL_DIR), U_SHAPED, "server", "causal-lm")
    server = SpanServer(stage, lora=msgspec.convert(adapter, Lora))
    try:
        yield Trap(server)
    finally:
        server.close()


def offers(name: str, shape: list[int]) -> Twist:
    """A welcome with this adapter tensor as well, or in place of its own."""
    return lambda welcome: msgspec.structs.replace(welcome, adapter=welcome.adapter | {name: shape})


NOT_ASKED: dict[str, tuple[dict[str, Any], str, list[int], str]] = {
    "module": ({}, f"{MODULE}k_proj.lora_A.weight", [2, 192], "which was not asked for"),
    "module of like name": ({}, f"{MODULE}xq_proj.lora_A.weight", [2, 192], "which was not asked for"),
    "rank": ({}, f"{MODULE}q_proj.lora_A.weight", [3, 192], "which was not asked for"),
    "rank of B": ({}, f"{MODULE}q_proj.lora_B.weight", [192, 192], "which was not asked for"),
    "rank of another": (
        {"rank_of": {"client": 4}}, f"{MODULE}q_proj.lora_A.weight", [4, 192], "which was not asked for"
    ),
    "the weight itself": ({}, f"{MODULE}q_proj.weight", [192, 192], "which was not asked for"),
    "a vector": ({}, f"{MODULE}q_proj.lora_A.weight", [2], "which was not asked for"),
    "size": ({}, f"{MODULE}q_proj.lora_A.weight", [2, 1 << 21], "which was not asked for"),
    "party": ({"parties": ["client"]}, LAYER.format(3), [2, 192], "a layer that may not get an adapter"),
}  # fmt: skip


@pytest.mark.parametrize("name", NOT_ASKED)
def test_an_adapter_that_was_not_asked_for(name: str, policy: Callable[..., Path], tmp_path: Path) -> None:
    more, tensor, shape, words = NOT_ASKED[name]
    adapter = ADAPTER | more
    policy("")
    with serving(adapter) as trap, line(trap, offers(tensor, shape), Insecure()) as way:
        made = Document.of(values(tmp_path, way.address, {"adapter": adapter}), tmp_path)
        with pytest.raises(PolicyRefused, match=f"'server' trains '{tensor}'.*{words}"):
            train(made, insecure=True)
        judge(way, trap, connects=True)


def test_an_adapter_where_none_was_asked_for(policy: Callable[..., Path], tmp_path: Path) -> None:
    """Generation trains nothing."""
    policy("")
    with serving(ADAPTER) as trap, line(trap, offers(LAYER.format(3), [2, 192]), Insecure()) as way:
        made = values(tmp_path, way.address, {})
        del made["adapter"]
        with pytest.raises(PolicyRefused, match="'server' trains adapters, and none were asked for"):
            Client(Document.of(made, tmp_path), insecure=True)
        judge(way, trap, connects=True)


def test_ranks_and_parties_that_were_asked_for_are_taken(tmp_path: Path) -> None:
    adapter = ADAPTER | {"rank_of": {"server": 3}, "parties": ["server"]}

    def seen(welcome: Welcome) -> Welcome:
        found.append(welcome)
        return welcome

    found: list[Welcome] = []
    with serving(adapter) as trap, line(trap, seen, Insecure()) as way:
        made = Document.of(values(tmp_path, way.address, {"adapter": adapter}), tmp_path)
        Client(made, policy=Policy(), insecure=True).close()
    assert {min(shape) for shape in found[0].adapter.values()} == {3}


BY_NATURE = {"raw-embeddings/server", "labels/server", "protocol-unknown"}
"""Refused under any policy."""
BY_POLICY = [name for name, case in CASES.items() if case.policy and name not in BY_NATURE]


@pytest.mark.parametrize("name", BY_POLICY)
def test_a_refusal_names_the_file_and_the_key(name: str, policy: Callable[..., Path], tmp_path: Path) -> None:
    case = CASES[name]
    place, key = policy(case.policy), case.policy.partition(" ")[0]
    with serving(ADAPTER) as trap, line(trap, case.twist, Insecure()) as way:
        made = Document.of(values(tmp_path, way.address, case.document), tmp_path)
        with pytest.raises(PolicyRefused) as refusal:
            train(made, insecure=True)
    assert str(refusal.value).endswith(f"({key} in {place})")


def test_the_budget_names_the_file_and_the_key(policy: Callable[..., Path], tmp_path: Path) -> None:
    place = policy("most_vectors = 100")
    with serving(ADAPTER) as trap, line(trap, honest, Insecure()) as way:
        made = Document.of(values(tmp_path, way.address, {}), tmp_path)
        with pytest.raises(PolicyRefused) as refusal:
            train(made, insecure=True)
    assert str(refusal.value).endswith(f"nothing was sent (most_vectors in {place})")


def test_all_keys_are_named_somewhere() -> None:
    named = {CASES[name].policy.partition(" ")[0] for name in BY_POLICY} | {"most_vectors"}
    assert named == set(Policy.__struct_fields__)


def test_without_a_file_a_refusal_says_so(
    policy: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("NOREN_POLICY", raising=False)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    for twist, words in (
        (terms(logs="debug"), r"which the policy forbids \(debug, by default: there is no policy file\)$"),
        (lambda welcome: msgspec.structs.replace(welcome, protocol=PROTOCOL + 1), r"this client \d+; update one$"),
    ):
        with serving(ADAPTER) as trap, line(trap, twist, Insecure()) as way:
            made = Document.of(values(tmp_path, way.address, {}), tmp_path)
            with pytest.raises(PolicyRefused, match=words):
                Client(made, insecure=True)
