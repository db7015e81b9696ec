"""Processes that a zygote forks are `noren` processes: they serve, are killed, frozen and reported."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from conftest import U_SHAPED
from namespaces import Namespaces
from noren.config import Document
from zygote import Zygote


@pytest.fixture(scope="module")
def zygote() -> Iterator[Zygote]:
    with Zygote() as started:
        print(f"the zygote imported everything in {started.seconds:.1f} s")
        yield started


def state(pid: int) -> str:
    """One letter: T stopped, Z ended; "" when there is no such process."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return ""


def reaches(pid: int, letter: str, seconds: float = 5.0) -> bool:
    end = time.monotonic() + seconds
    while state(pid) != letter and time.monotonic() < end:
        time.sleep(0.002)
    return state(pid) == letter


def run_file(keys: Path, folder: Path) -> Path:
    """Write a run document of the embedded model: each server has a folder of its own."""
    folder.mkdir(exist_ok=True)
    values = {"model": "embedded", "plan": U_SHAPED, "keys": {"dir": str(keys)}}
    (folder / "run.toml").write_text(Document.of(values, folder).to_toml())
    return folder / "run.toml"


SERVE = ["serve", "run.toml", "--party", "server", "--json", "--listen"]


def test_two_servers_of_which_one_is_killed(zygote: Zygote, keys: Path, tmp_path: Path) -> None:
    children, cache = [], {"NOREN_CACHE": os.environ["NOREN_CACHE"]}  # verdicts on architectures are kept there
    for name in ("one", "two"):
        folder = run_file(keys, tmp_path / name).parent
        start = time.monotonic()
        child = zygote.start([*SERVE, "127.0.0.1:0"], cwd=folder, stdout=folder / "out", env=cache)
        forked = time.monotonic() - start
        port = json.loads(child.first_line())["port"]
        seconds = time.monotonic() - start
        print(f"server {name}: forked in {forked * 1e3:.0f} ms, ready in {seconds:.2f} s")
        socket.create_connection(("127.0.0.1", port), timeout=5).close()
        children.append((child, port))
    assert seconds < zygote.seconds / 2
    (one, port), (two, other) = children
    one.kill()
    assert one.wait(timeout=5) == -signal.SIGKILL and not one.alive
    one.kill()  # of what has ended: nothing happens
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", port), timeout=5)
    assert two.alive
    two.stop()
    assert reaches(two.pid, "T")
    with pytest.raises(TimeoutError):
        two.wait(timeout=0.1)
    two.cont()
    socket.create_connection(("127.0.0.1", other), timeout=5).close()
    two.terminate()
    assert two.wait(timeout=10) == 0
    assert (folder / "out.err").read_text() == ""


def test_a_command_has_its_own_exit_code_folder_and_output(zygote: Zygote, tmp_path: Path) -> None:
    wrong = zygote.start(["serve", "run.toml", "--party", "server"], cwd=tmp_path, stdout=tmp_path / "out")
    assert wrong.wait(timeout=10) == 2
    assert "run.toml" in (tmp_path / "out.err").read_text()
    with pytest.raises(RuntimeError, match="No such file.*nowhere"):
        zygote.start(["--version"], cwd=tmp_path / "nowhere", stdout=tmp_path / "out")
    with pytest.raises(RuntimeError, match=r"ended with 2.*run\.toml"):
        wrong.first_line()
    right = zygote.start(["--version"], cwd=tmp_path, stdout=tmp_path / "out")
    assert right.wait(timeout=10) == 0 and right.first_line().startswith("noren ")
    again = zygote.start(["--version"], cwd=tmp_path, stdout=tmp_path / "out")
    assert again.wait(timeout=10) == 0
    assert again.output() == right.first_line() + "\n" and (tmp_path / "out").read_text() == again.output() * 2


def test_a_child_has_its_own_environment(zygote: Zygote, tmp_path: Path) -> None:
    widths = {}
    for columns in ("50", "90"):
        child = zygote.start(["--help"], stdout=tmp_path / columns, env={"COLUMNS": columns})
        assert child.wait(timeout=10) == 0
        widths[columns] = max(map(len, child.output().splitlines()))
    assert widths["50"] <= 50 < widths["90"] <= 90


def test_what_children_leave_behind_ends_with_the_zygote(tmp_path: Path) -> None:
    """The demonstration starts a server of its own, and is killed."""
    with Zygote(modules=()) as zygote:
        child = zygote.start(["demo", "--out", tmp_path / "demo"], stdout=tmp_path / "out")
        children, end = Path(f"/proc/{child.pid}/task/{child.pid}/children"), time.monotonic() + 60
        while not (pids := children.read_text().split()) and time.monotonic() < end:
            time.sleep(0.02)
        child.kill()
        assert child.wait(timeout=5) == -signal.SIGKILL and pids and all(state(int(pid)) for pid in pids)
    assert not any(state(int(pid)) for pid in pids)


def test_many_children_and_their_ends(zygote: Zygote, tmp_path: Path) -> None:
    start = time.monotonic()
    children = [zygote.start(["--version"], stdout=tmp_path / f"{n}") for n in range(5)]
    assert [child.wait(timeout=20) for child in children] == [0] * 5
    print(f"5 processes in {time.monotonic() - start:.2f} s")
    assert all(state(child.pid) == "" for child in children)  # reaped


def test_a_child_in_a_namespace(zygote: Zygote, keys: Path, tmp_path: Path) -> None:
    with Namespaces() as net:
        words = [*SERVE, f"{net.left.address}:0"]  # an address that only the namespace has
        cache = {"NOREN_CACHE": os.environ["NOREN_CACHE"]}
        folder = run_file(keys, tmp_path).parent
        child = zygote.start(words, cwd=folder, stdout=tmp_path / "out", env=cache, netns=net.left.name)
        port = json.loads(child.first_line())["port"]
        code = "import socket, sys; socket.create_connection((sys.argv[1], int(sys.argv[2])), timeout=5)"
        assert net.run(net.right, [sys.executable, "-c", code, net.left.address, str(port)]).wait(timeout=10) == 0
        child.terminate()
        assert child.wait(timeout=10) == 0


def test_children_end_with_the_zygote_however_it_ends(keys: Path, tmp_path: Path) -> None:
    """A zygote that is left, one that is killed, and one whose test process is killed."""
    code = (
        "import os, signal, sys; from pathlib import Path; from zygote import Zygote\n"
        "with Zygote(modules=()) as zygote:\n"  # quick itself: its children import for seconds, which is to live
        "    children = [zygote.start(sys.argv[2:], stdout=Path(f'{sys.argv[1]}{n}')) for n in range(2)]\n"
        "    children[1].stop()\n"
        "    print(zygote.pid, *(child.pid for child in children), flush=True)\n"
        "    for line in sys.stdin:\n"
        "        os.kill(zygote.pid if line == 'zygote\\n' else os.getpid(), signal.SIGKILL)\n"
        "        print([child.wait(5) for child in children], flush=True)\n"
    )
    run = run_file(keys, tmp_path)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])}
    for word in ("", "zygote\n", "test\n"):
        argv = [sys.executable, "-c", code, str(tmp_path / "out"), "serve", str(run), *SERVE[2:], "127.0.0.1:0"]
        pipe = subprocess.PIPE
        with subprocess.Popen(argv, env=environment, stdin=pipe, stdout=pipe, text=True) as process:
            assert process.stdin is not None and process.stdout is not None
            pids = [int(pid) for pid in process.stdout.readline().split()]
            assert len(pids) == 3 and all(state(pid) for pid in pids)
            process.stdin.write(word)
            process.stdin.close()
            if word == "zygote\n":
                assert process.stdout.readline() == f"{[-signal.SIGKILL] * 2}\n"
            assert process.wait(timeout=20) == (-signal.SIGKILL if word == "test\n" else 0)
            assert all(reaches(pid, "") for pid in pids)
