"""What a codec is, and the checks that all of them share.

Every size is worked out from shape and type alone and compared before memory is taken; nothing that a peer writes into
a payload makes a codec allocate more, raise anything but ProtocolError, or return a value that is not finite.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

from noren.errors import ProtocolError

FLOATS = (torch.float32, torch.float16, torch.bfloat16)
"""Types that a lossy codec takes."""

MAX_VALUES = 1 << 60


class Codec(ABC):
    """Turns one dense tensor [..., d] into a flat payload of bytes and back; groups and rows run along d.

    `name` is what it is called; `lossless`: decode gives every bit back; `fixed`: a payload's size is a function of
    shape and dtype.
    """

    name: str
    lossless: bool = False
    fixed: bool = True

    @abstractmethod
    def size(self, shape: Sequence[int], dtype: torch.dtype) -> int:
        """Return the exact bytes of a payload if `fixed`, else the most that they can be."""

    @abstractmethod
    def encode(self, tensor: Tensor, seed: int | None = None) -> Tensor:
        """Return the payload, flat uint8 on the CPU.

        With a seed, values are rounded up or down by chance so that their mean is right (before the last cast to the
        tensor's own type): same tensor and seed, same bytes. Without one they are rounded to nearest. Raises
        ProtocolError for values that are not finite and types that the codec does not take.
        """

    @abstractmethod
    def decode(self, payload: Tensor, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Return the finite tensor of `shape` and `dtype` that a payload stands for.

        Memory of its own: at most the payload's size, the result, and a constant. Raises ProtocolError for a payload
        that `encode` cannot have written.
        """

    @abstractmethod
    def bound(self, tensor: Tensor, stochastic: bool = False) -> Tensor:
        """Return the most by which each element may come back changed: float64, broadcastable to the tensor.

        Half a step of the codec (rounded to nearest) or one (`stochastic`), plus the rounding of float32 arithmetic
        and of the tensor's own type; what a step is, each codec says.
        """


def plain_shape(shape: Sequence[int], name: str) -> tuple[int, int]:
    """Return a shape as (rows, d). Raises ProtocolError for one that no tensor can have."""
    if any(length < 0 for length in shape) or math.prod(max(length, 1) for length in shape) > MAX_VALUES:
        raise ProtocolError(f"{name}: no tensor has shape {list(shape)[:8]}; send what it really holds")
    return math.prod(shape[:-1]), (shape[-1] if len(shape) else 1)


def plain_tensor(tensor: Tensor, name: str) -> Tensor:
    """Return a tensor dense on the CPU, outside any graph. Raises ProtocolError if it holds NaN or infinity."""
    if tensor.layout != torch.strided:
        raise ProtocolError(f"{name}: a tensor of layout {tensor.layout} may not cross; make it dense")
    dense = tensor.detach().to("cpu").contiguous()
    finite(dense, f"{name}: the tensor")
    return dense


def finite(tensor: Tensor, what: str) -> None:
    """Raise ProtocolError if any value is NaN or infinite (one pass: the extremes are NaN if any value is)."""
    if tensor.is_floating_point() and tensor.numel():
        low, high = torch.aminmax(tensor)
        if not (math.isfinite(low) and math.isfinite(high)):
            raise ProtocolError(f"{what} holds values that are not finite; lower the learning rate or use float32")


def flat_bytes(payload: Tensor, name: str) -> Tensor:
    """Return a payload contiguous and aligned for every type. Raises ProtocolError if it is not flat uint8."""
    if payload.dtype != torch.uint8 or payload.dim() != 1:
        raise ProtocolError(f"{name}: a payload is flat uint8, got {payload.dtype} of shape {list(payload.shape)}")
    if not payload.is_contiguous() or payload.data_ptr() % 8 or payload.storage_offset() % 8:
        payload = payload.clone(memory_format=torch.contiguous_format)
    return payload


def exact(got: int, expected: int, shape: Sequence[int], name: str) -> None:
    """Raise ProtocolError unless a payload has the size that its shape asks for."""
    if got != expected:
        raise ProtocolError(f"{name}: {got} bytes for shape {list(shape)[:8]}, which takes {expected}")
