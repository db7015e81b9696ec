"""What was captured counts nowhere else: not again, not on another line, not from another client, not changed.

The frames are those of a real training run over gRPC and mutual TLS, recorded at the client's end of the line, where an
attacker who has the client's memory, or the client itself, could take them from.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from noren.errors import NorenError
from noren.types import Message
from noren.wire import envelope
from noren.wire.envelope import PREFIX, Incoming
from noren.wire.seal import TAG, Seal
from tapped import Captured, Line, Place, Tap, refused


@pytest.fixture
def place(llama_folder: Path, keys: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Place]:
    made = Place(llama_folder, keys, tmp_path, Tap(monkeypatch))
    yield made
    made.close()


def test_T9_replay_on_the_same_connection(place: Place) -> None:
    """(a), and (d) in a later step: the request's number was used."""
    reasons: Counter[str] = Counter()
    for later in (0, 2):
        for kind in ("hello", "forward", "backward"):
            captured = place.train(2)
            place.train(later)
            line = place.link._line
            assert line is not None
            on_it = [c for c in place.tap.up if c.key == captured[-1].key and c.kind == kind]
            before = place.held()
            reasons[refused(line._frames, line._stream, on_it[-1].frames).split(":")[-1].strip()] += 1
            assert place.held() == before
            place.link.close()  # the next call connects again
    print(f"T9: on the same connection, at once and 2 steps later: 0 of {reasons.total()} accepted: {dict(reasons)}")
    assert reasons == {"a repeated or reordered message": 6}


@pytest.mark.parametrize("who", ["client", "other", "client, before its hello", "client, in another run"])
def test_T9_replay_on_another_connection(place: Place, who: str) -> None:
    """(b) of the same client, (c) of another, (e) in another run: the tag is that of a connection."""
    captured = [c for c in place.train(3) if c.kind != "hello"]
    assert {c.kind for c in captured} == {"forward", "backward"}
    name, _, where = who.partition(", ")
    reasons: Counter[str] = Counter()
    for again in captured:
        line = Line(place, name)
        if where != "before its hello":
            place.hello(line, run={"client": "", "other": "mine"}[name] or ("second" if where else ""))
        before = place.held()
        reasons[line.refused(again.frames)[:40]] += 1
        assert place.held() == before
        line.close()
    print(f"T9: sent by {who!r}: 0 of {len(captured)} accepted: {dict(reasons)}")
    wanted = "before 'hello'" if where == "before its hello" else "tag is wrong"
    assert all(wanted in reason for reason in reasons)
    place.train()  # and the client's own line goes on


def test_T9_exact_duplicate_has_the_same_answer(place: Place) -> None:
    """Sealed anew by its own client: in its step the stored answer, in a later one a refusal; never a change."""
    sent: list[Message] = []
    ask = place.client.span.handler

    def noted(message: Message) -> Message:
        sent.append(message)
        return ask(message)

    place.client.span.handler = noted
    place.train(3)
    at = len(place.tap.down) - 2
    first = place.tap.down[at:]
    for _ in range(2):  # on the same connection, then on a new one
        before = place.held()
        for message, answer in zip(sent[-2:], first, strict=True):
            place.link(message)
            assert place.tap.down[-1] == answer
        assert place.held() == before
        place.link.close()
    place.client.span.handler = ask
    place.train(1)
    before, refusals = place.held(), []
    for message in sent:
        with pytest.raises(NorenError, match="that step is over") as caught:
            place.link(message)
        refusals.append(type(caught.value).__name__)
    assert place.held() == before
    print(f"T9: 4 exact duplicates in their step: 4 stored answers, 0 changes; {len(sent)} later: {Counter(refusals)}")
    assert set(refusals) == {"SessionLost"}


def judge(place: Place) -> Any:
    """What the server's door has agreed to take in this run."""
    (run,) = place.server.runs.values()
    return run.schema(place.server.stage, place.server.limits.tokens).request


def taken(captured: Captured, frames: list[bytes], expect: Any) -> str:
    """How the receiving end of a captured message's own connection takes frames, with nothing received before."""
    incoming, message = Incoming(Seal(captured.key, client=False), expect), None
    try:
        for frame in frames:
            if message is not None:
                return "refused: bytes after the end"
            message = incoming.feed(frame)
    except NorenError as error:
        return f"refused: {error}"
    return "accepted" if message is not None else "refused: cut short"


def test_T9_single_byte_flips(place: Place) -> None:
    """10,000 flips over two real frames; then some through the real line."""
    seed, count = 9, 10_000
    draw = random.Random(seed)
    whole = [c for c in place.train(2) if c.kind in ("forward", "backward")][-2:]
    expect, parts, results = judge(place), Counter[str](), Counter[str]()
    assert [taken(c, c.frames, expect) for c in whole] == ["accepted"] * 2
    for number in range(count):
        captured = whole[number % 2]
        (frame,) = captured.frames
        header = PREFIX.size + len(captured.packed.header)
        places = ((0, PREFIX.size), (PREFIX.size, header), (header, len(frame) - TAG), (len(frame) - TAG, len(frame)))
        part = number // 2 % 4
        changed = bytearray(frame)
        changed[draw.randrange(*places[part])] ^= draw.randint(1, 255)
        parts[("prefix", "header", "body", "tag")[part]] += 1
        results[taken(captured, [bytes(changed)], expect).split(":")[0]] += 1
    print(f"T9: seed {seed}: {results['accepted']} of {count} single-byte flips accepted, by part {dict(parts)}")
    assert results == {"refused": count}
    before = place.held()
    for part in range(4):
        line = place.link._line
        assert line is not None
        packed = whole[part % 2].packed
        (frame,) = packed.frames(1000, line._seal)
        places = (9, PREFIX.size + 5, len(frame) - TAG - 3, len(frame) - 1)
        changed = bytearray(frame)
        changed[places[part]] ^= 4
        refused(line._frames, line._stream, [bytes(changed)])
        assert place.held() == before
        place.link.close()
        place.link.connect()


def test_T9_cut_and_paste(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """Header of one with the body of another, cut short, and frames in another order."""
    seed = 10
    draw = random.Random(seed)
    monkeypatch.setattr(envelope, "CHUNK", 256)  # so that real messages have many frames
    captured = [c for c in place.train(3) if c.kind in ("forward", "backward")]
    expect, tried = judge(place), Counter[str]()

    def no(captured: Captured, frames: list[bytes], how: str) -> None:
        result = taken(captured, frames, expect)
        assert result.startswith("refused"), (how, result)
        tried[how] += 1

    for one in captured:
        assert len(one.frames) > 5 and taken(one, one.frames, expect) == "accepted"
        for other in captured:
            if other is not one and other.kind == one.kind:
                head, body, tag = one.frames[0], other.frames[1:-1], other.frames[-1]
                no(one, [head, *body, one.frames[-1]], "header of one, body of another")
                no(one, [head, *body, tag], "header of one, body and tag of another")
                no(one, [*one.frames[:-1], tag], "tag of another")
                no(
                    one,
                    [PREFIX.pack(*_renumbered(one, other.request)) + head[PREFIX.size :], *one.frames[1:]],
                    "number",
                )
        whole = b"".join(one.frames)
        for _ in range(50):
            cut = draw.randrange(len(whole))
            no(one, [whole[:cut]], "cut short")
        no(one, [whole, b"\0"], "a byte too many")
        no(one, [whole + b"\0"], "a byte too many")
        for _ in range(50):
            i, j = sorted(draw.sample(range(len(one.frames)), 2))
            if one.frames[i] != one.frames[j]:
                mixed = [*one.frames]
                mixed[i], mixed[j] = mixed[j], mixed[i]
                no(one, mixed, "two frames swapped")
    line, before = place.link._line, place.held()
    assert line is not None
    own = list(captured[-1].packed.frames(1000, line._seal))
    refused(line._frames, line._stream, [own[0], own[2], own[1], *own[3:]])
    place.link.close()
    place.link.connect()
    line = place.link._line
    assert line is not None
    refused(line._frames, line._stream, list(captured[-1].packed.frames(1000, line._seal))[:-2])
    assert place.held() == before
    place.link.close()
    print(f"T9: seed {seed}: 0 of {tried.total() + 2} accepted: {dict(tried)}, and 2 over the line")
    place.train()


def _renumbered(captured: Captured, request: int) -> tuple[Any, ...]:
    magic, version, length, _, size = PREFIX.unpack_from(captured.frames[0])
    return magic, version, length, request, size
