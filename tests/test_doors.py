"""Who comes in, on a real socket before a real party: every bad certificate against every kind of message."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args
from unittest import mock

import grpc
import msgspec
import pytest
import torch
from cryptography import x509
from grpc_health.v1 import health_pb2

from conftest import U_SHAPED
from faults import FaultProxy
from noren.adapters.lora import Lora
from noren.config import Document
from noren.errors import ConfigError, Denied, LinkError
from noren.parties.client import Client
from noren.parties.server import SpanServer
from noren.partition.stage import Stage
from noren.training.batches import collate
from noren.types import (
    PROTOCOL,
    AnyMeta,
    Average,
    Backward,
    Close,
    Enter,
    Forward,
    Hello,
    Leave,
    Message,
    Meta,
    Optimizer,
    Pull,
    Push,
    State,
    Status,
    Step,
    Terms,
    Together,
    Update,
    Welcome,
)
from noren.wire import access, envelope
from noren.wire.envelope import Header, Incoming, Packed, pack
from noren.wire.grpc_link import CODE_HEADER, KEY_HEADER, METHOD, GrpcLink
from noren.wire.grpc_server import GrpcServer
from noren.wire.identity import (
    USES,
    Credentials,
    Identity,
    Insecure,
    Role,
    create_authority,
    files,
    issue,
    revoke,
    roll_over,
)
from noren.wire.identity.authority import _leaf
from noren.wire.identity.keyring import issuing
from noren.wire.seal import Seal, new_key
from test_crossing import ADAPTER, rows
from tls import ALONE, ago, held, load, pair, raw_client, serial

KEEPALIVE, WATCH = 1.0, 0.5
HEALTH = [f"health/{m.name}" for m in health_pb2.DESCRIPTOR.services_by_name["Health"].methods]
METAS = {str(meta.__struct_config__.tag): meta for meta in get_args(AnyMeta)}
COLUMNS = [*METAS, *HEALTH]
REQUESTS = {kind for kind, rule in access.TABLE.items() if rule.roles}
UPDATE = Update(step=1, scale=1.0, optimizer=Optimizer(name="sgd", lr=0.1))


@dataclass
class Place:
    """A party that serves, and the folder of its federation's keys."""

    folder: Path
    model: Path
    server: SpanServer
    port: int
    listening: GrpcServer
    seen: list[Identity] = field(default_factory=list)

    def client(self, name: str, run: str = "run", *, address: str = "", **fields: Any) -> Client:
        """A client with the certificate of that name."""
        values = {
            "model": str(self.model), "plan": U_SHAPED, "name": run, "keys": {"dir": str(self.folder), "name": name},
            "links": {"server": address or f"127.0.0.1:{self.port}"}, "adapter": ADAPTER,
            "wire": {"keepalive_seconds": KEEPALIVE, "patience_seconds": 20.0},
        }  # fmt: skip
        return Client(Document.of(values | fields, Path.cwd()))

    def terms(self) -> Terms:
        stage = self.server.stage
        lora = msgspec.convert(ADAPTER, Lora).canonical()
        return Terms(
            fingerprint=stage.fingerprint,
            plan=stage.plan.lines(),
            task="causal-lm",
            dtype="float32",
            lora=lora,
            seed=0,
            together=Together(mode="server-hierarchical"),
        )


@pytest.fixture
def place(tmp_path: Path, llama_folder: Path) -> Iterator[Place]:
    folder = tmp_path / "keys"
    with ago(3):
        create_authority(folder)
    stage = Stage.load(llama_folder, U_SHAPED, "server", "causal-lm")
    server = SpanServer(stage, lora=msgspec.convert(ADAPTER, Lora))
    seen: list[Identity] = []

    def connect(owner: Identity) -> Any:
        seen.append(owner)
        return server.connect(owner)

    own = pair(folder, "server", "server")
    with GrpcServer("127.0.0.1:0", own, connect, keepalive=KEEPALIVE, watch_seconds=WATCH) as listening:
        yield Place(folder, llama_folder, server, listening.port, listening, seen)
    server.close()


class Caller:
    """A peer that shows what it has and sends what it likes: no check of its own stands in its way."""

    def __init__(self, port: int, shown: grpc.ChannelCredentials | None) -> None:
        target = f"127.0.0.1:{port}"
        self._channel = grpc.secure_channel(target, shown, ALONE) if shown else grpc.insecure_channel(target, ALONE)
        self._key, self._request = new_key(), 0
        self._seal = Seal(self._key, client=True)
        self._frames: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self._answers: Any = None

    def __enter__(self) -> Caller:
        return self

    def __exit__(self, *exc: object) -> None:
        self._frames.put(None)
        self._channel.close()

    def ask(self, message: Message | Packed) -> Message:
        """Send a message, return what comes back. Raises RpcError."""
        packed = pack(message) if isinstance(message, Message) else message
        if self._answers is None:
            method = self._channel.stream_stream(METHOD)
            self._answers = method(iter(self._frames.get, None), metadata=((KEY_HEADER, self._key),), timeout=20)
        self._request += 1
        for frame in packed.frames(self._request, self._seal):
            self._frames.put(frame)
        incoming = Incoming(self._seal)
        for frame in self._answers:
            if (reply := incoming.feed(frame)) is not None:
                return reply
        raise AssertionError("the peer ended the stream without a word")

    def health(self, method: str) -> Any:
        """Ask the health service."""
        name = f"/grpc.health.v1.Health/{method}"
        make = self._channel.unary_stream if method == "Watch" else self._channel.unary_unary
        call = make(name, health_pb2.HealthCheckRequest.SerializeToString, lambda data: data)
        answer = call(health_pb2.HealthCheckRequest(), timeout=20)
        return next(answer) if method == "Watch" else answer

    def outcome(self, column: str, message: Message) -> str:
        """What comes of it, in one word: the kind of the answer, or why there is none."""
        try:
            if column.startswith("health/"):
                self.health(column.removeprefix("health/"))
                return "ok"
            reply = self.ask(message)
        except grpc.RpcError as error:
            code = dict(error.trailing_metadata() or ()).get(CODE_HEADER, "")
            return f"{error.code().name} {code}".strip()
        return f"failure {reply.meta.code}" if reply.kind == "failure" else reply.kind  # type: ignore[union-attr]


def least(kind: type[Meta]) -> Meta:
    """The smallest meta of a kind: whatever its fields are called, also of one that is added tomorrow."""

    def value(wanted: msgspec.inspect.Type) -> Any:
        if isinstance(wanted, msgspec.inspect.StructType):
            return {f.encode_name: value(f.type) for f in wanted.fields if f.required}
        if isinstance(wanted, msgspec.inspect.LiteralType):
            return wanted.values[0]
        if isinstance(wanted, msgspec.inspect.UnionType):
            return value(wanted.types[0])
        plain = {"Int": 0, "Float": 0.0, "Str": "x", "Bool": False, "List": [], "Dict": {}, "None": None}
        return plain[type(wanted).__name__.removesuffix("Type")]

    return msgspec.convert(value(msgspec.inspect.type_info(kind)) | {"kind": kind.__struct_config__.tag}, kind)


def request(kind: str, place: Place, run: str = "mine", resume: str = "") -> Message:
    """A message of a kind that an honest client might send next, or the smallest of the kind."""
    hidden = {"hidden": torch.ones(3, 48)}
    made = {
        "hello": Message(Hello(protocol=PROTOCOL, run=run, terms=place.terms(), resume=resume)),
        "forward": Message(Forward(session="a-session", start=3, lengths=[3], padding="left"), hidden),
        "backward": Message(Backward(session="1.0"), {"gradient": torch.ones(3, 48)}),
        "step": Message(Step(update=UPDATE)),
        "pull": Message(Pull(optimizer=True)),
        "close": Message(Close()),
    }
    return made.get(kind) or (Message(least(METAS[kind])) if kind in METAS else Message(Status()))


# The rows. Each makes what a peer shows; `place` has had an honest client before.

Shown = Callable[[Place], grpc.ChannelCredentials | None]


def forged(place: Place, uri: str, role: Role = "client") -> grpc.ChannelCredentials:
    """A certificate of the federation's own authority, for connecting, that says what Noren would never write."""
    says: Any = SimpleNamespace(name="forged", role=role, uri=uri)
    with mock.patch.dict(USES, {role: ("client",)}):
        made = _leaf(issuing(place.folder)[0], says, [], 1.0)
    ca = (place.folder / "ca.crt").read_bytes()
    return grpc.ssl_channel_credentials(ca, files.key_pem(made.key), files.certificate_pem(made.certificate))


def other_ca(place: Place) -> grpc.ChannelCredentials:
    create_authority(place.folder.parent / "other")
    issue(place.folder.parent / "other", "alpha", "client")
    return raw_client(held(place.folder.parent / "other", "alpha", ca=place.folder))


def expired(place: Place) -> grpc.ChannelCredentials:
    with ago(2):
        return raw_client(pair(place.folder, "late", "client", days=1))


def revoked(place: Place) -> grpc.ChannelCredentials:
    gone = pair(place.folder, "gone", "client")
    assert revoke(place.folder, "gone")
    return raw_client(gone)


HANDSHAKE = {"UNAVAILABLE"}
DENIED = {"PERMISSION_DENIED denied", "PERMISSION_DENIED", "UNIMPLEMENTED"}
ROWS: dict[str, tuple[Shown, set[str]]] = {
    "no certificate": (lambda p: grpc.ssl_channel_credentials((p.folder / "ca.crt").read_bytes()), HANDSHAKE),
    "other authority": (other_ca, HANDSHAKE),
    "expired": (expired, HANDSHAKE),
    "wrong use": (lambda p: raw_client(held(p.folder, "server")), HANDSHAKE),
    "plaintext": (lambda p: None, HANDSHAKE),
    "revoked": (revoked, DENIED),
    "other federation": (lambda p: forged(p, "spiffe://other/client/alpha"), DENIED),
    "no identity": (lambda p: forged(p, "spiffe://noren/client"), DENIED),
}


@pytest.mark.parametrize("row", ROWS)
def test_T5_matrix(place: Place, row: str) -> None:
    """No certificate but a good one reaches any method or kind."""
    shown, expected = ROWS[row][0](place), ROWS[row][1]
    found = {}
    for column in COLUMNS:
        with Caller(place.port, shown) as caller:
            found[column] = caller.outcome(column, request(column, place))
    bad = {column: outcome for column, outcome in found.items() if outcome not in expected}
    assert not bad and place.seen == [] and place.server.runs == {}
    assert not [c for c, o in found.items() if o == "UNIMPLEMENTED" and c not in ("health/Watch", "health/List")]
    with Caller(place.port, raw_client(pair(place.folder, "alpha", "client"))) as control:
        assert control.outcome("hello", request("hello", place)) == "welcome"
    print(f"{row}: {len(found)} cells, all of {sorted(set(found.values()))}")


def test_T5_matrix_control(place: Place) -> None:
    """A good certificate: each request in its place, no request before hello, and never an answer as a request."""
    alpha = raw_client(pair(place.folder, "alpha", "client"))
    forward = Forward(session="1.0", start=0, lengths=[3], padding="left", train=True)
    found, cells = {}, 0
    with Caller(place.port, alpha) as caller:
        welcome = caller.ask(request("hello", place)).meta
        assert isinstance(welcome, Welcome)
        found["hello"] = welcome.__struct_config__.tag
        found["enter"] = caller.outcome("enter", Message(Enter()))
        found["forward"] = caller.outcome("forward", Message(forward, {"hidden": torch.ones(3, 48)}))
        for kind in ("backward", "step", "status"):
            found[kind] = caller.outcome(kind, request(kind, place))
        state = caller.ask(Message(Pull()))
        found["pull"] = state.kind
        found["push"] = caller.outcome("push", Message(Push(step=1), state.tensors))
        found["average"] = caller.outcome("average", Message(Average(step=1, weight=1)))
        found["leave"] = caller.outcome("leave", Message(Leave()))
        found["close"] = caller.outcome("close", Message(Close()))
        found |= {column: caller.outcome(column, Message(Status())) for column in HEALTH}
    assert found == {
        "hello": "welcome", "forward": "hidden", "backward": "gradient", "step": "done", "status": "condition",
        "pull": "state", "push": "done", "close": "done", "enter": "done", "average": "state", "leave": "done",
        "health/Check": "ok", "health/List": "UNIMPLEMENTED", "health/Watch": "UNIMPLEMENTED",
    }  # fmt: skip
    assert found.keys() - set(HEALTH) == REQUESTS
    cells += len(found)
    for hello_first in (True, False):
        for kind in METAS:
            if hello_first and kind in REQUESTS:
                continue
            with Caller(place.port, alpha) as caller:
                if hello_first:
                    caller.ask(request("hello", place))
                outcome = caller.outcome(kind, request(kind, place))
            cells += 1
            if kind in ("hello", "status"):
                assert outcome == {"hello": "welcome", "status": "condition"}[kind]
            elif kind in REQUESTS:
                assert outcome == "INVALID_ARGUMENT protocol", kind
            else:
                assert outcome == "PERMISSION_DENIED denied", kind
    print(f"control: {cells} cells")


def test_T5_matrix_wrong_role(place: Place) -> None:
    """A server's name in a certificate that may open connections: it may ask how the party is, and no more."""
    shown, found = forged(place, "spiffe://noren/server/spare", "server"), {}
    for column in COLUMNS:
        with Caller(place.port, shown) as caller:
            found[column] = caller.outcome(column, request(column, place))
    allowed = {"status": "condition", "health/Check": "ok"}
    assert {c: o for c, o in found.items() if c in allowed} == allowed
    assert {o for c, o in found.items() if c not in allowed} <= DENIED and place.server.runs == {}
    print(f"wrong role: {len(found)} cells, {len(allowed)} allowed")


def state_of(caller: Caller) -> dict[str, bytes]:
    reply = caller.ask(Message(Pull(optimizer=True)))
    assert isinstance(reply.meta, State)
    return {name: tensor.numpy().tobytes() for name, tensor in reply.tensors.items()} | {
        "": str(reply.meta.step).encode()
    }


def test_T5_matrix_of_anothers_names(place: Place) -> None:
    """With a good certificate and another's run, session and resume token: nothing is got, and nothing is changed."""
    alpha, beta = (raw_client(pair(place.folder, name, "client")) for name in ("alpha", "beta"))
    one = torch.randn(6, 48, generator=torch.Generator().manual_seed(1))
    session = {"session": "a-session", "lengths": [3], "padding": "left"}
    found = {}
    with Caller(place.port, alpha) as owner:
        welcome = owner.ask(request("hello", place)).meta
        assert isinstance(welcome, Welcome)
        fresh = state_of(owner)
        filled = {n: torch.full(s, 0.25) for n, s in welcome.adapter.items()}
        owner.ask(Message(Push(step=7), filled))
        first = Message(Forward(start=0, **session), {"hidden": one[:3]})
        then = Message(Forward(start=3, **session), {"hidden": one[3:]})
        owner.ask(first)
        expected = owner.ask(then).tensors["hidden"]
        owner.ask(Message(Forward(session="8.0", start=0, lengths=[3], padding="left", train=True), first.tensors))
        mine = state_of(owner)
        assert mine != fresh
        for kind in METAS:
            with Caller(place.port, beta) as thief:
                theirs = thief.ask(request("hello", place, resume=welcome.incarnation)).meta
                assert isinstance(theirs, Welcome) and theirs.step == 0
                assert theirs.incarnation != welcome.incarnation
                assert state_of(thief) == fresh, "the thief's own, as its seed makes it"
                message = request(kind, place, resume=welcome.incarnation)
                if kind == "backward":
                    message = Message(Backward(session="8.0"), message.tensors)
                if kind == "push":
                    message = Message(Push(step=3), {n: t + 1 for n, t in filled.items()})
                found[kind] = thief.outcome(kind, message)
            assert state_of(owner) == mine, kind
            assert torch.equal(owner.ask(then).tensors["hidden"], expected), kind
        back = owner.ask(Message(Backward(session="8.0"), {"gradient": torch.ones(3, 48)}))
        assert back.kind == "gradient"  # the graph is there still
    assert found["forward"] == "failure session-lost" and found["backward"].startswith("failure ")
    assert all(found[kind] == "PERMISSION_DENIED denied" for kind in METAS.keys() - REQUESTS)
    print(f"another's names: {len(found)} cells, {found}")


def test_T5_a_kind_without_a_row_fails(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    class Peek(Meta, frozen=True, kw_only=True, tag="peek"):
        """A kind that somebody has added, and forgotten in the table."""

    wider = msgspec.defstruct(
        "Wider", [("meta", AnyMeta | Peek), ("tensors", list[envelope.Entry])], frozen=True,
        namespace={"kind": Header.kind},
    )  # fmt: skip

    def unruled(union: Any) -> set[str]:
        return {str(meta.__struct_config__.tag) for meta in get_args(union)} ^ access.TABLE.keys()

    assert unruled(AnyMeta) == set() and unruled(AnyMeta | Peek) == {"peek"}
    for role in get_args(Role):
        with pytest.raises(Denied, match="may not send a 'peek'"):
            access.check("peek", role, in_run=True)
    monkeypatch.setattr(envelope, "_DECODER", msgspec.json.Decoder(wider))
    with Caller(place.port, raw_client(pair(place.folder, "alpha", "client"))) as caller:
        caller.ask(request("hello", place))
        assert caller.outcome("peek", Message(Peek())) == "PERMISSION_DENIED denied"  # type: ignore[arg-type]


def test_T5_plaintext_needs_a_flag_and_warns(place: Place, caplog: pytest.LogCaptureFixture) -> None:
    """Both ends must say so, each time; where only one does, a sentence says what is wrong."""

    def warnings() -> list[str]:
        return [line.getMessage() for line in caplog.records if "no TLS" in line.getMessage()]

    def status(port: int, shown: Credentials | Insecure) -> Message:
        link = GrpcLink(f"127.0.0.1:{port}", shown, first_seconds=1.0)
        try:
            return link(Message(Status()))
        finally:
            link.close()

    own = pair(place.folder, "alpha", "client")
    with GrpcServer("127.0.0.1:0", Insecure(), place.server.connect) as plain:
        assert len(warnings()) == 1 and "serving at" in warnings()[0]
        for count in (2, 3):
            assert status(plain.port, Insecure()).kind == "condition"
            assert len(warnings()) == count and "connecting to" in warnings()[-1]
        with pytest.raises(LinkError, match="does not speak TLS"):
            status(plain.port, own)
        assert len(warnings()) == 3
    with pytest.raises(LinkError, match="it may not accept this client's certificate"):
        status(place.port, Insecure())
    assert status(place.port, own).kind == "condition"
    with GrpcServer("127.0.0.1:0", Insecure(), place.server.connect):
        pass
    assert sum("serving at" in line for line in warnings()) == 2


# Certificates that end, or change, while their owners work.


class Work:
    """A client that generates or trains in a thread of its own until told to stop, or something is raised."""

    def __init__(self, client: Client, *, train: bool) -> None:
        self.client, self.calls, self.error = client, 0, None  # type: Client, int, BaseException | None
        self.ended = 0.0  # monotonic
        self._over, self._train = threading.Event(), train
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            while not self._over.is_set():
                self._once()
        except Exception as error:
            self.error, self.ended = error, time.monotonic()

    def _once(self) -> None:
        model = self.client.model
        if self._train:
            optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-3)
            model(**collate(rows()[:2], 0)).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        else:
            ids = torch.arange(3, 12).view(1, -1)
            model.generate(ids, max_new_tokens=4, do_sample=False, pad_token_id=0)
        self.calls += 1

    def more(self, count: int = 2, seconds: float = 30.0) -> None:
        """Wait until it has done some more."""
        wanted, end = self.calls + count, time.monotonic() + seconds
        while self.calls < wanted and self.error is None:
            assert time.monotonic() < end, f"stuck after {self.calls} calls"
            time.sleep(0.01)

    def fails(self, seconds: float = 20.0) -> BaseException:
        """Wait until something is raised."""
        self._thread.join(seconds)
        assert self.error is not None, f"{self.calls} calls, and nothing was raised"
        return self.error

    def stop(self) -> None:
        self._over.set()
        self._thread.join(20)
        self.client.close()


@pytest.mark.parametrize("train", [False, True], ids=["generating", "training"])
def test_T25_revoked_mid_session(place: Place, train: bool) -> None:
    for name in ("alpha", "beta"):
        issue(place.folder, name, "client")
    one, other = (Work(place.client(name), train=train) for name in ("alpha", "beta"))
    one.more()
    other.more()
    start = time.monotonic()
    revoke(place.folder, "alpha")
    error = one.fails()
    seconds = one.ended - start
    assert isinstance(error, Denied) and "the certificate of 'alpha' was revoked" in str(error), error
    assert seconds <= KEEPALIVE
    other.more(5)
    assert other.error is None and other.client.link.connections == 1
    one.stop()
    other.stop()
    print(f"cut {seconds:.2f} s after it was revoked; the other made {other.calls} calls, 0 failed")


def test_T25_an_idle_connection_is_cut_too(place: Place) -> None:
    """Nobody has to say anything for a revocation to count."""
    pair(place.folder, "alpha", "client")
    client = place.client("alpha")
    assert place.listening.connections == 1
    start = time.monotonic()
    revoke(place.folder, "alpha")
    while place.listening.connections and time.monotonic() < start + 10:
        time.sleep(0.01)
    seconds = time.monotonic() - start
    assert seconds <= KEEPALIVE
    client.close()
    print(f"an idle connection was cut after {seconds:.2f} s")


def test_T25_expired_mid_session(place: Place) -> None:
    pair(place.folder, "beta", "client")
    other = Work(place.client("beta"), train=False)
    issue(place.folder, "alpha", "client", days=3 / 86_400)
    end = load(place.folder / "alpha.crt").not_valid_after_utc.timestamp()
    one = Work(place.client("alpha"), train=False)
    one.more()
    error = one.fails()
    late = time.time() - end - (time.monotonic() - one.ended)
    assert isinstance(error, ConfigError | Denied) and "expired" in str(error), error
    assert -0.05 <= late <= KEEPALIVE and one.calls > 2
    other.more()
    assert other.error is None and other.client.link.connections == 1
    one.stop()
    other.stop()
    print(f"cut {late:.2f} s after its end, having made {one.calls} calls")


def test_T25_rotation_under_training(place: Place) -> None:
    """Both ends' certificates are replaced again and again, and lines break in between: no request of two fails."""
    names = ("alpha", "beta")
    for name in names:
        issue(place.folder, name, "client")
    with FaultProxy(f"127.0.0.1:{place.port}") as proxy:
        works = [Work(place.client(name, address=proxy.address), train=name == "alpha") for name in names]
        shown = set()
        for _ in range(6):
            for work in works:
                work.more()
            for name in (*names, "server"):
                issue(place.folder, name, "server" if name == "server" else "client")
            shown.add(serial(place.folder / "server.crt"))
            proxy.reset()
        for work in works:
            work.more()
            assert work.error is None, repr(work.error)
            assert work.client.link.connections >= 7
            work.stop()
    print(f"6 rotations, {[w.client.link.connections for w in works]} connections, {[w.calls for w in works]} calls")


def test_T25_roll_over_while_sessions_are_open(place: Place) -> None:
    """A new authority, then new certificates: open lines go on, new ones of either authority are taken."""
    for name in ("alpha", "beta"):
        issue(place.folder, name, "client")
    works = [Work(place.client("alpha"), train=True)]
    works[0].more()
    roll_over(place.folder)
    assert len(x509.load_pem_x509_certificates((place.folder / "ca.crt").read_bytes())) == 2
    works.append(Work(place.client("beta", "old"), train=False))  # the old authority's certificate
    works[1].more()
    for name in ("server", "beta"):
        issue(place.folder, name, "server" if name == "server" else "client")
    load(place.folder / "beta.crt").verify_directly_issued_by(load(place.folder / "ca.crt"))  # the new one's
    works.append(Work(place.client("beta", "new"), train=False))
    for work in works:
        work.more(3)
        assert work.error is None and work.client.link.connections == 1, repr(work.error)
        work.stop()
    print(f"one line through the roll-over, one of each authority after it: {[w.calls for w in works]} calls, 0 failed")
