"""`noren demo`: the main job from beginning to end, on this machine, in processes of their own.

A server holds the middle of a model; two clients fine-tune it on private notes that only they can read; then the same
training is done in one piece, and the two are compared. Ends with a page that shows what happened.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from noren.cli.processes import end, last_words, peak, start
from noren.errors import ConfigError, NorenError

if TYPE_CHECKING:
    from noren.config import Document
    from noren.training.examples import Example

CLIENTS = ("clinic", "desk")
NOTES, NOTES_SEED = 300, 7
STEPS, LEARNING_RATE, BATCH = 60, 5e-3, 8
TIERS_STEPS = 20
OWN_LEARNING_RATE = 2e-4  # for a model that was not made for this


def demo(
    model: Annotated[str, typer.Option(help="A model folder or hub id of your own.")] = "embedded",
    data: Annotated[
        Path | None, typer.Option(help="Your own text, jsonl, csv or tsv; shared out to two clients.")
    ] = None,
    out: Annotated[Path, typer.Option(help="Where everything is written.")] = Path("noren-demo"),
    steps: Annotated[
        int | None, typer.Option(min=1, help=f"Optimiser steps of each client; default: {STEPS}, or {TIERS_STEPS}.")
    ] = None,
    plan: Annotated[str, typer.Option(help="The cut; default: two layers at each end stay with the client.")] = "",
    lr: Annotated[float, typer.Option(help="Learning rate; default: chosen by the model.")] = 0.0,
    tiers: Annotated[
        bool, typer.Option("--tiers", help="Four users, two edges and a cloud instead; an edge is killed on the way.")
    ] = False,
) -> None:
    """Run the main job on this machine: one server, two clients, TLS between them; opens up what happened."""
    from noren.cli.show import say

    if tiers:
        from noren.cli.demo_tiers import show

        if model != "embedded" or data is not None or plan or lr:
            raise ConfigError("--tiers: it shows the embedded model; leave out --model, --data, --plan and --lr")
        show(out, steps or TIERS_STEPS)
        return

    started = time.monotonic()
    run = Demo(model, data, out, steps or STEPS, plan, lr)
    say(f"Two clients, one server, one model ({model}), cut as: {', '.join(run.document.run.plan)}")
    with run.server() as (port, pid):
        say(f"server ready on 127.0.0.1:{port}, process {pid}; two clients train through it, each on its own notes")
        split = run.train("client", port)
        server_peak = peak(pid)
    say("the same training once more, unsplit, each in one process")
    whole = run.train("whole", port)
    result = run.result(split, whole, server_peak, time.monotonic() - started)
    _tell(run, result)


class Demo:
    """The files and processes of one demonstration."""

    def __init__(self, model: str, data: Path | None, out: Path, steps: int, plan: str, lr: float) -> None:
        from noren.wire.identity import ensure

        if model != "embedded" and data is None:
            raise ConfigError("--model needs --data: the clients of another model must have something to learn")
        self.out = out.resolve()
        self._running: list[subprocess.Popen[str]] = []
        self._clear()
        keys = self.out / "keys"
        for name in CLIENTS:
            ensure(keys, name, "client")
        ensure(keys, "server", "server")
        self._share_out(data)
        self.layers = self._check(model)
        self.plan = [part.strip() for part in plan.split(",")] if plan else self._default_plan()
        rate = lr or (LEARNING_RATE if model == "embedded" else OWN_LEARNING_RATE)
        self._values: dict[str, Any] = {
            "model": model,
            "plan": self.plan,
            "adapter": {"r": 8},
            "training": {"steps": steps, "batch_size": BATCH, "lr": rate, "schedule": "constant", "save_every": 0},
        }
        self.document = self._write("server", 1)

    def _clear(self) -> None:
        marker = self.out / ".noren-demo"
        if self.out.exists() and any(self.out.iterdir()) and not marker.is_file():
            raise ConfigError(f"{self.out} is not empty and no earlier demo's; give another folder with --out")
        shutil.rmtree(self.out, ignore_errors=True)
        self.out.mkdir(parents=True)
        marker.touch()

    def _share_out(self, data: Path | None) -> None:
        """Give each client its own file of private data."""
        if data is None:
            from noren.embedded.notes import notes

            shares = {name: [{"text": n.text} for n in notes(name, NOTES, NOTES_SEED)] for name in CLIENTS}
        else:
            from noren.training.data import Data, read_examples

            place = str(data.resolve()) if data.exists() else str(data)
            examples = read_examples(Data(path=place, holdout=0), "causal-lm", Path.cwd())[0]
            if len(examples) < 4:
                raise ConfigError(f"{data}: {len(examples)} examples; two clients need at least 4")
            shares = {name: [_record(e) for e in examples[i::2]] for i, name in enumerate(CLIENTS)}
        for name, records in shares.items():
            lines = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
            (self.out / f"{name}.jsonl").write_text(lines, encoding="utf-8")

    def _check(self, model: str) -> int:
        """Check the model's architecture once for all processes; returns its number of layers."""
        from noren.config import Document
        from noren.parties import fitness
        from noren.partition.slices import load_config
        from noren.partition.sources import open_checkpoint

        place = Document.of({"model": model}, Path.cwd()).model
        config = load_config(open_checkpoint(place))
        fitness.require(config, "causal-lm", place)
        return int(config.num_hidden_layers)

    def _default_plan(self) -> list[str]:
        ends = 2 if self.layers > 4 else 1
        return [f"client :{ends}", f"server {ends}:-{ends}", f"client -{ends}:"]

    def _write(self, name: str, port: int) -> Document:
        """Write one party's run document."""
        from noren.config import Document

        values = self._values | {
            "name": name,
            "links": {"server": f"127.0.0.1:{port}"},
            "keys": {"dir": str(self.out / "keys"), "name": name},
            "out": str(self.out / name),
        }
        if name != "server":
            values["data"] = {"path": str(self.out / f"{name}.jsonl"), "max_length": 160}
        document = Document.of(values, Path.cwd())
        (self.out / f"{name}.toml").write_text(document.to_toml(), encoding="utf-8")
        return document

    @contextmanager
    def server(self) -> Iterator[tuple[int, int]]:
        """Run the server; yields its port and process number."""
        command = ["-m", "noren.cli.main", "serve", str(self.out / "server.toml"), "--party", "server"]
        process = start([*command, "--listen", "127.0.0.1:0", "--json"], self.out / "server.log")
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            if not line.strip():
                raise NorenError(f"the server did not start; {last_words(self.out / 'server.log')}")
            yield int(json.loads(line)["port"]), process.pid
        finally:
            end(process)

    def train(self, what: str, port: int) -> dict[str, dict[str, Any]]:
        """Run `what` ("client" or "whole") of both clients side by side; returns their results by name."""
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        results: dict[str, dict[str, Any]] = {}
        columns = (TextColumn("{task.fields[client]:<8}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, TextColumn("{task.description}"), console=Console(stderr=True)) as bar:
            threads = []
            for name in CLIENTS:
                self._write(name, port)
                task = bar.add_task("starting", client=name, total=self._values["training"]["steps"])
                thread = threading.Thread(target=self._follow, args=(what, name, bar, task, results))
                thread.start()
                threads.append(thread)
            try:
                for thread in threads:
                    thread.join()
            except KeyboardInterrupt:
                for process in self._running:
                    end(process)
                raise
        for name in CLIENTS:
            if name not in results:
                raise NorenError(f"{what} {name!r} ended early; {last_words(self.out / f'{name}-{what}.log')}")
        return results

    def _follow(self, what: str, name: str, bar: Any, task: Any, results: dict[str, dict[str, Any]]) -> None:
        """Start one process and show its steps until it is done."""
        from noren.cli.show import bytes_of

        started = time.monotonic()
        log = self.out / f"{name}-{what}.log"
        process = start(["-m", "noren.cli.demo_worker", what, str(self.out / f"{name}.toml")], log)
        self._running.append(process)
        assert process.stdout is not None
        for line in process.stdout:
            words = json.loads(line)
            if "result" in words:
                results[name] = words["result"] | {"seconds": time.monotonic() - started}
                continue
            crossed = f"  {bytes_of(words['crossed'])} up and down" if words["crossed"] else ""
            speed = f"{words['tokens_per_second']:,.0f} tokens/s"
            bar.update(task, completed=words["step"], description=f"loss {words['loss']:.3f}  {speed}{crossed}")
        process.wait()

    def result(self, split: dict[str, Any], whole: dict[str, Any], server_peak: int, seconds: float) -> Any:
        """Put everything together, and write result.json and report.html."""
        import msgspec
        import peft
        import torch
        import transformers

        from noren import __version__
        from noren.partition.plan import Plan
        from noren.report.page import write_report
        from noren.report.result import ClientResult, Crossing, DemoResult, Part, Sample, Side

        plan = Plan.parse(self.plan, self.layers)
        first, one = split[CLIENTS[0]], whole[CLIENTS[0]]
        clients = []
        for name in CLIENTS:
            a, b = split[name], whole[name]
            side = {key: [a[key], b[key]] for key in ("losses", "held_out_before", "held_out_after", "peak_bytes")}
            clients.append(
                ClientResult(
                    name=name,
                    site=name,
                    split=Side(**{key: pair[0] for key, pair in side.items()}),
                    whole=Side(**{key: pair[1] for key, pair in side.items()}),
                    largest_loss_difference=max(abs(x - y) for x, y in zip(a["losses"], b["losses"], strict=True)),
                    largest_adapter_difference=b["adapter_difference"],
                    steps=len(a["losses"]),
                    bytes_floor_per_step=4 * a["tokens_per_step"] * a["hidden_size"] * 4,
                    samples=[Sample(**sample) for sample in a["samples"]],
                    **{key: a[key] for key in _COPIED},
                )
            )
        server = one["parameters"] - first["parameters"]
        bytes_each = first["file_bytes"] / max(first["parameters"], 1)
        result = DemoResult(
            title="One model, two owners, one server",
            model=self._values["model"],
            model_parameters=one["parameters"],
            hidden_size=first["hidden_size"],
            layers=self.layers,
            plan=plan.lines(),
            dtype="float32",
            parts=[
                Part(party="client", layers=plan.kept("client"), holds=list(_PRIVATE),
                     parameters=first["parameters"], file_bytes=first["file_bytes"]),
                Part(party="server", layers=plan.kept("server"), holds=[], parameters=server,
                     file_bytes=int(server * bytes_each)),
            ],
            clients=clients,
            server_peak_bytes=server_peak,
            whole_peak_bytes=one["peak_bytes"],
            crossings=[Crossing(**crossing) for crossing in first["crossings"]],
            absent=[] if any(split[n]["found"] for n in CLIENTS) else list(_ABSENT),
            seconds=seconds,
            versions={"noren": __version__, "torch": str(torch.__version__), "transformers": transformers.__version__,
                      "peft": peft.__version__, "python": sys.version.split()[0]},
            folder=str(self.out),
        )  # fmt: skip
        (self.out / "result.json").write_bytes(msgspec.json.format(msgspec.json.encode(result), indent=1))
        write_report(result, self.out / "report.html")
        return result


_COPIED = (
    "tokens_per_step", "bytes_per_step", "round_trips_per_step", "generated_tokens", "round_trips_per_token",
    "bytes_per_token", "seconds", "adapter",
)  # fmt: skip
_PRIVATE = ("embedding", "final norm", "head", "labels", "loss")
_ABSENT = ("token ids", "labels", "logits", "attention masks", "position ids", "padding")


def _record(example: Example) -> dict[str, Any]:
    """Return an example as a line of jsonl that is read back as the same example."""
    if example.messages:
        return {"messages": [{"role": role, "content": content} for role, content in example.messages]}
    if example.prompt is not None:
        return {"prompt": example.prompt, "response": example.text}
    return {"text": example.text}


def _tell(run: Demo, result: Any) -> None:
    """Print what happened."""
    from rich.console import Console
    from rich.table import Table

    from noren.cli.show import bytes_of, say

    table = Table(title="Split and whole, side by side", title_justify="left")
    for column in ("client", "held-out loss before", "after, split", "after, whole", "largest difference"):
        table.add_column(column, justify="right" if column != "client" else "left")
    for c in result.clients:
        table.add_row(
            c.name, f"{c.split.held_out_before:.4f}", f"{c.split.held_out_after:.4f}", f"{c.whole.held_out_after:.4f}",
            f"{max(c.largest_loss_difference, c.largest_adapter_difference):.1e}",
        )  # fmt: skip
    Console().print(table)
    c = result.clients[0]
    more = c.bytes_per_step / c.bytes_floor_per_step - 1
    say(f"a step: {c.round_trips_per_step:.0f} round trips, {bytes_of(c.bytes_per_step)} (floor + {more:.1%})")
    say(f"a token: {c.round_trips_per_token:.0f} round trip, {bytes_of(c.bytes_per_token)}")
    memory = ", ".join(f"{c.name} {bytes_of(c.split.peak_bytes)}" for c in result.clients)
    say(f"memory at the peak: {memory}, server {bytes_of(result.server_peak_bytes)}, "
        f"whole in one process {bytes_of(result.whole_peak_bytes)}")  # fmt: skip
    sample = c.samples[0]
    say(f"{c.name}, before: {sample.prompt} ... {' '.join(sample.before.split())}")
    say(f"{c.name}, after:  {sample.prompt} ... {' '.join(sample.after.split())}")
    found = (
        "nothing but hidden states, gradients, lengths and settings crossed"
        if result.absent
        else "CHECK THE REPORT: something crossed that may not"
    )
    say(found)
    say("no guard was active: a server that knows the base model can read much from hidden states")
    say(f"adapters (PEFT): {', '.join(c.adapter for c in result.clients)}")
    say(f"report: {run.out / 'report.html'}  ({result.seconds:.0f} s in all)")
