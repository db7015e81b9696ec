"""Fixtures: a small random model on disk, and a client whose other parties answer over a link of either kind."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from noren.config import Document
from noren.parties.client import Client
from noren.parties.server import Limits, SpanServer
from noren.partition.stage import Stage
from noren.types import Handler, Message
from noren.wire.grpc_link import GrpcLink
from noren.wire.grpc_server import GrpcServer
from noren.wire.identity import Credentials, Identity, ensure
from noren.wire.local import LocalLink

torch.set_num_threads(1)
transformers.utils.logging.disable_progress_bar()

PLANS = {
    2: ["client :2", "server 2:"],
    3: ["client :2", "server 2:-2", "client -2:"],
    4: ["client :2", "edge 2:4", "server 4:-2", "client -2:"],
}
U_SHAPED = PLANS[3]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Verdicts on architectures are kept per test session, not in the user's cache."""
    monkeypatch.setenv("NOREN_CACHE", str(tmp_path_factory.getbasetemp() / "noren-cache"))


def tiny_llama(**more: Any) -> transformers.LlamaForCausalLM:
    """A random Llama of 8 layers whose weights are large enough for differences to show."""
    torch.manual_seed(0)
    settings = {
        "vocab_size": 128, "hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 8,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256, "pad_token_id": 0,
    }  # fmt: skip
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**(settings | more))).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model


@pytest.fixture(scope="session")
def llama_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llama")
    tiny_llama().save_pretrained(folder, max_shard_size="50KB")
    return folder


@pytest.fixture
def whole(llama_folder: Path) -> transformers.LlamaForCausalLM:
    """The same model in one piece, frozen as a client's is: torch picks its matmul by `requires_grad`, too."""
    return transformers.LlamaForCausalLM.from_pretrained(llama_folder).eval().requires_grad_(False)


@pytest.fixture(scope="session")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("keys") / "keys"
    for name, role in (("client", "client"), ("other", "client"), ("edge", "edge"), ("server", "server")):
        ensure(folder, name, role)  # type: ignore[arg-type]
    return folder


def credentials(keys: Path, name: str) -> Credentials:
    return Credentials(ca=keys / "ca.crt", certificate=keys / f"{name}.crt", key=keys / f"{name}.key")


class Parties:
    """The remote parties of a run, in this process, reached over `local` or `grpc` links."""

    def __init__(self, kind: str, keys: Path, stack: ExitStack) -> None:
        self.kind, self._keys, self._stack = kind, keys, stack
        self.servers: dict[str, SpanServer] = {}
        self.seen: list[Message] = []  # every message that reached the first remote party
        self.answers: list[Message] = []

    def client(self, model: Path | str, *, limits: Limits | None = None, **fields: Any) -> Client:
        """Start the remote parties of a run document, and return its client."""
        fields.setdefault("plan", U_SHAPED)
        document = Document.of({"model": str(model), "keys": {"dir": str(self._keys)}, **fields}, Path.cwd())
        run = document.run
        address, connect, following = "", None, None
        first = Stage.load(document.model, run.plan, "server", run.task, getattr(torch, run.dtype), run.base).plan
        for span in reversed(first.remote):
            stage = Stage.load(document.model, run.plan, span.party, run.task, getattr(torch, run.dtype), run.base)
            server = SpanServer(stage, lora=run.adapter, limits=limits, following=following)
            self.servers[span.party] = server
            connect = self._watched(server) if span is first.remote[0] else server.connect
            if self.kind == "grpc":
                port = self._stack.enter_context(
                    GrpcServer("127.0.0.1:0", credentials(self._keys, span.party), connect)
                ).port
                address = f"127.0.0.1:{port}"
                following = self._grpc_line(address, "edge")
            else:
                following = local_line(server.connect)
        if self.kind == "grpc":
            values = {"links": {first.remote[0].party: address}}
            document = Document.of(
                {"model": str(model), "keys": {"dir": str(self._keys)}, **fields, **values}, Path.cwd()
            )
            client = Client(document)
        else:
            assert connect is not None
            client = Client(document, connect(identity("client")))
        self._stack.callback(client.close)
        return client

    def _grpc_line(self, address: str, name: str) -> Callable[..., Handler]:
        return lambda greet, greeted, expect: GrpcLink(
            address, credentials(self._keys, name), greet=greet, greeted=greeted, expect=expect
        )

    def _watched(self, server: SpanServer) -> Callable[[str], Any]:
        parties = self

        class Watched:
            def __init__(self, owner: Identity) -> None:
                self._inner = server.connect(owner)

            def __getattr__(self, name: str) -> Any:
                return getattr(self._inner, name)

            def __call__(self, message: Message) -> Message:
                parties.seen.append(message)
                answer = self._inner(message)
                parties.answers.append(answer)
                return answer

            def disconnect(self) -> None:
                self._inner.disconnect()

        return Watched


def local_line(connect: Callable[[Identity], Any]) -> Callable[..., Handler]:
    return lambda greet, greeted, expect: LocalLink(connect(identity("edge", "edge")), expect=expect)


def identity(name: str, role: Any = "client") -> Identity:
    return Identity(name, role, "noren")


@pytest.fixture(params=["local", "grpc"])
def parties(request: pytest.FixtureRequest, keys: Path) -> Iterator[Parties]:
    with ExitStack() as stack:
        yield Parties(request.param, keys, stack)


@pytest.fixture
def local_parties(keys: Path) -> Iterator[Parties]:
    with ExitStack() as stack:
        yield Parties("local", keys, stack)


@pytest.fixture(scope="session")
def data_folder() -> Path:
    """A folder of outside data and weights, named by NOREN_DATA."""
    folder = os.environ.get("NOREN_DATA")
    if not folder:
        pytest.skip("NOREN_DATA names no folder of outside data and weights")
    return Path(folder)
