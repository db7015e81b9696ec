"""A party seen from outside: its figures, its health, and what `noren status` makes of them."""

from __future__ import annotations

import json
import socket
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, get_args

import grpc
import httpx
import msgspec
import pytest
import typer
from prometheus_client.parser import text_string_to_metric_families
from typer.testing import CliRunner

import noren
from conftest import U_SHAPED, credentials
from noren.cli import main, status
from noren.errors import WIRE_CODES, ConfigError, Denied, LinkError, NorenError, PeerError
from noren.parties.server import SpanServer
from noren.partition.stage import Stage
from noren.types import AnyMeta, Condition, Message, Status
from noren.wire.grpc_server import GrpcServer
from noren.wire.identity import Identity, Insecure, Role
from noren.wire.observe import REASONS, WATCHED, Observed, add_health, check_health, reason_of, serve_metrics
from noren.wire.settings import Doors

# Figures.


def figures(port: int) -> dict[tuple[str, ...], float]:
    """What Prometheus would read: (name, label values...) -> value."""
    text = httpx.get(f"http://127.0.0.1:{port}/metrics", trust_env=False).raise_for_status().text
    samples = [s for family in text_string_to_metric_families(text) for s in family.samples]
    return {(s.name, *(s.labels[k] for k in sorted(s.labels))): s.value for s in samples}


def test_figures_are_those_that_were_told() -> None:
    first, second = Observed(), Observed()
    first.answered("forward", "client", 0.02, 1000, 500)
    first.answered("forward", "edge", 0.2, 10, 5)
    first.refused("denied")
    for number, name in enumerate(WATCHED, 1):
        first.watch(name, lambda number=number: number)
    with serve_metrics("127.0.0.1:0", first) as one, serve_metrics(":0", second) as other:
        read, fresh = figures(one.port), figures(other.port)
    assert read["noren_requests_total", "forward", "client"] == read["noren_requests_total", "forward", "edge"] == 1
    assert (read["noren_bytes_total", "up"], read["noren_bytes_total", "down"]) == (1010, 505)
    assert read["noren_request_seconds_sum", "forward"] == pytest.approx(0.22)
    assert read["noren_request_seconds_bucket", "forward", "0.025"] == 1
    assert {key[1]: value for key, value in read.items() if key[0] == "noren_refused_total"} == {
        reason: float(reason == "denied") for reason in REASONS
    }
    assert {name: read[name,] for name in WATCHED} == {name: n for n, name in enumerate(WATCHED, 1)}
    assert fresh["noren_bytes_total", "up"] == 0, "parties of one process do not share figures"
    assert fresh["noren_rss_bytes",] > 1 << 20
    assert set(WATCHED) - {key[0] for key in fresh} == set(WATCHED) - {"noren_rss_bytes"}, "no figure is made up"


def test_labels_are_closed_lists() -> None:
    observed = Observed()
    for wrong in (
        lambda: observed.answered("shell", "client", 0.1, 1, 1),
        lambda: observed.answered("forward", "mallory", 0.1, 1, 1),
        lambda: observed.refused("because of 'x'"),
        lambda: observed.watch("noren_anything", lambda: 1),
    ):
        with pytest.raises(AssertionError):
            wrong()
    for kind in (str(meta.__struct_config__.tag) for meta in get_args(AnyMeta)):
        for role in get_args(Role):
            observed.answered(kind, role, 0.1, 1, 1)
    for error in [*(cls("x") for cls in WIRE_CODES.values()), LinkError("x"), NorenError("x"), ValueError("x")]:
        observed.refused(reason_of(error))
    assert reason_of(ValueError("x")) == "internal" and reason_of(LinkError("x")) == "refused"
    assert {reason_of(cls("x")) for cls in WIRE_CODES.values()} == set(WIRE_CODES)
    assert set(WIRE_CODES) | {"unauthenticated", "malformed", "revoked", "internal"} == REASONS


def test_a_figure_that_cannot_be_read_does_not_hide_the_others(caplog: pytest.LogCaptureFixture) -> None:
    observed = Observed()
    observed.watch("noren_runs", lambda: 1 // 0)
    observed.watch("noren_sessions", lambda: 3)
    with serve_metrics(":0", observed) as server:
        read = figures(server.port)
    assert ("noren_runs",) not in read and read["noren_sessions",] == 3
    assert "a figure could not be read" in caplog.messages


def test_metrics_listen_on_this_machine_and_end() -> None:
    server = serve_metrics(":0", Observed())
    try:
        assert server._server.server_address[0] == "127.0.0.1"
        with pytest.raises(ConfigError, match="is the port taken"):
            serve_metrics(f":{server.port}", Observed())
    finally:
        server.close()
    server.close()
    with pytest.raises(httpx.ConnectError):
        figures(server.port)
    for address in ("", "9464", "127.0.0.1:", "127.0.0.1:http", ":70000"):
        with pytest.raises(ConfigError, match='must be "host:port"'):
            serve_metrics(address, Observed())


# Health.


@contextmanager
def plain_server(prepare: Callable[[grpc.Server], Any]) -> Iterator[tuple[str, Any]]:
    with ThreadPoolExecutor(2) as pool:
        server = grpc.server(pool)
        made = prepare(server)
        port = server.add_insecure_port("127.0.0.1:0")
        server.start()
        try:
            yield f"127.0.0.1:{port}", made
        finally:
            server.stop(0).wait(5)


def test_health_is_told_until_it_drains() -> None:
    from grpc_health.v1 import health_pb2, health_pb2_grpc

    with plain_server(add_health) as (address, servicer):
        assert check_health(address, Insecure()) == "SERVING"
        with grpc.insecure_channel(address) as channel:
            stub = health_pb2_grpc.HealthStub(channel)
            with pytest.raises(grpc.RpcError) as refused:
                list(stub.Watch(health_pb2.HealthCheckRequest(), timeout=5))
            assert refused.value.code() is grpc.StatusCode.UNIMPLEMENTED, "a watcher holds no place"
            party = stub.Check(health_pb2.HealthCheckRequest(service="noren.Party"), timeout=5)
            assert party.status == health_pb2.HealthCheckResponse.SERVING
        servicer.enter_graceful_shutdown()
        assert check_health(address, Insecure()) == "NOT_SERVING"


def test_health_is_for_those_who_are_admitted() -> None:
    def nobody(context: grpc.ServicerContext) -> None:
        raise Denied("the certificate of 'client' was revoked")

    closed = plain_server(lambda server: add_health(server, nobody))
    with closed as (address, _), pytest.raises(PeerError, match="was revoked"):
        check_health(address, Insecure())
    with plain_server(lambda server: None) as (address, _):
        assert check_health(address, Insecure()) == "UNKNOWN"
    with pytest.raises(LinkError, match="did not answer"):
        check_health(address, Insecure(), 0.5)


# `noren status`.

CONDITION = Condition(
    party="server", version="0.1.0", protocol=2, model="cafe" * 8, plan=["client 0:2", "server 2:6", "client 6:8"],
    layers=["2:6"], uptime_seconds=3723.5, draining=False, connections=3, sessions=2, runs=1, cache_bytes=7_100_000,
    journal_bytes=0, rss_bytes=512_000_000,
)  # fmt: skip


class Answers:
    """A connection that answers a `status` and nothing else."""

    codecs = ("raw", "raw")
    in_run = False

    def __init__(self, owner: Identity) -> None:
        self.owner = owner

    def __call__(self, message: Message) -> Message:
        if not isinstance(message.meta, Status):
            raise Denied("only a status")
        return Message(CONDITION)

    def expect(self, header: Any) -> None:
        pass

    def disconnect(self) -> None:
        pass


@pytest.fixture
def asked(keys: Path) -> Callable[..., Any]:
    """Run `noren status` with these arguments."""
    app = typer.Typer(cls=main.Commands)
    app.callback()(lambda: None)
    app.command("status")(status.status)

    def run(address: str, *arguments: str, name: str = "client") -> Any:
        words = ["status", address, "--keys", str(keys), "--name", name, *arguments]
        return CliRunner().invoke(app, words, catch_exceptions=False)

    return run


@contextmanager
def party(keys: Path, doors: Doors | None = None) -> Iterator[tuple[GrpcServer, str]]:
    with GrpcServer("127.0.0.1:0", credentials(keys, "server"), Answers, doors=doors) as server:
        yield server, f"127.0.0.1:{server.port}"


def test_status_tells_how_a_party_is(asked: Callable[..., Any], keys: Path) -> None:
    assert "status" in main.COMMANDS
    with party(keys) as (server, address):
        answer = asked(address, "--json")
        assert answer.exit_code == 0, answer.output
        assert json.loads(answer.stdout) == msgspec.structs.asdict(CONDITION) | {
            "address": address, "health": "SERVING",
        }  # fmt: skip
        shown = asked(address)
        assert shown.exit_code == 0
        assert f"server at {address}" in shown.stdout
        for words in ("serving", "client 0:2, server 2:6, client 6:8", "1:02:03", "7.1 MB", "512 MB", "cafe" * 8):
            assert words in shown.stdout, words
        server._health.enter_graceful_shutdown()
        assert json.loads(asked(address, "--json").stdout)["health"] == "NOT_SERVING"


def test_status_of_a_party_at_work(asked: Callable[..., Any], keys: Path, llama_folder: Path) -> None:
    stage = Stage.load(llama_folder, U_SHAPED, "server", "causal-lm")
    server = SpanServer(stage)
    try:
        with GrpcServer("127.0.0.1:0", credentials(keys, "server"), server.connect) as listening:
            told = json.loads(asked(f"127.0.0.1:{listening.port}", "--json").stdout)
            server.draining = True
            assert "draining" in asked(f"127.0.0.1:{listening.port}").stdout
    finally:
        server.close()
    assert (told["party"], told["health"], told["layers"]) == ("server", "SERVING", ["2:6"])
    assert (told["model"], told["plan"]) == (stage.fingerprint, stage.plan.lines())
    assert (told["version"], told["connections"], told["runs"]) == (noren.__version__, 1, 0), "its own connection"
    assert told["rss_bytes"] > 1 << 20 and told["uptime_seconds"] >= 0


def test_status_of_a_party_that_is_not_there_or_refuses(
    asked: Callable[..., Any], keys: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(status, "PATIENCE", 0.5)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        nobody = f"127.0.0.1:{taken.getsockname()[1]}"
    gone = asked(nobody, "--json")
    assert gone.exit_code == 4 and nobody in gone.output
    with party(keys, doors=Doors(clients=["other"])) as (_, address):
        refused = asked(address)
        assert refused.exit_code == 5 and "'client' is not among the clients" in refused.output
        assert asked(address, "--json", name="other").exit_code == 0
    assert asked(nobody, name="nobody").exit_code == 2, "no such certificate"
    assert asked(nobody, name="server").exit_code == 2, "a server's certificate opens no connections"


def test_status_watches(asked: Callable[..., Any], keys: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(status, "PATIENCE", 0.5)
    with party(keys) as (server, address):
        waited: list[float] = []

        def pause(seconds: float) -> None:
            waited.append(seconds)
            if len(waited) == 2:
                server.stop(0)
            if len(waited) == 3:
                raise KeyboardInterrupt

        monkeypatch.setattr(status, "_pause", pause)
        answer = asked(address, "--json", "--watch", "2.5")
    assert answer.exit_code == 130
    lines = [json.loads(line) for line in answer.stdout.splitlines() if line.startswith("{")]
    assert waited == [2.5] * 3
    assert [line["health"] for line in lines] == ["SERVING", "SERVING", "UNREACHABLE"]
