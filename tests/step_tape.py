"""Undisturbed training runs of one remote stage, recorded: what was asked, what was answered, what state it led to."""

from __future__ import annotations

import copy
import hashlib
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from conftest import identity, tiny_llama
from noren.adapters.lora import Lora
from noren.errors import NorenError
from noren.parties.connection import Connection
from noren.parties.ledger import session_of
from noren.parties.runs import Run
from noren.parties.server import SpanServer
from noren.partition.stage import Stage
from noren.types import PROTOCOL, Backward, Forward, Hello, Message, Meta, Optimizer, Pull, Step, Terms, Update
from noren.wire.envelope import pack, reopen
from noren.wire.grpc_link import rounding_seed
from noren.wire.grpc_server import failure, pack_answer
from noren.wire.settings import codecs_for

WIDTH, REQUESTS, TAPES = 16, 48, 6
OWNER, RUN = "client", "run"
OPTIMIZERS = (
    Optimizer(name="adamw", lr=0.02, weight_decay=0.01),
    Optimizer(name="sgd", lr=0.1, momentum=0.9),
    Optimizer(name="adam", lr=0.01),
)
CODECS = (("raw", "raw"), ("raw", "int8"), ("fp16", "raw"))
Bytes = tuple[bytes, bytes]
"""A message as it crosses, without prefix and tag: header and body."""


def build_stages(folder: Path, plan: Sequence[str]) -> dict[str, Stage]:
    """Write a model of small layers to `folder`, one for each span of a plan; return the remote parties' stages."""
    model = tiny_llama(
        hidden_size=WIDTH, intermediate_size=16, num_hidden_layers=len(plan), num_attention_heads=2,
        num_key_value_heads=1, vocab_size=32,
    )  # fmt: skip
    model.save_pretrained(folder)
    names = {line.split()[0] for line in plan} - {"client"}
    return {name: Stage.load(folder, plan, name, "causal-lm") for name in names}


def as_bytes(message: Message, codecs: tuple[str, str]) -> Bytes:
    """What a client sends for a message."""
    seed = rounding_seed(message.meta.session, message.kind) if isinstance(message.meta, Backward) else None
    packed = pack(message, codecs_for(message.kind, *codecs), seed)
    return packed.header, b"".join(packed.bodies)


def ask(connection: Connection, request: Bytes) -> Bytes:
    """What a server sends for a request. Errors cross as messages."""
    message = reopen(*request)
    try:
        with torch.no_grad():
            answer = connection(message)
    except NorenError as error:
        answer = failure(error)
    packed = pack_answer(message, answer, connection.codecs)
    return packed.header, b"".join(packed.bodies)


def digest(tensors: dict[str, Tensor]) -> str:
    """SHA-256 of named tensors: equal if and only if they are bit for bit the same."""
    told = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        told.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        told.update(tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return told.hexdigest()


@dataclass(frozen=True)
class Snapshot:
    """What a server holds for a run: steps applied, adapter with moments, accumulated gradients."""

    step: int
    state: str
    gradients: str

    @classmethod
    def of(cls, run: Run) -> Snapshot:
        trainer = run.trainer
        return cls(trainer.step, digest(trainer.state(optimizer=True)), digest(trainer.gradients()))


@dataclass
class Tape:
    """A recorded run. `states[i]` is the server's before request i; `forwards[i]` the forward that request i needs."""

    hello: Hello
    lora: Lora
    codecs: tuple[str, str]
    metas: list[Meta] = field(default_factory=list)
    requests: list[Bytes] = field(default_factory=list)
    answers: list[Bytes] = field(default_factory=list)
    states: list[Snapshot] = field(default_factory=list)

    def forward_of(self, index: int) -> int:
        """The forward pass whose graph a backward needs."""
        return index - 1

    def computed(self, index: int) -> bool:
        """Whether a request is no more than a question, answered by the weights of the day."""
        meta = self.metas[index]
        return isinstance(meta, Forward) and not meta.train

    def trains(self, index: int) -> bool:
        """Whether a request counts once under a name of its own."""
        meta = self.metas[index]
        return isinstance(meta, Backward) or (isinstance(meta, Forward) and meta.train)

    def step_of(self, index: int) -> int:
        """The step towards which a training request goes."""
        meta = self.metas[index]
        assert isinstance(meta, Forward | Backward)
        return session_of(meta.session)[0]


class _Client:
    """Writes down what a client asks, in the order in which partition.remote and partition.steps would."""

    def __init__(self, seed: int, dropout: bool) -> None:
        self.random, self.torch = random.Random(seed), torch.Generator().manual_seed(seed)
        self.optimizer, self.dropout = OPTIMIZERS[seed % len(OPTIMIZERS)], dropout
        self.pending: Update | None = None
        self.applied = 0
        self.asked: list[Message] = []
        self.ended: list[str] = []

    def vectors(self, count: int) -> Tensor:
        return torch.randn(count, WIDTH, generator=self.torch)

    def forward(self, session: str, train: bool) -> int:
        """A forward pass, which takes along what waits; returns its tokens."""
        lengths = [self.random.randint(1, 3) for _ in range(self.random.randint(1, 2))]
        meta = Forward(
            session=session, start=0, lengths=lengths, padding="right", train=train, dropout=train and self.dropout,
            update=self.pending, ended=self.ended,
        )  # fmt: skip
        self.asked.append(Message(meta, {"hidden": self.vectors(sum(lengths))}))
        self.pending, self.ended = None, []
        return sum(lengths)

    def flush(self) -> None:
        """Send what waits on its own."""
        assert self.pending is not None
        self.asked.append(Message(Step(update=self.pending)))
        self.pending = None

    def step(self) -> None:
        """One optimiser step: one or two passes, now and then cleared and begun again; the update may wait."""
        step, number, done, cleared = self.applied + 1, 0, 0, False
        while done < self.random.randint(1, 2):
            tokens = self.forward(f"{step}.{number}", True)
            meta = Backward(session=f"{step}.{number}", discard=cleared)
            self.asked.append(Message(meta, {"gradient": self.vectors(tokens)}))
            number, done, cleared = number + 1, done + 1, False
            if number < 3 and self.random.random() < 0.25:  # gradients are cleared without a step
                done = 0
                cleared = True
        if self.random.random() < 0.3:
            self.ended = [f"{step}.{number - 1}"]
        self.pending = Update(step=step, scale=self.random.choice((1.0, 0.37)), optimizer=self.optimizer)
        self.applied = step
        self.on_its_own()

    def on_its_own(self) -> None:
        """Perhaps what waits does not wait for the next training pass."""
        way = self.random.random()
        if way < 0.3:
            self.flush()
        elif way < 0.5:
            self.forward("", False)


@cache
def tape(stage: Stage, seed: int) -> Tape:
    """Record the run of a seed."""
    lora = Lora(r=2, alpha=4, dropout=0.2 * (seed % 2), targets=["q_proj", "v_proj"])
    codecs = CODECS[seed // 2 % len(CODECS)]
    client = _Client(seed, dropout=bool(seed % 2))
    while len(client.asked) < REQUESTS:
        client.step()
    terms = Terms(
        fingerprint=stage.fingerprint, plan=stage.plan.lines(), task="causal-lm", dtype="float32",
        lora=lora.canonical(), seed=seed, activations=codecs[0], gradients=codecs[1],
    )  # fmt: skip
    made = Tape(Hello(protocol=PROTOCOL, run=RUN, terms=terms), lora, codecs)
    server = SpanServer(copy.deepcopy(stage), lora=lora)
    connection = server.connect(identity(OWNER))
    connection(Message(made.hello))
    run = server.runs[OWNER, RUN]
    made.states.append(Snapshot.of(run))
    for message in client.asked:
        made.metas.append(message.meta)
        made.requests.append(as_bytes(message, codecs))
        made.answers.append(ask(connection, made.requests[-1]))
        made.states.append(Snapshot.of(run))
        assert reopen(*made.answers[-1]).kind != "failure", made.answers[-1]
    server.close()
    return made


PULL = Message(Pull(optimizer=True))
