"""Codecs that write each row of a tensor [..., d] for itself, as fields of fixed width: sizes follow from the shape.

A payload is its fields one after another, each for all rows, the widest type first. Rows are worked on a few at a time,
in float32, so that neither end needs a second copy of the tensor.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from noren.errors import ProtocolError
from noren.wire.codecs.base import FLOATS, Codec, exact, finite, flat_bytes, plain_shape, plain_tensor

PART = 1 << 16
MAX_WIDTH = 1 << 20
Field = tuple[torch.dtype, int]
"""Type of a field and how many of them a row has."""

TINY = 2.0**-126
"""The least scale: smaller values than it can express are nothing to a float32 network, and cross as zero."""


class RowCodec(Codec):
    """A codec of rows. A new one gives its fields, how to write, check and read them, and its step."""

    @abstractmethod
    def fields(self, width: int, dtype: torch.dtype) -> list[Field]:
        """Return the fields of a row of `width` values of `dtype`, the widest type first."""

    @abstractmethod
    def write(self, rows: Tensor, fields: list[Tensor], chance: torch.Generator | None) -> None:
        """Fill fields [n, ...] from rows [n, d] (float32)."""

    @abstractmethod
    def read(self, fields: list[Tensor], width: int) -> Tensor:
        """Return rows [n, d] (float32; may overflow to infinity, never NaN) from checked fields."""

    @abstractmethod
    def check(self, fields: list[Tensor], width: int) -> None:
        """Raise ProtocolError for fields that `write` cannot have written."""

    @abstractmethod
    def steps(self, rows: Tensor, dtype: torch.dtype, rounding: float) -> Tensor:
        """Return the error [n, d] or [n, 1] (float64) of rows [n, d] that `rounding` (0.5 or 1) steps make."""

    def size(self, shape: Sequence[int], dtype: torch.dtype) -> int:
        """Return rows times bytes of a row; 0 for a tensor without values. Raises ProtocolError for other types."""
        rows, width = plain_shape(shape, self.name)
        if dtype not in FLOATS:
            raise ProtocolError(f"{self.name}: takes float32, float16 and bfloat16, not {dtype}; send that raw")
        if width > MAX_WIDTH:
            raise ProtocolError(f"{self.name}: rows of {width} values, at most {MAX_WIDTH}; send that raw")
        return rows * sum(kind.itemsize * columns for kind, columns in self.fields(width, dtype)) if width else 0

    def encode(self, tensor: Tensor, seed: int | None = None) -> Tensor:
        """Return the payload; see Codec."""
        size = self.size(tensor.shape, tensor.dtype)
        dense = plain_tensor(tensor, self.name)
        payload = torch.empty(size, dtype=torch.uint8)
        if size:
            rows, width = plain_shape(tensor.shape, self.name)
            fields = self._split(payload, rows, width, tensor.dtype)
            chance = None if seed is None else torch.Generator().manual_seed(seed % (1 << 63))
            flat = dense.view(rows, width)
            for part in _parts(rows, width):
                self.write(flat[part].float(), [field[part] for field in fields], chance)
        return payload

    def decode(self, payload: Tensor, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Return the tensor; see Codec."""
        size = self.size(shape, dtype)
        exact(payload.numel(), size, shape, self.name)
        rows, width = plain_shape(shape, self.name)
        fields = self._split(flat_bytes(payload, self.name), rows, width, dtype) if size else []
        if size:
            self.check(fields, width)
        out = torch.empty(tuple(shape), dtype=dtype)
        if size:
            flat, largest = out.view(rows, width), torch.finfo(dtype).max
            for part in _parts(rows, width):
                flat[part] = self.read([field[part] for field in fields], width).clamp_(-largest, largest)
        return out

    def bound(self, tensor: Tensor, stochastic: bool = False) -> Tensor:
        """Return the error of half a step or one, plus roundings: (eps/2 + 4 eps32)(|x| + error) + least subnormal.

        `eps` is that of the tensor's type, `eps32` that of float32.
        """
        info, eps32 = torch.finfo(tensor.dtype), torch.finfo(torch.float32).eps
        rows, width = plain_shape(tensor.shape, self.name)
        flat = tensor.detach().to("cpu").reshape(rows, width)
        if not flat.numel():
            return torch.zeros((), dtype=torch.float64)
        error = self.steps(flat.float(), tensor.dtype, 1.0 if stochastic else 0.5)
        slack = (info.eps / 2 + 4 * eps32) * (flat.double().abs() + error) + info.smallest_normal * info.eps
        return (error + slack).view(tensor.shape)

    def _split(self, payload: Tensor, rows: int, width: int, dtype: torch.dtype) -> list[Tensor]:
        """Return the payload's fields as views [rows, ...] on it."""
        views, offset = [], 0
        for kind, columns in self.fields(width, dtype):
            length = rows * columns * kind.itemsize
            views.append(payload[offset : offset + length].view(kind).view(rows, columns))
            offset += length
        return views


def _parts(rows: int, width: int) -> Iterator[slice]:
    """Cut rows into parts of about `PART` values: they stay in the processor's cache."""
    step = max(1, PART // width)
    return (slice(start, start + step) for start in range(0, rows, step))


def rounded(values: Tensor, chance: torch.Generator | None) -> Tensor:
    """Return whole numbers: nearest (ties to even), or up with the probability of the fraction."""
    if chance is None:
        return values.round()
    low = values.floor()
    return low.add_((values - low).sub_(torch.rand(values.shape, generator=chance)).ceil_())


def spacing(values: Tensor, bits: int, lowest: int) -> Tensor:
    """Return the distance of neighbouring floats of `bits` mantissa bits and least exponent `lowest` at each value."""
    exponents = ((values.view(torch.int32) >> 23) & 0xFF).clamp_(min=127 + lowest)
    return ((exponents - bits) << 23).view(torch.float32)


def bf16_above(values: Tensor) -> Tensor:
    """Return the least bfloat16 that is not below each float32 (positive, under its maximum), and at least TINY."""
    bits = values.clamp(min=TINY).view(torch.int32)
    return ((bits + 0xFFFF) >> 16).to(torch.int16).view(torch.bfloat16)


def check_scales(scales: Tensor, name: str) -> None:
    """Raise ProtocolError for scales that are NaN, infinite or negative."""
    finite(scales, f"{name}: the scales")
    if scales.numel() and bool(scales.amin() < 0):
        raise ProtocolError(f"{name}: a scale of {float(scales.amin()):g}; scales are never negative")
