"""Frames for the tests of the decoder: one real message of every kind and codec, and mutants of them.

A mutant is either raw bytes, changed anywhere, or *resealed*: header and body were changed, then the prefix's lengths
and the tag put right, so that it gets past the first checks to those behind.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

import msgspec
import torch

from noren.errors import NorenError
from noren.types import (
    Backward,
    Close,
    Condition,
    Done,
    Failure,
    Forward,
    Gradient,
    Hello,
    Hidden,
    Message,
    Optimizer,
    Pull,
    Push,
    State,
    Status,
    Step,
    Terms,
    Update,
    Welcome,
)  # fmt: skip
from noren.wire.codecs import CODECS
from noren.wire.envelope import DTYPES, PREFIX, Expect, Incoming, pack
from noren.wire.schema import Schema, nothing_agreed
from noren.wire.seal import Seal

KEY = bytes(range(32))
WIDTH = 80
MOST = 2 << 20
EDGES = (0, 1, 2, 7, 8, 127, 255, 256, (1 << 15), (1 << 16) - 1, 1 << 20, (1 << 20) + 1, 1 << 24, (1 << 31) - 1,
         1 << 31, (1 << 32) - 1, 1 << 32, (1 << 47), (1 << 48) - 1, 1 << 48, (1 << 53) + 1, (1 << 63) - 1, 1 << 63,
         (1 << 64) - 1)  # fmt: skip
TOKENS = [
    *(str(edge).encode() for edge in (*EDGES, 1 << 64, 10**40)), b"-1", b"-0", b"1.0", b"1e3", b"1e308", b"1e999",
    b"-1e-999", b"NaN", b"Infinity", b"null", b"true", b"[]", b"{}", b'""', b'"0"', b"9" * 5000, b"[" * 3000,
    b'"../../etc/passwd"', b'"\\u0000"', b'"\\ud800"', b'"\xff"', b'"' + b"n" * 4000 + b'"', b"[" * 40 + b"]" * 40,
    *(f'"{name}"'.encode() for name in (*DTYPES, *CODECS, "float32", "f64", "O", "hidden", "gradient", "kind")),
    *(f'"{kind}"'.encode() for kind in ("hello", "welcome", "status", "condition", "forward", "backward", "step",
                                        "pull", "push", "state", "close", "done", "failure", "shell")),
]  # fmt: skip
TOKEN = re.compile(rb'"(?:[^"\\]|\\.)*"|-?[0-9][-+.0-9eE]*|true|false|null|[][{},:]')

TERMS = Terms(fingerprint="f" * 64, plan=["client 0:2", "server 2:6", "client 6:8"], task="causal-lm", dtype="float32",
              lora='{"rank":4}', seed=7)  # fmt: skip
UPDATE = Update(step=3, scale=0.5, optimizer=Optimizer(name="adamw", lr=1e-3))
ADAPTER = {"model.layers.2.q.lora_A": [4, 48], "model.layers.2.q.lora_B": [48, 4]}


def schema(codec: str = "raw", dtype: str = "float32") -> Schema:
    """What a run of these messages has agreed on."""
    return Schema(dtype, WIDTH, WIDTH, codec, codec, ADAPTER, tokens=4096)


def forward(tokens: int = 3, width: int = WIDTH, **more: Any) -> Message:
    fields = {"session": "3.0", "start": 0, "lengths": [tokens], "padding": "left"} | more
    return Message(Forward(**fields), {"hidden": torch.randn(tokens, width)})


def messages() -> Iterator[tuple[Message, str]]:
    """Real messages of all kinds, with the codec for their tensor; of hidden states one for each type and codec."""
    torch.manual_seed(6)
    adapter = {name: torch.randn(shape) for name, shape in ADAPTER.items()}
    moments = {f"optimizer/{name}/exp_avg": tensor for name, tensor in adapter.items()}
    steps = {f"optimizer/{name}/step": torch.tensor(3.0) for name in adapter}
    for meta in (
        Hello(protocol=2, run="r", terms=TERMS),
        Welcome(protocol=2, party="server", terms=TERMS, adapter=ADAPTER, step=3, incarnation="i"),
        Status(),
        Condition(party="server", version="1", protocol=2, model="f", plan=TERMS.plan, layers=["2:6"], draining=False,
                  uptime_seconds=1.5, connections=1, sessions=2, runs=1, cache_bytes=10, journal_bytes=9, rss_bytes=8),
        Step(update=UPDATE), Pull(optimizer=True), Close(session="3.0"), Close(), Done(step=3),
        Failure(code="denied", sentence="no", retry_after=0.5),
    ):  # fmt: skip
        yield Message(meta), "raw"
    yield Message(Push(step=3), adapter), "raw"
    yield Message(State(step=3), adapter | moments | steps), "raw"
    yield Message(Forward(session="s", start=9, lengths=[2, 0, 1], padding="right", rows=[1, 0, 2], keep=1, train=True,
                          update=UPDATE, ended=["a", "b"]), {"hidden": torch.randn(3, WIDTH)}), "raw"  # fmt: skip
    yield Message(Forward(session="s", start=0, lengths=[0], padding="left"), {"hidden": torch.randn(0, WIDTH)}), "raw"
    for codec in CODECS:
        for dtype in (torch.float32, torch.float16, torch.bfloat16):
            tensor = torch.randn(3, WIDTH).to(dtype)
            yield Message(forward().meta, {"hidden": tensor}), codec
            yield Message(Hidden(), {"hidden": tensor}), codec
        yield Message(Backward(session="3.0"), {"gradient": torch.randn(3, WIDTH)}), codec
        yield Message(Gradient(square_norm=2.5), {"gradient": torch.randn(3, WIDTH)}), codec


def corpus() -> list[tuple[bytes, bytes]]:
    """Header and body of each real message."""
    made = (pack(message, dict.fromkeys(message.tensors, codec)) for message, codec in messages())
    return [(packed.header, b"".join(packed.bodies)) for packed in made]


def sealed(
    header: bytes, body: bytes = b"", *, key: bytes = KEY, client: bool = True, tagged: int = 1, **prefix: Any
) -> bytes:
    """A frame with a right tag, but for what `prefix` (magic, version, length, request, size) says otherwise."""
    fields = {"magic": b"NRN", "version": 2, "length": len(header), "request": 1, "size": len(body)} | prefix
    made = PREFIX.pack(*fields.values()) + header + body
    tag = Seal(key, client=client).outgoing(tagged)
    tag.update(made)
    return made + tag.value()


def decoder(expect: Expect | None = None, most: int = MOST) -> Incoming:
    """What the server has when a message of a new connection begins to arrive."""
    return Incoming(Seal(KEY, client=False), expect, most)


class Mutants:
    """A seeded, endless series of frames that nobody should have sent."""

    def __init__(self, seed: int) -> None:
        self._chance = random.Random(seed)
        self._parts = corpus()
        self._whole = [sealed(*part) for part in self._parts]
        self._raw: list[Callable[[bytes], bytes]] = [self._flip, self._insert, self._cut, self._splice, self._prefix]
        self._header: list[Callable[[bytes], bytes]] = [self._token] * 4 + [self._flip, self._insert, self._cut]

    def frame(self) -> bytes:
        """The next mutant."""
        chance = self._chance
        if chance.random() < 0.3:
            frame = chance.choice(self._whole)
            for _ in range(chance.choice((1, 1, 1, 2, 5))):
                frame = chance.choice(self._raw)(frame)
            return frame
        header, body = chance.choice(self._parts)
        which = chance.random()
        if which < 0.4:
            for _ in range(chance.choice((1, 1, 2, 3))):
                header = chance.choice(self._header)(header)
        elif which < 0.75:
            header, body = self._entry(header, body)
        elif which < 0.8:
            body = chance.choice(self._parts)[1]
        for _ in range(chance.choice((0, 0, 1, 4))):
            body = chance.choice((self._flip, self._flip, self._flip, self._insert, self._cut))(body)
        return sealed(header, body) if chance.random() < 0.9 else sealed(header, body, size=chance.choice(EDGES))

    def _flip(self, data: bytes) -> bytes:
        changed = bytearray(data)
        for _ in range(self._chance.choice((1, 1, 3, 16)) if changed else 0):
            at = self._chance.randrange(len(changed))
            changed[at] = self._chance.choice((changed[at] ^ 1 << self._chance.randrange(8), 0, 127, 255))
        return bytes(changed)

    def _insert(self, data: bytes) -> bytes:
        at = self._chance.randint(0, len(data))
        return data[:at] + self._chance.randbytes(self._chance.choice((1, 1, 4, 16, 200))) + data[at:]

    def _cut(self, data: bytes) -> bytes:
        start, stop = sorted((self._chance.randint(0, len(data)), self._chance.randint(0, len(data))))
        return data[:start] + data[stop:] if self._chance.random() < 0.5 else data[:stop]

    def _splice(self, data: bytes) -> bytes:
        other = self._chance.choice(self._whole)
        return data[: self._chance.randint(0, len(data))] + other[self._chance.randint(0, len(other)) :]

    def _prefix(self, data: bytes) -> bytes:
        start, width = self._chance.choice(((0, 1), (3, 1), (4, 4), (8, 8), (16, 8)))
        value = self._chance.choice(EDGES) % (1 << 8 * width)
        return data[:start] + value.to_bytes(width, "little") + data[start + width :]

    def _token(self, header: bytes) -> bytes:
        """Put another token in the place of one, or drop it, say it twice, or exchange two."""
        spots = [match.span() for match in TOKEN.finditer(header)]
        if not spots:
            return header
        start, stop = self._chance.choice(spots)
        how = self._chance.random()
        if how < 0.6:
            return header[:start] + self._chance.choice(TOKENS) + header[stop:]
        if how < 0.7:
            return header[:start] + header[stop:]
        if how < 0.8:
            return header[:stop] + header[start:]
        other = self._chance.choice(spots)
        (first, end), (again, last) = sorted(((start, stop), other))
        return header[:first] + header[again:last] + header[end:again] + header[first:end] + header[last:]

    def _entry(self, header: bytes, body: bytes) -> tuple[bytes, bytes]:
        """Change type, shape or codec of one tensor, and let lengths and body agree with that."""
        said = msgspec.json.decode(header)
        if not said["tensors"]:
            return header, body
        chance, entry = self._chance, changed_entry(said, self._chance)
        dtype, codec = DTYPES[entry[1]], CODECS[entry[3]]
        with suppress(NorenError):
            most = codec.size(entry[2], dtype)
            entry[4] = most if codec.fixed else min(entry[4], most)
        if 0 <= (size := sum(entry[4] for entry in said["tensors"])) < 1 << 16:
            body = (body + bytes(max(0, size - len(body))))[:size]
            body = chance.randbytes(size) if chance.random() < 0.3 else body
        return msgspec.json.encode(said), body


def changed_entry(said: Any, chance: random.Random) -> list[Any]:
    """Change one entry of a header and return it."""
    entry: list[Any] = chance.choice(said["tensors"])
    what = chance.randrange(3)
    if what == 0:
        entry[1] = chance.choice(list(DTYPES))
    elif what == 1:
        entry[3] = chance.choice(list(CODECS))
    else:
        lengths = (*EDGES[:8], *EDGES[:8], *entry[2], 3, 65, 1 << 20)
        entry[2] = [chance.choice(lengths) for _ in range(chance.choice((0, 1, 2, 2, 2, 3, 8)))]
    return entry


def expectations() -> list[Expect | None]:
    """Judges of headers: none, nothing agreed, an agreed request for each codec, an agreed answer."""
    agreed: list[Expect | None] = [*[None] * 16, nothing_agreed]
    for codec in CODECS:
        agreed += [schema(codec).request, schema(codec).answer(forward())]
    return agreed
