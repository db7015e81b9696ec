"""The decoder of frames against what a hostile peer can send: refused with a sentence, at once, without memory."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import time
import tracemalloc
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

import noren
from frames import KEY, MOST, Mutants, corpus, decoder, expectations, forward, schema, sealed
from malformed import FORWARD, GIB, MALFORMED, Case, head, hidden
from noren.errors import NorenError, OverBudget, PeerError, ProtocolError
from noren.types import Done, Message
from noren.wire.envelope import MAX_HEADER, Expect, Incoming, encode, pack
from noren.wire.seal import Seal

PAGE = os.sysconf("SC_PAGE_SIZE")
SECONDS = 0.010


def memory() -> tuple[int, int]:
    """Bytes of this process: reserved, and in use."""
    reserved, used, *_ = Path("/proc/self/statm").read_text().split()
    return int(reserved) * PAGE, int(used) * PAGE


def arriving(case: Case) -> Incoming:
    """A connection's decoder that has taken what came before."""
    seal = Seal(KEY, client=False)
    for earlier in case.before:
        assert Incoming(seal).feed(earlier) is not None
    return Incoming(seal, case.expect, case.most)


def refused(case: Case) -> tuple[PeerError, float]:
    """Feed a case to a decoder; return what it raised, and what the refused frame took, in seconds of CPU."""
    incoming = arriving(case)
    started = time.thread_time()
    try:
        for frame in case.frames:
            started = time.thread_time()
            incoming.feed(frame)
    except PeerError as error:
        return error, time.thread_time() - started
    raise AssertionError("it was accepted")


@pytest.mark.parametrize("name", MALFORMED)
def test_T6_malformed(name: str) -> None:
    case = MALFORMED[name]
    tries = [refused(case) for _ in range(5)]
    error, best = tries[0][0], min(seconds for _, seconds in tries)
    assert type(error) is case.error and case.says in str(error), error
    assert len(str(error)) < 1000
    assert best < SECONDS
    print(f"{name}: {best * 1e6:.0f} us: {str(error)[:100]}")


def test_T6_malformed_are_sixty_at_least_and_their_like_is_accepted() -> None:
    assert len(MALFORMED) >= 60
    print(f"{len(MALFORMED)} malformed; ", end="")
    for header, body in corpus():
        assert decoder().feed(sealed(header, body)) is not None
    agreed = schema().request
    for tokens in (0, 1, 3, 4096):
        sent = forward(tokens)
        frames = encode(sent, 1, Seal(KEY, client=True))
        packed = pack(sent)
        assert b"".join(frames) == sealed(packed.header, b"".join(packed.bodies))  # one pass or many, the same tag
        whole, pieces = decoder(agreed), decoder(agreed)
        last = [whole.feed(frame) for frame in frames][-1]
        cut = [*frames[:-1], frames[-1][:-1], frames[-1][-1:]]
        piecewise = [pieces.feed(frame) for frame in cut][-1]
        assert last is not None and piecewise is not None and last.meta == piecewise.meta == sent.meta
        for got in (last, piecewise):
            assert torch.equal(got.tensors["hidden"], sent.tensors["hidden"])
    print(f"{len(corpus())} real messages accepted")


def test_T6_tensors_begin_where_their_type_may() -> None:
    """Whatever stood before them in the body: memory that is not aligned is undefined behaviour in a kernel."""
    sent = {"a": torch.ones(3).bfloat16(), "b": torch.randn(2), "c": torch.arange(2), "d": torch.randn(5, 1).half()}
    packed = pack(Message(Done(), sent))
    message = decoder().feed(sealed(packed.header, b"".join(packed.bodies)))
    assert message is not None
    for name, tensor in message.tensors.items():
        assert torch.equal(tensor, sent[name])
        assert tensor.data_ptr() % tensor.itemsize == 0


REFUSED_EARLY = {
    "not agreed": hidden((1000, 65_536), says="65536", most=GIB),
    "another codec": hidden((1000, 65_536), codec="int8", says="int8", most=GIB),
    "above the limit": Case([sealed(head(meta=FORWARD), size=GIB)], "the limit is", OverBudget),
    "announced twice": Case([sealed(head(["x", "f32", [1 << 27], "raw", GIB // 2], ["x", "f32", [1 << 27], "raw",
                                         GIB // 2]), size=GIB)], "share a name", most=GIB),
    "sizes that disagree": Case([sealed(head(["x", "f32", [1 << 27], "raw", GIB // 2]), size=GIB)], "the prefix",
                                most=GIB),
    "more than the frame could hold": Case([sealed(head(["x", "f32", [1 << 28], "zstd", 64]), bytes(64))],
                                           "once decoded", OverBudget, most=GIB // 2),
    "repeated": Case([sealed(head(["x", "f32", [1 << 28], "raw", GIB]), size=GIB)], "came after", most=GIB,
                     before=(sealed(head()),)),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED_EARLY)
def test_T6_no_memory_is_taken_for_a_body_that_is_refused(name: str) -> None:
    case = REFUSED_EARLY[name]
    refused(case)
    incoming, reserved = arriving(case), memory()[0]
    tracemalloc.start()
    try:
        with pytest.raises(PeerError) as raised:
            incoming.feed(case.frames[0])
        taken = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    grown = memory()[0] - reserved
    assert type(raised.value) is case.error and case.says in str(raised.value)
    assert taken < 64 << 10
    assert grown < 8 << 20  # tracemalloc takes some
    print(f"{name}: {taken} bytes, {grown} reserved, of a gibibyte announced")


def test_T6_a_body_for_which_there_is_no_memory_is_refused() -> None:
    code = (
        "import resource; from noren.errors import OverBudget; from frames import decoder, sealed; "
        "from malformed import head; resource.setrlimit(resource.RLIMIT_AS, (6 << 30, 6 << 30))\n"
        "held = []\n"
        "try:\n"
        "    for n in range(8):\n"
        "        held.append(decoder(most=1 << 30))\n"
        "        held[-1].feed(sealed(head(['x', 'f32', [1 << 28], 'raw', 1 << 30]), size=1 << 30)[:-16])\n"
        "except OverBudget as error:\n"
        "    print(len(held), error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], env=_environment(), capture_output=True, text=True, timeout=60)
    assert "there is no memory for a message of 1073741840 bytes" in done.stdout, done.stderr[-2000:]
    print(done.stdout)


@pytest.mark.parametrize("entry", ['["x","f32",[0],"raw",0]', "[]", "0", '["",""]', '["","raw",[],"raw",0]'])
def test_T6_header_of_a_million_tensors(entry: str) -> None:
    for length in (MAX_HEADER, 1_000_000 * (len(entry) + 1) + 50):
        start, end = b'{"meta":{"kind":"done"},"tensors":[', b"]}"
        some = (length - len(start) - len(end) + 1) // (len(entry) + 1)
        header = start + ",".join([entry] * some).encode() + end
        tries = [refused(Case([sealed(header)], "")) for _ in range(5)]
        error, best = tries[0][0], min(seconds for _, seconds in tries)
        assert isinstance(error, ProtocolError)
        assert best < 0.050
        print(f"{some} entries of {entry!r}, {len(header)} bytes: {best * 1e3:.1f} ms: {error}")


def test_T6_header_of_as_many_tensors_as_may_be() -> None:
    """All entries are right and distinct, but the last: the most work that a header can make."""
    entries = [[f"t{n:05}", "f32", [0, 1], "raw", 0] for n in range(16_383)] + [["t", "f32", [0, 1], "rew", 0]]
    error, best = min((refused(Case([sealed(head(*entries))], "")) for _ in range(5)), key=lambda tried: tried[1])
    assert "codec 'rew'" in str(error)
    assert best < 0.100
    print(f"{len(entries)} tensors: {best * 1e3:.1f} ms")


def mutations(seed: int, count: int, judges: list[Expect | None]) -> None:
    """Feed so many mutants to decoders; print what became of them."""
    mutants, accepted, refused_, waiting, slowest = Mutants(seed), 0, 0, 0, 0.0
    for n in range(count // 20):  # the allocator's caches fill before memory is measured
        decoder(judges[n % len(judges)], MOST)
        mutants.frame()
    gc.collect()
    before = memory()[1]
    for n in range(count):
        frame, incoming = mutants.frame(), decoder(judges[n % len(judges)])
        cut = n * 7919 % (len(frame) + 1) if n % 4 == 0 else len(frame)
        pieces = [frame[:cut], frame[cut:]] if cut < len(frame) else [frame]
        started, message = time.perf_counter(), None
        try:
            for piece in pieces:
                message = incoming.feed(piece)
            accepted, waiting = accepted + (message is not None), waiting + (message is None)
        except NorenError:
            refused_ += 1
        except Exception as error:
            raise AssertionError(f"seed {seed}, mutant {n}: {frame!r}") from error
        slowest = max(slowest, time.perf_counter() - started)
    gc.collect()
    grown = memory()[1] - before
    print(f"seed {seed}: {count} mutants: {accepted} accepted, {refused_} refused, {waiting} wait for more; "
          f"slowest {slowest * 1e3:.1f} ms; {grown / 1048576:+.1f} MiB")  # fmt: skip
    assert accepted and refused_ and waiting
    assert slowest < 1
    assert grown < 32 << 20


def test_T6_mutations() -> None:
    mutations(20_061, 20_000, expectations())


@pytest.mark.nightly
@pytest.mark.timeout(4 * 3600)
def test_T6_mutations_at_length() -> None:
    seed = int.from_bytes(os.urandom(4), "big")
    mutations(seed, 5_000_000, expectations())


def _environment() -> dict[str, str]:
    folders = [str(Path(__file__).parent), str(Path(noren.__file__).parents[1])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(folders)}


def _fuzz(seconds: int, folder: Path) -> str:
    if find_spec("atheris") is None:
        pytest.skip("atheris is not installed: pip install atheris")
    script = Path(__file__).with_name("fuzz_envelope.py")
    command = [sys.executable, str(script), "--seconds", str(seconds), "--corpus", str(folder)]
    done = subprocess.run(command, env=_environment(), capture_output=True, text=True, timeout=seconds + 120)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stderr


def test_T6_coverage_guided_for_a_moment(tmp_path: Path) -> None:
    log = _fuzz(3, tmp_path)
    print(log[-300:])
    assert "Done " in log


@pytest.mark.nightly
@pytest.mark.timeout(2400)
def test_T6_coverage_guided(tmp_path: Path) -> None:
    log = _fuzz(1800, tmp_path)
    print(log[-1000:])
    assert "Done " in log
