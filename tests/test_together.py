"""Clients that train together on one server: equal to what the three modes say in words, whoever stalls or leaves."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from torch import Tensor

from conftest import U_SHAPED, credentials, identity
from noren.adapters.lora import Lora
from noren.config import Document
from noren.errors import ConfigError, HandshakeRefused, Overloaded, ProtocolError, SessionLost, TooLate
from noren.parties.client import Client
from noren.parties.server import SpanServer
from noren.partition.stage import Stage
from noren.training.averaging import average
from noren.training.batches import Row
from noren.training.journal import StepJournal
from noren.training.loop import Outcome, Progress, Trainer, Training, _targets
from noren.types import Average, Backward, Enter, Forward, Handler, Leave, Message, Optimizer, Step, Update
from noren.wire.grpc_server import GrpcServer
from noren.wire.identity import ensure
from noren.wire.journal import Journal
from test_crossing import ADAPTER
from test_training import whole_twin

CLOSE = 2e-5
"""Largest difference of adapters in fp32: sums in another order, and Adam divides small numbers by their roots."""
Wrap = Callable[[Handler], Handler]


def settings(steps: int = 4, **more: Any) -> Training:
    return Training(**{"steps": steps, "batch_size": 3, "lr": 1e-2, "schedule": "constant", "clip": 0.0} | more)


def differ(one: dict[str, Tensor], two: dict[str, Tensor]) -> float:
    assert one.keys() == two.keys()
    return max(float((tensor - two[name]).detach().abs().max()) for name, tensor in one.items())


class Site:
    """A server, and clients that train together on it, each in a thread of its own."""

    def __init__(self, folder: Path, stack: ExitStack, journal: Journal | None = None, **together: Any) -> None:
        self.folder, self.stack, self.together = folder, stack, {"clip": 0.0, "wait_seconds": 20.0} | together
        stage = Stage.load(folder, U_SHAPED, "server", "causal-lm")
        self.server = SpanServer(stage, lora=msgspec.convert(ADAPTER, Lora), journal=journal)
        stack.callback(self.server.close)

    def client(self, name: str, wrap: Wrap = lambda handler: handler, **together: Any) -> Client:
        values = {"model": str(self.folder), "plan": U_SHAPED, "adapter": ADAPTER, "seed": 1,
                  "together": self.together | together}  # fmt: skip
        client = Client(Document.of(values, Path.cwd()), wrap(self.server.connect(identity(name))))
        self.stack.callback(client.close)
        return client

    def train(self, clients: list[Client], data: list[list[Row]], training: Training) -> list[Outcome]:
        trainers = [self.trainer(client, own, training) for client, own in zip(clients, data, strict=True)]
        with ThreadPoolExecutor(len(clients)) as pool:
            futures = [pool.submit(trainer.run) for trainer in trainers]
            return [future.result(timeout=120) for future in futures]

    @staticmethod
    def trainer(client: Client, data: list[Row], training: Training) -> Trainer:
        return Trainer(client.model, data, [], training, pad_id=0, seed=3, remote=client.remote())


@contextmanager
def site(folder: Path, mode: str, clients: int, **together: Any) -> Iterator[Site]:
    with ExitStack() as stack:
        yield Site(folder, stack, mode=mode, clients=clients, **together)


def datasets() -> list[list[Row]]:
    """Three clients' rows: of other lengths, and with other numbers of targets."""
    torch.manual_seed(5)
    out = []
    for count, least in ((6, 4), (9, 9), (3, 2)):
        own: list[Row] = []
        for number in range(count):
            ids = torch.randint(1, 90, (least + number % 4,)).tolist()
            own.append({"input_ids": ids, "labels": [-100] * (number % 3) + ids[number % 3 :]})
        out.append(own)
    return out


def targets(batch: list[Row]) -> int:
    return sum(map(_targets, batch))


@pytest.mark.parametrize(("name", "lr", "most"), [("sgd", 0.5, 5e-6), ("adamw", 1e-2, 2e-4)])
def test_client_batch_equals_the_joined_batch(
    llama_folder: Path, tmp_path: Path, name: str, lr: float, most: float
) -> None:
    """Against whole models that share one body, stepped with the gradient of sum_i (n_i / n) L_i.

    With AdamW within 2 % of one step: it divides a gradient that is nearly 0, and so mostly rounding, by its own size.
    """
    data, training = datasets(), settings(optimizer=name, lr=lr)
    kind = {"sgd": torch.optim.SGD, "adamw": torch.optim.AdamW}[name]
    with site(llama_folder, "client-batch", 3) as at:
        clients = [at.client(f"c{n}") for n in range(3)]
        twins = [whole_twin(client, llama_folder, tmp_path / str(n)) for n, client in enumerate(clients)]
        outcomes = at.train(clients, data, training)
        found = [client.adapter_state() for client in clients]
        assert at.server.passes.together == 0  # of other widths: nobody was padded for another
    lora = [{n.replace(".default.", "."): p for n, p in twin.named_parameters() if "lora_" in n} for twin in twins]
    body = [f"base_model.model.{name}" for name in found[0] if any(f"layers.{i}." in name for i in range(2, 6))]
    shared = kind([lora[0][name] for name in body], lr=lr, weight_decay=0.0)
    ends = [kind([p for n, p in own.items() if n not in body], lr=lr, weight_decay=0.0) for own in lora]
    trainers = [Trainer(twin, own, [], training, pad_id=0, seed=3) for twin, own in zip(twins, data, strict=True)]
    plans = [list(trainer._plan()) for trainer in trainers]
    for step in range(4):
        batches = [[own[i] for i in plan[step][0]] for own, plan in zip(data, plans, strict=True)]
        total, joined = sum(map(targets, batches)), dict[str, Tensor]()
        for n, (trainer, batch) in enumerate(zip(trainers, batches, strict=True)):
            loss = trainer.loss(batch)
            assert float(loss.detach()) == pytest.approx(outcomes[n].losses[step], abs=1e-4)
            gradients = torch.autograd.grad(loss, list(lora[n].values()))
            for (name, parameter), gradient in zip(lora[n].items(), gradients, strict=True):
                if name in body:
                    joined[name] = joined.get(name, 0) + gradient * (targets(batch) / total)  # type: ignore[operator]
                else:
                    parameter.grad = gradient
            ends[n].step()
        for name in body:
            lora[0][name].grad = joined[name]
        shared.step()
        with torch.no_grad():
            for own in lora[1:]:
                for name in body:
                    own[name].copy_(lora[0][name])
    for state, own in zip(found, lora, strict=True):
        assert differ(state, {name: own[f"base_model.model.{name}"] for name in state}) <= most


def test_clients_of_one_width_are_computed_together(llama_folder: Path) -> None:
    same: list[list[Row]] = [[{"input_ids": [7 + n] * 6, "labels": [7 + n] * 6}] * 3 for n in range(3)]
    for mode in ("client-batch", "server-hierarchical"):
        with site(llama_folder, mode, 3) as at:
            clients = [at.client(f"c{n}") for n in range(3)]
            hold = threading.Event()
            busy = threading.Thread(target=at.server.compute, args=(lambda hold=hold: hold.wait(20),))
            busy.start()
            trainers = [at.trainer(client, own, settings(1)) for client, own in zip(clients, same, strict=True)]
            with ThreadPoolExecutor(3) as pool:
                ended = [pool.submit(trainer.step, [own]) for trainer, own in zip(trainers, same, strict=True)]
                while at.server.waiting < 4:
                    time.sleep(0.001)
                hold.set()
                assert all(one.result(timeout=30) for one in ended)
            busy.join()
            assert at.server.passes.together == 3, "what waited was one pass"


@pytest.mark.parametrize("weights", ["tokens", "samples"])
@pytest.mark.parametrize("ends", [False, True], ids=["body", "ends too"])
def test_server_hierarchical_equals_replicas_averaged(llama_folder: Path, weights: str, ends: bool) -> None:
    """Against clients that train alone, whose adapters are averaged from outside after every second step."""
    data, training = datasets(), settings(4)
    more = {"every": 2, "weights": weights, "ends": ends}
    with site(llama_folder, "server-hierarchical", 3, **more) as at:
        clients = [at.client(f"c{n}") for n in range(3)]
        at.train(clients, data, training)
        found = [(client.pull(optimizer=True), client.own_state()) for client in clients]
    with site(llama_folder, "alone", 1) as at:
        clients = [at.client(f"c{n}") for n in range(3)]
        trainers = [at.trainer(client, own, training) for client, own in zip(clients, data, strict=True)]
        plans = [list(trainer._plan()) for trainer in trainers]
        for start in (0, 2):
            amounts = []
            for trainer, plan, own in zip(trainers, plans, data, strict=True):
                batches = [[own[i] for i in plan[step][0]] for step in (start, start + 1)]
                for batch in batches:
                    trainer.step([batch])
                seen = [row for batch in batches for row in batch]
                amounts.append(float(sum(len(r["input_ids"]) for r in seen) if weights == "tokens" else len(seen)))
            for client in clients:
                client.span.flush()
            runs = [run.trainer for run in at.server.runs.values()]
            mean = average([run.adapter_state() for run in runs], amounts)
            both = average([client.own_state() for client in clients], amounts)
            for run, client in zip(runs, clients, strict=True):
                run.set_adapter(mean)
                if ends:
                    client.set_own_state(both)
        expected = [(client.pull(optimizer=True), client.own_state()) for client in clients]
    for mine, theirs in zip(found, expected, strict=True):
        for one, two in zip(mine, theirs, strict=True):
            assert differ(one, two) <= CLOSE
    first, *others = (remote | own for remote, own in found)
    for name, tensor in first.items():
        if not name.startswith("optimizer/") and (ends or any(f"layers.{i}." in name for i in range(2, 6))):
            assert all(torch.equal(tensor, other[name]) for other in others), name


def test_sequential_clients_go_on_from_one_another(llama_folder: Path) -> None:
    """The second begins with the body that the first has left, and with a learning rate of its own."""
    data, training = datasets()[:2], settings(3)
    with site(llama_folder, "sequential", 2) as at:
        clients = [at.client(f"c{n}") for n in range(2)]
        first, second = (at.trainer(client, own, training) for client, own in zip(clients, data, strict=True))
        order: list[str] = []
        for name, trainer in (("first", first), ("second", second)):
            trainer._report = lambda progress, name=name: order.append(name)  # type: ignore[misc]
        begun = threading.Event()
        first._report = lambda progress: (order.append("first"), begun.set())  # type: ignore[func-returns-value]
        with ThreadPoolExecutor(2) as pool:
            one = pool.submit(first.run)
            assert begun.wait(30)
            with pytest.raises(Overloaded, match="another client"):
                clients[1].link(Message(Enter()))
            two = pool.submit(second.run)
            one.result(timeout=60)
            after_first = clients[0].pull(optimizer=False)
            two.result(timeout=60)
        assert order == ["first"] * 3 + ["second"] * 3
        after = [client.pull(optimizer=False) for client in clients]
        assert all(torch.equal(after[0][name], after[1][name]) for name in after[0])
        assert any(not torch.equal(after[0][name], after_first[name]) for name in after_first)
        group = next(iter(at.server.runs.values())).group
        assert group is not None and group.body is not None and group.body.step == 6
        with pytest.raises(ProtocolError, match="shared with others"):
            clients[0].push(after[0], 0)


class Stalls:
    """A line on which one message is held up."""

    def __init__(self, handler: Handler, kind: type, number: int, seconds: float) -> None:
        self.handler, self.kind, self.number, self.seconds = handler, kind, number, seconds

    def __getattr__(self, name: str) -> Any:
        return getattr(self.handler, name)

    def __call__(self, message: Message) -> Message:
        if isinstance(message.meta, self.kind) and not (isinstance(message.meta, Forward) and not message.meta.train):
            self.number -= 1
            if self.number == 0:
                time.sleep(self.seconds)
        return self.handler(message)


@pytest.mark.parametrize("kind", [Forward, Backward], ids=["before its forward", "before its backward"])
def test_one_that_stalls_holds_nobody(llama_folder: Path, kind: type) -> None:
    data, training = datasets(), settings(5)
    with site(llama_folder, "client-batch", 3, wait_seconds=0.5) as at:
        late: list[str] = []

        def stalls(handler: Handler) -> Handler:
            class Line(Stalls):
                def __call__(self, message: Message) -> Message:
                    try:
                        return super().__call__(message)
                    except TooLate as error:
                        late.append(str(error))
                        raise

            return Line(handler, kind, 3, 3.0)

        clients = [at.client("c0", stalls), at.client("c1"), at.client("c2")]
        ended: dict[int, float] = {}
        trainers = [at.trainer(client, own, training) for client, own in zip(clients, data, strict=True)]

        def run(n: int) -> Outcome:
            outcome = trainers[n].run()
            ended[n] = time.monotonic()
            return outcome

        with ThreadPoolExecutor(3) as pool:
            outcomes = [future.result(timeout=60) for future in [pool.submit(run, n) for n in range(3)]]
        assert [outcome.step for outcome in outcomes] == [5, 5, 5]
        assert max(ended[1], ended[2]) < ended[0] - 1.0, "the others were done long before"
        assert bool(late) == (kind is Backward)


def test_one_that_leaves_and_comes_back(llama_folder: Path) -> None:
    data, training = datasets(), settings(4)
    with site(llama_folder, "client-batch", 3, wait_seconds=5.0) as at:
        clients = [at.client(f"c{n}") for n in range(3)]
        trainers = [at.trainer(client, own, training) for client, own in zip(clients, data, strict=True)]
        again = threading.Event()

        def leaves() -> int:
            trainer = trainers[0]
            trainer._remote.enter(threading.Event())
            trainer.step([data[0][:3]])
            trainer._remote.leave()
            assert again.wait(60)
            trainer._remote.enter(threading.Event())
            trainer.step([data[0][:3]])
            trainer._remote.flush()
            trainer._remote.leave()
            return clients[0].span.steps.applied

        began = time.monotonic()
        with ThreadPoolExecutor(3) as pool:
            first = pool.submit(leaves)
            others = [pool.submit(trainer.run) for trainer in trainers[1:]]
            assert [other.result(timeout=60).step for other in others] == [4, 4]
            assert time.monotonic() - began < 5.0, "nobody waited for one that had left"
            again.set()
            assert first.result(timeout=60) == 2


@pytest.mark.parametrize("mode", ["sequential", "client-batch", "server-hierarchical"])
def test_a_line_that_loses_every_third_answer(llama_folder: Path, tmp_path: Path, mode: str) -> None:
    """What is sent again gets the same answer: the same adapters, bit for bit, as over lines that lose nothing.

    But for a client-batch, whose gradients are summed in the order in which they come.
    """
    same, training = [own[:3] for own in datasets()], settings(3, optimizer="sgd", lr=0.5)
    found = []
    for lossy in (False, True):
        with ExitStack() as stack:
            journal = stack.enter_context(Journal(tmp_path / f"{lossy}"))
            at = Site(llama_folder, stack, journal, mode=mode, clients=3, every=2)

            def loses(handler: Any, lossy: bool = lossy) -> Handler:
                class Line(Stalls):
                    def __call__(self, message: Message) -> Message:
                        self.number += 1
                        if lossy and self.number % 3 == 0:
                            self.handler(message)
                        return self.handler(message)

                return Line(handler, Message, 0, 0.0)

            clients = [at.client(f"c{n}", loses) for n in range(3)]
            if mode == "sequential":  # in a known order
                for client, own in zip(clients, same, strict=True):
                    at.trainer(client, own, training).run()
            else:
                at.train(clients, same, training)
            found.append([client.adapter_state() for client in clients])
            assert at.server.steps == (3 if mode == "client-batch" else 9)
    for one, two in zip(*found, strict=True):
        assert differ(one, two) <= (5e-6 if mode == "client-batch" else 0)


def test_a_group_is_of_one_kind(llama_folder: Path) -> None:
    with site(llama_folder, "client-batch", 2) as at:
        one = at.client("c0")
        with pytest.raises(HandshakeRefused, match="together differs: the group 'all'"):
            at.client("c1", mode="sequential")
        with pytest.raises(Overloaded, match="1 of the 2 clients"):
            one.link(Message(Enter()))
        with pytest.raises(ProtocolError, match="nothing to average"):
            one.link(Message(Average(step=0, weight=1)))
    with site(llama_folder, "alone", 1) as at, pytest.raises(ProtocolError, match="trains alone"):
        at.client("c0").link(Message(Leave()))


def held(at: Site, *asked: Callable[[], Any]) -> list[Any]:
    """Ask several things so that they wait at the server at the same time; returns answers, or errors."""
    hold, at_work = threading.Event(), threading.Event()

    def keep_busy() -> None:
        at_work.set()
        hold.wait(20)

    busy = threading.Thread(target=at.server.compute, args=(keep_busy,))
    busy.start()
    assert at_work.wait(20)
    with ThreadPoolExecutor(len(asked)) as pool:
        futures = []
        for number, one in enumerate(asked):
            futures.append(pool.submit(one))
            until = time.monotonic() + 20
            while len(at.server._computer) <= number:
                assert time.monotonic() < until and not futures[-1].done(), futures[-1]
                time.sleep(0.001)
        hold.set()
        out = [future.exception(timeout=30) or future.result() for future in futures]
    busy.join()
    return out


def hidden(client: Client, session: str, tokens: int = 3, **more: Any) -> Message:
    meta = Forward(session=session, start=0, lengths=[tokens], padding="left", **more)
    return Message(meta, {"hidden": torch.ones(tokens, client._width)})


def test_what_is_computed_together_stays_apart(llama_folder: Path) -> None:
    """One client's request ends sessions of its own, and of nobody else who is computed with it."""
    with site(llama_folder, "server-hierarchical", 2) as at:
        one, two = at.client("c0"), at.client("c1")
        for client in (one, two):
            client.link(hidden(client, "chat"))
        asked = [hidden(one, "1.0", train=True), hidden(two, "1.0", train=True, ended=["chat"])]
        answers = held(at, lambda: one.link(asked[0]), lambda: two.link(asked[1]))
        assert at.server.passes.together == 2 and all(answer.kind == "hidden" for answer in answers)
        more = Forward(session="chat", start=3, lengths=[1], padding="left")
        assert one.link(Message(more, {"hidden": torch.ones(1, one._width)})).kind == "hidden"
        with pytest.raises(SessionLost):
            two.link(Message(more, {"hidden": torch.ones(1, two._width)}))


@pytest.mark.parametrize("mode", ["client-batch", "server-hierarchical"])
def test_one_client_spoils_nothing_for_those_it_is_computed_with(llama_folder: Path, mode: str) -> None:
    """A gradient of another shape is refused to its sender; the other's counts, and counts once."""
    found = []
    for spoiled in (False, True):
        with site(llama_folder, mode, 2) as at:
            clients = [at.client("c0"), at.client("c1")]
            for client in clients:
                client.link(hidden(client, "1.0", train=True))
            good = Message(Backward(session="1.0"), {"gradient": torch.ones(3, 48)})
            bad = Message(Backward(session="1.0"), {"gradient": torch.ones(2, 48)})
            if spoiled:
                refused, answer = held(at, partial(clients[1].link, bad), partial(clients[0].link, good))
                assert isinstance(refused, ProtocolError) and "for an output" in str(refused)
            else:
                answer = clients[0].link(good)
            trainer = at.server.runs["c0", "run"].trainer
            found.append({"back": answer.tensors["gradient"]} | trainer.gradients())
    assert differ(*found) <= 1e-6


def test_what_fails_together_is_not_done_again(llama_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Gradients that were added before something broke must not be added once more."""
    with site(llama_folder, "server-hierarchical", 2) as at:
        clients, tried = [at.client("c0"), at.client("c1")], list[int]()
        for client in clients:
            client.link(hidden(client, "1.0", train=True))

        def breaks(pairs: list[Any]) -> list[Tensor]:
            tried.append(len(pairs))
            raise RuntimeError("the machine broke")

        monkeypatch.setattr(at.server.passes, "backward", breaks)
        message = Message(Backward(session="1.0"), {"gradient": torch.ones(3, 48)})
        failed = held(at, *[lambda client=client: client.link(message) for client in clients])  # type: ignore[misc]
        assert all(isinstance(error, Exception) for error in failed) and tried == [2]


def test_no_client_counts_for_more_than_its_tokens(llama_folder: Path) -> None:
    with site(llama_folder, "client-batch", 1) as at:
        client = at.client("c0")
        client.link(hidden(client, "1.0", train=True, weight=1 << 40))
        client.link(Message(Backward(session="1.0"), {"gradient": torch.ones(3, client._width)}))
        group = next(iter(at.server.runs.values())).group
        assert group is not None and group.joint is not None and group.joint.targets == {"c0/run": 3.0}


def test_only_whoever_has_the_turn_steps(llama_folder: Path) -> None:
    update = Update(step=1, scale=1.0, optimizer=Optimizer(name="sgd", lr=0.1))
    with site(llama_folder, "sequential", 2) as at:
        one, two = at.client("c0"), at.client("c1")
        one.link(Message(Enter()))
        for message in (
            Message(Step(update=update)),
            hidden(two, "chat", update=update),
            hidden(two, "1.0", train=True),
        ):
            with pytest.raises(Overloaded, match="another client"):
                two.link(message)
        group = next(iter(at.server.runs.values())).group
        assert group is not None and group.body is not None and group.body.step == 0


def test_another_optimiser_than_the_groups_is_refused(llama_folder: Path) -> None:
    """To the client that has it; the others' step is made."""
    with site(llama_folder, "client-batch", 2) as at:
        clients = [at.client("c0"), at.client("c1")]
        gradient = {"gradient": torch.ones(3, clients[0]._width)}
        for client in clients:
            client.link(hidden(client, "1.0", train=True))
            client.link(Message(Backward(session="1.0"), gradient))
        kinds = [Optimizer(name="sgd", lr=0.1), Optimizer(name="adamw", lr=0.1)]
        steps = [Message(Step(update=Update(step=1, scale=1.0, optimizer=kind))) for kind in kinds]
        assert clients[0].link(steps[0]).kind == "done"
        with pytest.raises(ProtocolError, match="give all one"):
            clients[1].link(steps[1])
        assert at.server.steps == 1


def test_a_group_ends_with_its_last_client(llama_folder: Path) -> None:
    with site(llama_folder, "client-batch", 2) as at:
        for client in [at.client("c0"), at.client("c1")]:
            client.close()
        assert not at.server.groups._groups and not at.server.runs
        names = [name for name, _ in at.server.stage.model.named_parameters() if "lora_" in name]
        assert not names, "its adapter is gone"


@pytest.mark.parametrize("mode", ["client-batch", "server-hierarchical"])
def test_nobody_begins_before_all_take_part(llama_folder: Path, tmp_path: Path, mode: str) -> None:
    """One that is connected, but still evaluates, say, is waited for; and whoever takes part already goes on alone."""
    with Journal(tmp_path / "journal") as journal, ExitStack() as stack:
        at = Site(llama_folder, stack, journal, mode=mode, clients=2)
        one, two = at.client("c0"), at.client("c1")
        with pytest.raises(Overloaded, match="1 of the 2 clients"):
            one.link(Message(Enter()))
        two.link(Message(Enter()))
        group = next(iter(at.server.runs.values())).group
        assert group is not None and group._present == {"c0/run", "c1/run"}, "who had asked before is in it from now on"
        assert set(group.ledger.group()[0]) == group._present
        one.link(Message(Enter()))
        again = Site(llama_folder, stack, journal, mode=mode, clients=2)  # as if the server had crashed and come back
        back = Client(one.document, again.server.connect(identity("c0")), resume=one.welcome.incarnation)
        back.link(Message(Enter()))  # the other has not connected yet
        third = Site(llama_folder, stack, journal, mode=mode, clients=2)
        anew = third.client("c1")  # whose run begins anew takes no part yet, although one of its name did
        group = next(iter(third.server.runs.values())).group
        assert group is not None and group._present == {"c0/run"} == set(group.ledger.group()[0])
        anew.link(Message(Enter()))


def test_one_that_is_done_waits_for_nobody(llama_folder: Path, tmp_path: Path) -> None:
    """It was killed after its last step, and neither the server nor the others are there any more."""
    with Journal(tmp_path / "journal") as journal, Journal(tmp_path / "own") as own, ExitStack() as stack:
        at = Site(llama_folder, stack, journal, mode="server-hierarchical", clients=2, every=2)
        client, other = at.client("c0"), at.client("c1")
        first = Trainer(client.model, datasets()[0], [], settings(2), pad_id=0, seed=3, remote=client.remote(),
                        journal=StepJournal(own, "run"))  # fmt: skip
        second = at.trainer(other, datasets()[1], settings(2))
        with ThreadPoolExecutor(2) as pool:
            for one in [pool.submit(first.run), pool.submit(second.run)]:
                assert one.result(timeout=60).step == 2
        expected = client.adapter_state()
        again = Site(llama_folder, stack, journal, mode="server-hierarchical", clients=2, every=2)
        back = Client(client.document, again.server.connect(identity("c0")), resume=client.welcome.incarnation)
        trainer = Trainer(back.model, datasets()[0], [], settings(2), pad_id=0, seed=3, remote=back.remote(),
                          journal=StepJournal(own, "run"))  # fmt: skip
        assert trainer.resume() == 2
        ending = threading.Thread(target=trainer.run, daemon=True)
        ending.start()
        ending.join(20)
        assert not ending.is_alive(), "it waits for the other"
        assert differ(back.adapter_state(), expected) == 0


def test_a_step_that_is_made_again_is_the_same_step(llama_folder: Path) -> None:
    """With the same dropout at either end, and with the same noise: what leaves a second time says nothing new."""
    found, left = [], dict[str, Tensor]()
    for again in (False, True):
        with site(llama_folder, "client-batch", 1) as at:

            def late(handler: Handler, again: bool = again) -> Handler:
                def line(message: Message) -> Message:
                    if isinstance(message.meta, Forward) and message.meta.train:
                        left[message.meta.session] = message.tensors["hidden"]
                    if again and isinstance(message.meta, Backward) and message.meta.session == "2.0":
                        raise TooLate("the group went on")
                    return handler(message)

                return line

            values = {"model": str(llama_folder), "plan": U_SHAPED, "adapter": ADAPTER | {"dropout": 0.2}, "seed": 1,
                      "noise": {"clip": 100.0, "scale": 0.01}, "together": at.together}  # fmt: skip
            lora = msgspec.convert(ADAPTER | {"dropout": 0.2}, Lora)
            server = SpanServer(Stage.load(llama_folder, U_SHAPED, "server", "causal-lm"), lora=lora)
            at.stack.callback(server.close)
            client = Client(Document.of(values, Path.cwd()), server.connect(identity("c0")))
            at.stack.callback(client.close)
            client.releases._noise._secret = b"of both runs"  # type: ignore[union-attr]
            client.span.handler = late(client.span.handler)
            torch.manual_seed(8)
            outcome = at.trainer(client, datasets()[0], settings(4)).run()
            found.append((outcome.losses, client.adapter_state()))
    assert found[0][0] == found[1][0] and differ(found[0][1], found[1][1]) == 0
    assert torch.equal(left["2.0"], left["2.1"]) and left.keys() == {"1.0", "2.0", "2.1", "3.0", "4.0"}


@pytest.mark.parametrize("key", ["accumulate", "micro_batches"])
def test_batches_are_joined_instead_of_accumulated(key: str) -> None:
    values = {"model": "embedded", "together": {"mode": "client-batch"}, "training": {key: 2}}
    with pytest.raises(ConfigError, match=rf"training\.{key} must be 1"):
        Document.of(values, Path.cwd())


class Restarted:
    """A server whose process ends and starts again, on one port and one journal."""

    def __init__(self, model: Path, keys: Path, folder: Path) -> None:
        self.model, self.keys, self.folder = model, keys, folder
        self.servers: list[SpanServer] = []
        self.port, self._opened = 0, ExitStack()
        self.start()

    def start(self) -> None:
        self._opened.close()
        stage = Stage.load(self.model, U_SHAPED, "server", "causal-lm")
        journal = self._opened.enter_context(Journal(self.folder))
        server = SpanServer(stage, lora=msgspec.convert(ADAPTER, Lora), journal=journal)
        self._opened.callback(server.close)
        line = GrpcServer(f"127.0.0.1:{self.port}", credentials(self.keys, "server"), server.connect)
        self.port = self._opened.enter_context(line).port
        self.servers.append(server)

    def client(self, name: str, together: dict[str, Any]) -> Client:
        ensure(self.keys, name, "client")
        values = {"model": str(self.model), "plan": U_SHAPED, "adapter": ADAPTER, "seed": 1, "together": together,
                  "keys": {"dir": str(self.keys), "name": name},
                  "links": {"server": f"127.0.0.1:{self.port}"}}  # fmt: skip
        return Client(Document.of(values, Path.cwd()))

    def train(self, mode: str, restarts: int) -> list[dict[str, Tensor]]:
        """Two clients make six steps; the server starts again after the second, the fourth, ... of either."""
        together = {"mode": mode, "clients": 2, "clip": 0.0, "every": 3}
        clients = [self.client(name, together) for name in ("c0", "c1")]
        training, made, steps = settings(6, optimizer="sgd", lr=0.5), threading.Condition(), [0]

        def report(progress: Progress) -> None:
            with made:
                steps[0] = max(steps[0], progress.step)
                made.notify_all()

        trainers = [Site.trainer(client, own, training) for client, own in zip(clients, datasets()[:2], strict=True)]
        for trainer in trainers:
            trainer._report = report
        with ThreadPoolExecutor(2) as pool:
            if mode == "sequential":  # in a known order
                trainers[0]._remote.enter(threading.Event())
            ended = [pool.submit(trainer.run) for trainer in trainers]
            for number in range(restarts):
                with made:
                    assert made.wait_for(lambda: steps[0] >= 2 * number + 2, 60)  # noqa: B023
                self.start()
            assert [one.result(timeout=120).step for one in ended] == [6, 6]
        found = [client.adapter_state() for client in clients]
        for client in clients:
            client.close()
        self._opened.close()
        assert sum(server.steps for server in self.servers) == (6 if mode == "client-batch" else 12)
        return found


@pytest.mark.parametrize("mode", ["sequential", "client-batch", "server-hierarchical"])
def test_a_server_that_is_restarted(llama_folder: Path, tmp_path: Path, keys: Path, mode: str) -> None:
    """Another process takes over the journal, twice: the same adapters, but for the order of sums."""
    undisturbed = Restarted(llama_folder, keys, tmp_path / "0").train(mode, 0)
    for one, two in zip(undisturbed, Restarted(llama_folder, keys, tmp_path / "2").train(mode, 2), strict=True):
        assert differ(one, two) <= 1e-5


def test_who_waits_for_a_group_says_so_and_can_be_stopped(llama_folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Whom it waits for is said once; the first Ctrl-C ends the wait, and nothing was trained."""
    with site(llama_folder, "server-hierarchical", 2) as at:
        trainer = at.trainer(at.client("c0"), datasets()[0], settings(4))
        threading.Timer(0.5, trainer._stop.set).start()
        outcome = trainer.run()
        assert outcome.interrupted and outcome.step == 0 and at.server.steps == 0
        assert caplog.text.count(": 1 of the 2 clients of group 'all' are here") == 1
