"""Logs tell who asked for what and how it went, and never what the parties compute on."""

from __future__ import annotations

import ast
import base64
import io
import json
import logging
import re
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

import noren
from conftest import Parties
from noren.errors import ConfigError, Denied, PeerError
from noren.training.loop import Trainer, Training
from noren.types import Done, Message
from noren.wire.logs import FIELDS, LONGEST, setup_logs, told


@contextmanager
def logs(*, as_json: bool = True, level: str = "DEBUG") -> Iterator[io.StringIO]:
    """This process's logs, as `setup_logs` writes them."""
    root, own = logging.getLogger(), logging.getLogger("noren")
    before = root.level, own.level, list(root.handlers)
    root.handlers = [h for h in before[2] if not type(h).__module__.startswith("_pytest")]  # they judge no record
    stream = io.StringIO()
    setup_logs(as_json, level, stream=stream)
    try:
        yield stream
    finally:
        root.handlers = before[2]
        root.setLevel(before[0])
        own.setLevel(before[1])


LOG = logging.getLogger("noren.test")
WORDS = "the patient of room seven was given digoxin"


def key_pem() -> str:
    return "-----BEGIN PRIVATE KEY-----\n" + base64.encodebytes(secrets.token_bytes(138)).decode() + (
        "-----END PRIVATE KEY-----\n"
    )  # fmt: skip


class Opaque:
    def __str__(self) -> str:
        return WORDS

    __repr__ = __str__


@pytest.mark.parametrize("as_json", [True, False])
def test_contents_and_keys_do_not_come_out(as_json: bool) -> None:
    tensor, pem, ids = torch.full((3, 4), 0.7431), key_pem(), [9137] * 12
    unknown = {"hidden": tensor, "prompt": WORDS, "header": '{"meta":1}', "owner": tensor, "run": [9137], "up": "many"}
    with logs(as_json=as_json) as stream:
        LOG.info("a tensor %s, ids %s, bytes %s, an object %s", tensor, ids, b"digoxin", Opaque(), extra=unknown)
        LOG.info(tensor)
        LOG.info(f"{tensor} {ids}")
        LOG.info("a mapping %(x)s", {"x": tensor})
        LOG.info("the wrong number of %d %d", tensor)
        LOG.info("a key %s", pem, extra={"reason": pem, "owner": pem.splitlines()[1]})
        LOG.info(f"half a key {pem[:120]}")
        LOG.info("too long %s", "x " * 5000, extra={"run": "y " * 5000})
        try:
            raise ValueError(f"{WORDS} {tensor}")
        except ValueError as error:
            LOG.exception("it failed: %s", error)
    text = stream.getvalue()
    lines = text.splitlines()
    assert len(lines) == 9, text
    for secret in ("0.7431", "9137", "digoxin", '"meta"', "PRIVATE", *pem.splitlines()[1:-1], pem[40:80]):
        assert secret not in text, secret
    assert max(map(len, lines)) < 3 * LONGEST
    assert "<Tensor>" in lines[0] and "<list>" in lines[0] and "<Opaque>" in lines[0]
    where = r"it failed: <ValueError>.*ValueError < test_logs\.py:\d+ test_contents_and_keys_do_not_come_out"
    assert re.search(where, lines[8]), "where it failed is told"
    if as_json:
        told_fields = {name for line in lines for name in json.loads(line)}
        assert told_fields <= {"time", "level", "logger", "event", "trace", *FIELDS}
        assert json.loads(lines[7])["run"] == "y " * 99 + "y…"
        assert "up" not in json.loads(lines[0]) and "owner" not in json.loads(lines[0])


def test_what_may_be_told_comes_out_whole() -> None:
    fields = {"owner": "ward-7", "role": "client", "run": "r1", "kind": "forward", "reason": "over-budget",
              "seconds": 0.25, "up": 4096, "down": 17}  # fmt: skip
    assert fields.keys() == FIELDS.keys()
    with logs() as stream:
        LOG.debug("answered %s in %.2f s", "forward", 0.25, extra=fields)
        LOG.warning("refused: %s", Denied(f"{'ab' * 32} may not do this"), extra={"seconds": float("nan")})
        LOG.info("one line\nof two \x1b[31m", extra={"owner": "a\r\nb"})
    first, second, third = map(json.loads, stream.getvalue().splitlines())
    time = first.pop("time")
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}\+00:00", time)
    assert first == fields | {"level": "DEBUG", "logger": "noren.test", "event": "answered forward in 0.25 s"}
    assert second["event"] == f"refused: {'ab' * 32} may not do this", "a digest names a thing, and stays"
    assert third["event"] == "one line of two  [31m" and third["owner"] == "a b"
    assert (
        told("plan ['client 0:2', 'server 2:6'], shape [3, 48]") == "plan ['client 0:2', 'server 2:6'], shape [3, 48]"
    )


def test_setting_up_again_takes_the_place_of_what_was() -> None:
    root, basic = logging.getLogger(), io.StringIO()
    with logs(level="INFO") as old:
        root.addHandler(logging.StreamHandler(basic))
        setup_logs(True, "INFO", stream=(new := io.StringIO()))
        LOG.debug("not shown")
        LOG.info("shown")
        logging.getLogger("somebody.else").info("not shown")
        logging.getLogger("somebody.else").warning("shown, too")
    assert old.getvalue() == basic.getvalue() == ""
    assert [json.loads(line)["event"] for line in new.getvalue().splitlines()] == ["shown", "shown, too"]
    with pytest.raises(ConfigError, match="log level 'LOUD'"):
        setup_logs(level="LOUD")


def test_a_line_that_cannot_be_written_shows_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    class Full(io.StringIO):
        def write(self, text: str) -> int:
            raise OSError(28, "no space left")

    said = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, logs():
        patch.setattr("sys.__stderr__", said)
        setup_logs(True, "DEBUG", stream=Full())
        LOG.info("%s", WORDS)
    assert said.getvalue() == "a log line could not be written\n"
    assert WORDS not in "".join(capsys.readouterr())


def test_events_are_constant() -> None:
    """What varies is an argument or an `extra`, where it is judged by its type: no f-string, no sum of texts."""
    calls = 0
    for path in Path(noren.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)):
                continue
            owner = node.func.value
            levels = {"debug", "info", "warning", "error", "exception", "critical"}
            if isinstance(owner, ast.Name) and owner.id in {"log", "logger", "logging"} and node.func.attr in levels:
                calls += 1
                event = node.args[0]
                assert isinstance(event, ast.Constant) and isinstance(event.value, str), f"{path}:{node.lineno}"
    assert calls >= 8


def leaks(line: str, text: str, key_lines: list[str]) -> str:
    """What of the data or of the keys a line shows; "" if nothing."""
    ids = [str(i) for i in text.encode()]
    words = [text[i : i + 8] for i in range(0, len(text) - 8)]
    runs = [r"\D+".join(ids[i : i + 3]) for i in range(len(ids) - 3)]
    if found := next((w for w in words if w in line), None):
        return f"the text {found!r}"
    if found := next((r for r in runs if re.search(rf"(?<!\d){r}(?!\d)", line)), None):
        return f"the ids {found!r}"
    if re.search(r"tensor\(|PRIVATE KEY", line):
        return "a tensor or a key"
    return next((f"key material {k[:8]}..." for k in key_lines if k in line or k[8:40] in line), "")


class Raw(logging.Handler):
    """Everything of Noren's own records, before any of it is cut out."""

    def __init__(self) -> None:
        super().__init__(logging.DEBUG)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(f"{record.getMessage()} {vars(record)}")


def test_no_line_of_a_run_shows_its_data(parties: Parties, llama_folder: Path, keys: Path) -> None:
    ids = list(WORDS.encode())
    row = {"input_ids": ids, "attention_mask": [1] * len(ids), "labels": ids}
    raw = Raw()
    with logs() as stream:
        logging.getLogger("noren").addHandler(raw)
        try:
            client = parties.client(llama_folder, adapter={"r": 4, "targets": ["q_proj", "v_proj"]})
            settings = Training(steps=2, batch_size=2, lr=1e-3)
            Trainer(client.model, [row, row], [row], settings, pad_id=0, seed=3, remote=client.remote()).run()
            prompt = torch.tensor([ids])
            client.model.eval().generate(
                prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=8, pad_token_id=0
            )
            with pytest.raises(PeerError):
                client.ask(Message(Done()))
            client.close()
        finally:
            logging.getLogger("noren").removeHandler(raw)
    lines = stream.getvalue().splitlines()
    key_lines = [line for path in keys.glob("*.key") for line in path.read_text().splitlines() if line[0] != "-"]
    assert len(key_lines) > 4
    for planted in (f"prompt {WORDS[5:20]}", f"ids {ids[3:9]}", "tensor([0.1])", f"key {key_lines[1]}"):
        assert leaks(planted, WORDS, key_lines), f"this would not be found: {planted}"
    if parties.kind == "grpc":
        assert lines, "a server says who connects"
    for line in [*lines, *raw.lines]:
        assert not (what := leaks(line, WORDS, key_lines)), f"{what} in {line}"
    print(f"{parties.kind}: {len(lines)} log lines, {len(raw.lines)} records; none shows text, ids, tensors or keys")
