"""Where a model is: a local folder, any HTTP server, or the Hugging Face hub."""

from __future__ import annotations

from pathlib import Path

from noren.errors import ModelError
from noren.partition.checkpoint import Checkpoint, FolderCheckpoint
from noren.partition.remote_files import HttpCheckpoint, open_hub


def open_checkpoint(model: str | Path, revision: str | None = None) -> Checkpoint:
    """Open a model folder, an http(s) URL of one, or a hub id. Raises ModelError if there is no such thing."""
    text = str(model)
    if text.startswith(("http://", "https://")):
        return HttpCheckpoint(text)
    path = Path(text).expanduser()
    if path.is_dir():
        return FolderCheckpoint(path)
    if path.exists() or text.startswith((".", "/", "~")) or text.count("/") > 1:
        raise ModelError(f"{text}: no such model folder (a hub id looks like 'owner/name')")
    return open_hub(text, revision)
