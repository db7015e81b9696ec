"""The command line as a person has it: real processes, their exit codes and their words."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import noren
from noren.embedded import MODEL_DIR
from noren.wire import identity

PLAN = "client :2, server 2:-2, client -2:"
RUN = """
model = "embedded"
name = "first"
plan = ["client :2", "server 2:-2", "client -2:"]
{head}
[adapter]
r = 4
[data]
path = "notes.csv"
text = "note"
max_length = 32
{data}
[training]
steps = 3
batch_size = 4
lr = 0.01
{training}
[links]
{links}
[keys]
dir = "{keys}"
"""


@dataclass
class Result:
    code: int
    out: str
    err: str
    seconds: float

    def record(self) -> Any:
        return json.loads(self.out.strip().splitlines()[-1])


@dataclass
class Place:
    """A folder with a federation's keys, data and run documents, and how to run commands in it."""

    folder: Path
    environment: dict[str, str]

    def noren(self, *arguments: str, typed: str = "") -> Result:
        started = time.monotonic()
        done = subprocess.run(
            self.command(*arguments), input=typed, capture_output=True, text=True, cwd=self.folder,
            env=self.environment, timeout=240, check=False,
        )  # fmt: skip
        return Result(done.returncode, done.stdout, done.stderr, time.monotonic() - started)

    def command(self, *arguments: str) -> list[str]:
        return [sys.executable, "-m", "noren.cli.main", *arguments]

    def document(self, name: str, links: str = "", *, head: str = "", data: str = "", training: str = "",
                 keys: str = "keys") -> None:  # fmt: skip
        text = RUN.format(head=head, data=data, training=training, links=links, keys=keys)
        (self.folder / name).write_text(text, encoding="utf-8")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    folder = tmp_path_factory.mktemp("cli")
    source = str(Path(noren.__file__).parents[1])
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([source, os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep),
        "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "NOREN_CACHE": str(folder / "cache"), "COLUMNS": "200",
    }  # fmt: skip
    rows = [f'"Patient {number} was seen today, and is well",{number % 2}\n' for number in range(20)]
    (folder / "notes.csv").write_text("note,kind\n" + "".join(rows), encoding="utf-8")
    return Place(folder, environment)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="module")
def server(place: Place) -> Iterator[subprocess.Popen[str]]:
    """A server of the run, ready; `run.toml` names its port."""
    issue = ("issue", "client", "--role", "client"), ("issue", "server", "--role", "server", "--host", "127.0.0.1")
    for arguments in (("init",), *issue):
        assert place.noren("keys", *arguments).code == 0
    place.document("server.toml")
    command = place.command("serve", "server.toml", "--party", "server", "--listen", "127.0.0.1:0", "--json")
    with (
        (place.folder / "serve.err").open("w") as errors,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True, cwd=place.folder,
                         env=place.environment) as process,
    ):  # fmt: skip
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line, (place.folder / "serve.err").read_text()
        ready = json.loads(line)
        assert ready["ready"] is True and ready["layers"] == [2, 3, 4, 5]
        place.document("run.toml", f'server = "127.0.0.1:{ready["port"]}"')
        yield process
        process.kill()


# What needs no server: run two at a time, while the tests wait for their own.


def unfit_folder(place: Place) -> str:
    folder = place.folder / "modernbert"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": "modernbert", "num_hidden_layers": 4}))
    return str(folder)


def truncated_folder(place: Place) -> str:
    folder = place.folder / "truncated"
    shutil.copytree(MODEL_DIR, folder)
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    return str(folder)


def folder_without_a_shard(place: Place) -> str:
    folder = place.folder / "sharded"
    shutil.copytree(MODEL_DIR, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    index = {"weight_map": {"model.embed_tokens.weight": "model-00001-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return str(folder)


def with_unknown_key(place: Place) -> str:
    place.document("unknown.toml", training="batchsize = 2")
    return "unknown.toml"


def without_column(place: Place) -> str:
    place.document("column.toml", data='response = "x"\nprompt = "y"', head='task = "sequence-classification"')
    return "column.toml"


def with_nobody_there(place: Place) -> str:
    for name, role in (("server", "server"), ("client", "client")):
        identity.ensure(place.folder / "own-keys", name, role)  # type: ignore[arg-type]
    place.document("nobody.toml", f'server = "127.0.0.1:{free_port()}"', keys="own-keys")
    return "nobody.toml"


def with_mixed_keys(place: Place) -> str:
    """The client's pair is of one authority, ca.crt of another."""
    identity.ensure(place.folder / "one", "client", "client")
    identity.create_authority(place.folder / "two")
    shutil.copy(place.folder / "two" / "ca.crt", place.folder / "one" / "ca.crt")
    place.document("mixed.toml", f'server = "127.0.0.1:{free_port()}"', keys="one")
    return "mixed.toml"


Arguments = Callable[[Place], tuple[str, ...]]

REFUSED: dict[str, tuple[Arguments, int, str]] = {
    "gap": (lambda p: ("plan", "embedded", "--plan", "client :2, server 4:"), 2, "nobody holds layers 2:4"),
    "overlap": (lambda p: ("plan", "embedded", "--plan", "client :4, server 2:"), 2, "layers 2:4 are held twice"),
    "range": (lambda p: ("plan", "embedded", "--plan", "client :2, server 2:9"), 2, "the model has 8 layers"),
    "no folder": (lambda p: ("plan", "./nowhere"), 3, "no such model folder"),
    "unknown party": (
        lambda p: ("slice", "embedded", "--plan", PLAN, "--out", "never", "--party", "nobody"), 2,
        "parties are client, server",
    ),
    "truncated": (lambda p: ("slice", truncated_folder(p), "--plan", PLAN, "--out", "never"), 3, "is cut short"),
    "missing shard": (lambda p: ("plan", folder_without_a_shard(p)), 3, "00001-of-00002.safetensors is missing"),
    "unfit": (lambda p: ("check", unfit_folder(p)), 3, "modernbert cannot be cut exactly"),
    "encoder-decoder": (lambda p: ("check", "t5"), 3, "is an encoder-decoder"),
    "unknown key": (lambda p: ("train", with_unknown_key(p)), 2, "did you mean 'batch_size'?"),
    "no document": (lambda p: ("generate", "nothing.toml", "--prompt", "x"), 2, "no such run document"),
    "no column": (lambda p: ("train", without_column(p)), 2, "no column 'label'; columns found: 'note', 'kind'"),
    "nobody there": (
        lambda p: ("generate", with_nobody_there(p), "--prompt", "x"), 4, "is the server running there?",
    ),
    "mixed keys": (lambda p: ("generate", with_mixed_keys(p), "--prompt", "x"), 2, "wrong CA"),
}  # fmt: skip

HEAD_TAIL = "client :2, near 2:4, server 4:"
DONE: dict[str, tuple[str, ...]] = {
    "plan": (
        "plan",
        "embedded",
        "--plan",
        "client :2, near 2:4, server 4:",
        "--json",
        "--batch",
        "2",
        "--length",
        "16",
    ),
    "plan for people": ("plan", "embedded"),
    "check": ("check", "embedded", "--json"),
    "slice": ("slice", "embedded", "--plan", PLAN, "--out", "parts", "--json"),
}


@pytest.fixture(scope="module")
def answers(place: Place) -> Iterator[dict[str, Future[Result]]]:
    with ThreadPoolExecutor(2) as pool:
        running = {name: pool.submit(place.noren, *arguments) for name, arguments in DONE.items()}
        for name, (arguments, _, _) in REFUSED.items():
            running[name] = pool.submit(place.noren, *arguments(place))
        yield running
        pool.shutdown(cancel_futures=True)


def test_help_is_quick_and_imports_no_torch(place: Place) -> None:
    done = place.noren("--help")
    print(f"noren --help took {done.seconds:.2f} s")
    assert done.code == 0
    assert all(name in done.out for name in ("keys", "plan", "check", "slice", "serve", "train", "generate", "chat"))
    command = [sys.executable, "-X", "importtime", "-m", "noren.cli.main", "--help"]
    traced = subprocess.run(command, capture_output=True, text=True, env=place.environment, check=True).stderr
    imported = {line.rpartition("|")[2].strip() for line in traced.splitlines()}
    assert "noren.cli.show" in imported
    assert not {"torch", "transformers", "grpc", "peft"} & imported


def test_version(place: Place) -> None:
    assert place.noren("--version").out == f"noren {noren.__version__}\n"


@pytest.mark.parametrize("name", REFUSED)
def test_wrong_input_is_one_sentence(name: str, answers: dict[str, Future[Result]]) -> None:
    _, code, phrase = REFUSED[name]
    done = answers[name].result()
    assert done.code == code, done.err
    assert phrase in done.err
    assert done.err.splitlines()[-1].startswith("error: ")
    assert "Traceback" not in done.err
    if name == "nobody there":
        assert done.seconds < 40  # 8 of them are the wait for a server that is still starting


def test_plan(answers: dict[str, Future[Result]]) -> None:
    cost = answers["plan"].result().record()
    client, near, server = cost["parties"]
    assert cost["plan"] == ["client 0:2", "near 2:4", "server 4:8"]
    assert near["layers"] == [2, 3] and near["parameters"] * 2 == near["file_bytes"] == near["memory_bytes"] // 2
    assert server["holds"] == ["layers 4:8", "norm and head"]
    assert client["holds"] == ["embedding", "layers 0:2"]
    assert near["adapter_parameters"] == 2 * 8 * ((192 + 192) + (192 + 64))  # q_proj and v_proj, two layers, r = 8
    assert near["cache_bytes_per_token"] == 2 * (2 * 64 * 4)
    for line in cost["crossings"]:
        assert line["token_bytes"] == (192 + 2048) * 4
        assert line["step_bytes"] == 2 * 32 * (192 + 2048) * 4
    assert (cost["token_round_trips"], cost["step_round_trips"]) == (1, 2)


def test_plan_for_people(answers: dict[str, Future[Result]]) -> None:
    text = answers["plan for people"].result().out
    assert "plan: client 0:2, server 2:6, client 6:8" in text
    assert "1.54 kB and 1 round trip a generated token" in text


def test_check(answers: dict[str, Future[Result]]) -> None:
    done = answers["check"].result()
    verdict = done.record()
    assert done.code == 0 and verdict["fit"] and verdict["architecture"] == "llama"
    assert max(verdict["differences"].values()) < 1e-5


def test_slice(place: Place, answers: dict[str, Future[Result]]) -> None:
    written = answers["slice"].result().record()
    client, server = written["slices"]
    assert server["layers"] == [2, 3, 4, 5] and not server["embedding"]
    assert set(server["files"]) == {"config.json", "model.safetensors", "noren.json"}
    assert "tokenizer.json" in client["files"]
    assert client["fingerprint"] == server["fingerprint"]
    assert not (place.folder / "never").exists()


# What needs a server: one run, from keys to text.


def test_plan_shows_what_codecs_save(place: Place) -> None:
    done = place.noren("plan", "embedded", "--batch", "2", "--length", "16", "--json")
    assert done.code == 0, done.err
    found = json.loads(done.out)
    [line], codecs = found["crossings"], found["codecs"]
    assert codecs["raw"]["step_bytes"] == line["step_bytes"] and codecs["raw"]["token_bytes"] == line["token_bytes"]
    assert codecs["bf16"]["of_raw"] == 0.5 and 0.25 < codecs["int8"]["of_raw"] < 0.3 and codecs["zstd"]["at_most"]
    shown = place.noren("plan", "embedded").out
    assert "int4" in shown and "of raw" in shown


def test_train_then_generate(place: Place, server: subprocess.Popen[str]) -> None:
    done = place.noren("train", "run.toml", "--json")
    assert done.code == 0, done.err
    *steps, outcome = map(json.loads, done.out.splitlines())
    assert [line["step"] for line in steps] == [1, 2, 3]
    assert set(steps[0]) == {
        "step", "loss", "norm", "tokens_per_second", "bytes_up", "bytes_down", "round_trips", "exposed_seconds",
    }  # fmt: skip
    assert all(step["exposed_seconds"] > 0 for step in steps)
    assert outcome["held_out"]["3"] < outcome["held_out"]["0"]
    out = place.folder / "runs" / "first"
    assert {path.name for path in out.iterdir()} == {"run.toml", "metrics.jsonl", "checkpoint", "adapter", "journal"}
    kept = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert kept[:3] == steps and [line["step"] for line in kept[3:]] == [0, 3]

    again = place.noren("train", "run.toml")
    assert again.code == 2 and "--resume" in again.err

    ways = {way: place.noren("generate", "run.toml", "--prompt", "Patient 3", "--max-new-tokens", "6", "--json", *way)
            for way in [(), ("--no-adapter",)]}  # fmt: skip
    for way, result in ways.items():
        assert result.code == 0, result.err
        record = result.record()
        assert record["tokens"] == 6 and record["round_trips_per_token"] == 1
        assert record["bytes_per_token"] > 2 * 192 * 4
        assert (record["adapter"] is None) == bool(way)


def test_chat_reads_a_pipe(place: Place, server: subprocess.Popen[str]) -> None:
    done = place.noren(
        "chat", "run.toml", "--max-new-tokens", "4", "--no-adapter", typed="Patient\n/reset\nThe\n/quit\nx\n"
    )
    assert done.code == 0, done.err
    assert len([line for line in done.out.splitlines() if line.strip()]) == 2


def test_a_client_of_another_authority_is_refused(place: Place, server: subprocess.Popen[str]) -> None:
    identity.ensure(place.folder / "foreign", "client", "client")
    links = next(line for line in (place.folder / "run.toml").read_text().splitlines() if line.startswith("server ="))
    place.document("foreign.toml", links, keys="foreign")
    done = place.noren("generate", "foreign.toml", "--prompt", "x", "--json")
    assert done.code == 4
    refusal = json.loads(done.err.splitlines()[-1])
    assert refusal["error"] == "LinkError" and "the server's certificate is not signed by" in refusal["message"]


def test_serve_ends_on_sigterm(place: Place, server: subprocess.Popen[str]) -> None:
    server.send_signal(signal.SIGTERM)
    assert server.wait(timeout=30) == 0
    assert "Traceback" not in (place.folder / "serve.err").read_text()
