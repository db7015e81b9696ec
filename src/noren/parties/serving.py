"""One process that serves a party of a run: its layers, its journal, its line to the next party, its doors.

It may stand in for the party before it, too: the last one of a chain can take the place of all its edges.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from contextlib import ExitStack
from typing import Self

import msgspec
import torch

from noren.config import Document
from noren.errors import ConfigError, PlanError
from noren.parties.lines import credentials_for
from noren.parties.runs import Following, Greet, Greeted
from noren.parties.server import SpanServer
from noren.parties.stand_in import StandIn, beside
from noren.partition.plan import Plan
from noren.partition.stage import Slice, Stage, open_slice
from noren.types import Condition, Handler, Hello, Message
from noren.wire.envelope import Expect
from noren.wire.grpc_link import GrpcLink
from noren.wire.grpc_server import GrpcServer
from noren.wire.journal import Journal
from noren.wire.observe import Observed


class Serving:
    """A party at work for `document`. A context manager: at its end all that it opened is closed.

    `part` is what it holds; `place` where it computes. Raises ConfigError, ModelError or OverBudget.
    """

    def __init__(
        self, document: Document, part: Slice, place: torch.device, *, insecure: bool, observed: Observed | None = None
    ) -> None:
        self._document, self._part, self._place = document, part, place
        self._credentials = credentials_for(document, part.party, insecure=insecure)
        self.observed = observed or Observed()
        self._spare: StandIn | None = None
        self._stack, self._doors = ExitStack(), list[GrpcServer]()
        onward = following(document, part.plan, part.party, insecure=insecure)
        stage = self._stage(part)
        with self._stack:
            self.server = self._at_work(stage, onward)
            self._stack = self._stack.pop_all()
        for name in ("sessions", "runs", "cache_bytes", "journal_bytes"):
            self.observed.watch(f"noren_{name}", lambda name=name: getattr(self.server.condition(), name))  # type: ignore[misc]
        self.observed.watch("noren_steps_total", lambda: self.server.steps)

    def _stage(self, part: Slice) -> Stage:
        run = self._document.run
        stage = Stage(part, getattr(torch, run.dtype), run.base).to(self._place)
        part.let_go()
        return stage

    def _at_work(self, stage: Stage, onward: Following | None) -> SpanServer:
        run, journal = self._document.run, None
        if run.serve.journal:
            folder = self._document.path(run.serve.journal.replace("{party}", stage.party))
            journal = self._stack.enter_context(Journal(folder, max_bytes=run.serve.journal_bytes))
        server = SpanServer(stage, lora=run.adapter, limits=run.serve, following=onward, journal=journal)
        self._stack.callback(server.close)
        return server

    def _spare_at_work(self, stage: Stage) -> SpanServer:
        """A stand-in: without a journal, since this party's own has what an edge must not lose."""
        run, own = self._document.run, self._part.party
        return SpanServer(stage, lora=run.adapter, limits=run.serve, following=beside(self.server, f"stand-in-{own}"))

    def listen(self, address: str) -> int:
        """Let clients in at "host:port"; returns the port."""
        return self._listen(address, self.server)

    def _listen(self, address: str, at: SpanServer | StandIn) -> int:
        run = self._document.run
        if not re.fullmatch(r"[^\s/]+:\d{1,5}", address):
            raise ConfigError(f"{address!r} is not host:port, e.g. 127.0.0.1:7001")
        door = self._stack.enter_context(
            GrpcServer(
                address, self._credentials, at.connect, doors=run.doors, tick=at.expire,
                keepalive=run.wire.keepalive_seconds, observed=self.observed,
            )
        )  # fmt: skip
        self._doors.append(door)
        return door.port

    def stand_in(self, text: str) -> int:
        """Also serve the party before this one, as "PARTY=host:port" says; returns the port.

        Its layers are loaded when the first client comes. Raises ConfigError, or PlanError.
        """
        run, plan, own = self._document.run, self._part.plan, self._part.party
        party, _, address = text.partition("=")
        names = [span.party for span in plan.remote]
        if not party or not address:
            raise ConfigError(f"--stand-in: {text!r} is not PARTY=host:port")
        if party not in names or names.index(party) + 1 != names.index(own):
            raise PlanError(f"--stand-in: {party!r} does not come right before {own!r} in the plan, '{plan}'")

        def load() -> SpanServer:
            stage = self._stage(open_slice(self._document.model, run.plan, party, run.task))
            return self._spare_at_work(stage)

        def condition() -> Condition:
            layers = [f"{span.start}:{span.end}" for span in plan.remote if span.party == party]
            return msgspec.structs.replace(self.server.condition(), party=party, layers=layers)

        self._spare = StandIn(load, condition)
        self._stack.callback(self._spare.close)  # after its door, which is opened now
        return self._listen(address, self._spare)

    def drain(self, hurry: Callable[[], bool]) -> None:
        """Take no new runs, and wait until those who are connected have gone, or `drain_seconds`, or `hurry`."""
        self.server.draining = True
        if self._spare is not None:
            self._spare.drain()
        for door in self._doors:
            door.drain(self._document.run.serve.drain_seconds, hurry=hurry)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self._stack.close()


def following(document: Document, plan: Plan, party: str, *, insecure: bool) -> Following | None:
    """Return what opens a line to the party after `party` for each client's run; None for the last one.

    Raises ConfigError if that party's address is not known, or the certificate cannot be used for connecting to it.
    """
    names = [span.party for span in plan.remote]
    if party == names[-1]:
        return None
    following = names[names.index(party) + 1]
    addresses = document.addresses(following)
    if not addresses:
        raise ConfigError(f"links: no address for {following!r}, which comes after {party!r}; add it under [links]")
    credentials = credentials_for(document, party, insecure=insecure)
    credentials.check("client")

    def line(greet: Greet, greeted: Greeted, expect: Callable[[Message], Expect]) -> Handler:
        hello = greet().meta
        assert isinstance(hello, Hello)
        wire = msgspec.structs.replace(
            document.run.wire, activations=hello.terms.activations, gradients=hello.terms.gradients
        )
        return GrpcLink(addresses[0], credentials, greet=greet, greeted=greeted, expect=expect, wire=wire)

    return line
