"""A message as bytes, and back, with every byte from the peer checked before it is used.

    prefix   24 bytes, little endian: "NRN" and the version, header length (u32), request number, body length (u64)
    header   JSON of `Header`: the meta, and name, dtype, shape, codec and length of each tensor; at most 1 MiB
    body     the tensors' bytes one after another, each as its codec wrote it
    tag      16 bytes over all of the above (see seal.py): of this connection, this direction, this request

Nothing is decoded that is not in the schema of types.py; no object is ever unpickled. The order of checks is: prefix,
header against its schema, header against what was agreed (`Expect`), sizes, and only then memory; then the tag, the
codecs, and that every number is finite.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Annotated, Any, NamedTuple

import msgspec
import numpy as np
import torch
from torch import Tensor

from noren.errors import OverBudget, ProtocolError
from noren.types import AnyMeta, Label, Message
from noren.wire.codecs import CODECS
from noren.wire.seal import TAG, Seal, Tag
from noren.wire.settings import MOST_BYTES

MAGIC, VERSION = b"NRN", 2
PREFIX = struct.Struct("<3sBIQQ")
CHUNK = 1 << 20
MAX_HEADER = 1 << 20
MAX_TENSORS = 16_384

DTYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16, "i64": torch.int64, "u8": torch.uint8}
"""Types that may cross; u8 for nothing but the payload of `Forward.deltas`."""

_NAMES = {dtype: name for name, dtype in DTYPES.items()}
NUMPY: dict[str, np.dtype[Any]] = {"f32": np.dtype("<f4"), "f16": np.dtype("<f2"), "i64": np.dtype("<i8")}
"""Those that numpy has: its calls cost less than torch's, which let go of the interpreter and wait for it again."""
EXPONENTS: dict[str, tuple[np.dtype[Any], Any]] = {
    "f32": (np.dtype("<u4"), np.uint32(0x7F80_0000)),
    "f16": (np.dtype("<u2"), np.uint16(0x7C00)),
    "bf16": (np.dtype("<u2"), np.uint16(0x7F80)),
}
"""The bits of a value's exponent: all of them are set in NaN and infinity, and in nothing else."""
SMALL, BLOCK = 1 << 16, 1 << 18
"""Bytes that are checked in Python's own code; bytes that are checked at a time, and stay in the processor's cache."""
Size = Annotated[int, msgspec.Meta(ge=0, lt=1 << 48)]


class Entry(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True, gc=False):
    """One tensor in a header. `nbytes` is what its codec made of it."""

    name: Label
    dtype: str
    shape: Annotated[list[Size], msgspec.Meta(max_length=8)]
    codec: str
    nbytes: Size


class Header(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What stands before the body."""

    meta: AnyMeta
    tensors: Annotated[list[Entry], msgspec.Meta(max_length=MAX_TENSORS)]

    @property
    def kind(self) -> str:
        """The tag of the meta, e.g. "forward"."""
        return str(self.meta.__struct_config__.tag)


Expect = Callable[[Header], None]
"""Raises PeerError unless a header is one that this connection has agreed to take now."""

_DECODER = msgspec.json.Decoder(Header)
_ENCODER = msgspec.json.Encoder()


class Packed(NamedTuple):
    """A message as bytes, without prefix and tag: sent any number of times, always the same."""

    header: bytes
    bodies: list[memoryview]

    def frames(self, request: int, seal: Seal) -> Iterator[bytes]:
        """Make frames of about `CHUNK` bytes: the first begins with prefix and header, the last ends with the tag."""
        size = sum(map(len, self.bodies))
        head = PREFIX.pack(MAGIC, VERSION, len(self.header), request, size) + self.header
        if len(self.header) + size <= CHUNK:
            whole = b"".join((head, *self.bodies))
            yield whole + seal.whole(request, whole)
            return
        tag = seal.outgoing(request)
        tag.update(head)
        yield head
        for body in self.bodies:
            for start in range(0, len(body), CHUNK):
                piece = bytes(body[start : start + CHUNK])
                tag.update(piece)
                yield piece
        yield tag.value()


def pack(message: Message, codecs: Mapping[str, str] | None = None, seed: int | None = None) -> Packed:
    """Return a message as bytes. A pure function of its arguments.

    `codecs`: tensor name -> codec, "raw" for those it does not name; `seed`: for codecs that round stochastically.
    Raises ProtocolError for a tensor of a type that may not cross.
    """
    entries: list[Entry] = []
    bodies: list[memoryview] = []
    for name, tensor in message.tensors.items():
        if tensor.dtype not in _NAMES:
            raise ProtocolError(f"tensor {name!r} is {tensor.dtype}; only {', '.join(DTYPES)} may cross")
        codec = codecs[name] if codecs and name in codecs and tensor.is_floating_point() else "raw"
        dense = tensor.detach() if tensor.requires_grad else tensor
        if not (dense.is_cpu and dense.is_contiguous()):
            dense = dense.to("cpu").contiguous()
        body = _bytes(dense if codec == "raw" else CODECS[codec].encode(dense, seed))
        entries.append(Entry(name, _NAMES[tensor.dtype], list(tensor.shape), codec, len(body)))
        bodies.append(body)
    header = _ENCODER.encode(Header(message.meta, entries))
    if len(header) > MAX_HEADER:
        raise ProtocolError(f"a header of {len(header)} bytes; at most {MAX_HEADER} may cross: use a smaller batch")
    return Packed(header, bodies)


def _bytes(dense: Tensor) -> memoryview:
    """The bytes of a dense tensor, not copied."""
    if dense.dtype is torch.bfloat16:  # which numpy has not
        dense = dense.view(torch.int16)
    array = dense.numpy()
    return array.data.cast("B") if array.size else memoryview(b"")


def encode(message: Message, request: int, seal: Seal, codecs: Mapping[str, str] | None = None) -> list[bytes]:
    """Return a message as frames, ready to be sent once."""
    return list(pack(message, codecs).frames(request, seal))


class Incoming:
    """A message that is arriving: feed it frames until it is there. Limits are checked before allocation.

    `expect` judges the header against what was agreed; `seal` checks the tag, and that requests only count upwards.
    """

    def __init__(self, seal: Seal, expect: Expect | None = None, max_body: int = MOST_BYTES) -> None:
        self.request = self.nbytes = 0
        self.header: Header | None = None
        self._seal, self._expect, self._max_body = seal, expect, max_body
        self._tag: Tag | None = None
        self._body = memoryview(b"")  # reserved by the announced size; memory is taken as bytes arrive
        self._filled = self._size = self._checked = 0

    @property
    def body_bytes(self) -> int:
        """Length of the body as the prefix announced it; 0 before it came."""
        return self._size

    def feed(self, frame: bytes) -> Message | None:
        """Take one frame; returns the message once it is whole. Raises ProtocolError or OverBudget."""
        self.nbytes += len(frame)
        view = memoryview(frame)
        if self.header is None:
            start = self._begin(view)
            assert self.header is not None
            end = start + self._size
            if len(view) == end + TAG and self._size < CHUNK:  # as most do, it came in one piece
                self._seal.accept_whole(self.request, view[:end], view[end:])
                return Message(self.header.meta, _tensors(self.header, bytearray(view[start:end])))
            self._reserve(view[:start])
            view = view[start:]
        elif not len(frame):
            raise ProtocolError("an empty frame in the middle of a message")
        filled = self._filled + len(view)
        if filled > len(self._body) or self._tag is None:
            raise ProtocolError(f"more bytes after the header than the {self._size} and a tag that were announced")
        self._body[self._filled : filled] = view
        if (sealed := min(filled, self._size)) > self._filled:
            self._tag.update(view[: sealed - self._filled])
        self._filled = filled
        self._check_finite(sealed)
        if filled < len(self._body):
            return None
        self._seal.accept(self.request, self._tag, bytes(self._body[self._size :]))
        return Message(self.header.meta, _tensors(self.header, self._body[: self._size], self._checked))

    def _check_finite(self, filled: int) -> None:
        """Check what has come of a message's only tensor, while the processor has it at hand."""
        assert self.header is not None
        only = self.header.tensors[0] if len(self.header.tensors) == 1 else None
        if only is not None and only.codec == "raw" and only.dtype in EXPONENTS:
            step = filled - filled % 4 - self._checked
            if is_finite(only.dtype, self._body, self._checked, step):
                self._checked += step

    def _begin(self, view: memoryview) -> int:
        """Check all that stands before the body; returns where that begins."""
        if len(view) < PREFIX.size:
            raise ProtocolError(f"a message begins with {PREFIX.size} bytes, got {len(view)}")
        magic, version, length, self.request, size = PREFIX.unpack_from(view)
        if magic != MAGIC:
            raise ProtocolError(f"not a Noren message (it begins with {bytes(magic)!r}); is this the right port?")
        if version != VERSION:
            raise ProtocolError(f"the message is of version {version}, this party speaks {VERSION}: update one")
        start = PREFIX.size + length
        if length > MAX_HEADER or len(view) < start:
            raise ProtocolError(f"header of {length} bytes, in a first frame of {len(view)}")
        if size > self._max_body:
            raise OverBudget(f"a message of {size} bytes; the limit is {self._max_body}")
        header = read_header(view[PREFIX.size : start], size, self._max_body)
        if self._expect is not None:
            self._expect(header)
        self.header, self._size = header, size
        return start

    def _reserve(self, head: memoryview) -> None:
        """Make room for the body and its tag, and begin the tag with prefix and header."""
        self._tag = self._seal.incoming(self.request)
        self._tag.update(head)
        size = self._size + TAG
        if size < CHUNK:
            self._body = memoryview(bytearray(size))
            return
        try:
            self._body = np.empty(size, np.uint8).data  # numpy asks for large pages, which come sooner
        except MemoryError as error:
            raise OverBudget(f"there is no memory for a message of {size} bytes; send smaller ones") from error


def read_header(raw: bytes | memoryview, size: int, most: int = MOST_BYTES) -> Header:
    """Return a header whose sizes agree with one another and with a body of `size` bytes.

    Raises ProtocolError, or OverBudget if its tensors would take more than `most` bytes once they are decoded.
    """
    try:
        header = _DECODER.decode(raw)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise ProtocolError(f"header: {str(error)[:300]}") from error
    entries = header.tensors
    announced = sum([entry.nbytes for entry in entries])
    if announced != size:
        raise ProtocolError(f"tensors announce {announced} bytes of body, the prefix {size}")
    if len(entries) > 1 and len({entry.name for entry in entries}) < len(entries):
        raise ProtocolError(f"{len(entries)} tensors, of which some share a name")
    plain = sum([_check_entry(entry) for entry in entries])
    if plain > most:
        raise OverBudget(f"tensors of {plain} bytes once decoded; the limit is {most}")
    return header


def _check_entry(entry: Entry) -> int:
    """Return the bytes of the tensor itself."""
    dtype, codec = DTYPES.get(entry.dtype), CODECS.get(entry.codec)
    if dtype is None or codec is None:
        raise ProtocolError(f"tensor {entry.name[:64]!r}: dtype {entry.dtype[:16]!r}, codec {entry.codec[:16]!r}")
    plain = math.prod(entry.shape) * dtype.itemsize
    if plain > MOST_BYTES:
        raise OverBudget(f"tensor {entry.name[:64]!r} of shape {entry.shape}; the limit is {MOST_BYTES} bytes")
    raw = entry.codec == "raw"
    if not raw and not (dtype.is_floating_point and entry.shape):
        raise ProtocolError(f"tensor {entry.name[:64]!r}: codec {entry.codec!r} is for floating point only")
    most = plain if raw and plain else codec.size(entry.shape, dtype)  # the latter also judges shapes with a 0
    if entry.nbytes > most or (codec.fixed and entry.nbytes != most):
        raise ProtocolError(
            f"tensor {entry.name[:64]!r}: {entry.nbytes} bytes for shape {entry.shape} under {codec.name}, not {most}"
        )
    return plain


def _tensors(header: Header, body: bytearray | memoryview, checked: int = 0) -> dict[str, Tensor]:
    """Return the tensors of a body, the first `checked` bytes of which are known to be finite."""
    tensors: dict[str, Tensor] = {}
    offset = 0
    for entry in header.tensors:
        name, dtype, shape, codec, nbytes = entry.name, entry.dtype, entry.shape, entry.codec, entry.nbytes
        if codec != "raw":
            payload = torch.from_numpy(np.ndarray(nbytes, np.uint8, body, offset))
            tensor = CODECS[codec].decode(payload, shape, DTYPES[dtype])
            finite = is_finite(_NAMES[tensor.dtype], _bytes(tensor.contiguous()), 0, tensor.nbytes)
        else:
            if not nbytes:
                tensor = torch.empty(shape, dtype=DTYPES[dtype])
            elif dtype in NUMPY:
                array = np.ndarray(shape, NUMPY[dtype], body, offset)
                tensor = torch.from_numpy(array if not offset % array.itemsize else array.copy())
            else:
                flat = torch.from_numpy(np.ndarray(nbytes, np.uint8, body, offset).copy())
                tensor = flat.view(DTYPES[dtype]).view(shape)
            finite = offset + nbytes <= checked or is_finite(dtype, body, offset, nbytes)
        if not finite:
            raise ProtocolError(f"{name[:80]!r} holds values that are not finite; lower the learning rate or use fp32")
        tensors[name], offset = tensor, offset + nbytes
    return tensors


def is_finite(dtype: str, body: bytearray | memoryview, offset: int, nbytes: int) -> bool:
    """Whether none of so many bytes' values is NaN or infinite.

    In numpy and one thread: torch's would leave a second one spinning, which the other end may need.
    """
    if dtype not in EXPONENTS:
        return True
    if dtype == "f32" and nbytes <= SMALL and isinstance(body, bytearray):  # sooner done than numpy is called
        highest = body[offset + 3 : offset + nbytes : 4]  # sign and exponent: 7f or ff in what is not finite
        if b"\x7f" not in highest and b"\xff" not in highest:
            return True
    kind, exponent = EXPONENTS[dtype]
    for start in range(offset, offset + nbytes, BLOCK):
        count = min(BLOCK, offset + nbytes - start) // kind.itemsize
        if (np.ndarray(count, kind, body, start) & exponent).max() == exponent:
            return False
    return True


def decode(frames: Iterable[bytes], seal: Seal, expect: Expect | None = None) -> Message:
    """Return the message of a whole list of frames. Raises ProtocolError if it is not exactly one message."""
    incoming, message = Incoming(seal, expect), None
    for frame in frames:
        if message is not None:
            raise ProtocolError("bytes after the end of the message")
        message = incoming.feed(frame)
    if message is None:
        raise ProtocolError("the message is cut short")
    return message


def reopen(header: bytes, body: bytes) -> Message:
    """Return a message that `pack` made, from a store of this party's own. Raises ProtocolError if it is damaged."""
    read = read_header(header, len(body))
    return Message(read.meta, _tensors(read, memoryview(bytearray(body))))
