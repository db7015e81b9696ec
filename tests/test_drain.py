"""A party that was told to stop: it says so, takes no new runs, goes on with those that it has, and ends."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from conftest import U_SHAPED
from noren.config import Document
from noren.embedded import MODEL_DIR
from noren.errors import Overloaded
from noren.parties.client import Client
from noren.types import Condition, Message, Status
from noren.wire import grpc_link
from noren.wire.grpc_link import GrpcLink
from noren.wire.identity import Insecure
from noren.wire.inflight import InFlight
from noren.wire.observe import check_health
from zygote import Child, Zygote

DRAIN = 20.0
Start = Callable[[], tuple[Child, str]]


@pytest.fixture(scope="module")
def zygote() -> Iterator[Zygote]:
    with Zygote() as made:
        yield made


def values(address: str, **more: Any) -> dict[str, Any]:
    wire = {"patience_seconds": 1.0}
    return {"model": str(MODEL_DIR), "plan": U_SHAPED, "links": {"server": address}, "wire": wire, **more}


@pytest.fixture
def start(zygote: Zygote, tmp_path: Path) -> Start:
    def serve() -> tuple[Child, str]:
        made = Document.of(values("127.0.0.1:0", serve={"drain_seconds": DRAIN}), tmp_path)
        (tmp_path / "run.toml").write_text(made.to_toml())
        words = ["serve", "run.toml", "--party", "server", "--insecure", "--json"]
        child = zygote.start(words, cwd=tmp_path, stdout=tmp_path / "out", env={"NOREN_CACHE": str(tmp_path / "cache")})
        return child, f"127.0.0.1:{json.loads(child.first_line())['port']}"

    return serve


def told(address: str) -> Condition:
    link = GrpcLink(address, Insecure())
    try:
        condition = link(Message(Status())).meta
    finally:
        link.close()
    assert isinstance(condition, Condition)
    return condition


def test_a_party_drains_before_it_stops(start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    child, address = start()
    client = Client(Document.of(values(address), tmp_path), insecure=True)
    ids = torch.arange(3, 12).view(1, -1)
    before = client.model(ids).logits
    assert check_health(address, Insecure()) == "SERVING" and not told(address).draining

    child.terminate()
    end = time.monotonic() + 10
    while check_health(address, Insecure()) == "SERVING":
        assert time.monotonic() < end
    assert told(address).draining
    assert torch.equal(client.model(ids).logits, before), "who is here is served"
    waits: list[float] = []
    monkeypatch.setattr(InFlight, "pause", lambda flight, request, seconds: waits.append(seconds))
    monkeypatch.setattr(grpc_link, "stop_after_delay", lambda seconds: lambda state: True)
    with pytest.raises(Overloaded, match="is about to stop; it takes no new connections") as refused:
        Client(Document.of(values(address, name="new"), tmp_path), insecure=True)
    assert refused.value.retry_after == 2.0 == waits[0]
    monkeypatch.undo()

    assert child.alive
    start_of_end = time.monotonic()
    client.close()
    assert child.wait(15) == 0 and time.monotonic() - start_of_end < DRAIN / 2, "it ends when nobody is left"


def test_a_second_signal_ends_the_wait(start: Start, tmp_path: Path) -> None:
    child, address = start()
    client = Client(Document.of(values(address), tmp_path), insecure=True)
    child.terminate()
    end = time.monotonic() + 10
    while not told(address).draining:
        assert time.monotonic() < end
    with pytest.raises(TimeoutError):
        child.wait(1.0)
    child.send(signal.SIGINT)
    assert child.wait(10) == 0
    client.close()
