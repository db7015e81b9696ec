"""What leaves, leaves once: a repeated step is sent as it was, byte for byte, and counted before it goes, once.

The tests look at what reaches the server. Retries are over mutual TLS; crashes are new clients on an old journal.
"""

from __future__ import annotations

import hashlib
import math
import secrets
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch

import noren.parties.client as client_module
from conftest import U_SHAPED, credentials, identity
from faults import FaultProxy
from noren.config import Document
from noren.errors import NorenError, PolicyRefused, SessionLost
from noren.parties.client import Client
from noren.parties.policy import Policy
from noren.parties.remote_state import incarnation_of
from noren.parties.server import SpanServer
from noren.partition.stage import Stage
from noren.privacy.noise import Gaussian
from noren.privacy.release import Releases
from noren.training.journal import StepJournal
from noren.training.loop import Trainer, Training
from noren.types import Backward, Forward, Hidden, Message, Noise, Optimizer, Pull, Status, Step, Update
from noren.wire import grpc_link
from noren.wire.envelope import pack
from noren.wire.grpc_server import GrpcServer
from noren.wire.journal import Journal
from test_crossing import ADAPTER, rows

NOISE = {"clip": 30.0, "scale": 0.5}
STEPS = Training(steps=3, batch_size=3, accumulate=2, lr=1e-2, save_every=0)
Act = Callable[[Message], None]


class Crash(Exception):
    """The client's process is gone."""


def nothing(message: Message) -> None:
    """What is done to most messages."""


@dataclass
class Tap:
    """A server whose every message is looked at: `before` it is answered and `after`, where both may raise."""

    server: SpanServer
    before: Act = nothing
    after: Act = nothing
    seen: list[Message] = field(default_factory=list)

    def connect(self, owner: Any) -> Any:
        tap, inner = self, self.server.connect(owner)

        class Line:
            def __getattr__(self, name: str) -> Any:
                return getattr(inner, name)

            def __call__(self, message: Message) -> Message:
                tap.seen.append(message)
                tap.before(message)
                answer = inner(message)
                tap.after(message)
                return answer

        return Line()

    def copies(self) -> dict[tuple[str, str], list[str]]:
        """Digests of all that was received under one name, header and body, in the order of coming."""
        found: dict[tuple[str, str], list[str]] = {}
        for message in self.seen:
            if isinstance(message.meta, Forward | Backward):
                packed = pack(message)
                digest = hashlib.sha256(packed.header + b"".join(packed.bodies)).hexdigest()
                found.setdefault((message.meta.session, message.kind), []).append(digest)
        return found

    def vectors(self) -> int:
        """Vectors that were received, those of a repeated message once."""
        sizes = {
            (m.meta.session, m.kind): len(next(iter(m.tensors.values())))
            for m in self.seen
            if isinstance(m.meta, Forward | Backward)
        }
        return sum(sizes.values())


@pytest.fixture
def tap(llama_folder: Path) -> Iterator[Tap]:
    stage = Stage.load(str(llama_folder), U_SHAPED, "server", "causal-lm", torch.float32)
    server = SpanServer(stage, lora=Document.of({"model": "x", "adapter": ADAPTER}, Path()).run.adapter)
    yield Tap(server)
    server.close()


def document(folder: Path, base: Path, **more: Any) -> Document:
    values = {"model": str(folder), "plan": U_SHAPED, "adapter": ADAPTER, "noise": NOISE, "name": "noisy"}
    return Document.of(values | more, base)


def life(
    made: Document,
    tap: Tap,
    folder: Path,
    policy: Policy | None = None,
    prepare: Callable[[Client], None] = lambda client: None,
) -> Trainer:
    """One life of the client's process: it opens its journal, goes on from where it was, and trains to the end."""
    with Journal(folder) as journal:
        kept = StepJournal(journal, made.run.name).read()
        line = tap.connect(identity("client"))
        client = Client(
            made, line, policy=policy or Policy(), journal=journal,
            resume=incarnation_of(kept.position) if kept else "",
        )  # fmt: skip
        prepare(client)
        trainer = Trainer(
            client.model, rows(6), [], STEPS, pad_id=0, seed=3, remote=client.remote(),
            journal=StepJournal(journal, made.run.name),
        )  # fmt: skip
        try:
            if kept is not None:
                trainer.resume()
            trainer.run()
        finally:
            line.disconnect()
    return trainer


def spent(folder: Path, run: str = "noisy") -> int:
    """The count of released vectors, as it lies on the disk."""
    with Journal(folder) as journal:
        record = journal.read(run, "spent")
        return int(msgspec.json.decode(record.words)["vectors"]) if record else 0


def once(wanted: str, session: str, error: Exception) -> Act:
    """Raise at the first message of a kind and session."""
    left = [error]

    def act(message: Message) -> None:
        if message.kind == wanted and getattr(message.meta, "session", "") == session and left:
            raise left.pop()

    return act


def assert_identical(tap: Tap, *, repeated: int) -> None:
    """All copies of a message are the same, and no two messages are; so many came more than once."""
    copies = tap.copies()
    assert all(len(set(digests)) == 1 for digests in copies.values()), copies
    assert len({digests[0] for digests in copies.values()}) == len(copies)
    assert sum(len(digests) > 1 for digests in copies.values()) == repeated
    bodies = [next(iter(m.tensors.values())).numpy().tobytes() for m in tap.seen if isinstance(m.meta, Forward)]
    assert len(set(bodies)) == sum(kind == "forward" for _, kind in copies), "two steps shared their noise"


def test_T24_asked_100_times(
    tap: Tap, llama_folder: Path, keys: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server drops its answer 99 times, over mutual TLS: every copy that it got is the same."""
    monkeypatch.setattr(grpc_link, "wait_random_exponential", lambda **_: lambda state: 0.0)
    drops: dict[tuple[str, str], int] = {}
    with (
        GrpcServer("127.0.0.1:0", credentials(keys, "server"), tap.connect) as server,
        FaultProxy(f"127.0.0.1:{server.port}") as proxy,
        Journal(tmp_path / "journal") as journal,
    ):

        def drop(message: Message) -> None:
            name = (getattr(message.meta, "session", ""), message.kind)
            if name[0] == "2.1" and drops.setdefault(name, 0) < 99:
                drops[name] += 1
                proxy.reset()

        tap.after = drop
        made = document(llama_folder, tmp_path, keys={"dir": str(keys)}, links={"server": proxy.address})
        client = Client(made, policy=Policy(), journal=journal)
        Trainer(
            client.model, rows(6), [], STEPS, pad_id=0, seed=3, remote=client.remote(),
            journal=StepJournal(journal, "noisy"),
        ).run()  # fmt: skip
        copies = tap.copies()
        print(f"[T24] copies of one step that reached the server: {sorted(map(len, copies.values()))[-2:]}")
        assert len(copies["2.1", "forward"]) == len(copies["2.1", "backward"]) == 100
        assert_identical(tap, repeated=2)
        assert client.releases.spent == tap.vectors()
        client.close()
    assert spent(tmp_path / "journal") == tap.vectors()


CRASHES = [(kind, session, when) for kind in ("forward", "backward") for session in ("1.0", "2.1", "3.0")
           for when in ("before", "after")]  # fmt: skip


@pytest.mark.parametrize(("kind", "session", "when"), CRASHES)
def test_T24_after_a_crash(kind: str, session: str, when: str, tap: Tap, llama_folder: Path, tmp_path: Path) -> None:
    """The client dies as its message arrives, or as it is answered; the next process sends what this one sent."""
    made, folder = document(llama_folder, tmp_path), tmp_path / "journal"
    setattr(tap, when, once(kind, session, Crash()))
    with pytest.raises(Crash):
        life(made, tap, folder)
    assert spent(folder) == tap.vectors()  # counted before it went
    trainer = life(made, tap, folder)
    assert trainer.outcome.step == STEPS.steps
    number = int(session[-1]) + 1
    repeats = number * 2 - (kind == "forward")  # the step at hand begins anew, up to where it was
    assert_identical(tap, repeated=repeats)
    assert spent(folder) == tap.vectors()


def test_T24_without_a_journal_noise_would_be_drawn_anew(
    tap: Tap, llama_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The comparison above sees the fault that it is there for."""

    def forgetful(noise: Noise, *, most: int, **others: Any) -> Releases:
        return Releases(noise, most=most)

    monkeypatch.setattr(client_module, "Releases", forgetful)
    made, folder = document(llama_folder, tmp_path), tmp_path / "journal"
    tap.before = once("backward", "2.0", Crash())
    with pytest.raises(Crash):
        life(made, tap, folder)
    with suppress(NorenError):  # the server answered this step already, and now it is another one
        life(made, tap, folder)
    assert len(set(tap.copies()["2.0", "forward"])) == 2
    with pytest.raises(AssertionError):
        assert_identical(tap, repeated=1)


def test_T24_a_server_that_says_it_lost_the_graph(tap: Tap, llama_folder: Path, tmp_path: Path) -> None:
    """At every backward pass: it gets the same forward again, and the same gradient, and nothing is counted twice."""
    lied: set[str] = set()

    def lie(message: Message) -> None:
        if isinstance(message.meta, Backward) and message.meta.session not in lied:
            lied.add(message.meta.session)
            raise SessionLost("the graph of this step was lost")

    tap.before = lie
    made, folder = document(llama_folder, tmp_path), tmp_path / "journal"
    assert life(made, tap, folder).outcome.step == STEPS.steps
    assert len(lied) == 6
    assert_identical(tap, repeated=12)
    assert spent(folder) == tap.vectors()


def test_T24_a_server_that_always_lies(tap: Tap, llama_folder: Path, tmp_path: Path) -> None:
    """However often its client starts again, it gets one noisy tensor for one step."""

    def lie(message: Message) -> None:
        if isinstance(message.meta, Backward):
            raise SessionLost("the graph of this step was lost")

    tap.before = lie
    made, folder = document(llama_folder, tmp_path), tmp_path / "journal"
    for _ in range(10):
        with pytest.raises(SessionLost):
            life(made, tap, folder)
    copies = tap.copies()
    assert set(copies) == {("1.0", "forward"), ("1.0", "backward")} and len(copies["1.0", "forward"]) == 20
    assert_identical(tap, repeated=2)
    assert spent(folder) == tap.vectors()


def test_T24_a_server_that_says_it_lost_the_run(tap: Tap, llama_folder: Path, tmp_path: Path) -> None:
    """All go back to a checkpoint, again and again: the states of a step are computed anew, and their noise is not."""
    made, bodies = document(llama_folder, tmp_path), list[bytes]()
    settings, checkpoint = msgspec.structs.replace(STEPS, save_every=1), tmp_path / "checkpoint"
    for _ in range(5):
        server = SpanServer(tap.server.stage, lora=tap.server.lora)  # it knows nothing of the run
        twin = Tap(server, before=once("backward", "2.0", Crash()))
        with Journal(tmp_path / "journal") as journal:
            kept = StepJournal(journal, "noisy").read()
            client = Client(
                made, twin.connect(identity("client")), policy=Policy(), journal=journal,
                resume=incarnation_of(kept.position) if kept else "",
            )  # fmt: skip
            trainer = Trainer(
                client.model, rows(6), [], settings, pad_id=0, seed=3, remote=client.remote(), checkpoint=checkpoint,
                journal=StepJournal(journal, "noisy"),
            )  # fmt: skip
            assert kept is None or trainer.resume() == 1
            with pytest.raises(Crash):
                trainer.run()
        server.close()
        tensors = {m.meta.session: m.tensors["hidden"] for m in twin.seen if isinstance(m.meta, Forward)}
        bodies.append(tensors["2.0"].numpy().tobytes())
    assert len(set(bodies)) == 1


def test_noise_of_a_name_is_of_its_vectors_too() -> None:
    """The same noise on other vectors would be taken off by subtracting the two."""
    one, zeros, secret = Noise(scale=1.0), torch.zeros(4, 4), secrets.token_bytes(32)
    first = Gaussian(one, secret)(zeros, "1.0/forward")
    assert torch.equal(first, Gaussian(one, secret)(zeros, "1.0/forward"))
    others = [
        Gaussian(one, secret)(zeros, "1.0/backward"), Gaussian(one, secret)(zeros, "2.0/forward"),
        Gaussian(one, secret)(zeros + 1e-6, "1.0/forward"), Gaussian(one)(zeros, "1.0/forward"),
        Gaussian(one, secret)(zeros),
    ]  # fmt: skip
    assert all(float((first - other).abs().max()) > 0.01 for other in others)


def test_T24_generation_is_replayed_as_it_left(tap: Tap, llama_folder: Path, tmp_path: Path) -> None:
    """A server that says it lost a session gets the noisy states that it had, not others, and they count once."""
    count = [0]

    def lie(message: Message) -> None:
        count[0] += isinstance(message.meta, Forward)
        if count[0] == 6 and isinstance(message.meta, Forward) and message.meta.start:
            raise SessionLost("the session was lost")

    tap.before = lie
    made = Document.of({"model": str(llama_folder), "plan": U_SHAPED, "noise": NOISE}, tmp_path)
    client = Client(made, tap.connect(identity("client")), policy=Policy())
    prompt = torch.randint(3, 128, (1, 7), generator=torch.Generator().manual_seed(4))
    client.model.generate(prompt, max_new_tokens=9, do_sample=False, pad_token_id=0)
    sent = [m for m in tap.seen if isinstance(m.meta, Forward)]
    again = [i for i, m in enumerate(sent) if i and m.meta.start == 0]  # type: ignore[union-attr]
    assert len(again) == 1 == client.span.replays
    first = torch.cat([m.tensors["hidden"] for m in sent[: again[0]]])
    assert torch.equal(sent[again[0]].tensors["hidden"], first)
    whole = sum(len(m.tensors["hidden"]) for m in sent) - len(first)
    assert client.releases.spent == whole == 7 + 8
    client.close()


def test_T24_counted_before_it_leaves(tap: Tap, llama_folder: Path, tmp_path: Path) -> None:
    """The count on the disk is never behind what a server has; a crash between the two keeps it."""
    made, folder = document(llama_folder, tmp_path), tmp_path / "journal"
    looked = [0]

    def look(client: Client) -> None:
        assert client.journal is not None
        journal, ask = client.journal, client.span.handler

        def check(message: Message) -> None:
            record = journal.read("noisy", "spent")
            assert record is not None and msgspec.json.decode(record.words)["vectors"] == tap.vectors()
            looked[0] += 1

        def send(message: Message) -> Message:
            if isinstance(message.meta, Backward) and message.meta.session == "2.0" and not tap_was_cut:
                tap_was_cut.append(True)
                raise Crash  # written down, and not sent
            return ask(message)

        tap.before = lambda message: check(message) if isinstance(message.meta, Forward | Backward) else None
        client.span.handler = send

    tap_was_cut: list[bool] = []
    with pytest.raises(Crash):
        life(made, tap, folder, prepare=look)
    behind = spent(folder) - tap.vectors()
    assert behind > 0 and ("2.0", "backward") not in tap.copies()
    tap.before = nothing
    life(made, tap, folder)
    assert spent(folder) == tap.vectors() and looked[0] >= 5
    assert_identical(tap, repeated=1)


def test_T24_the_budget_outlives_a_crash(tap: Tap, llama_folder: Path, tmp_path: Path) -> None:
    """A new process does not begin to count anew: the message that would be too many is not sent."""
    made, folder = document(llama_folder, tmp_path), tmp_path / "journal"
    tap.before = once("forward", "2.0", Crash())
    with pytest.raises(Crash):
        life(made, tap, folder)
    most = spent(folder) + 1
    for _ in range(3):
        with pytest.raises(PolicyRefused, match=f"the policy's budget is {most}; nothing was sent"):
            life(made, tap, folder, Policy(most_vectors=most))
        assert spent(folder) == tap.vectors() < most


def test_what_leaves_is_on_the_list() -> None:
    """A kind of message that nobody has thought about does not leave; those without data cost nothing."""
    releases = Releases(Noise(clip=1.0, scale=1.0), most=1)
    for meta in (Pull(), Status(), Step(update=Update(step=1, scale=1.0, optimizer=Optimizer(name="sgd", lr=0.1)))):
        assert releases(message := Message(meta)) is message
    with pytest.raises(KeyError):
        releases(Message(Hidden(), {"hidden": torch.zeros(1, 1)}))
    assert releases.spent == 0
    assert releases(Message(Backward(session="1.0"), {"gradient": torch.zeros(1, 1)})).tensors and releases.spent == 1


# The mechanism.


def normal(values: torch.Tensor) -> float:
    """Kolmogorov-Smirnov distance of values from the standard normal distribution."""
    ordered = values.double().flatten().sort().values
    cdf, n = torch.special.ndtr(ordered), len(ordered)
    steps = torch.arange(n, dtype=torch.float64) / n
    return float(torch.maximum((cdf - steps).abs(), (cdf - steps - 1 / n).abs()).max())


@pytest.mark.parametrize("scale", [0.1, 2.5])
def test_noise_is_gaussian_of_the_scale_that_was_said(scale: float) -> None:
    seed = secrets.randbits(31)
    clean = torch.randn(500, 400, generator=torch.Generator().manual_seed(seed))
    drawn = (Gaussian(Noise(scale=scale))(clean) - clean) / scale
    distance, n = normal(drawn), drawn.numel()
    limit = math.sqrt(-math.log(1e-9 / 2) / 2 / n)  # exceeded once in 1e9 draws (Massart 1990)
    deviation = float(drawn.double().std())
    print(f"seed {seed}: n {n}, KS {distance:.5f} (limit {limit:.5f}), deviation {deviation:.4f}")
    assert distance < limit
    assert abs(deviation - 1) < 0.01
    assert abs(float((drawn[:, 1:] * drawn[:, :-1]).double().mean())) < 0.015  # neighbours know nothing of each other
    assert normal(drawn * 1.05) > limit  # five per cent more would be seen


def test_no_vector_is_longer_than_the_clip() -> None:
    """Rounding aside, in each type that may cross; shorter vectors stay as they are, and zeros zero."""
    lengths = torch.logspace(-3, 4, 200)
    vectors = torch.nn.functional.normalize(torch.randn(200, 64), dim=-1) * lengths[:, None]
    for dtype, slack in ((torch.float32, 1e-5), (torch.bfloat16, 1e-2), (torch.float16, 1e-2)):
        given = vectors.to(dtype)
        if dtype == torch.float16:
            given = given.clamp(-6e4, 6e4)
        out = Gaussian(Noise(clip=2.0))(given)
        assert out.dtype == dtype
        norms = out.float().norm(dim=-1)
        assert float(norms.max()) <= 2.0 * (1 + slack)
        short = given.float().norm(dim=-1) < 2.0 * (1 - slack)
        assert 50 < int(short.sum()) < 150 and torch.equal(out[short], given[short])
        long = given.float().norm(dim=-1) > 2.1
        assert float(norms[long].min()) > 2.0 * (1 - slack)
    assert torch.equal(Gaussian(Noise(clip=2.0))(torch.zeros(3, 8)), torch.zeros(3, 8))


def test_clipping_comes_before_noise() -> None:
    """The other way round, the noise on a long vector would be clipped away with it."""
    long = torch.full((2000, 16), 1e6)
    out = Gaussian(Noise(clip=1.0, scale=3.0))(long) - 0.25
    assert 2.9 < float(out.std()) < 3.1


def test_noise_does_not_follow_the_trainings_seed() -> None:
    """A run's seed is known to all parties: noise drawn from it could be taken off again."""
    drawn = []
    for _ in range(2):
        torch.manual_seed(0)
        before = torch.get_rng_state()
        drawn.append(Gaussian(Noise(scale=1.0))(torch.zeros(4, 4)))
        assert torch.equal(torch.get_rng_state(), before)
    assert not torch.equal(*drawn)
    torch.manual_seed(0)
    assert not torch.equal(drawn[0], torch.randn(4, 4))
    one = Gaussian(Noise(scale=1.0))
    assert not torch.equal(one(torch.zeros(4, 4)), one(torch.zeros(4, 4)))
