"""How one dense tensor becomes bytes and back: the codecs of hidden states and of their gradients, by name.

    name        bytes of a value   what it does
    raw         its own            the tensor's own bytes
    zstd        <= its own         lossless: bytes of equal weight side by side, then Zstandard
    bf16, fp16  2                  a cast; beyond the largest finite value it saturates
    fp8         1 + 4/d            float8 e4m3 with one fp32 scale a row
    int8        1 + about 0.05     one scale a row; the largest values of a row are kept as they are
    int8-group  1 + 1/32           one bf16 scale a group of 64
    int4        1/2 + 1/32         groups of 64, rotated by a signed Hadamard matrix, one bf16 scale each

All are pure functions of tensor and seed. `delta` keeps state between epochs and has a file of its own (delta.py).
A new codec is one class, and one row here. Bytes are little endian, as on every machine that torch runs on.
"""

from __future__ import annotations

from noren.errors import ConfigError
from noren.wire.codecs.base import Codec
from noren.wire.codecs.lossless import Raw, Zstd
from noren.wire.codecs.quantised import BF16, FP8, FP16, Int4, Int8, Int8Group

CODECS: dict[str, Codec] = {
    "raw": Raw(),
    "bf16": BF16(),
    "fp16": FP16(),
    "fp8": FP8(),
    "int8": Int8(),
    "int8-group": Int8Group(),
    "int4": Int4(),
    "zstd": Zstd(),
}
"""All codecs, by the name under which they are asked for and announced."""


def codec(name: str) -> Codec:
    """Return the codec called `name`. Raises ConfigError, naming those that there are."""
    try:
        return CODECS[name]
    except KeyError:
        raise ConfigError(f"no codec is called {name!r}; there are {', '.join(CODECS)}") from None


__all__ = ["CODECS", "Codec", "codec"]
