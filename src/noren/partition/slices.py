"""A slice: the layers of one party, as an ordinary small Hugging Face checkpoint.

The tensors are renumbered from 0 and the config is cut to match, so that transformers' own `from_pretrained` reads the
folder. `noren.json` beside them says what it was cut from. A client's slice holds its first and last layers in one
folder, without a gap; the RemoteSpan is put in between when it is loaded (partition.client).
"""

from __future__ import annotations

import copy
import hashlib
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import msgspec
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import CONFIG_MAPPING, PretrainedConfig

from noren.errors import ModelError, UnfitModel
from noren.partition.blocks import BLOCK_KEY, family, is_tail_key
from noren.partition.checkpoint import Checkpoint, FolderCheckpoint, fingerprint
from noren.partition.plan import Plan

MANIFEST = "noren.json"
UNUSED_VOCABULARY = 4  # rows of a token embedding that is never called; some classes fix a padding index of 1
SIDE_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "spiece.model",
    "added_tokens.json",
    "chat_template.jinja",
    "generation_config.json",
)
"""What a client also needs: tokenizer and generation settings. Other parties get none of these."""


class Manifest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a slice was cut from (`noren.json`)."""

    party: str
    plan: list[str]
    layers: int
    fingerprint: str
    model: str
    config: dict[str, Any]  # of the whole model: an architecture is checked with all its kinds of layers


def load_config(checkpoint: Checkpoint) -> PretrainedConfig:
    """Return the model's config as transformers reads it. Raises UnfitModel or ModelError."""
    return parse_config(checkpoint.config, checkpoint.location)


def parse_config(values: dict[str, Any], where: str) -> PretrainedConfig:
    """Return the contents of a config.json as transformers' config. Raises UnfitModel or ModelError."""
    model_type = values.get("model_type")
    if not model_type:
        raise ModelError(f"{where}/config.json names no model_type")
    if model_type not in CONFIG_MAPPING:
        raise UnfitModel(
            f"{where}: transformers has no architecture {model_type!r} of its own, and code that comes "
            "with a model is not run"
        )
    try:
        config: PretrainedConfig = CONFIG_MAPPING[model_type].from_dict(dict(values))
    except Exception as error:  # each config class checks its values in its own way
        raise ModelError(f"{where}/config.json is no {model_type!r} config: {error}") from error
    if getattr(config, "is_encoder_decoder", False):
        raise UnfitModel(
            f"{where}: {model_type} is an encoder-decoder; its decoder attends to the encoder's output "
            "in every layer, which one chain of spans cannot carry. Use a decoder-only or an encoder-only model"
        )
    if not isinstance(getattr(config, "num_hidden_layers", None), int):
        raise UnfitModel(f"{where}: the config of type {model_type!r} names no num_hidden_layers")
    if reason := family(str(model_type)).refuse:
        raise UnfitModel(f"{where}: {model_type} cannot be cut exactly: {reason}")
    return config


def slice_config(
    config: PretrainedConfig, kept: list[int], *, embedding: bool, head: bool, task: str
) -> PretrainedConfig:
    """Return the config of a checkpoint that holds only the layers `kept` of the model of `config`."""
    out, layers = copy.deepcopy(config), int(config.num_hidden_layers)
    for key, value in config.to_dict().items():
        if _is_per_layer(key, value, layers):
            setattr(out, key, [value[i] for i in kept])
    for key in ("max_window_layers", "first_k_dense_replace"):  # "the first k layers are ..."
        if isinstance(first := getattr(out, key, None), int):
            setattr(out, key, sum(i < first for i in kept))
    if not embedding:
        for key in ("embedding_multiplier", "scale_emb"):  # the model scales its input, which was scaled already
            if hasattr(out, key):
                setattr(out, key, 1.0)
    out.num_hidden_layers = len(kept)
    if not embedding and not head:
        out.vocab_size, out.pad_token_id = UNUSED_VOCABULARY, None
    elif not embedding and task != "causal-lm" and out.pad_token_id is None:
        out.pad_token_id = 0  # batches of a classification head need one; padding is at the left, or masked
    return out


def _is_per_layer(key: str, value: Any, layers: int) -> bool:
    return isinstance(value, list) and len(value) == layers and key != "architectures" and not key.endswith("_token_id")


def owned_keys(keys: list[str], plan: Plan, party: str, *, tied: bool, model_type: str) -> dict[str, str]:
    """Return {tensor in the whole checkpoint: its name in the slice} for the tensors that `party` owns."""
    row, kept = family(model_type), plan.kept(party)
    position = {layer: i for i, layer in enumerate(kept)}
    embedding, head = plan.holds_embedding(party), plan.holds_head(party)
    out: dict[str, str] = {}
    for key in keys:
        if match := BLOCK_KEY.match(key):
            if row.shared_blocks:
                out[key] = key
            elif (at := position.get(int(match[2]))) is not None:
                out[key] = f"{match[1]}{at}{match[3]}"
        elif (
            any(f".{name}." in f".{key}" for name in row.everywhere)
            or (head if is_tail_key(key) else embedding)
            or (head and tied and _is_token_embedding(key))
        ):
            out[key] = key
    return out


def _is_token_embedding(key: str) -> bool:
    return any(part in key for part in ("embed_tokens", "wte", "word_embeddings", "embed_in"))


def is_tied(config: PretrainedConfig, keys: list[str]) -> bool:
    """Whether the head shares the token embedding's weights."""
    has_head = any(key.split(".")[-2:-1] in (["lm_head"], ["embed_out"]) for key in keys)
    return bool(getattr(config, "tie_word_embeddings", False)) or not has_head


def read_slice(checkpoint: Checkpoint, plan: Plan, party: str, task: str) -> tuple[PretrainedConfig, dict[str, Tensor]]:
    """Read one party's config and tensors from a whole model. Reads no other party's tensors."""
    config = load_config(checkpoint)
    if (reason := family(config.model_type).u_shaped) and not plan.u_shaped:
        raise UnfitModel(
            f"{checkpoint.location}: {config.model_type} cannot leave its head to another party: {reason}; end the "
            f"plan '{plan}' with layers of {plan.client!r}"
        )
    keys = list(checkpoint.files)
    tied = task == "causal-lm" and is_tied(config, keys)
    names = owned_keys(keys, plan, party, tied=tied, model_type=config.model_type)
    tensors = checkpoint.read(names)
    embedding, head = plan.holds_embedding(party), plan.holds_head(party)
    cut = slice_config(config, plan.kept(party), embedding=embedding, head=head, task=task)
    return cut, {names[key]: tensor for key, tensor in tensors.items()}


def write_slice(
    checkpoint: Checkpoint, plan: Plan, party: str, folder: Path, *, task: str = "causal-lm", digest: str = ""
) -> Manifest:
    """Write one party's slice to `folder`, which appears whole or not at all.

    `digest` names the whole model's weights, if the caller knows them (see `weights_digest`); it enters the
    fingerprint. Raises ModelError if the folder exists.
    """
    if folder.exists():
        raise ModelError(f"{folder} exists already; give another folder or remove it first")
    config, tensors = read_slice(checkpoint, plan, party, task)

    manifest = Manifest(
        party=party,
        plan=plan.lines(),
        layers=plan.layers,
        fingerprint=fingerprint(checkpoint.config, checkpoint.files, digest or checkpoint.revision),
        config=checkpoint.config,
        model=Path(checkpoint.location).name if isinstance(checkpoint, FolderCheckpoint) else checkpoint.location,
    )
    folder.parent.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        config.save_pretrained(draft)
        save_file(
            {k: t.contiguous() for k, t in tensors.items()},
            draft / "model.safetensors",
            metadata={"format": "pt"},
        )
        (draft / MANIFEST).write_bytes(msgspec.json.format(msgspec.json.encode(manifest), indent=2))
        if plan.holds_embedding(party):
            for name in SIDE_FILES:
                if isinstance(checkpoint, FolderCheckpoint):
                    if (checkpoint.folder / name).is_file():
                        shutil.copyfile(checkpoint.folder / name, draft / name)
                elif not name.endswith(".model") and (text := checkpoint.text(name)) is not None:  # text only
                    (draft / name).write_text(text, encoding="utf-8")
        draft.chmod(0o755)
        os.replace(draft, folder)
    except BaseException:
        shutil.rmtree(draft, ignore_errors=True)
        raise
    return manifest


def weights_digest(checkpoint: Checkpoint) -> str:
    """Return a digest of every tensor of the model. Reads them all: for whoever cuts a model, not for a party."""
    total = hashlib.blake2b(digest_size=16)
    for name in sorted(checkpoint.files):
        tensor = checkpoint.read([name])[name].contiguous()
        total.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        total.update(tensor.flatten().view(torch.uint8).numpy().data)
    return total.hexdigest()


def read_manifest(folder: Path) -> Manifest | None:
    """Return a slice folder's manifest, or None for a whole model. Raises ModelError for a broken one."""
    path = folder / MANIFEST
    if not path.is_file():
        return None
    try:
        return msgspec.json.decode(path.read_bytes(), type=Manifest)
    except msgspec.MsgspecError as error:
        raise ModelError(f"{path}: {error}; cut the model again with `noren slice`") from error
