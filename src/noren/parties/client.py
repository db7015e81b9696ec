"""The party that owns the data: its model, its line to the others, its adapters.

`load` is the one way in. What it returns is an ordinary transformers model that can also be closed.
"""

from __future__ import annotations

import json
import logging
import uuid
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import msgspec
import torch
from torch import Tensor

from noren.adapters import checkpoint as peft_folder
from noren.adapters import lora as adapters
from noren.adapters.lora import Lora
from noren.config import Document
from noren.errors import ConfigError, LinkError, ModelError, PeerError, ProtocolError, SessionLost
from noren.parties import fitness
from noren.parties.labels import set_labels
from noren.partition.blocks import tail_module
from noren.partition.client import build_client, remote_span, whole_name
from noren.partition.remote import RemoteSpan
from noren.partition.stage import Slice, new_heads, open_slice
from noren.training.loop import Remote
from noren.types import PROTOCOL, Close, Done, Handler, Hello, Message, Pull, Push, State, Welcome
from noren.wire.grpc_link import GrpcLink
from noren.wire.identity import Credentials
from noren.wire.local import LocalLink
from noren.wire.traffic import Traffic

ADAPTER = "default"
log = logging.getLogger("noren.client")


def pick_device(wanted: str) -> torch.device:
    """Return the device that a document asks for; "auto" is a GPU if there is one. Raises ConfigError."""
    if wanted == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.empty(0, device=wanted).device
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"device {wanted!r} cannot be used here: {str(error).splitlines()[0]}") from error


def credentials_for(document: Document, party: str) -> Credentials:
    """Return the certificate that a party of the run presents."""
    folder, name = document.path(document.run.keys.dir), document.run.keys.name or party
    return Credentials(ca=folder / "ca.crt", certificate=folder / f"{name}.crt", key=folder / f"{name}.key")


def load(
    source: str | Path, *, adapter: str | Path | None = None, handler: Handler | None = None, **fields: Any
) -> Any:
    """Return the client's model, connected: an object of transformers' own class for the architecture and task.

    Args:
        source: a run document (`*.toml`), or a model (folder, hub id, URL, "embedded").
        adapter: a PEFT folder to load into all parties' layers.
        handler: answers in place of the network (a `LocalLink` to a server in this process).
        fields: with a model as source, the fields of a run document: plan, links, keys, task, dtype, ...; with a
            document, fields that replace its own.

    `with` (or `close()`) ends its sessions at the servers. Raises ConfigError, ModelError, UnfitModel, LinkError,
    or PeerError.
    """
    text = str(source)
    if text.endswith(".toml"):
        document = Document.read(Path(text))
        if fields:
            values = msgspec.to_builtins(document.run) | fields
            document = Document.of({k: v for k, v in values.items() if v is not None}, document.base)
    else:
        document = Document.of({"model": text, **fields}, Path.cwd())
    return connect(document, Path(adapter) if adapter is not None else None, handler).model


def connect(document: Document, adapter: Path | None = None, handler: Handler | None = None) -> Client:
    """Return a client under a run name of its own, so that a training run of the same document is left alone.

    `adapter` is a PEFT folder to load; a classifier's labels are read from `labels.json` beside it, if there.
    """
    name = f"{document.run.name[:40]}.use-{uuid.uuid4().hex[:12]}"
    labels = None
    if adapter is not None and (named := adapter.resolve().parent / "labels.json").is_file():
        labels = json.loads(named.read_text(encoding="utf-8"))
    own = Document(msgspec.structs.replace(document.run, name=name), document.base)
    client = Client(own, handler, labels=labels)
    if adapter is not None:
        try:
            client.load_adapter(adapter)
        except BaseException:
            client.close()
            raise
    return client


class Client:
    """The client of one run. `model` is the transformers model, `link` its line to the first remote party."""

    def __init__(
        self,
        document: Document,
        handler: Handler | None = None,
        *,
        labels: list[str] | None = None,
        pad_id: int | None = None,
    ) -> None:
        run = document.run
        self.document, self.lora = document, run.adapter
        self.part = open_slice(document.model, run.plan, None, run.task)
        fitness.require(self.part.whole, run.task, self.part.location)
        if labels:
            set_labels(self.part, labels, pad_id)
        self._closed = False
        self._pushed: tuple[dict[str, Tensor], int] | None = None
        device = pick_device(run.device)
        self.link = self._connect(handler)
        self.welcome = self._greet()
        try:
            self._build(device)
        except BaseException:
            self._abandon()
            raise

    def _build(self, device: torch.device) -> None:
        """Build the model around the connection."""
        run = self.document.run
        self.hf = build_client(self.part, self.ask, getattr(torch, run.dtype), run.seed).to(device)
        self.span: RemoteSpan = remote_span(self.hf)
        if self.lora is not None:
            self._add_adapters(self.lora)
        else:
            self.hf.requires_grad_(False)
        self.hf.__class__ = type(type(self.hf).__name__, (Closing, type(self.hf)), {"client": self})
        self.model: Any = self.hf

    def _abandon(self) -> None:
        """Leave nothing at the server of a client that could not be built."""
        with suppress(LinkError, PeerError):
            self.link(Message(Close()))
        self.link.close()

    def _connect(self, handler: Handler | None) -> GrpcLink | LocalLink:
        if handler is not None:
            return LocalLink(handler)
        party = self.part.plan.remote[0].party
        address = self.document.run.links.get(party)
        if address is None:
            raise ConfigError(f'links: no address for the party {party!r}; add `{party} = "host:port"` under [links]')
        credentials = credentials_for(self.document, self.part.party)
        return GrpcLink(address, credentials, greet=self.hello, greeted=self._reconnected)

    def hello(self) -> Message:
        """The handshake's first message: what this client was set up for."""
        run = self.document.run
        return Message(
            Hello(
                protocol=PROTOCOL,
                run=run.name,
                fingerprint=self.part.fingerprint,
                plan=self.part.plan.lines(),
                task=run.task,
                dtype=run.dtype,
                lora=self.lora.canonical() if self.lora else "",
                seed=run.seed,
            )
        )

    def _greet(self) -> Welcome:
        answer = self.link(self.hello()).meta
        if not isinstance(answer, Welcome):
            raise ProtocolError(f"the peer answered a hello with {type(answer).__name__}")
        return answer

    def ask(self, message: Message) -> Message:
        """The Handler of the client's model: the link, and what to do when a party beyond it lost the run's state."""
        if self._closed:
            raise ConfigError("this model was closed; load it again")
        try:
            return self.link(message)
        except SessionLost:
            for more in self._reconnected(self.link(self.hello())):
                self.link(more)
            raise

    def _reconnected(self, answer: Message) -> tuple[Message, ...]:
        """Check that the remote parties still hold this run; returns what sets it right. Raises SessionLost."""
        welcome = answer.meta
        assert isinstance(welcome, Welcome)
        if welcome.incarnation == self.welcome.incarnation:
            return ()
        steps = self.span.steps
        if self._pushed is not None and self._pushed[1] == steps.applied and steps.idle:
            self.welcome = welcome
            return (Message(Push(step=self._pushed[1]), self._pushed[0]),)
        if steps.applied or not steps.idle:
            raise SessionLost(
                f"{self.link_name} was restarted and lost the adapter that it was training (after step "
                f"{self.span.steps.applied}); continue from the last checkpoint with `noren train --resume`"
            )
        self.welcome = welcome
        return ()

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
        if self.welcome.trainable:
            self.span.train_remote()
            self.span.steps.applied = self.welcome.step

    def whole_name(self, name: str) -> str:
        """Translate a parameter name of the client's model to the whole model's name."""
        return whole_name(self.part.plan, name)

    def adapter_state(self) -> dict[str, Tensor]:
        """The adapters of all parties, under the whole model's names."""
        own = adapters.adapter_state(self.hf, ADAPTER, self.whole_name)
        remote = self._pull(optimizer=False)
        if twice := own.keys() & remote.keys():
            raise ProtocolError(f"the peer answers for {min(twice)!r}, which is the client's own")
        return own | remote

    def _pull(self, *, optimizer: bool) -> dict[str, Tensor]:
        if not self.welcome.trainable:
            return {}
        self.span.flush()
        reply = self.link(Message(Pull(optimizer=optimizer)))
        if not isinstance(reply.meta, State):
            raise ProtocolError(f"the peer answered a pull with {reply.kind!r}")
        for name, tensor in reply.tensors.items():
            if not tensor.is_floating_point() or not bool(torch.isfinite(tensor).all()):
                raise ProtocolError(f"the peer's adapter tensor {name[:80]!r} is not finite")
        return dict(reply.tensors)

    def _push(self, tensors: Mapping[str, Tensor], step: int) -> None:
        if self.welcome.trainable:
            if not isinstance(self.link(Message(Push(step=step), tensors)).meta, Done):
                raise ProtocolError("the peer did not confirm new adapters")
            self.span.steps.restart(step)
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
        if odd := state.keys() ^ (own | self._pull(optimizer=False).keys()):
            raise ConfigError(
                f"{folder} and [adapter] of the run document adapt different modules, e.g. {min(odd)!r}; "
                "set targets and parties as they were when the folder was made"
            )
        mine = {name: tensor for name, tensor in state.items() if name in own}
        adapters.load_state(self.hf, ADAPTER, self.whole_name, mine)
        self._push({name: tensor for name, tensor in state.items() if name not in own}, step=0)

    def remote(self) -> Remote:
        """What the training loop needs of the other parties."""
        return _RemoteState(self)

    @property
    def traffic(self) -> Traffic:
        """What has crossed so far."""
        return self.link.traffic

    def close(self) -> None:
        """End the run at the remote parties, and the connection. Safe to call twice."""
        if self._closed:
            return
        if isinstance(self.link, GrpcLink):
            self.link.patience = 1.0
        try:
            self.span.close()
        except (LinkError, PeerError) as error:
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


class _RemoteState(Remote):
    def __init__(self, client: Client) -> None:
        self._client = client

    def pull(self) -> dict[str, Tensor]:
        return self._client._pull(optimizer=True)

    def push(self, tensors: dict[str, Tensor], step: int) -> None:
        self._client._push(tensors, step)

    def flush(self) -> None:
        self._client.span.flush()


__all__ = ["Client", "Closing", "Slice", "credentials_for", "load", "pick_device"]
