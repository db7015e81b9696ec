"""The process that is killed: it commits steps to a journal, and says which of them were acknowledged.

    python crash_worker.py FOLDER STEPS [STOP]

It goes on from the step that it finds. What it says, a line each: `found N` when it opened, `ack N` after the write of
step N returned, and `refused CLASS` when a journal's own error was raised, after which it makes sure that the step
before is still there, and tries again; at the STOP-th refusal it ends instead, as a crash would (0: never).
Anything else that is raised ends it with status 1.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from pathlib import Path

from noren.errors import ModelError, OverBudget
from noren.wire.journal import Draft, Journal, Record

RUN = "a run"
SIZE = 200_000
REFUSED = 3
"""The status with which it stops at a refusal."""

MOST_REFUSALS = 3


def body(step: int, name: str) -> bytes:
    """The bytes that step `step` keeps under `name`; those named "fixed" are the same at every step."""
    return hashlib.shake_128(f"{0 if name == 'fixed' else step} {name}".encode()).digest(SIZE)


def commit(journal: Journal, step: int) -> None:
    """One transaction: three bodies (one new in pieces, one that is there already), words, and a key that goes."""
    words = json.dumps({"step": step}).encode()
    state = memoryview(body(step, "state"))
    puts: dict[str, Record | Draft] = {
        "state": Draft(words, [state[:7], state[7:]]),
        "fixed": Record(words, body(step, "fixed")),
        "words": Record(words),
        f"reply {step}": Record(words, body(step, "reply")),
    }
    journal.write(RUN, puts, drop=[f"reply {step - 1}"])


def found(journal: Journal) -> int:
    """Return the step that a journal holds, 0 for none. Raises AssertionError if it holds no whole step."""
    keys = journal.keys(RUN)
    if not keys:
        assert journal.runs() == [] and journal.used == 0, "no keys, and yet something is there"
        return 0
    records = {key: journal.read(RUN, key) for key in keys}
    steps = {json.loads(record.words)["step"] for record in records.values() if record is not None}
    assert len(steps) == 1, f"records of steps {sorted(steps)} side by side"
    step = int(steps.pop())
    assert set(keys) == {"state", "fixed", "words", f"reply {step}"}, f"step {step} has the keys {keys}"
    for key, record in records.items():
        name = key.split()[0]
        assert record is not None and record.body == (None if name == "words" else body(step, name)), f"{key} is torn"
    assert journal.used == 3 * SIZE, f"{journal.used} bytes"
    return step


def say(line: str) -> None:
    """Print a line in one system call."""
    os.write(1, f"{line}\n".encode())


def refused(error: Exception, refusals: int, stop: int) -> None:
    """Say that the journal refused; at the `stop`-th time, end here without closing anything."""
    say(f"refused {type(error).__name__}")
    if refusals == stop:
        os._exit(REFUSED)
    assert refusals < MOST_REFUSALS, f"{refusals} refusals: {error}"


def main(folder: Path, steps: int, stop: int) -> None:
    """Commit up to `steps` steps; when the journal refuses, try again."""
    refusals = 0
    while True:
        try:
            with Journal(folder) as journal:
                step = found(journal) + 1
                say(f"found {step - 1}")
                while step <= steps:
                    try:
                        commit(journal, step)
                    except (ModelError, OverBudget) as error:
                        refusals += 1
                        refused(error, refusals, stop)
                        assert found(journal) == step - 1, "an error, and yet the step is there"
                    else:
                        say(f"ack {step}")
                        step += 1
            return
        except (ModelError, OverBudget) as error:  # at opening, or while reading
            refusals += 1
            refused(error, refusals, stop)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]) if sys.argv[3:] else 0)
