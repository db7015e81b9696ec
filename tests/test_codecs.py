"""Codecs: what comes back is within the stated bound, whatever a tensor holds; what a hostile peer sends is refused."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from noren.config import Document
from noren.errors import ConfigError, ProtocolError, SessionLost
from noren.types import Deltas
from noren.wire.codecs import CODECS, Codec, codec
from noren.wire.codecs.delta import OVERHEAD, DeltaReceiver, DeltaSender

NAMES = ["raw", "bf16", "fp16", "fp8", "int8", "int8-group", "int4", "zstd"]
ROUNDING = ["bf16", "fp16", "fp8", "int8", "int8-group", "int4"]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SHAPES = [(1, 8), (3, 48), (128, 768), (5, 100), (0, 64)]
ODD_SHAPES = [(), (7,), (3, 1), (4, 0), (2, 3, 65), (1, 40000)]
SEED = 20240611


def normal(shape: Sequence[int], dtype: torch.dtype, seed: int = SEED) -> Tensor:
    return torch.randn(tuple(shape), generator=torch.Generator().manual_seed(seed)).to(dtype)


def outlier(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    x = normal(shape, dtype)
    if x.numel():
        x.view(-1)[x.numel() // 2] = torch.finfo(dtype).max * 0.7
    return x


def heavy(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    return (normal(shape, torch.float32) / normal(shape, torch.float32, 1).abs().clamp(min=1e-3)).to(dtype)


def denormal(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    info = torch.finfo(dtype)
    return (normal(shape, torch.float32).clamp(-2, 2).double() * info.smallest_normal / 4).to(dtype)


def extreme(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    return torch.where(normal(shape, torch.float32) > 0, 1.0, -1.0).to(dtype) * torch.finfo(dtype).max


def mixed(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Magnitudes over the whole range of the type."""
    powers = torch.linspace(-1, 1, math.prod(shape), dtype=torch.float64).reshape(tuple(shape)) * 37
    return (normal(shape, torch.float64).sign() * 10**powers).clamp(-(m := torch.finfo(dtype).max), m).to(dtype)


TENSORS: dict[str, Callable[[Sequence[int], torch.dtype], Tensor]] = {
    "normal": normal, "outlier": outlier, "heavy": heavy, "denormal": denormal, "extreme": extreme, "mixed": mixed,
    "zeros": lambda shape, dtype: torch.zeros(tuple(shape), dtype=dtype),
}  # fmt: skip


def test_names() -> None:
    assert list(CODECS) == NAMES
    assert all(found.name == name for name, found in CODECS.items())
    assert [name for name in NAMES if CODECS[name].lossless] == ["raw", "zstd"]
    assert [name for name in NAMES if not CODECS[name].fixed] == ["zstd"]
    with pytest.raises(ConfigError, match="raw, bf16, fp16, fp8, int8, int8-group, int4, zstd"):
        codec("gzip")


@pytest.mark.parametrize("kind", TENSORS)
@pytest.mark.parametrize("name", NAMES)
def test_round_trip_stays_within_the_bound(name: str, kind: str) -> None:
    for dtype in DTYPES:
        for shape in SHAPES + ODD_SHAPES:
            x = TENSORS[kind](shape, dtype)
            for seed in (None, SEED):
                payload = codec(name).encode(x, seed)
                assert payload.dtype == torch.uint8 and payload.dim() == 1
                y = codec(name).decode(payload, x.shape, dtype)
                where = f"{name} {kind} {dtype} {shape} seed={seed}"
                assert y.shape == x.shape and y.dtype == dtype, where
                assert torch.isfinite(y).all(), where
                error = (x.double() - y.double()).abs()
                bound = codec(name).bound(x, stochastic=seed is not None)
                assert bound.dtype == torch.float64 and torch.isfinite(bound).all(), where
                assert bool((error <= bound).all()), f"{where}: {float((error - bound).max()):g} beyond the bound"
                if CODECS[name].lossless or kind == "zeros":
                    assert torch.equal(x, y), where


def test_bounds_are_as_tight_as_said() -> None:
    """A bound is no licence: of each codec, relative to the row's largest value, and met to a half by some element."""
    x = normal((128, 768), torch.float32)
    for name, most in {"bf16": 2**-8, "fp16": 2**-11, "fp8": 2**-4, "int8": 1 / 250, "int8-group": 1 / 250}.items():
        bound = codec(name).bound(x)
        assert float((bound / x.abs().amax(1, keepdim=True)).max()) <= most * 1.01, name
        error = (codec(name).decode(codec(name).encode(x), x.shape, x.dtype) - x).abs().double()
        assert float((error / bound).max()) > 0.5, name
    error = codec("int4").decode(codec("int4").encode(x), x.shape, x.dtype) - x
    print(f"int4: relative error {float(error.norm() / x.norm()):.3f}")
    assert float(error.norm() / x.norm()) < 0.15
    assert float(codec("int4").bound(x).max()) < 64 * 0.5


def test_outliers_cross_exactly_and_spare_the_rest() -> None:
    x = normal((16, 768), torch.float32)
    x[:, 300], x[:, 11] = 5000.0, -3000.123
    y = codec("int8").decode(codec("int8").encode(x), x.shape, x.dtype)
    assert torch.equal(x[:, [11, 300]], y[:, [11, 300]])
    assert float((x - y).abs().max()) < 0.02


def test_rotation_spreads_an_outlier() -> None:
    x = normal((16, 64), torch.float32)
    x[:, 5] = 20.0
    rotated = codec("int4").decode(codec("int4").encode(x), x.shape, x.dtype) - x
    scale = x.abs().amax(1, keepdim=True) / 7
    direct = (x / scale).round() * scale - x
    print(f"int4 beside an outlier: error {float(rotated.norm()):.1f} rotated, {float(direct.norm()):.1f} without")
    assert float(rotated.norm()) < float(direct.norm()) / 2


@pytest.mark.parametrize("largest", [65504.0, 65520.0, 1e6, 3.4e38])
def test_fp16_saturates(largest: float) -> None:
    x = torch.tensor([[largest, -largest, 1.0]])
    for seed in (None, 3):
        y = codec("fp16").decode(codec("fp16").encode(x, seed), x.shape, x.dtype)
        assert y.tolist() == [[65504.0, -65504.0, 1.0]]
    assert float(codec("fp16").bound(x)[0, 0]) >= largest - 65504.0


@pytest.mark.parametrize("name", ROUNDING)
def test_rounding_by_chance_has_the_right_mean(name: str) -> None:
    """2000 draws: every element's mean is within 5 standard errors (and float32's own precision) of its value."""
    x = heavy((2, 80), torch.float32)
    draws = torch.stack([codec(name).decode(codec(name).encode(x, SEED + i), x.shape, x.dtype) for i in range(2000)])
    low, mean = draws.double().var(0, correction=1), draws.double().mean(0)
    away = (mean - x.double()).abs()
    allowed = 5 * (low / 2000).sqrt() + 1e-5 * codec(name).bound(x, stochastic=True) + 1e-6 * x.double().abs()
    worst = float((away / allowed).max())
    print(f"{name}: seed {SEED}, worst element at {5 * worst:.2f} standard errors")
    assert worst <= 1
    assert int((draws.amin(0) < draws.amax(0)).sum()) > 100, "nothing was left to chance"


@pytest.mark.parametrize("name", NAMES)
def test_same_seed_gives_same_bytes(name: str) -> None:
    x = heavy((128, 768), torch.float32)
    state = torch.get_rng_state()
    first = codec(name).encode(x, SEED)
    assert torch.equal(first, codec(name).encode(x.clone(), SEED))
    assert torch.equal(codec(name).encode(x), codec(name).encode(x))
    assert torch.equal(torch.get_rng_state(), state), "the program's own generator was touched"
    assert torch.equal(first, codec(name).encode(x, SEED + 1)) == CODECS[name].lossless
    assert torch.equal(codec(name).encode(x, -1), codec(name).encode(x, -1 % (1 << 63)))


@pytest.mark.parametrize("dtype", DTYPES)
def test_sizes_follow_from_the_shape(dtype: torch.dtype) -> None:
    wide = dtype.itemsize
    expected = {
        "raw": 128 * 768 * wide,
        "bf16": 128 * 768 * 2,
        "fp16": 128 * 768 * 2,
        "fp8": 128 * (768 + 4),
        "int8": 128 * (768 + 4 + 6 * (wide + 2)),
        "int8-group": 128 * (768 + 12 * 2),
        "int4": 128 * (384 + 12 * 2),
    }
    for name, size in expected.items():
        assert codec(name).size((128, 768), dtype) == codec(name).size((2, 64, 768), dtype) == size
    for name in NAMES:
        for shape in SHAPES + ODD_SHAPES:
            for make in TENSORS.values():
                payload = codec(name).encode(make(shape, dtype))
                size = codec(name).size(shape, dtype)
                assert len(payload) == size if CODECS[name].fixed else len(payload) <= size, (name, shape)
    noise = torch.randint(0, 256, (1 << 20,), dtype=torch.uint8).view(torch.int64)
    assert len(codec("zstd").encode(noise)) <= codec("zstd").size(noise.shape, noise.dtype)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_does_not_leave(name: str, bad: float) -> None:
    for dtype in DTYPES:
        x = normal((128, 768), dtype)
        x[-1, -1] = bad
        with pytest.raises(ProtocolError, match="not finite"):
            codec(name).encode(x)


def test_whole_numbers_cross_only_without_loss() -> None:
    x = torch.arange(-40, 40).view(8, 10)
    for name in ("raw", "zstd"):
        assert torch.equal(codec(name).decode(codec(name).encode(x), x.shape, x.dtype), x)
    for name in ROUNDING:
        with pytest.raises(ProtocolError, match="send that raw"):
            codec(name).encode(x)
        with pytest.raises(ProtocolError, match="send that raw"):
            codec(name).decode(torch.zeros(80, dtype=torch.uint8), x.shape, x.dtype)


def test_views_and_graphs_cross_as_their_values() -> None:
    x = normal((768, 6), torch.float32).requires_grad_()
    for name in NAMES:
        payload = codec(name).encode(x.t(), 1)
        assert torch.equal(payload, codec(name).encode(x.detach().t().contiguous(), 1))
        shifted = torch.cat((torch.zeros(3, dtype=torch.uint8), payload))[3:]
        straight = codec(name).decode(payload, (6, 768), torch.float32)
        assert torch.equal(codec(name).decode(shifted, (6, 768), torch.float32), straight)
        spread = torch.stack((payload, payload), 1)[:, 0]
        assert torch.equal(codec(name).decode(spread, (6, 768), torch.float32), straight)


def refused_or_finite(found: Codec, payload: Tensor, shape: Sequence[int], dtype: torch.dtype) -> bool:
    """Decode; True if it was refused. Anything but ProtocolError, or a value that is not finite, fails the test."""
    try:
        y = found.decode(payload, shape, dtype)
    except ProtocolError:
        return True
    assert y.shape == tuple(shape) and y.dtype == dtype and torch.isfinite(y).all()
    return False


@settings(max_examples=150, deadline=None, derandomize=True)
@given(st.data())
def test_hostile_payloads_are_refused_or_finite(data: st.DataObject) -> None:
    name, dtype = data.draw(st.sampled_from(NAMES)), data.draw(st.sampled_from(DTYPES))
    shape = data.draw(st.sampled_from([(1, 8), (3, 48), (2, 200), (0, 64), (2, 1), (1, 3, 65)]))
    size = codec(name).size(shape, dtype)
    length = data.draw(st.one_of(st.just(size), st.integers(0, 2 * size + 9)))
    draw = data.draw(st.sampled_from(["random", "ones", "flipped"]))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 1 << 32)))
    payload = torch.randint(0, 256, (length,), generator=generator, dtype=torch.uint8)
    if draw == "ones":
        payload.fill_(255)
    elif draw == "flipped":
        payload = codec(name).encode(heavy(shape, dtype)).clone()
        if len(payload):
            at = torch.randint(0, len(payload), (3,), generator=generator)
            payload[at] = torch.randint(0, 256, (3,), generator=generator, dtype=torch.uint8)
    refused = refused_or_finite(codec(name), payload, shape, dtype)
    if CODECS[name].fixed and len(payload) != size:
        assert refused


BF16_NAN, BF16_INF, BF16_MINUS = [0xC0, 0x7F], [0x80, 0x7F], [0x80, 0xBF]
F32_NAN, F32_INF, F32_MINUS = [0, 0, 0xC0, 0x7F], [0, 0, 0x80, 0x7F], [0, 0, 0x80, 0xBF]
FORGED = [
    *(("raw", 0, bad) for bad in (F32_NAN, F32_INF)),
    *(("bf16", 2, bad) for bad in (BF16_NAN, BF16_INF)),
    *(("fp16", 2, bad) for bad in ([0, 0x7E], [0, 0x7C])),
    *(("fp8", 0, bad) for bad in (F32_NAN, F32_INF, F32_MINUS)),
    *(("fp8", 9, [bad]) for bad in (0x7F, 0xFF)),
    *(("int8", 0, bad) for bad in (F32_NAN, F32_INF, F32_MINUS)),
    *(("int8", 8, bad) for bad in (F32_NAN, F32_INF)),  # outliers of two rows of 8: after two scales
    *(("int8", 24, bad) for bad in ([8, 0], [0xFF, 0xFF], [0xFF, 0x7F])),  # their columns
    ("int8", 24, [3, 0, 3, 0]),
    ("int8", 24, [3, 0, 2, 0]),
    *(("int8-group", 0, bad) for bad in (BF16_NAN, BF16_INF, BF16_MINUS)),
    *(("int4", 0, bad) for bad in (BF16_NAN, BF16_INF, BF16_MINUS)),
]


@pytest.mark.parametrize(("name", "at", "forged"), FORGED)
def test_forged_fields_are_refused(name: str, at: int, forged: list[int]) -> None:
    x = normal((2, 8), torch.float32)
    payload = codec(name).encode(x).clone()
    codec(name).decode(payload, x.shape, x.dtype)
    payload[at : at + len(forged)] = torch.tensor(forged, dtype=torch.uint8)
    with pytest.raises(ProtocolError):
        codec(name).decode(payload, x.shape, x.dtype)


def test_scales_are_never_zero() -> None:
    """A scale of zero, or a denormal one on a machine that flushes them, would divide by zero."""
    for name, kind in (
        ("fp8", torch.float32),
        ("int8", torch.float32),
        ("int8-group", torch.bfloat16),
        ("int4", torch.bfloat16),
    ):
        for x in (torch.zeros(1, 64), torch.full((1, 64), 1e-44)):
            scale = codec(name).encode(x)[: kind.itemsize].view(kind)
            assert float(scale) == 2.0**-126, name


def test_the_largest_scales_stay_finite() -> None:
    for name, scale in (("int8", [255, 255, 127, 127]), ("int8-group", [127, 127]), ("int4", [127, 127])):
        payload = torch.full((codec(name).size((1, 64), torch.float32),), 127, dtype=torch.uint8)
        if name == "int8":
            payload = codec(name).encode(torch.ones(1, 64))
            payload[-64:] = 127
        payload[: len(scale)] = torch.tensor(scale, dtype=torch.uint8)
        for dtype in DTYPES if name != "int8" else [torch.float32]:
            y = codec(name).decode(payload, (1, 64), dtype)
            assert torch.isfinite(y).all() and float(y.abs().max()) == torch.finfo(dtype).max


@pytest.mark.parametrize("name", NAMES)
def test_impossible_shapes_are_refused_before_memory_is_taken(name: str) -> None:
    payload = codec(name).encode(torch.ones(1, 8))
    for shape in (
        (-1, 8),
        (1 << 47, 1 << 47),
        (0, 1 << 47, 1 << 47),
        (1 << 47, 1 << 47, 0),
        (1 << 40, 8),
        (1 << 20, 9),
    ):
        with pytest.raises(ProtocolError):
            codec(name).decode(payload, shape, torch.float32)
    for shape in ((0, 1 << 47, 1 << 47), (1 << 47, 1 << 47, 0), (-1, 0)):
        with pytest.raises(ProtocolError, match="no tensor has shape"):
            codec(name).decode(payload[:0], shape, torch.float32)
    if not CODECS[name].lossless:
        with pytest.raises(ProtocolError, match="at most 1048576"):
            codec(name).size((1, (1 << 20) + 1), torch.float32)
    with pytest.raises(ProtocolError, match="flat uint8"):
        codec(name).decode(payload.view(torch.int8), (1, 8), torch.float32)
    with pytest.raises(ProtocolError, match="flat uint8"):
        codec(name).decode(payload.view(-1, 1), (1, 8), torch.float32)


def zstd_refuses(payload: bytes, match: str, shape: tuple[int, ...] = (128, 768)) -> None:
    with pytest.raises(ProtocolError, match=match):
        codec("zstd").decode(torch.tensor(list(payload), dtype=torch.uint8), shape, torch.float32)


def test_zstd_takes_one_whole_frame_of_its_own_kind() -> None:
    size = 128 * 768 * 4
    frame = zstandard.ZstdCompressor(level=1).compress(bytes(size))
    zstd_refuses(frame[:-1], "not one frame")
    zstd_refuses(frame + b"\0", "not one frame")
    zstd_refuses(frame + frame, "not one frame")
    zstd_refuses(zstandard.ZstdCompressor().compress(bytes(size - 1)), f"announces {size - 1}")
    zstd_refuses(zstandard.ZstdCompressor(write_content_size=False).compress(bytes(size)), "announces no size")
    zstd_refuses(zstandard.ZstdCompressor().compress(b"0" * 8), "announces 8", (0, 64))
    zstd_refuses(b"\x50\x2a\x4d\x18" + size.to_bytes(4, "little") + bytes(64), "zstd: ")  # a frame to skip
    zstd_refuses(b"", "not one frame")
    zstd_refuses(b"\x50\x2a\x4d\x18" + (32).to_bytes(4, "little") + bytes(32), "zstd: ", (1, 8))


BOMB = """
import resource, sys, threading, torch, zstandard
from noren.errors import ProtocolError
from noren.wire.codecs import codec

shape, size, huge = (128, 768), 128 * 768 * 4, 1 << 30
def bomb(announced):
    made = zstandard.ZstdCompressor(level=3, write_content_size=announced).compressobj(size=huge if announced else -1)
    block, parts = bytes(1 << 20), []
    for _ in range(huge >> 20):
        parts.append(made.compress(block))
    return b"".join([*parts, made.flush()])
honest, bare = bomb(True), bomb(False)
head = zstandard.get_frame_parameters(honest)
assert head.content_size == huge and zstandard.frame_content_size(bare) == -1
at = honest.index(huge.to_bytes(4, "little"))
liar = honest[:at] + size.to_bytes(4, "little") + honest[at + 4:]
assert zstandard.frame_content_size(liar) == size
bombs = {"announced": honest, "not announced": bare, "lying": liar}
codec("zstd").decode(codec("zstd").encode(torch.ones(shape)), shape, torch.float32)
def peak():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) << 10 for line in status if line.startswith("VmHWM"))
with open("/proc/self/clear_refs", "w") as refs:
    refs.write("5")
before, refused = peak(), []
def throw(payload, name):
    try:
        codec("zstd").decode(payload, shape, torch.float32)
    except ProtocolError as error:
        refused.append(name)
for name, raw in bombs.items():
    payload = torch.frombuffer(bytearray(raw), dtype=torch.uint8)
    throws = [threading.Thread(target=throw, args=(payload, name)) for _ in range(4)]
    for thread in throws: thread.start()
    for thread in throws: thread.join()
print(len(refused), peak() - before, {name: len(raw) for name, raw in bombs.items()})
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/clear_refs"), reason="peak memory is read from Linux's /proc")
def test_T7_codec_bombs_are_refused_within_32_mib() -> None:
    """A GiB of zeros, announced, not announced, or announced as the size due; four at a time."""
    out = subprocess.run([sys.executable, "-c", BOMB], capture_output=True, text=True, timeout=120)
    assert out.returncode == 0, out.stderr
    refused, growth = (int(word) for word in out.stdout.split()[:2])
    print(
        f"T7 codec bombs: {refused} of 12 refused, peak memory grew by {growth / 2**20:.1f} MiB; {out.stdout.strip()}"
    )
    assert refused == 12
    assert growth < 32 << 20


MEMORY = """
import sys, torch
from noren.wire.codecs import CODECS

def peak():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) << 10 for line in status if line.startswith("VmHWM"))
shape, dtype = (16384, 768), torch.bfloat16
for name, codec in CODECS.items():
    payload = codec.encode(torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype), 1)
    codec.decode(codec.encode(torch.ones(8, 768)), (8, 768), torch.float32)
    with open("/proc/self/clear_refs", "w") as refs:
        refs.write("5")
    before = peak()
    result = codec.decode(payload, shape, dtype)
    print(name, peak() - before, codec.size(shape, dtype), result.numel() * result.itemsize)
    del payload, result
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/clear_refs"), reason="peak memory is read from Linux's /proc")
def test_decoding_needs_little_more_than_payload_and_result() -> None:
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "1048576"}  # freed memory goes back, peaks are real
    out = subprocess.run([sys.executable, "-c", MEMORY], capture_output=True, text=True, timeout=120, env=environment)
    assert out.returncode == 0, out.stderr
    lines = [line.split() for line in out.stdout.splitlines()]
    assert [line[0] for line in lines] == NAMES
    for name, *figures in lines:
        growth, payload, result = map(int, figures)
        print(f"{name}: decoding {payload >> 10} KiB to {result >> 10} KiB grew by {growth >> 10} KiB")
        assert growth < payload + result + (8 << 20), name


def test_codecs_may_be_used_by_many_threads() -> None:
    tensors = [heavy((64, 256), torch.float32) * (i + 1) for i in range(16)]
    with ThreadPoolExecutor(8) as pool:
        for name in NAMES:
            payloads = list(pool.map(codec(name).encode, tensors, range(16)))
            assert all(
                torch.equal(p, codec(name).encode(x, i)) for i, (p, x) in enumerate(zip(payloads, tensors, strict=True))
            )


# --- delta -------------------------------------------------------------------------------------------------------

LENGTHS = [5, 9, 1, 17]


def epoch(number: int, dtype: torch.dtype = torch.float32, samples: Sequence[int] = (3, 8, 2, 40)) -> Tensor:
    """Hidden states of samples that settle: they change by a tenth, then a hundredth, ..."""
    pieces = [normal((n, 96), torch.float32, s) for s, n in zip(samples, LENGTHS, strict=True)]
    moves = [normal((n, 96), torch.float32, 1000 * number + s) for s, n in zip(samples, LENGTHS, strict=True)]
    return (torch.cat(pieces) + 10.0**-number * torch.cat(moves)).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_delta_over_three_epochs(dtype: torch.dtype) -> None:
    sender, receiver = DeltaSender(1 << 20), DeltaReceiver(1 << 20)
    errors = []
    for number in range(1, 4):
        x = epoch(number, dtype)
        deltas, payload = sender.encode([3, 8, 2, 40], LENGTHS, x)
        assert len(payload) == codec("int8-group").size(x.shape, torch.float32)
        assert all((base == -1) == (number == 1) for base in deltas.bases)
        y = receiver.decode(deltas, payload, 96, dtype)
        again = receiver.decode(deltas, payload, 96, dtype)
        assert torch.equal(y, again) and y.dtype == dtype, "a repeated message decodes to other values"
        assert held(sender) == held(receiver), "the two ends hold different values"
        errors.append(float((y.double() - x.double()).norm() / x.double().norm()))
    print(f"delta {dtype}: relative error by epoch {[f'{error:.1e}' for error in errors]}")
    assert errors[1] < (errors[0] / 4 if dtype != torch.bfloat16 else errors[0])
    if dtype == torch.float32:
        assert errors[2] < errors[1] / 4


def held(end: DeltaSender | DeltaReceiver) -> list[tuple[int, int, bytes, int]]:
    """Newest version of each sample: (sample, version, its bytes, bytes counted), the oldest first."""
    found = []
    for sample, (versions, cost) in end._held._samples.items():
        version = list(versions)[-1]
        found.append((sample, version, versions[version].view(torch.uint8).numpy().tobytes(), cost))
    return found


def test_delta_rounds_by_chance_alike_at_both_ends() -> None:
    sender, receiver = DeltaSender(1 << 20), DeltaReceiver(1 << 20)
    for number in range(1, 5):
        receiver.decode(*sender.encode([3, 8, 2, 40], LENGTHS, epoch(number), seed=number), 96, torch.float32)
        assert held(sender) == held(receiver)
    other = DeltaSender(1 << 20)
    a = other.encode([3, 8, 2, 40], LENGTHS, epoch(1), seed=7)[1]
    b = DeltaSender(1 << 20).encode([3, 8, 2, 40], LENGTHS, epoch(1), seed=7)[1]
    assert torch.equal(a, b)


def test_delta_with_a_lost_base() -> None:
    sender, receiver = DeltaSender(1 << 20), DeltaReceiver(1 << 20)
    samples = [3, 8, 2, 40]
    receiver.decode(*sender.encode(samples, LENGTHS, epoch(1)), 96, torch.float32)
    sender.encode(samples, LENGTHS, epoch(2))  # never arrives
    deltas, payload = sender.encode(samples, LENGTHS, epoch(3))
    before = held(receiver)
    with pytest.raises(SessionLost, match="sample 3"):
        receiver.decode(deltas, payload, 96, torch.float32)
    with pytest.raises(SessionLost):
        DeltaReceiver(1 << 20).decode(deltas, payload, 96, torch.float32)
    assert held(receiver) == before, "a message that was refused has changed something"
    sender.forget([3, 8])
    deltas, payload = sender.encode(samples, LENGTHS, epoch(3))
    assert [base == -1 for base in deltas.bases] == [True, True, False, False]
    with pytest.raises(SessionLost, match="sample 2"):
        receiver.decode(deltas, payload, 96, torch.float32)
    assert held(receiver) == before, "half a message was kept"
    sender.forget()
    y = receiver.decode(*sender.encode(samples, LENGTHS, epoch(3)), 96, torch.float32)
    assert float((y - epoch(3)).abs().max()) < 0.03
    assert held(sender) == held(receiver)


def test_delta_of_another_sender_is_not_taken_for_ones_own() -> None:
    """A new sender, or one whose message was lost, never names a base that stands for other values at the receiver."""
    receiver, x = DeltaReceiver(1 << 20), epoch(1)
    first, second = DeltaSender(1 << 20), DeltaSender(1 << 20)
    receiver.decode(*first.encode([3, 8, 2, 40], LENGTHS, x), 96, torch.float32)
    second.encode([3, 8, 2, 40], LENGTHS, x + 1)
    with pytest.raises(SessionLost):
        receiver.decode(*second.encode([3, 8, 2, 40], LENGTHS, x + 1), 96, torch.float32)


def test_delta_repeats_survive_until_the_next_step() -> None:
    sender, receiver = DeltaSender(1 << 20), DeltaReceiver(1 << 20)
    sent = [sender.encode([3, 8, 2, 40], LENGTHS, epoch(number)) for number in (1, 2, 3)]
    got = [receiver.decode(*message, 96, torch.float32) for message in sent]
    assert torch.equal(receiver.decode(*sent[2], 96, torch.float32), got[2])
    with pytest.raises(SessionLost):
        receiver.decode(*sent[1], 96, torch.float32)


@pytest.mark.parametrize("budget", [0, 5_000, 20_000, 40_000, 100_000])
def test_delta_holds_its_budget_and_both_ends_drop_the_same(budget: int) -> None:
    sender, receiver = DeltaSender(budget), DeltaReceiver(budget)
    generator, most, hits = torch.Generator().manual_seed(SEED), 0, 0
    for step in range(80):
        samples = torch.randperm(12, generator=generator)[:4].tolist()
        lengths = [3 + sample for sample in samples]
        x = normal((sum(lengths), 96), torch.float32, step)
        message = sender.encode(samples, lengths, x)
        y = receiver.decode(*message, 96, torch.float32)
        assert torch.equal(receiver.decode(*message, 96, torch.float32), y), "a repeat after something was dropped"
        hits += sum(base != -1 for base in message[0].bases)
        real = sum(
            value.numel() * value.itemsize + OVERHEAD
            for versions, _ in receiver._held._samples.values()
            for value in versions.values()
        )
        assert sender.held_bytes == receiver.held_bytes == real <= budget
        assert held(sender) == held(receiver) and sender.held_samples == receiver.held_samples
        most = max(most, real)
    print(f"delta: seed {SEED}, budget {budget}: at most {most} bytes held, {hits} of 320 samples by difference")
    assert (hits > 0) == (budget > 5_000) and (most > 0) == (budget > 0)


def test_delta_values_are_copies() -> None:
    """What is kept of one sample does not keep the whole message's memory alive, nor change with what was returned."""
    sender, receiver = DeltaSender(1 << 20), DeltaReceiver(1 << 20)
    message = sender.encode([3, 8, 2, 40], LENGTHS, epoch(1))
    receiver.decode(*message, 96, torch.float32).zero_()
    assert held(sender) == held(receiver)
    for versions, _ in receiver._held._samples.values():
        assert all(value.untyped_storage().nbytes() == value.numel() * 4 for value in versions.values())


def test_delta_of_a_sample_that_has_changed_goes_whole() -> None:
    sender, receiver = DeltaSender(1 << 20), DeltaReceiver(1 << 20)
    receiver.decode(*sender.encode([1, 2], [4, 4], normal((8, 96), torch.float32)), 96, torch.float32)
    deltas, payload = sender.encode([1, 2], [3, 4], normal((7, 96), torch.float32))
    assert [base == -1 for base in deltas.bases] == [True, False]
    receiver.decode(deltas, payload, 96, torch.float32)
    deltas, payload = sender.encode([1, 2], [3, 4], normal((7, 96), torch.bfloat16))
    assert deltas.bases == [-1, -1]
    y = receiver.decode(deltas, payload, 96, torch.bfloat16)
    assert y.dtype == torch.bfloat16 and held(sender) == held(receiver)


def test_delta_at_the_ends_of_the_range() -> None:
    top = torch.finfo(torch.float32).max
    sender, receiver = DeltaSender(1 << 20), DeltaReceiver(1 << 20)
    for sign in (1, -1, 1, 1, 1):
        x = torch.full((4, 96), sign * top)
        y = receiver.decode(*sender.encode([0], [4], x), 96, torch.float32)
        assert torch.isfinite(y).all() and held(sender) == held(receiver)
    assert torch.allclose(y, x, rtol=0.01)


def test_delta_refuses_what_no_sender_writes() -> None:
    sender, receiver = DeltaSender(1 << 20), DeltaReceiver(1 << 20)
    deltas, payload = sender.encode([1, 2], [4, 4], normal((8, 96), torch.float32))
    receiver.decode(deltas, payload, 96, torch.float32)
    before = held(receiver)

    def say(**changed: object) -> Deltas:
        said = {field: getattr(deltas, field) for field in deltas.__struct_fields__}
        return Deltas(**{**said, **changed})  # type: ignore[arg-type]

    for wrong in (
        say(samples=[1, 1]), say(samples=[1]), say(lengths=[4, 5]), say(lengths=[8]), say(bases=[-1]),
        say(bases=[deltas.version] * 2), say(lengths=[1 << 40, 4]), say(bases=[-1, -1, -1]),
    ):  # fmt: skip
        with pytest.raises(ProtocolError):
            receiver.decode(wrong, payload, 96, torch.float32)
    other = say(bases=[deltas.version] * 2, version=deltas.version + 1, lengths=[3, 5])
    with pytest.raises(ProtocolError, match="send a sample that has changed whole"):
        receiver.decode(other, payload, 96, torch.float32)
    with pytest.raises(ProtocolError):
        receiver.decode(deltas, payload[:-1], 96, torch.float32)
    with pytest.raises(ProtocolError):
        receiver.decode(deltas, payload, 96, torch.int64)
    broken = payload.clone()
    broken[:2] = torch.tensor(BF16_NAN, dtype=torch.uint8)
    with pytest.raises(ProtocolError, match="not finite"):
        receiver.decode(deltas, broken, 96, torch.float32)
    assert held(receiver) == before
    with pytest.raises(ProtocolError, match="send each once"):
        sender.encode([1, 1], [4, 4], normal((8, 96), torch.float32))
    with pytest.raises(ProtocolError, match="their sum"):
        sender.encode([1, 2], [4, 5], normal((8, 96), torch.float32))
    with pytest.raises(ProtocolError, match="not finite"):
        sender.encode([1], [1], torch.full((1, 96), math.nan))


@pytest.mark.parametrize("key", ["activations", "gradients"])
def test_an_unknown_codec_in_a_document_is_named_with_its_key(key: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=rf"{key}: no codec is called 'int9'; there are raw, .*int4.* in \[wire\]$"):
        Document.of({"model": "embedded", "wire": {key: "int9"}}, tmp_path)
