"""The thread that looks after connections: it ends those that may not stay, whatever they are doing."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import grpc
import pytest

from conftest import credentials
from noren.errors import Denied
from noren.parties.server import SpanServer
from noren.types import Close, Message, Status
from noren.wire.grpc_server import GrpcServer
from noren.wire.identity import issue, revoke
from noren.wire.settings import Doors
from test_doors import KEEPALIVE, Caller, Place, Work, raw_client, request
from test_doors import place as place
from tls import pair

HELLO_SECONDS = 1.0


@contextmanager
def computing(server: SpanServer) -> Iterator[None]:
    """The thread that computes is at work for as long."""
    free = threading.Event()
    other = threading.Thread(target=server.compute, args=(lambda: free.wait(60), "others"))
    other.start()
    try:
        yield
    finally:
        free.set()
        other.join()


@pytest.mark.parametrize("train", [False, True], ids=["generating", "training"])
def test_T25_revoked_while_its_request_is_computed(place: Place, train: bool) -> None:
    """Its client hears so at once; another's request, which waits as long, is answered."""
    for name in ("alpha", "beta"):
        issue(place.folder, name, "client")
    one, other = (Work(place.client(name), train=train) for name in ("alpha", "beta"))
    one.more()
    other.more()
    with computing(place.server):
        deadline = time.monotonic() + 20
        while place.server.waiting < 3:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        start = time.monotonic()
        revoke(place.folder, "alpha")
        error = one.fails()
        seconds = one.ended - start
        assert place.server.waiting == 3, "both requests are under way still"
    assert isinstance(error, Denied) and "the certificate of 'alpha' was revoked" in str(error), error
    assert seconds <= KEEPALIVE
    other.more()
    assert other.error is None and other.client.link.connections == 1
    one.stop()
    other.stop()
    print(f"cut {seconds:.2f} s after it was revoked, in the middle of a request")


@contextmanager
def impatient(place: Place) -> Iterator[Caller]:
    """A peer of the party, where a hello must come soon."""
    own, alpha = credentials(place.folder, "server"), raw_client(pair(place.folder, "alpha", "client"))
    doors = Doors(hello_seconds=HELLO_SECONDS, stall_seconds=HELLO_SECONDS)
    with (
        GrpcServer("127.0.0.1:0", own, place.server.connect, doors=doors, watch_seconds=0.1) as listening,
        Caller(listening.port, alpha) as peer,
    ):
        yield peer


def test_asking_how_a_party_is_does_not_stand_for_a_hello(place: Place) -> None:
    """A peer that says no hello has to go in time, however often it asks."""
    with impatient(place) as peer:
        start, asked = time.monotonic(), 0
        with pytest.raises(grpc.RpcError) as cut:
            while time.monotonic() < start + 20:
                assert peer.ask(Message(Status())).kind == "condition"
                asked += 1
                time.sleep(0.05)
        seconds = time.monotonic() - start
        assert cut.value.code() is grpc.StatusCode.CANCELLED
    assert HELLO_SECONDS <= seconds < HELLO_SECONDS + 1.0 and asked > 5
    print(f"cut after {seconds:.2f} s and {asked} questions")


def test_in_a_run_one_may_ask_and_be_silent(place: Place) -> None:
    """And whoever closes a run has as long for the next hello as one who connects."""
    with impatient(place) as peer:
        assert peer.ask(request("hello", place)).kind == "welcome"
        for _ in range(2):
            for _ in range(3):
                time.sleep(HELLO_SECONDS / 2)
                assert peer.ask(Message(Status())).kind == "condition"
            assert peer.ask(Message(Close())).kind == "done"
            time.sleep(HELLO_SECONDS / 2)
            assert peer.ask(request("hello", place)).kind == "welcome"
        time.sleep(1.5 * HELLO_SECONDS)
        assert peer.ask(Message(Status())).kind == "condition"


def test_a_hello_that_takes_long_to_answer_is_not_cut(place: Place) -> None:
    with impatient(place) as peer:
        with computing(place.server):
            answers: list[str] = []
            asking = threading.Thread(target=lambda: answers.append(peer.ask(request("hello", place)).kind))
            asking.start()
            asking.join(2 * HELLO_SECONDS)
            assert asking.is_alive()
        asking.join(20)
        assert answers == ["welcome"]
        assert peer.ask(Message(Status())).kind == "condition"
