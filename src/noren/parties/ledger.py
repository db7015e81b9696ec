"""What one run must not lose at a remote party, and that each of its training requests counts once.

A training request is known by run, step and phase: its run by the connection, step and number by its session
("STEP.N"), phase by its kind. Its answer is kept with the state that it led to, in one transaction, before it is sent.
A repeat gets the same answer and changes nothing; another request under the same name is refused. Once a step is
applied, the answers of the steps before it are of no use to anybody, and are dropped.

With a journal all of it is on disk; without one it lasts as long as the process.
"""

from __future__ import annotations

import hashlib
import re
import struct
import threading
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import msgspec
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from noren.errors import OverBudget, ProtocolError, SessionLost
from noren.types import Average, Backward, Forward, Hello, Message
from noren.wire.envelope import Packed, pack, reopen
from noren.wire.journal import Body, Change, Draft, Journal, Record

LENGTH = struct.Struct("<I")
SESSION = re.compile(r"(\d{1,12})\.(\d{1,9})")
MEMORY_ANSWERS, MEMORY_BYTES = 64, 256 << 20
"""Answers that are kept without a journal: at most so many, and all but the last two within so many bytes."""


class Begun(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How a run began: what its client said, and the tokens of its state here and at the next party."""

    hello: Hello
    incarnation: str
    next_incarnation: str = ""
    member: str = ""  # the run's name among those of its group; the same for good


class _Step(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    step: int


@dataclass(frozen=True)
class Saved:
    """A run's state as it was last kept."""

    begun: Begun
    step: int
    state: dict[str, Tensor]  # adapter and moments, see SpanTrainer.state
    gradients: dict[str, Tensor]
    about: bytes = b"{}"  # the gradients, in words


def session_of(session: str) -> tuple[int, int]:
    """Return (step, number) of a training session's name. Raises ProtocolError."""
    match = SESSION.fullmatch(session)
    if match is None:
        raise ProtocolError(f"training session {session[:40]!r} is not of the form STEP.N")
    return int(match[1]), int(match[2])


def key_of(message: Message) -> str:
    """Return the name under which a training request counts once."""
    if isinstance(message.meta, Average):
        return f"answer/average.{message.meta.step}"
    assert isinstance(message.meta, Forward | Backward)
    return f"answer/{message.meta.session}/{message.kind}"


def digest_of(message: Message) -> bytes:
    """SHA-256 of a request's meta and tensors."""
    packed = pack(message)
    digest = hashlib.sha256(packed.header)
    for body in packed.bodies:
        digest.update(body)
    return digest.hexdigest().encode()


class Ledger:
    """The record of one run, named `run` in the journal."""

    def __init__(self, journal: Journal | None, run: str, most: int = 0) -> None:
        self._journal, self._run, self._most = journal, run, most  # bytes of all the owner's runs; 0: no limit
        self._memory: dict[str, Record] = {}
        self._lock, self._over = threading.Lock(), False

    @property
    def durable(self) -> bool:
        """Whether what is kept outlives the process."""
        return self._journal is not None

    def saved(self) -> Saved | None:
        """Return the run's state as it was kept, None if there is none."""
        begun = self._read("run")
        if begun is None:
            return None
        state, gradients = self._read("state"), self._read("gradients")
        return Saved(
            msgspec.json.decode(begun.words, type=Begun),
            msgspec.json.decode(state.words, type=_Step).step if state else 0,
            load_tensors(bytes(state.body or b"")) if state and state.body else {},
            load_tensors(bytes(gradients.body or b"")) if gradients and gradients.body else {},
            gradients.words if gradients else b"{}",
        )

    def begin(self, begun: Begun) -> None:
        """Keep how the run began."""
        keep_all([(self, Change({"run": Draft(msgspec.json.encode(begun), None)}))])

    def group(self) -> tuple[list[str], str, bool]:
        """Return who takes part in the group whose record this is, whose turn it is ("": nobody's), if it has begun."""
        found = self._read("group")
        return (
            msgspec.json.decode(found.words, type=tuple[list[str], str, bool]) if found is not None else ([], "", False)
        )

    def keep_group(self, present: list[str], holder: str, begun: bool) -> None:
        """Keep what `group` returns."""
        keep_all([(self, Change({"group": Draft(msgspec.json.encode((present, holder, begun)))}))])

    def before(self) -> dict[str, Tensor]:
        """Return the state of the parties before this one, as they sent it last; {} if they did not."""
        found = self._read("before")
        return load_tensors(bytes(found.body or b"")) if found is not None else {}

    def again(self) -> Change:
        """Return what begins the unfinished step again: its gradients and answers go. An average has been made."""
        return Change({}, [k for k in self._keys() if k == "gradients" or (k.startswith("answer/") and
                           not k.startswith("answer/average."))])  # fmt: skip

    def rename(self, run: str) -> None:
        """Go on under another name; what is kept there is replaced."""
        with self._lock:
            if self._journal is not None:
                self._journal.rename(self._run, run)
            self._run = run

    def answer(self, request: Message) -> Message | None:
        """Return what was answered to the same request before, None if it is new.

        Raises ProtocolError if another request has that name.
        """
        found = self._read(key_of(request))
        if found is None:
            return None
        if found.words != digest_of(request):
            step = getattr(request.meta, "session", "") or getattr(request.meta, "step", "")
            raise ProtocolError(
                f"a {request.kind!r} of step {step} was answered already, and this is another one; "
                "a step is sent again exactly as it was, or the run is resumed from its last checkpoint"
            )
        body = bytes(found.body or b"")
        (length,) = LENGTH.unpack_from(body)
        return reopen(body[LENGTH.size : LENGTH.size + length], body[LENGTH.size + length :])

    def answered(self, session: str) -> bool:
        """Whether the backward pass of a session was answered."""
        return self._read(f"answer/{session}/backward") is not None

    def check_step(self, session: str, step: int) -> None:
        """Raise SessionLost unless a training session is of the step that follows `step`."""
        wanted = session_of(session)[0]
        if wanted != step + 1:
            raise SessionLost(
                f"a request of step {wanted}, but {step} steps of this run are done here; "
                + ("that step is over" if wanted <= step else "continue from the last checkpoint")
            )

    def check_after(self, session: str) -> None:
        """Raise SessionLost unless the gradient of a session counts already; "" for none."""
        if session and not self.answered(session):
            raise SessionLost(f"the gradient of {session} counts before this one, and is not here; send it first")

    def keep(self, request: Message | None = None, answer: Message | None = None, **state: Any) -> None:
        """Keep an answer and the state that it goes with (see `change`), all or nothing."""
        keep_all([(self, self.change(request, answer, **state))])

    def change(
        self,
        request: Message | None = None,
        answer: Message | None = None,
        *,
        step: int | None = None,
        state: Mapping[str, Tensor] | None = None,
        gradients: Mapping[str, Tensor] | None = None,
        about: bytes = b"{}",
        before: Mapping[str, Tensor] | None = None,
    ) -> Change:
        """Return an answer and the state that it goes with as they are to be kept, all or nothing, by `keep_all`.

        `step`: an optimiser step was applied, which gave `state`; what was kept for the steps before is dropped.
        `about`: the gradients, in words. `before`: the state of the parties before this one, after the same step.
        """
        puts: dict[str, Draft] = {}
        if before:
            puts["before"] = Draft(b"{}", save_tensors(dict(before)))
        drop: list[str] = []
        if step is not None:
            puts["state"] = Draft(msgspec.json.encode(_Step(step=step)), save_tensors(dict(state or {})))
            drop = [key for key in self._keys() if key == "gradients" or key.startswith("answer/")]
        if gradients is not None:
            puts["gradients"] = Draft(about, save_tensors(dict(gradients)))
        if request is not None and answer is not None:
            packed: Packed = pack(answer)
            body = [memoryview(LENGTH.pack(len(packed.header))), memoryview(packed.header), *packed.bodies]
            puts[key_of(request)] = Draft(digest_of(request), body)
        return Change(puts, [key for key in drop if key not in puts])

    def end(self, *, forget: bool) -> None:
        """Take no more: what a request leads to that is under way still must not come into a later run's record.

        With `forget`, what was kept is dropped.
        """
        with self._lock:
            self._over = True
            if forget:
                self.forget()

    def forget(self) -> None:
        """Drop the run."""
        self._memory.clear()
        if self._journal is not None:
            self._journal.forget(self._run)

    def _keys(self) -> list[str]:
        return list(self._memory) if self._journal is None else self._journal.keys(self._run)

    def _read(self, key: str) -> Record | None:
        return self._memory.get(key) if self._journal is None else self._journal.read(self._run, key)

    def _check(self, change: Change) -> None:
        """Raise SessionLost if the run is over, or OverBudget if its owner would hold too much."""
        if self._over:
            raise SessionLost("this run was closed by another connection of its owner")
        if self._journal is None or not self._most:
            return
        owner, coming = self._run.partition("/")[0], sum(_size(draft.body) for draft in change.puts.values())
        if (used := self._journal.used_by(f"{owner}/")) + coming > self._most:
            raise OverBudget(
                f"the journal holds {used} bytes for {owner!r}, and the limit for one owner is {self._most}; close "
                "runs that are over"
            )

    def _remember(self, change: Change) -> None:
        """Without a journal: keep it in memory, as long as there is room."""
        for key in change.drop:
            self._memory.pop(key, None)
        for key, draft in change.puts.items():
            body = draft.body
            self._memory[key] = Record(draft.words, b"".join(body) if isinstance(body, list) else bytes(body or b""))
        answers = [key for key in self._memory if key.startswith("answer/")]
        held = sum(len(self._memory[key].body or b"") for key in answers)
        while answers[2:] and (len(answers) > MEMORY_ANSWERS or held > MEMORY_BYTES):
            held -= len(self._memory.pop(answers.pop(0)).body or b"")


def keep_all(changes: Sequence[tuple[Ledger, Change]]) -> None:
    """Change some runs' records in one transaction: all of them, or on any error none. They share a journal."""
    with ExitStack() as held:
        for ledger, _ in changes:
            held.enter_context(ledger._lock)
        for ledger, change in changes:
            ledger._check(change)
        if changes and (journal := changes[0][0]._journal) is not None:
            journal.write_all({ledger._run: change for ledger, change in changes})
            return
        for ledger, change in changes:
            ledger._remember(change)


def _size(body: Body | None) -> int:
    return 0 if body is None else sum(map(len, body)) if isinstance(body, list) else len(body)
