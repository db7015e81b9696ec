"""One client's part in an adapter that several clients train: the adapter's trainer, under the client's own names.

A client counts its own steps, and names its own sessions; the adapter counts the steps of all.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec
from torch import Tensor

from noren.errors import ProtocolError
from noren.partition.stage import Frame
from noren.training.passes import Pass
from noren.training.span_trainer import SpanTrainer
from noren.types import Update


class Share:
    """As a SpanTrainer to one client; `body` is shared.

    `apply` is given the client's steps, numbered by the client. Each is then of one pass, and any other pass of the
    step is that one made again: it has the same dropout.
    """

    def __init__(self, body: SpanTrainer, name: str, apply: Callable[[Update], None] | None = None) -> None:
        self.body, self.name, self.step = body, name, 0
        self._apply = apply or self._step_body
        self._one_pass = apply is not None
        self._sessions: set[str] = set()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.body, name)

    def _named(self, session: str) -> str:
        return f"{self.name}/{session}"

    def begin(self, session: str, frame: Frame, *, dropout: bool) -> Pass:
        """Note a forward pass of this client."""
        self._sessions = {kept for kept in self._sessions if self.body.holds(self._named(kept))} | {session}
        one = self.body.begin(self._named(session), frame, dropout=dropout)
        one.drawn = self._named(session.partition(".")[0]) if self._one_pass else ""
        return one

    def holds(self, session: str) -> bool:
        """Whether a forward pass is kept."""
        return self.body.holds(self._named(session))

    def kept(self, session: str) -> Pass:
        """Return a forward pass that waits for its backward. Raises SessionLost."""
        return self.body.kept(self._named(session))

    def forget(self, session: str | None = None) -> None:
        """Drop a kept pass of this client, or all of them; what others have accumulated stays."""
        for one in [session] if session is not None else list(self._sessions):
            self.body.forget(self._named(one))
            self._sessions.discard(one)

    def forget_passes(self) -> None:
        """Drop all kept passes of this client."""
        self.forget()

    def discard(self) -> None:
        """Nothing: what was accumulated is not this client's alone."""

    def update(self, update: Update) -> None:
        """Take note of a step of this client, once."""
        if update.step > self.step:
            self._apply(update)
            self.step = update.step

    def _step_body(self, update: Update) -> None:
        if update.step != self.step + 1:
            raise ProtocolError(f"step {update.step} of {self.name} cannot follow its step {self.step}")
        self.body.update(msgspec.structs.replace(update, step=self.body.step + 1))

    def load(self, tensors: dict[str, Tensor], step: int) -> None:
        """Refused: it would undo what others have learned."""
        raise ProtocolError("this adapter is shared with others, so it cannot be set; leave the group, or name another")

    def restore(self, state: dict[str, Tensor], gradients: dict[str, Tensor], step: int) -> None:
        """Go on after this client's `step`; the adapter itself is restored once for all."""
        self.step = step

    def close(self) -> None:
        """Drop this client's passes; the adapter stays."""
        self.forget()
