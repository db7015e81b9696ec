"""What a cut costs, before it is made: memory at each party, bytes and round trips on each line.

Everything is worked out from the model's config and the headers of its shards; no weights are read. Letters: d hidden
size, e bytes of an element of what crosses, N tokens of a training step, V entries of the vocabulary.
"""

from __future__ import annotations

import inspect
import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from transformers import PretrainedConfig

from noren.errors import ConfigError, ModelError
from noren.partition.blocks import family
from noren.partition.checkpoint import Checkpoint, FolderCheckpoint, TensorInfo
from noren.partition.plan import Plan
from noren.partition.slices import is_tied, load_config, owned_keys, read_manifest
from noren.partition.stage import model_class

ELEMENT_BYTES = {"float32": 4, "bfloat16": 2}
RANK = 8
"""r of the adapters that are counted, unless another is asked for."""

TOKEN_ROUND_TRIPS, STEP_ROUND_TRIPS = 1, 2
"""A generated token is one request and its answer; a training step one forward and one backward."""


@dataclass(frozen=True, kw_only=True)
class PartyCost:
    """What one party holds.

    Attributes:
        holds: in words, e.g. ("embedding", "layers 0:2", "layers 6:8", "norm and head").
        parameters: elements of its tensors (a shared expert or a tied embedding that two parties hold counts at both).
        file_bytes: bytes of those tensors in the checkpoint's files.
        memory_bytes: bytes of those tensors in the run's dtype.
        cache_bytes_per_token: keys and values of its layers, for one token of one sequence; 0 for an encoder.
        adapter_parameters: elements of LoRA's A and B at its layers; None if no targets are known for the model.
    """

    party: str
    layers: tuple[int, ...]
    holds: tuple[str, ...]
    parameters: int
    file_bytes: int
    memory_bytes: int
    cache_bytes_per_token: int
    adapter_parameters: int | None


@dataclass(frozen=True, kw_only=True)
class Crossing:
    """What crosses the line between two parties, both ways, without the frames' headers.

    Attributes:
        token_bytes: for one generated token of one sequence: d e up and d e down, so 2 d e; head-tail: (d + V) e.
        step_bytes: for one training step of N tokens: hidden states up and down, gradients up and down, so 4 N d e;
            head-tail: 2 N (d + V) e.
    """

    sender: str
    receiver: str
    token_bytes: int
    step_bytes: int


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What a cut costs, party by party and line by line."""

    model: str
    architecture: str
    task: str
    dtype: str
    plan: Plan
    hidden_size: int
    batch: int
    length: int
    parameters: int  # of the whole model
    parties: tuple[PartyCost, ...]
    crossings: tuple[Crossing, ...]
    token_round_trips: int = TOKEN_ROUND_TRIPS
    step_round_trips: int = STEP_ROUND_TRIPS


def estimate(
    checkpoint: Checkpoint,
    plan: Any,
    *,
    task: str = "causal-lm",
    dtype: str = "float32",
    batch: int = 8,
    length: int = 128,
    targets: Callable[[str], list[str]] | None = None,
    rank: int = RANK,
) -> Cost:
    """Work out what a cut costs, for training steps of `batch` sequences of `length` tokens.

    `targets` gives the names of the modules that an adapter of `rank` adapts, for a model type, or raises ConfigError.

    Opens only config.json and the headers of the shards. Raises PlanError, ModelError, UnfitModel, or ConfigError.
    """
    if dtype not in ELEMENT_BYTES:
        raise ConfigError(f"dtype {dtype!r} is not one of {', '.join(ELEMENT_BYTES)}")
    if batch < 1 or length < 1:
        raise ConfigError(f"a step of {batch} sequences of {length} tokens has no tokens; both must be at least 1")
    if isinstance(checkpoint, FolderCheckpoint) and (manifest := read_manifest(checkpoint.folder)) is not None:
        raise ModelError(
            f"{checkpoint.location} is one party's slice ({manifest.party!r} of '{', '.join(manifest.plan)}'); "
            "name the whole model"
        )
    config = load_config(checkpoint)
    cut = Plan.parse(plan, int(config.num_hidden_layers))
    infos = checkpoint.infos(checkpoint.files)
    keys = list(infos)
    tied = task == "causal-lm" and is_tied(config, keys)
    cache = cache_bytes_per_layer(config, ELEMENT_BYTES[dtype])
    names = _names(targets, config.model_type)
    parties = []
    for party in cut.parties:
        owned = owned_keys(keys, cut, party, tied=tied, model_type=config.model_type)
        mine = {key: infos[key] for key in owned}
        count = sum(map(_elements, mine.values()))
        parties.append(
            PartyCost(
                party=party,
                layers=tuple(cut.kept(party)),
                holds=holds(cut, party),
                parameters=count,
                file_bytes=sum(info.nbytes for info in mine.values()),
                memory_bytes=count * ELEMENT_BYTES[dtype],
                cache_bytes_per_token=sum(cache[layer] for layer in cut.kept(party)),
                adapter_parameters=None if names is None else lora_parameters(mine, names, rank),
            )
        )
    return Cost(
        model=checkpoint.location, architecture=config.model_type, task=task, dtype=dtype, plan=cut,
        hidden_size=int(config.hidden_size), batch=batch, length=length,
        parameters=sum(map(_elements, infos.values())), parties=tuple(parties),
        crossings=_crossings(cut, config, task, ELEMENT_BYTES[dtype], batch, length),
    )  # fmt: skip


def cache_bytes_per_layer(config: PretrainedConfig, element: int) -> list[int]:
    """Return, a layer, the bytes that one token of one sequence adds to its KV cache.

    Keys and values of every key-value head: 2 h_kv d_head e. With latent attention, which caches what it expands:
    h (d_nope + d_rope + d_value) e. 0 for linear attention and the like, whose state does not grow, and for encoders.
    """
    layers = int(config.num_hidden_layers)
    decoder = "past_key_values" in inspect.signature(model_class(config, "base").forward).parameters
    if not decoder or not getattr(config, "is_decoder", True):
        return [0] * layers
    heads = int(config.num_attention_heads)
    width = int(getattr(config, "head_dim", None) or config.hidden_size // heads)
    groups = 1 if getattr(config, "multi_query", False) else getattr(config, "num_key_value_heads", None) or heads
    grown = 2 * int(groups) * width * element
    if isinstance(nope := getattr(config, "qk_nope_head_dim", None), int):
        grown = heads * (nope + int(config.qk_rope_head_dim) + int(config.v_head_dim)) * element
    kinds = getattr(config, "layer_types", None) or ["full_attention"] * layers
    return [grown if "attention" in kind and "linear" not in kind else 0 for kind in kinds]


def lora_parameters(infos: dict[str, TensorInfo], targets: list[str], rank: int) -> int:
    """Return how many parameters LoRA of rank r adds to some matrices [out, in]: the sum of r (in + out)."""
    total = 0
    for name, info in infos.items():
        module, _, kind = name.rpartition(".")
        if kind == "weight" and len(info.shape) == 2 and any(f".{module}".endswith(f".{t}") for t in targets):
            total += rank * sum(info.shape)
    return total


def _names(targets: Callable[[str], list[str]] | None, model_type: str) -> list[str] | None:
    if targets is None or family(model_type).shared_blocks:
        return None
    try:
        return targets(model_type)
    except ConfigError:
        return None


def _elements(info: TensorInfo) -> int:
    return math.prod(info.shape)


def holds(plan: Plan, party: str) -> tuple[str, ...]:
    """Return in words what a party holds, e.g. ("embedding", "layers 0:2", "layers 6:8", "norm and head")."""
    spans = [f"layers {span.start}:{span.end}" for span in plan.spans if span.party == party and len(span)]
    before = ["embedding"] if plan.holds_embedding(party) else []
    return (*before, *spans, *(["norm and head"] if plan.holds_head(party) else []))


def _crossings(
    plan: Plan, config: PretrainedConfig, task: str, element: int, batch: int, length: int
) -> tuple[Crossing, ...]:
    hidden, tokens = int(config.hidden_size), batch * length
    back_token, back_step = hidden, tokens * hidden  # elements of an answer: to a token, to a step
    if not plan.u_shaped:
        back_token = {"causal-lm": int(config.vocab_size), "question-answering": 2}.get(task, int(config.num_labels))
        back_step = back_token * (batch if task == "sequence-classification" else tokens)
    chain = plan.parties
    return tuple(
        Crossing(
            sender=sender,
            receiver=receiver,
            token_bytes=(hidden + back_token) * element,
            step_bytes=2 * (tokens * hidden + back_step) * element,
        )
        for sender, receiver in itertools.pairwise(chain)
    )
