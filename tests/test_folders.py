"""What is written goes into folders that are empty, or that a run may go on in; nothing of anybody's is overwritten."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from conftest import U_SHAPED, identity
from noren.cli.main import app, register
from noren.config import Document
from noren.embedded import MODEL_DIR
from noren.errors import ConfigError, LinkError
from noren.parties.server import SpanServer
from noren.parties.train import train
from noren.partition.stage import Stage
from noren.types import Message
from test_policy import ADAPTER, values

register()
PLAN = ", ".join(U_SHAPED)


@pytest.fixture(scope="module")
def server() -> Iterator[SpanServer]:
    stage = Stage.load(str(MODEL_DIR), U_SHAPED, "server", "causal-lm")
    made = SpanServer(stage, lora=Document.of({"model": "x", "adapter": ADAPTER}, Path()).run.adapter)
    yield made
    made.close()


@pytest.fixture
def run(server: SpanServer, tmp_path: Path) -> Callable[..., Any]:
    """Train in the folder `out`; with `fails`, the line breaks at the first message of that kind."""

    def start(*, resume: bool = False, fails: str = "", **changes: Any) -> Any:
        made = Document.of(values(tmp_path, "127.0.0.1:1", {"out": "out", **changes}), tmp_path)
        connection = server.connect(identity("client"))

        class Line:
            def __getattr__(self, name: str) -> Any:
                return getattr(connection, name)

            def __call__(self, message: Message) -> Message:
                if message.kind == fails:
                    raise LinkError("the line broke")
                return connection(message)

        try:
            return train(made, resume=resume, handler=Line())
        finally:
            connection.disconnect()

    return start


def content(folder: Path) -> dict[str, bytes]:
    """All files of a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("what", ["thesis.tex", "journal/diary.txt", "adapter/adapter_model.safetensors", "run.toml"])
@pytest.mark.parametrize("resume", [False, True])
def test_training_leaves_a_strangers_folder_alone(
    what: str, resume: bool, run: Callable[..., Any], tmp_path: Path
) -> None:
    mine = tmp_path / "out" / what
    mine.parent.mkdir(parents=True)
    mine.write_text("mine")
    with pytest.raises(ConfigError, match=rf"out is not empty \(it holds '{what.split('/')[0]}'\)"):
        run(resume=resume)
    assert content(tmp_path / "out") == {what: b"mine"}


def test_a_finished_run_is_not_overwritten(run: Callable[..., Any], tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    assert run().outcome.step == 2
    before = content(tmp_path / "out")
    for changes in ({}, {"name": "another"}):
        with pytest.raises(ConfigError, match="holds a run already; continue it with --resume, or choose another"):
            run(**changes)
    assert content(tmp_path / "out") == before
    assert run(resume=True).outcome.step == 2, "there is nothing left to do"
    shutil.rmtree(tmp_path / "out" / "journal")
    with pytest.raises(ConfigError, match="holds a run already"):
        run()


def test_a_run_that_came_to_nothing_may_begin_again_under_its_name(run: Callable[..., Any], tmp_path: Path) -> None:
    with pytest.raises(Exception, match="cannot be reached"):
        run(fails="forward", name="one")
    assert not (tmp_path / "out" / "checkpoint").exists() and (tmp_path / "out" / "journal").is_dir()
    assert run(name="one").outcome.step == 2


def test_a_journal_is_one_runs(run: Callable[..., Any], tmp_path: Path) -> None:
    """A run that was killed before its first checkpoint is in its journal alone."""
    with pytest.raises(Exception, match="cannot be reached"):
        run(fails="backward", name="one")
    assert not (tmp_path / "out" / "checkpoint").exists()
    with pytest.raises(ConfigError, match="holds a run already"):
        run(name="two")


def test_slices_go_into_a_folder_of_slices(tmp_path: Path) -> None:
    out = tmp_path / "parts"

    def cut(*more: str, code: int) -> str:
        done = CliRunner().invoke(app, ["slice", "embedded", "--plan", PLAN, "--out", str(out), *more])
        assert done.exit_code == code, done.output
        return done.output.replace("\n", " ")

    out.mkdir()
    (out / "notes.txt").write_text("mine")
    assert "is not empty, and 'notes.txt' in it is no slice" in cut(code=2)
    assert content(out) == {"notes.txt": b"mine"}
    (out / "notes.txt").unlink()
    cut("--party", "server", code=0)
    before = content(out)
    assert "exists already" in cut(code=3) and content(out) == before
    cut("--party", "client", code=0)
    assert {path.name for path in out.iterdir()} == {"client", "server"}


@pytest.mark.parametrize("fails", ["", "close"], ids=["closed", "killed before it was closed"])
@pytest.mark.parametrize("mode", ["alone", "client-batch"])
def test_a_run_that_is_over_stays_as_it_is(
    run: Callable[..., Any], server: SpanServer, tmp_path: Path, mode: str, fails: str
) -> None:
    """Resumed once more, as one that was killed at its very end is: the server need not hold any of it."""
    first = run(together={"mode": mode}, fails=fails)
    assert len(server.runs) == bool(fails)
    files = {
        path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.suffix in (".safetensors", ".jsonl")
    }
    again = run(together={"mode": mode}, resume=True)
    assert again.outcome == first.outcome and again.steps == first.steps and again.adapter == first.adapter
    assert {path: path.read_bytes() for path in files} == files and not server.runs
