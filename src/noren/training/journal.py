"""A client's own state after every step, so that a run which was killed goes on from the step it was in."""

from __future__ import annotations

import base64
import json
from dataclasses import dataclass
from typing import Any

from safetensors.torch import load, save
from torch import Tensor

from noren.wire.journal import Draft, Journal

KEY = "state"


@dataclass(frozen=True)
class Kept:
    """The state after a step: words and tensors of the loop, and where the remote parties stood."""

    words: dict[str, Any]
    tensors: dict[str, Tensor]
    position: bytes


class StepJournal:
    """The state of one run in a journal."""

    def __init__(self, journal: Journal, run: str) -> None:
        self._journal, self._run = journal, run

    def __str__(self) -> str:
        return f"{self._journal.folder} (run {self._run!r})"

    def read(self) -> Kept | None:
        """Return what was kept last, None if nothing was."""
        found = self._journal.read(self._run, KEY)
        if found is None:
            return None
        words = json.loads(found.words)
        return Kept(words["loop"], load(found.body or b""), base64.b64decode(words["position"]))

    def write(self, kept: Kept, *, restarted: bool) -> None:
        """Keep a state; with `restarted`, what was sent in the steps after it is dropped: those will be others."""
        words = {"loop": kept.words, "position": base64.b64encode(kept.position).decode()}
        drop = [key for key in self._journal.keys(self._run) if key.startswith("sent/")] if restarted else []
        self._journal.write(self._run, {KEY: Draft(json.dumps(words).encode(), save(kept.tensors))}, drop=drop)
