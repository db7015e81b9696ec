"""`load`: the one way in. What it returns is an ordinary transformers model that can also be closed."""

from __future__ import annotations

import json
import uuid
from pathlib import Path
from typing import Any

import msgspec

from noren.config import Document
from noren.parties.client import Client
from noren.types import Handler


def load(
    source: str | Path,
    *,
    adapter: str | Path | None = None,
    handler: Handler | None = None,
    insecure: bool = False,
    **fields: Any,
) -> Any:
    """Return the client's model, connected: an object of transformers' own class for the architecture and task.

    Args:
        source: a run document (`*.toml`), or a model (folder, hub id, URL, "embedded").
        adapter: a PEFT folder to load into all parties' layers.
        handler: answers in place of the network (a `LocalLink` to a server in this process).
        insecure: connect in plain text, without certificates; a warning is printed every time.
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
    return connect(document, Path(adapter) if adapter is not None else None, handler, insecure=insecure).model


def connect(
    document: Document, adapter: Path | None = None, handler: Handler | None = None, *, insecure: bool = False
) -> Client:
    """Return a client under a run name of its own, so that a training run of the same document is left alone.

    `adapter` is a PEFT folder to load; a classifier's labels are read from `labels.json` beside it, if there.
    """
    name = f"{document.run.name[:40]}.use-{uuid.uuid4().hex[:12]}"
    labels = None
    if adapter is not None and (named := adapter.resolve().parent / "labels.json").is_file():
        labels = json.loads(named.read_text(encoding="utf-8"))
    own = Document(msgspec.structs.replace(document.run, name=name), document.base)
    client = Client(own, handler, labels=labels, insecure=insecure)
    if adapter is not None:
        try:
            client.load_adapter(adapter)
        except BaseException:
            client.close()
            raise
    return client
