"""Locks by key: whoever holds one keeps out those who want the same key, and nobody else."""

from __future__ import annotations

import threading
from collections.abc import Hashable, Iterator
from contextlib import contextmanager


class Alone:
    """`with alone(key):` is in one thread at a time for each key. A lock is kept while somebody holds or awaits it."""

    def __init__(self) -> None:
        self._table = threading.Lock()
        self._locks: dict[Hashable, tuple[threading.Lock, int]] = {}

    @contextmanager
    def __call__(self, key: Hashable) -> Iterator[None]:
        """Hold the lock of a key."""
        with self._table:
            lock, users = self._locks.get(key, (threading.Lock(), 0))
            self._locks[key] = lock, users + 1
        try:
            with lock:
                yield
        finally:
            with self._table:
                lock, users = self._locks.pop(key)
                if users > 1:
                    self._locks[key] = lock, users - 1
