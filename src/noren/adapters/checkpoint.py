"""The folder in which adapters leave and come back: one standard PEFT folder, for the whole model.

`PeftModel.from_pretrained(whole_model, folder)` loads it without Noren. Tensors are named as in the whole model; the
config names every adapted module in full where not all of the model's layers are adapted, so that PEFT adapts the same.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Collection, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from noren.adapters.lora import Lora
from noren.errors import ModelError

PREFIX = "base_model.model."
TENSORS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
TASK_TYPES = {
    "causal-lm": "CAUSAL_LM",
    "sequence-classification": "SEQ_CLS",
    "question-answering": "QUESTION_ANS",
}


def save_folder(
    folder: Path, state: Mapping[str, Tensor], lora: Lora, *, task: str, base: str, heads: Collection[str] = ()
) -> None:
    """Write a PEFT folder, which appears whole or not at all; an older one of the same place is replaced.

    `state`: tensors under the whole model's names, of all parties. `base`: what PEFT shall note as the base model.
    `heads`: modules of which `state` holds whole copies (a trained classifier).
    """
    from peft import LoraConfig

    modules = sorted({name.split(".lora_")[0] for name in state if ".lora_" in name})
    ranks = {name.split(".lora_")[0]: t.shape[0] for name, t in state.items() if ".lora_A" in name}
    odd = {name: rank for name, rank in ranks.items() if rank != lora.r}
    config = LoraConfig(
        r=lora.r,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=modules,
        rank_pattern=odd,
        alpha_pattern={name: lora.alpha * rank / lora.r for name, rank in odd.items()},
        modules_to_save=sorted(heads) or None,
        task_type=TASK_TYPES[task],
        base_model_name_or_path=base,
        inference_mode=True,
        bias="none",
    )
    with replacing(folder) as draft:
        config.save_pretrained(draft)
        text = json.loads((draft / CONFIG).read_text())
        text["target_modules"] = modules  # PEFT writes a set in random order
        (draft / CONFIG).write_text(json.dumps(text, indent=2, sort_keys=True) + "\n")
        tensors = {f"{PREFIX}{name}": t.contiguous().cpu() for name, t in state.items()}
        save_file(tensors, draft / TENSORS, metadata={"format": "pt"})


def load_folder(folder: Path) -> dict[str, Tensor]:
    """Return a PEFT folder's tensors under the whole model's names. Raises ModelError if it is not one."""
    path = folder / TENSORS
    if not path.is_file():
        raise ModelError(f"{folder}: no {TENSORS}; is this a PEFT folder saved as safetensors?")
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{path} cannot be read as safetensors: {error}") from error
    if strange := [name for name in tensors if not name.startswith(PREFIX)]:
        raise ModelError(f"{path}: {strange[0]!r} is not a name that PEFT writes ({PREFIX}...)")
    return {name.removeprefix(PREFIX): tensor for name, tensor in tensors.items()}


def load_settings(folder: Path) -> Lora:
    """Return the LoRA settings of a PEFT folder. Raises ModelError for another method or a broken config."""
    try:
        config = json.loads((folder / CONFIG).read_text())
        if config["peft_type"] != "LORA":
            raise ModelError(f"{folder}: a {config['peft_type']} adapter; only LoRA can be loaded across a cut")
        if config.get("use_dora") or config.get("use_rslora"):
            raise ModelError(f"{folder}: DoRA and rank-stabilised LoRA cannot be loaded across a cut")
        return Lora(r=config["r"], alpha=config["lora_alpha"], dropout=config["lora_dropout"])
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(f"{folder}/{CONFIG} cannot be read as a PEFT config: {error!r}") from error


class replacing:
    """A context manager: a draft folder that takes the place of `folder` when the block ends without an error.

    What a process that was killed in the middle has left is put right by the next one (see `settle`).
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def __enter__(self) -> Path:
        self._folder.parent.mkdir(parents=True, exist_ok=True)
        settle(self._folder)
        self._draft = Path(tempfile.mkdtemp(prefix=f".{self._folder.name}-draft-", dir=self._folder.parent))
        self._draft.chmod(0o755)
        return self._draft

    def __exit__(self, kind: type[BaseException] | None, *exc: object) -> None:
        if kind is not None:
            shutil.rmtree(self._draft, ignore_errors=True)
            return
        for path in (*self._draft.rglob("*"), self._draft):
            _sync(path)
        old = _old(self._folder)
        if self._folder.exists():
            os.replace(self._folder, old)
        os.replace(self._draft, self._folder)
        _sync(self._folder.parent)
        shutil.rmtree(old, ignore_errors=True)


def settle(folder: Path) -> None:
    """Put right what a process that was killed while it replaced `folder` has left: the earlier folder, or drafts."""
    old = _old(folder)
    if old.is_dir():
        if folder.exists():
            shutil.rmtree(old, ignore_errors=True)
        else:
            os.replace(old, folder)
    for draft in folder.parent.glob(f".{folder.name}-draft-*"):
        shutil.rmtree(draft, ignore_errors=True)


def _old(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}-old")


def _sync(path: Path) -> None:
    """Let a file, or the names in a folder, outlive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def same_values(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> bool:
    """Whether two adapter states are bit for bit the same."""
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
