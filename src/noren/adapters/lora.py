"""LoRA by PEFT, injected into whatever layers a party holds.

h = W x + (alpha / r) B A x, with A [r, in] and B [out, r] (Hu et al. 2021, arXiv 2106.09685, section 4.1). W stays
frozen; A and B are kept in fp32 whatever the type of W. Names of adapter tensors are those of the whole model, without
PEFT's adapter name: `model.layers.3.self_attn.q_proj.lora_A.weight`.
"""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Callable, Collection
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import msgspec
import torch
from torch import Tensor, nn

from noren.errors import ConfigError, ProtocolError, SessionLost

Rename = Callable[[str], str]
"""Translates a parameter's name in a party's model to its name in the whole model."""


class Lora(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Settings of the adapter (`[adapter]` in a run document), the same at every party."""

    r: int = 8
    alpha: float = 16.0
    dropout: float = 0.0
    targets: list[str] = []  # names of linear modules; empty: PEFT's own choice for the architecture
    parties: list[str] = []  # who trains an adapter; empty: every party
    rank_of: dict[str, int] = {}  # another r for a party; alpha / r stays as for `r`

    def __post_init__(self) -> None:
        if self.r < 1 or any(rank < 1 for rank in self.rank_of.values()):
            raise ValueError("adapter: r and every rank_of must be at least 1")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"adapter: dropout {self.dropout} must be at least 0 and below 1")
        if not 0 < self.alpha < math.inf:
            raise ValueError(f"adapter: alpha {self.alpha} must be above 0, and finite")

    def trained_by(self, party: str) -> bool:
        """Whether `party` trains an adapter."""
        return not self.parties or party in self.parties

    def rank(self, party: str) -> int:
        """R of `party`."""
        return self.rank_of.get(party, self.r)

    def canonical(self) -> str:
        """These settings as one line of JSON, equal for equal settings."""
        return msgspec.json.encode(self, order="deterministic").decode()


def targets_for(lora: Lora, model_type: str) -> list[str]:
    """Return the names of the modules to adapt. Raises ConfigError if none are given and PEFT knows none."""
    if lora.targets:
        return sorted(lora.targets)
    from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as KNOWN

    if model_type not in KNOWN:
        raise ConfigError(
            f"adapter.targets: PEFT has no default for model type {model_type!r}; name the linear modules to adapt, "
            'e.g. targets = ["q_proj", "v_proj"]'
        )
    return sorted(KNOWN[model_type])


def inject(
    model: nn.Module,
    lora: Lora,
    party: str,
    model_type: str,
    adapter: str,
    seed: int,
    heads: Collection[str] = (),
) -> list[nn.Parameter]:
    """Put a fresh adapter named `adapter` into `model`; returns its parameters (fp32, trainable).

    The same seed gives the same initial values: A random, B zero. `heads` names modules that are trained whole, as a
    copy of the adapter's own (a new classifier). Raises ConfigError if no module has a target's name.
    """
    from peft import LoraConfig, inject_adapter_in_model

    rank = lora.rank(party)
    config = LoraConfig(
        r=rank,
        lora_alpha=lora.alpha * rank / lora.r,
        lora_dropout=lora.dropout,
        target_modules=targets_for(lora, model_type),
        modules_to_save=sorted(heads) or None,
        exclude_modules=rf"(.*\.)?({'|'.join(map(re.escape, sorted(heads)))})(\..*)?" if heads else None,
        bias="none",
    )
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Already found a `peft_config`")  # many adapters is what we want
        warnings.filterwarnings("ignore", category=RuntimeWarning)  # targets that no layer of this party has
        warnings.filterwarnings("ignore", message="TorchaoLoraLinear was")  # that it cannot be merged: nobody does
        warnings.filterwarnings("ignore", message="fan_in_fan_out")  # PEFT sets it right for GPT-2 by itself
        torch.manual_seed(seed)
        try:
            inject_adapter_in_model(config, model, adapter_name=adapter)
        except ValueError as error:
            raise ConfigError(f"adapter.targets: {error}") from error
    for layer in adapter_layers(model):
        if adapter in getattr(layer, "modules_to_save", {}):
            _compute_in_fp32(layer.modules_to_save[adapter])
    parameters = [p for _, p in adapter_parameters(model, adapter)]
    for parameter in parameters:
        parameter.data = parameter.data.float()
        parameter.requires_grad_(True)
    return parameters


def _compute_in_fp32(head: nn.Module) -> None:
    """Let a head with fp32 weights take hidden states of another type, and answer in theirs."""
    kinds: list[torch.dtype] = []

    def enter(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        kinds[:] = [args[0].dtype]
        return tuple(a.float() if isinstance(a, Tensor) and a.is_floating_point() else a for a in args)

    head.register_forward_pre_hook(enter)
    head.register_forward_hook(lambda module, args, output: output.to(kinds[0]))


def adapter_parameters(model: nn.Module, adapter: str) -> list[tuple[str, nn.Parameter]]:
    """Return (name without the adapter's own name, parameter) for one adapter, in the model's order."""
    out = []
    for name, parameter in model.named_parameters():
        if f".modules_to_save.{adapter}." in name:
            out.append((name.replace(f".modules_to_save.{adapter}.", ".", 1), parameter))
        elif "lora_" in name and f".{adapter}." in name:
            out.append((name.replace(f".{adapter}.", ".", 1), parameter))
    return out


def adapter_layers(model: nn.Module) -> list[Any]:
    """Return the modules that carry adapters: LoRA layers, and heads with trained copies."""
    from peft.tuners.lora import LoraLayer
    from peft.utils.other import ModulesToSaveWrapper

    return [module for module in model.modules() if isinstance(module, LoraLayer | ModulesToSaveWrapper)]


def _has(layer: Any, adapter: str) -> bool:
    return adapter in (layer.modules_to_save if hasattr(layer, "modules_to_save") else layer.lora_A)


def activate(model: nn.Module, adapter: str | None) -> None:
    """Make `adapter` the one that acts and is trained; None: the base model alone. Raises SessionLost if it is gone."""
    layers = adapter_layers(model)
    if adapter is not None and not any(_has(layer, adapter) for layer in layers):
        raise SessionLost("this run's adapter is not here any more")
    by_rows(model, None)
    for layer in layers:
        if adapter is None or not _has(layer, adapter):
            layer.enable_adapters(False)
        else:
            layer.enable_adapters(True)
            layer.set_adapter(adapter)


_BY_ROWS: WeakKeyDictionary[nn.Module, list[Any]] = WeakKeyDictionary()


def by_rows(model: nn.Module, names: list[str] | None) -> None:
    """Let each row of a batch pass through the adapter that `names` gives it; None: the active one is for all.

    PEFT's own way of a mixed batch, which it offers for inference; gradients flow through it as well.
    """
    for handle in _BY_ROWS.pop(model, []):
        handle.remove()
    if names is not None:
        hook = partial(_name_rows, names)
        _BY_ROWS[model] = [layer.register_forward_pre_hook(hook, with_kwargs=True) for layer in adapter_layers(model)]


def _name_rows(names: list[str], layer: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    return args, kwargs | {"adapter_names": names}


def remove(model: nn.Module, adapter: str) -> None:
    """Take an adapter out of the model and free it."""
    for layer in adapter_layers(model):
        if not _has(layer, adapter):
            continue
        if hasattr(layer, "modules_to_save"):
            layer.enable_adapters(False)
            del layer.modules_to_save[adapter]
            layer._adapters.discard(adapter)
        else:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="Adapter .* was active")  # every use names its adapter
                layer.delete_adapter(adapter)
    getattr(model, "peft_config", {}).pop(adapter, None)


def adapter_state(model: nn.Module, adapter: str, rename: Rename) -> dict[str, Tensor]:
    """Return copies of an adapter's tensors under the whole model's names."""
    return {rename(name): p.detach().clone() for name, p in adapter_parameters(model, adapter)}


def load_state(model: nn.Module, adapter: str, rename: Rename, state: dict[str, Tensor]) -> None:
    """Set an adapter's tensors. Raises ProtocolError unless names and shapes are exactly those it has."""
    own = {rename(name): p for name, p in adapter_parameters(model, adapter)}
    if own.keys() != state.keys():
        odd = sorted(own.keys() ^ state.keys())
        raise ProtocolError(f"{len(odd)} adapter tensors are missing or unknown, e.g. {odd[0]!r}")
    for name, parameter in own.items():
        if parameter.shape != state[name].shape:
            raise ProtocolError(
                f"adapter tensor {name!r} has shape {list(state[name].shape)}, expected {list(parameter.shape)}"
            )
        if not bool(torch.isfinite(state[name]).all()):
            raise ProtocolError(f"adapter tensor {name!r} holds values that are not finite")
    with torch.no_grad():
        for name, parameter in own.items():
            parameter.copy_(state[name])
