"""Small random models by architecture, and a client connected to servers that read folders of their own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import CONFIG_MAPPING, PretrainedConfig, PreTrainedModel

from noren.parties.server import SpanServer
from noren.partition.client import build_client
from noren.partition.plan import Plan
from noren.partition.shrink import tiny_model
from noren.partition.stage import Stage, open_slice
from noren.types import PROTOCOL, Hello, Message, Terms
from noren.wire.identity import Identity
from noren.wire.local import LocalLink

DEBERTA = {"relative_attention": True, "pos_att_type": ["p2c", "c2p"]}
OWN_FLAGS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama tied": ("llama", {"tie_word_embeddings": True}),
    "llama biased": ("llama", {"attention_bias": True, "mlp_bias": True, "num_key_value_heads": 8}),
    "qwen2 windowed": ("qwen2", {"use_sliding_window": True, "sliding_window": 32, "max_window_layers": 3}),
    "granite": (
        "granite",
        {"embedding_multiplier": 3.0, "attention_multiplier": 0.2, "residual_multiplier": 0.5, "logits_scaling": 2.0},
    ),
    "falcon new": ("falcon", {"new_decoder_architecture": True, "num_kv_heads": 8}),
    "falcon alibi": ("falcon", {"alibi": True, "multi_query": False, "parallel_attn": False, "bias": True}),
    "lfm2": (
        "lfm2",
        {"layer_types": ["conv", "full_attention", "conv", "full_attention"] * 4, "num_hidden_layers": 16},
    ),
    "gpt2 scaled by layer": ("gpt2", {"scale_attn_by_inverse_layer_idx": True}),
    "qwen2_moe sparse": ("qwen2_moe", {"mlp_only_layers": [1]}),
    "deberta-v2 relative": ("deberta-v2", DEBERTA | {"position_buckets": 32, "share_att_key": True}),
    "deberta-v2 convolution": (
        "deberta-v2",
        DEBERTA | {"position_buckets": 32, "norm_rel_ebd": "layer_norm", "conv_kernel_size": 3, "conv_act": "gelu"},
    ),
    "deberta relative": ("deberta", DEBERTA | {"position_biased_input": False}),
}
"""Architectures with flags that their class does not set by default; any other name is a model type."""


def config(name: str) -> PretrainedConfig:
    """The config of an architecture at its usual size."""
    kind, flags = OWN_FLAGS.get(name, (name, {}))
    made: PretrainedConfig = CONFIG_MAPPING[kind](**flags)
    return made


def save(folder: Path, name: str, task: str = "causal-lm", layers: int = 4, shard: str = "60KB") -> PreTrainedModel:
    """Write a tiny random model of an architecture to `folder`, in many shards; returns it as read back."""
    model = tiny_model(config(name), task, layers)
    model.save_pretrained(folder, max_shard_size=shard)
    whole: PreTrainedModel = type(model).from_pretrained(folder).eval()
    return whole


def connect(folders: dict[str, Path], plan: str, task: str = "causal-lm") -> PreTrainedModel:
    """The client's model, each party having read its own folder (a whole model's or a slice's)."""
    part = open_slice(folders["client"], plan, None, task)
    following: Any = None
    handler: Any = None
    for span in reversed(part.plan.remote):
        server = SpanServer(Stage.load(folders[span.party], plan, span.party, task), following=following)
        handler = server.connect(Identity("client", "client", "noren"))
        following = _line_to(handler)
    terms = Terms(fingerprint=part.fingerprint, plan=part.plan.lines(), task=task, dtype="float32", lora="", seed=0)
    hello = Hello(protocol=PROTOCOL, run="run", terms=terms)
    link = LocalLink(handler)
    link(Message(hello))
    return build_client(part, link)


def _line_to(handler: Any) -> Any:
    return lambda greet, greeted, expect: LocalLink(handler, expect=expect)


def padded(side: str, rows: int = 3, columns: int = 11) -> dict[str, torch.Tensor]:
    """A batch of token ids with pads (id 0) on one side."""
    ids = torch.randint(3, 97, (rows, columns), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[0, columns - 3 :], mask[-1, columns - 1 :] = 0, 0
    if side == "left":
        mask = mask.flip(1)
    return {"input_ids": ids * mask, "attention_mask": mask}


def scores(output: Any) -> torch.Tensor:
    """The raw scores of a model's output: [B, T, V], [B, K] or [B, T, 2]."""
    if "start_logits" in output:
        return torch.stack([output.start_logits, output.end_logits], -1)
    logits: torch.Tensor = output.logits
    return logits


def spread(output: Any, mask: torch.Tensor) -> torch.Tensor:
    """A loss that weighs every score at a real token differently."""
    values = scores(output)
    real = values[mask.bool()] if values.dim() == 3 else values
    return (real * torch.linspace(-1, 1, real.shape[-1])).mean()


def plan_of(text: str, model: PreTrainedModel) -> Plan:
    """A plan for the layers of a whole model."""
    return Plan.parse(text, int(model.config.num_hidden_layers))
