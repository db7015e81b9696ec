"""Bytes never become objects or code: what real processes do is watched, and what the source may say is read.

The watch sees `pickle.find_class`, `marshal`, `exec` and `compile` of every process of a run. It cannot see an
unpickling that builds only plain values, nor torch's restricted unpickler: those are kept out by reading the source.
"""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

import noren
from conftest import U_SHAPED
from noren.config import Document
from noren.wire.identity import ensure
from zygote import MODULES, Child, Zygote

SOURCE = Path(noren.__file__).parent
TESTS = Path(__file__).parent

# The watch.

LOADERS = ("<frozen importlib._bootstrap>", "<frozen importlib._bootstrap_external>")
"""Python's import: unmarshals and executes installed files."""
DECLARATIONS = ("typing.py", "inspect.py", "dataclasses.py", "collections/__init__.py")
"""Parts of Python that compile what stands in a source file: annotations, the methods of dataclasses, named tuples.
The command line, the run document and transformers' models are declared in this way, when they are first used."""
FROM_PEERS = ("wire/envelope.py", "wire/schema.py", "wire/seal.py", "wire/codecs/", "wire/access.py")
"""Where bytes of a peer are read: nothing may be loaded or compiled on their account."""


def innocent(event: dict[str, Any]) -> bool:
    """Whether an event is Python loading an installed module, or making a declaration of one into a class."""
    places = [line.rpartition(":")[0] for line in event["stack"]]
    if not places or event["event"].startswith("pickle.") or any(part in p for p in places for part in FROM_PEERS):
        return False
    loading = any(place in LOADERS for place in places)
    if event["event"].startswith("marshal."):
        return places[0] in LOADERS
    library = os.path.dirname(os.__file__)
    return loading or any(places[0] == os.path.join(library, name) for name in DECLARATIONS)


def events(place: Path, since: int = 0) -> list[dict[str, Any]]:
    """The events that a process wrote down, after the first `since` of them."""
    lines = place.read_text().splitlines() if place.exists() else []
    return [json.loads(line) for line in lines][since:]


def test_T22_no_event_in_a_run(tmp_path: Path) -> None:
    """Two trainings and a generation, server and clients in processes of their own, over mutual TLS."""
    for name in ("client", "server"):
        ensure(tmp_path / "keys", name, name)  # type: ignore[arg-type]
    (tmp_path / "notes.txt").write_text("".join(f"Patient {i} was seen today, and is well.\n" for i in range(16)))

    def document(name: str, links: dict[str, str], codec: str) -> str:
        values = {
            "model": "embedded", "name": name, "plan": U_SHAPED, "links": links, "adapter": {"r": 2},
            "noise": {"clip": 50.0, "scale": 0.1}, "data": {"path": "notes.txt", "max_length": 16},
            "training": {"steps": 2, "batch_size": 4, "save_every": 1}, "keys": {"dir": "keys"},
            "wire": {"activations": codec, "gradients": codec},
        }  # fmt: skip
        (tmp_path / f"{name}.toml").write_text(Document.of(values, tmp_path).to_toml())
        return f"{name}.toml"

    path = os.pathsep.join([str(TESTS), str(SOURCE.parent), os.environ.get("PYTHONPATH", "")])
    with Zygote(
        {"PYTHONPATH": path, "NOREN_CACHE": str(tmp_path / "cache")}, modules=(*MODULES, "audit_hook")
    ) as zygote:

        def start(name: str, *words: str) -> Child:
            more = {"NOREN_AUDIT": str(tmp_path / f"{name}.audit")}
            return zygote.start(words, cwd=tmp_path, stdout=tmp_path / f"{name}.out", env=more)

        serve = ("serve", document("served", {}, "raw"), "--party", "server", "--listen", "127.0.0.1:0", "--json")
        server = start("server", *serve)
        links = {"server": f"127.0.0.1:{json.loads(server.first_line())['port']}"}
        assert start("first", "train", document("first", links, "raw"), "--json").wait(60) == 0
        loaded = len(events(tmp_path / "server.audit"))
        for name, codec in (("second", "raw"), ("third", "int8")):
            assert start(name, "train", document(name, links, codec), "--json").wait(60) == 0
        words = ("generate", "first.toml", "--prompt", "Patient 3", "--max-new-tokens", "4", "--json")
        assert start("words", *words).wait(60) == 0
        server.terminate()
        assert server.wait(20) == 0

    for name in ("server", "first", "second", "third", "words"):
        found = events(tmp_path / f"{name}.audit")
        guilty = [(e["event"], e["subject"][:200], e["stack"][:6]) for e in found if not innocent(e)]
        print(f"[T22] {name}: {dict(Counter(e['event'] for e in found))}, of which {len(guilty)} are not Python's own")
        assert not guilty
        assert len(found) > 100  # the watch was awake
    later = events(tmp_path / "server.audit", loaded)
    print(f"[T22] server, once it had done each thing once: {len(later)} events")
    assert later == []


PLANTED = {
    "pickle": ("import pickle; pickle.loads(pickle.dumps(print))", "pickle.find_class"),
    "nested": ("import pickle, io; pickle.Unpickler(io.BytesIO(pickle.dumps(Counter()))).load()", "pickle.find_class"),
    "marshal": ("import marshal; marshal.loads(marshal.dumps(3))", "marshal.loads"),
    "exec": ("exec('1 + 1')", "exec"),
    "eval": ("eval('1 + 1')", "exec"),
    "compile": ("compile('1 + 1', 'peer', 'eval')", "compile"),
    "numpy": (
        "import numpy, io; f = io.BytesIO(); numpy.save(f, numpy.array([{}, print], object), allow_pickle=True); "
        "f.seek(0); numpy.load(f, allow_pickle=True)",
        "pickle.find_class",
    ),
}


@pytest.mark.parametrize("name", PLANTED)
def test_T22_the_watch_sees(name: str, tmp_path: Path) -> None:
    """Each way to make an object of bytes is an event that nothing excuses."""
    code, wanted = PLANTED[name]
    text = f"from collections import Counter\nimport audit_hook\n\ndef read():\n    {code}\n\nread()\n"
    (tmp_path / "peer.py").write_text(text)
    more = {"PYTHONPATH": str(TESTS), "NOREN_AUDIT": str(tmp_path / "audit")}
    subprocess.run([sys.executable, tmp_path / "peer.py"], env=os.environ | more, check=True, timeout=60)
    assert wanted in {event["event"] for event in events(tmp_path / "audit") if not innocent(event)}


def test_T22_nothing_is_excused_where_bytes_are_read() -> None:
    """An import on a peer's account is one too many, whatever it imports."""
    load = {
        "event": "marshal.loads",
        "subject": "",
        "stack": [f"{LOADERS[1]}:get_code", "/x/noren/parties/client.py:f"],
    }
    assert innocent(load)
    assert not innocent(load | {"stack": [*load["stack"], "/x/noren/wire/envelope.py:read_header"]})


# What the source may say.

MODULES_BANNED = {
    "pickle", "_pickle", "cPickle", "cloudpickle", "dill", "shelve", "marshal", "joblib", "jsonpickle", "copyreg",
    "multiprocessing", "pickletools", "code", "codeop",
}  # fmt: skip
CALLS_BANNED = {
    "torch.load", "torch.save", "torch.jit.load", "torch.hub.load", "torch.package", "torch.export.load",
    "torch.multiprocessing", "torch.distributed", "numpy.load", "numpy.save", "numpy.savez", "numpy.fromregex",
    "pandas.read_pickle", "yaml.load", "yaml.load_all", "yaml.unsafe_load", "yaml.full_load", "yaml.Loader",
    "runpy.run_path", "runpy.run_module",
}  # fmt: skip
BUILTINS_BANNED = {"eval", "exec", "compile", "__import__"}
METHODS_BANNED = {"read_pickle", "to_pickle", "load_module", "exec_module", "load_dill"}
KEYWORDS_BANNED = {"allow_pickle": False, "trust_remote_code": False, "use_safetensors": True, "weights_only": None}
"""Keyword -> the one constant that it may have; None: it has no place."""


def offences(text: str) -> list[str]:
    """What a source file says that could make bytes into objects or code: line and words."""
    tree, names, found = ast.parse(text), dict[str, str](), list[str]()

    def dotted(node: ast.AST) -> str:
        if isinstance(node, ast.Name):
            return names.get(node.id, node.id)
        return f"{dotted(node.value)}.{node.attr}" if isinstance(node, ast.Attribute) else ""

    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.asname or alias.name.split(".")[0]: alias.name if alias.asname else alias.name.split(".")[0]
                      for alias in node.names}  # fmt: skip
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
    roots = {name.split(".")[0] for name in names.values()}
    for node in ast.walk(tree):
        said: list[str] = []
        if isinstance(node, ast.Import):
            said = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            said = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Attribute):
            said = [dotted(node)] if dotted(node).split(".")[0] in roots else []
            if node.attr in METHODS_BANNED:
                found.append(f"{node.lineno}: .{node.attr}")
        elif isinstance(node, ast.Name) and node.id in BUILTINS_BANNED:
            found.append(f"{node.lineno}: {node.id}")
        elif isinstance(node, ast.Call):
            found += [f"{node.lineno}: {word.arg}" for word in node.keywords if word.arg in KEYWORDS_BANNED
                      and not (isinstance(word.value, ast.Constant) and KEYWORDS_BANNED[word.arg] is not None
                               and word.value.value is KEYWORDS_BANNED[word.arg])]  # fmt: skip
            if dotted(node.func) in ("importlib.import_module", "importlib.__import__") and not ours(node.args[:1]):
                found.append(f"{node.lineno}: {DYNAMIC}")
        for full in said:
            if full.split(".")[0] in MODULES_BANNED or any(f"{full}.".startswith(f"{call}.") for call in CALLS_BANNED):
                found.append(f"{node.lineno}: {full}")  # type: ignore[attr-defined]
    return found


def ours(arguments: list[ast.expr]) -> bool:
    """Whether a module's name is a text that begins with "noren."."""
    for node in arguments:
        first = node.values[0] if isinstance(node, ast.JoinedStr) else node
        return isinstance(first, ast.Constant) and str(first.value).startswith("noren.")
    return False


BAD = [
    "import pickle", "import os, pickle as p", "from pickle import loads", "import torch; torch.load(x)",
    "import torch as t; t.save(x, y)", "from torch import load", "from torch import load as innocent",
    "import torch; f = torch.load", "import torch.jit; torch.jit.load(x)", "import numpy as np; np.load(x)",
    "import numpy as np; np.load(x, allow_pickle=True)", "f(allow_pickle=flag)", "import yaml; yaml.load(x)",
    "from yaml import unsafe_load", "eval(x)", "exec(x)", "[*map(eval, x)]", "compile(x, '', 'exec')", "__import__(x)",
    "import marshal", "import shelve", "import dill", "import cloudpickle", "import joblib", "frame.read_pickle(x)",
    "load(x, trust_remote_code=True)", "load(x, trust_remote_code=flag)", "load(x, use_safetensors=False)",
    "load(x, weights_only=True)", "from importlib import import_module; import_module(x)",
    "import importlib; importlib.import_module('pickle')", "import multiprocessing",
    "def f():\n    from pickle import loads\n",
]  # fmt: skip
GOOD = [
    "import re; re.compile('x')", "model.eval()", "import yaml; yaml.safe_load(x)", "load(x, trust_remote_code=False)",
    "from safetensors.torch import load, save; load(x)", "import json; json.loads(x)", "f(allow_pickle=False)",
    "from importlib import import_module; import_module(f'noren.cli.{name}')",
]  # fmt: skip


def test_T22_the_ban_finds_each_way() -> None:
    assert [text for text in BAD if not offences(text)] == []
    assert {text: offences(text) for text in GOOD if offences(text)} == {}


DYNAMIC = "import_module of a name that is not ours"
ALLOWED: dict[str, set[str]] = {
    "__init__.py": {DYNAMIC},  # public names, from a literal table
    "cli/main.py": {DYNAMIC},  # commands, from a literal list
}
"""File -> what it may say all the same, and why."""


def test_T22_the_source_says_nothing_of_the_kind() -> None:
    files = sorted(SOURCE.rglob("*.py"))
    assert len(files) > 60
    found = {str(path.relative_to(SOURCE)): offences(path.read_text(encoding="utf-8")) for path in files}
    said = {name: {word.split(": ")[1] for word in words} - ALLOWED.get(name, set()) for name, words in found.items()}
    said = {name: words for name, words in said.items() if words}
    print(f"[T22] {len(files)} files read, {sum(map(len, said.values()))} offences")
    assert not said
