"""Every architecture and head over a real socket with TLS, in three stages: loss, adapter gradients, cached decode.

fp32. Largest difference allowed: 1e-5 (TOLERANCE), relative where values exceed 1. Logits are bit for bit equal but for
mixtures of experts, whose sums run in another order (see test_architectures); losses and gradients of most are, too.
"""

from __future__ import annotations

import re
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import models
from conftest import Parties
from noren.adapters.lora import adapter_parameters
from noren.parties.client import ADAPTER
from noren.parties.fitness import TOLERANCE, compare
from noren.partition.blocks import find_blocks
from test_architectures import (
    ANSWERED,
    ANSWERING_DECODERS,
    CLASSIFIED,
    CLASSIFYING_DECODERS,
    DECODERS,
    ENCODERS,
    EXPERTS,
)  # fmt: skip

HYBRIDS = {"qwen3_next", "qwen3_5_text"}  # every 4th layer has attention, and every party needs one
PREFIX = "base_model.model."
CASES = [
    *((name, "causal-lm") for name in DECODERS),
    *((name, CLASSIFIED) for name in [*ENCODERS, *CLASSIFYING_DECODERS]),
    *((name, ANSWERED) for name in [*ENCODERS, *ANSWERING_DECODERS]),
]


def linear_names(model: nn.Module) -> list[str]:
    """The last names of the linear layers inside the blocks; of mixtures of experts, those of attention."""
    _, blocks = find_blocks(model.base_model)  # type: ignore[arg-type]
    named = [(path, m) for path, m in blocks.named_modules() if isinstance(m, nn.Linear | Conv1D)]
    experts = any("experts" in path for path, _ in blocks.named_modules())
    without = "expert|router|gate$|gate_proj|up_proj|down_proj" if experts else "router"
    return sorted({path.rpartition(".")[2] for path, _ in named if not re.search(without, path)})


def close(a: Tensor, b: Tensor) -> bool:
    return float((a - b).abs().max()) <= TOLERANCE * max(1.0, float(a.abs().max()))


@pytest.mark.filterwarnings("ignore:fan_in_fan_out")
@pytest.mark.parametrize(("name", "task"), CASES, ids=lambda value: str(value))
def test_equals_whole_over_grpc(name: str, task: str, keys: Path, tmp_path: Path) -> None:
    layers, plan = (12, ["client :4", "server 4:8", "client 8:"]) if name in HYBRIDS else (4, U_SHAPED)
    whole = models.save(tmp_path / "model", name, task, layers)
    with ExitStack() as stack:
        parties = Parties("grpc", keys, stack)
        plain = parties.client(tmp_path / "model", task=task, plan=plan)
        differences = compare(whole, plain.model, gradients=False)
        assert max(differences.values()) <= (TOLERANCE if name in EXPERTS else 0.0), differences
        if name != "albert":  # its layers share their weights: refused for training
            adapter = {"r": 2, "targets": linear_names(whole)}
            assert_same_gradients(parties, task, plan, adapter, type(whole), tmp_path)


U_SHAPED = ["client :1", "server 1:-1", "client -1:"]


def assert_same_gradients(
    parties: Parties, task: str, plan: list[str], adapter: dict[str, Any], cls: Any, folder: Path
) -> None:
    client = parties.client(folder / "model", task=task, plan=plan, adapter=adapter, name="training")
    path = client.save_adapter(folder / "adapter") / "adapter_model.safetensors"
    generator = torch.Generator().manual_seed(1)  # B begins at zero, and A would have no gradient
    save_file({k: t + 0.1 * torch.randn(t.shape, generator=generator) for k, t in load_file(path).items()}, path)
    client.load_adapter(folder / "adapter")
    base = cls.from_pretrained(folder / "model").eval()
    whole = PeftModel.from_pretrained(base, folder / "adapter", is_trainable=True).eval()
    batch = models.padded("right")
    losses = []
    for model in (whole, client.model):
        loss = models.spread(model(**batch), batch["attention_mask"])
        loss.backward()
        losses.append(loss.detach())
    assert close(*losses)
    expected = {n.removeprefix(PREFIX): p.grad for n, p in adapter_parameters(whole, "default")}
    [run] = parties.servers["server"].runs.values()
    found = {client.whole_name(n): p.grad for n, p in adapter_parameters(client.hf, ADAPTER)}
    found |= {n: p.grad for n, p in run.trainer._named()}
    assert found.keys() == expected.keys()
    reached = 0
    for key, gradient in expected.items():
        if gradient is None:  # an expert's router or a layer that this batch does not reach
            assert found[key] is None, key
            continue
        reached += bool(gradient.any())
        assert close(gradient, found[key]), (key, float((found[key] - gradient).abs().max()))
    assert reached >= len(expected) // 2
