"""Names that try to be paths: of runs and keys in the journal, and of tensors in an adapter's folder."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from noren.adapters.checkpoint import PREFIX, load_folder, save_folder
from noren.adapters.lora import Lora
from noren.errors import ConfigError, ModelError
from noren.wire.journal import Journal, Record

SENTINEL = "sentinel.txt"


def hostile(outside: Path) -> list[str]:
    """Names that name the sentinel, or try to, in every way that a path can be written; and plain odd ones."""
    target, up = str(outside / SENTINEL), f"{outside.name}/{SENTINEL}"
    climbing = [f"{'../' * n}{up}" for n in range(1, 8)]
    return [
        *climbing, target, f"//{target}", f"file://{target}", f"~/{SENTINEL}", f"~root/{SENTINEL}", "$HOME/x", "`id`",
        f"..\\..\\{outside.name}\\{SENTINEL}", f"C:\\{SENTINEL}", "\\\\host\\share", "CON", "nul", "a:b",
        f"%2e%2e%2f{SENTINEL}", f"..%2f{up}", f"..%c0%af{SENTINEL}", f"\u2025/{SENTINEL}",
        f"\uff0e\uff0e\uff0f{SENTINEL}",
        ".", "..", "/", "//", "", " ", "\t", "\n", "a\nb", "a\r\nb", "\x00", f"{target}\x00.txt", f"a\x00/../../{up}",
        "journal.db", "../journal.db", "journal.db-wal", "lock", "objects", "objects/..", ".part", "link", "link/x",
        "-rf", "--", "|touch x", ">x", "'; DROP TABLE entries; --", '"', "%s%n", "?uri=true&mode=memory", ":memory:",
        "e\u0301", "\u00e9", "\u202etxt.exe", "\u200b", "\ufeff", "\U0001f3ee", "暖簾",
        "x" * 255, "x" * 300, "../" * 100,
        "\U0001f3ee" * 300, "/" + "a/" * 149,
    ]  # fmt: skip


UNFIT = ["x" * 301, "\U0001f3ee" * 301, "../" * 5000, "\ud800", "a\udfff/.."]
"""Too long for a name of ours, or no text: half of a surrogate pair."""


class Outside:
    """A world around a folder, in which nothing may change."""

    def __init__(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.root, self.inside = tmp_path / "world", tmp_path / "world" / "deep" / "er" / "inside"
        self.inside.mkdir(parents=True)
        (self.root / SENTINEL).write_text("untouched")
        (self.root / "home").mkdir()
        (self.root / "deep" / "link").symlink_to(self.root / "home")
        monkeypatch.chdir(self.root / "deep")
        monkeypatch.setenv("HOME", str(self.root / "home"))
        self.before = self.tree()

    def tree(self) -> dict[str, bytes | None]:
        """Every path outside of the folder, with what it holds."""
        paths = [path for path in self.root.rglob("*") if self.inside not in path.parents]
        return {str(path): path.read_bytes() if path.is_file() else None for path in paths}

    def assert_untouched(self, what: str) -> None:
        assert self.tree() == self.before, what
        assert (self.root / SENTINEL).read_text() == "untouched", what


def test_T13_hostile_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    outside = Outside(tmp_path, monkeypatch)
    folder = outside.inside / "journal"
    names = hostile(outside.root)
    assert len(set(names)) == len(names) >= 40
    kept = {name: b"%d" % n for n, name in enumerate(names)}
    with Journal(folder) as journal:
        for name, body in kept.items():
            journal.write(name, {name: Record(b"{}", body), "plain": Record(body)})
            outside.assert_untouched(repr(name)[:80])
        for name in UNFIT:
            for ask in (journal.keys, journal.forget, lambda name: journal.read("run", name)):
                with pytest.raises(ConfigError, match="is no name") as caught:
                    ask(name)
                assert len(str(caught.value)) < 200
            with pytest.raises(ConfigError, match="is no name"):
                journal.write("run", {"plain": Record(b"{}", b"x"), name: Record(b"{}")})
            with pytest.raises(ConfigError, match="is no name"):
                journal.write("run", {}, drop=[name])
    with Journal(folder) as journal:
        assert journal.runs() == sorted(kept, key=str.encode)
        for name, body in kept.items():
            assert journal.read(name, name) == Record(b"{}", body) and journal.read(name, "plain") == Record(body)
            assert journal.keys(name) == sorted({name, "plain"}, key=str.encode)
        files = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
        odd = {path for path in files if not path.startswith("objects/")} - {"journal.db", "journal.db-wal", "lock"}
        assert not odd and len(files) == len(kept) + 3
        for path in (folder / "objects").rglob("*"):
            assert not path.is_symlink() and set(path.name) <= set("0123456789abcdef")
            assert len(path.name) == (2 if path.is_dir() else 64)
        for name in kept:
            journal.forget(name)
        assert journal.runs() == [] and journal.used == 0
    outside.assert_untouched("forgetting")
    print(f"{len(kept)} hostile names kept as data, {len(UNFIT)} refused, 0 paths")


def test_T13_hostile_tensor_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A PEFT folder whose tensors are named like paths: they are keys of a dictionary, or refused; never files."""
    outside = Outside(tmp_path, monkeypatch)
    names = [*hostile(outside.root), *(name for name in UNFIT if name.isascii())]
    for n, name in enumerate(names):
        for prefix in ("", PREFIX):
            folder = outside.inside / f"{n}{prefix}"
            folder.mkdir()
            save_file({prefix + name: torch.ones(2)}, folder / "adapter_model.safetensors")
            if prefix:
                assert set(load_folder(folder)) == {name}
            else:
                with pytest.raises(ModelError, match="is not a name that PEFT writes"):
                    load_folder(folder)
            assert os.listdir(folder) == ["adapter_model.safetensors"]
            outside.assert_untouched(repr(name)[:80])
    print(f"{len(names)} hostile tensor names: read as keys, or refused without the prefix; 0 paths")


def test_T13_hostile_module_names_are_saved_as_keys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The writer of adapter folders makes the two files of its format, whatever the modules are called."""
    outside = Outside(tmp_path, monkeypatch)
    state = {f"{name}.lora_A.weight": torch.ones(4, 8) for name in hostile(outside.root)}
    folder = outside.inside / "adapter"
    save_folder(folder, state, Lora(r=4, alpha=8), task="causal-lm", base="somewhere")
    assert load_folder(folder).keys() == state.keys()
    files = sorted(str(path.relative_to(outside.inside)) for path in outside.inside.rglob("*") if path.is_file())
    assert files == ["adapter/adapter_config.json", "adapter/adapter_model.safetensors"]
    outside.assert_untouched("saving")
    print(f"{len(state)} hostile module names saved as keys, 0 paths")
