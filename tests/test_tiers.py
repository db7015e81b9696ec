"""Users, edges and a cloud: what is learned is what one machine would learn, whichever edge dies and when."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from torch import Tensor

from conftest import credentials, identity
from noren.adapters.lora import Lora
from noren.config import Document
from noren.errors import ConfigError, HandshakeRefused, LinkError, ProtocolError, SessionLost
from noren.parties.client import Client
from noren.parties.remote_state import incarnation_of
from noren.parties.server import SpanServer
from noren.parties.stand_in import StandIn, beside
from noren.partition.stage import Stage
from noren.training.batches import Row
from noren.training.journal import StepJournal
from noren.training.loop import Outcome, Trainer
from noren.types import PROTOCOL, Forward, Handler, Hello, Message, Optimizer, Pull, Terms, Update, Welcome
from noren.wire.grpc_link import GrpcLink
from noren.wire.grpc_server import GrpcServer
from noren.wire.identity import ensure
from noren.wire.journal import Journal
from noren.wire.local import LocalLink
from noren.wire.settings import Wire
from test_crossing import ADAPTER
from test_together import datasets, differ, settings

PLAN = ["client :2", "edge 2:4", "cloud 4:6", "client 6:"]
LORA = msgspec.convert(ADAPTER | {"parties": ["client", "edge", "cloud"]}, Lora)
CLOSE = 2e-5
"""Largest difference of adapters in fp32: sums in another order, and Adam divides small numbers by their roots."""


class Tiers:
    """A cloud, edges and users, over real sockets. `spoil` may answer a message to the cloud in the cloud's place."""

    def __init__(self, folder: Path, keys: Path, stack: ExitStack, edges: int, journal: Path | None = None) -> None:
        self.folder, self.keys, self.stack, self.journal = folder, keys, stack, journal
        self.spoil: Callable[[int, Message], None] = lambda edge, message: None
        self.cloud = self._party("cloud", None, "cloud")
        for n in range(edges):
            ensure(keys, f"edge-{n}", "edge")
        ensure(keys, "cloud", "server")
        self.cloud_port = self._listen(self.cloud, "cloud").port
        self.edges = [self._party("edge", self._line(n), f"edge-{n}") for n in range(edges)]
        self.doors = [self._listen(edge, f"edge-{n}") for n, edge in enumerate(self.edges)]

    def _party(self, party: str, following: Any, name: str) -> SpanServer:
        journal = self.stack.enter_context(Journal(self.journal / name)) if self.journal is not None else None
        server = SpanServer(
            Stage.load(self.folder, PLAN, party, "causal-lm"), lora=LORA, following=following, journal=journal
        )
        self.stack.callback(server.close)
        return server

    def _listen(self, server: SpanServer, name: str) -> GrpcServer:
        return self.stack.enter_context(GrpcServer("127.0.0.1:0", credentials(self.keys, name), server.connect))

    def _line(self, edge: int) -> Callable[..., Handler]:
        """An edge's lines to the cloud, which tell `spoil` what goes over them."""

        def line(greet: Any, greeted: Any, expect: Any) -> Any:
            address, own = f"127.0.0.1:{self.cloud_port}", credentials(self.keys, f"edge-{edge}")
            link = GrpcLink(address, own, greet=greet, greeted=greeted, expect=expect, wire=Wire(patience_seconds=5))
            tiers = self

            class Line:
                beyond = link

                def __call__(self, message: Message) -> Message:
                    tiers.spoil(edge, message)
                    return link(message)

                def close(self) -> None:
                    link.close()

            return Line()

        return line

    def kill(self, edge: int) -> None:
        """End an edge as its users see it: nobody answers there any more. Called by one of its own threads."""
        self.doors[edge].stop()

    def user(
        self, n: int, first: int | None = None, journal: Journal | None = None, resume: str = "", **fields: Any
    ) -> Client:
        ensure(self.keys, f"u{n}", "client")
        order = [f"127.0.0.1:{door.port}" for door in self.doors]
        turn = (n if first is None else first) % len(order)
        values = {"model": str(self.folder), "plan": PLAN, "adapter": msgspec.to_builtins(LORA), "seed": 1,
                  "links": {"edge": order[turn:] + order[:turn]}, "edges": {"assign": "first", "switch_seconds": 0.3},
                  "keys": {"dir": str(self.keys), "name": f"u{n}"}}  # fmt: skip
        client = Client(Document.of(values | fields, Path.cwd()), journal=journal, resume=resume)
        self.stack.callback(client.close)
        return client


@contextmanager
def tiers(folder: Path, keys: Path, edges: int = 2, journal: Path | None = None) -> Iterator[Tiers]:
    with ExitStack() as stack:
        yield Tiers(folder, keys, stack, edges, journal)


def train(clients: list[Client], data: list[list[Row]], **training: Any) -> list[Outcome]:
    trainers = [
        Trainer(client.model, own, [], settings(**training), pad_id=0, seed=3, remote=client.remote())
        for client, own in zip(clients, data, strict=True)
    ]
    with ThreadPoolExecutor(len(trainers)) as pool:
        return [future.result(timeout=120) for future in [pool.submit(trainer.run) for trainer in trainers]]


def group(users: int, **more: Any) -> dict[str, Any]:
    return {"mode": "server-hierarchical", "clients": users, "every": 2, "wait_seconds": 20.0} | more


def learned(folder: Path, keys: Path, edges: int, **together: Any) -> list[dict[str, Tensor]]:
    """What three users learn over so many edges."""
    with tiers(folder, keys, edges) as at:
        users = [at.user(n, together=group(3, **together)) for n in range(3)]
        train(users, datasets())
        return [user.adapter_state() for user in users]


@pytest.mark.parametrize("ends", [False, True], ids=["edges", "users too"])
def test_averages_of_users_at_several_edges_are_those_at_one(llama_folder: Path, keys: Path, ends: bool) -> None:
    """Which is what one server makes of them (test_together), whose averages are checked from outside."""
    one, three = (learned(llama_folder, keys, edges, ends=ends) for edges in (1, 3))
    for alone, apart in zip(one, three, strict=True):
        assert differ(alone, apart) <= CLOSE
    remote = {n for n in three[0] if any(f"layers.{i}." in n for i in range(2, 6))}
    assert len(remote) > 4
    for name in three[0] if ends else remote:
        assert all(torch.equal(three[0][name], other[name]) for other in three[1:]), name
    own = set(three[0]) - remote
    assert ends or any(not torch.equal(three[0][name], three[1][name]) for name in own)


def test_an_average_over_edges_is_the_weighted_mean(llama_folder: Path, keys: Path) -> None:
    """Against replicas trained alone and averaged from outside."""
    data, weights = datasets()[:2], []
    with tiers(llama_folder, keys) as at:
        alone = [at.user(n, name="alone") for n in range(2)]
        train(alone, data, steps=2)
        replicas = [user.adapter_state() for user in alone]
        together = [at.user(n, name="together", together=group(2)) for n in range(2)]
        train(together, data, steps=2)
        found = [user.adapter_state() for user in together]
    for own in data:
        trainer = Trainer(torch.nn.Linear(1, 1), own, [], settings(steps=2), pad_id=0, seed=3)
        weights.append(sum(len(own[i]["input_ids"]) for step in trainer._plan() for batch in step for i in batch))
    for name in found[0]:
        mean = sum(w * replica[name].double() for w, replica in zip(weights, replicas, strict=True)) / sum(weights)
        if any(f"layers.{i}." in name for i in range(2, 6)):
            assert float((found[0][name] - mean).abs().max()) <= CLOSE, name
            assert torch.equal(found[0][name], found[1][name])


def test_a_shared_cloud_adapter_learns_the_joined_batch(llama_folder: Path, keys: Path) -> None:
    """With `cloud_adapter = "shared"` the cloud trains as in client-batch, whichever edges the users come through."""
    out = []
    for edges in (1, 2):
        with tiers(llama_folder, keys, edges) as at:
            users = [at.user(n, together=group(2, cloud_adapter="shared", clip=0.0)) for n in range(2)]
            train(users, datasets()[:2], optimizer="sgd", lr=0.1)
            assert at.cloud.steps == 4 and {run.trainer.step for run in at.cloud.runs.values()} == {4}
            assert len({id(run.group) for run in at.cloud.runs.values()}) == 1
            out.append([user.adapter_state() for user in users])
    for one, two in zip(*out, strict=True):
        assert differ(one, two) <= CLOSE
    cloud = [name for name in out[0][0] if "layers.4." in name or "layers.5." in name]
    assert cloud and all(torch.equal(out[1][0][name], out[1][1][name]) for name in cloud)


MOMENTS = {
    "before a forward": ("forward", "3.0"),
    "before a backward": ("backward", "3.0"),
    "before the second pass of a step": ("forward", "3.1"),
    "before an average": ("average", ""),
    "before the last step": ("step", ""),
}


def dying(
    folder: Path,
    keys: Path,
    kind: str,
    session: str,
    *,
    answered: bool = False,
    journal: Path | None = None,
    **fields: Any,
) -> tuple[list[float], dict[str, Tensor]]:
    """Train a user whose edge dies as it is about to ask the cloud for that, or when the cloud has answered."""
    with tiers(folder, keys, journal=journal) as at:
        done: list[int] = []

        def spoil(edge: int, message: Message) -> None:
            if done or message.kind != kind or session != getattr(message.meta, "session", ""):
                return
            done.append(edge)
            if answered:
                (own,) = at.edges[edge].runs.values()
                own.following.beyond(message)  # type: ignore[union-attr]
            at.kill(edge)
            raise SessionLost("killed")

        at.spoil = spoil
        user = at.user(0, first=0, **fields)
        joined = fields.get("together", {}).get("cloud_adapter") == "shared"
        more = {"accumulate": 1 if joined else 2} | fields.get("training", {})
        outcome = train([user], datasets()[:1], **more)[0]
        assert outcome.step == 4 and done == ([0] if kind else []) and user.link.moves == len(done)
        assert at.cloud.steps == 4, "each step once"
        return outcome.losses, user.adapter_state() | user.pull(optimizer=True)


@pytest.fixture(scope="module")
def undisturbed(llama_folder: Path, keys: Path) -> Callable[..., tuple[list[float], dict[str, Tensor]]]:
    """What is learned where no edge dies."""
    known: dict[str, tuple[list[float], dict[str, Tensor]]] = {}

    def learned(**fields: Any) -> tuple[list[float], dict[str, Tensor]]:
        if str(fields) not in known:
            known[str(fields)] = dying(llama_folder, keys, "", "", **fields)
        return known[str(fields)]

    return learned


def same(one: tuple[list[float], dict[str, Tensor]], two: tuple[list[float], dict[str, Tensor]]) -> None:
    assert one[0] == two[0] and one[1].keys() == two[1].keys()
    assert all(torch.equal(tensor, two[1][name]) for name, tensor in one[1].items())


@pytest.mark.parametrize(
    ("moment", "answered", "kept"),
    [(moment, answered, kept) for moment in MOMENTS for answered in (False, True) for kept in (False, True)
     if not kept or answered == ("forward" in moment or "step" in moment)],
)  # fmt: skip
def test_an_edge_that_dies_is_replaced(
    llama_folder: Path, keys: Path, tmp_path: Path, undisturbed: Any, moment: str, answered: bool, kept: bool
) -> None:
    """Its user goes on at another edge, and learns bit for bit what it would have learned: no step lost, none twice."""
    kind, session = MOMENTS[moment]
    fields = {"together": group(1)} if kind == "average" else {}
    found = dying(llama_folder, keys, kind, session, answered=answered, journal=tmp_path if kept else None, **fields)
    same(undisturbed(**fields), found)


@pytest.mark.parametrize("session", ["3.0", "3.1"])
@pytest.mark.parametrize("kind", ["forward", "backward"])
@pytest.mark.parametrize("answered", [False, True], ids=["not answered", "answered"])
def test_an_edge_dies_with_several_requests_under_way(
    llama_folder: Path, keys: Path, undisturbed: Any, kind: str, session: str, answered: bool
) -> None:
    fields = {"training": {"micro_batches": 2}}
    same(undisturbed(**fields), dying(llama_folder, keys, kind, session, answered=answered, **fields))


@pytest.mark.parametrize("kind", ["forward", "backward"])
@pytest.mark.parametrize("answered", [False, True], ids=["not answered", "answered"])
def test_an_edge_dies_under_a_shared_cloud_adapter(
    llama_folder: Path, keys: Path, undisturbed: Any, kind: str, answered: bool
) -> None:
    """What the cloud has counted it does not count again."""
    fields = {"together": group(1, cloud_adapter="shared", every=3)}
    same(undisturbed(**fields), dying(llama_folder, keys, kind, "3.0", answered=answered, **fields))


@pytest.mark.parametrize("moment", ["before a forward", "before a backward", "before the second pass of a step"])
def test_user_and_edge_die_together(
    llama_folder: Path, keys: Path, tmp_path: Path, undisturbed: Any, moment: str
) -> None:
    """The user comes back with its journal, finds the other edge, and sends again what was not finished."""
    kind, session = MOMENTS[moment]
    with tiers(llama_folder, keys, journal=tmp_path) as at, Journal(tmp_path / "user") as journal:
        done: list[int] = []

        def spoil(edge: int, message: Message) -> None:
            if done or message.kind != kind or session != getattr(message.meta, "session", ""):
                return
            done.append(edge)
            at.kill(edge)
            raise SessionLost("killed")

        def trainer(client: Client) -> Trainer:
            kept = StepJournal(journal, "run")
            return Trainer(
                client.model, datasets()[0], [], settings(accumulate=2), pad_id=0, seed=3, remote=client.remote(),
                journal=kept,
            )  # fmt: skip

        at.spoil = spoil
        first = at.user(0, first=0, journal=journal)
        first.link._addresses = first.link._addresses[:1] * 2  # type: ignore[union-attr]  # it dies before it moves
        first.link.patience = 0.1
        with pytest.raises(LinkError):
            trainer(first).run()
        first._closed = True
        kept = StepJournal(journal, "run").read()
        assert kept is not None and done == [0]
        second = at.user(0, first=0, journal=journal, resume=incarnation_of(kept.position))
        again = trainer(second)
        assert again.resume() == 2
        outcome = again.run()
        assert outcome.step == 4 and at.cloud.steps == 4
        same(undisturbed(), (outcome.losses, second.adapter_state() | second.pull(optimizer=True)))


def by_hand(user: Client, after: Callable[[int], None]) -> list[float]:
    """Make four steps; returns their losses. `after` is called after each but the last."""
    data, losses = datasets()[0], list[float]()
    trainer = Trainer(user.model, data, [], settings(accumulate=2), pad_id=0, seed=3, remote=user.remote())
    for step, numbers in enumerate(trainer._plan(), 1):
        losses.append(trainer.step([[data[i] for i in batch] for batch in numbers])[0])
        trainer.outcome.step = step
        if step < 4:
            after(step)
    user.span.flush()
    return losses


def test_an_edge_that_is_come_back_to_has_forgotten_what_it_knew(
    llama_folder: Path, keys: Path, undisturbed: Any
) -> None:
    """Edge 0 dies for its user only, and still holds the run when the user returns to it two steps later."""
    with tiers(llama_folder, keys) as at:
        user = at.user(0, first=0)

        def after(step: int) -> None:
            if step in (2, 3):
                user.link._move(user.link._link, LinkError("as if it were gone"))  # type: ignore[union-attr]

        losses = by_hand(user, after)
        assert at.cloud.steps == 4 and user.link.moves == 2  # type: ignore[union-attr]
        same(undisturbed(), (losses, user.adapter_state() | user.pull(optimizer=True)))


def test_the_cloud_too_is_restarted(llama_folder: Path, keys: Path, tmp_path: Path, undisturbed: Any) -> None:
    """The run is taken over from the cloud's journal."""
    with tiers(llama_folder, keys, journal=tmp_path) as at:
        user = at.user(0, first=0)

        def after(step: int) -> None:
            if step == 2:
                at.kill(0)
                for key in list(at.cloud.runs):
                    at.cloud.table.close(*key, forget=False)
                assert not at.cloud.runs

        losses = by_hand(user, after)
        same(undisturbed(), (losses, user.adapter_state() | user.pull(optimizer=True)))
        assert list(at.cloud.runs) == [("edge-1", "u0/run")]


class Doors:
    """A cloud that has a run of edge "edge-0", and lines to it."""

    def __init__(self, folder: Path, stack: ExitStack) -> None:
        self.stage = Stage.load(folder, PLAN, "cloud", "causal-lm")
        self.server = SpanServer(self.stage, lora=LORA)
        stack.callback(self.server.close)
        mine = self.server.terms(Terms(fingerprint="", plan=[], task="", dtype="", lora="x", seed=1, replaceable=True))
        self.shapes = {"model.layers.2.self_attn.q_proj.lora_A.weight": [4, 48]}
        self.hello = Hello(protocol=PROTOCOL, run="u0/run", terms=mine, before=self.shapes)

    def line(self, name: str, role: str = "edge") -> LocalLink:
        return LocalLink(self.server.connect(identity(name, role)))

    def greet(self, line: LocalLink, **more: Any) -> Welcome:
        answer = line(Message(msgspec.structs.replace(self.hello, **more))).meta
        assert isinstance(answer, Welcome)
        return answer


@pytest.fixture
def doors(llama_folder: Path) -> Iterator[Doors]:
    with ExitStack() as stack:
        yield Doors(llama_folder, stack)


def test_a_run_is_taken_over_by_an_edge_with_its_token_and_by_nobody_else(doors: Doors) -> None:
    first = doors.line("edge-0")
    token = doors.greet(first).incarnation
    for name, role, wrong in (("edge-1", "edge", "0" * 32), ("u7", "client", token)):
        before = {} if role == "client" else doors.shapes
        other = doors.greet(doors.line(name, role), resume=wrong, moved=True, before=before)
        assert other.incarnation != token and ("edge-0", "u0/run") in doors.server.runs
    assert doors.greet(first, resume=token).incarnation == token, "the run is the first edge's still"
    second = doors.line("edge-2")
    assert doors.greet(second, resume=token, moved=True).incarnation == token
    assert ("edge-0", "u0/run") not in doors.server.runs and ("edge-2", "u0/run") in doors.server.runs
    with pytest.raises(SessionLost, match="closed by another"):
        first(Message(Pull()))
    assert second(Message(Pull())).kind == "state"


def test_a_client_is_no_edge(doors: Doors) -> None:
    with pytest.raises(HandshakeRefused, match="only an edge"):
        doors.greet(doors.line("u0", "client"))
    line = doors.line("u0", "client")
    doors.greet(line, before={})
    with pytest.raises(ProtocolError, match="no party before this one"):
        line(Message(Pull(kept=True)))


FORWARD = {"session": "1.0", "start": 0, "lengths": [2], "padding": "left", "train": True}
UPDATE = Update(step=1, scale=1.0, optimizer=Optimizer(name="sgd", lr=0.1))


@pytest.mark.parametrize(
    ("name", "shape", "update", "words"),
    [
        ("model.layers.2.self_attn.q_proj.lora_A.weight", [4, 48], None, "without a step"),
        ("model.layers.2.self_attn.q_proj.lora_A.weight", [4, 47], UPDATE, "was not agreed"),
        ("model.layers.3.self_attn.q_proj.lora_A.weight", [4, 48], UPDATE, "differ from what was agreed"),
    ],
    ids=["no step", "shape", "name"],
)
def test_what_an_edge_sends_along_is_checked(
    doors: Doors, name: str, shape: list[int], update: Update | None, words: str
) -> None:
    line = doors.line("edge-0")
    doors.greet(line)
    hidden = torch.ones(2, doors.stage.hidden_size)
    with pytest.raises(ProtocolError, match=words):
        line(Message(Forward(**FORWARD, update=update), {"hidden": hidden, f"kept/{name}": torch.zeros(shape)}))


def test_a_document_names_edges_in_the_one_place_where_they_can_be(llama_folder: Path) -> None:
    values: dict[str, Any] = {
        "model": str(llama_folder),
        "plan": PLAN,
        "links": {"edge": ["a:1", "b:2"], "cloud": "c:3"},
    }
    document = Document.of(values, Path.cwd())
    assert document.addresses("edge") == ["a:1", "b:2"] and document.addresses("cloud") == ["c:3"]
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"links": {"edge": "a:1", "cloud": ["c:3", "d:4"]}}, "only the first party after the client"),
        ({"together": {"mode": "client-batch"}}, "cannot share one adapter"),
        ({"links": {"edge": []}}, "links.edge is empty"),
        ({"edges": {"assign": "best"}}, "assign"),
        ({"edges": {"switch_seconds": 0}}, "switch_seconds"),
        ({"together": {"mode": "server-hierarchical", "cloud_adapter": "shared"}, "training": {"accumulate": 2}},
         "accumulate must be 1"),
    ]  # fmt: skip
    for more, words in wrong:
        with pytest.raises(ConfigError, match=words):
            Document.of(values | more, Path.cwd())


def test_the_cloud_stands_in_for_the_last_edge(llama_folder: Path, keys: Path, undisturbed: Any) -> None:
    """Its layers are loaded when the first user comes, and not by a question how it is."""
    with tiers(llama_folder, keys, edges=1) as at:
        loads: list[SpanServer] = []

        def load() -> SpanServer:
            loads.append(at._party("edge", beside(at.cloud, "stand-in"), "stand-in"))
            return loads[-1]

        spare = StandIn(load, at.cloud.condition)
        at.doors.append(at.stack.enter_context(GrpcServer("127.0.0.1:0", credentials(keys, "cloud"), spare.connect)))
        done: list[int] = []

        def spoil(edge: int, message: Message) -> None:
            if not done and message.kind == "backward" and getattr(message.meta, "session", "") == "3.0":
                done.append(edge)
                at.kill(edge)
                raise SessionLost("killed")

        at.spoil = spoil
        user = at.user(0, first=0, edges={"assign": "least-loaded", "switch_seconds": 0.3})
        assert user.link.address.endswith(f":{at.doors[0].port}"), "a stand-in comes last"  # type: ignore[union-attr]
        assert not loads and spare.condition().spare
        outcome = train([user], datasets()[:1], accumulate=2)[0]
        assert len(loads) == 1 and done == [0] and at.cloud.steps == 4
        same(undisturbed(), (outcome.losses, user.adapter_state() | user.pull(optimizer=True)))
        with pytest.raises(ProtocolError, match="before 'hello'"):
            spare.connect(identity("u9"))(Message(Pull()))


@pytest.mark.parametrize("trained", [False, True], ids=["base model", "adapter"])
def test_generation_goes_on_at_another_edge(llama_folder: Path, keys: Path, trained: bool) -> None:
    """The new edge has no session: it is filled again from what was sent."""
    with tiers(llama_folder, keys) as at:
        user = at.user(0, first=0, **({} if trained else {"adapter": None}))
        if trained:
            train([user], datasets()[:1])
        user.model.eval()
        ids, asked = torch.arange(3, 12).view(1, -1), list[int]()
        room: Any = {"max_new_tokens": 8, "do_sample": False, "return_dict_in_generate": True, "output_scores": True}
        expected = user.model.generate(ids, **room)

        def spoil(edge: int, message: Message) -> None:
            asked.append(edge)
            if edge == 0 and len(asked) == 4:
                at.kill(0)
                raise LinkError("killed")

        at.spoil = spoil
        found = user.model.generate(ids, **room)
        assert asked[0] == 0 and asked[-1] == 1 and user.link.moves == 1  # type: ignore[union-attr]
        assert torch.equal(found.sequences, expected.sequences)
        apart = [float((a - b).abs().max()) for a, b in zip(found.scores, expected.scores, strict=True)]
        assert max(apart) <= 1e-5, "what is sent again is computed at once, and not token by token"


@pytest.mark.parametrize("assign", ["least-loaded", "round-robin", "first"])
def test_users_choose_an_edge(llama_folder: Path, keys: Path, assign: str) -> None:
    """By how many runs each has; one that does not answer is chosen last, or given up when it is the first."""
    with tiers(llama_folder, keys, edges=3) as at:
        at.kill(1)
        chosen = []
        for n in range(4):
            user = at.user(n, first=0, edges={"assign": assign, "switch_seconds": 0.3})
            chosen.append([f"127.0.0.1:{door.port}" for door in at.doors].index(user.link.address))  # type: ignore[union-attr]
        if assign == "first":
            assert chosen == [0, 0, 0, 0]
        elif assign == "round-robin":
            assert chosen == [0, 2, 0, 2]
        else:
            assert sorted(chosen[:2]) == sorted(chosen[2:]) == [0, 2]


def test_nobody_is_there(llama_folder: Path, keys: Path) -> None:
    """With no edge left a user is told so, in bounded time."""
    with tiers(llama_folder, keys) as at:
        at.kill(0)
        at.kill(1)
        began = time.monotonic()
        with pytest.raises(LinkError, match="no answer"):
            at.user(0, first=0, wire={"patience_seconds": 1.0})
        assert time.monotonic() - began < 20
