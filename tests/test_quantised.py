"""Frozen weights in 8 or 4 bits: split equals whole, adapters learn through them, and they are smaller."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from conftest import Parties
from models import save
from noren.adapters.lora import Lora
from noren.errors import ConfigError, HandshakeRefused
from noren.partition.quantise import quantise, weight_bytes
from noren.partition.stage import Frame, Stage
from noren.training.passes import Passes
from noren.training.span_trainer import SpanTrainer

PLAN = "client :2, server 2:-2, client -2:"
IDS = torch.randint(3, 128, (3, 11), generator=torch.Generator().manual_seed(0))
NEEDS = {"int8": "torchao", "nf4": "bitsandbytes"}


@pytest.fixture(params=["int8", "nf4"])
def base(request: pytest.FixtureRequest) -> str:
    pytest.importorskip(NEEDS[request.param], reason="needs noren[quant]")
    return str(request.param)


def quantised(whole: transformers.LlamaForCausalLM, base: str) -> transformers.LlamaForCausalLM:
    """The whole model with the server's layers held as `base` says, by the same libraries."""
    blocks = whole.model.layers
    whole.model.layers = blocks[2:-2]
    quantise(whole.model, base)
    whole.model.layers = blocks
    return whole


@pytest.mark.parametrize("parties", ["local"], indirect=True)
def test_split_equals_whole(
    parties: Parties, llama_folder: Path, whole: transformers.LlamaForCausalLM, base: str
) -> None:
    """Logits within 1e-6 of the whole model quantised the same way; both further than that from the plain one."""
    plain = whole(IDS).logits
    client = parties.client(llama_folder, base=base)
    split = client.hf(IDS).logits
    same = quantised(whole, base)(IDS).logits
    assert torch.allclose(split, same, atol=1e-6, rtol=1e-6)
    assert 1e-4 < float((split - plain).norm() / plain.norm()) < 0.5


def step(stage: Stage, most: int = 1 << 30) -> tuple[list[torch.Tensor], int]:
    """Output, gradient of the input and of the adapter; and the activations kept."""
    passes = Passes(stage, most)
    trainer = SpanTrainer(passes, Lora(r=4, targets=["q_proj", "down_proj"]), "a", 0)
    generator = torch.Generator().manual_seed(1)
    for parameter in trainer.parameters:
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.1
    hidden, gradient = torch.randn(2, 24, 48, generator=generator)
    out = trainer.forward("1.0", Frame(hidden, [8, 8, 8], "left"), dropout=False)
    kept = passes.nbytes
    found = [out, trainer.backward("1.0", gradient), *trainer.gradients().values()]
    trainer.close()
    return found, kept


def test_adapters_learn_through_it(llama_folder: Path, base: str) -> None:
    """Gradients are those of the same stage with the dequantised weights, to 1e-5; memory falls, and keeps no copy."""
    plain = Stage.load(llama_folder, PLAN, "server", "causal-lm")
    held = Stage.load(llama_folder, PLAN, "server", "causal-lm", base=base)
    small, large = weight_bytes(held.model), weight_bytes(plain.model)
    assert small < {"int8": 0.35, "nf4": 0.25}[base] * large
    eye = torch.eye(128)
    for name, module in plain.model.named_modules():
        if type(module) is torch.nn.Linear:
            narrow: Any = held.model.get_submodule(name)
            module.weight.data = narrow(eye[: module.in_features, : module.in_features]).T.contiguous()
    expected, kept = step(plain)
    found, kept_here = step(held)
    again, _ = step(held, kept // 3)  # block by block
    assert len(found) > 4 and kept_here <= kept
    for one, two, three in zip(found, expected, again, strict=True):
        assert torch.allclose(one, two, atol=1e-5, rtol=1e-4)
        assert torch.equal(one, three)


@pytest.mark.parametrize("parties", ["local"], indirect=True)
def test_parties_agree_on_it(parties: Parties, llama_folder: Path, base: str) -> None:
    client = parties.client(llama_folder, base=base)
    handler = client.link
    assert client.welcome.terms.base == base and handler is not None
    stage = parties.servers["server"].stage
    stage.base = "plain"
    with pytest.raises(HandshakeRefused, match=f"base differs: 'server' has plain, the client has {base}"):
        parties.servers["server"]._check(client.hello().meta)  # type: ignore[arg-type]


@pytest.mark.parametrize("base", ["int8", "nf4"])
def test_without_the_libraries(llama_folder: Path, monkeypatch: pytest.MonkeyPatch, base: str) -> None:
    for name in ("torchao.quantization", "bitsandbytes.nn"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ConfigError, match=r"base = .* needs more libraries .*noren\[quant\]"):
        Stage.load(llama_folder, PLAN, "server", "causal-lm", base=base)


def test_nothing_to_quantise_is_refused(tmp_path: Path, base: str) -> None:
    """GPT-2 keeps its weights in a layer of its own kind."""
    save(tmp_path / "m", "gpt2")
    with pytest.raises(ConfigError, match="has no linear layers in its blocks"):
        Stage.load(tmp_path / "m", "client :1, server 1:-1, client -1:", "server", "causal-lm", base=base)
