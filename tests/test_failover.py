"""Generation while servers are killed: the same tokens, and only the client's own record is sent again."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from noren.config import Document
from noren.embedded import MODEL_DIR
from noren.parties.client import Client
from noren.types import Message
from noren.wire.identity import ensure
from test_kill import free_port
from zygote import Child, Zygote

PLAN = ["client :2", "edge 2:4", "server 4:-2", "client -2:"]
NEW_TOKENS = 65
NOISE = {"clip": 1e6}  # a guard that changes nothing here, but counts what leaves


class Chain:
    """Edge and server as processes, and the client of a run here."""

    def __init__(self, zygote: Zygote, folder: Path) -> None:
        self._zygote, self._folder = zygote, folder
        for name, role in (("client", "client"), ("edge", "edge"), ("server", "server")):
            ensure(folder / "keys", name, role)  # type: ignore[arg-type]
        self.ports = {"edge": free_port(), "server": free_port()}
        values = {
            "model": str(MODEL_DIR), "plan": PLAN, "keys": {"dir": str(folder / "keys")}, "noise": NOISE,
            "links": {party: f"127.0.0.1:{port}" for party, port in self.ports.items()},
            "wire": {"keepalive_seconds": 1.0},
        }  # fmt: skip
        self.document = Document.of(values, folder)
        (folder / "run.toml").write_text(self.document.to_toml())
        self.children: dict[str, Child] = {}
        for party in ("server", "edge"):
            self.start(party)

    def start(self, party: str) -> None:
        """Start a party (again)."""
        words = ["serve", "run.toml", "--party", party, "--listen", f"127.0.0.1:{self.ports[party]}", "--json"]
        out, environment = self._folder / f"{party}.out", {"NOREN_CACHE": str(self._folder / "cache")}
        self.children[party] = self._zygote.start(words, cwd=self._folder, stdout=out, env=environment)
        assert json.loads(self.children[party].first_line())["ready"]

    def kill(self, party: str) -> None:
        """End a party at once, and start another in its place."""
        self.children[party].kill()
        self.children[party].wait(timeout=10)
        self.start(party)


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chain]:
    with Zygote() as zygote:
        yield Chain(zygote, tmp_path_factory.mktemp("failover"))


CASES = [(token, "edge" if token % 4 == 0 else "server") for token in range(1, 65)]


@pytest.mark.parametrize(
    "cases",
    [pytest.param([*CASES[::11], CASES[-1]], id="short"), pytest.param(CASES, id="long", marks=[pytest.mark.nightly])],
)
@pytest.mark.timeout(1800)
def test_T17_generation_survives_kills(cases: list[tuple[int, str]], chain: Chain) -> None:
    """SIGKILL of server or edge after each of so many tokens of a greedy generation."""
    tokenizer = AutoTokenizer.from_pretrained(MODEL_DIR)
    prompt = tokenizer("21/05/21 //", return_tensors="pt")
    options = {"max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS, "do_sample": False}
    whole = AutoModelForCausalLM.from_pretrained(MODEL_DIR).eval().requires_grad_(False)
    expected = whole.generate(**prompt, **options)
    client = Client(chain.document)
    ask = client.span.handler
    client.model.generate(**prompt, **options)
    charge = client.releases.spent
    added = []
    for token, party in cases:
        sent, began, spent = [0], [0.0], client.releases.spent

        def killing(
            message: Message, token: int = token, party: str = party, sent: list[int] = sent, began: list[float] = began
        ) -> Message:
            sent[0] += 1
            if sent[0] == token + 1:
                chain.kill(party)
                began[0] = time.monotonic()
            answer = ask(message)
            if began[0]:  # the first answer after the kill: connecting and the replay are in it
                added.append(time.monotonic() - began[0])
                began[0] = 0.0
            return answer

        client.span.handler = killing
        found = client.model.generate(**prompt, **options)
        assert torch.equal(found, expected), (token, party)
        assert client.releases.spent - spent == charge, "a replay was charged"
    client.span.handler = ask
    replays = client.span.replays
    client.close()
    p95 = statistics.quantiles(added, n=20)[18]
    print(
        f"T17: {len(cases)} kills, {replays} replays, equal tokens; a new server answers after "
        f"{statistics.median(added):.2f} s (median), {p95:.2f} s (p95); {charge} vectors charged each time"
    )
    assert replays == len(cases)
