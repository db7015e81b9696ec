"""`delta`: a sample seen before crosses as its difference from what the receiver holds of it (AQ-SGD, Wang 2022).

Activations of one sample change little from epoch to epoch, so the differences shrink as training converges, and with
them the error that rounding to eight bits makes (arXiv 2206.01299, algorithm 1). Both ends keep the value as the
receiver put it together, not as the sender had it: the error does not add up.

A sample that is new counts as different from zero: every message has the size of `int8-group` for its shape.

Versions name values: a sender never uses one twice, and a new sender begins at random, so a base is never mistaken for
another. The receiver keeps the base of the last message as well as its result: the same message again decodes to the
same bytes. A sender whose peer answers SessionLost calls `forget` and encodes anew.

Sender and receiver count the same bytes and drop the same samples, if they have the same budget. Neither locks: one
pair serves one run in one direction, one message at a time.
"""

from __future__ import annotations

import secrets
from collections import OrderedDict
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from noren.errors import ProtocolError, SessionLost
from noren.types import Deltas
from noren.wire.codecs.base import FLOATS, plain_tensor
from noren.wire.codecs.quantised import Int8Group

NONE = -1
OVERHEAD = 512
"""Bytes that a value costs besides its numbers."""

_CODEC = Int8Group()


class _Held:
    """Values by sample and version, the samples longest unchanged first; drops those when there are too many bytes."""

    def __init__(self, budget_bytes: int, keep_base: bool) -> None:
        self.budget, self.bytes, self._keep_base = budget_bytes, 0, keep_base
        self._samples: OrderedDict[int, tuple[dict[int, Tensor], int]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._samples)

    def versions(self, sample: int) -> dict[int, Tensor]:
        return self._samples[sample][0] if sample in self._samples else {}

    def cost(self, value: Tensor, base: int) -> int:
        """Bytes at the receiver: the value, and its base if it has one."""
        return (value.numel() * value.itemsize + OVERHEAD) * (1 if base == NONE else 2)

    def put(self, sample: int, base: int, version: int, value: Tensor) -> None:
        versions = {version: value}
        if base != NONE and self._keep_base:
            versions = {base: self.versions(sample)[base], version: value}
        self.drop(sample)
        cost = self.cost(value, base)
        self._samples[sample] = (versions, cost)
        self.bytes += cost

    def drop(self, sample: int) -> None:
        if sample in self._samples:
            self.bytes -= self._samples.pop(sample)[1]

    def fit(self) -> None:
        while self.bytes > self.budget:
            self.drop(next(iter(self._samples)))

    def take(self, deltas: Deltas, values: Sequence[Tensor]) -> None:
        """Keep copies of a message's values. What a sender builds on a base fits: a repeat of the message finds it."""
        for sample, base, value in zip(deltas.samples, deltas.bases, values, strict=True):
            self.put(sample, base, deltas.version, value.clone())
        self.fit()


class DeltaSender:
    """The sending end. `budget_bytes`: what the receiver may hold, counted as it counts; the least recent go first."""

    def __init__(self, budget_bytes: int) -> None:
        self._held = _Held(budget_bytes, keep_base=False)
        self._version = secrets.randbelow(1 << 61)
        self.sent = torch.empty(0, 0)  # what the receiver puts together from the last payload, [N, d]

    @property
    def held_bytes(self) -> int:
        """Bytes that the receiver holds, if it has the same budget."""
        return self._held.bytes

    @property
    def held_samples(self) -> int:
        """Samples held."""
        return len(self._held)

    def forget(self, samples: Iterable[int] | None = None) -> None:
        """Send these samples (None: all) without a base next time: the receiver no longer holds them."""
        if samples is None:
            self._held = _Held(self._held.budget, keep_base=False)
        for sample in samples or ():
            self._held.drop(sample)

    def encode(
        self, samples: Sequence[int], lengths: Sequence[int], values: Tensor, seed: int | None = None
    ) -> tuple[Deltas, Tensor]:
        """Return what to say of `values` [N, d], rows of the `samples` one after another, and the payload (uint8).

        What the receiver makes of it, to the bit, is in `sent` until the next call.
        `seed`: as in Codec.encode. Raises ProtocolError for a sample that occurs twice, lengths that do not sum to N,
        other types than float32, float16 and bfloat16, or values that are not finite.
        """
        rows = plain_tensor(values, "delta")
        self._version += 1
        pieces = _split(samples, lengths, rows)
        bases, room = [], self._held.budget - sum(self._held.cost(piece, NONE) for piece in pieces)
        for sample, piece in zip(samples, pieces, strict=True):
            version, base = next(iter(self._held.versions(sample).items()), (NONE, piece))
            extra = self._held.cost(piece, NONE)
            known = version != NONE and base.shape == piece.shape and base.dtype == piece.dtype and extra <= room
            bases.append(version if known else NONE)
            room -= extra if known else 0
        deltas = Deltas(samples=list(samples), lengths=list(lengths), bases=bases, version=self._version)
        before = _before(self._held, deltas, rows)
        largest = torch.finfo(torch.float32).max
        payload = _CODEC.encode((rows.float() - before).clamp_(-largest, largest), seed)
        after = _after(before, payload, rows.dtype)
        self._held.take(deltas, _split(samples, lengths, after))
        self.sent = after
        return deltas, payload


def payload_bytes(rows: int, width: int) -> int:
    """Bytes of a payload for values [rows, width] of any type. Raises ProtocolError if no tensor has that shape."""
    return _CODEC.size((rows, width), torch.float32)


class DeltaReceiver:
    """The receiving end. `budget_bytes`: of the values held, bases included; the least recent samples go first."""

    def __init__(self, budget_bytes: int) -> None:
        self._held = _Held(budget_bytes, keep_base=True)

    @property
    def held_bytes(self) -> int:
        """Bytes held."""
        return self._held.bytes

    @property
    def held_samples(self) -> int:
        """Samples held."""
        return len(self._held)

    def decode(self, deltas: Deltas, payload: Tensor, width: int, dtype: torch.dtype) -> Tensor:
        """Return the values [N, width] of `dtype` that a payload stands for, and keep them by sample.

        Raises SessionLost if a base is not held, and ProtocolError for what no sender writes; nothing has changed then.
        """
        if dtype not in FLOATS:
            raise ProtocolError(f"delta: takes float32, float16 and bfloat16, not {dtype}")
        shape = (sum(deltas.lengths), width)
        if payload.numel() != _CODEC.size(shape, torch.float32):
            raise ProtocolError(f"delta: {payload.numel()} bytes, {_CODEC.size(shape, torch.float32)} for {shape}")
        if deltas.version in deltas.bases:
            raise ProtocolError(f"delta: version {deltas.version} builds on itself")
        like = torch.empty((), dtype=dtype).expand(shape)
        _split(deltas.samples, deltas.lengths, like)
        before = _before(self._held, deltas, like)
        after = _after(before, payload, dtype)
        self._held.take(deltas, _split(deltas.samples, deltas.lengths, after))
        return after


def _split(samples: Sequence[int], lengths: Sequence[int], rows: Tensor) -> tuple[Tensor, ...]:
    """Return the rows of each sample."""
    if rows.dim() != 2 or len(samples) != len(lengths) or sum(lengths) != len(rows):
        raise ProtocolError(
            f"delta: {len(samples)} samples with {len(lengths)} lengths, in all {sum(lengths)}, for a tensor of shape "
            f"{list(rows.shape)[:8]}; each sample has one length, and the first dimension is their sum"
        )
    if len(set(samples)) < len(samples):
        raise ProtocolError(f"delta: {len(samples)} samples, of which some are the same; send each once")
    return rows.split(list(lengths))


def _before(held: _Held, deltas: Deltas, like: Tensor) -> Tensor:
    """Return [N, d] (float32): the bases one after another, zeros for those without."""
    before = torch.zeros(like.shape)
    if not len(deltas.samples) == len(deltas.bases):
        raise ProtocolError(f"delta: {len(deltas.samples)} samples with {len(deltas.bases)} bases; each has one")
    pieces = before.split(list(deltas.lengths))
    for sample, base, piece in zip(deltas.samples, deltas.bases, pieces, strict=True):
        if base == NONE:
            continue
        value = held.versions(sample).get(base)
        if value is None:
            raise SessionLost(f"delta: version {base} of sample {sample} is not held here; forget it and send it whole")
        if value.shape != piece.shape or value.dtype != like.dtype:
            raise ProtocolError(
                f"delta: sample {sample} is {list(value.shape)} of {value.dtype} here, the message says "
                f"{list(piece.shape)} of {like.dtype}; send a sample that has changed whole"
            )
        piece.copy_(value)
    return before


def _after(before: Tensor, payload: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the values that both ends hold afterwards: a function of the bytes that crossed, the same everywhere."""
    largest = torch.finfo(dtype).max
    difference = _CODEC.decode(payload, before.shape, torch.float32)
    return difference.add_(before).clamp_(-largest, largest).to(dtype)
