"""`wire.activations = "delta"`: training passes cross as differences, and count as the values that they stand for.

What is compared: bytes and losses with those of raw, the values at the two ends, and runs whose server or client was
lost on the way.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch

from conftest import PLANS, U_SHAPED, Parties, identity, tiny_llama
from noren.config import Document
from noren.embedded import MODEL_DIR
from noren.errors import ConfigError, HandshakeRefused, SessionLost
from noren.parties.client import Client
from noren.parties.ledger import digest_of
from noren.parties.policy import Policy
from noren.parties.remote_state import incarnation_of
from noren.parties.server import Limits, SpanServer
from noren.parties.train import train
from noren.partition.stage import Stage
from noren.training.batches import collate
from noren.training.journal import StepJournal
from noren.training.loop import Outcome, Trainer, Training
from noren.types import Forward, Message
from noren.wire.codecs.delta import DeltaReceiver
from noren.wire.journal import Journal
from noren.wire.settings import Wire
from test_crossing import ADAPTER, HIDDEN, rows

EPOCHS, BATCH = 3, 3
SETTINGS = Training(epochs=EPOCHS, batch_size=BATCH, lr=1e-2, save_every=0)
STEPS = EPOCHS * len(rows()) // BATCH
DELTA = {"activations": "delta"}
Act = Callable[[Message], None]


class Crash(Exception):
    """The client's process is gone."""


def nothing(message: Message) -> None:
    """What is done to most messages."""


def passes(seen: list[Message]) -> list[Message]:
    """The training passes among some messages."""
    return [m for m in seen if isinstance(m.meta, Forward) and m.meta.train]


def whole(seen: list[Message]) -> list[str]:
    """Sessions of the training passes that came as values."""
    return [m.meta.session for m in passes(seen) if m.meta.deltas is None]  # type: ignore[union-attr]


def close_to(losses: list[float], others: list[float]) -> float:
    """Return by how much the last epoch's mean loss differs, as a share."""
    count = len(rows()) // BATCH
    mine, theirs = (sum(one[-count:]) / count for one in (losses, others))
    return abs(mine - theirs) / theirs


def run(client: Client, settings: Training = SETTINGS, held_out: int = 0) -> Outcome:
    return Trainer(
        client.model, rows(), rows(held_out) if held_out else [], settings, pad_id=0, seed=3, remote=client.remote()
    ).run()


# --- bytes and losses ----------------------------------------------------------------------------------------------


def test_bytes_up_and_loss(parties: Parties, tmp_path: Path) -> None:
    """From the first epoch on a pass is as small as int8-group, and three epochs end where raw's do."""
    tiny_llama(hidden_size=256, intermediate_size=64).save_pretrained(tmp_path)
    sent: dict[str, list[int]] = {}
    losses: dict[str, list[float]] = {}
    for codec in ("raw", "delta", "int8-group"):
        client = parties.client(tmp_path, adapter=ADAPTER, name=codec, wire={"activations": codec})
        sizes, note = sent.setdefault(codec, []), client.traffic.note

        def noted(kind: str, up: int, down: int, sizes: list[int] = sizes, note: Any = note) -> None:
            if kind == "forward":
                sizes.append(up)
            note(kind, up, down)

        client.traffic.note = noted  # type: ignore[method-assign]
        losses[codec] = run(client).losses
    ratios = [raw / delta for raw, delta in zip(sent["raw"], sent["delta"], strict=True)]
    error = close_to(losses["delta"], losses["raw"])
    print(f"delta: bytes of a pass, raw / delta: {min(ratios):.3f} to {max(ratios):.3f}; loss {error:.1e} from raw's")
    assert len(ratios) == STEPS and all(3.5 < ratio < 3.95 for ratio in ratios)
    for delta, group in zip(sent["delta"], sent["int8-group"], strict=True):
        assert abs(delta - group) < 400  # the words about samples and versions
    assert losses["raw"][-1] < 0.99 * losses["raw"][0]
    assert 0 < error < 0.02
    came = passes(parties.seen)[STEPS : 2 * STEPS]
    for number, message in enumerate(came):
        assert message.tensors["hidden"].dtype == torch.uint8
        bases = message.meta.deltas.bases  # type: ignore[union-attr]
        assert all((base == -1) == (number < STEPS // EPOCHS) for base in bases)


def test_differences_shrink_and_both_ends_hold_the_same(local_parties: Parties, llama_folder: Path) -> None:
    """What the client keeps and notes as sent is what the server computes with, to the bit; the error gets smaller."""
    client = local_parties.client(llama_folder, adapter=ADAPTER, wire=DELTA)
    server = local_parties.servers["server"]
    released: list[Message] = []
    errors: list[float] = []
    release, used = client.span.release, []

    def watched(message: Message) -> Message:
        out = release(message)
        if passes([message]):
            released.append(out)
            true = message.tensors["hidden"]
            errors.append(float((out.tensors["hidden"] - true).norm() / true.norm()))
        return out

    client.span.release = watched
    (held,) = server.runs.values()
    values = held.values

    def kept(message: Message, stage: Stage) -> Message:
        out = values(message, stage)
        if passes([message]):
            used.append(out)
        return out

    held.values = kept  # type: ignore[method-assign]
    run(client)
    print(f"delta: relative error by step {[f'{error:.1e}' for error in errors]}")
    assert [digest_of(m) for m in released] == [digest_of(m) for m in used] and len(used) == STEPS
    assert all(m.tensors["hidden"].dtype == torch.float32 for m in used)
    first, last = errors[: STEPS // EPOCHS], errors[-STEPS // EPOCHS :]
    assert max(last) < 0.5 * min(first), "a difference is coded more finely than a value"


def test_a_document_trains_and_evaluates(tmp_path: Path) -> None:
    """`noren train`: training passes cross as differences, evaluations as they are."""
    (tmp_path / "notes.jsonl").write_text(
        "".join(json.dumps({"text": f"{day:02}/05/21 // a note of the day, the {day}th"}) + "\n" for day in range(1, 9))
    )
    plan = ["client :2", "server 2:-2", "client -2:"]
    values = {
        "model": "embedded", "plan": plan, "name": "delta", "out": str(tmp_path / "out"), "wire": DELTA,
        "data": {"path": str(tmp_path / "notes.jsonl"), "holdout": 0.25, "max_length": 24},
        "adapter": {"r": 2, "targets": ["q_proj"]}, "training": {"epochs": 2, "batch_size": 3, "accumulate": 2},
    }  # fmt: skip
    made = Document.of(values, tmp_path)
    stage = Stage.load(MODEL_DIR, plan, "server", "causal-lm", torch.float32)
    line = Line(stage, made, None)
    done = train(made, handler=line)
    assert done.outcome.step == done.steps
    forwards = [m for m in line.seen if isinstance(m.meta, Forward)]
    assert {(m.meta.train, m.meta.deltas is not None) for m in forwards} == {(True, True), (False, False)}  # type: ignore[union-attr]


def test_an_edge_sends_values_on(parties: Parties, llama_folder: Path) -> None:
    client = parties.client(llama_folder, plan=PLANS[4], adapter=ADAPTER, wire=DELTA)
    losses = run(client).losses
    assert not whole(parties.seen) and len(passes(parties.seen)) == STEPS
    raw = parties.client(llama_folder, plan=PLANS[4], adapter=ADAPTER, name="raw")
    assert close_to(losses, run(raw).losses) < 0.02


def test_the_next_party_holds_no_samples(local_parties: Parties, llama_folder: Path) -> None:
    client = local_parties.client(llama_folder, plan=PLANS[4], adapter=ADAPTER, wire=DELTA)
    run(client, Training(steps=2, batch_size=BATCH))
    (near,), (far,) = (local_parties.servers[name].runs.values() for name in ("edge", "server"))
    assert near.deltas is not None and near.deltas.held_samples == len(rows())
    assert far.deltas is None


def test_generation_and_evaluation_cross_as_values(local_parties: Parties, llama_folder: Path) -> None:
    client = local_parties.client(llama_folder, adapter=ADAPTER, wire=DELTA)
    raw = local_parties.client(llama_folder, adapter=ADAPTER, name="raw")
    prompt = {"input_ids": torch.tensor([[5, 6, 7, 8]]), "attention_mask": torch.ones(1, 4, dtype=torch.long)}
    tokens = [c.model.eval().generate(**prompt, max_new_tokens=6, do_sample=False) for c in (client, raw)]
    with torch.no_grad():
        logits = [c.model(**prompt).logits for c in (client, raw)]
    assert torch.equal(*tokens) and torch.equal(*logits)
    assert all(t.is_floating_point() for m in local_parties.seen for t in m.tensors.values())


# --- settings --------------------------------------------------------------------------------------------------------


def test_other_loops_are_told(local_parties: Parties, llama_folder: Path) -> None:
    client = local_parties.client(llama_folder, adapter=ADAPTER, wire=DELTA)
    with pytest.raises(ConfigError, match="needs `noren train`"):
        client.model(**collate(rows(), 0)).loss.backward()
    assert not passes(local_parties.seen), "and nothing has left"


@pytest.mark.parametrize(
    ("fields", "phrase"),
    [
        ({"gradients": "delta"}, "for activations only"),
        ({"delta_bytes": 0}, "above 0"),
        ({"activations": "detla"}, "detla"),
    ],
)
def test_settings(fields: dict[str, Any], phrase: str) -> None:
    assert Wire(activations="delta").delta_bytes == 256 << 20
    with pytest.raises((ValueError, ConfigError), match=phrase):
        Wire(**fields)


def test_a_server_holds_no_more_than_it_allows(local_parties: Parties, llama_folder: Path) -> None:
    with pytest.raises(HandshakeRefused, match=r"delta_bytes differs: 'server' has 4096, the client has 4097"):
        local_parties.client(
            llama_folder, adapter=ADAPTER, wire=DELTA | {"delta_bytes": 4097}, limits=Limits(delta_bytes=4096)
        )


@pytest.mark.parametrize("samples", [1, 4, 9])
def test_budgets_are_held(samples: int, local_parties: Parties, llama_folder: Path) -> None:
    """With room for a few samples only, both ends keep to it, nothing fails, and nothing crosses as values."""
    budget = samples * (20 * HIDDEN * 4 + 512)
    client = local_parties.client(llama_folder, adapter=ADAPTER, wire=DELTA | {"delta_bytes": budget})
    (held,) = local_parties.servers["server"].runs.values()
    values, most, left = held.values, [], set()

    def watched(message: Message, stage: Stage) -> Message:
        out = values(message, stage)
        sender = client.releases._delta
        if passes([message]) and held.deltas is not None and sender is not None:
            most.append(max(held.deltas.held_bytes, sender.held_bytes))
            left.add(held.deltas.held_samples - sender.held_samples)
        return out

    held.values = watched  # type: ignore[method-assign]
    run(client)
    print(f"delta: budget {budget}, at most {max(most)} bytes held")
    assert len(most) == STEPS and 0 < max(most) <= budget and left == {0}
    assert not whole(local_parties.seen)
    by_difference = [b for m in passes(local_parties.seen) for b in m.meta.deltas.bases if b != -1]  # type: ignore[union-attr]
    assert bool(by_difference) == (samples > 1)


def test_a_pair_agrees_through_the_document(local_parties: Parties, llama_folder: Path) -> None:
    """The budget is the client's to choose, and both ends have it."""
    client = local_parties.client(llama_folder, adapter=ADAPTER, wire=DELTA | {"delta_bytes": 123_456})
    run(client, Training(steps=1, batch_size=BATCH))
    (held,) = local_parties.servers["server"].runs.values()
    ends = [held.deltas, client.releases._delta]
    assert isinstance(ends[0], DeltaReceiver)
    assert [end._held.budget for end in ends if end is not None] == [123_456] * 2


def test_a_let_go_run_holds_no_samples(local_parties: Parties, llama_folder: Path) -> None:
    """A client that has gone leaves no samples in memory after a while; when it is back, the run goes on."""
    client = local_parties.client(llama_folder, adapter=ADAPTER, wire=DELTA)
    server = local_parties.servers["server"]
    trainer = Trainer(client.model, rows(), [], SETTINGS, pad_id=0, seed=3, remote=client.remote())
    (held,) = server.runs.values()

    def away(progress: Any) -> None:
        if progress.step == 3:
            assert held.deltas is not None
            server.table._let_go(("client", "run"), held)
            assert held.deltas is None

    trainer._report = away
    assert trainer.run().step == STEPS
    assert whole(local_parties.seen) == ["4.0"]


# --- repeats, restarts -----------------------------------------------------------------------------------------------


class Line:
    """A client's line to a server whose process can be replaced, at a message (`before`) or its answer (`after`)."""

    def __init__(self, stage: Stage, document: Document, journal: Journal | None) -> None:
        self._stage, self._document, self._journal = stage, document, journal
        self.before: Act = nothing
        self.after: Act = nothing
        self.seen: list[Message] = []
        self.hello: Message | None = None
        self.inner: Any = None
        self.server: SpanServer = None  # type: ignore[assignment]
        self.restarts = 0
        self.start()

    def start(self) -> None:
        """A new process, with the old one's journal."""
        self.server = SpanServer(self._stage, lora=self._document.run.adapter, journal=self._journal)
        self.connect()

    def connect(self) -> None:
        self.inner = self.server.connect(identity("client"))

    def restart(self) -> None:
        """Another process, and what a link does by itself: it greets."""
        self.restarts += 1
        self.server.close()
        self.start()
        if self.hello is not None:
            resume = self.welcome.meta.incarnation
            self.inner(Message(msgspec.structs.replace(self.hello.meta, resume=resume)))

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def __call__(self, message: Message) -> Message:
        self.before(message)
        self.seen.append(message)
        answer = self.inner(message)
        if message.kind == "hello":
            self.hello, self.welcome = message, answer
        restarts = self.restarts
        self.after(message)
        if self.restarts != restarts:  # the answer was lost: a link sends again what it sent
            self.seen.append(message)
            answer = self.inner(message)
        return answer


def once(kind: str, session: str, do: Callable[[], None]) -> Act:
    left = [do]

    def act(message: Message) -> None:
        if message.kind == kind and getattr(message.meta, "session", "") == session and left:
            left.pop()()

    return act


def crash() -> None:
    raise Crash


@pytest.fixture
def stage(llama_folder: Path) -> Stage:
    return Stage.load(str(llama_folder), U_SHAPED, "server", "causal-lm", torch.float32)


def document(folder: Path, base: Path, **more: Any) -> Document:
    values = {"model": str(folder), "plan": U_SHAPED, "adapter": ADAPTER, "name": "run", "wire": DELTA}
    return Document.of(values | more, base)


def life(made: Document, line: Line, folder: Path, settings: Training = SETTINGS) -> tuple[Outcome, dict[str, Any]]:
    """One life of the client's process: it goes on from its journal, trains to the end, returns the adapters."""
    with Journal(folder) as journal:
        steps = StepJournal(journal, made.run.name)
        kept = steps.read()
        resume = incarnation_of(kept.position) if kept else ""
        client = Client(made, line, policy=Policy(), journal=journal, resume=resume)
        trainer = Trainer(
            client.model, rows(), [], settings, pad_id=0, seed=3, remote=client.remote(), journal=steps
        )  # fmt: skip
        if kept is not None:
            trainer.resume()
        return trainer.run(), client.adapter_state()


def same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


RESTARTS = [(kind, session, when) for kind in ("forward", "backward") for session in ("1.0", "4.0")
            for when in ("before", "after")]  # fmt: skip


@pytest.mark.parametrize(("kind", "session", "when"), RESTARTS)
def test_a_restarted_server(
    kind: str, session: str, when: str, stage: Stage, llama_folder: Path, tmp_path: Path
) -> None:
    """Its samples are gone, its journal is not: no step fails, none counts twice, and the loss is what it would be."""
    made = document(llama_folder, tmp_path, name=f"{kind}-{session}-{when}")
    with Journal(tmp_path / "far") as far, Journal(tmp_path / "twin") as other:
        straight = Line(stage, made, other)
        undisturbed, adapters = life(made, straight, tmp_path / "straight")
        line = Line(stage, made, far)
        setattr(line, when, once(kind, session, line.restart))
        outcome, found = life(made, line, tmp_path / "near")
    assert outcome.step == STEPS and line.restarts == 1
    error = close_to(outcome.losses, undisturbed.losses)
    print(f"delta: server lost at {kind} {session} {when}: values sent for {whole(line.seen)}, loss {error:.1e} away")
    assert error < 0.02
    resent = whole(line.seen)
    if (kind, session) == ("forward", "1.0"):  # nothing builds on what was lost
        assert not resent and outcome.losses == undisturbed.losses and same(found, adapters)
        return
    graph = [session] if (kind, when) == ("backward", "before") else []  # it was lost: the pass is repeated
    missed = {"1.0": "3.0", "4.0": "4.0" if kind == "forward" else "5.0"}[session]  # the first to build on what is gone
    assert resent == [*graph, missed]
    steps = int(missed[0])
    assert outcome.losses[:steps] == undisturbed.losses[:steps], "the same values, sent otherwise"
    assert outcome.losses[steps:] != undisturbed.losses[steps:], "samples begin anew"


def test_a_restarted_client(stage: Stage, llama_folder: Path, tmp_path: Path) -> None:
    """What left in the step at hand leaves as it was, as values; what was not sent yet goes whole.

    In the first epoch that is what happens anyway, so its steps are the uninterrupted run's to the bit. Later, samples
    that go whole once more are rounded more coarsely than their differences would be, and the losses differ by that.
    """
    made = document(llama_folder, tmp_path)
    for session, exact in (("1.0", STEPS // EPOCHS), ("2.0", STEPS // EPOCHS), ("4.0", 4)):
        folder = tmp_path / session
        with Journal(folder / "far") as far, Journal(folder / "twin") as other:
            undisturbed, _ = life(made, Line(stage, made, other), folder / "straight")
            line = Line(stage, made, far)
            line.after = once("forward", session, crash)
            with pytest.raises(Crash):
                life(made, line, folder / "near")
            line.connect()
            outcome, _ = life(made, line, folder / "near")
        error = close_to(outcome.losses, undisturbed.losses)
        print(f"delta: client lost at {session}: values sent for {whole(line.seen)}, loss {error:.1e} away")
        assert whole(line.seen) == [session] and outcome.step == STEPS and error < 0.02
        assert outcome.losses[exact:] != undisturbed.losses[exact:]
        assert outcome.losses[:exact] == undisturbed.losses[:exact]


def test_a_client_restarted_in_its_only_epoch(stage: Stage, llama_folder: Path, tmp_path: Path) -> None:
    made, settings = document(llama_folder, tmp_path), Training(epochs=1, batch_size=1, accumulate=2, lr=1e-2)
    with Journal(tmp_path / "far") as far, Journal(tmp_path / "twin") as other:
        undisturbed, adapters = life(made, Line(stage, made, other), tmp_path / "straight", settings)
        line = Line(stage, made, far)
        line.after = once("forward", "2.1", crash)
        with pytest.raises(Crash):
            life(made, line, tmp_path / "near", settings)
        line.connect()
        outcome, found = life(made, line, tmp_path / "near", settings)
    assert outcome.losses == undisturbed.losses and same(found, adapters)
    assert whole(line.seen) == ["2.0", "2.1"]


def test_noise_is_added_before(stage: Stage, llama_folder: Path, tmp_path: Path) -> None:
    """Vectors are counted once, and a pass that is sent again has the noise that it had."""
    made = document(llama_folder, tmp_path, noise={"clip": 30.0, "scale": 0.5})
    line = Line(stage, made, None)
    with Journal(tmp_path / "near") as journal:
        client = Client(made, line, policy=Policy(most_vectors=1000), journal=journal)
        line.before = once("backward", "4.0", lambda: line.server.expire() or line.drop_graphs())  # type: ignore[func-returns-value]
        line.__dict__["drop_graphs"] = lambda: next(iter(line.server.runs.values())).trainer.forget_passes()
        run(client)
        assert whole(line.seen) == ["4.0"]
        assert client.releases.spent == 2 * EPOCHS * sum(len(row["input_ids"]) for row in rows())


@pytest.mark.parametrize("kind", ["forward", "backward"])
@pytest.mark.parametrize("wire", ["raw", "delta"])
def test_gradients_of_a_lost_run_are_missed(wire: str, kind: str, keys: Path, llama_folder: Path) -> None:
    """A server loses the run within its first step: the step's second half must not begin an empty run there."""
    with ExitStack() as stack:
        parties = Parties("grpc", keys, stack)
        client = parties.client(llama_folder, adapter=ADAPTER, wire={"activations": wire})
        release, server = client.span.release, parties.servers["server"]

        def lose() -> None:
            server.close_run("client", "run", forget=True)
            client.link.close()

        lost = once(kind, "1.1", lose)

        def releasing(message: Message) -> Message:
            lost(message)
            return release(message)

        client.span.release = releasing
        with pytest.raises(SessionLost, match="continue from the last checkpoint"):
            run(client, Training(epochs=1, batch_size=BATCH, accumulate=2))
