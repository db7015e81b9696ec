"""What may be in a message, exactly, once two parties have agreed: names, shapes, types and codecs of its tensors.

Both ends judge headers by it before they take memory for a body. What is not agreed, none carries.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from noren.errors import OverBudget, ProtocolError
from noren.types import Backward, Failure, Forward, Message
from noren.wire.codecs.delta import payload_bytes
from noren.wire.envelope import DTYPES, Entry, Expect, Header
from noren.wire.grpc_link import any_answer
from noren.wire.settings import DELTA, MOST_BYTES, codecs_for

MOMENTS = ("step", "exp_avg", "exp_avg_sq", "momentum_buffer")
"""Names of an optimiser's tensors for one parameter, as torch calls them."""


@dataclass(frozen=True)
class Schema:
    """The agreement of one run.

    `dtype`: of hidden states ("float32", ...). `width`: size of hidden states going up. `back`: of what comes back,
    None if the far end holds the head. `adapter`: shapes of the remote adapters by name; `own`: of the client's, which
    an average carries. `tokens`: most in one message.
    """

    dtype: str
    width: int
    back: int | None
    activations: str
    gradients: str
    adapter: Mapping[str, list[int]]
    tokens: int
    own: Mapping[str, list[int]] = field(default_factory=dict)

    def request(self, header: Header) -> None:
        """Raise ProtocolError or OverBudget unless a header is that of a request which was agreed."""
        meta = header.meta
        if isinstance(meta, Forward) and meta.deltas is not None:
            self._deltas(header, meta)
        elif isinstance(meta, Forward):
            entry = self._one(header, "hidden", self._hidden)
            if entry.shape != [sum(meta.lengths), self.width]:
                raise ProtocolError(
                    f"'hidden' must be [tokens, {self.width}] with tokens = {sum(meta.lengths)}, as lengths sum to "
                    f"{sum(meta.lengths)}; got {entry.shape}"
                )
        elif isinstance(meta, Backward):
            entry = self._one(header, "gradient", self.gradients)
            if len(entry.shape) != 2 or self.back not in (None, entry.shape[1]):
                raise ProtocolError(f"'gradient' must be [tokens, {self.back or 'd'}], got {entry.shape}")
        elif header.kind == "push":
            self._adapters(header)
        elif header.kind == "average":
            self._own(header)
        else:
            _none(header)

    def answer(self, request: Message) -> Expect:
        """Return what judges the header of the answer to `request`."""
        kind = any_answer(request)

        def expect(header: Header) -> None:
            kind(header)
            if isinstance(header.meta, Failure):
                _none(header)
            elif header.kind == "hidden":
                entry = self._one(header, "hidden", self._hidden)
                assert isinstance(request.meta, Forward)
                rows = max(sum(request.meta.lengths), len(request.meta.lengths))
                if len(entry.shape) != 2 or entry.shape[0] > rows or self.back not in (None, entry.shape[1]):
                    raise ProtocolError(f"the peer sent back {entry.shape}, expected [<= {rows}, {self.back or 'd'}]")
            elif header.kind == "gradient":
                entry = self._one(header, "gradient", self.gradients)
                rows = len(next(iter(request.tensors.values()), ()))
                known = self.back is not None  # else the head's output may have one row a sequence
                if len(entry.shape) != 2 or entry.shape[1] != self.width or (known and entry.shape[0] != rows):
                    raise ProtocolError(f"the peer sent back a gradient {entry.shape}, expected [tokens, {self.width}]")
            elif header.kind == "state" and request.kind == "average":
                self._own(header)
            elif header.kind == "state":
                self._adapters(header)
            else:
                _none(header)

        return expect

    @property
    def _hidden(self) -> str:
        """Codec of hidden states that cross as a tensor of their own."""
        return codecs_for("hidden", self.activations, self.gradients)["hidden"]

    def _deltas(self, header: Header, meta: Forward) -> None:
        """A training pass as differences: one flat payload, of the only size for its lengths."""
        assert meta.deltas is not None
        if self.activations != DELTA or not meta.train:
            raise ProtocolError(f"differences are for training passes under 'delta'; agreed is {self.activations!r}")
        if meta.deltas.lengths != meta.lengths:
            raise ProtocolError(
                f"the lengths of the samples, {meta.deltas.lengths[:8]}, are not those of the sequences, "
                f"{meta.lengths[:8]}"
            )
        entry, tokens = self._only(header, "hidden"), sum(meta.lengths)
        self._few(tokens)
        if 4 * tokens * self.width > MOST_BYTES:
            raise OverBudget(f"{tokens} tokens are more than {MOST_BYTES} bytes once decoded: use a smaller batch")
        wanted = [payload_bytes(tokens, self.width)]
        if (entry.dtype, entry.codec, entry.shape) != ("u8", "raw", wanted):
            raise ProtocolError(
                f"'hidden' must be u8 {wanted} under 'raw' for differences of {tokens} tokens, got {entry.dtype} "
                f"{entry.shape} under {entry.codec!r}"
            )

    @staticmethod
    def _only(header: Header, name: str) -> Entry:
        """The only tensor of a message."""
        if [entry.name for entry in header.tensors] != [name]:
            names = sorted(entry.name[:80] for entry in header.tensors)[:8]
            raise ProtocolError(f"a {header.kind!r} carries exactly one tensor, {name!r}; got {names}")
        return header.tensors[0]

    def _few(self, tokens: int) -> None:
        if tokens > self.tokens:
            raise OverBudget(f"{tokens} tokens in one message; the limit is {self.tokens}: use a smaller batch")

    def _one(self, header: Header, name: str, codec: str) -> Entry:
        """The only tensor of a message, of the agreed type and codec."""
        entry = self._only(header, name)
        if str(DTYPES[entry.dtype]) != f"torch.{self.dtype}" or entry.codec != codec:
            raise ProtocolError(
                f"{name!r} must be {self.dtype} under codec {codec!r}, got {entry.dtype} under {entry.codec!r}"
            )
        self._few(entry.shape[0] if entry.shape else 0)
        return entry

    def _adapters(self, header: Header) -> None:
        """Adapters with exactly the names and shapes that were agreed, and moments of some of them."""
        given = {entry.name: entry for entry in header.tensors}
        plain = {name for name in given if not name.startswith("optimizer/")}
        if odd := plain ^ self.adapter.keys():
            raise ProtocolError(
                f"{len(odd)} adapter tensors differ from what was agreed, e.g. {min(odd)[:120]!r}; give both parties "
                "the same [adapter]"
            )
        for name, entry in given.items():
            base, kind = name, ""
            if name not in plain:
                base, _, kind = name.removeprefix("optimizer/").rpartition("/")
            shape = [] if kind == "step" else self.adapter.get(base)
            if shape is None or entry.shape not in (shape, []) or (not kind and entry.shape != shape):
                raise ProtocolError(f"tensor {name[:120]!r} of shape {entry.shape} was not agreed")
            if kind and kind not in MOMENTS:
                raise ProtocolError(f"optimiser moment {kind[:40]!r} is not one of {', '.join(MOMENTS)}")
            if entry.codec != "raw" or entry.dtype in ("i64", "u8"):
                raise ProtocolError(f"tensor {name[:120]!r} crosses as floating point, without a codec")

    def _own(self, header: Header) -> None:
        """The client's own adapters, with exactly the names and shapes that were agreed."""
        given = {entry.name: entry for entry in header.tensors}
        if odd := given.keys() ^ self.own.keys():
            raise ProtocolError(f"{len(odd)} of the client's adapters were not agreed, e.g. {min(odd)[:120]!r}")
        for name, entry in given.items():
            if entry.shape != self.own[name] or (entry.dtype, entry.codec) != ("f32", "raw"):
                raise ProtocolError(f"tensor {name[:120]!r} must be f32 {self.own[name]}, without a codec")


def _none(header: Header) -> None:
    if header.tensors:
        raise ProtocolError(f"a {header.kind!r} carries no tensors, got {len(header.tensors)}")


def nothing_agreed(header: Header) -> None:
    """Before a hello: no tensors at all."""
    _none(header)
