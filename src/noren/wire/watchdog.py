"""One thread that ends what takes too long: requests at a client, half-sent messages at a server."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable


class Watchdog:
    """Calls back once a limit has passed, to within a quarter of a second. The clock is monotonic."""

    def __init__(self, period: float = 0.25) -> None:
        self._period = period
        self._limits: dict[int, tuple[float, Callable[[], None]]] = {}
        self._numbers = itertools.count()
        self._wake = threading.Event()
        self._thread: threading.Thread | None = None
        self._lock = threading.Lock()

    def begin(self, seconds: float, expired: Callable[[], None]) -> int:
        """Call `expired` unless `end` is called, with the number that this returns, within `seconds`."""
        number = next(self._numbers)
        self._limits[number] = (time.monotonic() + seconds, expired)
        if not self._wake.is_set():
            self._start()
        return number

    def end(self, number: int) -> None:
        """It has ended in time. Safe to call after it has expired."""
        self._limits.pop(number, None)

    def _start(self) -> None:
        with self._lock:
            if self._thread is None or not self._thread.is_alive():
                self._thread = threading.Thread(target=self._run, name="noren-watchdog", daemon=True)
                self._thread.start()
        self._wake.set()

    def _run(self) -> None:
        while True:
            self._wake.wait()
            time.sleep(self._period)
            if not self._limits:
                self._wake.clear()
                if not self._limits:
                    continue
                self._wake.set()
            now = time.monotonic()
            for number, (end, expired) in list(self._limits.items()):
                if end <= now and self._limits.pop(number, None) is not None:
                    expired()


WATCHDOG = Watchdog()
