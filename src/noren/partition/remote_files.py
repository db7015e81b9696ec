"""Checkpoints that are somewhere else: any HTTP server with byte ranges, and the Hugging Face hub.

Of each shard the header is fetched first (one request, usually), then the byte ranges of the wanted tensors, merged
where the gap between two is at most 64 KiB. A server that answers a range with the whole file is refused before the
body is read.
"""

from __future__ import annotations

import weakref
from typing import Any

import httpx
import torch
from tenacity import retry, retry_if_exception_type, stop_after_attempt, wait_random_exponential
from torch import Tensor

from noren.errors import LinkError, ModelError
from noren.partition.checkpoint import DTYPES, Checkpoint, TensorInfo, parse_header

HEADER_GUESS = 1 << 16
MERGE_GAP = 1 << 16


class HttpCheckpoint(Checkpoint):
    """A model folder behind a URL. `bytes_fetched` counts every body byte received, headers of shards included."""

    def __init__(self, url: str, headers: dict[str, str] | None = None, revision: str = "") -> None:
        super().__init__(url.rstrip("/"))
        self._client = httpx.Client(headers=headers or {}, follow_redirects=True, timeout=30)
        weakref.finalize(self, self._client.close)
        self._revision = revision
        self._starts: dict[str, int] = {}
        self._headers: dict[str, dict[str, Any]] = {}
        self.bytes_fetched = 0

    @property
    def revision(self) -> str:
        """The exact version of the weights, where the server names one."""
        return self._revision

    def text(self, name: str) -> str | None:
        """Fetch a small text file; None if the server says 404."""
        response = self._get(name, None)
        if response.status_code == 404:
            return None
        self._expect(response, 200, name)
        self.bytes_fetched += len(response.content)
        return response.text

    def header(self, file: str) -> dict[str, Any]:
        """Fetch a shard's header, once."""
        if file in self._headers:
            return self._headers[file]
        first, size = self._range(file, 0, HEADER_GUESS)

        def read(length: int) -> bytes:
            body = first[8 : 8 + length]
            if len(body) < length:
                body += self._range(file, 8 + len(body), 8 + length)[0]
            return body

        header = parse_header(first[:8], read, size, f"{self.location}/{file}")
        self._starts[file] = 8 + int.from_bytes(first[:8], "little")
        self._headers[file] = header
        return header

    def read_file(self, file: str, infos: dict[str, TensorInfo]) -> dict[str, Tensor]:
        """Fetch the named tensors of one shard by merged byte ranges."""
        groups: list[tuple[int, int, list[str]]] = []
        for name in sorted(infos, key=lambda n: infos[n].begin):
            begin, end = infos[name].begin, infos[name].end
            if groups and begin - groups[-1][1] <= MERGE_GAP:
                groups[-1] = (groups[-1][0], max(end, groups[-1][1]), [*groups[-1][2], name])
            else:
                groups.append((begin, end, [name]))
        offset, out = self._starts[file], {}
        for begin, end, names in groups:
            body = bytearray(self._range(file, offset + begin, offset + end)[0])
            if len(body) != end - begin:
                raise ModelError(f"{self.location}/{file}: asked for {end - begin} bytes, got {len(body)}")
            for name in names:
                out[name] = _view(body, infos[name], begin, f"{self.location}/{file}: {name}")
        return out

    def _range(self, file: str, start: int, end: int) -> tuple[bytes, int]:
        """Return (bytes start..end-1 or fewer at the end of the file, size of the file)."""
        if start >= end:
            return b"", 0
        response = self._get(file, f"bytes={start}-{end - 1}")
        if response.status_code == 404:
            raise ModelError(f"{self.location}: shard {file} is missing (HTTP 404)")
        self._expect(response, 206, file)
        size = response.headers.get("content-range", "").rpartition("/")[2]
        if not size.isdigit():
            raise ModelError(f"{self.location}/{file}: the server's Content-Range names no size")
        self.bytes_fetched += len(response.content)
        return response.content, int(size)

    @retry(
        retry=retry_if_exception_type(LinkError),
        stop=stop_after_attempt(4),
        wait=wait_random_exponential(multiplier=0.2, max=5),
        reraise=True,
    )
    def _get(self, name: str, byte_range: str | None) -> httpx.Response:
        headers = {"Range": byte_range} if byte_range else {}
        url = f"{self.location}/{name}"
        try:
            with self._client.stream("GET", url, headers=headers) as response:
                if byte_range and response.status_code == 200:
                    raise ModelError(f"{url}: the server ignores byte ranges, so a slice cannot be fetched alone")
                response.read()
                return response
        except httpx.TransportError as error:
            raise LinkError(f"{url}: cannot be reached ({error})") from error

    def _expect(self, response: httpx.Response, status: int, name: str) -> None:
        if response.status_code != status:
            hint = "; is a token needed (HF_TOKEN)?" if response.status_code in (401, 403) else ""
            raise ModelError(f"{self.location}/{name}: HTTP {response.status_code}, expected {status}{hint}")


def _view(body: bytearray, info: TensorInfo, begin: int, where: str) -> Tensor:
    dtype = DTYPES.get(info.dtype)
    if dtype is None:
        raise ModelError(f"{where} has dtype {info.dtype}, which is not read here")
    count = info.nbytes // dtype.itemsize
    numel = 1
    for size in info.shape:
        numel *= size
    if count != numel:
        raise ModelError(f"{where}: shape {list(info.shape)} does not fit {info.nbytes} bytes of {info.dtype}")
    if not count:
        return torch.empty(info.shape, dtype=dtype)
    return torch.frombuffer(body, dtype=dtype, count=count, offset=info.begin - begin).view(info.shape)


def open_hub(name: str, revision: str | None) -> HttpCheckpoint:
    """Open a hub id at a revision, resolved to its commit. Raises ModelError if the hub has no such model."""
    from huggingface_hub import HfApi, hf_hub_url
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled
    from huggingface_hub.utils import build_hf_headers

    advice = f"{name!r} is neither a folder here nor a hub model that can be read"
    try:
        commit = HfApi().model_info(name, revision=revision, timeout=10).sha
    except (HfHubHTTPError, OfflineModeIsEnabled) as error:
        raise ModelError(f"{advice}: {str(error).splitlines()[0]}") from error
    except Exception as error:  # the hub's client raises its HTTP library's own errors when offline
        raise ModelError(f"{advice}: the hub cannot be reached ({type(error).__name__})") from error
    url = hf_hub_url(name, "config.json", revision=commit).rpartition("/")[0]
    return HttpCheckpoint(url, headers=build_hf_headers(), revision=str(commit))
