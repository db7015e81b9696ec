"""Frames that must be refused, by what is wrong with each: for test_decoder.py.

Where the point lies deeper than the prefix, all before it is right, the tag too.
"""

from __future__ import annotations

import struct
from functools import partial
from typing import Any, NamedTuple

import msgspec
import torch
import zstandard

from frames import ADAPTER, MOST, WIDTH, forward, schema, sealed
from noren.errors import OverBudget, PeerError, ProtocolError
from noren.types import Backward, Message
from noren.wire.codecs import CODECS
from noren.wire.envelope import CHUNK, DTYPES, MAX_HEADER, MAX_TENSORS, Expect, pack
from noren.wire.schema import nothing_agreed

GIB = 1 << 30


class Case(NamedTuple):
    """Frames, what the refusal says, its class, who judges the header, the most bytes, and what came before."""

    frames: list[bytes]
    says: str
    error: type[PeerError] = ProtocolError
    expect: Expect | None = None
    most: int = MOST
    before: tuple[bytes, ...] = ()


def head(*entries: list[Any], meta: str = '{"kind":"done","step":0}') -> bytes:
    return b'{"meta":%b,"tensors":%b}' % (meta.encode(), msgspec.json.encode(entries))


def one(name: Any = "x", dtype: Any = "f32", shape: Any = (2,), codec: Any = "raw", nbytes: Any = 8) -> bytes:
    return head([name, dtype, shape, codec, nbytes])


def said(meta: str) -> bytes:
    return sealed(head(meta=meta))


def bad(header: bytes, says: str, body: bytes = b"", **more: Any) -> Case:
    return Case([sealed(header, body)], says, **more)


def coded(codec: str, shape: list[int], payload: bytes, dtype: str = "f32") -> bytes:
    return sealed(one("x", dtype, shape, codec, len(payload)), payload)


def payload(codec: str, **patch: bytes) -> bytes:
    """A right payload of [2, 64] ones, but for `at_N=bytes`."""
    made = bytearray(CODECS[codec].encode(torch.ones(2, 64)).numpy().tobytes())
    for place, value in patch.items():
        at = int(place.removeprefix("at_"))
        made[at : at + len(value)] = value
    return bytes(made)


def message(sent: Message, codec: str = "raw", request: int = 1, **more: Any) -> bytes:
    packed = pack(sent, dict.fromkeys(sent.tensors, codec))
    return sealed(packed.header, b"".join(packed.bodies), request=request, tagged=request, **more)


def zstd(values: bytes, **settings: Any) -> bytes:
    return zstandard.ZstdCompressor(**settings).compress(values)


def padded(length: int) -> bytes:
    """A header of exactly so many bytes that is wrong only in the last of them."""
    start, end = b'{"meta":{"kind":"close","session":"', b'"},"tensors":[?]}'
    return start + b"s" * (length - len(start) - len(end)) + end


GOOD = one()
DONE = head()
FRAME = sealed(GOOD, bytes(8))
LONG = CHUNK + 4096
FIRST = sealed(head(["x", "f32", [LONG // 4], "raw", LONG]), size=LONG)[:-16]
NAN, INF = struct.pack("<f", float("nan")), struct.pack("<f", float("inf"))
agreed, int4 = schema().request, schema("int4").request
ONE, TWO = message(forward()), message(forward())
request = partial(bad, expect=agreed)
FORWARD = '{"kind":"forward","session":"s","start":0,"lengths":[3],"padding":"left"}'
PUSH = '{"kind":"push","step":1}'
ADAPTERS = [[name, "f32", shape, "raw", 768] for name, shape in ADAPTER.items()]


def hidden(
    shape: tuple[int, ...] = (3, WIDTH), dtype: str = "f32", codec: str = "raw", name: str = "hidden", **more: Any
) -> Case:
    """The head of a forward that is not what was agreed; its body is announced, and does not follow."""
    nbytes = CODECS[codec].size(shape, DTYPES[dtype])
    frame = sealed(head([name, dtype, shape, codec, nbytes], meta=FORWARD), size=nbytes)
    return Case([frame], **({"expect": agreed, "most": GIB} | more))


def pushed(*entries: list[Any], says: str) -> Case:
    return request(head(*entries, meta=PUSH), says, bytes(sum(entry[4] for entry in entries)))


MALFORMED: dict[str, Case] = {
    # prefix
    "nothing": Case([b""], "begins with 24 bytes"),
    "23 bytes": Case([FRAME[:23]], "begins with 24 bytes, got 23"),
    "another protocol": Case([b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n"], "not a Noren message"),
    "other magic": Case([sealed(GOOD, bytes(8), magic=b"NRM")], "not a Noren message"),
    "version 1": Case([sealed(GOOD, bytes(8), version=1)], "of version 1"),
    "version 255": Case([sealed(GOOD, bytes(8), version=255)], "of version 255"),
    "header longer than its frame": Case([sealed(GOOD, length=1000)], "header of 1000 bytes"),
    "header of 4 GiB": Case([sealed(GOOD, length=(1 << 32) - 1)], "header of 4294967295 bytes"),
    "header of 1 MiB and one": Case([sealed(padded(MAX_HEADER + 1))], "header of 1048577 bytes"),
    "header of 1 MiB, wrong at its end": Case([sealed(padded(MAX_HEADER))], "JSON is malformed"),
    "header in two frames": Case([FRAME[:40], FRAME[40:]], "in a first frame of 40"),
    "header cut short": Case([sealed(GOOD, bytes(8), length=len(GOOD) - 1)], "truncated"),
    "no header": Case([sealed(b"")], "truncated"),
    "body above the limit": Case([sealed(GOOD, size=MOST + 1)], "the limit is", OverBudget),
    "body of 2^64 - 1": Case([sealed(GOOD, size=(1 << 64) - 1)], "the limit is", OverBudget),
    # header: its JSON
    "a pickle": bad(b"\x80\x04\x95\x0f\x00\x00\x00\x00\x00\x00\x00\x8c\x05posix", "header: "),
    "not UTF-8": bad(head(meta='{"kind":"close","session":"?"}').replace(b"?", b"\xff\xfe"), "utf-8"),
    "half a surrogate": bad(head(meta='{"kind":"close","session":"\\ud800"}'), "surrogate"),
    "nested 100,000 deep": bad(b"[" * 100_000, "header: "),
    "nested 100,000 deep in a field": bad(b'{"meta":{"step":' + b"[" * 100_000, "recursion"),
    "nested in an unknown place": bad(b'{"meta":{"kind":"done"},"tensors":[' + b'{"a":' * 90_000, "header: "),
    "two documents": bad(GOOD + GOOD, "trailing characters"),
    "an array": bad(b"[]", "Expected `object`"),
    "null": bad(b"null", "Expected `object`"),
    "no meta": bad(b'{"tensors":[]}', "missing required field `meta`"),
    "no tensors": bad(b'{"meta":{"kind":"done"}}', "missing required field `tensors`"),
    "unknown field beside meta": bad(b'{"meta":{"kind":"done"},"tensors":[],"code":"x"}', "unknown field `code`"),
    # header: its meta
    "no kind": Case([said('{"step":1}')], "missing required field `kind`"),
    "unknown kind": Case([said('{"kind":"shell","command":"id"}')], "Invalid value 'shell'"),
    "kind is a number": Case([said('{"kind":7}')], "Expected `str`"),
    "unknown field": Case([said('{"kind":"done","run":"x"}')], "unknown field `run`"),
    "field of another kind": Case([said('{"kind":"done","session":"x"}')], "unknown field `session`"),
    "missing field": Case([said('{"kind":"backward"}')], "missing required field `session`"),
    "number as a string": Case([said('{"kind":"done","step":"1"}')], "Expected `int`, got `str`"),
    "fraction of a step": Case([said('{"kind":"done","step":1.5}')], "Expected `int`, got `float`"),
    "truth as a number": Case([said('{"kind":"pull","optimizer":1}')], "Expected `bool`"),
    "negative step": Case([said('{"kind":"push","step":-1}')], ">= 0"),
    "step of 2^48": Case([said('{"kind":"push","step":281474976710656}')], "$.meta.step"),
    "step of 41 digits": Case([said('{"kind":"done","step":1' + "0" * 40 + "}")], "$.meta.step"),
    "step of 900,000 digits": Case([said('{"kind":"done","step":' + "9" * 900_000 + "}")], "out of range"),
    "seed of 2^63": bad(pack(forward()).header[:8] + b'{"kind":"hello","protocol":2,"run":"r","terms":{"fingerprint":'
                        b'"f","plan":[],"task":"t","dtype":"d","lora":"","seed":9223372036854775808}},"tensors":[]}',
                        "$.meta.terms.seed"),
    "NaN": Case([said('{"kind":"gradient","square_norm":NaN}')], "JSON is malformed"),
    "Infinity": Case([said('{"kind":"gradient","square_norm":Infinity}')], "JSON is malformed"),
    "1e999": Case([said('{"kind":"gradient","square_norm":1e999}')], "out of range"),
    "negative amount": Case([said('{"kind":"gradient","square_norm":-1e-9}')], ">= 0"),
    "beta of 1": Case([said('{"kind":"step","update":{"step":1,"scale":1,"optimizer":{"name":"adam","lr":0.1,'
                            '"betas":[1.0,0.9]}}}')], "< 1"),
    "unknown optimiser": Case([said('{"kind":"step","update":{"step":1,"scale":1,"optimizer":{"name":"exec",'
                                    '"lr":1}}}')], "Invalid enum value 'exec'"),
    "name of 201 characters": Case([said('{"kind":"backward","session":"' + "s" * 201 + '"}')], "length <= 200"),
    "negative length": Case([said(FORWARD.replace("[3]", "[-3]"))], ">= 0"),
    # header: its tensors
    "an entry of four": bad(head(["x", "f32", [2], "raw"]), "length 5"),
    "an entry of six": bad(head(["x", "f32", [2], "raw", 8, 0]), "length"),
    "an entry as an object": bad(b'{"meta":{"kind":"done"},"tensors":[{"name":"x"}]}', "Expected `array`"),
    "tensor name of 4,000 characters": bad(one("n" * 4000), "length <= 200", bytes(8)),
    "tensor name is a number": bad(one(7), "Expected `str`", bytes(8)),
    "object dtype": bad(one(dtype="O"), "dtype 'O'", bytes(8)),
    "dtype f64": bad(one(dtype="f64", nbytes=16), "dtype 'f64'", bytes(16)),
    "dtype of 100,000 characters": bad(one(dtype="f" * 100_000), "dtype 'ffffffffffffffff'", bytes(8)),
    "unknown codec": bad(one(codec="gzip"), "codec 'gzip'", bytes(8)),
    "sparse": bad(one(codec="coo"), "codec 'coo'", bytes(8)),
    "shape is a number": bad(one(shape=2), "Expected `array`", bytes(8)),
    "shape of strings": bad(one(shape=["2"]), "Expected `int`, got `str`", bytes(8)),
    "shape of fractions": bad(one(shape=[2.5]), "Expected `int`, got `float`", bytes(8)),
    "negative shape": bad(one(shape=[-2]), ">= 0", bytes(8)),
    "two negatives": bad(one(shape=[-1, -2]), ">= 0", bytes(8)),
    "shape of 2^48": bad(one(shape=[1 << 48]), "$.tensors[0][2][0]", bytes(8)),
    "nine dimensions": bad(one(shape=[1] * 8 + [2]), "length <= 8", bytes(8)),
    "shape that overflows to 0": bad(one(shape=[1 << 32, 1 << 32, 2], nbytes=0), "the limit is", error=OverBudget),
    "eight times 2^47": bad(one(shape=[1 << 47] * 8, nbytes=0), "the limit is", error=OverBudget),
    "nothing, 2^94 times": bad(one(shape=[0, 1 << 47, 1 << 47], nbytes=0), "no tensor has shape"),
    "nothing, 2^94 times, under a codec": bad(one(shape=[1 << 47, 1 << 47, 0], codec="int8", nbytes=0),
                                              "no tensor has shape"),
    "negative size": bad(one(nbytes=-8), ">= 0", bytes(8)),
    "sizes that cancel": bad(head(["x", "f32", [4], "raw", 16], ["y", "f32", [2], "raw", -8]), ">= 0", bytes(8)),
    "size above its shape": bad(one(nbytes=12), "12 bytes for shape [2] under raw, not 8", bytes(12)),
    "size below its shape": bad(one(nbytes=4), "4 bytes for shape [2] under raw, not 8", bytes(4)),
    "size of a scalar": bad(one(shape=[], nbytes=8), "8 bytes for shape [] under raw, not 4", bytes(8)),
    "body below what is announced": Case([sealed(GOOD, bytes(4))], "announce 8 bytes of body, the prefix 4"),
    "body above what is announced": Case([sealed(GOOD, bytes(12))], "announce 8 bytes of body, the prefix 12"),
    "one name twice": bad(head(["x", "f32", [1], "raw", 4], ["x", "f32", [1], "raw", 4]), "share a name", bytes(8)),
    "16,385 tensors": bad(head(*[[f"{n}", "f32", [0], "raw", 0] for n in range(MAX_TENSORS + 1)]), "length <= 16384"),
    "i64 under a codec": bad(one(dtype="i64", codec="int8", nbytes=16), "floating point only", bytes(16)),
    "a scalar under a codec": bad(one(shape=[], codec="bf16", nbytes=2), "floating point only", bytes(2)),
    "decoded, above the limit": bad(one(shape=[4 * CHUNK], codec="zstd", nbytes=40), "once decoded", bytes(40),
                                    error=OverBudget),
    "decoded together, above the limit": bad(head(*[[f"{n}", "f32", [CHUNK // 4], "zstd", 9] for n in range(3)]),
                                             "once decoded", bytes(27), error=OverBudget),
    # what was not agreed
    "a tensor before hello": bad(GOOD, "carries no tensors", bytes(8), expect=nothing_agreed),
    "an answer with a tensor": request(GOOD, "carries no tensors", bytes(8)),
    "forward without hidden": request(head(meta=FORWARD), "exactly one tensor"),
    "logits instead of hidden": hidden(name="logits", says="exactly one tensor, 'hidden'; got ['logits']"),
    "wrong dtype": hidden(dtype="f16", says="must be float32 under codec 'raw', got f16"),
    "wrong codec": hidden(codec="int8", says="got f32 under 'int8'"),
    "raw where a codec was agreed": hidden(expect=int4, says="got f32 under 'raw'"),
    "wrong width": hidden((3, WIDTH + 1), says="tokens = 3"),
    "lengths that do not sum": hidden((4, WIDTH), says="lengths sum to 3; got [4, 80]"),
    "three dimensions": hidden((1, 3, WIDTH), says="got [1, 3, 80]"),
    "a scalar for hidden": hidden((), says="got []"),
    "more tokens than agreed": hidden((4097, WIDTH), says="4097 tokens", error=OverBudget),
    "1 GiB of hidden states": hidden((GIB // 512, 128), says="2097152 tokens", error=OverBudget),
    "gradient of another width": Case([message(Message(Backward(session="s"), {"gradient": torch.zeros(3, 81)}))],
                                      "must be [tokens, 80]", expect=agreed),
    "answer of too many rows": Case([sealed(head(["hidden", "f32", [4, WIDTH], "raw", 1280], meta='{"kind":"hidden"}'),
                                            size=1280)], "<= 3", expect=schema().answer(forward())),
    "answer of another kind": bad(head(meta='{"kind":"state","step":1}'), "answered a 'forward' with a 'state'",
                                  expect=schema().answer(forward())),
    "adapter that is missing": pushed(ADAPTERS[0], says="1 adapter tensors differ"),
    "adapter with a path for a name": pushed(*ADAPTERS, ["../../../etc/cron.d/x", "f32", [1], "raw", 4],
                                             says="'../../../etc/cron.d/x'"),
    "adapter with NUL in its name": pushed(*ADAPTERS, ["a\0b", "f32", [1], "raw", 4], says="'a\\x00b'"),
    "adapter on another layer": pushed(ADAPTERS[0], ["model.layers.9.q.lora_B", *ADAPTERS[1][1:]], says="2 adapter"),
    "adapter transposed": pushed(ADAPTERS[1], [ADAPTERS[0][0], "f32", [48, 4], "raw", 768], says="was not agreed"),
    "adapter of whole numbers": pushed(ADAPTERS[0], [ADAPTERS[1][0], "i64", [48, 4], "raw", 1536],
                                       says="crosses as floating point"),
    "unknown moment": pushed(*ADAPTERS, [f"optimizer/{ADAPTERS[0][0]}/code", "f32", [4, 48], "raw", 768],
                             says="optimiser moment 'code'"),
    "moment of nothing": pushed(*ADAPTERS, ["optimizer/exp_avg", "f32", [4, 48], "raw", 768], says="was not agreed"),
    # body
    "an empty frame in the middle": Case([FIRST, bytes(1000), b""], "an empty frame", most=GIB),
    "a byte too many, in one frame": Case([FRAME + b"\0"], "more bytes after the header than the 8"),
    "a byte too many, later": Case([FIRST, bytes(LONG), bytes(17)], "more bytes after the header", most=GIB),
    "a frame after the end": Case([sealed(GOOD, bytes(8)), b"\0"], "more bytes after the header"),
    # tag
    "wrong tag": Case([FRAME[:-1] + bytes([FRAME[-1] ^ 1])], "the message's tag is wrong"),
    "no tag": Case([FRAME[:-16] + bytes(16)], "the message's tag is wrong"),
    "wrong tag of a long message": Case([FIRST, bytes(LONG), bytes(16)], "tag is wrong", most=GIB),
    "one bit of the body": Case([FRAME[:-20] + b"\1" + FRAME[-19:]], "the message's tag is wrong"),
    "one letter of the header": Case([FRAME.replace(b'"x"', b'"y"')], "the message's tag is wrong"),
    "header of one, body of another": Case([ONE[:-976] + TWO[-976:-16] + ONE[-16:]], "tag is wrong"),
    "tag of the other direction": Case([sealed(GOOD, bytes(8), client=False)], "tag is wrong"),
    "tag of another connection": Case([sealed(GOOD, bytes(8), key=bytes(32))], "tag is wrong"),
    "tag of another request": Case([sealed(GOOD, bytes(8), tagged=2)], "tag is wrong"),
    "request 0": Case([sealed(GOOD, bytes(8), request=0)], "request 0 came after 0"),
    "request repeated": Case([FRAME], "request 1 came after 1", before=(FRAME,)),
    "request out of order": Case([FRAME], "request 1 came after 9", before=(message(forward(), request=9),)),
    "long request repeated": Case([FIRST], "request 1 came after 1", before=(FRAME,), most=GIB),
    # values
    "NaN in f32": bad(GOOD, "not finite", NAN + bytes(4)),
    "Inf in f32": bad(GOOD, "not finite", bytes(4) + INF),
    "-Inf in f16": bad(one(dtype="f16", nbytes=4), "not finite", bytes(2) + b"\x00\xfc"),
    "NaN in bf16": bad(one(dtype="bf16", nbytes=4), "not finite", b"\xc0\x7f" + bytes(2)),
    "NaN under bf16": Case([coded("bf16", [2, 64], payload("bf16", at_4=b"\xc0\x7f"))], "not finite"),
    "Inf under fp16": Case([coded("fp16", [2, 64], payload("fp16", at_4=b"\x00\x7c"))], "not finite"),
    "NaN under fp8": Case([coded("fp8", [2, 64], payload("fp8", at_9=b"\x7f"))], "not finite"),
    "negative scale under fp8": Case([coded("fp8", [2, 64], payload("fp8", at_3=b"\xbf"))], "never negative"),
    "NaN scale of a group": Case([coded("int8-group", [2, 64], payload("int8-group", at_0=NAN[2:]))], "not finite"),
    "Inf scale under int4": Case([coded("int4", [2, 64], payload("int4", at_0=b"\x80\x7f"))], "not finite"),
    "outlier in no column": Case([coded("int8", [2, 64], payload("int8", at_24=b"\xff\x7f"))], "no column of 0..63"),
    "outliers that do not ascend": Case([coded("int8", [2, 64], payload("int8", at_24=b"\5\0\5\0"))], "do not ascend"),
    "codec payload a byte short": Case([coded("int4", [2, 64], payload("int4")[:-1])], "67 bytes for shape"),
    "codec payload a byte long": Case([coded("fp8", [2, 64], payload("fp8") + b"\0")], "137 bytes for shape"),
    "zstd payload that is none": Case([coded("zstd", [2, 64], b"\0" * 40)], "are not one frame"),
    "zstd payload of nothing": Case([coded("zstd", [2, 64], b"")], "are not one frame"),
    "zstd of another size": Case([coded("zstd", [2, 64], zstd(bytes(1 << 20)))], "announces 1048576"),
    "zstd of no size": Case([coded("zstd", [2, 64], zstd(bytes(512), write_content_size=False))], "announces no size"),
    "zstd and something behind it": Case([coded("zstd", [2, 64], zstd(bytes(512)) + b"more")], "are not one frame"),
    "NaN under zstd": Case([coded("zstd", [2, 64], zstd(b"\xff" * 512))], "not finite"),
}  # fmt: skip
