"""What a server is sent (`wire.activations = "delta"`): honest ones twice and in two forms, and hostile ones."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch

from conftest import U_SHAPED, Parties, identity
from noren.errors import OverBudget, PeerError, ProtocolError, SessionLost
from noren.parties.server import Limits, SpanServer
from noren.partition.stage import Stage
from noren.types import PROTOCOL, Backward, Deltas, Forward, Hello, Message, Push, Terms
from noren.wire.codecs.delta import DeltaSender, payload_bytes
from noren.wire.envelope import Entry, Header
from noren.wire.local import LocalLink
from noren.wire.schema import Schema
from noren.wire.settings import Wire
from test_crossing import ADAPTER, HIDDEN

DELTA = {"activations": "delta"}


@pytest.fixture
def stage(llama_folder: Path) -> Stage:
    return Stage.load(str(llama_folder), U_SHAPED, "server", "causal-lm", torch.float32)


def greeting(stage: Stage, activations: str = "delta") -> Message:
    terms = Terms(
        fingerprint=stage.fingerprint, plan=stage.plan.lines(), task="causal-lm", dtype="float32", lora="", seed=0,
        activations=activations, delta_bytes=1 << 20 if activations == "delta" else 0,
    )  # fmt: skip
    return Message(Hello(protocol=PROTOCOL, run="r", terms=terms))


def compact(sender: DeltaSender, session: str, values: torch.Tensor) -> tuple[Message, Message]:
    """A pass over two sequences of 3 and 2 tokens: (as differences, as values)."""
    deltas, payload = sender.encode([7, 4], [3, 2], values)
    meta = Forward(session=session, start=0, lengths=[3, 2], padding="right", train=True)
    sent = Message(msgspec.structs.replace(meta, deltas=deltas), {"hidden": payload})
    return sent, Message(meta, {"hidden": sender.sent})


def some(seed: int) -> torch.Tensor:
    return torch.randn(5, HIDDEN, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def link(stage: Stage) -> LocalLink:
    line = LocalLink(SpanServer(stage, limits=Limits(tokens=64)).connect(identity("a")), wire=Wire(activations="delta"))
    line(greeting(stage))
    return line


def test_both_forms_are_one_request(link: LocalLink) -> None:
    """Repeated as differences, or as values, a pass gets the answer that it got; other values are refused."""
    sender = DeltaSender(1 << 20)
    for session in ("1.0", "1.1"):  # the second builds on the first
        differences, values = compact(sender, session, some(int(session[-1])))
        assert len(differences.tensors["hidden"]) < values.tensors["hidden"].numel() * 4 / 3.5
        answers = [link(message).tensors["hidden"] for message in (differences, differences, values, differences)]
        assert all(torch.equal(answers[0], answer) for answer in answers)
    link(Message(Backward(session="1.1"), {"gradient": some(5)}))
    assert torch.equal(link(values).tensors["hidden"], answers[0]), "the stored answer: its graph is gone"
    with pytest.raises(ProtocolError, match="this is another one"):
        link(compact(sender, "1.1", some(3))[0])


def test_a_receiver_that_lost_a_base_says_so(link: LocalLink) -> None:
    sender = DeltaSender(1 << 20)
    link(compact(sender, "1.0", some(0))[0])
    compact(sender, "1.1", some(1))  # never arrives
    differences, values = compact(sender, "1.2", some(2))
    with pytest.raises(SessionLost, match="is not held here"):
        link(differences)
    assert torch.isfinite(link(values).tensors["hidden"]).all()
    sender.forget()
    link(compact(sender, "1.3", some(3))[0])
    link(compact(sender, "1.4", some(4))[0])


def say(message: Message, tensor: torch.Tensor | None = None, **changed: Any) -> Message:
    """The same pass with other words in its deltas, or another payload."""
    meta = message.meta
    assert isinstance(meta, Forward) and meta.deltas is not None
    fields = {name: getattr(meta.deltas, name) for name in Deltas.__struct_fields__} | changed
    other = msgspec.structs.replace(meta, deltas=Deltas(**fields))
    return Message(other, {"hidden": message.tensors["hidden"] if tensor is None else tensor})


def words(message: Message, **changed: Any) -> Message:
    return Message(msgspec.structs.replace(message.meta, **changed), message.tensors)


def blank(size: int) -> torch.Tensor:
    return torch.zeros(size, dtype=torch.uint8)


SIZE = payload_bytes(5, HIDDEN)
HOSTILE: dict[str, tuple[Callable[[Message], Message], type[PeerError], str]] = {
    "a sample twice": (lambda m: say(m, samples=[7, 7]), ProtocolError, "some are the same"),
    "a sample too few": (lambda m: say(m, samples=[7]), ProtocolError, "1 samples with 2 lengths"),
    "a base too many": (lambda m: say(m, bases=[-1, -1, -1]), ProtocolError, "2 samples with 3 bases"),
    "another's lengths": (lambda m: say(m, lengths=[2, 3]), ProtocolError, "are not those of the sequences"),
    "no such base": (lambda m: say(m, bases=[12345, -1]), SessionLost, "version 12345 of sample 7"),
    "another sample's base": (lambda m: say(m, samples=[8, 4]), SessionLost, "of sample 8"),
    "builds on itself": (lambda m: say(m, version=m.meta.deltas.bases[0]), ProtocolError, "builds on itself"),  # type: ignore[union-attr]
    "a negative sample": (lambda m: say(m, samples=[-7, 4]), ProtocolError, "samples"),
    "a version below none": (lambda m: say(m, bases=[-2, -1]), ProtocolError, "bases"),
    "a huge version": (lambda m: say(m, version=1 << 70), ProtocolError, "header"),
    "other rows of a sample": (
        lambda m: say(words(m, lengths=[2, 3]), lengths=[2, 3]), ProtocolError, "send a sample that has changed whole"
    ),
    "a short payload": (lambda m: say(m, m.tensors["hidden"][:-1]), ProtocolError, "'hidden' must be u8"),
    "a long payload": (lambda m: say(m, blank(SIZE + 1)), ProtocolError, "'hidden' must be u8"),
    "a payload of two dimensions": (
        lambda m: say(m, m.tensors["hidden"].view(5, -1)), ProtocolError, "'hidden' must be u8"
    ),
    "values for a payload": (lambda m: say(m, torch.zeros(SIZE)), ProtocolError, "got f32"),
    "scales that are not finite": (
        lambda m: say(m, torch.full((SIZE,), 255, dtype=torch.uint8)), ProtocolError, "int8-group"
    ),
    "too many tokens": (
        lambda m: say(words(m, lengths=[60, 5]), blank(payload_bytes(65, HIDDEN)), lengths=[60, 5]),
        OverBudget, "the limit is 64",
    ),
    "a huge number of tokens": (
        lambda m: say(words(m, lengths=[1 << 47, 2]), lengths=[1 << 47, 2]), OverBudget, "the limit is 64"
    ),
    "not for training": (lambda m: words(m, train=False), ProtocolError, "for training passes"),
    "bytes without words": (lambda m: words(m, deltas=None), ProtocolError, "must be float32"),
    "bytes for a gradient": (
        lambda m: Message(Backward(session="1.0"), {"gradient": m.tensors["hidden"]}), ProtocolError, "must be float32"
    ),
    "bytes for an adapter": (lambda m: Message(Push(step=1), m.tensors), ProtocolError, "differ from what was agreed"),
    "one more tensor": (
        lambda m: Message(m.meta, {**m.tensors, "more": torch.zeros(1)}), ProtocolError, "exactly one tensor"
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_differences(name: str, link: LocalLink) -> None:
    """Each gets a typed refusal, and the next honest pass works."""
    change, error, phrase = HOSTILE[name]
    sender = DeltaSender(1 << 20)
    link(compact(sender, "1.0", some(0))[0])
    good, values = compact(sender, "1.1", some(1))
    with pytest.raises(error, match=phrase):
        link(change(good))
    assert torch.equal(link(good).tensors["hidden"], link(values).tensors["hidden"])


def test_bytes_are_no_adapter(local_parties: Parties, llama_folder: Path) -> None:
    client = local_parties.client(llama_folder, adapter=ADAPTER, wire=DELTA)
    tensors = {name: torch.zeros(shape, dtype=torch.uint8) for name, shape in client.welcome.adapter.items()}
    with pytest.raises(ProtocolError, match="crosses as floating point"):
        client.link(Message(Push(step=1), tensors))


def test_a_payload_that_would_grow_too_large() -> None:
    """A server that takes any number of tokens still makes no more than 4 GiB of a payload, judged by its header."""
    schema = Schema(
        dtype="float32", width=1 << 10, back=None, activations="delta", gradients="raw", adapter={}, tokens=1 << 40
    )
    for tokens, fits in ((1 << 20, True), ((1 << 20) + 1, False)):
        deltas = Deltas(samples=[1], lengths=[tokens], bases=[-1], version=1)
        meta = Forward(session="1.0", start=0, lengths=[tokens], padding="right", train=True, deltas=deltas)
        size = payload_bytes(tokens, 1 << 10)
        header = Header(meta, [Entry("hidden", "u8", [size], "raw", size)])
        if fits:
            schema.request(header)
        else:
            with pytest.raises(OverBudget, match="use a smaller batch"):
                schema.request(header)


@pytest.mark.parametrize("activations", ["raw", "int8-group"])
def test_differences_that_were_not_agreed(activations: str, stage: Stage) -> None:
    line = LocalLink(SpanServer(stage).connect(identity("a")), wire=Wire(activations=activations))
    line(greeting(stage, activations))
    with pytest.raises(ProtocolError, match=f"agreed is '{activations}'"):
        line(compact(DeltaSender(1 << 20), "1.0", some(0))[0])


def test_a_codec_in_the_place_of_values(stage: Stage) -> None:
    """Under "delta", values cross raw and nothing else."""
    line = LocalLink(SpanServer(stage).connect(identity("a")), wire=Wire(activations="int8-group"))
    line(greeting(stage))
    with pytest.raises(ProtocolError, match="must be float32 under codec 'raw'"):
        line(compact(DeltaSender(1 << 20), "1.0", some(0))[1])
