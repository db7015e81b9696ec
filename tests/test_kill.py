"""Real processes: the server is killed in the middle of `generate`, and a new one takes its port."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from conftest import U_SHAPED, tiny_llama
from noren.config import Document
from noren.errors import LinkError
from noren.parties import train
from noren.parties.client import Client
from noren.training.journal import StepJournal
from noren.training.loop import Trainer, Training
from noren.types import Message
from noren.wire.journal import Journal
from test_crossing import rows


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def serve(run: Path, port: int, party: str = "server") -> subprocess.Popen[str]:
    """Start a server process and wait until it says that it is ready."""
    command = [sys.executable, "-m", "noren.cli.main", "serve", str(run), "--party", party]
    process = subprocess.Popen(
        [*command, "--listen", f"127.0.0.1:{port}", "--json"], stdout=subprocess.PIPE, text=True, env=os.environ.copy()
    )
    assert process.stdout is not None
    assert json.loads(process.stdout.readline())["port"] == port
    process.stdout.close()
    return process


def document(folder: Path, keys: Path, port: int, tmp_path: Path) -> tuple[Document, Path]:
    values = {"model": str(folder), "plan": U_SHAPED, "keys": {"dir": str(keys)}}
    made = Document.of(values | {"links": {"server": f"127.0.0.1:{port}"}}, tmp_path)
    (tmp_path / "run.toml").write_text(made.to_toml())
    return made, tmp_path / "run.toml"


@pytest.mark.parametrize("mode", [{}, {"num_beams": 3}, {"do_sample": True}], ids=["greedy", "beams", "sampling"])
def test_sigkill_in_the_middle_of_generate(
    mode: dict[str, Any], keys: Path, llama_folder: Path, whole: Any, tmp_path: Path
) -> None:
    port = free_port()
    made, run = document(llama_folder, keys, port, tmp_path)
    running = [serve(run, port)]
    client = Client(made)
    count, ask = [0], client.span.handler

    def killing(message: Message) -> Message:
        count[0] += 1
        if count[0] == 9:
            running[0].send_signal(signal.SIGKILL)
            running[0].wait()
            running.append(serve(run, port))
        return ask(message)

    client.span.handler = killing
    ids = torch.randint(3, 128, (1, 9), generator=torch.Generator().manual_seed(4))
    options = {"max_new_tokens": 24, "pad_token_id": 0, "do_sample": False} | mode
    outputs = []
    for model in (client.model, whole):
        torch.manual_seed(6)
        outputs.append(model.generate(ids, **options))
    assert torch.equal(*outputs)
    assert client.span.replays == 1 and client.link.connections == 2  # type: ignore[union-attr]
    client.close()
    running[1].terminate()
    assert running[1].wait(timeout=20) == 0


def test_a_server_that_stays_away_is_an_error(keys: Path, llama_folder: Path, tmp_path: Path) -> None:
    port = free_port()
    made, run = document(llama_folder, keys, port, tmp_path)
    running = serve(run, port)
    client = Client(made)
    client.link.patience = 2.0  # type: ignore[union-attr]
    running.kill()
    running.wait()
    with pytest.raises(LinkError, match=f"127.0.0.1:{port}: no answer for 2 s"):
        client.model(torch.ones(1, 3, dtype=torch.long))
    client.close()


def test_an_evaluation_that_was_cut_short_is_made_by_whoever_goes_on(tmp_path: Path) -> None:
    """The client dies in an evaluation between two steps, the steps before which it has kept."""

    class Dying(Trainer):
        def evaluate(self) -> float | None:
            if self.outcome.step == 2:
                raise KeyboardInterrupt
            return super().evaluate()

    settings = Training(steps=6, batch_size=2, evaluate_every=2, lr=1e-2)
    with Journal(tmp_path / "journal") as journal:

        def trainer(kind: type[Trainer], run: str) -> Trainer:
            return kind(tiny_llama(), rows(), rows(2), settings, pad_id=0, seed=3, journal=StepJournal(journal, run))

        undisturbed = trainer(Trainer, "calm").run()
        with pytest.raises(KeyboardInterrupt):
            trainer(Dying, "killed").run()
        again = trainer(Trainer, "killed")
        assert again.resume() == 2
        assert again.run() == undisturbed and list(undisturbed.evaluations) == [0, 2, 4, 6]


def test_metrics_outlive_a_kill_while_they_are_rewritten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever resumes drops the lines of steps to come; if it dies there, those of steps that are done are left."""
    metrics, before = tmp_path / "metrics.jsonl", "".join(f'{{"step": {n}, "loss": 1.0}}\n' for n in (1, 2, 3))
    metrics.write_text(before)
    opened = Path.open

    def dies(path: Path, *args: Any, **more: Any) -> Any:
        file = opened(path, *args, **more)
        if "w" in str(args) + str(more):  # what was there is gone, what is to come is not written
            file.close()
            raise KeyboardInterrupt
        return file

    monkeypatch.setattr(Path, "open", dies)
    with pytest.raises(KeyboardInterrupt):
        train._keep_steps(metrics, 2)
    monkeypatch.undo()
    assert metrics.read_text() == before
    train._keep_steps(metrics, 2)
    assert [json.loads(line)["step"] for line in metrics.read_text().splitlines()] == [1, 2]


def test_stories_over_three_processes(keys: Path, data_folder: Path, tmp_path: Path) -> None:
    """Real weights, client, edge and server as three processes: the text that the weights' source quotes."""
    folder = data_folder / "models" / "stories260K"
    ports = {"edge": free_port(), "server": free_port()}
    values = {"model": str(folder), "plan": ["client :1", "edge 1:3", "server 3:4", "client 4:"]}
    values |= {"keys": {"dir": str(keys)}, "links": {party: f"127.0.0.1:{port}" for party, port in ports.items()}}
    made = Document.of(values, tmp_path)
    (tmp_path / "run.toml").write_text(made.to_toml())
    running = [serve(tmp_path / "run.toml", ports[party], party) for party in ("server", "edge")]
    client = Client(made)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    before = client.traffic.copy()
    out = client.model.generate(torch.tensor([[tokenizer.bos_token_id]]), max_new_tokens=60, do_sample=False)
    assert client.traffic.since(before).round_trips == 60
    text = tokenizer.decode(out[0], skip_special_tokens=True).strip()
    quoted = "Once upon a time, there was a little girl named Lily. She loved to play outside in the park."
    assert text.startswith(quoted)
    client.close()
    for process in reversed(running):
        process.terminate()
        assert process.wait(timeout=20) == 0
