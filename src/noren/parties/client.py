"""The party that owns the data: its model, its line to the others, its adapters.

What it is given to use is an ordinary transformers model that can also be closed (see parties.load).
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from noren.adapters import checkpoint as peft_folder
from noren.adapters import lora as adapters
from noren.adapters.lora import Lora
from noren.config import Document
from noren.errors import ConfigError, HandshakeRefused, LinkError, ModelError, PeerError, ProtocolError, SessionLost
from noren.parties import fitness
from noren.parties.edges import AnyOf
from noren.parties.labels import set_labels
from noren.parties.lines import line_to, pick_device, replaceable
from noren.parties.policy import Policy, read_policy
from noren.parties.remote_state import RemoteState
from noren.partition.blocks import tail_module
from noren.partition.client import build_client, remote_span, whole_name
from noren.partition.remote import RemoteSpan
from noren.partition.stage import new_heads, open_slice
from noren.privacy.release import Releases
from noren.training.loop import Remote
from noren.types import (
    PROTOCOL,
    TOKEN,
    Close,
    Done,
    Handler,
    Hello,
    Message,
    Pull,
    Push,
    State,
    Terms,
    Welcome,
    guarded,
)
from noren.wire.codecs.delta import DeltaSender
from noren.wire.envelope import Expect
from noren.wire.grpc_link import GrpcLink, any_answer
from noren.wire.journal import Journal
from noren.wire.local import LocalLink
from noren.wire.schema import Schema
from noren.wire.settings import DELTA
from noren.wire.traffic import Traffic

ADAPTER = "default"
log = logging.getLogger("noren.client")


class Client:
    """The client of one run. `model` is the transformers model, `link` its line to the first remote party."""

    def __init__(
        self,
        document: Document,
        handler: Handler | None = None,
        *,
        labels: list[str] | None = None,
        pad_id: int | None = None,
        policy: Policy | None = None,
        journal: Journal | None = None,
        resume: str = "",
        insecure: bool = False,
    ) -> None:
        run = document.run
        self.document, self.lora = document, run.adapter
        self.part = open_slice(document.model, run.plan, None, run.task)
        fitness.require(self.part.whole, run.task, self.part.location)
        if labels:
            set_labels(self.part, labels, pad_id)
        self.policy = policy if policy is not None else read_policy()
        self.policy.check_run(self.part.plan, self.part.fingerprint, run.noise)
        self.policy.check_labels(run.loss_at)
        if run.loss_at == "cloud":
            last = self.part.plan.remote[-1].party
            log.warning('loss_at = "cloud": in training the labels leave this machine, and %r reads them', last)
        self.journal, self._resume, self._insecure = journal, resume, insecure
        self._schema: Schema | None = None
        self._own: dict[str, list[int]] = {}  # shapes of this party's own adapters, if they are to be averaged
        self._closed, self._lost = False, ""
        self._replaceable = replaceable(document, self.part.plan)
        self._pushed: tuple[dict[str, Tensor], int] | None = None
        device = pick_device(run.device)
        self.link = self._connect(handler)
        try:
            self._enter(self._greet())
        except BaseException:
            self.link.close()
            raise
        try:
            self._build(device)
        except BaseException:
            self._abandon(resumed=bool(resume))
            raise

    def _build(self, device: torch.device) -> None:
        """Build the model around the connection."""
        run = self.document.run
        delta = DeltaSender(run.wire.delta_bytes) if run.wire.activations == DELTA else None
        self.releases = Releases(
            run.noise, most=self.policy.most_vectors, journal=self.journal, run=run.name, delta=delta,
            rule=self.policy.where("most_vectors"), steps=2 if self._replaceable else 1,
        )  # fmt: skip
        ask = guarded(self.ask, self.releases.compactly)
        self.hf = build_client(self.part, ask, getattr(torch, run.dtype), run.seed).to(device)
        self.part.let_go()
        self.span: RemoteSpan = remote_span(self.hf)
        self.span.release = self.releases
        if self.lora is not None:
            self._add_adapters(self.lora)
        else:
            self.hf.requires_grad_(False)
        self.hf.__class__ = type(type(self.hf).__name__, (Closing, type(self.hf)), {"client": self})
        self.model: Any = self.hf

    def _abandon(self, *, resumed: bool) -> None:
        """Leave nothing at the server of a client that could not be built, but a run that it came back to."""
        with suppress(LinkError, PeerError):
            if not resumed:
                self.link(Message(Close()))
        self.link.close()

    def _connect(self, handler: Handler | None) -> GrpcLink | LocalLink | AnyOf:
        if handler is not None:
            return LocalLink(handler, wire=self.document.run.wire, expect=self._expect)
        return line_to(
            self.document, self.part.plan, greet=self.hello, greeted=self._reconnected, expect=self._expect,
            insecure=self._insecure,
        )  # fmt: skip

    def _expect(self, asked: Message) -> Expect:
        """What the answer to a message may look like: before the handshake is over, only what has no tensors."""
        return any_answer(asked) if self._schema is None else self._schema.answer(asked)

    def hello(self) -> Message:
        """The handshake's first message: what this client was set up for."""
        run = self.document.run
        return Message(
            Hello(
                protocol=PROTOCOL,
                run=run.name,
                terms=Terms(
                    fingerprint=self.part.fingerprint, plan=self.part.plan.lines(), task=run.task, dtype=run.dtype,
                    base=run.base, lora=self.lora.canonical() if self.lora else "", seed=run.seed,
                    activations=run.wire.activations, gradients=run.wire.gradients, noise=run.noise,
                    delta_bytes=run.wire.delta_bytes if run.wire.activations == DELTA else 0, together=run.together,
                    loss_at=run.loss_at, replaceable=self._replaceable,
                ),
                resume=self._resume, own=self._own, moved=self._replaceable and bool(self._resume),
            )
        )  # fmt: skip

    def _greet(self) -> Welcome:
        return self._accepted(self.link(self.hello()))

    def _enter(self, welcome: Welcome) -> None:
        """Go on from what the remote parties hold now."""
        self.welcome, self._resume = welcome, welcome.incarnation

    def _accepted(self, answer: Message) -> Welcome:
        """Judge a welcome: the same terms as asked for, and nothing that the policy forbids."""
        welcome, hello = answer.meta, self.hello().meta
        if not isinstance(welcome, Welcome):
            raise ProtocolError(f"the peer answered a hello with {type(welcome).__name__}")
        assert isinstance(hello, Hello)
        self.policy.check_welcome(hello.terms, welcome, self.part.plan)
        schema = Schema(
            dtype=self.document.run.dtype, width=self._width, back=self._width if self.part.plan.u_shaped else None,
            activations=hello.terms.activations, gradients=hello.terms.gradients, adapter=welcome.adapter,
            tokens=1 << 30, own=self._own, labels=hello.terms.loss_at == "cloud",
        )  # fmt: skip
        if self._schema is not None and schema != self._schema:
            raise HandshakeRefused(f"{self.link_name} now offers other adapters than before; start the run again")
        self._schema = schema
        return welcome

    def same_run(self, incarnation: str) -> bool:
        """Whether the remote parties still hold the run of a resume token; the first of them may be another one."""
        mine = self.welcome.incarnation
        return mine == incarnation or (self._replaceable and mine[TOKEN:] == incarnation[TOKEN:] != "")

    @property
    def _width(self) -> int:
        return int(self.part.whole.hidden_size)

    @property
    def trainable(self) -> int:
        """Parameters that the remote stages train for this run."""
        return sum(math.prod(shape) for shape in self.welcome.adapter.values())

    def ask(self, message: Message) -> Message:
        """The Handler of the client's model: the link, and what to do when a remote party lost the run's state."""
        if self._closed:
            raise ConfigError("this model was closed; load it again")
        if self._lost:
            raise SessionLost(self._lost)
        try:
            return self.link(message)
        except SessionLost:
            welcome = self.link(self.hello())
            try:
                further = self._reconnected(welcome)
            except SessionLost as error:
                self._lost = str(error)  # a step sent again must not begin the new, empty run there
                raise
            for more in further:
                self.link(more)
            raise

    def _reconnected(self, answer: Message) -> Iterable[Message]:
        """Check that the remote parties still hold this run; returns what sets it right. Raises SessionLost."""
        welcome = self._accepted(answer)
        if welcome.incarnation == self.welcome.incarnation:
            return ()
        if self.same_run(welcome.incarnation):
            return self._resend(welcome)
        steps = self.span.steps
        if self._pushed is not None and self._pushed[1] == steps.applied and steps.idle:
            self._enter(welcome)
            return (Message(Push(step=self._pushed[1]), self._pushed[0]),)
        if steps.applied or not steps.idle:
            raise SessionLost(
                f"{self.link_name} was restarted and lost the adapter that it was training (after step "
                f"{self.span.steps.applied}); continue from the last checkpoint with `noren train --resume`"
            )
        self._enter(welcome)
        return ()

    def _resend(self, welcome: Welcome) -> Iterator[Message]:
        """What another party must be sent again. Only when it has answered all of it is it the one to come back to."""
        if isinstance(self.link, AnyOf):
            yield from self.link.sent.after(welcome.step)
        self._enter(welcome)

    @property
    def link_name(self) -> str:
        """Where the first remote party is."""
        return getattr(self.link, "address", "the server")

    def _add_adapters(self, lora: Lora) -> None:
        """Put the client's own adapter into its model, and the handle of the remote ones."""
        run = self.document.run
        self.hf.requires_grad_(False)
        if fitness.shares_blocks(self.part.config):
            raise ModelError("this architecture's layers share their weights across the cut: it cannot be trained here")
        if lora.trained_by(self.part.party):
            heads = new_heads(self.part, self.hf) if self.part.plan.u_shaped else set()
            adapters.inject(self.hf, lora, self.part.party, self.part.config.model_type, ADAPTER, run.seed, heads)
            own = (self.whole_name(name) for name, _ in adapters.adapter_parameters(self.hf, ADAPTER))
            self.policy.check_own_adapter(own)
        if self.trainable:
            self.span.train_remote()
            self.span.steps.applied = self.welcome.step
        if run.together.ends:
            self._own = {name: list(tensor.shape) for name, tensor in self.own_state().items()}
            self._schema = None
            self._enter(self._greet())

    def whole_name(self, name: str) -> str:
        """Translate a parameter name of the client's model to the whole model's name."""
        return whole_name(self.part.plan, name)

    def own_state(self) -> dict[str, Tensor]:
        """Return copies of the client's own adapters, under the whole model's names."""
        return adapters.adapter_state(self.hf, ADAPTER, self.whole_name)

    def set_own_state(self, tensors: dict[str, Tensor]) -> None:
        """Set them."""
        adapters.load_state(self.hf, ADAPTER, self.whole_name, tensors)

    def adapter_state(self) -> dict[str, Tensor]:
        """The adapters of all parties, under the whole model's names."""
        own = self.own_state()
        remote = self.pull(optimizer=False)
        if twice := own.keys() & remote.keys():
            raise ProtocolError(f"the peer answers for {min(twice)!r}, which is the client's own")
        return own | remote

    def pull(self, *, optimizer: bool) -> dict[str, Tensor]:
        """Return the remote adapters under the whole model's names, with `optimizer` also its moments."""
        if not self.trainable:
            return {}
        self.span.flush()
        reply = self.link(Message(Pull(optimizer=optimizer)))
        if not isinstance(reply.meta, State):
            raise ProtocolError(f"the peer answered a pull with {reply.kind!r}")
        for name, tensor in reply.tensors.items():
            if not tensor.is_floating_point() or not bool(torch.isfinite(tensor).all()):
                raise ProtocolError(f"the peer's adapter tensor {name[:80]!r} is not finite")
        return dict(reply.tensors)

    def push(self, tensors: Mapping[str, Tensor], step: int) -> None:
        """Set the remote adapters as `pull` gave them, as those after `step` steps."""
        if self.trainable:
            if not isinstance(self.link(Message(Push(step=step), tensors)).meta, Done):
                raise ProtocolError("the peer did not confirm new adapters")
            self.span.steps.restart(step)
            self._lost = ""
            self._pushed = (dict(tensors), step)

    def save_adapter(self, folder: Path) -> Path:
        """Write the adapters of all parties as one PEFT folder for the whole model."""
        if self.lora is None:
            raise ConfigError("this run has no [adapter], so there is nothing to save")
        task, base = self.document.run.task, self.part.location
        state = self.adapter_state()
        heads = {tail_module(name) for name in state if ".lora_" not in name}
        peft_folder.save_folder(folder, state, self.lora, task=task, base=base, heads=heads)
        return folder

    def load_adapter(self, folder: Path) -> None:
        """Set the adapters of all parties from a PEFT folder, as it was made here or by PEFT itself."""
        if self.lora is None:
            raise ConfigError(f"{folder}: the run document needs an [adapter] that fits the folder's")
        state, made = peft_folder.load_folder(folder), peft_folder.load_settings(folder)
        if (made.r, made.alpha) != (self.lora.r, self.lora.alpha):
            raise ConfigError(
                f"{folder} was made with r = {made.r}, alpha = {made.alpha:g}; [adapter] of the run document says "
                f"r = {self.lora.r}, alpha = {self.lora.alpha:g}"
            )
        own = {self.whole_name(n) for n, _ in adapters.adapter_parameters(self.hf, ADAPTER)}
        if odd := state.keys() ^ (own | self.pull(optimizer=False).keys()):
            raise ConfigError(
                f"{folder} and [adapter] of the run document adapt different modules, e.g. {min(odd)!r}; "
                "set targets and parties as they were when the folder was made"
            )
        mine = {name: tensor for name, tensor in state.items() if name in own}
        adapters.load_state(self.hf, ADAPTER, self.whole_name, mine)
        self.push({name: tensor for name, tensor in state.items() if name not in own}, step=0)

    def remote(self) -> Remote:
        """What the training loop needs of the other parties."""
        return RemoteState(self)

    @property
    def traffic(self) -> Traffic:
        """What has crossed so far."""
        return self.link.traffic

    def close(self) -> None:
        """End the run at the remote parties, and the connection. Safe to call twice."""
        if self._closed:
            return
        if isinstance(self.link, GrpcLink | AnyOf):
            self.link.patience = 1.0
        try:
            self.span.close()
        except (ConfigError, LinkError, PeerError) as error:  # the first: its certificate has expired meanwhile
            log.warning("the run could not be ended at the server, which will end it by itself: %s", error)
        finally:
            self._closed = True
            self.link.close()


class Closing:
    """What a client's model can do beyond its transformers class: be closed, save and load adapters."""

    client: Client

    def __enter__(self) -> Any:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """End the model's sessions and adapters at the servers."""
        self.client.close()

    def save_adapter(self, folder: str | Path) -> Path:
        """Write the adapters of all parties as one PEFT folder for the whole model."""
        return self.client.save_adapter(Path(folder))

    @property
    def traffic(self) -> Traffic:
        """What has crossed so far."""
        return self.client.traffic
