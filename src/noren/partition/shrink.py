"""A tiny random model of an architecture, made from the model's own config, so that its own flags are kept.

Widths shrink, ratios that the code depends on (heads to key-value heads, rotary share of a head) stay.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from noren.errors import UnfitModel
from noren.partition.blocks import find_blocks, is_causal
from noren.partition.stage import model_class

VOCABULARY = 97
_WIDTHS = {
    "intermediate_size": 64,
    "ffn_dim": 64,
    "n_inner": 64,
    "ffn_hidden_size": 64,
    "hidden_dim": 64,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
    "shared_intermediate_size": 32,
    "kv_lora_rank": 16,
    "q_lora_rank": 16,
    "embedding_size": 32,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "state_size": 8,
    "mamba_d_state": 8,
}
_COUNTS = {
    "num_local_experts": 4,
    "num_experts": 4,
    "n_routed_experts": 4,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
}
_GROUPS = ("num_key_value_heads", "num_kv_heads")  # what families call the number of key-value heads
_LENGTHS = {"sliding_window": 8, "attention_chunk_size": 8}
HEAD_DIM = 16


def shrink(config: PretrainedConfig, layers: int, task: str = "causal-lm") -> PretrainedConfig:
    """Return a config of the same flags, `layers` layers deep and narrow enough to run in milliseconds."""
    if not config.num_hidden_layers:
        config = _with_layers(config)
    small = copy.deepcopy(config)
    depth = int(config.num_hidden_layers)
    for key, value in config.to_dict().items():
        if isinstance(value, list) and len(value) == depth and key != "architectures" and depth:
            setattr(small, key, _spread(value, layers))
    small.num_hidden_layers = layers
    heads = int(getattr(config, "num_attention_heads", 4) or 4)
    shared = next((key for key in _GROUPS if isinstance(getattr(config, key, None), int)), "")
    groups = int(getattr(config, shared, 0)) if shared else 0
    ratio = max(heads // groups, 1) if groups else 1
    few = 4 if ratio in (1, 2, 4) else ratio
    _put(small, "num_attention_heads", few)
    if shared:
        _put(small, shared, few if ratio == 1 else max(few // ratio, 1))
    rotary = getattr(config, "rotary_dim", None)
    if isinstance(rotary, int):
        small.rotary_dim = HEAD_DIM // 2
    for key in ("head_dim", "v_head_dim", "qk_nope_head_dim", "qk_head_dim"):
        if isinstance(getattr(small, key, None), int):
            _put(small, key, HEAD_DIM)
    if isinstance(getattr(small, "qk_rope_head_dim", None), int):
        _put(small, "qk_rope_head_dim", 8)
    if isinstance(getattr(small, "qk_nope_head_dim", None), int):
        _put(small, "qk_head_dim", HEAD_DIM + 8)
        _put(small, "head_dim", 8)  # of the rotary part, in these models
    width = few * HEAD_DIM
    for key in ("hidden_size", "word_embed_proj_dim", "pooler_hidden_size", "d_model", "n_embd"):
        if isinstance(getattr(small, key, None), int):
            _put(small, key, width)
    for table in (_WIDTHS, _COUNTS, _LENGTHS):
        for key, value in table.items():
            if isinstance(present := getattr(small, key, None), int) and not isinstance(present, bool):
                _put(small, key, min(present, value))
    for key in ("num_experts_per_tok", "moe_topk", "top_k_experts"):
        if isinstance(present := getattr(small, key, None), int):
            _put(small, key, min(present, 2))
    for key, value in (("n_group", 2), ("topk_group", 1)):
        if isinstance(getattr(small, key, None), int):
            _put(small, key, value)
    small.vocab_size = VOCABULARY
    if isinstance(getattr(small, "vocab_size_per_layer_input", None), int):
        small.vocab_size_per_layer_input = VOCABULARY
    small.dtype = torch.float32  # some classes build their base model in the config's own
    for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
        token = getattr(small, key, None)
        if isinstance(token, list) or (isinstance(token, int) and token >= VOCABULARY):
            setattr(small, key, 1 if key != "pad_token_id" else 0)
    if task != "causal-lm":
        small.pad_token_id = 0
    if isinstance(limit := getattr(small, "max_position_embeddings", None), int):
        _put(small, "max_position_embeddings", min(limit, 128))
    return small


def _with_layers(config: PretrainedConfig) -> PretrainedConfig:
    """The config of a client that holds no layers, with as many and of such kinds as its class has by default."""
    depth = type(config)().num_hidden_layers
    kept = {k: v for k, v in config.to_dict().items() if v != [] and k != "attention_types"}
    named: str = (config.attribute_map or {}).get("num_hidden_layers", "num_hidden_layers")
    made: PretrainedConfig = type(config).from_dict(kept | {named: depth})
    return made


def _spread(values: list[Any], count: int) -> list[Any]:
    """The first `count` of a per-layer list, repeated if short; a kind that only occurs later takes the last place."""
    out = [values[i % len(values)] for i in range(count)]
    lost = [v for v in values if v not in out]
    if lost and len(out) > 1:
        out[-1] = lost[0]
    return out


def _put(config: PretrainedConfig, key: str, value: Any) -> None:
    try:
        setattr(config, key, value)
    except (AttributeError, NotImplementedError):
        return  # a derived property, which follows from what was set


def tiny_model(config: PretrainedConfig, task: str, layers: int, seed: int = 0) -> PreTrainedModel:
    """Build a tiny model of `config`'s architecture with perturbed random weights (norms and biases too).

    Raises UnfitModel if transformers cannot build it.
    """
    cls = model_class(config, task)
    torch.manual_seed(seed)
    try:
        model = cls(shrink(config, layers, task)).eval()
    except Exception as error:  # whatever a model class raises on a config it cannot hold
        raise UnfitModel(f"{cls.__name__}: a small model of this config cannot be built: {error}") from error
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.is_floating_point():
                parameter.add_(torch.randn_like(parameter) * 0.05)
    return model


def block_tuple_size(model: PreTrainedModel) -> int:
    """Return how many values this architecture's blocks return in a tuple; 0 if they return a tensor."""
    config = copy.deepcopy(model.config)
    probe = tiny_model(config, "base", layers=2)
    seen: list[Any] = []

    def note(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        seen.append(output)

    _, blocks = find_blocks(probe)
    handle = blocks[0].register_forward_hook(note)
    ids = torch.ones(1, 2, dtype=torch.long)
    try:
        with torch.no_grad():
            probe(input_ids=ids, **({"use_cache": False} if is_causal(probe) else {}))
    finally:
        handle.remove()
    output = seen[0]
    return 0 if isinstance(output, Tensor) else len(output)
