"""What may be in a message, exactly, once two parties have agreed: names, shapes, types and codecs of its tensors.

Both ends judge headers by it before they take memory for a body. What is not agreed, none carries.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from noren.errors import OverBudget, ProtocolError
from noren.types import KEPT, Backward, Failure, Forward, Message
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
    an average carries; `before`: of the parties between, whose state comes along with their steps (types.KEPT).
    `tokens`: most in one message. `labels`: whether those of a training pass come with it.
    """

    dtype: str
    width: int
    back: int | None
    activations: str
    gradients: str
    adapter: Mapping[str, list[int]]
    tokens: int
    own: Mapping[str, list[int]] = field(default_factory=dict)
    before: Mapping[str, list[int]] = field(default_factory=dict)
    labels: bool = False

    def request(self, header: Header) -> None:
        """Raise ProtocolError or OverBudget unless a header is that of a request which was agreed."""
        meta = header.meta
        self._kept(header, given=getattr(meta, "update", None) is not None or header.kind == "push")
        if isinstance(meta, Forward) and meta.deltas is not None:
            self._deltas(header, meta)
        elif isinstance(meta, Forward):
            entry = self._one(header, "hidden", self._hidden, labels=self.labels and meta.train)
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
        elif _plain(header):
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
            elif header.kind == "state" and getattr(request.meta, "kept", False):
                self._kept(header, given=True)
                if _plain(header):
                    raise ProtocolError("the peer sent back other tensors than those that were kept there")
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
    def _only(header: Header, name: str, *, labels: bool = False) -> Entry:
        """The only tensor of a message, labels left out."""
        given = _plain(header)
        if labels:
            entry = given.pop("labels", None)
            wanted = given[name].shape[:1] if name in given else None
            if entry is None or (entry.dtype, entry.codec, entry.shape) != ("i64", "raw", wanted):
                raise ProtocolError("a training pass carries 'labels', i64 [tokens], as the loss is at the cloud")
        if list(given) != [name]:
            raise ProtocolError(f"a {header.kind!r} carries exactly one tensor, {name!r}; got {sorted(given)[:8]}")
        return given[name]

    def _few(self, tokens: int) -> None:
        if tokens > self.tokens:
            raise OverBudget(f"{tokens} tokens in one message; the limit is {self.tokens}: use a smaller batch")

    def _one(self, header: Header, name: str, codec: str, *, labels: bool = False) -> Entry:
        """The only tensor of a message, of the agreed type and codec."""
        entry = self._only(header, name, labels=labels)
        if str(DTYPES[entry.dtype]) != f"torch.{self.dtype}" or entry.codec != codec:
            raise ProtocolError(
                f"{name!r} must be {self.dtype} under codec {codec!r}, got {entry.dtype} under {entry.codec!r}"
            )
        self._few(entry.shape[0] if entry.shape else 0)
        return entry

    def _adapters(self, header: Header) -> None:
        """Adapters with exactly the names and shapes that were agreed, and moments of some of them."""
        self._state(_plain(header), self.adapter)

    def _kept(self, header: Header, *, given: bool) -> None:
        """The state of the parties between, whole or not at all."""
        kept = {entry.name.removeprefix(KEPT): entry for entry in header.tensors if entry.name.startswith(KEPT)}
        if kept and not given:
            raise ProtocolError(f"a {header.kind!r} without a step carries no state of other parties")
        if kept:
            self._state(kept, self.before)

    @staticmethod
    def _state(given: dict[str, Entry], shapes: Mapping[str, list[int]]) -> None:
        plain = {name for name in given if not name.startswith("optimizer/")}
        if odd := plain ^ shapes.keys():
            raise ProtocolError(
                f"{len(odd)} adapter tensors differ from what was agreed, e.g. {min(odd)[:120]!r}; give both parties "
                "the same [adapter]"
            )
        for name, entry in given.items():
            base, kind = name, ""
            if name not in plain:
                base, _, kind = name.removeprefix("optimizer/").rpartition("/")
            shape = [] if kind == "step" else shapes.get(base)
            if shape is None or entry.shape not in (shape, []) or (not kind and entry.shape != shape):
                raise ProtocolError(f"tensor {name[:120]!r} of shape {entry.shape} was not agreed")
            if kind and kind not in MOMENTS:
                raise ProtocolError(f"optimiser moment {kind[:40]!r} is not one of {', '.join(MOMENTS)}")
            if entry.codec != "raw" or entry.dtype in ("i64", "u8"):
                raise ProtocolError(f"tensor {name[:120]!r} crosses as floating point, without a codec")

    def _own(self, header: Header) -> None:
        """Adapters of the parties before, with exactly the names and shapes that were agreed."""
        given, shapes = _plain(header), {**self.own, **self.before}
        if odd := given.keys() ^ shapes.keys():
            raise ProtocolError(f"{len(odd)} of the adapters before were not agreed, e.g. {min(odd)[:120]!r}")
        for name, entry in given.items():
            if entry.shape != shapes[name] or (entry.dtype, entry.codec) != ("f32", "raw"):
                raise ProtocolError(f"tensor {name[:120]!r} must be f32 {shapes[name]}, without a codec")


def _plain(header: Header) -> dict[str, Entry]:
    """The tensors of a message that are not the state of the parties between."""
    names = [entry.name for entry in header.tensors]
    if len(set(names)) != len(names):
        raise ProtocolError(f"a {header.kind!r} has a tensor twice")
    return {entry.name: entry for entry in header.tensors if not entry.name.startswith(KEPT)}


def _none(header: Header) -> None:
    if header.tensors:
        raise ProtocolError(f"a {header.kind!r} carries no tensors, got {len(header.tensors)}")


def nothing_agreed(header: Header) -> None:
    """Before a hello: no tensors at all."""
    _none(header)
