"""The frames of a real training run over gRPC and mutual TLS, recorded; and lines on which any bytes can be sent."""

from __future__ import annotations

import queue
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import msgspec
import pytest
import torch

from conftest import U_SHAPED, credentials
from noren.adapters.lora import Lora
from noren.config import Document
from noren.parties.client import Client
from noren.parties.server import SpanServer
from noren.partition.stage import Stage
from noren.types import Hello, Message, Meta, Welcome
from noren.wire import grpc_link
from noren.wire.envelope import Packed, decode, pack, reopen
from noren.wire.grpc_link import KEY_HEADER, METHOD, GrpcLink
from noren.wire.grpc_server import GrpcServer
from noren.wire.journal import Journal
from noren.wire.seal import Seal, new_key
from step_tape import Bytes, Snapshot

ADAPTER = {"r": 2, "alpha": 4.0, "targets": ["q_proj", "v_proj"]}
Held = tuple[dict[tuple[str, str], Snapshot], dict[str, tuple[bytes, bytes | None]]]


@dataclass(frozen=True)
class Captured:
    """One message as it left: the key of its connection, and its frames."""

    key: bytes
    request: int
    packed: Packed
    frames: list[bytes]

    @property
    def meta(self) -> Meta:
        return reopen(*plain(self.packed)).meta

    @property
    def kind(self) -> str:
        return str(self.meta.__struct_config__.tag)


def plain(packed: Packed) -> Bytes:
    return packed.header, b"".join(packed.bodies)


class Tap:
    """Records all frames, up and down, as they are made."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.up: list[Captured] = []
        self.down: list[Bytes] = []
        self.keys: list[bytes] = []
        frames = Packed.frames

        def tapped(packed: Packed, request: int, seal: Seal) -> Iterator[bytes]:
            made, key = list(frames(packed, request, seal)), seal._key.key
            if key in self.keys and seal._out == b"down":
                self.down.append(plain(packed))
            elif key in self.keys:
                self.up.append(Captured(key, request, packed, made))
            return iter(made)

        def drawn() -> bytes:
            self.keys.append(new_key())
            return self.keys[-1]

        monkeypatch.setattr(Packed, "frames", tapped)
        monkeypatch.setattr(grpc_link, "new_key", drawn)


class Line:
    """A connection on which any bytes can be sent, under a certificate."""

    def __init__(self, place: Place, name: str) -> None:
        self._channel = grpc.secure_channel(f"127.0.0.1:{place.port}", credentials(place.keys, name).client())
        self._frames: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self.key, self._request = new_key(), 0
        self._seal = Seal(self.key, client=True)
        self._stream: Any = self._channel.stream_stream(METHOD)(
            iter(self._frames.get, None), metadata=((KEY_HEADER, self.key),), timeout=20
        )

    def ask(self, message: Message) -> Message:
        """Send a message that this line seals itself."""
        self._request += 1
        for frame in pack(message).frames(self._request, self._seal):
            self._frames.put(frame)
        return decode([next(self._stream)], self._seal)

    def refused(self, frames: list[bytes]) -> str:
        """Send bytes and the end of the stream; return what the server has against them. Fails if it answers."""
        return refused(self._frames, self._stream, frames)

    def close(self) -> None:
        self._stream.cancel()
        self._channel.close()


def refused(sent: Any, stream: Any, frames: list[bytes]) -> str:
    for frame in frames:
        sent.put(frame)
    sent.put(None)
    with pytest.raises(grpc.RpcError) as caught:
        answers = list(stream)
        raise AssertionError(f"{len(answers)} frames of an answer to what was captured")
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT, caught.value
    return str(caught.value.details())


class Place:
    """A server with a journal, and a client in training whose line is tapped."""

    def __init__(self, folder: Path, keys: Path, tmp_path: Path, tap: Tap) -> None:
        self.keys, self.tap, self.journal = keys, tap, Journal(tmp_path / "journal")
        stage = Stage.load(folder, U_SHAPED, "server", "causal-lm")
        self.server = SpanServer(stage, lora=Lora(**ADAPTER), journal=self.journal)  # type: ignore[arg-type]
        self._grpc = GrpcServer("127.0.0.1:0", credentials(keys, "server"), self.server.connect).start()
        self.port = self._grpc.port
        values = {"model": str(folder), "plan": U_SHAPED, "keys": {"dir": str(keys)}, "adapter": ADAPTER}
        self.client = Client(Document.of(values | {"links": {"server": f"127.0.0.1:{self.port}"}}, tmp_path))
        trained = [p for p in self.client.model.parameters() if p.requires_grad]
        self._optimizer = torch.optim.AdamW(trained, lr=1e-2)
        self._random = torch.Generator().manual_seed(9)

    @property
    def link(self) -> GrpcLink:
        assert isinstance(self.client.link, GrpcLink)
        return self.client.link

    def train(self, steps: int = 1) -> list[Captured]:
        """Train, and stop before the last step's update leaves; returns what left."""
        before = len(self.tap.up)
        for _ in range(steps):
            self._optimizer.zero_grad()
            ids = torch.randint(3, 128, (2, 5), generator=self._random)
            self.client.model(input_ids=ids, labels=ids).loss.backward()
            self._optimizer.step()
        return self.tap.up[before:]

    def held(self) -> Held:
        """All that the server holds for anybody, in memory and in its journal."""
        kept = {}
        for run in self.journal.runs():
            for key in self.journal.keys(run):
                record = self.journal.read(run, key)
                assert record is not None
                kept[f"{run} {key}"] = (record.words, record.body)
        return {name: Snapshot.of(run) for name, run in self.server.runs.items()}, kept

    def hello(self, line: Line, *, run: str = "") -> None:
        """Open a run on a line: the client's own again, or one of another name."""
        first = next(c for c in self.tap.up if isinstance(c.meta, Hello)).meta
        assert isinstance(first, Hello)
        token = self.server.runs["client", first.run].begun.incarnation
        changed = {"run": run, "resume": ""} if run else {"resume": token}
        assert isinstance(line.ask(Message(msgspec.structs.replace(first, **changed))).meta, Welcome)

    def close(self) -> None:
        self.client.close()
        self._grpc.stop(grace=0)
        self.server.close()
        self.journal.close()
