"""`--insecure`, as a person has it: each process says at each start, in words, that nothing is protected."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from noren.config import Document
from noren.embedded import MODEL_DIR
from zygote import Child, Zygote

WORDS = "no TLS: anyone on the path can read and change what crosses, and nobody's identity is checked"


@pytest.fixture(scope="module")
def zygote() -> Iterator[Zygote]:
    with Zygote() as made:
        yield made


def run(zygote: Zygote, folder: Path, name: str, *words: str) -> Child:
    """Start a command whose output is in `name` and `name`.err."""
    return zygote.start([*words], cwd=folder, stdout=folder / name, env={"NOREN_CACHE": str(folder / "cache")})


def warnings(folder: Path, name: str) -> list[str]:
    """What a process has said about plain text, on its stderr."""
    return [line for line in (folder / f"{name}.err").read_text().splitlines() if WORDS in line]


def test_every_process_warns_every_time(zygote: Zygote, tmp_path: Path) -> None:
    plan = ["client :2", "server 2:-2", "client -2:"]
    for turn in range(2):
        served = f"serve{turn}"
        made = {"model": str(MODEL_DIR), "plan": plan, "links": {"server": "127.0.0.1:0"}}
        (tmp_path / "run.toml").write_text(Document.of(made, tmp_path).to_toml())
        child = run(zygote, tmp_path, served, "serve", "run.toml", "--party", "server", "--insecure", "--json")
        ready = json.loads(child.first_line())
        [line] = warnings(tmp_path, served)
        assert "serving at 127.0.0.1:0" in line
        address = f"127.0.0.1:{ready['port']}"
        (tmp_path / "run.toml").write_text(Document.of(made | {"links": {"server": address}}, tmp_path).to_toml())
        asked = {
            "generate": ["run.toml", "--prompt", "x", "--max-new-tokens", "2", "--no-adapter"],
            "status": [address, "--json"],
        }
        for command, words in asked.items():
            name = f"{command}{turn}"
            done = run(zygote, tmp_path, name, command, *words, "--insecure")
            assert done.wait(60) == 0, (tmp_path / f"{name}.err").read_text()
            told = warnings(tmp_path, name)
            assert told and all(f"connecting to {address}" in line for line in told), told
        assert json.loads((tmp_path / f"status{turn}").read_text())["health"] == "SERVING"
        child.terminate()
        assert child.wait(30) == 0


@pytest.mark.parametrize("command", ["serve", "status"])
def test_without_the_flag_there_is_no_plain_text(command: str, zygote: Zygote, tmp_path: Path) -> None:
    """A folder without keys is an error, not a reason to do without."""
    made = {"model": str(MODEL_DIR), "links": {"server": "127.0.0.1:0"}}
    (tmp_path / "run.toml").write_text(Document.of(made, tmp_path).to_toml())
    words = {"serve": ["run.toml", "--party", "server"], "status": ["127.0.0.1:1"]}[command]
    assert run(zygote, tmp_path, command, command, *words).wait(60) == 2
    assert "ca.crt" in (tmp_path / f"{command}.err").read_text() and not warnings(tmp_path, command)
