"""`noren train` that was killed and started again: the count of what has left goes on, and so does the secret."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from conftest import U_SHAPED, identity
from noren.config import Document
from noren.embedded import MODEL_DIR
from noren.errors import LinkError, PolicyRefused
from noren.parties.server import SpanServer
from noren.parties.train import train
from noren.partition.stage import Stage
from noren.types import Backward, Forward, Message
from noren.wire.journal import Journal
from test_policy import policy as policy
from test_policy import values
from test_release import Crash, Tap, spent

RUN = "restarted"


@dataclass
class Lives:
    """A run document, the server, and one `train` after another."""

    made: Document
    tap: Tap
    seen: list[list[Message]] = field(default_factory=list)  # in each life

    def live(self, dies: Callable[[Message], bool] | None, *, resume: bool, goodbye: bool = True) -> Any:
        """Train until `dies` is true of a message that was answered. Raises Crash, and PeerError as `train` does.

        Without `goodbye`, the server does not hear that its client ends.
        """
        dead: list[bool] = []

        def before(message: Message) -> None:
            if dead:  # a process that is gone says no goodbye
                raise Crash
            if message.kind == "close" and not goodbye:
                raise LinkError("nobody hears this")

        def after(message: Message) -> None:
            if dies is not None and dies(message):
                dead.append(True)
                raise Crash

        self.tap.seen, self.tap.before, self.tap.after = [], before, after
        line = self.tap.connect(identity("client"))
        try:
            return train(self.made, resume=resume, handler=line)
        finally:
            line.disconnect()
            self.seen.append([m for m in self.tap.seen if isinstance(m.meta, Forward | Backward)])

    def spent(self) -> int:
        return spent(self.made.out / "journal", RUN)

    def secret(self) -> bytes:
        with Journal(self.made.out / "journal") as journal:
            found = journal.read(RUN, "secret")
        assert found is not None and found.body is not None and len(found.body) == 32
        return found.body


def serving() -> SpanServer:
    stage = Stage.load(str(MODEL_DIR), U_SHAPED, "server", "causal-lm")
    return SpanServer(stage, lora=Document.of({"model": "x", "adapter": ADAPTER}, Path()).run.adapter)


ADAPTER = {"r": 2, "targets": ["q_proj"]}


@pytest.fixture
def lives(tmp_path: Path) -> Iterator[Lives]:
    changes = {"name": RUN, "adapter": ADAPTER, "training": {"steps": 3, "batch_size": 4, "save_every": 1}}
    tap = Tap(serving())
    yield Lives(Document.of(values(tmp_path, "127.0.0.1:1", changes), tmp_path), tap)
    tap.server.close()


def vectors(messages: list[Message]) -> int:
    return sum(len(next(iter(m.tensors.values()))) for m in messages)


def name_of(message: Message) -> tuple[str, str]:
    """The name under which a message leaves once; that of an evaluation is no name."""
    meta = message.meta
    named = isinstance(meta, Backward) or (isinstance(meta, Forward) and meta.train)
    return message.kind, meta.session if named else ""  # type: ignore[union-attr]


def bodies(messages: list[Message], name: tuple[str, str]) -> set[bytes]:
    return {next(iter(m.tensors.values())).numpy().tobytes() for m in messages if name_of(m) == name}


@pytest.mark.parametrize("lost", [False, True], ids=["the server is there", "the server lost the run"])
def test_T24_a_run_that_is_started_again(lost: bool, lives: Lives, policy: Callable[[str], Path]) -> None:
    policy("")
    with pytest.raises(Crash):  # while it evaluates, before there is a step to go on from
        lives.live(lambda m: m.kind == "forward", resume=False)
    secret, count = lives.secret(), lives.spent()
    assert count == vectors(lives.seen[0]) > 0

    with pytest.raises(Crash):
        lives.live(lambda m: name_of(m) == ("forward", "2.0"), resume=False)
    count += vectors(lives.seen[1])
    assert lives.spent() == count and lives.secret() == secret

    policy(f"most_vectors = {count}")
    with pytest.raises(PolicyRefused, match=f"the policy's budget is {count}; nothing was sent"):
        lives.live(None, resume=True, goodbye=False)
    again = bodies(lives.seen[2], ("forward", "2.0"))
    assert again == bodies(lives.seen[1], ("forward", "2.0")) and vectors(lives.seen[2]) == vectors(lives.seen[1][-1:])
    assert lives.spent() == count and lives.secret() == secret

    policy("")
    if lost:
        lives.tap.server.close()
        lives.tap.server = serving()
    done = lives.live(None, resume=True)
    assert done.outcome.step == 3 and not done.outcome.interrupted
    assert bodies(lives.seen[3], ("forward", "2.0")) == again, "the noise of a step is not drawn anew"
    known = set() if lost else {name_of(m) for m in lives.seen[1]} - {("forward", "")}
    assert lives.spent() == count + vectors([m for m in lives.seen[3] if name_of(m) not in known])
    assert lives.secret() == secret
