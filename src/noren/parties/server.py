"""A party that holds a middle (or last) span and answers its clients: a server, or an edge that forwards to the next.

One frozen base serves all clients. Each client's run has an adapter and an optimiser of its own; its messages are told
apart by the owner that the transport names, never by a field of a message.
"""

from __future__ import annotations

import itertools
import threading
import time
import uuid
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

import msgspec
import torch
from torch import Tensor

from noren.adapters.lora import Lora
from noren.errors import ConfigError, HandshakeRefused, OverBudget, PeerError, ProtocolError, SessionLost
from noren.inference.sessions import Sessions
from noren.partition.stage import Frame, Stage
from noren.training.span_trainer import SpanTrainer
from noren.types import (
    PROTOCOL,
    Backward,
    Close,
    Done,
    Forward,
    Gradient,
    Handler,
    Hello,
    Hidden,
    Message,
    Pull,
    Push,
    State,
    Step,
    Update,
    Welcome,
)


class Limits(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What one owner may make this party hold, and for how long (`[serve]` in a run document)."""

    cache_bytes: int = 2 << 30  # keys and values of all its sessions
    graph_bytes: int = 4 << 30  # activations kept for backward passes
    runs: int = 4  # adapters held at once
    session_seconds: float = 600.0  # an unused session ends after this
    grace_seconds: float = 30.0  # sessions and kept activations of a client whose connection has ended
    run_seconds: float = 3600.0  # a run whose client is gone ends after this

    def __post_init__(self) -> None:
        for name in self.__struct_fields__:
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be above 0")


Following = Callable[[Callable[[], Message], Callable[[Message], Iterable[Message]]], Handler]


@dataclass
class Run:
    """One client's run here: its adapter and optimiser, its line to the next party, its open connections."""

    trainer: SpanTrainer
    hello: Hello
    incarnation: str
    following: Handler | None = None
    next_incarnation: str = ""
    connections: int = 0
    left: float = 0.0
    closed: bool = False
    lock: threading.Lock = field(default_factory=threading.Lock)


class SpanServer:
    """A stage at work. `connect` gives the Handler for one connection of one owner.

    `following(greet, greeted)` makes the line to the next party of the chain for one client's run, as a GrpcLink takes
    the two (None: this party is the last one).
    """

    def __init__(
        self,
        stage: Stage,
        *,
        lora: Lora | None = None,
        limits: Limits | None = None,
        following: Following | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.stage, self.lora, self.limits = stage, lora, limits or Limits()
        self.sessions = Sessions(
            stage, bytes_per_owner=self.limits.cache_bytes, seconds=self.limits.session_seconds, clock=clock
        )
        self.lock = threading.Lock()  # one computation at a time: adapters are switched in a shared stage
        self._following, self._clock = following, clock
        self._runs: dict[tuple[str, str], Run] = {}
        self._numbers = itertools.count(1)

    def connect(self, owner: str) -> Connection:
        """Return the Handler for a new connection of `owner`, as the transport has identified it."""
        return Connection(self, owner)

    def expire(self) -> None:
        """End sessions and runs whose clients have gone."""
        with self.lock:
            self.sessions.expire()
            now = self._clock()
            for key, run in [(k, run) for k, run in self._runs.items() if not run.connections]:
                if run.left < now - self.limits.grace_seconds:
                    self.sessions.end(*key)
                    run.trainer.forget_graphs()
                if run.left < now - self.limits.run_seconds:
                    self._drop(key)

    def open_run(self, owner: str, hello: Hello) -> Run:
        """Return the owner's run of that name, new or as it was left, with one more connection (see `release`).

        Raises HandshakeRefused or OverBudget.
        """
        self._check(hello)
        self.expire()
        with self.lock:
            key = (owner, hello.run)
            if (run := self._runs.get(key)) is not None:
                if run.hello != hello:
                    changed = [k for k in hello.__struct_fields__ if getattr(hello, k) != getattr(run.hello, k)]
                    raise HandshakeRefused(
                        f"run {hello.run!r} was begun with another {' and '.join(changed)}; give the run another name"
                    )
                run.connections += 1
                return run
            if sum(k[0] == owner for k in self._runs) >= self.limits.runs:
                raise OverBudget(f"{owner} has {self.limits.runs} runs here already, which is the limit; close one")
            lora = self.lora if hello.lora else None
            name = f"run{next(self._numbers)}"
            try:
                trainer = SpanTrainer(self.stage, lora, name, hello.seed, self.limits.graph_bytes)
            except ConfigError as error:
                raise HandshakeRefused(f"{self.stage.party!r} cannot make this adapter: {error}") from error
            run = Run(trainer, hello, uuid.uuid4().hex, connections=1, left=self._clock())
            if self._following is not None:
                onward = Message(_onward(owner, hello))
                run.following = self._following(lambda: onward, lambda welcome: _same_state(run, welcome))
            self._runs[key] = run
            return run

    def close_run(self, owner: str, name: str) -> None:
        """End a run and all that is held for it."""
        with self.lock:
            self._drop((owner, name))

    def _drop(self, key: tuple[str, str]) -> None:
        if (run := self._runs.pop(key, None)) is not None:
            run.closed = True
            run.trainer.close()
            self.sessions.end(*key)
            if isinstance(run.following, _Closable):
                run.following.close()

    def release(self, run: Run) -> None:
        """A connection of the run has ended."""
        with self.lock:
            run.connections -= 1
            run.left = self._clock()

    def _check(self, hello: Hello) -> None:
        own = {
            "protocol version": (PROTOCOL, hello.protocol),
            "model fingerprint": (self.stage.fingerprint, hello.fingerprint),
            "plan": (self.stage.plan.lines(), hello.plan),
            "task": (self.stage.task, hello.task),
            "dtype": (dtype_name(self.stage.dtype), hello.dtype),
        }
        if hello.lora:
            own["adapter settings"] = (self.lora.canonical() if self.lora else "none", hello.lora)
        for what, (mine, theirs) in own.items():
            if mine != theirs:
                raise HandshakeRefused(
                    f"{what} differs: {self.stage.party!r} has {mine}, the client has {theirs}; "
                    "give both the same run document and model"
                )


@runtime_checkable
class _Closable(Protocol):
    def close(self) -> None: ...


class Connection:
    """The Handler of one connection: the first message must be a Hello, and the owner is fixed."""

    def __init__(self, server: SpanServer, owner: str) -> None:
        self._server, self._owner = server, owner
        self._run: Run | None = None
        self._name = ""
        self._gone = False
        self._door = threading.Lock()  # between the end of the connection and a hello under way

    def __call__(self, message: Message) -> Message:
        """Answer one message. Raises PeerError."""
        meta = message.meta
        if isinstance(meta, Hello):
            return self._hello(meta)
        if self._run is None:
            raise ProtocolError(f"{message.kind!r} before 'hello'")
        run = self._run
        with run.lock:
            if run.closed:
                self._leave()
                raise SessionLost("this run was closed by another connection of its owner")
            match meta:
                case Forward():
                    return self._forward(run, meta, message)
                case Backward():
                    return self._backward(run, meta, message)
                case Step():
                    return self._step(run, meta.update)
                case Pull():
                    return self._pull(run, message)
                case Push():
                    return self._push(run, meta, message)
                case Close():
                    return self._close(run, meta, message)
        raise ProtocolError(f"a {message.kind!r} is no request")

    def disconnect(self) -> None:
        """The connection has ended; its run is kept for a while, for a client that comes back."""
        with self._door:
            self._gone = True
            self._leave()

    def _leave(self) -> None:
        if self._run is not None:
            self._server.release(self._run)
            self._run = None

    def _hello(self, hello: Hello) -> Message:
        run = self._server.open_run(self._owner, hello)
        entered = False
        try:
            trainable, incarnation = run.trainer.trainable, run.incarnation
            if run.following is not None:
                further = run.following(Message(_onward(self._owner, hello))).meta
                if not isinstance(further, Welcome):
                    raise ProtocolError("the next party answered a hello with something else")
                trainable += further.trainable
                run.next_incarnation = further.incarnation
                incarnation += further.incarnation
            with self._door:
                self._leave()
                if self._gone:
                    raise ProtocolError("the connection ended during its hello")
                self._run, self._name, entered = run, hello.run, True
        finally:
            if not entered:
                self._server.release(run)
        party, step = self._server.stage.party, run.trainer.step
        return Message(Welcome(party=party, trainable=trainable, step=step, incarnation=incarnation))

    def _forward(self, run: Run, meta: Forward, message: Message) -> Message:
        server = self._server
        hidden = self._tensor(message, "hidden", server.stage.hidden_size)
        with server.lock:
            self._end(run, meta.ended)
            if meta.update is not None:
                run.trainer.update(meta.update)
            keep = meta.keep if run.following is None else 0
            frame = Frame(hidden, meta.lengths, meta.padding, meta.positions, keep)
            if meta.train:
                out = run.trainer.forward(meta.session, frame, dropout=meta.dropout)
            elif meta.session and server.stage.causal:
                run.trainer.use(dropout=False)
                out = server.sessions.step((self._owner, self._name, meta.session), frame, meta.start, meta.rows)
            else:
                run.trainer.use(dropout=False)
                with torch.inference_mode():
                    out = server.stage(frame.padded(), frame.real, positions=frame.positions, keep=keep)
        if run.following is not None:
            return run.following(Message(meta, {"hidden": frame.packed(out)}))
        if out.dim() == 2:
            return Message(Hidden(per_sequence=True), {"hidden": out})
        return Message(Hidden(), {"hidden": frame.packed(out).contiguous()})

    def _backward(self, run: Run, meta: Backward, message: Message) -> Message:
        if (answer := run.trainer.answered(meta.session)) is not None:
            return Message(Gradient(square_norm=answer[1]), {"gradient": answer[0]})
        gradient = self._tensor(message, "gradient", None)
        further = 0.0
        if run.following is not None:
            reply = run.following(message)
            if not isinstance(reply.meta, Gradient):
                raise ProtocolError("the next party answered a backward with something else")
            gradient, further = reply.tensors["gradient"], reply.meta.square_norm
        with self._server.lock:
            if meta.discard:
                run.trainer.discard()
            out = run.trainer.backward(meta.session, gradient)
            norm = run.trainer.square_norm() + further
            run.trainer.keep_answer(meta.session, out, norm)
        return Message(Gradient(square_norm=norm), {"gradient": out})

    def _step(self, run: Run, update: Update) -> Message:
        with self._server.lock:
            run.trainer.update(update)
        if run.following is not None:
            run.following(Message(Step(update=update)))
        return Message(Done(step=run.trainer.step))

    def _pull(self, run: Run, message: Message) -> Message:
        assert isinstance(message.meta, Pull)
        with self._server.lock:
            tensors = run.trainer.state(optimizer=message.meta.optimizer)
        if run.following is not None:
            further = run.following(message).tensors
            if twice := tensors.keys() & further.keys():
                raise ProtocolError(f"the next party answers for {min(twice)!r}, which is not its own")
            tensors |= further
        return Message(State(step=run.trainer.step), tensors)

    def _push(self, run: Run, meta: Push, message: Message) -> Message:
        with self._server.lock:
            run.trainer.load(dict(message.tensors), meta.step)
        if run.following is not None:
            run.following(message)
        return Message(Done(step=meta.step))

    def _close(self, run: Run, meta: Close, message: Message) -> Message:
        if run.following is not None:
            run.following(message)
        if meta.session is not None:
            with self._server.lock:
                self._end(run, [meta.session])
        else:
            self._server.close_run(self._owner, self._name)
            self._run = None
        return Message(Done(step=run.trainer.step))

    def _end(self, run: Run, ended: list[str]) -> None:
        for session in ended:
            self._server.sessions.end(self._owner, self._name, session)
            run.trainer.forget(session)

    def _tensor(self, message: Message, name: str, width: int | None) -> Tensor:
        if set(message.tensors) != {name}:
            raise ProtocolError(
                f"a {message.kind!r} carries exactly one tensor, {name!r}; got {sorted(message.tensors)}"
            )
        tensor = message.tensors[name]
        stage = self._server.stage
        if tensor.dim() != 2 or tensor.dtype != stage.dtype or width not in (None, tensor.shape[1]):
            raise ProtocolError(
                f"{name!r} must be [tokens, {width or 'd'}] of {dtype_name(stage.dtype)}, "
                f"got {list(tensor.shape)} of {dtype_name(tensor.dtype)}"
            )
        if not bool(torch.isfinite(tensor).all()):
            raise PeerError(f"{name!r} holds values that are not finite; lower the learning rate or use fp32")
        return tensor.to(next(stage.model.parameters()).device)


def _onward(owner: str, hello: Hello) -> Hello:
    """The hello for the next party, to which this one is the owner of all its clients' runs: it tells them apart."""
    return msgspec.structs.replace(hello, run=f"{owner}/{hello.run}")


def _same_state(run: Run, welcome: Message) -> tuple[Message, ...]:
    """Check that the next party still holds what this run built on, after a new connection to it."""
    assert isinstance(welcome.meta, Welcome)
    if run.next_incarnation and welcome.meta.incarnation != run.next_incarnation:
        raise SessionLost(f"the next party, {welcome.meta.party!r}, was restarted and lost this run")
    return ()


def dtype_name(dtype: torch.dtype) -> str:
    """Return a dtype's name without the prefix, e.g. "bfloat16"."""
    return str(dtype).removeprefix("torch.")
