"""The Handler of one connection to a remote party: a hello, then the requests of one run."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, Protocol, TypeVar

import msgspec
import torch
from torch import Tensor

from noren.errors import HandshakeRefused, ProtocolError, SessionLost
from noren.inference.sessions import Sessions
from noren.parties.averages import Averages
from noren.parties.groups import group_of
from noren.parties.kept import as_kept, split_kept
from noren.parties.runs import Run, onward_hello
from noren.parties.stepping import Host as Training
from noren.parties.stepping import Stepping, marks
from noren.partition.stage import Frame
from noren.types import (
    KEPT,
    PROTOCOL,
    Average,
    Backward,
    Close,
    Condition,
    Done,
    Enter,
    Forward,
    Hello,
    Hidden,
    Leave,
    Message,
    Pull,
    Push,
    State,
    Status,
    Step,
    Terms,
    Welcome,
)
from noren.wire.envelope import Header
from noren.wire.identity import Identity
from noren.wire.schema import Schema, nothing_agreed

T = TypeVar("T")
ANONYMOUS = "anonymous"
"""Whoever connects in plain text, an edge too."""


class Host(Training, Protocol):
    """What a connection needs of the party that it leads to (see server.SpanServer)."""

    sessions: Sessions
    limits: Any

    def come(self) -> int:
        """Count a connection; returns its number."""

    def go(self) -> None:
        """Count a connection off."""

    def open_run(self, owner: str, hello: Hello, number: int, *, edge: bool) -> Run:
        """Open a run for the connection of that number; `release` it."""

    def release(self, run: Run) -> None:
        """A connection has ended."""

    def terms(self, asked: Terms) -> Terms:
        """The party's own terms."""

    def condition(self) -> Condition:
        """How the party is."""


class Connection:
    """The Handler of one connection: the first message must be a Hello, and the owner is fixed."""

    def __init__(self, host: Host, owner: Identity) -> None:
        self._host, self._owner = host, owner.name
        self._edge, self._anonymous = owner.role == "edge", owner.name == ANONYMOUS
        self._run: Run | None = None
        self._schema: Schema | None = None
        self._name = ""
        self._stepping: Stepping | None = None
        self._gone = False
        self._door = threading.Lock()  # between the end of the connection and a hello under way
        self.codecs = ("raw", "raw")
        self._number = host.come()

    @property
    def in_run(self) -> bool:
        """Whether a hello was accepted."""
        return self._run is not None

    def expect(self, header: Header) -> None:
        """Raise PeerError unless this header is one that was agreed."""
        schema = self._schema
        if schema is None or isinstance(header.meta, Hello | Status):
            nothing_agreed(header)
        else:
            schema.request(header)

    def __call__(self, message: Message) -> Message:
        """Answer one message. Raises PeerError."""
        meta = message.meta
        if isinstance(meta, Status):
            return Message(self._host.condition())
        if isinstance(meta, Hello):
            return self._hello(meta)
        if self._run is None:
            raise ProtocolError(f"{message.kind!r} before 'hello'")
        run, stepping = self._run, self._stepping
        assert stepping is not None
        with run.lock:
            if run.closed:
                self._leave()
                raise SessionLost("this run was closed by another connection of its owner")
            match meta:
                case Forward(train=True):
                    return stepping.forward(run, run.values(message, self._host.stage))
                case Forward():
                    return self._forward(run, meta, message)
                case Backward():
                    return stepping.backward(run, message)
                case Step():
                    return stepping.step(run, message)
                case Enter() | Leave():
                    return self._take_part(run, message)
                case Average():
                    return Averages(self._host, stepping)(run, message)
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
            if not self._gone:
                self._host.go()
            self._gone = True
            self._leave()

    def _leave(self) -> None:
        if self._run is not None:
            self._host.release(self._run)
            self._run = self._schema = None

    def _hello(self, hello: Hello) -> Message:
        """Enter a run.

        A first hello (without a resume token) begins its run anew, and one that came late would end what has been
        trained since. A copy cannot come: a stream keeps its order, and the seal takes each request once and on its
        own connection. But a hello can be overtaken: one that is being worked on here while its client, which has
        given up on that line, greets on the next. So connections are numbered as they come, and an older one does not
        begin a run anew that a later one has opened.
        """
        if hello.before and not (self._edge or self._anonymous):
            raise HandshakeRefused("only an edge has parties before it; connect as the client that you are")
        run = self._open(hello)
        entered = False
        try:
            known = run.begun.hello
            if (hello.own or known.own, hello.before) != (known.own, known.before):
                told = msgspec.structs.replace(known, own=hello.own or known.own, before=hello.before)
                run.begun = msgspec.structs.replace(run.begun, hello=told)
                run.ledger.begin(run.begun)
            incarnation = run.begun.incarnation
            if run.following is not None:
                further = self._hello_beyond(run)
                if run.begun.next_incarnation not in ("", further.incarnation):  # the next party lost this run
                    self._host.release(run)
                    run = self._open(msgspec.structs.replace(hello, resume=""))
                    further = self._hello_beyond(run)
                run.further = further.adapter
                if run.moving:
                    self._move_in(run, further)
                if run.begun.next_incarnation != further.incarnation:
                    run.begun = msgspec.structs.replace(run.begun, next_incarnation=further.incarnation)
                    run.ledger.begin(run.begun)
                incarnation = run.begun.incarnation + further.incarnation
            with self._door:
                self._leave()
                if self._gone:
                    raise ProtocolError("the connection ended during its hello")
                self._run, self._name, entered = run, hello.run, True
                self._stepping = Stepping(self._host, self._owner, hello.run)
                self._schema = run.schema(self._host.stage, self._host.limits.tokens)
                self.codecs = (hello.terms.activations, hello.terms.gradients)
        finally:
            if not entered:
                self._host.release(run)
        return Message(
            Welcome(
                protocol=PROTOCOL, party=self._host.stage.party, terms=self._host.terms(hello.terms),
                adapter=run.adapter, step=run.trainer.step, incarnation=incarnation,
            )
        )  # fmt: skip

    def _open(self, hello: Hello) -> Run:
        edge = self._edge or (self._anonymous and bool(hello.before))  # in plain text nobody says who it is
        return self._host.open_run(self._owner, hello, self._number, edge=edge)

    def _move_in(self, run: Run, further: Welcome) -> None:
        """Go on with the state of the edge whose place this one takes, as the last party keeps it."""
        assert run.following is not None
        own, mine = run.trainer.shapes(), dict[str, Tensor]()
        if own:
            kept = {name.removeprefix(KEPT): t for name, t in run.following(Message(Pull(kept=True))).tensors.items()}
            mine = {name: tensor for name, tensor in kept.items() if _base_name(name) in own}
        if further.step and own.keys() - mine.keys():
            raise SessionLost(f"what {self._host.stage.party!r} had learned is kept nowhere; go back to a checkpoint")
        if further.step:
            self._compute(lambda: run.trainer.restore(mine, {}, further.step))
            run.ledger.keep(step=further.step, state=mine)
        run.moving = False

    def _hello_beyond(self, run: Run) -> Welcome:
        assert run.following is not None
        further = run.following(onward_hello(self._owner, run)).meta
        if not isinstance(further, Welcome):
            raise ProtocolError("the next party answered a hello with something else")
        mine = self._host.terms(run.begun.hello.terms)
        if further.protocol != PROTOCOL or further.terms != mine:
            odd = [name for name in Terms.__struct_fields__ if getattr(further.terms, name) != getattr(mine, name)]
            raise HandshakeRefused(f"the next party, {further.party!r}, has another {' and '.join(odd) or 'protocol'}")
        if twice := further.adapter.keys() & run.trainer.shapes().keys():
            raise ProtocolError(f"the next party answers for {min(twice)[:120]!r}, which is not its own")
        return further

    def _compute(self, work: Callable[[], T]) -> T:
        return self._host.compute(work, self._owner)

    def _frame(self, run: Run, meta: Forward, message: Message, keep: int) -> Frame:
        hidden = message.tensors["hidden"].to(next(self._host.stage.model.parameters()).device)
        return Frame(hidden, meta.lengths, meta.padding, meta.positions, keep)

    def _forward(self, run: Run, meta: Forward, message: Message) -> Message:
        """Inference: a step of a session, or a pass without one."""
        host, stage, stepping = self._host, self._host.stage, self._stepping
        assert stepping is not None
        keep = meta.keep if run.following is None else 0
        frame = self._frame(run, meta, message, keep)

        def work() -> Tensor:
            host.end_sessions(self._owner, self._name, run, meta.ended)
            if meta.update is not None:
                stepping.update(run, meta.update)
            run.trainer.use(dropout=False)
            if meta.session and stage.causal:
                return host.sessions.step((self._owner, self._name, meta.session), frame, meta.start, meta.rows)
            with torch.inference_mode():
                return stage(frame.padded(), frame.real, positions=frame.positions, keep=keep)

        if meta.update is not None:
            stepping.prepare(run, message, meta.update)
        before = marks(run)
        try:
            out = self._compute(work)
        finally:
            stepping.keep(run, before, message)
        if run.following is not None:
            kept = stepping.kept_beyond(run, message, meta.update)
            return run.following(Message(meta, {"hidden": frame.packed(out)} | kept))
        return _hidden(frame, out)

    def _take_part(self, run: Run, message: Message) -> Message:
        """Take part in the group's training, or no more."""
        group, member = group_of(run), run.member
        if run.following is not None:
            run.following(message)
        if not isinstance(message.meta, Enter):
            group.leave(member)
        elif run.following is None or group.mode != "server-hierarchical":  # else the last party lets in
            group.enter(member)
        return Message(Done(step=run.trainer.step))

    def _pull(self, run: Run, message: Message) -> Message:
        assert isinstance(message.meta, Pull)
        optimizer = message.meta.optimizer
        if message.meta.kept:
            if not run.before:
                raise ProtocolError("there is no party before this one, so it has kept nothing here")
            if run.following is not None:
                return Message(State(step=run.trainer.step), run.following(message).tensors)
            before = {f"{KEPT}{name}": tensor for name, tensor in run.ledger.before().items()}
            return Message(State(step=run.trainer.step), before)
        tensors = self._compute(lambda: run.trainer.state(optimizer=optimizer))
        if run.following is not None:
            tensors |= dict(run.following(message).tensors)
        return Message(State(step=run.trainer.step), tensors)

    def _push(self, run: Run, meta: Push, message: Message) -> Message:
        if run.group is not None and run.group.body is not None:
            raise ProtocolError("this adapter is shared with others, so it cannot be set; name another group")

        kept, pushed = split_kept(message)

        def work() -> dict[str, Tensor]:
            run.trainer.load(pushed, meta.step)
            return run.trainer.state(optimizer=True)

        try:
            state = self._compute(work)
            run.ledger.keep(step=meta.step, state=state, before=kept)
        except Exception:
            self._host.close_run(self._owner, self._name, forget=False, run=run)
            raise
        if run.following is not None:
            own = run.trainer.shapes().keys()
            onward = {n: t for n, t in message.tensors.items() if _base_name(n) not in own}
            run.following(Message(meta, onward | (as_kept(state) if run.replaceable else {})))
        return Message(Done(step=meta.step))

    def _close(self, run: Run, meta: Close, message: Message) -> Message:
        if run.following is not None:
            run.following(message)
        if meta.session is not None:
            ended = [str(meta.session)]
            self._compute(lambda: self._host.end_sessions(self._owner, self._name, run, ended))
        else:
            self._host.close_run(self._owner, self._name, forget=True, run=run)
            self._run = self._schema = None
        return Message(Done(step=run.trainer.step))


def _hidden(frame: Frame, out: Tensor) -> Message:
    if out.dim() == 2:
        return Message(Hidden(per_sequence=True), {"hidden": out})
    return Message(Hidden(), {"hidden": frame.packed(out).contiguous()})


def _base_name(name: str) -> str:
    """The parameter that a tensor of an adapter's state belongs to."""
    return name.removeprefix("optimizer/").rpartition("/")[0] if name.startswith("optimizer/") else name
