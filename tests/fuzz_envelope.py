"""Coverage-guided fuzzing of the decoder: `python tests/fuzz_envelope.py --seconds 1800 --corpus FOLDER`.

An input's first byte chooses how it reaches the decoder: as raw bytes; or as a header and a body that get a right
prefix and tag first, so that what lies behind those checks is reached. The next byte chooses who judges the header.
Any exception but a NorenError, more than a second or more than the memory limit is a crash: the input is then kept in
the corpus folder under `crash-...`. Needs atheris (`pip install atheris`).
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

import atheris

with atheris.instrument_imports(
    include=["noren.wire.envelope", "noren.wire.schema", "noren.wire.seal", "noren.wire.codecs"]
):
    import noren.wire.envelope
    import noren.wire.schema  # and what it imports; msgspec is compiled, and cannot be instrumented

from frames import TOKENS, corpus, decoder, expectations, sealed
from noren.errors import NorenError
from noren.wire.envelope import PREFIX

RSS_LIMIT_MB = 2048
JUDGES = expectations()
END = re.compile(rb'\]\]\}|"tensors":\[\]\}')


def once(data: bytes) -> bool:
    """Feed one input to a decoder; return whether it became a message."""
    if len(data) < 2:
        return False
    mode, judge, rest = data[0] % 4, JUDGES[data[1] % len(JUDGES)], data[2:]
    cut = len(rest)
    if mode:  # the header ends where its JSON seems to, or where the next two bytes say
        if mode == 3 and len(rest) > 2:
            end, rest = int.from_bytes(rest[:2], "little") % (len(rest) - 1), rest[2:]
        else:
            match = END.search(rest)
            end = match.end() if match else len(rest)
        cut = PREFIX.size + end + (len(rest) - end) // 2
        rest = sealed(rest[:end], rest[end:])
    incoming = decoder(judge)
    pieces = [rest[:cut], rest[cut:]] if mode == 2 else [rest]
    try:
        return [message for piece in pieces if (message := incoming.feed(piece)) is not None] != []
    except NorenError:
        return False


def seeds(folder: Path) -> int:
    """Write real messages of all kinds and codecs into a folder, in every mode; return how many."""
    inputs = []
    for number, (header, body) in enumerate(corpus()):
        judge = bytes([number % len(JUDGES)])
        inputs += [b"\0\0" + sealed(header, body), b"\1" + judge + header + body, b"\2\0" + header + body,
                   b"\3\0" + len(header).to_bytes(2, "little") + header + body]  # fmt: skip
    for number, data in enumerate(inputs):
        folder.joinpath(f"seed-{number:04}").write_bytes(data)
    return len(inputs)


def dictionary(path: Path) -> None:
    """Write tokens for the fuzzer to put in, in libFuzzer's notation."""
    short = [token for token in TOKENS if len(token) <= 64]
    fields = re.findall(rb'"[a-z_]+":', b"".join(header for header, _ in corpus()))
    words = dict.fromkeys([*short, *fields, b"NRN\2"])
    escaped = ["".join([f"\\x{byte:02x}" for byte in word]) for word in words]
    path.write_text("".join(f'"{word}"\n' for word in escaped))


def main() -> None:
    """Run libFuzzer for so many seconds; the process ends with its verdict."""
    parser = argparse.ArgumentParser(description="coverage-guided fuzzing of the decoder of frames")
    parser.add_argument("--seconds", type=int, default=60)
    parser.add_argument("--corpus", type=Path, required=True, help="where inputs are kept; made if it is not there")
    asked = parser.parse_args()
    inputs = asked.corpus / "inputs"
    inputs.mkdir(parents=True, exist_ok=True)
    written, accepted = seeds(inputs), sum(once(path.read_bytes()) for path in sorted(inputs.glob("seed-*")))
    assert accepted > written * 3 // 4, f"only {accepted} of {written} real messages were accepted"
    dictionary(asked.corpus / "tokens.dict")
    print(f"{written} seeds, {accepted} accepted; decoder: {noren.wire.envelope.__file__}", file=sys.stderr)
    atheris.Setup(
        [
            sys.argv[0], str(inputs), f"-max_total_time={asked.seconds}", f"-rss_limit_mb={RSS_LIMIT_MB}", "-timeout=1",
            "-max_len=4096", f"-dict={asked.corpus / 'tokens.dict'}", f"-artifact_prefix={asked.corpus}/",
            "-print_final_stats=1",
        ],
        once,
    )  # fmt: skip
    atheris.Fuzz()


if __name__ == "__main__":
    main()
