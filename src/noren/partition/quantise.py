"""Frozen base weights in fewer bits, by libraries that PEFT's adapters work on.

Only the linear layers inside the blocks are changed: embedding, norms and head stay. A weight is dequantised where it
is multiplied, in the run's dtype, so hidden states and gradients pass as before. What is computed is another function
than the unquantised model's: the parties agree on it in their terms.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from noren.errors import ConfigError
from noren.partition.blocks import find_blocks

PLAIN = "plain"
"""Weights as they are, in the run's dtype."""


def _int8(layer: nn.Linear) -> nn.Module:
    """8 bits a weight and one scale an output row, symmetric (torchao's weight-only quantisation)."""
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    quantize_(layer, Int8WeightOnlyConfig(version=2))
    layer.__class__ = _Frozen
    return layer


class _Frozen(nn.Linear):
    """A linear layer whose weight is not trained: autograd keeps neither its input nor a dequantised weight."""

    def forward(self, input: Tensor) -> Tensor:
        """Return input [..., in] times the weight: [..., out]."""
        out: Tensor = _Product.apply(input, self.weight, self.bias)
        return out


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, input: Tensor, weight: Any, bias: Tensor | None) -> Tensor:
        ctx.weight = weight  # a parameter of the model, which is there anyway
        return nn.functional.linear(input, weight, bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        return gradients[0] @ ctx.weight.dequantize().to(gradients[0].dtype), None, None


def _nf4(layer: nn.Linear) -> nn.Module:
    """4 bits a weight and one scale for each 64: NormalFloat (Dettmers et al. 2023, arXiv 2305.14314, section 3)."""
    from bitsandbytes.nn import Linear4bit, Params4bit

    dtype, device = layer.weight.dtype, layer.weight.device
    made: Any = Linear4bit(
        layer.in_features, layer.out_features, bias=layer.bias is not None, compute_dtype=dtype, quant_type="nf4",
        device="meta",
    )  # fmt: skip
    made.weight = Params4bit(layer.weight.data, requires_grad=False, quant_type="nf4").to(device)
    made.bias = layer.bias
    made.support_avx512bf16_for_cpu = False  # else the first pass without gradients repacks it for good, and none flow
    return made


BASES: dict[str, Callable[[nn.Linear], nn.Module]] = {"int8": _int8, "nf4": _nf4}
"""How the base weights may be held, besides as they are."""


def quantise(model: nn.Module, base: str) -> None:
    """Hold the weights of the linear layers inside a model's blocks as `base` says, one of BASES, or PLAIN.

    Raises ConfigError if the libraries are not there, or the model has no such layers.
    """
    if base == PLAIN:
        return
    count = 0
    logging.getLogger("torchao").setLevel(logging.ERROR)  # it warns of kernels for other devices
    try:
        for block in find_blocks(model)[1]:
            for name, layer in list(block.named_modules()):
                if type(layer) is nn.Linear:
                    count += 1
                    parent, _, own = name.rpartition(".")
                    made = BASES[base](layer)
                    setattr(block.get_submodule(parent), own, made.requires_grad_(False))
    except ImportError as error:
        raise ConfigError(f"base = {base!r} needs more libraries ({error}): pip install 'noren[quant]'") from error
    if not count:
        raise ConfigError(
            f'base = {base!r}: {type(model).__name__} has no linear layers in its blocks; use base = "plain"'
        )


def plain_tensors(tensor: Tensor) -> Iterator[Tensor]:
    """Yield the tensors that one consists of: itself, or those inside a quantised one."""
    if type(tensor) not in (Tensor, nn.Parameter) and hasattr(tensor, "__tensor_flatten__"):
        for name in tensor.__tensor_flatten__()[0]:
            yield from plain_tensors(getattr(tensor, name))
    else:
        yield tensor


def weight_bytes(model: nn.Module) -> int:
    """Return the bytes of a model's parameters, as they are held."""
    return sum(plain.untyped_storage().nbytes() for p in model.parameters() for plain in plain_tensors(p))
