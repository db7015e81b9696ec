"""Stage: the layers of one remote party as a module, and one step of them.

A stage is a Hugging Face model of the party's own small checkpoint, called with the arguments that the whole model
would pass to these layers. What arrives is packed (real tokens only); the stage lays it out as a padded batch again,
which gives the same numbers as the whole model's batch because pads are masked there.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PretrainedConfig, PreTrainedModel
from transformers.models.auto import modeling_auto as auto

from noren.errors import ModelError, PlanError, ProtocolError, UnfitModel
from noren.partition.blocks import (
    BLOCK_KEY,
    family,
    find_blocks,
    find_head,
    is_causal,
    is_tail_key,
    neutralise,
    tail_module,
)
from noren.partition.checkpoint import FolderCheckpoint
from noren.partition.plan import Plan
from noren.partition.quantise import PLAIN, quantise
from noren.partition.slices import load_config, parse_config, read_manifest, read_slice
from noren.partition.sources import open_checkpoint

TASKS = ("causal-lm", "sequence-classification", "question-answering")
_CLASSES = {
    "causal-lm": auto.MODEL_FOR_CAUSAL_LM_MAPPING,
    "sequence-classification": auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    "question-answering": auto.MODEL_FOR_QUESTION_ANSWERING_MAPPING,
    "base": auto.MODEL_MAPPING,
}


@dataclass(frozen=True, kw_only=True)
class Slice:
    """One party's part of a model, read and ready to be built."""

    plan: Plan
    party: str
    task: str
    whole: PretrainedConfig  # the whole model's
    config: PretrainedConfig  # the slice's
    tensors: dict[str, Tensor]
    fingerprint: str
    location: str
    bytes_read: int
    generation: str | None  # generation_config.json, for the party that generates

    def let_go(self) -> None:
        """Keep names and shapes of the tensors alone, once they are built in: files of another dtype leave memory."""
        self.tensors.update({name: tensor.to("meta") for name, tensor in self.tensors.items()})


def open_slice(model: str | Path, plan: Any, party: str | None, task: str) -> Slice:
    """Read one party's part of a model: from a whole checkpoint, or from a folder that `noren slice` wrote.

    `party` None means the client. Raises ModelError, UnfitModel or PlanError.
    """
    if task not in TASKS:
        raise UnfitModel(f"task {task!r} is not one of {', '.join(TASKS)}")
    checkpoint = open_checkpoint(model)
    folder = Path(checkpoint.location) if isinstance(checkpoint, FolderCheckpoint) else None
    manifest = read_manifest(folder) if folder else None
    name = manifest.model if manifest else checkpoint.location
    if manifest is None:
        whole = load_config(checkpoint)
        cut = Plan.parse(plan, whole.num_hidden_layers)
        party = party or cut.client
        cut.kept(party)
        config, tensors = read_slice(checkpoint, cut, party, task)
        mark = checkpoint.fingerprint
    else:
        whole = parse_config(manifest.config, str(model))
        cut = Plan.parse(plan, manifest.layers)
        party = party or cut.client
        if (manifest.party, manifest.plan) != (party, cut.lines()):
            raise PlanError(
                f"{model} is the slice of {manifest.party!r} under the plan '{', '.join(manifest.plan)}', but "
                f"{party!r} under '{cut}' was asked for; cut the model again with `noren slice`"
            )
        config, tensors, mark = (
            load_config(checkpoint),
            checkpoint.read(checkpoint.files),
            manifest.fingerprint,
        )
    check_kinds(config, cut, party)
    return Slice(
        plan=cut, party=party, task=task, whole=whole, config=config, tensors=tensors, fingerprint=mark,
        location=name, bytes_read=checkpoint.bytes_read,
        generation=checkpoint.text("generation_config.json") if cut.holds_embedding(party) else None,
    )  # fmt: skip


def check_kinds(config: PretrainedConfig, plan: Plan, party: str) -> None:
    """Every stage of a hybrid model needs an attention layer: transformers takes the cache's length from it."""
    kinds = set(getattr(config, "layer_types", None) or [])
    if "linear_attention" in kinds and not kinds & {"full_attention", "sliding_attention"}:
        raise PlanError(
            f"plan: {party!r} holds layers {plan.kept(party)} of '{plan}', none of which has full attention; in this "
            "hybrid model each party needs at least one that has"
        )


def model_class(config: PretrainedConfig, task: str) -> type[PreTrainedModel]:
    """Return transformers' class for an architecture and a task ("base" for no head). Raises UnfitModel."""
    mapping = _CLASSES[task]
    if type(config) not in mapping:
        raise UnfitModel(f"transformers has no {task} model of type {config.model_type!r}")
    cls = mapping[type(config)]
    chosen: type[PreTrainedModel] = cls[0] if isinstance(cls, tuple) else cls
    return chosen


def build_model(
    config: PretrainedConfig, task: str, tensors: dict[str, Tensor], dtype: torch.dtype, may_miss: Any
) -> PreTrainedModel:
    """Load `tensors` into transformers' own model of `config`.

    Raises ModelError if a parameter is missing for which `may_miss(name)` is false, or a shape does not fit.
    """
    cls = model_class(config, task)
    model, info = cls.from_pretrained(
        None,
        config=config,
        state_dict=tensors,
        dtype=dtype,
        output_loading_info=True,
        ignore_mismatched_sizes=False,
    )
    if missing := sorted(name for name in info["missing_keys"] if not may_miss(name)):
        raise ModelError(
            f"{cls.__name__}: {len(missing)} tensors are missing, e.g. {missing[0]!r}; the checkpoint is incomplete, "
            "or this architecture names its layers in a way that is not known here"
        )
    stray = sorted(name for name in info["unexpected_keys"] if not is_tail_key(name))
    if stray:
        raise ModelError(f"{cls.__name__}: {len(stray)} tensors have no place in the model, e.g. {stray[0]!r}")
    return model


def unroll_shared(model: PreTrainedModel) -> None:
    """Give a model whose blocks share weights (ALBERT) one entry a layer, all of them the same module."""
    if family(model.config.model_type).shared_blocks:
        blocks = find_blocks(model.base_model)[1]
        if len(blocks) != 1:
            raise UnfitModel(f"{model.config.model_type}: {len(blocks)} groups of shared layers; only one can be cut")
        layers = int(model.config.num_hidden_layers)
        blocks.extend([blocks[0]] * (layers - 1))
        model.config.num_hidden_groups = layers


def new_heads(part: Slice, model: PreTrainedModel) -> set[str]:
    """Return the names of the modules after the blocks that must be trained whole: task heads, and new poolers."""
    if part.task == "causal-lm":
        return set()
    known = {name.split(".", 1)[-1] for name in part.tensors} | set(part.tensors)
    out = {find_head(model, part.task)}
    for name, _ in model.named_parameters():
        if is_tail_key(name) and not BLOCK_KEY.match(name) and not {name, name.split(".", 1)[-1]} & known:
            out.add(tail_module(name))
    return out


MOST_PADDING = 64
"""How many times larger a padded batch may be than its real tokens."""


@dataclass
class Frame:
    """One packed batch and its place in a session: hidden [N, d], lengths of B rows, pads left or right."""

    hidden: Tensor
    lengths: list[int]
    padding: str
    positions: str = "row"
    keep: int = 0
    labels: Tensor | None = None  # [N], if the loss is made here
    real: Tensor = field(init=False)  # [B, T], True at real tokens

    def __post_init__(self) -> None:
        if not self.lengths or min(self.lengths) < 0 or sum(self.lengths) != len(self.hidden) or not len(self.hidden):
            raise ProtocolError(
                f"lengths sum to {sum(self.lengths)} over {len(self.lengths)} sequences, the tensor has "
                f"{len(self.hidden)} tokens"
            )
        if len(self.lengths) * max(self.lengths) > MOST_PADDING * len(self.hidden):
            raise ProtocolError(
                f"{len(self.lengths)} sequences of up to {max(self.lengths)} tokens, of which {len(self.hidden)} are "
                f"real: a batch may be at most {MOST_PADDING} times its real tokens; sort sequences by length"
            )
        lengths = torch.tensor(self.lengths, device=self.hidden.device)
        columns = torch.arange(int(lengths.max()), device=self.hidden.device)
        ends = columns < lengths[:, None]
        self.real = ends.flip(1) if self.padding == "left" else ends

    def padded(self) -> Tensor:
        """The batch with pads put back: [B, T, d], zero at pads."""
        return unpack(self.hidden, self.real)

    def packed(self, out: Tensor) -> Tensor:
        """Real tokens among the last `keep` columns of out [B, T, d]: [N', d]."""
        return pack(out[:, -self.keep :], self.real[:, -self.keep :])


def pack(padded: Tensor, real: Tensor) -> Tensor:
    """Return the real tokens of padded [B, T, d], row after row: [N, d]."""
    return padded.reshape(-1, padded.shape[-1]) if bool(real.all()) else padded[real]


def unpack(packed: Tensor, real: Tensor) -> Tensor:
    """Return packed [N, d] laid out as [B, T, d], zero where `real` [B, T] is False."""
    if bool(real.all()):
        return packed.reshape(*real.shape, packed.shape[-1])
    out = packed.new_zeros(*real.shape, packed.shape[-1])
    return out.index_put(real.nonzero(as_tuple=True), packed)


class Stage(nn.Module):
    """The layers `span` of a model, held by a remote party. Build with `Stage.load`."""

    def __init__(self, part: Slice, dtype: torch.dtype, base: str = PLAIN) -> None:
        super().__init__()
        self.dtype, self.base = dtype, base  # of the base weights, and of what crosses; how those weights are held
        self.in_use: tuple[str | None, bool] | None = None  # the adapter that acts, and whether dropouts are on
        self.plan, self.party, self.task, self.fingerprint = (
            part.plan,
            part.party,
            part.task,
            part.fingerprint,
        )
        self.layers = part.plan.kept(part.party)
        head, row = part.plan.holds_head(part.party), family(part.config.model_type)
        loaded = build_model(
            part.config,
            part.task if head else "base",
            part.tensors,
            dtype,
            may_miss=lambda name: not BLOCK_KEY.match(name) and not (head and is_tail_key(name)),
        )
        quantise(loaded, base)
        unroll_shared(loaded)
        self.causal = is_causal(loaded)
        if isinstance(loaded.get_input_embeddings(), nn.Embedding) and not (head and loaded.config.tie_word_embeddings):
            loaded.set_input_embeddings(nn.Embedding(1, int(loaded.config.hidden_size)))  # never called
        neutralise(loaded, embedding=False, head=head, row=row, first=self.layers[0] == 0)
        self.model = loaded
        self.head = find_head(loaded, part.task) if head else ""
        self.new_heads = new_heads(part, loaded) if head else set()
        self._takes = set(inspect.signature(loaded.forward).parameters)
        self._base_name = loaded.base_model_prefix
        self.eval().requires_grad_(False)

    @classmethod
    def load(
        cls, model: str | Path, plan: Any, party: str, task: str, dtype: torch.dtype = torch.float32, base: str = PLAIN
    ) -> Stage:
        """Read and build the stage of `party`. Raises ModelError, UnfitModel, PlanError or ConfigError."""
        return cls(open_slice(model, plan, party, task), dtype, base)

    @property
    def config(self) -> PretrainedConfig:
        """The config of the stage's own small model."""
        return self.model.config

    @property
    def hidden_size(self) -> int:
        """Size of the hidden states that arrive."""
        return int(self.config.hidden_size)

    def new_cache(self) -> DynamicCache:
        """An empty KV cache for these layers, which can be rolled back."""
        cache = DynamicCache(config=self.config)
        cache.activate_past_recording()
        return cache

    def forward(
        self, padded: Tensor, mask: Tensor, cache: DynamicCache | None = None, positions: str = "row", keep: int = 0
    ) -> Tensor:
        """Run the layers on padded [B, T, d], with mask [B, S + T] over what the cache holds (S) and the batch.

        `positions`: do they count from a row's first real token ("row") or from the first column ("column")?
        `keep`: a language-model head need only be computed for so many last columns (0: for all).
        Returns [B, T, d], or the head's raw output if this stage holds the head ([B, T, V] or [B, K]).
        """
        columns = padded.shape[1]
        arguments: dict[str, Any] = {
            "inputs_embeds": padded,
            "attention_mask": None if bool(mask.all()) else mask.long(),
        }
        if self.causal:
            arguments |= {"use_cache": cache is not None, "past_key_values": cache}
            if "position_ids" in self._takes:
                counted = mask if positions == "row" else torch.ones_like(mask)
                arguments["position_ids"] = (counted.long().cumsum(-1) - 1).clamp(min=0)[:, -columns:]
        if self.head and "logits_to_keep" in self._takes:
            arguments["logits_to_keep"] = keep
        if not self.head:
            hidden: Tensor = self.model(**arguments).last_hidden_state
            return hidden
        seen: list[Tensor] = []
        hook = self.model.get_submodule(self.head).register_forward_hook(
            lambda module, args, output: seen.append(output)
        )
        try:
            self.model(**arguments)
        finally:
            hook.remove()
        return seen[-1]

    def whole_name(self, name: str) -> str:
        """Translate a parameter name of `self.model` to the whole model's name."""
        if not self.head:
            name = f"{self._base_name}.{name}" if self._base_name else name
        match = BLOCK_KEY.match(name)
        return name if match is None else f"{match[1]}{self.layers[int(match[2])]}{match[3]}"
