"""The client's policy file wins over run documents and servers: what it forbids is refused before a tensor leaves.

What a client sends is recorded on its way, in the clear, and taken apart: no message with a tensor may be in it. The
same is then done over mutual TLS, where the server says what has reached it.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from typer.testing import CliRunner

from conftest import U_SHAPED, credentials
from faults import FaultProxy
from noren.cli.main import app, register
from noren.config import Document
from noren.embedded import MODEL_DIR
from noren.errors import ConfigError, PolicyRefused
from noren.parties.client import Client
from noren.parties.policy import Policy, read_policy
from noren.parties.server import SpanServer
from noren.parties.train import train
from noren.partition.stage import Stage
from noren.types import PROTOCOL, Message, Noise, Welcome
from noren.wire.envelope import PREFIX, Header
from noren.wire.grpc_server import GrpcServer
from noren.wire.identity import Identity, Insecure

ADAPTER = {"r": 2, "targets": ["q_proj"]}
NOISE = {"clip": 50.0, "scale": 0.6}
Twist = Callable[[Welcome], Welcome]


def terms(**changes: Any) -> Twist:
    """A welcome whose terms are others than those that were asked for."""
    return lambda welcome: msgspec.structs.replace(welcome, terms=msgspec.structs.replace(welcome.terms, **changes))


def also_trains(name: str) -> Twist:
    """A welcome with one more adapter."""
    return lambda welcome: msgspec.structs.replace(welcome, adapter=welcome.adapter | {name: [2, 192]})


def honest(welcome: Welcome) -> Welcome:
    """A welcome as it is."""
    return welcome


@dataclass(frozen=True)
class Case:
    """A policy, what a run document or a server asks against it, and the words of the refusal."""

    policy: str
    words: str
    document: dict[str, Any] = field(default_factory=dict)  # changes of the run document
    twist: Twist = honest  # what the server makes of its welcome
    connects: bool = True  # whether a hello leaves before the refusal


LAYER = "model.layers.{}.self_attn.q_proj.lora_A.weight"
CASES = {
    "noise-lower/server": Case(
        "least_noise = 0.5", "noise of 0.1 on what leaves, the policy wants 0.5", twist=terms(noise=Noise(scale=0.1))
    ),
    "noise-lower/document": Case(
        "least_noise = 0.5", "noise of 0.1 on what leaves", document={"noise": {"scale": 0.1}}, connects=False
    ),
    "noise-lower/unclipped": Case(
        "most_clip = 60.0", "vectors of norm inf may leave, the policy wants 60", twist=terms(noise=Noise(scale=0.6))
    ),
    "raw-embeddings/server": Case(
        "first_layers = 2", "wants another plan than was asked for",
        twist=terms(plan=["client 0:0", "server 0:6", "client 6:8"]),
    ),
    "raw-embeddings/document": Case(
        "first_layers = 1", "the plan leaves 0 first layers here, the policy wants 1",
        document={"plan": ["client :0", "server 0:-2", "client -2:"]}, connects=False,
    ),
    "raw-embeddings/head-tail": Case(
        "last_layers = 1", "the plan leaves 0 last layers here, the policy wants 1",
        document={"plan": ["client :2", "server 2:"]}, connects=False,
    ),
    "labels/document": Case(
        "labels_stay = true", 'loss_at = "cloud" sends the labels of every batch away',
        document={"plan": ["client :2", "server 2:"], "loss_at": "cloud"}, connects=False,
    ),
    "labels/server": Case(
        "labels_stay = true", "wants another loss_at than was asked for", twist=terms(loss_at="cloud"),
    ),
    "extra-epochs/document": Case(
        "most_epochs = 1.0", "3 passes over the data, the policy allows 1", document={"training": {"epochs": 3.0}},
        connects=False,
    ),
    "extra-epochs/steps": Case(
        "most_epochs = 1.0", "passes over the data, the policy allows 1",
        document={"training": {"steps": 40, "batch_size": 4}}, connects=False,
    ),
    "forbidden-block/of-the-client": Case(
        "", r"trains 'model\.layers\.0\.self_attn\.q_proj\.lora_A\.weight', a layer that may not get an adapter",
        twist=also_trains(LAYER.format(0)),
    ),
    "forbidden-block/policy": Case(
        'adapter_layers = "3:8"', "'model.layers.2.self_attn.q_proj.lora_[AB].weight', a layer that may not get",
    ),
    "forbidden-block/own": Case(
        'adapter_layers = "2:6"', "would train an adapter in layer [0167], which the policy forbids",
    ),
    "forbidden-block/head": Case(
        "", "trains 'lm_head.weight', which is not in its layers", twist=also_trains("lm_head.weight")
    ),
    "other-model/server": Case("", "wants another fingerprint than was asked for", twist=terms(fingerprint="ab" * 32)),
    "other-model/document": Case(
        f'models = ["{"ab" * 32}"]', "is not among those that the policy names", connects=False
    ),
    "protocol-downgrade": Case(
        f"protocol = {PROTOCOL}", f"speaks protocol {PROTOCOL - 1}, the policy wants {PROTOCOL}",
        twist=lambda welcome: msgspec.structs.replace(welcome, protocol=PROTOCOL - 1),
    ),
    "protocol-unknown": Case(
        "protocol = 2", "speaks protocol 9", twist=lambda welcome: msgspec.structs.replace(welcome, protocol=9)
    ),
    "debug-logging": Case(
        "debug = false", "writes contents into its logs, which the policy forbids", twist=terms(logs="debug")
    ),
}  # fmt: skip


class Trap:
    """A server that answers a hello as a twist makes it, and knows all that has reached it."""

    def __init__(self, server: SpanServer) -> None:
        self.server, self.twist = server, honest  # type: SpanServer, Twist
        self.headers: list[Header] = []

    def connect(self, owner: Identity) -> Any:
        trap, inner = self, self.server.connect(owner)

        class Line:
            def __getattr__(self, name: str) -> Any:
                return getattr(inner, name)

            def expect(self, header: Header) -> None:
                trap.headers.append(header)  # before a byte of a body is read
                inner.expect(header)

            def __call__(self, message: Message) -> Message:
                answer = inner(message)
                return Message(trap.twist(answer.meta)) if isinstance(answer.meta, Welcome) else answer

        return Line()

    def forget(self, twist: Twist) -> None:
        self.twist = twist
        self.headers.clear()

    def tensors(self) -> int:
        return sum(len(header.tensors) for header in self.headers)


@pytest.fixture(scope="module")
def trap() -> Iterator[Trap]:
    stage = Stage.load(str(MODEL_DIR), U_SHAPED, "server", "causal-lm", torch.float32)
    server = SpanServer(stage, lora=Document.of({"model": "x", "adapter": ADAPTER}, Path()).run.adapter)
    yield Trap(server)
    server.close()


@dataclass
class Line:
    """A client's way to the trap, and what it said on it."""

    address: str
    proxy: FaultProxy

    def sent(self) -> list[Header]:
        """The headers of all messages that were sent in the clear."""
        found, data, at = [], self.proxy.captured, 0
        while (at := data.find(b"NRN\x02", at)) >= 0:
            length = PREFIX.unpack_from(data, at)[2]
            start = at + PREFIX.size
            found.append(msgspec.json.decode(data[start : start + length], type=Header))
            at = start + length
        return found


@contextmanager
def line(trap: Trap, twist: Twist, credential: Any) -> Iterator[Line]:
    trap.forget(twist)
    with (
        GrpcServer("127.0.0.1:0", credential, trap.connect) as server,
        FaultProxy(f"127.0.0.1:{server.port}", capture=True) as proxy,
    ):
        yield Line(proxy.address, proxy)


def values(tmp_path: Path, address: str, changes: dict[str, Any], keys: Path | None = None) -> dict[str, Any]:
    (tmp_path / "notes.txt").write_text("".join(f"Patient {i} was seen today, and is well.\n" for i in range(16)))
    return {
        "model": "embedded", "plan": U_SHAPED, "links": {"server": address}, "adapter": ADAPTER, "noise": NOISE,
        "data": {"path": "notes.txt", "max_length": 16}, "training": {"steps": 2, "batch_size": 4},
        "keys": {"dir": str(keys or "keys")},
    } | changes  # fmt: skip


@pytest.fixture
def policy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Path]:
    def write(lines: str, *, section: bool = True) -> Path:
        place = tmp_path / "policy.toml"
        place.write_text(f"[policy]\n{lines}\n" if section else lines)
        monkeypatch.setenv("NOREN_POLICY", str(place))
        return place

    return write


def judge(way: Line, trap: Trap, connects: bool) -> int:
    """Check that no byte of a tensor was sent, and at most words; returns how many bytes there were in all."""
    sent = way.sent()
    assert sum(entry.nbytes for header in sent for entry in header.tensors) == 0
    assert trap.tensors() == 0
    assert [header.kind for header in sent if header.kind != "close"] == (["hello"] if connects else [])
    assert bool(way.proxy.connections) == connects
    return way.proxy.bytes_up


@pytest.mark.parametrize("name", CASES)
def test_T14_refused_before_a_tensor_leaves(name: str, trap: Trap, policy: Callable[..., Path], tmp_path: Path) -> None:
    """In the clear, all that crosses is seen: at most a hello and a goodbye, and no byte of a tensor."""
    case = CASES[name]
    policy(case.policy)
    with line(trap, case.twist, Insecure()) as way:
        made = Document.of(values(tmp_path, way.address, case.document), tmp_path)
        with pytest.raises(PolicyRefused, match=case.words) as refusal:
            train(made, insecure=True)
        crossed = judge(way, trap, case.connects)
        print(f"[T14] {name}: {crossed} bytes up, 0 of tensors: {refusal.value}")


def test_T14_what_the_policy_allows_is_sent(trap: Trap, policy: Callable[..., Path], tmp_path: Path) -> None:
    """The recording sees tensors, and a policy that is kept refuses nothing."""
    policy(
        "first_layers = 2\nlast_layers = 2\nleast_noise = 0.5\nmost_clip = 50.0\nmost_epochs = 1.0\n"
        'adapter_layers = "0:8"\nmost_vectors = 100000\nprotocol = 2'
    )
    with line(trap, honest, Insecure()) as way:
        done = train(Document.of(values(tmp_path, way.address, {}), tmp_path), insecure=True)
        assert done.outcome.step == 2
        sent = way.sent()
        payload = sum(entry.nbytes for header in sent for entry in header.tensors)
        assert [header.kind for header in sent] == [header.kind for header in trap.headers]
        assert {"hello", "forward", "backward"} <= {header.kind for header in sent}
        assert 100_000 < payload < way.proxy.bytes_up < payload * 1.2
        with pytest.raises(AssertionError):
            judge(way, trap, True)


def test_T14_the_message_beyond_the_budget_is_not_sent(trap: Trap, policy: Callable[..., Path], tmp_path: Path) -> None:
    """In the middle of a run: what would be too many vectors stays here, and so does all that follows."""
    policy("most_vectors = 300")
    with line(trap, honest, Insecure()) as way:
        made = Document.of(values(tmp_path, way.address, {"training": {"steps": 9, "batch_size": 4}}), tmp_path)
        with pytest.raises(PolicyRefused, match=r"\d+ vectors would have left, and the policy's budget is 300") as told:
            train(made, insecure=True)
        vectors = sum(entry.shape[0] for header in way.sent() for entry in header.tensors)
        wanted = int(str(told.value).split()[0])
        print(f"[T14] budget 300: {vectors} vectors left, {wanted} would have")
        assert 0 < vectors <= 300 < wanted and len(trap.headers) > 2


def test_T14_a_server_that_changes_its_mind(trap: Trap, policy: Callable[..., Path], tmp_path: Path) -> None:
    """It is judged anew at every connection: after a broken line it says that it logs contents, and gets no more."""
    policy("")
    with line(trap, honest, Insecure()) as way:
        made = Document.of(values(tmp_path, way.address, {}), tmp_path)
        client = Client(made, insecure=True)
        ids = torch.randint(3, 128, (1, 7), generator=torch.Generator().manual_seed(4))
        client.model(ids)
        before = trap.tensors()
        trap.twist = terms(logs="debug")
        way.proxy.reset()
        with pytest.raises(PolicyRefused, match="which the policy forbids"):
            client.model(ids)
        assert trap.tensors() == before > 0 and way.proxy.connections == 2
        client.link.close()


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.connects])
def test_T14_refused_over_mutual_tls(
    name: str, trap: Trap, policy: Callable[..., Path], keys: Path, tmp_path: Path
) -> None:
    case = CASES[name]
    policy(case.policy)
    with line(trap, case.twist, credentials(keys, "server")) as way:
        made = Document.of(values(tmp_path, way.address, case.document, keys), tmp_path)
        with pytest.raises(PolicyRefused, match=case.words):
            Client(made)
        assert {header.kind for header in trap.headers} <= {"hello", "close"} and trap.tensors() == 0
        assert way.proxy.bytes_up < 9_000  # a handshake and a hello; the first batch alone is 40 kB
        deadline = time.monotonic() + 5
        while way.proxy.open:  # what was refused does not stay connected
            assert time.monotonic() < deadline
            time.sleep(0.01)


register()


@pytest.mark.parametrize("as_json", [False, True], ids=["words", "json"])
def test_T14_the_command_line_says_so(
    as_json: bool, trap: Trap, policy: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`noren train` ends with one sentence and exit code 5."""
    place = policy("debug = false")
    with line(trap, terms(logs="debug"), Insecure()) as way:
        made = Document.of(values(tmp_path, way.address, {}), tmp_path)
        (tmp_path / "run.toml").write_text(made.to_toml())
        words = ["train", str(tmp_path / "run.toml"), "--insecure", *["--json"] * as_json]
        monkeypatch.setattr("sys.argv", ["noren", *words])
        result = CliRunner().invoke(app, words)
        judge(way, trap, connects=True)
    assert result.exit_code == 5, result.output
    sentence = f"'server' writes contents into its logs, which the policy forbids (debug in {place})"
    if as_json:
        assert json.loads(result.stderr) == {"error": "PolicyRefused", "message": sentence}
    else:
        assert result.stderr.split(maxsplit=1)[1].strip() == sentence
    assert not result.stdout.strip()


WRONG = {
    "unknown": ("least_nois = 0.5", "unknown field `least_nois`"),
    "beside": ("least_noise = 0.5\n[policy]\ndebug = true", "least_noise"),
    "type": ('[policy]\nleast_noise = "much"', "least_noise"),
    "negative": ("[policy]\nmost_vectors = -1", "most_vectors"),
    "nan": ("[policy]\nleast_noise = nan", "least_noise"),
    "infinite": ("[policy]\nmost_clip = inf", "most_clip"),
    "layers": ('[policy]\nadapter_layers = "all"', "adapter_layers"),
    "no toml": ("[policy", "is not a policy"),
    "no section": ("policy = 3", "is not a policy"),
    "no text": ("\u00e9", "is not a policy"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_policy_that_cannot_be_read_stops_everything(name: str, policy: Callable[..., Path]) -> None:
    """A line that nobody understands must not become a line that forbids nothing."""
    text, words = WRONG[name]
    place = policy(text, section=False)
    if name == "no text":
        place.write_bytes(b"\xff\xfe[policy]")
    with pytest.raises(ConfigError, match=words) as told:
        read_policy()
    assert str(place) in str(told.value)


def test_where_the_policy_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the file that is named, which must be there; else in the user's own folder, where it need not be."""
    monkeypatch.setenv("NOREN_POLICY", str(tmp_path / "none.toml"))
    with pytest.raises(ConfigError, match=r"none\.toml: no such policy file"):
        read_policy()
    monkeypatch.delenv("NOREN_POLICY")
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    assert read_policy() == Policy()
    (tmp_path / "noren").mkdir()
    (tmp_path / "noren" / "policy.toml").write_text("least_noise = 0.25\n")
    assert read_policy() == Policy(least_noise=0.25)


def test_a_policy_that_is_missing_is_wrong_input_to_a_command(
    trap: Trap, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NOREN_POLICY", str(tmp_path / "none.toml"))
    with line(trap, honest, Insecure()) as way:
        (tmp_path / "run.toml").write_text(Document.of(values(tmp_path, way.address, {}), tmp_path).to_toml())
        words = ["train", str(tmp_path / "run.toml"), "--insecure"]
        result = CliRunner().invoke(app, words)
        assert result.exit_code == 2 and "no such policy file" in result.stderr.replace("\n", " ")
        judge(way, trap, connects=False)


def test_a_policy_that_became_stricter_does_not_end_a_run(
    trap: Trap, policy: Callable[..., Path], tmp_path: Path
) -> None:
    """What is refused when a run is resumed can be resumed once the policy allows it."""
    trap.forget(honest)
    made = Document.of(values(tmp_path, "127.0.0.1:1", {"name": "kept"}), tmp_path)
    owner = Identity("client", "client", "noren")
    first = trap.connect(owner)
    token = Client(made, first, policy=Policy()).welcome.incarnation
    first.disconnect()
    policy('adapter_layers = "2:6"')
    with pytest.raises(PolicyRefused, match="would train an adapter in layer 0"):
        Client(made, trap.connect(owner), resume=token)
    again = Client(made, trap.connect(owner), policy=Policy(), resume=token)
    assert again.welcome.incarnation == token
    again.close()
