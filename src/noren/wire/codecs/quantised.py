"""The codecs that round: casts, float8, and integers of eight and four bits.

Scales are rounded up and at least 2**-126, so that no value leaves its range; a step is the scale as it is sent.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor
from torch.nn.functional import pad

from noren.errors import ProtocolError
from noren.wire.codecs.base import finite
from noren.wire.codecs.rows import TINY, Field, RowCodec, bf16_above, check_scales, rounded, spacing

GROUP = 64
FINE = 1 << 17
"""Parts of a group's largest magnitude in which int4 counts before it rotates: 64 times this is exact in float32."""

ROTATION = b"noren int4 rotation 0"
"""Seed of the signs: bit i (least first) of its SHA-256 set means that value i of a group changes its sign."""


class _Cast(RowCodec):
    """A cast to a narrower float; a value beyond its largest finite one becomes that.

    A step is the distance of its neighbouring floats at the value. For a value beyond the largest, the bound is the
    distance to the largest.
    """

    kind: torch.dtype
    bits: int
    lowest: int  # exponent under which floats are equally spaced (bfloat16: kept 7 above its own, see `spacing`)

    def fields(self, width: int, dtype: torch.dtype) -> list[Field]:
        """The values."""
        return [(self.kind, width)]

    def write(self, rows: Tensor, fields: list[Tensor], chance: torch.Generator | None) -> None:
        """Cast, by chance or to nearest."""
        if chance is not None:
            step = spacing(rows, self.bits, self.lowest)
            rows = rounded(rows / step, chance).mul_(step)
        largest = torch.finfo(self.kind).max
        fields[0].copy_(rows.clamp(-largest, largest))

    def read(self, fields: list[Tensor], width: int) -> Tensor:
        """Cast back."""
        return fields[0].to(torch.float32, copy=True)

    def check(self, fields: list[Tensor], width: int) -> None:
        """Values are finite."""
        finite(fields[0], f"{self.name}: the payload")

    def steps(self, rows: Tensor, dtype: torch.dtype, rounding: float) -> Tensor:
        """The spacing of the narrower floats, or the distance to the largest of them."""
        near = spacing(rows, self.bits, self.lowest).double() * rounding
        return torch.maximum(near, rows.double().abs() - torch.finfo(self.kind).max)


class BF16(_Cast):
    """bfloat16: 8 bits of precision, the range of float32."""

    name, kind, bits, lowest = "bf16", torch.bfloat16, 7, -119


class FP16(_Cast):
    """float16: 11 bits of precision up to 65504, where it saturates."""

    name, kind, bits, lowest = "fp16", torch.float16, 10, -14


class FP8(RowCodec):
    """float8 e4m3 of each value over its row's scale, which is the row's largest magnitude over 448.

    A step is the distance of neighbouring e4m3 numbers at the scaled value, times the scale: at most 1/8 of the value.
    """

    name = "fp8"

    def fields(self, width: int, dtype: torch.dtype) -> list[Field]:
        """A scale, then the values."""
        return [(torch.float32, 1), (torch.uint8, width)]

    def write(self, rows: Tensor, fields: list[Tensor], chance: torch.Generator | None) -> None:
        """Scale and round."""
        scales = _row_scales(rows, 448)
        scaled = (rows / scales).clamp_(-448, 448)
        if chance is not None:
            step = spacing(scaled, 3, -6)
            scaled = rounded(scaled / step, chance).mul_(step)
        fields[0].copy_(scales)
        fields[1].copy_(scaled.to(torch.float8_e4m3fn).view(torch.uint8))

    def read(self, fields: list[Tensor], width: int) -> Tensor:
        """Unscale."""
        return _E4M3.index_select(0, fields[1].flatten().int()).view(fields[1].shape).mul_(fields[0])

    def check(self, fields: list[Tensor], width: int) -> None:
        """Scales are finite and not negative; no value is NaN (e4m3 has no infinity)."""
        check_scales(fields[0], self.name)
        if bool((fields[1] & 0x7F).amax() == 0x7F):
            raise ProtocolError("fp8: the payload holds values that are not finite")

    def steps(self, rows: Tensor, dtype: torch.dtype, rounding: float) -> Tensor:
        """The spacing of e4m3 at the scaled value."""
        scales = _row_scales(rows, 448)
        return spacing(rows / scales, 3, -6).double() * scales.double() * rounding


class Int8(RowCodec):
    """Whole numbers -127..127 times one scale a row; the `outliers(d)` largest values of a row cross as they are.

    A step is the row's largest magnitude without its outliers over 127; outliers come back exactly.
    """

    name = "int8"

    @staticmethod
    def outliers(width: int) -> int:
        """Return how many values of a row of `width` are kept exactly: 2 in 256 and at least 2, always even."""
        return min(width - width % 2, max(2, width // 256 * 2))

    def fields(self, width: int, dtype: torch.dtype) -> list[Field]:
        """A scale, outliers in the tensor's own type, their columns in ascending order, then all values.

        Outliers are even in number: so every field begins at a multiple of its type's size.
        """
        kept, column = self.outliers(width), torch.int16 if width <= 1 << 15 else torch.int32
        return [(torch.float32, 1), (dtype, kept), (column, kept), (torch.int8, width)]

    def write(self, rows: Tensor, fields: list[Tensor], chance: torch.Generator | None) -> None:
        """Take the outliers out, scale and round the rest."""
        index, rest = self._apart(rows)
        scales = _row_scales(rest, 127)
        fields[0].copy_(scales)
        fields[1].copy_(rows.gather(1, index))
        fields[2].copy_(index)
        fields[3].copy_(rounded(rest / scales, chance).clamp_(-127, 127))

    def read(self, fields: list[Tensor], width: int) -> Tensor:
        """Unscale, and put the outliers back."""
        return (fields[3] * fields[0]).scatter_(1, fields[2].long(), fields[1].float())

    def check(self, fields: list[Tensor], width: int) -> None:
        """Scales and outliers are finite, scales not negative, columns ascending and inside the row."""
        scales, kept, columns, _ = fields
        check_scales(scales, self.name)
        finite(kept, "int8: the outliers")
        if columns.numel() and not 0 <= int(columns.amin()) <= int(columns.amax()) < width:
            raise ProtocolError(f"int8: an outlier in no column of 0..{width - 1}")
        if bool((columns[:, 1:] <= columns[:, :-1]).any()):
            raise ProtocolError("int8: the columns of a row's outliers do not ascend")

    def steps(self, rows: Tensor, dtype: torch.dtype, rounding: float) -> Tensor:
        """The row's scale, 0 for outliers."""
        index, rest = self._apart(rows)
        step = _row_scales(rest, 127).double() * rounding
        return step.expand(rows.shape).scatter(1, index, 0.0)

    def _apart(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Return the ascending columns of the outliers, and the rows with zeros in them."""
        index = rows.abs().topk(self.outliers(rows.shape[1]), dim=1, sorted=False).indices.sort(dim=1).values
        return index, rows.scatter(1, index, 0.0)


class Int8Group(RowCodec):
    """Whole numbers -127..127 times one bfloat16 scale a group of 64 along d (the last one may be shorter).

    A step is the group's largest magnitude over 127, rounded up to bfloat16.
    """

    name = "int8-group"

    def fields(self, width: int, dtype: torch.dtype) -> list[Field]:
        """A scale a group, then the values."""
        return [(torch.bfloat16, -(-width // GROUP)), (torch.int8, width)]

    def write(self, rows: Tensor, fields: list[Tensor], chance: torch.Generator | None) -> None:
        """Scale and round."""
        groups, width = _groups(rows), rows.shape[1]
        fields[0].copy_(bf16_above(groups.abs().amax(2) / 127))
        whole = rounded(groups / fields[0].float().unsqueeze(2), chance).clamp_(-127, 127)
        fields[1].copy_(whole.flatten(1)[:, :width])

    def read(self, fields: list[Tensor], width: int) -> Tensor:
        """Unscale."""
        return _groups(fields[1]).float().mul_(fields[0].float().unsqueeze(2)).flatten(1)[:, :width]

    def check(self, fields: list[Tensor], width: int) -> None:
        """Scales are finite and not negative."""
        check_scales(fields[0], self.name)

    def steps(self, rows: Tensor, dtype: torch.dtype, rounding: float) -> Tensor:
        """The group's scale."""
        scales = bf16_above(_groups(rows).abs().amax(2) / 127).double() * rounding
        return scales.repeat_interleave(GROUP, 1)[:, : rows.shape[1]]


class Int4(RowCodec):
    """Whole numbers -7..7, two a byte, of groups of 64 that a Hadamard matrix with random signs has rotated.

    The rotation spreads an outlier over its group (QuaRot, Ashkboos 2024); the last group is filled with zeros. A step
    is the rotated group's largest magnitude over 7, rounded up to bfloat16. Turned back, the 64 roundings of a group
    may all meet in one element: its bound is 64 (half) steps; in the mean square it is 8 times a step over sqrt(12).
    The first 32 values of a group are the low halves of its bytes. Rotations sum whole numbers, so every machine gets
    the same bits; before, a value is rounded by at most 2**-18 of its group's largest.
    """

    name = "int4"

    def fields(self, width: int, dtype: torch.dtype) -> list[Field]:
        """A scale a group, then the halves."""
        groups = -(-width // GROUP)
        return [(torch.bfloat16, groups), (torch.uint8, groups * GROUP // 2)]

    def write(self, rows: Tensor, fields: list[Tensor], chance: torch.Generator | None) -> None:
        """Rotate, scale, round, pack."""
        turned, unit = _rotated(rows)
        fields[0].copy_(bf16_above(unit.squeeze(2) * (turned.abs().amax(2) / 7)))
        ratio = unit / fields[0].float().unsqueeze(2)
        whole = rounded(turned * ratio, chance).clamp_(-7, 7).add_(8).to(torch.uint8)
        low, high = whole[..., : GROUP // 2], whole[..., GROUP // 2 :]
        fields[1].copy_((low | (high << 4)).flatten(1))

    def read(self, fields: list[Tensor], width: int) -> Tensor:
        """Unpack, rotate back (exactly), unscale."""
        pairs = fields[1].view(len(fields[1]), -1, GROUP // 2)
        whole = torch.cat((pairs & 15, pairs >> 4), 2).float().sub_(8)
        return (whole @ _BACK).mul_(fields[0].float().unsqueeze(2)).flatten(1)[:, :width]

    def check(self, fields: list[Tensor], width: int) -> None:
        """Scales are finite and not negative."""
        check_scales(fields[0], self.name)

    def steps(self, rows: Tensor, dtype: torch.dtype, rounding: float) -> Tensor:
        """64 times the group's scale, and a thousandth for the rounding before the rotation."""
        turned, unit = _rotated(rows)
        scales = bf16_above(unit.squeeze(2) * (turned.abs().amax(2) / 7)).double() * (GROUP * rounding * 1.001)
        return scales.repeat_interleave(GROUP, 1)[:, : rows.shape[1]]


def _row_scales(rows: Tensor, levels: int) -> Tensor:
    """Return [n, 1]: the largest magnitude of each row over `levels`, at least TINY."""
    low, high = torch.aminmax(rows, dim=1, keepdim=True)
    return torch.maximum(high, low.neg_()).div_(levels).clamp_(min=TINY)


def _groups(rows: Tensor) -> Tensor:
    """Return rows [n, d] as groups [n, ceil(d / 64), 64], the last filled with zeros."""
    missing = -rows.shape[1] % GROUP
    return (pad(rows, (0, missing)) if missing else rows).view(len(rows), -1, GROUP)


def _rotated(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Return H (signs * group / a) of each group, and a / 64, where a is the group's largest magnitude.

    Values are first rounded to whole parts of 1 / FINE, of which every sum is exact: the same bits whatever the order.
    """
    groups = _groups(rows)
    largest = groups.abs().amax(2, keepdim=True).clamp_(min=TINY)
    return (groups / largest).mul_(FINE).round_() @ _TURN, largest / GROUP


def _hadamard() -> Tensor:
    matrix = torch.ones(1, 1)
    while len(matrix) < GROUP:
        matrix = torch.cat((torch.cat((matrix, matrix), 1), torch.cat((matrix, -matrix), 1)))
    return matrix


def _signs() -> Tensor:
    digest = hashlib.sha256(ROTATION).digest()
    return torch.tensor([-1.0 if digest[i // 8] >> (i % 8) & 1 else 1.0 for i in range(GROUP)])


_BACK = _hadamard() * _signs()
_TURN = _BACK.t().contiguous() / FINE
_E4M3 = torch.arange(256, dtype=torch.int32).to(torch.uint8).view(torch.float8_e4m3fn).float()
