"""The average of a group's replicas: made at the last party of a chain, of what those before it have sent along."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from noren.errors import PeerError, ProtocolError, SessionLost
from noren.parties.groups import group_of
from noren.parties.kept import split_kept
from noren.parties.ledger import keep_all
from noren.parties.runs import Run
from noren.parties.stepping import Host, Request, Stepping, marks
from noren.training.averaging import average
from noren.types import Average, Message, State
from noren.wire.journal import Change


class Averages:
    """Answers the averages that one connection asks for."""

    def __init__(self, host: Host, stepping: Stepping) -> None:
        self._host, self._stepping = host, stepping

    def __call__(self, run: Run, message: Message) -> Message:
        """Answer an average of replicas, once. The last party makes it, of what those before it send along."""
        group, meta = group_of(run), message.meta
        assert isinstance(meta, Average)
        if group.together.mode != "server-hierarchical":
            raise ProtocolError(f"the group {group.together.group!r} trains {group.mode!r}: nothing to average")
        own = run.begun.hello.own
        asked = Message(meta, {name: tensor for name, tensor in message.tensors.items() if name in own})
        if (known := run.ledger.answer(asked)) is not None:
            return known
        if run.following is not None:
            return self._beyond(run, message, asked)
        if group.mode == "client-batch" and meta.update is not None:
            self._stepping.prepare(run, message, meta.update)
        one = self._stepping.request(run, message, torch.empty(0))
        answer: Message = group.meet("average", run.member, one, self._make)
        return answer

    def _beyond(self, run: Run, message: Message, asked: Message) -> Message:
        """Send this party's replica along with what came from before, and take what it has become."""
        meta, before = message.meta, marks(run)
        assert isinstance(meta, Average) and run.following is not None

        def work() -> dict[str, Tensor]:
            if meta.update is not None:
                self._stepping.update(run, meta.update)
            return run.trainer.adapter_state()

        mine = self._host.compute(work)
        self._stepping.keep(run, before, message)
        kept = self._stepping.kept_beyond(run, message, meta.update)
        reply = run.following(Message(meta, {**split_kept(message)[1], **mine, **kept}))
        if not isinstance(reply.meta, State):
            raise ProtocolError("the next party answered an average with something else")
        means = {name: tensor for name, tensor in reply.tensors.items() if name in mine}
        answer = Message(reply.meta, {name: t for name, t in reply.tensors.items() if name not in mine})

        def take() -> dict[str, Tensor]:
            run.trainer.set_adapter(means)
            return run.trainer.state(optimizer=True) if run.ledger.durable else {}

        run.ledger.keep(asked, answer, step=run.trainer.step, state=self._host.compute(take))
        return answer

    def _make(self, asked: dict[str, Request]) -> dict[str, Any]:
        def work() -> dict[str, Any]:
            out: dict[str, Any] = {}
            for member, one in asked.items():
                try:
                    if one.meta.update is not None:
                        self._stepping.update(one.run, one.meta.update)
                    if one.meta.step != one.run.trainer.step:
                        raise SessionLost(f"an average after step {one.meta.step}, at step {one.run.trainer.step}")
                except PeerError as error:
                    out[member] = error
            there = {member: one for member, one in asked.items() if member not in out}
            out |= _odd(there)
            there = {member: one for member, one in there.items() if member not in out}
            if not there:
                return out
            weights = [one.meta.weight for one in there.values()]
            shared = group_of(next(iter(there.values())).run).body
            replicas = [one.run.trainer.adapter_state() if shared is None else {} for one in there.values()]
            body = average(replicas, weights)
            ends = average([split_kept(one.message)[1] for one in there.values()], weights)
            changes: list[tuple[Any, Change]] = []
            for member, one in there.items():
                trainer, ledger = one.run.trainer, one.run.ledger
                out[member] = answer = Message(State(step=trainer.step), ends)
                own = one.run.begun.hello.own
                noted = Message(one.meta, {name: t for name, t in one.message.tensors.items() if name in own})
                before = ledger.before() | split_kept(one.message)[0]
                before |= {name: mean for name, mean in ends.items() if name in before}
                state = None
                if shared is None:
                    trainer.set_adapter(body)
                    state = trainer.state(optimizer=True) if ledger.durable else None
                changes.append((ledger, ledger.change(noted, answer, step=trainer.step, state=state, before=before)))
            keep_all(changes)
            return out

        return self._host.compute(work)


def _odd(asked: dict[str, Request]) -> dict[str, ProtocolError]:
    """Errors for those whose adapters have other names or shapes than most have."""
    forms = {
        member: tuple(sorted((name, tuple(tensor.shape)) for name, tensor in split_kept(one.message)[1].items()))
        for member, one in asked.items()
    }
    usual = max(forms.values(), key=list(forms.values()).count, default=())
    text = "the group's clients have other adapters; give all the same [adapter] and plan"
    return {member: ProtocolError(text) for member, form in forms.items() if form != usual}
