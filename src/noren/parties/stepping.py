"""Training requests of one run at a remote party: each counts once, and what it led to is kept before it is answered.

Alone, a run's requests are computed by themselves. In a group they are computed with what others have sent and waits
at that moment; a shared adapter's step waits until all who take part have contributed (see groups.Group.finish_round).
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import msgspec
from torch import Tensor

from noren.errors import OverBudget, PeerError, ProtocolError, SessionLost, TooLate
from noren.parties.groups import Group
from noren.parties.kept import as_kept, split_kept
from noren.parties.ledger import keep_all, session_of
from noren.parties.runs import Run
from noren.partition.stage import Frame, Stage
from noren.training.batches import IGNORED
from noren.training.joint import Part
from noren.training.passes import Pass, Passes
from noren.types import (
    Backward,
    Done,
    Forward,
    Gradient,
    Hidden,
    Message,
    Step,
    Update,
)
from noren.wire.journal import Change

T = TypeVar("T")


class Host(Protocol):
    """What this needs of the party (see server.SpanServer)."""

    stage: Stage
    passes: Passes
    steps: int

    def compute(self, work: Callable[[], T], owner: str = "") -> T:
        """Run in the thread that computes, in the owner's turn."""

    def compute_together(
        self, kind: Hashable, item: Any, work: Callable[[list[Any]], list[T | PeerError]], owner: str
    ) -> T:
        """Run with others of the kind."""

    def close_run(self, owner: str, name: str, *, forget: bool, run: Run | None) -> None:
        """End a run, if it is this one."""

    def end_sessions(self, owner: str, name: str, run: Run, ended: list[str]) -> None:
        """Forget sessions."""


@dataclass(eq=False)
class Request:
    """A training request that is to be computed, perhaps with others'."""

    owner: str
    name: str  # of the run
    run: Run
    message: Message
    tensor: Tensor  # hidden states, or the gradient of the output

    @property
    def meta(self) -> Any:
        """What is asked."""
        return self.message.meta


class Stepping:
    """Answers the training requests of one connection."""

    def __init__(self, host: Host, owner: str, name: str) -> None:
        self._host, self._owner, self._name = host, owner, name

    def forward(self, run: Run, message: Message) -> Message:
        """Answer a forward pass: once for its step and number; computed again if only its activations were lost."""
        trainer, meta, group = run.trainer, message.meta, run.group
        assert isinstance(meta, Forward)
        known = run.ledger.answer(message)
        if known is not None and (trainer.holds(meta.session) or run.ledger.answered(meta.session)):
            return known
        if group is not None:
            group.must_hold(run.member)
        before, asked = marks(run), self.request(run, message, message.tensors["hidden"])
        try:
            if group is not None and group.mode == "client-batch":
                if known is not None:
                    raise _too_late(group)
                self._next_round(group, run, meta.update)
            if group is not None and group.mode != "sequential":
                kind = ("forward", group.name)
                out: Tensor = self._host.compute_together(kind, asked, self._forwards, self._owner)
            else:
                out = self._host.compute(lambda: _only(self._forwards([asked])), self._owner)
            if run.following is not None:
                kept = self.kept_beyond(run, message, meta.update)
                labels = {name: tensor for name, tensor in message.tensors.items() if name == "labels"}
                onward = trainer.kept(meta.session).onward = Message(meta, {"hidden": out} | labels | kept)
                answer = known if known is not None else run.following(onward)
            else:
                answer = Message(Hidden(per_sequence=self._host.passes.per_sequence), {"hidden": out})
        except Exception:
            self.keep(run, before, message)
            raise
        if known is not None:
            return known
        self.keep(run, before, message, answer)
        return answer

    def kept_beyond(self, run: Run, message: Message, update: Update | None) -> dict[str, Tensor]:
        """What goes with a step to the next party, for whoever takes this one's place (or one's before it)."""
        kept, meta = as_kept(split_kept(message)[0]), message.meta
        later = isinstance(meta, Forward) and meta.train and session_of(meta.session)[1] > 0  # it went with the first
        if update is not None and run.replaceable and not later:
            kept |= as_kept(self._host.compute(lambda: run.trainer.state(optimizer=True)))
        return kept

    def _forwards(self, asked: list[Request]) -> list[Tensor | PeerError]:
        """Compute what each run asks for, under its own adapter; an error for those that may not."""
        begun = [_or_error(lambda one=one: self._begin(one)) for one in asked]  # type: ignore[misc]
        outs = iter(self._host.passes.forward([one for one in begun if isinstance(one, Pass)]))
        return [next(outs) if isinstance(one, Pass) else one for one in begun]

    def _begin(self, one: Request) -> Pass:
        meta, run = one.meta, one.run
        self._host.end_sessions(one.owner, one.name, run, meta.ended)
        if meta.update is not None:
            self.update(run, meta.update)
        run.ledger.check_step(meta.session, run.trainer.step)
        frame = Frame(one.tensor, meta.lengths, meta.padding, meta.positions, labels=self._labels(one))
        begun = run.trainer.begin(meta.session, frame, dropout=meta.dropout)
        begun.targets = float(min(meta.weight, len(one.tensor)) or len(one.tensor))
        return begun

    def _labels(self, one: Request) -> Tensor | None:
        """The labels that came with a pass whose loss is made here. Raises ProtocolError."""
        labels = one.message.tensors.get("labels")
        if labels is None or one.run.following is not None:
            return None
        most = int(self._host.stage.config.get_text_config().vocab_size)
        if bool(((labels < 0) & (labels != IGNORED) | (labels >= most)).any()):
            raise ProtocolError(f"labels must be {IGNORED}, or at least 0 and below {most}")
        return self._here(labels)

    def _next_round(self, group: Group, run: Run, update: Update | None) -> None:
        """Wait until the step to which this client has contributed is made."""
        if update is not None:
            self._host.compute(lambda: run.trainer.update(update))
        group.finish_round(run.member, lambda: self._host.compute(lambda: self._step_body(group)))

    def prepare(self, run: Run, message: Message, update: Update) -> None:
        """Before a step that rides along with something else: be allowed to make it, or wait for the group to."""
        if run.group is not None:
            run.group.must_hold(run.member)
            if run.group.mode == "client-batch":
                before = marks(run)
                self._next_round(run.group, run, update)
                self.keep(run, before, message)

    def _step_body(self, group: Group) -> None:
        """Make the step of a shared adapter that is due, and keep it."""
        assert group.joint is not None and group.body is not None
        before = group.body.step
        group.joint.step()
        if group.body.step != before:
            self._host.steps += 1
            keep_all([(group.ledger, _body_state(group))])

    def backward(self, run: Run, message: Message) -> Message:
        """Answer a backward pass, once."""
        if (known := run.ledger.answer(message)) is not None:
            return known
        meta, group = message.meta, run.group
        assert isinstance(meta, Backward)
        joint = group is not None and group.mode == "client-batch"
        if group is not None:
            group.must_hold(run.member)
        try:
            run.ledger.check_step(meta.session, run.trainer.step)
            run.trainer.kept(meta.session)
            run.ledger.check_after(meta.after)
        except SessionLost:
            if joint and group is not None:
                raise _too_late(group) from None
            raise
        gradient, further = self._here(message.tensors["gradient"]), 0.0
        if run.following is not None:
            reply = self._beyond(run, meta, message)
            gradient, further = self._here(reply.tensors["gradient"]), reply.meta.square_norm  # type: ignore[union-attr]
        asked = self.request(run, message, gradient)
        if group is not None and joint:
            kind = ("backward", group.name)
            return self._host.compute_together(kind, asked, lambda all_: self._joint_backward(group, all_), self._owner)
        if group is not None and group.mode == "server-hierarchical":
            kind = ("backward", group.name)
            out, norm, gradients = self._host.compute_together(kind, asked, self._backwards, self._owner)
        else:
            out, norm, gradients = self._host.compute(lambda: _only(self._backwards([asked])), self._owner)
        answer = Message(Gradient(square_norm=norm + further), {"gradient": out})
        self.keep(run, marks(run), message, answer, gradients=gradients)
        return answer

    def _backwards(self, asked: list[Request]) -> list[tuple[Tensor, float, dict[str, Tensor]] | PeerError]:
        """Take each run's gradient back; returns that of its input, the norm of its adapter's, and these themselves."""
        kept = [_or_error(lambda one=one: _kept(one)) for one in asked]  # type: ignore[misc]
        pairs = [(part, one.tensor) for part, one in zip(kept, asked, strict=True) if isinstance(part, Pass)]
        for part, one in zip(kept, asked, strict=True):
            if isinstance(part, Pass) and one.meta.discard:
                one.run.trainer.discard()
        outs = iter(self._host.passes.backward(pairs))
        done: list[tuple[Tensor, float, dict[str, Tensor]] | PeerError] = []
        for part, one in zip(kept, asked, strict=True):
            if isinstance(part, PeerError):
                done.append(part)
                continue
            trainer = one.run.trainer
            trainer.forget(one.meta.session)
            done.append((next(outs), trainer.square_norm(), trainer.gradients() if one.run.ledger.durable else {}))
        return done

    def _joint_backward(self, group: Group, asked: list[Request]) -> list[Message | PeerError]:
        """Take the gradients of a group's clients back through the adapter that they share, and keep all of it."""
        assert group.joint is not None and group.body is not None
        joint, body = group.joint, group.body
        kept = [_or_error(lambda one=one: _kept(one)) for one in asked]  # type: ignore[misc]
        parts = [
            Part(one.run.trainer, of, one.tensor, of.targets)  # type: ignore[arg-type]
            for one, of in zip(asked, kept, strict=True)
            if isinstance(of, Pass)
        ]
        backs = iter(joint.backward(self._host.passes, parts))
        answers: list[Message | PeerError] = []
        for of in kept:
            if isinstance(of, Pass):
                answers.append(Message(Gradient(square_norm=0.0), {"gradient": next(backs)}))
            else:
                answers.append(_too_late(group) if isinstance(of, SessionLost) else of)
        members = [
            (one.run.ledger, one.run.ledger.change(one.message, answer))
            for one, answer in zip(asked, answers, strict=True)
            if isinstance(answer, Message)
        ]
        gradients = body.gradients() if group.ledger.durable else {}
        own = group.ledger.change(gradients=gradients, about=msgspec.json.encode(joint.targets))
        keep_all([(group.ledger, own), *members])
        group.notice()
        return answers

    def _beyond(self, run: Run, meta: Backward, message: Message) -> Message:
        """Ask the next party; one that lost its part is given this party's outputs again first."""
        assert run.following is not None
        try:
            reply = run.following(message)
        except SessionLost:
            onward = run.trainer.kept(meta.session).onward
            if onward is None:
                raise
            run.following(onward)
            reply = run.following(message)
        if not isinstance(reply.meta, Gradient):
            raise ProtocolError("the next party answered a backward with something else")
        return reply

    def step(self, run: Run, message: Message) -> Message:
        """Answer an optimiser step on its own."""
        assert isinstance(message.meta, Step)
        update = message.meta.update
        if run.group is not None:
            run.group.must_hold(run.member)
        before = marks(run)
        if run.group is not None and run.group.mode == "client-batch":
            self._next_round(run.group, run, update)
        else:
            self._host.compute(lambda: self.update(run, update), self._owner)
        self.keep(run, before, message)
        if run.following is not None:
            run.following(Message(Step(update=update), self.kept_beyond(run, message, update)))
        return Message(Done(step=update.step))

    def update(self, run: Run, update: Update) -> None:
        """Apply a step, once."""
        before = run.trainer.step
        run.trainer.update(update)
        if run.group is None or run.group.mode != "client-batch":
            self._host.steps += run.trainer.step - before

    def keep(
        self,
        run: Run,
        before: tuple[int, int],
        request: Message | None = None,
        answer: Message | None = None,
        gradients: dict[str, Tensor] | None = None,
    ) -> None:
        """Keep what a request led to. If it cannot be kept, memory goes back to what was kept last."""
        trainer, ledger = run.trainer, run.ledger
        edges = split_kept(request)[0] if request is not None and run.following is None else {}
        stepped = trainer.step != before[0]
        if not (stepped or answer is not None or gradients is not None):
            return
        step, shared = trainer.step if stepped else None, run.group if run.group and run.group.body else None
        try:
            state = None
            if stepped and ledger.durable and shared is None:
                state = self._host.compute(lambda: trainer.state(optimizer=True))  # in nobody's turn: not refused
            if shared is None:
                ledger.keep(request, answer, step=step, state=state, gradients=gradients, before=edges)
                return
            changes = [(ledger, ledger.change(request, answer, step=step, before=edges))]
            if shared.mode == "sequential":
                body = _body_state(shared) if marks(run)[1] != before[1] else Change({})
                if gradients is not None:
                    more = shared.ledger.change(gradients=gradients)
                    body = Change({**body.puts, **more.puts}, [key for key in body.drop if key not in more.puts])
                changes.append((shared.ledger, body))
            keep_all(changes)
        except Exception as error:
            self._host.close_run(self._owner, self._name, forget=isinstance(error, OverBudget), run=run)
            raise

    def request(self, run: Run, message: Message, tensor: Tensor) -> Request:
        """A request of this connection, to be computed."""
        return Request(self._owner, self._name, run, message, self._here(tensor))

    def _here(self, tensor: Tensor) -> Tensor:
        return tensor.to(next(self._host.stage.model.parameters()).device)


def _or_error(work: Callable[[], T]) -> T | PeerError:
    """What comes of one client's part of something that is done for several."""
    try:
        return work()
    except PeerError as error:
        return error


def _only(results: list[T | PeerError]) -> T:
    [result] = results
    if isinstance(result, PeerError):
        raise result
    return result


def _kept(one: Request) -> Pass:
    """The pass that a gradient is of. Raises SessionLost, or ProtocolError for one of another shape."""
    kept = one.run.trainer.kept(one.meta.session)
    kept.check(one.tensor)
    return kept


def marks(run: Run) -> tuple[int, int]:
    """Where a run stands: its step, and that of the adapter that it shares."""
    body = run.group.body if run.group is not None else None
    return run.trainer.step, body.step if body is not None else 0


def _body_state(group: Group) -> Change:
    assert group.body is not None
    state = group.body.state(optimizer=True) if group.ledger.durable else None
    return group.ledger.change(step=group.body.step, state=state)


def _too_late(group: Group) -> TooLate:
    what = f"the group {group.together.group!r} went on without this step, or this party was restarted in it"
    return TooLate(f"{what}; the step must be made again")
