"""The codecs that give every bit back: `raw` and `zstd`. They take tensors of any type."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import zstandard
from torch import Tensor

from noren.errors import ProtocolError
from noren.wire.codecs.base import Codec, exact, finite, flat_bytes, plain_shape, plain_tensor

LEVEL = 1
MAX_WINDOW = 8 << 20


class Raw(Codec):
    """The tensor's own bytes, row after row. Its step is 0."""

    name = "raw"
    lossless = True

    def size(self, shape: Sequence[int], dtype: torch.dtype) -> int:
        """Return values times bytes of a value."""
        rows, width = plain_shape(shape, self.name)
        return rows * width * dtype.itemsize

    def encode(self, tensor: Tensor, seed: int | None = None) -> Tensor:
        """Return the tensor's bytes, not copied if it is dense on the CPU. Nothing is rounded: `seed` has no say."""
        return plain_tensor(tensor, self.name).reshape(-1).view(torch.uint8)

    def decode(self, payload: Tensor, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Return a tensor on the payload's memory if that is aligned, else on a copy."""
        exact(payload.numel(), self.size(shape, dtype), shape, self.name)
        tensor = flat_bytes(payload, self.name).view(dtype).view(tuple(shape))
        finite(tensor, f"{self.name}: the payload")
        return tensor

    def bound(self, tensor: Tensor, stochastic: bool = False) -> Tensor:
        """Return 0."""
        return torch.zeros((), dtype=torch.float64)


class Zstd(Codec):
    """The k-th bytes of all values side by side, for every k, as one Zstandard frame. Its step is 0.

    Exponents of activations resemble one another, mantissas do not: apart, the former shrink to a third.
    The frame announces its size; one that announces another than the shape asks for, or none, is refused unread.
    """

    name = "zstd"
    lossless = True
    fixed = False

    def size(self, shape: Sequence[int], dtype: torch.dtype) -> int:
        """Return the most that Zstandard makes of so many bytes (its ZSTD_compressBound)."""
        plain = Raw().size(shape, dtype)
        return plain + (plain >> 8) + (max((128 << 10) - plain, 0) >> 11)

    def encode(self, tensor: Tensor, seed: int | None = None) -> Tensor:
        """Return one frame. Nothing is rounded: `seed` has no say."""
        dense = plain_tensor(tensor, self.name)
        plain = dense.reshape(-1).view(torch.uint8).view(dense.numel(), dense.itemsize)
        planes = torch.empty(dense.itemsize, dense.numel(), dtype=torch.uint8)
        for place in range(dense.itemsize):  # much faster than a transposition
            planes[place] = plain[:, place]
        frame = zstandard.ZstdCompressor(level=LEVEL, write_content_size=True).compress(planes.numpy().data)
        return torch.frombuffer(bytearray(frame), dtype=torch.uint8)

    def decode(self, payload: Tensor, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Return the tensor. Raises ProtocolError before anything is unpacked if a frame is not of the size due."""
        expected, most = Raw().size(shape, dtype), self.size(shape, dtype)
        frame = flat_bytes(payload, self.name).numpy()
        if len(frame) > most:
            raise ProtocolError(f"zstd: {len(frame)} bytes for shape {list(shape)[:8]}, which takes at most {most}")
        planes = np.frombuffer(_unpack(frame.data, expected), dtype=np.uint8).reshape(dtype.itemsize, -1)
        plain = torch.empty(planes.shape[1], dtype.itemsize, dtype=torch.uint8)
        for place, plane in enumerate(planes):
            plain.numpy()[:, place] = plane
        tensor = plain.view(-1).view(dtype).view(tuple(shape))
        finite(tensor, "zstd: the payload")
        return tensor

    def bound(self, tensor: Tensor, stochastic: bool = False) -> Tensor:
        """Return 0."""
        return torch.zeros((), dtype=torch.float64)


def _unpack(frame: memoryview, expected: int) -> bytes:
    """Return the `expected` bytes of a frame. Zstandard itself refuses one that holds another number than announced."""
    try:
        head = zstandard.get_frame_parameters(frame)
        if head.content_size != expected or head.window_size > MAX_WINDOW or head.dict_id:
            announced = "no size" if head.content_size == zstandard.CONTENTSIZE_UNKNOWN else f"{head.content_size}"
            raise ProtocolError(
                f"zstd: the frame announces {announced}, a window of {head.window_size} and dictionary {head.dict_id};"
                f" due are {expected} bytes, a window of at most {MAX_WINDOW} and no dictionary"
            )
        unpacker = zstandard.ZstdDecompressor(max_window_size=MAX_WINDOW)
        return unpacker.decompress(frame, max_output_size=expected, allow_extra_data=False)
    except zstandard.ZstdError as error:
        raise ProtocolError(f"zstd: {len(frame)} bytes are not one frame of {expected} bytes ({error})") from error
