"""A message as bytes, and back, with every byte from the peer checked before it is used.

    prefix   24 bytes: magic "NRN1", header length (u32), request number (u64), body length (u64), little endian
    header   JSON of `Header`: the meta, and name, dtype and shape of each tensor; at most 1 MiB
    body     the tensors' bytes one after another, dense, little endian

Nothing is decoded that is not in the schema of types.py; no object is ever unpickled.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator
from dataclasses import dataclass

import msgspec
import torch
from torch import Tensor

from noren.errors import OverBudget, ProtocolError
from noren.types import AnyMeta, Message

MAGIC = b"NRN1"
PREFIX = struct.Struct("<4sIQQ")
CHUNK = 1 << 20
MAX_HEADER = 1 << 20
MAX_TENSORS = 16_384
MAX_BODY = 4 << 30

DTYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16, "i64": torch.int64}
"""Types that may cross."""

_NAMES = {dtype: name for name, dtype in DTYPES.items()}


class Header(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What stands before the body."""

    meta: AnyMeta
    tensors: list[tuple[str, str, list[int]]]  # name, dtype, shape


_DECODER = msgspec.json.Decoder(Header)
_ENCODER = msgspec.json.Encoder()


def encode(message: Message, request: int) -> list[memoryview]:
    """Return the message as frames of at most `CHUNK` bytes (the first also holds prefix and header).

    Raises ProtocolError for a tensor of a type that may not cross.
    """
    described: list[tuple[str, str, list[int]]] = []
    bodies: list[memoryview] = []
    for name, tensor in message.tensors.items():
        if tensor.dtype not in _NAMES:
            raise ProtocolError(f"tensor {name!r} is {tensor.dtype}; only {', '.join(DTYPES)} may cross")
        described.append((name, _NAMES[tensor.dtype], list(tensor.shape)))
        dense = tensor.detach().to("cpu").contiguous()
        bodies.append(memoryview(dense.flatten().view(torch.uint8).numpy().data))
    header = _ENCODER.encode(Header(message.meta, described))
    if len(header) > MAX_HEADER:
        raise ProtocolError(
            f"the header would be {len(header)} bytes, at most {MAX_HEADER} may cross; use a smaller batch"
        )
    size = sum(len(body) for body in bodies)
    head = PREFIX.pack(MAGIC, len(header), request, size) + header
    if len(head) + size <= CHUNK:
        return [memoryview(b"".join([head, *bodies]))]
    return [memoryview(head), *(body[i : i + CHUNK] for body in bodies for i in range(0, len(body), CHUNK))]


@dataclass
class Incoming:
    """A message that is arriving: feed it frames until `message` is there. Limits are checked before allocation."""

    max_body: int = MAX_BODY
    request: int = 0
    nbytes: int = 0
    _header: Header | None = None
    _body: memoryview | None = None  # reserved by the announced size; memory is taken as bytes arrive
    _filled: int = 0

    def feed(self, frame: bytes) -> Message | None:
        """Take one frame; returns the message once it is whole. Raises ProtocolError or OverBudget."""
        self.nbytes += len(frame)
        view = memoryview(frame)
        if self._header is None:
            view = self._begin(view)
        assert self._body is not None
        if self._filled + len(view) > len(self._body):
            raise ProtocolError(f"{self._filled + len(view)} bytes of body, {len(self._body)} were announced")
        self._body[self._filled : self._filled + len(view)] = view
        self._filled += len(view)
        if self._filled < len(self._body):
            if not len(frame):
                raise ProtocolError("an empty frame in the middle of a message")
            return None
        return self._finish()

    def _begin(self, view: memoryview) -> memoryview:
        if len(view) < PREFIX.size:
            raise ProtocolError(f"a message begins with {PREFIX.size} bytes, got {len(view)}")
        magic, length, self.request, size = PREFIX.unpack(view[: PREFIX.size])
        if magic != MAGIC:
            raise ProtocolError(f"not a Noren message (it begins with {bytes(magic)!r}); is this the right port?")
        if length > MAX_HEADER or len(view) < PREFIX.size + length:
            raise ProtocolError(f"header of {length} bytes, in a first frame of {len(view)}")
        if size > self.max_body:
            raise OverBudget(f"a message of {size} bytes; the limit is {self.max_body}")
        try:
            header = _DECODER.decode(view[PREFIX.size : PREFIX.size + length])
        except (msgspec.MsgspecError, UnicodeDecodeError) as error:
            raise ProtocolError(f"header: {error}") from error
        announced = 0
        if len(header.tensors) > MAX_TENSORS or len({name for name, _, _ in header.tensors}) < len(header.tensors):
            raise ProtocolError(f"{len(header.tensors)} tensors, of which some share a name or are too many")
        for name, dtype, shape in header.tensors:
            if dtype not in DTYPES or len(shape) > 8 or any(n < 0 for n in shape):
                raise ProtocolError(f"tensor {name[:64]!r}: dtype {dtype[:16]!r}, shape {shape[:8]}")
            announced += math.prod(shape) * DTYPES[dtype].itemsize
        if announced != size:
            raise ProtocolError(f"shapes announce {announced} bytes of body, the prefix {size}")
        self._header, self._body = header, torch.empty(size, dtype=torch.uint8).numpy().data
        return view[PREFIX.size + length :]

    def _finish(self) -> Message:
        assert self._header is not None and self._body is not None
        tensors: dict[str, Tensor] = {}
        offset = 0
        for name, dtype_name, shape in self._header.tensors:
            dtype, count = DTYPES[dtype_name], math.prod(shape)
            if count:
                tensors[name] = torch.frombuffer(self._body, dtype=dtype, count=count, offset=offset).view(shape)
            else:
                tensors[name] = torch.empty(shape, dtype=dtype)
            offset += count * dtype.itemsize
        return Message(self._header.meta, tensors)


def decode(frames: Iterator[bytes] | list[bytes]) -> Message:
    """Return the message of a whole list of frames. Raises ProtocolError if it is not exactly one message."""
    incoming, message = Incoming(), None
    for frame in frames:
        if message is not None:
            raise ProtocolError("bytes after the end of the message")
        message = incoming.feed(frame)
    if message is None:
        raise ProtocolError("the message is cut short")
    return message
