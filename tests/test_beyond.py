"""What an edge agrees with the next party: the client's terms, and the client's codecs."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from conftest import PLANS, identity, local_line
from faults import FaultProxy
from noren.adapters.lora import Lora
from noren.config import Document
from noren.errors import HandshakeRefused, PeerError, ProtocolError
from noren.parties.client import Client
from noren.parties.policy import Policy
from noren.parties.server import SpanServer
from noren.parties.serving import following
from noren.partition.stage import Stage
from noren.training.loop import Trainer, Training
from noren.types import PROTOCOL, Message, Noise, Welcome
from noren.wire.envelope import PREFIX, Header
from noren.wire.grpc_server import GrpcServer
from noren.wire.identity import Insecure
from step_tape import OWNER, RUN, Tape, build_stages, tape
from test_crossing import ADAPTER, rows

PLAN = ["client :1", "edge 1:2", "server 2:3", "client 3:"]
Twist = Callable[[Welcome], Welcome]


@pytest.fixture(scope="module")
def stages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Stage]:
    return build_stages(tmp_path_factory.mktemp("beyond"), PLAN)


@pytest.fixture
def recorded(stages: dict[str, Stage]) -> Tape:
    return tape(stages["server"], 0)


class Chain:
    """An edge and the party beyond it, which answers a hello as a twist makes it."""

    def __init__(self, stages: dict[str, Stage], lora: Lora, twist: Twist, beyond: Lora | None = None) -> None:
        self.server = SpanServer(copy.deepcopy(stages["server"]), lora=beyond or lora)
        self.seen: list[str] = []
        self.edge = SpanServer(copy.deepcopy(stages["edge"]), lora=lora, following=local_line(self._connect))
        self._twist = twist

    def _connect(self, owner: Any) -> Any:
        chain, inner = self, self.server.connect(owner)

        class Line:
            def __getattr__(self, name: str) -> Any:
                return getattr(inner, name)

            def __call__(self, message: Message) -> Message:
                chain.seen.append(message.kind)
                answer = inner(message)
                return Message(chain._twist(answer.meta)) if isinstance(answer.meta, Welcome) else answer

        return Line()

    def refuses(self, recorded: Tape, error: type[PeerError], words: str) -> None:
        """Check that a client is not let in, and that nothing but a hello went on."""
        connection = self.edge.connect(identity(OWNER))
        with pytest.raises(error, match=words):
            connection(Message(recorded.hello))
        assert not connection.in_run and self.seen == ["hello"]
        assert self.edge.runs[OWNER, RUN].connections == 0
        self.close()

    def close(self) -> None:
        self.edge.close()
        self.server.close()


def terms(**changes: Any) -> Twist:
    """A welcome of other terms."""
    return lambda welcome: msgspec.structs.replace(welcome, terms=msgspec.structs.replace(welcome.terms, **changes))


OTHER: dict[str, tuple[Twist, str]] = {
    "fingerprint": (terms(fingerprint="ab" * 32), "fingerprint"),
    "plan": (terms(plan=["client 0:1", "edge 1:3", "client 3:4"]), "plan"),
    "dtype": (terms(dtype="bfloat16"), "dtype"),
    "adapter": (terms(lora=""), "lora"),
    "codecs": (terms(activations="int4", gradients="int4"), "activations and gradients"),
    "noise": (terms(noise=Noise(scale=1.0)), "noise"),
    "logs": (terms(logs="debug"), "logs"),
    "protocol": (lambda welcome: msgspec.structs.replace(welcome, protocol=PROTOCOL + 1), "protocol"),
}


@pytest.mark.parametrize("name", OTHER)
def test_a_next_party_of_other_terms_is_refused(name: str, stages: dict[str, Stage], recorded: Tape) -> None:
    twist, words = OTHER[name]
    Chain(stages, recorded.lora, twist).refuses(
        recorded, HandshakeRefused, f"^the next party, 'server', has another {words}$"
    )


def test_a_next_party_that_was_set_up_otherwise_is_named(stages: dict[str, Stage], recorded: Tape) -> None:
    other = msgspec.structs.replace(recorded.lora, r=3)
    chain = Chain(stages, recorded.lora, lambda welcome: welcome, beyond=other)
    chain.refuses(recorded, HandshakeRefused, "adapter settings differs: 'server' has .*\"r\":3")


def test_a_next_party_that_claims_this_ones_layers_is_refused(stages: dict[str, Stage], recorded: Tape) -> None:
    def twist(welcome: Welcome) -> Welcome:
        own = {name.replace("layers.2", "layers.1"): shape for name, shape in welcome.adapter.items()}
        return msgspec.structs.replace(welcome, adapter=welcome.adapter | own)

    words = r"answers for 'model\.layers\.1\..*', which is not its own"
    Chain(stages, recorded.lora, twist).refuses(recorded, ProtocolError, words)


def test_a_next_party_of_the_same_terms_is_taken(stages: dict[str, Stage], recorded: Tape) -> None:
    chain = Chain(stages, recorded.lora, lambda welcome: welcome)
    connection = chain.edge.connect(identity(OWNER))
    welcome = connection(Message(recorded.hello)).meta
    assert isinstance(welcome, Welcome) and connection.in_run
    assert {name.split(".")[2] for name in welcome.adapter} == {"1", "2"}
    chain.close()


@pytest.mark.parametrize("codecs", [("int8", "fp16"), ("zstd", "raw"), ("delta", "int4")], ids="/".join)
def test_the_clients_codecs_are_used_all_the_way(codecs: tuple[str, str], llama_folder: Path, tmp_path: Path) -> None:
    """Whatever the edge's own document says; differences, which build on what one party holds, go on as values."""
    plan, activations, gradients = PLANS[4], *codecs
    lora = msgspec.convert(ADAPTER, Lora)
    held = {name: Stage.load(llama_folder, plan, name, "causal-lm") for name in ("edge", "server")}
    server = SpanServer(held["server"], lora=lora)
    with (
        GrpcServer("127.0.0.1:0", Insecure(), server.connect) as far,
        FaultProxy(f"127.0.0.1:{far.port}", capture=True) as proxy,
    ):
        made = {"model": str(llama_folder), "plan": plan, "adapter": ADAPTER}
        own = Document.of(made | {"links": {"server": proxy.address}, "wire": {"activations": "fp8"}}, tmp_path)
        onward = following(own, held["edge"].plan, "edge", insecure=True)
        edge = SpanServer(held["edge"], lora=lora, following=onward)
        with GrpcServer("127.0.0.1:0", Insecure(), edge.connect) as near:
            asked = {"wire": {"activations": activations, "gradients": gradients}}
            asked["links"] = {"edge": f"127.0.0.1:{near.port}"}
            client = Client(Document.of(made | asked, tmp_path), policy=Policy(), insecure=True)
            settings = Training(steps=2, batch_size=3, lr=1e-2)
            Trainer(client.model, rows(6), [], settings, pad_id=0, seed=3, remote=client.remote()).run()
            client.close()
        edge.close()
        found = [(header.kind, entry.codec) for header in headers(proxy.captured) for entry in header.tensors]
    server.close()
    assert set(found) == {("forward", "raw" if activations == "delta" else activations), ("backward", gradients)}
    assert len(found) == 4


def headers(data: bytes) -> list[Header]:
    """The headers of all messages in what was captured in the clear."""
    found, at = [], 0
    while (at := data.find(b"NRN\x02", at)) >= 0:
        length = PREFIX.unpack_from(data, at)[2]
        at += PREFIX.size
        found.append(msgspec.json.decode(data[at : at + length], type=Header))
    return found
