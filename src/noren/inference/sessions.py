"""The KV caches that a stage holds for its clients, one a session.

A session has an owner, counts against that owner's byte budget and expires when it is not used. A step says where it
starts: the cache is cropped there, then appended to, so that a repeated step, rejected drafts and a replay are one
rule. What cannot be restored is a `SessionLost`, and the client sends the session again from its beginning.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import DynamicCache

from noren.errors import OverBudget, ProtocolError, SessionLost
from noren.partition.stage import Frame, Stage

Key = tuple[str, str, str]
"""(owner, run, session)."""


@dataclass
class Session:
    """One sequence batch in progress: its cache, the mask over its columns, and when it was last used."""

    cache: DynamicCache
    mask: Tensor  # [B, S]
    last_columns: int = 0
    used: float = 0.0
    nbytes: int = 0


class Sessions:
    """All sessions of one stage."""

    def __init__(
        self,
        stage: Stage,
        *,
        bytes_per_owner: int,
        seconds: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._stage, self._limit, self._seconds, self._clock = stage, bytes_per_owner, seconds, clock
        self._sessions: dict[Key, Session] = {}

    def __len__(self) -> int:
        return len(self._sessions)

    def nbytes(self, owner: str | None = None) -> int:
        """Bytes of keys and values held, of one owner or of all."""
        return sum(s.nbytes for key, s in list(self._sessions.items()) if owner in (None, key[0]))

    @torch.inference_mode()
    def step(self, key: Key, frame: Frame, start: int, rows: list[int] | None) -> Tensor:
        """Append a frame at column `start`: returns the stage's output, padded.

        Raises SessionLost if the session cannot be put at `start`, OverBudget if the owner holds too much.
        """
        self.expire()
        if rows is not None and len(rows) != len(frame.lengths):
            raise ProtocolError(f"rows name {len(rows)} sequences, the step has {len(frame.lengths)}")
        session = self._begin(frame) if start == 0 else self._resume(key, start, rows)
        if len(session.mask) != len(frame.lengths):
            self._sessions.pop(key, None)
            raise ProtocolError(f"the session has {len(session.mask)} sequences, the step has {len(frame.lengths)}")
        self._sessions.pop(key, None)  # a step that fails half-way leaves no half-filled cache behind
        mask = torch.cat([session.mask, frame.real], 1)
        out = self._stage(frame.padded(), mask, session.cache, frame.positions, frame.keep)
        session.mask, session.last_columns, session.used = mask, frame.real.shape[1], self._clock()
        session.nbytes = cache_bytes(session.cache)
        self._make_room(key[0], session.nbytes)
        self._sessions[key] = session
        return out

    def _begin(self, frame: Frame) -> Session:
        empty = frame.real.new_zeros(len(frame.lengths), 0)
        return Session(self._stage.new_cache(), empty)

    def _resume(self, key: Key, start: int, rows: list[int] | None) -> Session:
        session = self._sessions.get(key)
        if session is None:
            raise SessionLost("no such session here (restarted, expired or evicted); send it again from its beginning")
        extra = session.mask.shape[1] - start
        cache = session.cache
        too_deep = extra > session.last_columns and any(cache.is_sliding)
        if extra < 0 or (extra and (rows is not None or not cache.is_croppable or too_deep)):
            raise SessionLost(f"the session holds {session.mask.shape[1]} columns and cannot be put back to {start}")
        cache.crop(-extra)
        session.mask = session.mask[:, :start]
        if rows is not None:
            if not rows or not 0 <= min(rows) <= max(rows) < len(session.mask):
                raise ProtocolError(f"rows {rows[:8]} are not among the session's {len(session.mask)} sequences")
            self._check_growth(session, len(rows))
            order = torch.tensor(rows, device=session.mask.device)
            cache.reorder_cache(order)
            session.mask = session.mask[order]
        return session

    def _check_growth(self, session: Session, rows: int) -> None:
        """Raise OverBudget before a session of repeated sequences would take more than one owner may have."""
        grown = session.nbytes // max(len(session.mask), 1) * rows
        if grown > self._limit:
            raise OverBudget(f"{rows} sequences would need {grown} bytes of cache, the limit is {self._limit}")

    def _make_room(self, owner: str, wanted: int) -> None:
        if wanted > self._limit:
            raise OverBudget(f"this session needs {wanted} bytes of cache, the limit for one owner is {self._limit}")
        mine = sorted((s.used, key) for key, s in self._sessions.items() if key[0] == owner)
        for _, key in mine:
            if self.nbytes(owner) + wanted <= self._limit:
                return
            del self._sessions[key]  # its client sends it again if it still needs it

    def expire(self) -> None:
        """Drop sessions that were not used for too long."""
        oldest = self._clock() - self._seconds
        for key in [key for key, s in self._sessions.items() if s.used < oldest]:
            del self._sessions[key]

    def end(self, owner: str, run: str, session: str | None = None) -> None:
        """Drop one session, or all of a run."""
        if session is not None:
            self._sessions.pop((owner, run, session), None)
            return
        for key in [key for key in self._sessions if key[:2] == (owner, run)]:
            del self._sessions[key]


def cache_bytes(cache: DynamicCache) -> int:
    """Return the bytes that a cache holds."""
    total = 0
    for layer in cache.layers:
        for value in vars(layer).values():
            for tensor in value.values() if isinstance(value, dict) else (value,):
                total += tensor.nbytes if isinstance(tensor, Tensor) else 0
    return total
