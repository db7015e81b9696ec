"""The process behind `zygote.py`: imports, then forks a child for each request that comes over a socket.

Run as `python zygote_main.py FILE_NUMBER_OF_THE_SOCKET MODULE...`. Requests and reports are JSON.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import json
import os
import pkgutil
import selectors
import signal
import socket
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

MODULES = (
    "torch", "transformers", "transformers.models.llama.modeling_llama", "transformers.models.auto.modeling_auto",
    "transformers.models.auto.tokenization_auto", "transformers.generation.utils", "peft", "safetensors.torch",
    "cryptography.x509", "cryptography.hazmat.primitives.serialization", "pydantic", "zoneinfo", "grpc.aio",
    "noren.config", "noren.cli.*", "noren.parties.*", "noren.partition.*", "noren.wire.*",
)  # fmt: skip
"""What commands import sooner or later; "x.*" is a package with the modules in it."""
MOST = 1 << 16
"""Bytes of one request or report."""
PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER, CLONE_NEWNET = 1, 36, 0x40000000


def _fork_on_request(line: socket.socket) -> bool:
    """The zygote's life. Returns in every child, True, and in the zygote False, when it is needed no more.

    Children that end are reaped and reported at once; a pidfd of each is a readable file when it has ended.
    """
    own, pids = os.getpid(), dict[int, int]()
    selector = selectors.DefaultSelector()
    selector.register(line, selectors.EVENT_READ)
    line.sendall(b'{"says": "ready"}')
    while True:
        for key, _ in selector.select():
            if key.fileobj is not line:
                selector.unregister(handle := key.fd)
                os.close(handle)
                _, status = os.waitpid(pid := pids.pop(handle), 0)
                line.sendall(json.dumps({"pid": pid, "exit": os.waitstatus_to_exitcode(status)}).encode())
            elif not (words := line.recv(MOST)):
                return False
            elif (threads := len(os.listdir("/proc/self/task"))) > 1:
                line.sendall(json.dumps({"says": f"it has {threads} threads, and forks only with one"}).encode())
            else:
                ready, tell = os.pipe()
                if (pid := os.fork()) == 0:
                    for handle in (ready, *pids):
                        os.close(handle)
                    selector.close()
                    line.close()
                    _become(json.loads(words), own, tell)
                    return True
                os.close(tell)
                handle = os.pidfd_open(pid)
                pids[handle] = pid
                selector.register(handle, selectors.EVENT_READ)
                with open(ready) as told:  # until the child is a process of its own, or says why it cannot be
                    report = {"pid": pid, "says": told.read()}
                socket.send_fds(line, [json.dumps(report).encode()], [handle])


def _become(job: dict[str, Any], parent: int, tell: int) -> None:
    """Make this forked process one of its own: it ends with its parent, has a session, files, folder and environment.

    Closes the pipe `tell` when that is done, or writes into it why it cannot be.
    """
    try:
        _system("prctl", PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:
            os._exit(1)  # it ended meanwhile
        os.setsid()
        for number, name in ((1, "stdout"), (2, "stderr")):
            file = os.open(job[name], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
            os.dup2(file, number)
            os.close(file)
        if job["netns"]:
            file = os.open(f"/run/netns/{job['netns']}", os.O_RDONLY)
            _system("setns", file, CLONE_NEWNET)
            os.close(file)
        os.chdir(job["cwd"])
    except OSError as error:
        os.write(tell, str(error).encode())
        os._exit(1)
    os.environ.update(job["env"])
    sys.argv = ["noren", *job["argv"]]
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.close(tell)


def _import(name: str) -> None:
    """Import a module, and those inside it if the name ends in ".*"."""
    module = import_module(name.removesuffix(".*"))
    for inside in pkgutil.iter_modules(module.__path__, f"{module.__name__}.") if name.endswith(".*") else ():
        import_module(inside.name)


def _system(call: str, *numbers: int) -> None:
    """Call a function of the C library that Python does not have."""
    library = ctypes.CDLL(None, use_errno=True)
    if getattr(library, call)(*numbers) == -1:
        number = ctypes.get_errno()
        raise OSError(number, f"{call}: {os.strerror(number)}")


def _end_all() -> None:
    """End every process that descends from this one and has not gone elsewhere."""
    while words := Path(f"/proc/self/task/{os.getpid()}/children").read_text().split():
        for pid in map(int, words):
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)


def _main(number: int, modules: list[str]) -> None:
    from noren.cli.main import run, share_the_processor

    share_the_processor()
    for name in modules:
        _import(name)
    gc.collect()
    gc.freeze()  # children share the pages of what was imported
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the tests
    _system("prctl", PR_SET_CHILD_SUBREAPER, 1)  # what children leave behind comes to the zygote
    child = False
    with contextlib.suppress(OSError):  # the tests' process has gone
        child = _fork_on_request(socket.socket(fileno=number))
    run() if child else _end_all()


if __name__ == "__main__":
    _main(int(sys.argv[1]), sys.argv[2:])
