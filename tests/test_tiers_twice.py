"""Edges and clouds that fail while another failure is being mended, and edges that come back when they should not."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch

from conftest import credentials
from noren.config import Document
from noren.errors import ConfigError, LinkError, OverBudget, Overloaded, PeerError, SessionLost
from noren.parties.client import Client
from noren.parties.server import SpanServer
from noren.parties.serving import Serving
from noren.partition.stage import Stage, open_slice
from noren.training.joint import Joint
from noren.training.loop import Trainer
from noren.types import Forward, Message, Pull
from noren.wire.grpc_link import GrpcLink
from noren.wire.grpc_server import GrpcServer
from noren.wire.identity import Insecure, ensure
from noren.wire.journal import Journal
from test_tiers import FORWARD, LORA, PLAN, Doors, Tiers, group, same, tiers, train
from test_tiers import doors as doors
from test_tiers import undisturbed as undisturbed
from test_together import datasets, differ, settings


@pytest.mark.parametrize("killed", [("forward", "4.0"), ("forward", "3.1")], ids=["between steps", "in a step"])
@pytest.mark.parametrize("again", [("forward", "3.0"), ("backward", "3.0")], ids=["forward", "backward"])
def test_what_is_sent_again_is_interrupted(
    llama_folder: Path, keys: Path, undisturbed: Any, killed: tuple[str, str], again: tuple[str, str]
) -> None:
    """The next edge is busy just then: all of it is sent once more, and the step has all its gradients."""
    with tiers(llama_folder, keys) as at:
        done: list[str] = []

        def spoil(edge: int, message: Message) -> None:
            asked = message.kind, getattr(message.meta, "session", "")
            if not done and asked == killed:
                done.append("killed")
                at.kill(edge)
                raise SessionLost("killed")
            if done == ["killed"] and edge == 1 and asked == again:
                done.append("busy")
                raise Overloaded("busy", 0.1)

        at.spoil = spoil
        user = at.user(0, first=0)
        outcome = train([user], datasets()[:1], accumulate=2)[0]
        assert done == ["killed", "busy"] and at.cloud.steps == 4
        same(undisturbed(), (outcome.losses, user.adapter_state() | user.pull(optimizer=True)))


def test_an_edge_without_a_cloud_is_left(llama_folder: Path, keys: Path, undisturbed: Any) -> None:
    """It answers, but cannot reach the cloud; another one can."""
    with tiers(llama_folder, keys) as at:

        def spoil(edge: int, message: Message) -> None:
            if edge == 0 and message.kind == "forward" and message.meta.session.startswith("3"):  # type: ignore[union-attr]
                raise LinkError("the cloud cannot be reached")

        at.spoil = spoil
        user = at.user(0, first=0)
        outcome = train([user], datasets()[:1], accumulate=2)[0]
        assert user.link.moves == 1  # type: ignore[union-attr]
        same(undisturbed(), (outcome.losses, user.adapter_state() | user.pull(optimizer=True)))


def test_a_broken_line_in_plain_text_takes_nothing_over(llama_folder: Path, keys: Path, undisturbed: Any) -> None:
    """Where nobody says who it is, a client that comes back to its edge is not taken for an edge itself."""
    with ExitStack() as stack:

        def party(name: str, following: Any = None) -> tuple[SpanServer, str]:
            server = SpanServer(Stage.load(llama_folder, PLAN, name, "causal-lm"), lora=LORA, following=following)
            stack.callback(server.close)
            port = stack.enter_context(GrpcServer("127.0.0.1:0", Insecure(), server.connect)).port
            return server, f"127.0.0.1:{port}"

        cloud, address = party("cloud")

        def line(greet: Any, greeted: Any, expect: Any) -> GrpcLink:
            return GrpcLink(address, Insecure(), greet=greet, greeted=greeted, expect=expect)

        links = {"edge": [party("edge", line)[1] for _ in range(2)]}
        values = {"model": str(llama_folder), "plan": PLAN, "adapter": _adapter(), "seed": 1, "links": links,
                  "edges": {"assign": "first"}}  # fmt: skip
        client = Client(Document.of(values, Path.cwd()), insecure=True)
        stack.callback(client.close)
        trainer = Trainer(client.model, datasets()[0], [], settings(accumulate=2), pad_id=0, seed=3,
                          remote=client.remote())  # fmt: skip
        broken: list[str] = []
        ask = client.span.handler

        def breaking(message: Message) -> Message:
            session = getattr(message.meta, "session", "")
            if session in ("3.1", "4.0") and (message.kind, session) not in broken:
                broken.append((message.kind, session))  # type: ignore[arg-type]
                client.link._link._drop()  # type: ignore[union-attr]
            return ask(message)

        client.span.handler = breaking
        outcome = trainer.run()
        assert len(broken) >= 3 and client.link.moves == 0 and cloud.steps == 4  # type: ignore[union-attr]
        same(undisturbed(), (outcome.losses, client.adapter_state() | client.pull(optimizer=True)))


def _adapter() -> dict[str, Any]:
    return dict(msgspec.to_builtins(LORA))


class Restartable(Tiers):
    """Tiers whose cloud can be ended and started again on its journal, at the same port."""

    def _party(self, party: str, following: Any, name: str) -> SpanServer:
        if party != "cloud":
            return super()._party(party, following, name)
        assert self.journal is not None
        self.kept = Journal(self.journal / name)
        return SpanServer(Stage.load(self.folder, PLAN, party, "causal-lm"), lora=LORA, journal=self.kept)

    def _listen(self, server: SpanServer, name: str) -> GrpcServer:
        if name != "cloud":
            return super()._listen(server, name)
        address = f"127.0.0.1:{getattr(self, 'cloud_port', 0)}"
        self.door = GrpcServer(address, credentials(self.keys, name), server.connect).start()
        return self.door

    def end(self) -> None:
        self.door.stop(0.1)
        self.cloud.close()
        self.kept.close()

    def restart(self) -> None:
        self.end()
        self.cloud = self._party("cloud", None, "cloud")
        self._listen(self.cloud, "cloud")


@pytest.mark.parametrize("what", ["nothing", "edge and cloud", "cloud in the last step"])
def test_a_shared_adapter_counts_each_contribution_once(
    llama_folder: Path, keys: Path, tmp_path: Path, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever is restarted while one user has contributed to a step, and the other waits for it to be made."""
    steps: list[dict[str, float]] = []
    make = Joint.step

    def counted(joint: Joint) -> None:
        if joint.targets:
            steps.append(dict(joint.targets))
        make(joint)

    monkeypatch.setattr(Joint, "step", counted)
    with ExitStack() as stack:
        at = Restartable(llama_folder, keys, stack, 2, tmp_path)
        stack.callback(at.end)
        done: list[int] = []
        waits = threading.Event()

        def spoil(edge: int, message: Message) -> None:
            session = getattr(message.meta, "session", "")
            if edge == 1 and (message.kind == "step" or (message.kind == "forward" and session == "4.0")):
                waits.set()
            if edge or done or message.kind != "backward":
                return
            if what == "edge and cloud" and session == "3.0":
                done.append(edge)
                (own,) = at.edges[0].runs.values()
                own.following.beyond(message)  # type: ignore[union-attr]
                waits.wait(10)
                at.kill(0)
                at.restart()
                raise LinkError("killed")
            if what == "cloud in the last step" and session == "4.0":
                done.append(edge)
                waits.clear()
                waits.wait(5)  # the other one asks for the last step, and waits for this one
                time.sleep(0.3)
                at.restart()

        at.spoil = spoil
        together = group(2, cloud_adapter="shared", every=100, clip=0.0, wait_seconds=8.0)
        users = [at.user(n, first=n, together=together) for n in range(2)]
        outcomes = train(users, datasets()[:2], optimizer="sgd", lr=0.1)
        assert [outcome.step for outcome in outcomes] == [4, 4] and bool(done) == (what != "nothing")
        assert len(steps) == 4 and all(len(targets) == 2 for targets in steps), steps
        (one, _), *rest = at.cloud.groups._groups.values()
        assert not rest and one.body is not None and one.body.step == 4
        states = [user.adapter_state() for user in users]
        reference = RESULTS.setdefault("shared", states)
        assert max(differ(a, b) for a, b in zip(states, reference, strict=True)) <= 2e-5


RESULTS: dict[str, Any] = {}


def test_a_takeover_and_a_failing_request_do_not_wait_for_each_other(doors: Doors) -> None:
    """The journal is full while another edge takes the run over."""
    first, answers = doors.line("edge-0"), list[str]()
    token = doors.greet(first).incarnation
    run = doors.server.runs["edge-0", "u0/run"]
    inside, go = threading.Event(), threading.Event()

    def full(*given: Any, **more: Any) -> None:
        inside.set()
        go.wait(10)
        raise OverBudget("the journal is full")

    run.ledger.keep = full  # type: ignore[method-assign]

    def say(work: Callable[[], Any]) -> None:
        try:
            answers.append(type(work()).__name__)
        except Exception as error:
            answers.append(type(error).__name__)

    hidden = torch.ones(2, doors.stage.hidden_size)
    request = threading.Thread(target=say, args=(lambda: first(Message(Forward(**FORWARD), {"hidden": hidden})),))
    request.start()
    assert inside.wait(10)
    second = doors.line("edge-1")
    greeting = threading.Thread(target=say, args=(lambda: doors.greet(second, resume=token, moved=True),))
    greeting.start()
    time.sleep(0.3)
    go.set()
    for one in (request, greeting):
        one.join(10)
        assert not one.is_alive()
    assert sorted(answers) == ["OverBudget", "Welcome"]


def test_a_former_edge_that_comes_back_displaces_nobody(llama_folder: Path, keys: Path) -> None:
    """It greets the cloud for a user that has gone on elsewhere; the group still knows the one that trains."""
    with tiers(llama_folder, keys) as at:
        user = at.user(0, first=0, together=group(2, wait_seconds=0.2))
        (former,) = at.edges[0].runs.values()
        user.link._move(user.link._link, LinkError("paused"))  # type: ignore[union-attr]
        user.link(Message(Pull()))
        real = at.cloud.runs["edge-1", "u0/run"]
        for _ in range(3):
            with suppress(PeerError):
                former.following(Message(Pull()))  # type: ignore[misc]
        assert ("edge-0", "u0/run") in at.cloud.runs, "it has begun a run of its own"
        assert real.group is not None and real.group.runs[real.member] is real and not real.closed
        at.cloud.table.close("edge-0", "u0/run", forget=True)
        assert real.group.runs[real.member] is real
        time.sleep(0.4)
        assert real.group._is_here(real.member)


def document(folder: Path, place: Path, base: Path, **more: Any) -> Document:
    values = {"model": str(folder), "plan": PLAN, "adapter": _adapter(), "seed": 1, "keys": {"dir": str(place)},
              "edges": {"assign": "first", "switch_seconds": 0.5}}  # fmt: skip
    return Document.of(values | more, base)


def test_a_stand_in_in_the_same_folder(llama_folder: Path, keys: Path, tmp_path: Path, undisturbed: Any) -> None:
    """One document, one folder: the edge dies and leaves its journal, the cloud stands in, and is stopped at last."""
    for name, role in (("cloud", "server"), ("edge", "edge"), ("u0", "client")):
        ensure(keys, name, role)  # type: ignore[arg-type]
    with ExitStack() as stack:
        place = torch.device("cpu")

        def serving(party: str, links: dict[str, Any]) -> Serving:
            made = document(llama_folder, keys, tmp_path, links=links, serve={"drain_seconds": 0.2})
            part = open_slice(made.model, made.run.plan, party, made.run.task)
            return stack.enter_context(Serving(made, part, place, insecure=False))

        cloud = serving("cloud", {})
        cloud_port = cloud.listen("127.0.0.1:0")
        spare = cloud.stand_in("edge=127.0.0.1:0")
        edge = serving("edge", {"cloud": f"127.0.0.1:{cloud_port}"})
        addresses = [f"127.0.0.1:{edge.listen('127.0.0.1:0')}", f"127.0.0.1:{spare}"]
        own = {"links": {"edge": addresses}, "keys": {"dir": str(keys), "name": "u0"}}
        user = Client(document(llama_folder, keys, tmp_path, **own, wire={"patience_seconds": 3.0}))
        trainer = Trainer(user.model, datasets()[0], [], settings(accumulate=2), pad_id=0, seed=3, remote=user.remote())
        plan, losses = trainer._plan(), []
        for step in range(4):
            if step == 2:
                edge.__exit__()
            losses.append(trainer.step([[datasets()[0][i] for i in batch] for batch in next(plan)])[0])
            trainer.outcome.step += 1
        user.span.flush()
        same(undisturbed(), (losses, user.adapter_state() | user.pull(optimizer=True)))
        ended: list[BaseException] = []

        def on() -> None:
            endless = Trainer(user.model, datasets()[0], [], settings(10_000), pad_id=0, seed=3, remote=user.remote())
            try:
                endless.run()
            except BaseException as error:
                ended.append(error)

        user.link.patience = 1.0
        training = threading.Thread(target=on, daemon=True)
        training.start()
        time.sleep(0.5)
        cloud.drain(hurry=lambda: False)
        cloud.__exit__()
        training.join(30)
        assert isinstance(ended[0], LinkError), "it waits for those who are gone, and is told nothing else"


def test_several_edges_are_for_three_tiers(llama_folder: Path) -> None:
    four = ["client :2", "edge 2:3", "middle 3:4", "cloud 4:6", "client 6:"]
    values: dict[str, Any] = {"model": str(llama_folder), "plan": four, "links": {"edge": ["a:1", "b:2"]}}
    with pytest.raises(ConfigError, match="one more party after them"):
        Document.of(values, Path.cwd())
    with pytest.raises(ConfigError, match="builds on what one party holds"):
        Document.of(values | {"plan": PLAN, "wire": {"activations": "delta"}}, Path.cwd())


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("edge", "is not PARTY=host:port"),
        ("edge=127.0.0.1", "'127.0.0.1' is not host:port"),
        ("cloud=127.0.0.1:0", "does not come right before 'cloud'"),
        ("other=127.0.0.1:0", "does not come right before 'cloud'"),
    ],
)
def test_a_stand_in_is_said_in_one_way(llama_folder: Path, keys: Path, tmp_path: Path, text: str, words: str) -> None:
    ensure(keys, "cloud", "server")
    made = document(llama_folder, keys, tmp_path, serve={"journal": ""})
    part = open_slice(made.model, made.run.plan, "cloud", made.run.task)
    with (
        Serving(made, part, torch.device("cpu"), insecure=False) as serving,
        pytest.raises(ConfigError, match=words),
    ):
        serving.stand_in(text)
