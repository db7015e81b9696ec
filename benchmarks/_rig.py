"""What the benchmarks share: a random-weight Llama of a real shape, a server process for its middle, one JSON line."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

if sys.argv[1:2] != ["whole"]:
    from noren.cli.main import share_the_processor

    share_the_processor()

import torch
import transformers

from noren.config import Document
from noren.errors import Overloaded
from noren.types import Enter, Handler, Message
from noren.wire.identity import ensure

transformers.utils.logging.disable_progress_bar()
SHAPES = {
    "30M": {"hidden_size": 384, "num_hidden_layers": 8, "intermediate_size": 1024, "num_attention_heads": 12},
    "160M": {"hidden_size": 768, "num_hidden_layers": 12, "intermediate_size": 2048, "num_attention_heads": 12},
}
PLAN = ["client :2", "server 2:-2", "client -2:"]


def llama(folder: Path, shape: str, vocabulary: int = 32_000, dtype: torch.dtype = torch.bfloat16) -> Path:
    """Write a random-weight Llama, as a model folder."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        **SHAPES[shape], num_key_value_heads=4, vocab_size=vocabulary, max_position_embeddings=2048
    )
    transformers.LlamaForCausalLM(config).to(dtype).save_pretrained(folder / shape)
    return folder / shape


@contextmanager
def server(
    folder: Path, values: dict[str, Any], threads: int, pids: list[int] | None = None, party: Any = "server"
) -> Iterator[Document]:
    """Run `noren serve` for a remote party ("server" or "edge") of a run document in a process of its own.

    Yields the document with the party's address. Its process id is added to `pids`.
    """
    keys, links = folder / "keys", values.get("links", {})
    ensure(keys, party, party)
    ensure(keys, "client", "client")
    values = values | {"keys": {"dir": str(keys)}, "links": links | {party: "127.0.0.1:1"}}
    path = folder / f"{party}.toml"
    path.write_text(Document.of(values, folder).to_toml())
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    command = [sys.executable, "-m", "noren.cli.main", "serve", str(path), "--party", party]
    command += ["--listen", "127.0.0.1:0", "--json"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    try:
        assert process.stdout is not None
        if pids is not None:
            pids.append(process.pid)
        port = json.loads(process.stdout.readline())["port"]
        yield Document.of(values | {"links": links | {party: f"127.0.0.1:{port}"}}, folder)
    finally:
        process.terminate()
        process.wait(timeout=20)


@contextmanager
def whole_in_a_process(script: str, *arguments: str, threads: int) -> Iterator[Callable[[], dict[str, Any]]]:
    """Run `script whole ARGUMENTS` as the baseline: each call makes it measure once and returns what it printed.

    The baseline runs in a process of its own with OpenMP's default settings, which suit a process that has the machine
    to itself; the cut model's processes give up the processor while they wait (noren.cli.main.share_the_processor).
    """
    environment = {k: v for k, v in os.environ.items() if k != "GOMP_SPINCOUNT"} | {"OMP_NUM_THREADS": str(threads)}
    process = subprocess.Popen(
        [sys.executable, script, "whole", *arguments],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment,
    )  # fmt: skip

    def measure() -> dict[str, Any]:
        assert process.stdin is not None and process.stdout is not None
        process.stdin.write("go\n")
        process.stdin.flush()
        return dict(json.loads(process.stdout.readline()))

    try:
        yield measure
    finally:
        process.terminate()
        process.wait(timeout=20)


def answer(measure: Callable[[], dict[str, Any]]) -> None:
    """The baseline process: measure at each line that comes in."""
    for _ in sys.stdin:
        print(json.dumps(measure()), flush=True)


def alternate(
    repeats: int, first: Callable[[], dict[str, Any]], second: Callable[[], dict[str, Any]]
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Measure two things in turn, after one uncounted run of each."""
    first(), second()
    pairs = [(first(), second()) for _ in range(repeats)]
    return [a for a, _ in pairs], [b for _, b in pairs]


def median_ratio(a: list[float], b: list[float]) -> float:
    """Median over pairs of a / b."""
    return statistics.median(x / y for x, y in zip(a, b, strict=True))


def timed(handler: Handler, seconds: list[float]) -> Handler:
    """Return a handler that notes how long each answer took."""

    def ask(message: Message) -> Message:
        started = time.perf_counter()
        answer = handler(message)
        seconds.append(time.perf_counter() - started)
        return answer

    return ask


def enter(link: Handler) -> None:
    """Take part in a group, once its turn has come."""
    while True:
        try:
            link(Message(Enter()))
            return
        except Overloaded as error:
            time.sleep(error.retry_after)


def scratch() -> tempfile.TemporaryDirectory[str]:
    """A folder that is removed afterwards."""
    return tempfile.TemporaryDirectory(prefix="noren-bench-")


def show(**figures: Any) -> None:
    """Print the one JSON line."""
    rounded = {k: round(v, 4) if isinstance(v, float) else v for k, v in figures.items()}
    print(json.dumps(rounded), flush=True)
