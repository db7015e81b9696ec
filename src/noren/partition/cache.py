"""The remote layers' place in the client's cache: what was sent, and how many columns there are."""

from __future__ import annotations

import copy
import uuid
import weakref
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin, DummyLayer

from noren.errors import SessionLost


class History:
    """What a session has sent: hidden states [B, S, d] with the mask of its real tokens [B, S]."""

    def __init__(self) -> None:
        self._states: Tensor | None = None
        self._real: Tensor | None = None
        self.length = 0

    def append(self, states: Tensor, real: Tensor, start: int) -> None:
        """Drop what lies at or after column `start`, then add states [B, T, d] and real [B, T]."""
        end = start + states.shape[1]
        if self._states is None or self._real is None or self._states.shape[1] < end or start == 0:
            room = max(end, 2 * start if start else end)
            grown = states.new_zeros(states.shape[0], room, states.shape[2])
            mask = torch.zeros(states.shape[0], room, dtype=torch.bool, device=states.device)
            if start and self._states is not None and self._real is not None:
                grown[:, :start], mask[:, :start] = self._states[:, :start], self._real[:, :start]
            self._states, self._real = grown, mask
        self._states[:, start:end], self._real[:, start:end] = states, real
        self.length = end

    def reorder(self, rows: Tensor) -> None:
        """Reorder (or repeat, or drop) the sequences."""
        if self._states is not None and self._real is not None:
            self._states, self._real = self._states[rows], self._real[rows]

    def all(self) -> tuple[Tensor, Tensor]:
        """Return (states [B, S, d], real [B, S])."""
        if self._states is None or self._real is None:
            raise SessionLost("nothing was sent in this session, so it cannot be replayed")
        return self._states[:, : self.length], self._real[:, : self.length]


class RemoteLayer(DummyLayer, CacheLayerMixin):
    """The remote layers' place in the client's cache: counts positions and holds no keys or values.

    It must look like a dummy, or masks would be sized on it; and must not look compileable, or `generate` would build
    4-D masks.
    """

    is_compileable = False
    is_croppable = True
    is_sliding = False

    def __init__(self, ended: list[str]) -> None:
        DummyLayer.__init__(self)
        self._ended = ended  # sessions that are over; the span tells the server with its next message
        self._begin()

    def _begin(self) -> None:
        self.session = uuid.uuid4().hex
        self.history = History()
        self.columns: list[bool] = []  # one a column of the client's batch: does it hold a real token?
        self.rows: Tensor | None = None
        self._finalizer = weakref.finalize(self, self._ended.append, self.session)

    @property
    def length(self) -> int:
        """Columns in the client's cache."""
        return len(self.columns)

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing to prepare: the layer holds no tensors."""

    def get_seq_length(self) -> int:
        """Columns that were sent so far."""
        return self.length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return (length, offset) of the mask over this layer."""
        return self.length + query_length, 0

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last columns: -n as transformers calls it now."""
        if tokens_to_remove:
            del self.columns[-abs(tokens_to_remove) :]

    def reset(self) -> None:
        """Start over as a new session."""
        self._finalizer()
        self._begin()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Remember the new order of sequences; it travels with the next message."""
        self.rows = beam_idx if self.rows is None else self.rows[beam_idx.to(self.rows.device)]

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep only some sequences."""
        self.reorder_cache(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each sequence."""
        if self.length:
            count = len(self.rows) if self.rows is not None else len(self.history.all()[0])
            self.reorder_cache(torch.arange(count).repeat_interleave(repeats))

    def __deepcopy__(self, memo: dict[int, Any]) -> RemoteLayer:
        """A copied cache is a session of its own; the server is refilled from the copied history."""
        twin = RemoteLayer(self._ended)
        twin.history, twin.columns = copy.deepcopy(self.history, memo), list(self.columns)
        twin.rows = copy.deepcopy(self.rows, memo)
        return twin
