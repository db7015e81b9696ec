"""A party's runs: what one owner's may take on the disk, and how they are opened."""

from __future__ import annotations

import copy
from pathlib import Path

import msgspec
import pytest

from conftest import identity
from noren.errors import OverBudget
from noren.parties.connection import Connection
from noren.parties.server import Limits, SpanServer
from noren.partition.stage import Stage
from noren.types import Message
from noren.wire.envelope import reopen
from noren.wire.journal import Journal
from step_tape import Tape, build_stages, tape


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Stage:
    return build_stages(tmp_path_factory.mktemp("runs"), ["client :1", "server 1:2", "client 2:"])["server"]


def enter(server: SpanServer, owner: str, name: str, recorded: Tape) -> Connection:
    """A connection that has opened a run."""
    connection = server.connect(identity(owner))
    connection(Message(msgspec.structs.replace(recorded.hello, run=name)))
    return connection


def train(connection: Connection, recorded: Tape, requests: int = 12) -> None:
    """Ask what was recorded. Raises PeerError."""
    for request in recorded.requests[:requests]:
        connection(reopen(*request))


def test_an_owner_has_a_quota_of_the_journal(stage: Stage, tmp_path: Path) -> None:
    """All runs of an owner count together, and no other's do; what has been kept stays."""
    recorded = tape(stage, 0)
    with Journal(tmp_path / "measured") as journal:
        server = SpanServer(copy.deepcopy(stage), lora=recorded.lora, journal=journal)
        train(enter(server, "alpha", "one", recorded), recorded)
        size = journal.used_by("alpha/")
        server.close()
    most = 3 * size  # a step is written before what it replaces is dropped
    with Journal(tmp_path / "journal") as journal:
        limits = Limits(journal_bytes_each=most)
        server = SpanServer(copy.deepcopy(stage), lora=recorded.lora, journal=journal, limits=limits)
        train(enter(server, "alpha", "one", recorded), recorded)
        with pytest.raises(OverBudget, match=f"for 'alpha', and the limit for one owner is {most}"):
            for name in ("two", "three", "four"):
                train(enter(server, "alpha", name, recorded), recorded)
        left = [run for owner, run in server.runs if owner == "alpha"]
        assert "one" in left and journal.used_by("alpha/") == len(left) * size <= most, "what was too much is gone"
        for owner in ("beta", "alpha-2"):
            train(enter(server, owner, "one", recorded), recorded)
            assert journal.used_by(f"{owner}/") == size
        assert server.runs["alpha", "one"].trainer.step == server.runs["beta", "one"].trainer.step > 0
        server.close()
