"""Reading a model's tensors by name, and only those that are asked for.

A model is a folder, a Hugging Face hub id, or the URL of a folder on any HTTP server that answers byte ranges. Shards
are safetensors files; nothing else is read (no pickle). `Checkpoint.read` touches only the bytes of the tensors named,
and counts them.
"""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from noren.errors import ModelError

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""safetensors' names of dtypes."""

_VOLATILE = ("_name_or_path", "transformers_version", "torch_dtype", "dtype", "architectures", "noren")


@dataclass(frozen=True)
class TensorInfo:
    """Where one tensor lies: its shard, dtype (safetensors' name), shape and byte range in the shard's data."""

    file: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor."""
        return self.end - self.begin


class Checkpoint(ABC):
    """A model's config and tensors, wherever they are. `bytes_read` counts tensor bytes read so far."""

    def __init__(self, location: str) -> None:
        self.location = location
        self.bytes_read = 0

    @abstractmethod
    def text(self, name: str) -> str | None:
        """Return a small text file of the model, or None if it has none of that name."""

    @abstractmethod
    def header(self, file: str) -> dict[str, Any]:
        """Return the safetensors header of one shard."""

    @abstractmethod
    def read_file(self, file: str, infos: dict[str, TensorInfo]) -> dict[str, Tensor]:
        """Return the named tensors of one shard."""

    @cached_property
    def config(self) -> dict[str, Any]:
        """The contents of config.json. Raises ModelError if it is missing or not JSON."""
        text = self.text("config.json")
        if text is None:
            raise ModelError(f"{self.location}: no config.json; is this a Hugging Face model folder?")
        try:
            values = json.loads(text)
        except ValueError as error:
            raise ModelError(f"{self.location}/config.json is not JSON: {error}") from error
        if not isinstance(values, dict) or not isinstance(values.get("model_type", ""), str):
            raise ModelError(f"{self.location}/config.json is no model's config: not an object with a model_type")
        return values

    @cached_property
    def files(self) -> dict[str, str]:
        """Tensor name -> shard. Raises ModelError if there are no safetensors shards."""
        text = self.text(INDEX)
        if text is not None:
            try:
                return {str(k): str(v) for k, v in json.loads(text)["weight_map"].items()}
            except (ValueError, KeyError, AttributeError) as error:
                raise ModelError(f"{self.location}/{INDEX} is not an index of shards: {error!r}") from error
        return {name: SINGLE for name in self.header(SINGLE) if name != "__metadata__"}

    def infos(self, names: Iterable[str]) -> dict[str, TensorInfo]:
        """Return where the named tensors lie. Opens only the headers of the shards that hold them."""
        out: dict[str, TensorInfo] = {}
        headers: dict[str, dict[str, Any]] = {}
        for name in names:
            file = self.files[name]
            if file not in headers:
                headers[file] = self.header(file)
            if name not in (header := headers[file]):
                raise ModelError(f"{self.location}/{file}: the index names tensor {name!r}, the shard does not hold it")
            entry = header[name]
            out[name] = TensorInfo(file, entry["dtype"], tuple(entry["shape"]), *entry["data_offsets"])
        return out

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Return the named tensors, reading nothing else of their shards but the headers.

        Raises ModelError for a missing or truncated shard.
        """
        by_file: dict[str, dict[str, TensorInfo]] = {}
        for name, info in self.infos(names).items():
            by_file.setdefault(info.file, {})[name] = info
        out: dict[str, Tensor] = {}
        for file, infos in by_file.items():
            out.update(self.read_file(file, infos))
            self.bytes_read += sum(info.nbytes for info in infos.values())
        return out

    @cached_property
    def fingerprint(self) -> str:
        """Names the whole model in a handshake: config, tensor names and, where known, the exact revision."""
        return fingerprint(self.config, self.files, self.revision)

    @property
    def revision(self) -> str:
        """An exact version of the weights where the place that holds them tells one, else ""."""
        return ""


def fingerprint(config: dict[str, Any], names: Iterable[str], revision: str) -> str:
    """Return 32 hex digits for a model: its config without volatile keys, its tensor names, its revision.

    Weights are not hashed: no party reads another's. Two checkpoints that differ in values alone have the same
    fingerprint unless they come from a hub (the commit) or from `slice` (the digest that it wrote).
    """
    stable = {k: v for k, v in config.items() if k not in _VOLATILE}
    text = json.dumps([stable, sorted(names), revision], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


class FolderCheckpoint(Checkpoint):
    """A model in a local folder; tensors are memory-mapped, so that processes share what they read."""

    def __init__(self, folder: Path) -> None:
        super().__init__(str(folder))
        self.folder = folder

    def text(self, name: str) -> str | None:
        """Return a text file of the folder, or None."""
        path = self.folder / name
        return path.read_text(encoding="utf-8") if path.is_file() else None

    def header(self, file: str) -> dict[str, Any]:
        """Read one shard's header: 8 bytes of length (little endian), then JSON."""
        path = self.folder / file
        if not path.is_file():
            others = sorted(p.name for p in self.folder.glob("*.bin"))
            hint = f"; convert {others[0]} to safetensors first (pickled weights are not read)" if others else ""
            raise ModelError(f"{self.folder}: shard {file} is missing{hint or '; download it again'}")
        size = path.stat().st_size
        with path.open("rb") as handle:
            return parse_header(handle.read(8), lambda n: handle.read(n), size, str(path))

    def read_file(self, file: str, infos: dict[str, TensorInfo]) -> dict[str, Tensor]:
        """Return the named tensors of a shard, memory-mapped."""
        path = self.folder / file
        try:
            with safe_open(path, framework="pt") as shard:
                return {name: shard.get_tensor(name) for name in infos}
        except (SafetensorError, OSError) as error:
            raise ModelError(f"{path} cannot be read as safetensors ({error}); download it again") from error


def _is_entry(entry: Any) -> bool:
    """Whether a header's entry has a dtype's name, a shape and a byte range."""
    numbers = [*entry["shape"], *entry["data_offsets"]]
    return isinstance(entry["dtype"], str) and all(isinstance(n, int) and n >= 0 for n in numbers)


def parse_header(prefix: bytes, read: Any, size: int, where: str) -> dict[str, Any]:
    """Check and return a safetensors header; `read(n)` gives the n bytes after the 8 of `prefix`."""
    length = int.from_bytes(prefix, "little")
    if len(prefix) < 8 or not 2 <= length <= min(size - 8, 100_000_000):
        raise ModelError(f"{where} is not a safetensors file, or is cut short ({size} bytes); download it again")
    try:
        header = dict(json.loads(read(length)))
        for name, entry in header.items():
            if name != "__metadata__" and not _is_entry(entry):
                raise TypeError(f"tensor {name[:80]!r} is described as {str(entry)[:80]}")
        end = max((entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"), default=0)
    except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
        raise ModelError(f"{where} has a broken safetensors header ({error!r}); download it again") from error
    if 8 + length + end > size:
        raise ModelError(
            f"{where} is cut short: {size} bytes of {8 + length + end}, by its own header; download it again"
        )
    return dict(header)
