"""Real `noren` processes that start at once: a process that has imported everything, and forks one for each command.

    with Zygote() as zygote:
        child = zygote.start(["serve", "run.toml", "--party", "server", "--json"], cwd=folder, stdout=folder / "out")
        print(child.first_line())
        child.stop()
        child.cont()
        child.kill()
        assert child.wait(timeout=10) == -signal.SIGKILL

A child is a process like one that was started from a shell: own session, own memory, no input, its output in files. It
shares what was imported (and Python's string hash seed), nothing else; no thread and no gRPC channel exists when it is
forked. Children end with the zygote, and the zygote with the process that made it, however that ends.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Self

from zygote_main import MODULES, MOST

SETTINGS = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
SETTINGS |= {"TRANSFORMERS_VERBOSITY": "error", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "TOKENIZERS_PARALLELISM": "false"}
SETTINGS |= {"GRPC_VERBOSITY": "NONE"}
"""What libraries read when they are imported, which is before a child's own environment is known."""
MAIN = Path(__file__).with_name("zygote_main.py")


class Child:
    """One process that the zygote has forked. Signals reach this very process or none, also when it has ended."""

    def __init__(self, pid: int, handle: int) -> None:
        self.pid, self.exit = pid, None  # type: tuple[int, int | None]
        self.started = time.monotonic()
        self._handle = handle
        self._ended = threading.Event()
        self._files: tuple[Path, Path] | None = None
        self._before = 0

    def send(self, number: int) -> None:
        """Send a signal; nothing happens if the process has ended."""
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self._handle, number)

    def kill(self) -> None:
        """End it with SIGKILL."""
        self.send(signal.SIGKILL)

    def terminate(self) -> None:
        """Ask it to end, with SIGTERM."""
        self.send(signal.SIGTERM)

    def stop(self) -> None:
        """Freeze it, with SIGSTOP."""
        self.send(signal.SIGSTOP)

    def cont(self) -> None:
        """Let it go on, with SIGCONT."""
        self.send(signal.SIGCONT)

    @property
    def alive(self) -> bool:
        """Whether it has not ended (it may be stopped)."""
        return not self._ended.is_set()

    def wait(self, timeout: float | None = None) -> int:
        """Wait until it has ended; returns its exit code, or minus the signal that ended it. Raises TimeoutError."""
        if not self._ended.wait(timeout):
            raise TimeoutError(f"process {self.pid} has not ended within {timeout} s")
        assert self.exit is not None
        return self.exit

    def output(self) -> str:
        """What it has written to its stdout so far (not what others wrote to that file before it)."""
        assert self._files is not None
        with open(self._files[0], "rb") as file:
            file.seek(self._before)
            return file.read().decode()

    def first_line(self, timeout: float = 30.0) -> str:
        """Wait for its first whole line. Raises RuntimeError if it ends before that, or TimeoutError."""
        end = time.monotonic() + timeout
        while True:
            ended = not self.alive
            line, newline, _ = self.output().partition("\n")
            if newline:
                return line
            assert self._files is not None
            if ended:
                said = self._files[1].read_text(errors="replace")[-2000:]
                raise RuntimeError(f"process {self.pid} ended with {self.exit} and without a word: {said}")
            if time.monotonic() > end:
                raise TimeoutError(f"process {self.pid} has written no line within {timeout} s")
            time.sleep(0.002)

    def writes_to(self, stdout: Path, stderr: Path, before: int) -> None:
        """Note the files of its output, and the size of the first when it started."""
        self._files, self._before = (stdout, stderr), before

    def ended(self, code: int) -> None:
        """Note how it has ended."""
        self.exit = code
        self._ended.set()

    def close(self) -> None:
        """Give the handle back, once it has ended."""
        os.close(self._handle)


class Zygote:
    """The process that forks, as a context manager. `env` is added to its environment before it imports `modules`.

    `pid` is its process, `seconds` how long the imports took. Raises RuntimeError if it ends by itself, cannot fork as
    it should, or says nothing for `patience` seconds.
    """

    def __init__(
        self, env: Mapping[str, str] | None = None, *, modules: Sequence[str] = MODULES, patience: float = 60.0
    ) -> None:
        self._env, self._patience = os.environ | SETTINGS | dict(env or {}), patience
        self._modules = tuple(modules)
        self._children: list[Child] = []
        self._answers: queue.SimpleQueue[Child | str] = queue.SimpleQueue()
        self._asking = threading.Lock()

    def __enter__(self) -> Self:
        self._line, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            words = [sys.executable, "-P", str(MAIN), str(theirs.fileno()), *self._modules]
            self._process = subprocess.Popen(
                words, env=self._env, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL
            )
        self.pid, start = self._process.pid, time.monotonic()
        self._listener = threading.Thread(target=self._listen, name="zygote-reports", daemon=True)
        self._listener.start()
        try:
            self._answer("ready")
            self.seconds = time.monotonic() - start
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *exc: object) -> None:
        """End the zygote, and with it all children."""
        self._line.shutdown(socket.SHUT_WR)
        try:
            self._process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._listener.join(timeout=10)
        self._line.close()
        for child in self._children:
            child.close()

    def start(
        self,
        argv: Sequence[str | Path],
        *,
        stdout: Path | str,
        stderr: Path | str | None = None,
        cwd: Path | str | None = None,
        env: Mapping[str, str] | None = None,
        netns: str | None = None,
    ) -> Child:
        """Run `noren` with these arguments in a new process, which adds its output to the end of the file `stdout`.

        `stderr`: another file (default: `stdout` with ".err" added to its name). `env` is added to the zygote's own.
        `netns`: the name of a network namespace to be in (root only). When this returns, the process is as it was
        asked for; RuntimeError says why it is not.
        """
        out = Path(stdout).absolute()
        err = Path(stderr).absolute() if stderr else out.with_name(f"{out.name}.err")
        job = {"argv": [str(word) for word in argv], "env": dict(env or {}), "netns": netns}
        job |= {"cwd": str(cwd or Path.cwd()), "stdout": str(out), "stderr": str(err)}
        if len(words := json.dumps(job).encode()) > MOST:
            raise ValueError(
                f"start: {len(words)} bytes of arguments and environment; at most {MOST} can be handed over"
            )
        out.touch()
        before = out.stat().st_size
        with self._asking:
            try:
                self._line.sendall(words)
            except OSError as error:
                raise RuntimeError(f"the zygote has ended: {error}") from error
            child = self._answer("child")
        assert isinstance(child, Child)
        child.writes_to(out, err, before)
        return child

    def _answer(self, wanted: str) -> Child | str:
        try:
            answer = self._answers.get(timeout=self._patience)
        except queue.Empty:
            raise RuntimeError(f"the zygote has said nothing for {self._patience:.0f} s") from None
        if isinstance(answer, str) and answer != wanted:
            raise RuntimeError(f"the zygote: {answer}")
        return answer

    def _listen(self) -> None:
        """Take the zygote's reports, in a thread, until it is gone."""
        living: dict[int, Child] = {}
        with contextlib.suppress(OSError):
            while True:
                words, handles, _, _ = socket.recv_fds(self._line, MOST, 1, socket.MSG_CMSG_CLOEXEC)
                if not words:
                    break
                report = json.loads(words)
                if handles:
                    living[report["pid"]] = child = Child(report["pid"], handles[0])
                    self._children.append(child)
                    self._answers.put(report["says"] or child)
                elif "exit" in report:
                    living.pop(report["pid"]).ended(report["exit"])
                else:
                    self._answers.put(report["says"])
        for child in living.values():
            child.ended(-signal.SIGKILL)  # it was ended with the zygote, whoever did that
        self._answers.put("it has ended")
