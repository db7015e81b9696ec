"""Frames, links and the server's rules: what is malformed, repeated, lost, too much or somebody else's."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import grpc
import msgspec
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import U_SHAPED, Parties, credentials, identity, local_line
from noren.adapters.lora import Lora
from noren.config import Document
from noren.errors import LinkError, NorenError, OverBudget, Overloaded, PeerError, ProtocolError, SessionLost
from noren.parties.client import Client
from noren.parties.server import Limits, SpanServer
from noren.partition.stage import Stage
from noren.types import PROTOCOL, Backward, Close, Done, Forward, Hello, Hidden, Message, Optimizer, Step, Terms, Update
from noren.wire.envelope import CHUNK, DTYPES, PREFIX, Header, Incoming, decode, encode
from noren.wire.grpc_link import KEY_HEADER, METHOD, GrpcLink
from noren.wire.grpc_server import GrpcServer
from noren.wire.identity import Identity
from noren.wire.local import LocalLink
from noren.wire.seal import Seal
from noren.wire.settings import Doors

KEY = bytes(range(32))


def there() -> Seal:
    return Seal(KEY, client=False)


def forward(tokens: int = 3, width: int = 48, **more: Any) -> Message:
    fields = {"session": "s", "start": 0, "lengths": [tokens], "padding": "left"} | more
    return Message(Forward(**fields), {"hidden": torch.randn(tokens, width)})


def as_bytes(message: Message) -> list[bytes]:
    return encode(message, 7, Seal(KEY, client=True))


@pytest.mark.parametrize("dtype", DTYPES.values())
@pytest.mark.parametrize("tokens", [0, 1, 3, 40_000])
def test_a_message_survives_the_envelope(dtype: torch.dtype, tokens: int) -> None:
    sent = Message(Forward(session="s", start=2, lengths=[tokens], padding="right"), {
        "hidden": torch.randn(tokens, 48).to(dtype), "more": torch.arange(5),
    })  # fmt: skip
    frames = as_bytes(sent)
    assert all(len(frame) <= CHUNK + 512 for frame in frames)
    got = decode(frames, there())
    assert got.meta == sent.meta
    assert got.tensors.keys() == sent.tensors.keys()
    assert all(torch.equal(got.tensors[k], sent.tensors[k]) and got.tensors[k].dtype == t.dtype
               for k, t in sent.tensors.items())  # fmt: skip


def test_no_other_type_crosses() -> None:
    with pytest.raises(ProtocolError, match="only f32, f16, bf16, i64, u8 may cross"):
        encode(Message(Done(), {"x": torch.zeros(3, dtype=torch.complex64)}), 1, there())


def _prefix(header: bytes, body: bytes, **change: Any) -> bytes:
    fields = {"magic": b"NRN", "version": 2, "length": len(header), "request": 1, "size": len(body)} | change
    made = PREFIX.pack(*fields.values()) + header + body
    tag = Seal(KEY, client=True).outgoing(1)
    tag.update(made)
    return made + tag.value()


GOOD = b'{"meta":{"kind":"done","step":0},"tensors":[["x","f32",[2],"raw",8]]}'
MALFORMED: dict[str, bytes] = {
    "empty": b"",
    "short prefix": b"NRN\2\0\0",
    "other magic": _prefix(GOOD, b"\0" * 8, magic=b"HTT"),
    "header longer than the frame": _prefix(GOOD, b"", length=1000),
    "huge header": _prefix(GOOD, b"", length=1 << 31),
    "no JSON": _prefix(b"\x80\x04\x95garbage", b""),
    "unknown kind": _prefix(b'{"meta":{"kind":"shell"},"tensors":[]}', b""),
    "unknown field": _prefix(b'{"meta":{"kind":"done","run":"x"},"tensors":[]}', b""),
    "field of another type": _prefix(b'{"meta":{"kind":"done","step":"1"},"tensors":[]}', b""),
    "missing field": _prefix(b'{"meta":{"kind":"backward"},"tensors":[]}', b""),
    "negative size": _prefix(b'{"meta":{"kind":"done"},"tensors":[["x","f32",[-1],"raw",0]]}', b""),
    "object dtype": _prefix(b'{"meta":{"kind":"done"},"tensors":[["x","O",[1],"raw",0]]}', b""),
    "overflowing shape": _prefix(
        b'{"meta":{"kind":"done"},"tensors":[["x","f32",[4611686018427387904,4],"raw",0]]}', b""
    ),
    "size above its shapes": _prefix(GOOD, b"\0" * 12),
    "size below its shapes": _prefix(GOOD, b"\0" * 4),
    "one name twice": _prefix(
        b'{"meta":{"kind":"done"},"tensors":[["x","f32",[1],"raw",4],["x","f32",[1],"raw",4]]}', bytes(8)
    ),
    "more body than announced": _prefix(GOOD, b"\0" * 9, size=8),
    "body announced as huge": _prefix(GOOD, b"", size=1 << 40),
}  # fmt: skip


@pytest.mark.parametrize("name", MALFORMED)
def test_malformed_frames_are_refused(name: str) -> None:
    with pytest.raises((ProtocolError, OverBudget)):
        decode([MALFORMED[name]], there())


def test_a_cut_message_is_refused() -> None:
    whole = as_bytes(forward())
    with pytest.raises(ProtocolError, match="cut short"):
        decode([whole[0][:-1]], there())


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=300), st.integers(0, 400), st.integers(0, 255))
def test_mutated_frames_raise_nothing_else(noise: bytes, at: int, value: int) -> None:
    frame = bytearray(b"".join(as_bytes(forward())))
    frame[at % len(frame)] = value
    for data in (bytes(frame), noise, bytes(frame[:at]) + noise):
        with suppress(NorenError):
            Incoming(there(), max_body=1 << 20).feed(data)


@pytest.fixture
def server(llama_folder: Path) -> SpanServer:
    stage = Stage.load(llama_folder, U_SHAPED, "server", "causal-lm")
    return SpanServer(stage, limits=Limits(cache_bytes=40_000, graph_bytes=1 << 20, runs=2))


def hello(server: SpanServer, run: str = "r") -> Message:
    stage = server.stage
    terms = Terms(
        fingerprint=stage.fingerprint, plan=stage.plan.lines(), task="causal-lm", dtype="float32", lora="", seed=0
    )
    return Message(Hello(protocol=PROTOCOL, run=run, terms=terms))


def test_nothing_before_hello(server: SpanServer) -> None:
    with pytest.raises(ProtocolError, match="before 'hello'"):
        LocalLink(server.connect(identity("a")))(forward())


def test_a_session_belongs_to_its_owner(server: SpanServer) -> None:
    mine, yours = LocalLink(server.connect(identity("a"))), LocalLink(server.connect(identity("b")))
    mine(hello(server)), yours(hello(server))
    mine(forward())
    with pytest.raises(SessionLost):
        yours(forward(1, start=3))
    mine(forward(1, start=3))


def test_a_gap_and_a_repeat(server: SpanServer) -> None:
    handler = LocalLink(server.connect(identity("a")))
    handler(hello(server))
    handler(forward())
    with pytest.raises(SessionLost, match="cannot be put back to 5"):
        handler(forward(1, start=5))
    step = forward(1, start=3)
    first, again = handler(step), handler(step)
    assert isinstance(first.meta, Hidden)
    assert torch.equal(first.tensors["hidden"], again.tensors["hidden"])
    assert server.sessions._sessions["a", "r", "s"].mask.shape[1] == 4


def test_a_repeated_reorder_is_not_done_twice(server: SpanServer) -> None:
    handler = LocalLink(server.connect(identity("a")))
    handler(hello(server))
    handler(forward(4, lengths=[2, 2]))
    step = forward(2, start=2, lengths=[1, 1], rows=[1, 1])
    handler(step)
    with pytest.raises(SessionLost):
        handler(step)


@pytest.mark.parametrize(
    ("change", "phrase"),
    [
        ({"lengths": [2]}, "lengths sum to 2"),
        ({"lengths": []}, "lengths sum to 0"),
        ({"lengths": [5, -2]}, r"Expected `int` >= 0"),
        ({"width": 47}, r"must be \[tokens, 48\]"),
        ({"start": 3, "rows": [9]}, "rows"),
        ({"start": 3, "lengths": [1, 2]}, "has 1 sequences, the step has 2"),
    ],
)
def test_a_wrong_step_is_refused(server: SpanServer, change: dict[str, Any], phrase: str) -> None:
    handler = LocalLink(server.connect(identity("a")))
    handler(hello(server))
    handler(forward())
    with pytest.raises(ProtocolError, match=phrase):
        handler(forward(**change))


def test_values_that_are_not_finite_are_refused(server: SpanServer) -> None:
    handler = LocalLink(server.connect(identity("a")))
    handler(hello(server))
    message = forward()
    message.tensors["hidden"][1, 5] = float("nan")
    with pytest.raises(PeerError, match="not finite"):
        handler(message)


def test_an_owner_has_a_byte_budget(server: SpanServer) -> None:
    """The oldest of the owner's own sessions goes; another owner's stays; one that alone is too much is refused."""
    mine, yours = LocalLink(server.connect(identity("a"))), LocalLink(server.connect(identity("b")))
    mine(hello(server)), yours(hello(server))
    yours(forward(10, session="yours"))
    for i in range(12):
        mine(forward(20, session=f"s{i}"))
        assert server.sessions.nbytes("a") <= server.limits.cache_bytes
    assert ("a", "r", "s0") not in server.sessions._sessions
    assert ("a", "r", "s11") in server.sessions._sessions
    assert ("b", "r", "yours") in server.sessions._sessions
    with pytest.raises(OverBudget, match="the limit for one owner is 40000"):
        mine(forward(2000, session="big"))


def test_a_session_that_would_grow_is_refused_before_it_does(server: SpanServer) -> None:
    """One row may not become hundreds: the budget is asked before the cache is repeated."""
    handler = LocalLink(server.connect(identity("a")))
    handler(hello(server))
    handler(forward(10))
    with pytest.raises(OverBudget, match="400 sequences would need"):
        handler(forward(400, start=10, lengths=[1] * 400, rows=[0] * 400))
    handler(forward(2, start=10, lengths=[1, 1], rows=[0, 0]))


def test_overload_does_not_touch_what_a_party_does_for_itself(server: SpanServer) -> None:
    """A run is closed, and its adapter taken out, however much waits."""
    handler = LocalLink(server.connect(identity("a")))
    handler(hello(server))
    server._waiting = server.limits.waiting
    with pytest.raises(Overloaded):
        handler(forward())
    handler(Message(Close()))
    assert not server.runs
    server._waiting = 0


def test_passes_that_nobody_comes_back_for_make_room(server: SpanServer) -> None:
    handler = LocalLink(server.connect(identity("a")))
    handler(hello(server))
    for i in range(100):
        handler(forward(60, session=f"1.{i}", lengths=[20] * 3, train=True))
    assert 0 < server.passes.nbytes <= server.limits.graph_bytes
    gradient = Message(Backward(session="1.0"), {"gradient": torch.zeros(60, 48)})
    with pytest.raises(SessionLost, match="repeat the step"):
        handler(gradient)
    handler(Message(Backward(session="1.99"), gradient.tensors))


def test_what_a_server_sends_back_is_checked(local_parties: Parties, llama_folder: Path) -> None:
    client = local_parties.client(llama_folder)
    ids, ask = torch.ones(2, 5, dtype=torch.long), client.span.handler
    bad = {
        "of another shape": torch.zeros(9, 48),
        "of another width": torch.zeros(10, 47),
        "of another type": torch.zeros(10, 48).half(),
        "not finite": torch.full((10, 48), float("inf")),
    }
    for what, tensor in bad.items():
        client.span.handler = lambda message, tensor=tensor: Message(Hidden(), {"hidden": tensor})
        with pytest.raises(ProtocolError, match="the peer sent back"), torch.no_grad():
            client.model(ids)
        assert what
    client.span.handler = ask
    assert client.model(ids).logits.shape == (2, 5, 128)


def test_two_clients_behind_one_edge_stay_apart(keys: Path, llama_folder: Path) -> None:
    """The edge is one owner at the server; its clients' runs must not become one there."""
    plan = ["client :2", "edge 2:4", "server 4:-2", "client -2:"]
    lora = Lora(r=4, targets=["q_proj"])
    last = SpanServer(Stage.load(llama_folder, plan, "server", "causal-lm"), lora=lora)
    edge = SpanServer(
        Stage.load(llama_folder, plan, "edge", "causal-lm"), lora=lora,
        following=local_line(last.connect),
    )  # fmt: skip
    document = Document.of(
        {"model": str(llama_folder), "plan": plan, "adapter": {"r": 4, "targets": ["q_proj"]}}, Path.cwd()
    )
    clients = [Client(document, edge.connect(identity(name))) for name in ("a", "b")]
    assert len(edge.runs) == 2 and len(last.runs) == 2
    model = clients[0].model
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    model(torch.ones(1, 6, dtype=torch.long), labels=torch.ones(1, 6, dtype=torch.long)).loss.backward()
    optimizer.step()
    clients[0].span.flush()
    assert [run.trainer.step for run in last.runs.values()] == [1, 0]
    for client in clients:
        client.close()
    assert not last.runs


def test_runs_are_limited_and_closed(server: SpanServer) -> None:
    handlers = [LocalLink(server.connect(identity("a"))) for _ in range(3)]
    handlers[0](hello(server, "one")), handlers[1](hello(server, "two"))
    with pytest.raises(OverBudget, match="2 runs here already"):
        handlers[2](hello(server, "three"))
    handlers[0](Message(Close()))
    handlers[2](hello(server, "three"))


def test_sessions_and_runs_expire(llama_folder: Path) -> None:
    now = [0.0]
    limits = Limits(session_seconds=10, run_seconds=100, grace_seconds=5)
    server = SpanServer(Stage.load(llama_folder, U_SHAPED, "server", "causal-lm"), limits=limits, clock=lambda: now[0])
    handler = LocalLink(server.connect(identity("a")))
    handler(hello(server))
    handler(forward())
    now[0] = 11
    server.expire()
    assert not len(server.sessions)
    with pytest.raises(SessionLost):
        handler(forward(1, start=3))
    handler.close()
    handler = LocalLink(server.connect(identity("a")))
    handler(hello(server))
    handler(forward())
    handler(forward(session="1.0", train=True))
    handler.close()
    now[0] = 16
    server.expire()
    assert len(server.sessions) == 1 and server.passes.nbytes, "a client may come back"
    now[0] = 16.5
    server.expire()
    assert not len(server.sessions) and not server.passes.nbytes, "but its sessions end with it"
    assert server.runs
    now[0] = 100
    server.expire()
    assert server.runs
    now[0] = 112
    server.expire()
    assert not server.runs


def test_steps_are_applied_once_and_in_order(server: SpanServer) -> None:
    handler = LocalLink(server.connect(identity("a")))
    handler(hello(server))
    update = Update(step=1, scale=1.0, optimizer=Optimizer(name="sgd", lr=0.1))
    assert handler(Message(Step(update=update))).meta == Done(step=1)
    assert handler(Message(Step(update=update))).meta == Done(step=1)
    with pytest.raises(SessionLost, match="step 5 cannot follow step 1"):
        handler(Message(Step(update=msgspec.structs.replace(update, step=5))))


class Echo:
    """Answers a forward with what it carries, and all else with Done; can be told to fail."""

    codecs, in_run = ("raw", "raw"), True

    def expect(self, header: Header) -> None:
        pass

    def __init__(self) -> None:
        self.fail: Callable[[], None] = lambda: None
        self.seen = 0

    def __call__(self, message: Message) -> Message:
        self.seen += 1
        self.fail()
        return Message(Hidden() if message.kind == "forward" else Done(step=self.seen), message.tensors)

    def disconnect(self) -> None:
        pass


def line(keys: Path, port: int, **more: Any) -> GrpcLink:
    return GrpcLink(f"127.0.0.1:{port}", credentials(keys, "client"), **more)


def test_large_messages_and_counts(keys: Path) -> None:
    echo = Echo()
    with GrpcServer("127.0.0.1:0", credentials(keys, "server"), lambda owner: echo) as served:
        link = line(keys, served.port)
        big = torch.randn(3 << 20)
        answer = link(Message(forward().meta, {"x": big}))
        assert torch.equal(answer.tensors["x"], big)
        assert link.traffic.round_trips == 1
        assert big.nbytes < link.traffic.sent_bytes < big.nbytes + 400
        link.close()


def test_errors_cross_as_what_they_are_and_hide_what_is_internal(keys: Path) -> None:
    echo = Echo()
    with GrpcServer("127.0.0.1:0", credentials(keys, "server"), lambda owner: echo) as served:
        link = line(keys, served.port)

        def fail(error: Exception) -> Callable[[], None]:
            def raise_it() -> None:
                raise error

            return raise_it

        echo.fail = fail(SessionLost("gone"))
        with pytest.raises(SessionLost, match=rf"127.0.0.1:{served.port}: gone"):
            link(Message(Close()))
        echo.fail = fail(ValueError("secret text of the server"))
        with pytest.raises(PeerError, match=r"internal error \(ValueError\)") as caught:
            link(Message(Close()))
        assert "secret" not in str(caught.value)
        echo.fail = lambda: None
        assert link(Message(Close())).kind == "done", "the line still works"
        link.close()


def test_a_server_that_is_not_there(keys: Path) -> None:
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        link = line(keys, held.getsockname()[1], first_seconds=1.0)
        started = time.monotonic()
        with pytest.raises(LinkError, match="is the server running there"):
            link(Message(Close()))
        assert time.monotonic() - started < 10


def test_a_port_that_speaks_something_else(keys: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def answer() -> None:
            try:
                while True:
                    connection, _ = listening.accept()
                    connection.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")
                    connection.close()
            except OSError:
                pass

        answering = threading.Thread(target=answer, daemon=True)
        answering.start()
        with pytest.raises(LinkError):
            line(keys, listening.getsockname()[1], first_seconds=1.0)(Message(Close()))
        listening.shutdown(socket.SHUT_RDWR)  # to close it does not wake who waits in accept
        answering.join(10)
        assert not answering.is_alive()


def test_the_line_survives_a_restart_on_the_same_port(keys: Path) -> None:
    echo = Echo()
    first = GrpcServer("127.0.0.1:0", credentials(keys, "server"), lambda owner: echo).start()
    link = line(
        keys,
        first.port,
        greet=lambda: Message(Step(update=Update(step=0, scale=1.0, optimizer=Optimizer(name="sgd", lr=0.1)))),
    )
    link(Message(Close()))
    first.stop(grace=0)
    second = GrpcServer(f"127.0.0.1:{first.port}", credentials(keys, "server"), lambda owner: echo).start()
    assert link(Message(Close())).kind == "done"
    assert link.connections == 2
    link.close()
    second.stop(grace=0)


def test_raw_garbage_on_the_stream(keys: Path) -> None:
    """A peer with a valid certificate that sends noise is told so, and the stream ends."""
    echo = Echo()
    with GrpcServer("127.0.0.1:0", credentials(keys, "server"), lambda owner: echo) as served:
        channel = grpc.secure_channel(f"127.0.0.1:{served.port}", credentials(keys, "client").client())
        method = channel.stream_stream(METHOD)
        with pytest.raises(grpc.RpcError) as caught:
            list(method(iter([b"noise" * 100, b"more"]), metadata=((KEY_HEADER, KEY),)))
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert "not a Noren message" in caught.value.details() and echo.seen == 0
        channel.close()


def test_a_message_that_drips_is_cut_off(keys: Path) -> None:
    """A byte now and then, each before the limit, does not hold a place for ever."""
    with GrpcServer(
        "127.0.0.1:0", credentials(keys, "server"), lambda owner: Echo(), doors=Doors(stall_seconds=1.0),
        watch_seconds=0.1,
    ) as served:  # fmt: skip
        [frame] = as_bytes(forward())

        def drip() -> Iterator[bytes]:
            yield frame[:-100]
            for byte in frame[-100:]:
                time.sleep(0.2)
                yield bytes([byte])

        channel = grpc.secure_channel(f"127.0.0.1:{served.port}", credentials(keys, "client").client())
        started = time.monotonic()
        with pytest.raises(grpc.RpcError) as caught:
            list(channel.stream_stream(METHOD)(drip(), metadata=((KEY_HEADER, KEY),)))
        assert caught.value.code() is grpc.StatusCode.CANCELLED and time.monotonic() - started < 5
        channel.close()


def test_the_owner_is_the_certificates_name(keys: Path) -> None:
    owners = []

    def connect(owner: Identity) -> Echo:
        owners.append(owner.name)
        return Echo()

    with GrpcServer("127.0.0.1:0", credentials(keys, "server"), connect) as served:
        for name in ("client", "other", "edge"):
            link = GrpcLink(f"127.0.0.1:{served.port}", credentials(keys, name))
            link(Message(Close()))
            link.close()
    assert owners == ["client", "other", "edge"]


def test_generation_survives_a_new_server(keys: Path, llama_folder: Path, whole: Any) -> None:
    """In one process: the server is stopped after some tokens, and a fresh one takes its port."""

    def start(address: str) -> GrpcServer:
        stage = Stage.load(llama_folder, U_SHAPED, "server", "causal-lm")
        return GrpcServer(address, credentials(keys, "server"), SpanServer(stage).connect).start()

    running = [start("127.0.0.1:0")]
    port = running[0].port
    document = Document.of({"model": str(llama_folder), "plan": U_SHAPED, "keys": {"dir": str(keys)},
                            "links": {"server": f"127.0.0.1:{port}"}}, Path.cwd())  # fmt: skip
    client = Client(document)
    count, ask = [0], client.span.handler

    def counting(message: Message) -> Message:
        count[0] += 1
        if count[0] == 7:
            running.pop().stop(grace=0)
            running.append(start(f"127.0.0.1:{port}"))
        return ask(message)

    client.span.handler = counting
    ids = torch.randint(3, 128, (1, 9), generator=torch.Generator().manual_seed(4))
    out = client.model.generate(ids, max_new_tokens=20, do_sample=False, pad_token_id=0)
    assert torch.equal(out, whole.generate(ids, max_new_tokens=20, do_sample=False, pad_token_id=0))
    assert client.span.replays == 1
    client.close()
    running.pop().stop(grace=0)
