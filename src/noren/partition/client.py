"""The client's model: the Hugging Face object of its architecture, with a RemoteSpan where the missing layers stood.

Nothing of transformers is re-implemented or subclassed: the model is built from the client's own small checkpoint, the
span is inserted into its list of blocks, and two hooks tell the span what the pass at hand is (its mask, its cache, how
many logits are wanted). `generate`, `Trainer`, `pipeline` and PEFT then work as for the whole model.
"""

from __future__ import annotations

import inspect
import json
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache, DynamicCache, GenerationConfig, PreTrainedModel

from noren.errors import ProtocolError
from noren.partition.blocks import (
    BLOCK_KEY,
    family,
    find_blocks,
    find_head,
    is_causal,
    is_tail_key,
    neutralise,
)
from noren.partition.cache import RemoteLayer
from noren.partition.plan import Plan
from noren.partition.remote import Call, RemoteSpan
from noren.partition.shrink import block_tuple_size
from noren.partition.stage import Slice, build_model, unroll_shared
from noren.types import Handler


def build_client(part: Slice, handler: Handler, dtype: torch.dtype = torch.float32, seed: int = 0) -> PreTrainedModel:
    """Build the client's model. `seed` initialises a head that the checkpoint does not have (a new classifier).

    Raises ModelError or UnfitModel. The span is `remote_span(model)`.
    """
    own_head = part.plan.holds_head(part.party)
    new_head = part.task != "causal-lm"
    torch.manual_seed(seed)
    model = build_model(
        part.config,
        part.task,
        part.tensors,
        dtype,
        may_miss=lambda name: is_tail_key(name) and (new_head or not own_head),
    )
    if part.generation and model.can_generate():
        model.generation_config = GenerationConfig.from_dict(json.loads(part.generation))
    unroll_shared(model)
    row = family(part.config.model_type)
    neutralise(model, embedding=True, head=own_head, row=row, first=len(part.plan.spans[0]) > 0)
    span = RemoteSpan(
        handler,
        answers_head=not own_head,
        tuple_size=block_tuple_size(model),
        attention_type=(getattr(model.config, "layer_types", None) or ["full_attention"])[0],
    )
    at = len(part.plan.spans[0])
    insert(model, span, at)
    if not own_head:
        _remove_head(model, part.task, span)
    _watch(model, span, at, tail=own_head and len(part.plan.spans[-1]) > 0)
    return model.eval()


def remote_span(model: nn.Module) -> RemoteSpan:
    """Return the RemoteSpan in a client's model, wrapped by PEFT or not."""
    for module in model.modules():
        if isinstance(module, RemoteSpan):
            return module
    raise TypeError(f"{type(model).__name__} holds no RemoteSpan; it was not made by noren.load")


def whole_name(plan: Plan, name: str) -> str:
    """Translate a parameter name of the client's model (the span in its blocks) to the whole model's name."""
    match = BLOCK_KEY.match(name)
    if match is None:
        return name
    at, index = len(plan.spans[0]), int(match[2])
    layer = index if index < at else plan.kept(plan.client)[index - 1]
    return f"{match[1]}{layer}{match[3]}"


def insert(model: PreTrainedModel, span: RemoteSpan, at: int) -> None:
    """Put the span into the list of blocks, and make config and layer indices agree with the longer list."""
    config = model.config
    layers = int(config.num_hidden_layers)
    for key, value in config.to_dict().items():
        if isinstance(value, list) and len(value) == layers and layers and key != "architectures":
            if not key.endswith("_token_id"):
                setattr(config, key, [*value[:at], value[max(at - 1, 0)], *value[at:]])
        elif key == "layer_types" and not layers:
            config.layer_types = ["full_attention"]
    config.num_hidden_layers = layers + 1
    if family(config.model_type).shared_blocks:
        config.num_hidden_groups = layers + 1
    _, blocks = find_blocks(model.base_model)
    if not family(config.model_type).shared_blocks:
        for block in blocks[at:]:
            for module in block.modules():
                for key in ("layer_idx", "layer_id"):
                    if isinstance(index := getattr(module, key, None), int):
                        setattr(module, key, index + 1)
    blocks.insert(at, span)


class AbsentHead(nn.Module):
    """Stands for a head that another party holds: returns what the span brought back from there."""

    def __init__(self, span: RemoteSpan) -> None:
        super().__init__()
        self._span = [span]  # not a submodule: the span is one already, among the blocks

    def forward(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return the head's raw output for the positions of `hidden` [B, T', d]."""
        output = self._span[0].head_output
        if output is None:
            raise ProtocolError("the head was asked for before the layers below it")
        return output[:, -hidden.shape[1] :] if output.dim() == 3 else output


def _remove_head(model: PreTrainedModel, task: str, span: RemoteSpan) -> None:
    head = find_head(model, task)
    for name, child in list(model.named_children()):
        if name == head:
            setattr(model, name, AbsentHead(span))
        elif child is not model.base_model and is_tail_key(name):
            setattr(model, name, nn.Identity())


def _watch(model: PreTrainedModel, span: RemoteSpan, at: int, tail: bool) -> None:
    """Before each forward pass, tell the span its mask, its cache and how many columns are wanted back.

    `tail`: layers of the client follow the span, so that all columns are wanted.
    """
    decoder = _caller_of_blocks(model)
    parameters = inspect.signature(decoder.forward)
    causal = is_causal(model)
    wanted = [0]

    def before_model(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        keep = kwargs.get("logits_to_keep", 0)
        wanted[0] = keep if isinstance(keep, int) and not tail else 0

    def before_decoder(
        module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        bound = dict(parameters.bind_partial(*args, **kwargs).arguments)
        call = bound | bound.pop("kwargs", {})
        mask = call.get("attention_mask")
        if mask is not None and (not isinstance(mask, Tensor) or mask.dim() != 2):
            raise ProtocolError(
                "a model that is cut needs a 2-D attention mask [batch, columns]; with `generate`, the default cache"
            )
        for key in ("output_hidden_states", "output_attentions", "output_router_logits"):
            if call.get(key) or getattr(model.config, key, False):
                raise ProtocolError(f"{key}: the layers that other parties hold keep theirs; leave it off")
        layer = None
        if causal:
            cache = call.get("past_key_values")
            if cache is None and _wants_cache(call, model):
                cache = call["past_key_values"] = DynamicCache(config=model.config)
            layer = _remote_layer(cache, at, span) if cache is not None else None
        span.call = Call(mask, layer, wanted[0], _positions(call.get("position_ids"), mask))
        return (), call

    model.register_forward_pre_hook(before_model, with_kwargs=True)
    decoder.register_forward_pre_hook(before_decoder, with_kwargs=True)


def _caller_of_blocks(model: PreTrainedModel) -> nn.Module:
    """Return the innermost module around the blocks that is called with token ids (OPT's decoder, BERT's model)."""
    base: nn.Module = model.base_model
    path = find_blocks(base)[0].split(".")
    around = [base.get_submodule(".".join(path[:i])) if i else base for i in range(len(path))]
    return [m for m in around if "input_ids" in inspect.signature(m.forward).parameters][-1]


def _wants_cache(call: dict[str, Any], model: PreTrainedModel) -> bool:
    if model.training and torch.is_grad_enabled():
        return False
    asked = call.get("use_cache")
    return bool(getattr(model.config, "use_cache", True) if asked is None else asked)


def _remote_layer(cache: Cache, at: int, span: RemoteSpan) -> RemoteLayer:
    """Return the span's own layer in the cache, put there if the cache is new."""
    while len(cache.layers) <= at and cache.layer_class_to_replicate is not None:
        cache.layers.append(cache.layer_class_to_replicate())
    layer = cache.layers[at]
    if isinstance(layer, RemoteLayer):
        return layer
    if getattr(layer, "is_initialized", False) and layer.keys is not None:
        raise ProtocolError("this cache was filled by another model; start with an empty one")
    own = cache.layers[at] = RemoteLayer(span.ended)
    return own


def _positions(positions: Any, mask: Tensor | None) -> str:
    """Return from where the model counts positions: a row's first real token ("row") or the first "column".

    Only lengths cross, so positions that jump within a row are refused: the remote layers could not know them.
    """
    if not isinstance(positions, Tensor) or positions.dim() != 2:
        return "row" if mask is None else "column"
    jumps = positions[:, 1:] - positions[:, :-1] != 1
    if mask is not None:
        real = mask[:, -positions.shape[1] :].bool()
        jumps = jumps & real[:, 1:] & real[:, :-1]
    if bool(jumps.any()):
        raise ProtocolError(
            "position_ids jump within a row (packed sequences?); pad the sequences of a batch instead of packing them"
        )
    if mask is None or bool(mask.all()):
        return "row"
    by_column = torch.arange(mask.shape[1], device=mask.device)[-positions.shape[1] :]
    return "column" if bool((positions == by_column).all()) else "row"
