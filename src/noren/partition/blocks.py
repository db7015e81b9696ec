"""Where a model's layers are, and what must be done to a model that holds only some of them.

One generic adapter serves every family: it finds the list of blocks, keeps the modules that a party owns and turns the
others into pass-throughs. What a family needs beyond that is a row in `FAMILIES`. Nothing here is trusted: a cut of an
architecture is compared with its whole model before its first use (parties.fitness).
"""

from __future__ import annotations

import inspect
import re
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from noren.errors import UnfitModel


@dataclass(frozen=True, kw_only=True)
class Family:
    """What one model type needs beyond the generic rules."""

    everywhere: tuple[str, ...] = ()  # children around the blocks that every party needs
    first_only: tuple[str, ...] = ()  # children around the blocks that act on the first block alone
    shared_blocks: bool = False  # one block's weights serve all layers: unrolled; no adapters can be trained
    decoder: bool = False  # always causal, though its config has an `is_decoder` that is off
    u_shaped: str = ""  # why the client must hold the head too
    refuse: str = ""  # why this family cannot be cut


_RECURRENT = "its layers pass on a recurrent state, which cannot be rolled back to an earlier token"

FAMILIES: dict[str, Family] = {
    "deberta-v2": Family(everywhere=("rel_embeddings", "LayerNorm"), first_only=("conv",)),
    "deberta": Family(everywhere=("rel_embeddings", "LayerNorm")),
    "albert": Family(shared_blocks=True),
    "gpt_neox": Family(decoder=True),
    "gpt_neox_japanese": Family(decoder=True),
    "nanochat": Family(u_shaped="one norm acts both before its first block and after its last"),
    "mamba": Family(refuse=_RECURRENT),
    "mamba2": Family(refuse=_RECURRENT),
    "rwkv": Family(refuse=_RECURRENT),
    "modernbert": Family(refuse="its first block has no attention norm and its layer kinds go by global index"),
}
"""The exceptions, by `config.model_type`."""

GENERIC = Family()
HEADS = {
    "causal-lm": ("lm_head", "embed_out", "output_projection", "cls"),
    "sequence-classification": ("score", "classifier"),
    "question-answering": ("qa_outputs",),
}
"""Names that a task's head goes by, in the whole model's class."""

BLOCK_KEY = re.compile(r"^(.*?\b(?:layers|h|layer|blocks|block|albert_layer_groups)\.)(\d+)(\..*)$")
_TAIL_KEY = re.compile(
    r"(^|\.)(lm_head|embed_out|output_projection|cls|score|classifier|pre_classifier|dense|qa_outputs|pooler|project_out"
    r"|norm|norm_f|ln|ln_f|final_layer_?norm|layer_norm|LayerNorm|embedding_norm)(\.|$)"
)
_EMBEDDING_KEY = re.compile(r"(^|\.)(embeddings|embed_tokens|wte|wpe|word_embeddings)(\.|$)")
_TAIL_CHILD = re.compile(r"^(?!.*embed).*(norm|Norm|ln_f|pooler|project_out)|^ln$|^embedding_norm$")  # LFM2's last norm
_POSITION_CHILD = {"wpe", "embed_positions", "position_embeddings", "token_type_embeddings"}


def family(model_type: str) -> Family:
    """Return the row of `FAMILIES` for a model type, or the generic one."""
    return FAMILIES.get(model_type, GENERIC)


def is_tail_key(key: str) -> bool:
    """Whether a tensor outside the blocks belongs with the last block (final norm, pooler, head)."""
    return bool(_TAIL_KEY.search(key)) and not _EMBEDDING_KEY.search(key)


def tail_module(key: str) -> str:
    """Return the name of the module after the blocks to which a tensor belongs, e.g. "classifier" or "pooler"."""
    match = _TAIL_KEY.search(key)
    if match is None:
        raise ValueError(f"{key!r} does not lie after the blocks")
    return match[2]


def find_blocks(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """Return (dotted name, list) of the model's blocks: the longest ModuleList that is not inside another.

    Raises UnfitModel if there is none.
    """
    best: tuple[str, nn.ModuleList] | None = None
    for name, module in model.named_modules():
        if not isinstance(module, nn.ModuleList) or re.search(r"\.\d+\.", f".{name}."):
            continue
        if best is None or len(module) > len(best[1]):
            best = (name, module)
    if best is None:
        raise UnfitModel(f"{type(model).__name__}: no list of blocks found, so there is nothing to cut")
    return best


def is_causal(model: nn.Module) -> bool:
    """Whether the model is a decoder with a cache (else: an encoder that sees all positions at once)."""
    base: nn.Module = model.base_model  # type: ignore[assignment]
    takes_cache = "past_key_values" in inspect.signature(base.forward).parameters
    config: Any = model.config
    decoder = family(config.model_type).decoder or getattr(config, "is_decoder", True)
    return takes_cache and bool(decoder)


def find_head(model: nn.Module, task: str) -> str:
    """Return the dotted name of the head module of the whole model's class. Raises UnfitModel if there is none."""
    for name in HEADS[task]:
        if isinstance(getattr(model, name, None), nn.Module):
            return name
    raise UnfitModel(f"{type(model).__name__}: no head named {' or '.join(HEADS[task])} found for task {task!r}")


class PassThrough(nn.Module):
    """Stands for a module that another party owns (a norm, an embedding block): returns what it is given.

    Of several arguments it returns `inputs_embeds`, else the first float tensor.
    """

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """Return the hidden states among the arguments, unchanged."""
        if isinstance(kwargs.get("inputs_embeds"), Tensor):
            return kwargs["inputs_embeds"]
        for value in (*args, *kwargs.values()):
            if isinstance(value, Tensor) and value.is_floating_point():
                return value
        raise TypeError("a module that this party does not own was called without hidden states")


class Zero(nn.Module):
    """Stands for a learned position embedding that another party has already added: contributes nothing."""

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """Return a scalar zero, which adds nothing to any shape."""
        device = next((v.device for v in (*args, *kwargs.values()) if isinstance(v, Tensor)), None)
        return torch.zeros((), device=device)


def neutralise(model: nn.Module, *, embedding: bool, head: bool, row: Family, first: bool) -> None:
    """Replace, in place, what this party does not own around the blocks of `model`.

    `embedding`: the party owns what comes before the blocks; `head`: what comes after; `first`: its first block is the
    whole model's first. Blocks, rotary tables and the token embedding itself (never called) are left alone.
    """
    base: nn.Module = model.base_model  # type: ignore[assignment]
    name, blocks = find_blocks(base)
    parent = base.get_submodule(name.rpartition(".")[0])
    for owner in {id(m): m for m in (base, parent)}.values():
        for child_name, child in list(owner.named_children()):
            if "rotary" in child_name or any(module is blocks for module in child.modules()):
                continue
            if isinstance(child, nn.ModuleList) or child_name in row.everywhere:
                continue
            if child_name in row.first_only:
                if not first:
                    setattr(owner, child_name, None)
                continue
            is_tail = bool(_TAIL_CHILD.search(child_name))
            if is_tail and not head:
                setattr(owner, child_name, PassThrough())
            elif not is_tail and not embedding:
                _neutralise_input(owner, child_name, child)


def _neutralise_input(owner: nn.Module, name: str, child: nn.Module) -> None:
    if name in _POSITION_CHILD:
        setattr(owner, name, Zero())
    elif isinstance(child, nn.Embedding):
        pass  # the token embedding: hidden states are given, so it is never called
    else:
        setattr(owner, name, PassThrough())
