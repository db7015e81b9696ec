"""A party seen from outside: its figures for Prometheus, and gRPC's standard health service.

Labels are closed lists: kinds of messages, roles, directions, reasons. No name or text of a peer becomes one.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, Final, get_args
from wsgiref.simple_server import WSGIServer

import grpc
import psutil
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from prometheus_client import CollectorRegistry, Counter, Histogram, start_http_server
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric

from noren.errors import WIRE_CODES, ConfigError, LinkError, NorenError, PeerError
from noren.types import AnyMeta
from noren.wire.grpc_link import options
from noren.wire.identity import Credentials, Insecure, Role

if TYPE_CHECKING:
    from prometheus_client.registry import Collector

log = logging.getLogger("noren.observe")

KINDS: Final = frozenset(str(meta.__struct_config__.tag) for meta in get_args(AnyMeta))
"""Every kind of message."""

ROLES: Final = frozenset(get_args(Role))

REASONS: Final = frozenset({*WIRE_CODES, "unauthenticated", "denied", "malformed", "overloaded", "revoked", "internal"})
"""Why a request or a connection was refused."""

WATCHED: Final = {
    "noren_connections": "Connections that are open",
    "noren_sessions": "Sessions that are held",
    "noren_runs": "Runs that are held",
    "noren_cache_bytes": "Bytes of keys and values that sessions hold",
    "noren_journal_bytes": "Bytes of the journal of steps",
    "noren_rss_bytes": "Resident memory of the process, in bytes",
    "noren_steps_total": "Optimiser steps applied since the process began",
}
"""What is asked for at the moment when somebody reads the figures: name -> help. "..._total" only ever grows."""

SECONDS: Final = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)


class Observed:
    """The figures of one party. Safe to call from any thread.

    `registry` is Prometheus's; by default one of its own, so that several parties of a process do not collide.
    A figure of `WATCHED` that nobody has given with `watch` is not shown at all (but for the process's memory).
    """

    def __init__(self, registry: CollectorRegistry | None = None) -> None:
        self.registry = CollectorRegistry() if registry is None else registry
        self._requests = Counter("noren_requests_total", "Requests answered", ["kind", "role"], registry=self.registry)
        self._bytes = Counter(
            "noren_bytes_total", "Bytes of frames: up from clients, down to them", ["direction"], registry=self.registry
        )
        self._seconds = Histogram(
            "noren_request_seconds", "From a whole request to its answer", ["kind"],
            registry=self.registry, buckets=SECONDS,
        )  # fmt: skip
        self._refused = Counter(
            "noren_refused_total", "Requests and connections refused", ["reason"], registry=self.registry
        )
        for reason in REASONS:  # a series that begins at 0 shows its first event
            self._refused.labels(reason)
        self._counts: dict[tuple[str, str], tuple[Counter, Histogram]] = {}
        self._up, self._down = self._bytes.labels("up"), self._bytes.labels("down")
        self._watched: dict[str, Callable[[], float]] = {}
        self.registry.register(_Reading(self._watched))
        self.watch("noren_rss_bytes", lambda: psutil.Process().memory_info().rss)

    def watch(self, name: str, read: Callable[[], float]) -> None:
        """Show `read()` under a name of `WATCHED` whenever the figures are read; a second call takes its place."""
        _require(name, WATCHED, "a figure")
        self._watched[name] = read

    def answered(self, kind: str, role: str, seconds: float, up: int, down: int) -> None:
        """Count a request of `kind` by a party of `role`: `up` bytes in, `down` bytes out, worked on for `seconds`."""
        if (counts := self._counts.get((kind, role))) is None:
            _require(kind, KINDS, "a kind of message")
            _require(role, ROLES, "a role")
            counts = self._counts[kind, role] = self._requests.labels(kind, role), self._seconds.labels(kind)
        requests, histogram = counts
        requests.inc()
        histogram.observe(seconds)
        self._up.inc(up)
        self._down.inc(down)

    def refused(self, reason: str) -> None:
        """Count a request or a connection that was refused; `reason` is one of `REASONS` (see `reason_of`)."""
        _require(reason, REASONS, "a reason")
        self._refused.labels(reason).inc()


class _Reading:
    """Prometheus's view of what is watched. A figure that cannot be read is left out; the others are shown."""

    def __init__(self, watched: dict[str, Callable[[], float]]) -> None:
        self._watched = watched

    def collect(self) -> Iterator[Metric]:
        for name, read in list(self._watched.items()):
            try:
                value = float(read())
            except Exception:
                log.exception("a figure could not be read", extra={"reason": name})
                continue
            family = CounterMetricFamily if name.endswith("_total") else GaugeMetricFamily
            yield family(name, WATCHED[name], value=value)


if TYPE_CHECKING:
    _is_collector: type[Collector] = _Reading


def _require(value: str, known: Any, what: str) -> None:
    if value not in known:
        raise AssertionError(f"{value!r} is not {what}: {', '.join(sorted(known))}")


def reason_of(error: BaseException) -> str:
    """Return the reason of `REASONS` under which an error is counted."""
    for code, cls in WIRE_CODES.items():
        if type(error) is cls:
            return code
    return "refused" if isinstance(error, NorenError) else "internal"


class MetricsServer:
    """Figures on a plain HTTP port, in Prometheus's text format. Close it, or use it as a context manager."""

    def __init__(self, server: WSGIServer, thread: threading.Thread) -> None:
        self._server, self._thread = server, thread
        self.port = int(server.server_port)

    def close(self) -> None:
        """Stop listening. Safe to call twice."""
        if self._thread.is_alive():
            self._server.shutdown()
            self._thread.join()
        self._server.server_close()

    def __enter__(self) -> MetricsServer:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def serve_metrics(address: str, observed: Observed) -> MetricsServer:
    """Show the figures at `address`: "host:port", or ":port" for this machine alone (port 0: any).

    There is no TLS and no password on this port. Raises ConfigError if the address cannot be used.
    """
    host, colon, number = address.rpartition(":")
    host = host.strip("[]") or "127.0.0.1"
    if not colon or not number.isdecimal() or int(number) > 65_535:
        raise ConfigError(f'metrics address {address!r} must be "host:port" or ":port", e.g. "127.0.0.1:9464"')
    if host not in ("127.0.0.1", "localhost", "::1"):
        log.warning("anyone who reaches port %s can read this party's figures", number)
    try:
        server, thread = start_http_server(int(number), addr=host, registry=observed.registry)
    except OSError as error:
        raise ConfigError(
            f"cannot show metrics at {address}: {error.strerror or type(error).__name__}; "
            "is the port taken, the address one of this machine?"
        ) from None
    return MetricsServer(server, thread)


Admit = Callable[[grpc.ServicerContext], None]
"""Raises PeerError unless this peer may ask."""


class _Health(health.HealthServicer):
    """The standard service, for peers that may connect; without `Watch`, which would hold a place for as long."""

    def __init__(self, admit: Admit | None) -> None:
        super().__init__(experimental_non_blocking=False)
        self._admit = admit

    def Check(self, request: Any, context: grpc.ServicerContext) -> Any:
        """Answer SERVING or NOT_SERVING."""
        if self._admit is not None:
            try:
                self._admit(context)
            except PeerError as error:
                context.abort(grpc.StatusCode.PERMISSION_DENIED, str(error)[:1000])
        return super().Check(request, context)

    def Watch(self, request: Any, context: grpc.ServicerContext) -> Any:
        """Refuse, as the service's definition allows."""
        context.abort(grpc.StatusCode.UNIMPLEMENTED, "this party answers Check only")


def add_health(server: grpc.Server, admit: Admit | None = None) -> health.HealthServicer:
    """Add the standard service `grpc.health.v1.Health` to a server that has not been started, as SERVING.

    `admit(context)` raises PeerError for a peer that may not ask (default: whoever the server's TLS lets in). Call
    `enter_graceful_shutdown()` of what is returned when the server begins to drain: from then on NOT_SERVING.
    """
    servicer = _Health(admit)
    servicer.set("noren.Party", health_pb2.HealthCheckResponse.SERVING)
    health_pb2_grpc.add_HealthServicer_to_server(servicer, server)
    return servicer


def check_health(address: str, credentials: Credentials | Insecure, seconds: float = 3.0) -> str:
    """Ask the health service at `address`: "SERVING" or "NOT_SERVING", or "UNKNOWN" if there is no such service.

    Raises LinkError if nobody answers within `seconds`, PeerError if the peer refuses to.
    """
    settings = options(seconds)
    if isinstance(credentials, Insecure):
        credentials.warn(f"connecting to {address}")
        channel = grpc.insecure_channel(address, settings)
    else:
        channel = grpc.secure_channel(address, credentials.client(), settings)
    with channel:
        try:
            answer = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=seconds)
        except grpc.RpcError as error:
            if error.code() is grpc.StatusCode.UNIMPLEMENTED:
                return "UNKNOWN"
            if error.code() in (grpc.StatusCode.PERMISSION_DENIED, grpc.StatusCode.UNAUTHENTICATED):
                raise PeerError(f"{address}: {error.details()}") from error
            raise LinkError(f"{address}: the health service did not answer: {error.details()}") from error
    return str(health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status))
