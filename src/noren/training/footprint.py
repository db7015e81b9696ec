"""How much memory a party takes at the peak of its training, before anything is loaded.

The party's layers are built without weights, and one step of them is run on tensors that have a shape and no values
(torch's FakeTensorMode), while their bytes are counted. What the process takes besides is measured in the process that
asks: it must have loaded what a party loads. All of it is for a processor, whose memory is what the system counts as
resident; weights that are mapped from a file count, although parties on one machine share them.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import PretrainedConfig

from noren.adapters.lora import Lora, inject
from noren.errors import NorenError
from noren.metrics import current_memory
from noren.partition.checkpoint import DTYPES, Checkpoint
from noren.partition.plan import Plan
from noren.partition.shrink import tiny_model
from noren.partition.slices import is_tied, load_config, owned_keys, slice_config
from noren.partition.stage import model_class

MOMENTS, COPIES = 4, 6
"""Of an adapter's bytes: itself, its gradient and two moments; while its state is kept, three of them twice more."""
HEAP = 48 << 20
"""Freed memory that the C library keeps, of all threads: measured, see docs/log.md."""
MESSAGES = 3
"""Of a message's bytes, for each client: its input, and two answers that it may ask for again; as many under way."""


@dataclass(frozen=True, kw_only=True)
class Footprint:
    """Bytes of one party at the peak.

    Attributes:
        base: the process, with all libraries, before a model is loaded.
        weights: of its layers; in another type than the file's, those of the file as well while they are loaded.
        shared: of these, what parties on one machine share.
        activations: kept for backward passes, within the budget.
        working: what is alive at the peak of a step besides.
        adapters: LoRA's matrices, their gradients and the optimiser's moments, of all clients.
        messages: hidden states and gradients that come, go and are kept, of all clients.
        heap: freed memory that the C library has not given back.
    """

    party: str
    base: int
    weights: int
    shared: int
    activations: int
    working: int
    adapters: int
    messages: int
    heap: int

    @property
    def peak(self) -> int:
        """All of it."""
        return self.base + self.weights + self.activations + self.working + self.adapters + self.messages + self.heap


@dataclass(frozen=True)
class _Step:
    """Bytes of one training step: kept between forward and backward, most at once, and of the adapter's weights."""

    kept: int
    peak: int
    adapter: int


def footprints(
    checkpoint: Checkpoint,
    plan: Any,
    *,
    lora: Lora,
    base: int,
    task: str = "causal-lm",
    dtype: str = "float32",
    batch: int = 8,
    length: int = 128,
    clients: int = 1,
    graph_bytes: int = 4 << 30,
) -> tuple[Footprint, ...]:
    """Predict the peak memory of each party that trains on batches of `batch` x `length` tokens, on a processor.

    `clients` train through the remote parties at once, each with its own adapter, one batch computed at a time;
    `graph_bytes` is the budget of their activations. `base` is what a process takes without a model (`base_memory`).
    Reads config.json and the headers of the shards. Returns nothing for an architecture whose step depends on its
    values, as where experts are chosen. Raises PlanError, ModelError, UnfitModel or ConfigError.
    """
    config = load_config(checkpoint)
    cut = Plan.parse(plan, int(config.num_hidden_layers))
    infos = checkpoint.infos(checkpoint.files)
    tied = task == "causal-lm" and is_tied(config, list(infos))
    kind = getattr(torch, dtype)
    message = batch * length * int(config.hidden_size) * kind.itemsize
    out = []
    for party in cut.parties:
        mine = [infos[key] for key in owned_keys(list(infos), cut, party, tied=tied, model_type=config.model_type)]
        in_file = sum(info.nbytes for info in mine)
        mapped = sum(info.nbytes for info in mine if DTYPES.get(info.dtype) == kind)
        copied = sum(info.nbytes // DTYPES[info.dtype].itemsize * kind.itemsize for info in mine) - mapped
        own = party == cut.client
        try:
            step = _step(config, cut, party, task, kind, lora, batch, length, len(cut.kept(party)))
            room = step.kept if own else graph_bytes
            if own or clients * step.kept <= room:
                activations, working = (1 if own else clients) * step.kept, step.peak - step.kept
            else:
                block = _step(config, cut, party, task, kind, lora, batch, length, 1).peak
                entries = min(clients * len(cut.kept(party)) * message, room)
                activations = min(clients * step.kept, room) if step.kept <= room else entries
                working = max(block, room - entries if step.kept > room else 0)
        except NorenError:
            raise
        except Exception:  # whatever a model's code or torch raises where values are asked for that are not there
            return ()
        many = 1 if own else clients
        weights, training = mapped + copied, activations + working
        adapters = (MOMENTS * many + COPIES) * step.adapter
        messages = MESSAGES * (many + 1) * message
        loading = max(in_file - mapped - training - adapters - messages, 0)
        out.append(
            Footprint(
                party=party, base=base, weights=weights + loading, shared=mapped, activations=activations,
                working=working, adapters=adapters, messages=messages, heap=HEAP,
            )
        )  # fmt: skip
    return tuple(out)


def base_memory(config: PretrainedConfig) -> int:
    """Return what this process takes once it has computed a step of a tiny model of the architecture. In bytes.

    The libraries load much of themselves only then.
    """
    model = tiny_model(config, "base", layers=2)
    ids = torch.ones(2, 8, dtype=torch.long)
    model(input_ids=ids).last_hidden_state.square().mean().backward()
    return current_memory()


def _step(
    config: PretrainedConfig,
    plan: Plan,
    party: str,
    task: str,
    dtype: torch.dtype,
    lora: Lora,
    batch: int,
    length: int,
    layers: int,
) -> _Step:
    """Count the bytes of one step of a party's first `layers` layers."""
    first, head = plan.holds_embedding(party), plan.holds_head(party)
    cut = slice_config(config, plan.kept(party)[:layers], embedding=first, head=head, task=task)
    with torch.device("meta"):
        model = model_class(cut, task if head else "base")._from_config(cut, dtype=dtype)
        model.requires_grad_(False).train(first)
        if lora.trained_by(party):
            inject(model, lora, party, str(cut.model_type), "a", 0)
    with FakeTensorMode(allow_non_fake_inputs=True):
        _materialise(model)
        trained = sum(p.nbytes for p in model.parameters() if p.requires_grad)
        arguments: dict[str, Any] = {"attention_mask": None}
        if "use_cache" in model.forward.__code__.co_varnames:
            arguments["use_cache"] = False
        counted = _Alive([*model.parameters(), *model.buffers()])
        with counted:
            if first:
                arguments["input_ids"] = torch.ones(batch, length, dtype=torch.long)
            else:
                arguments["inputs_embeds"] = torch.randn(batch, length, int(config.hidden_size), dtype=dtype)
                arguments["inputs_embeds"].requires_grad_()
            if first and head:
                shape = (batch,) if task == "sequence-classification" else (batch, length)
                names = ("start_positions", "end_positions") if task == "question-answering" else ("labels",)
                shape = (batch,) if task == "question-answering" else shape
                arguments |= {name: torch.ones(shape, dtype=torch.long) for name in names}
            out = model(**arguments)
            result = (
                out["loss"] if "loss" in out else next(value for value in out.values() if isinstance(value, Tensor))
            )
            kept = counted.now
            if result.requires_grad:
                torch.autograd.backward(result, torch.empty_like(result))
            if first and not head and task == "causal-lm":  # of the logits that come back
                logits = torch.empty(batch * length, int(config.vocab_size), dtype=dtype, requires_grad=True)
                labels = torch.ones(batch * length, dtype=torch.long)
                nn.functional.cross_entropy(logits.float(), labels).backward()
    return _Step(kept, counted.peak, trained)


def _materialise(model: nn.Module) -> None:
    """Give a model without weights ones that have a place, but no values."""
    known: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, old in module._parameters.items():
            if old is not None:
                new = torch.empty(old.shape, dtype=old.dtype, device="cpu")
                made = known.setdefault(id(old), nn.Parameter(new, requires_grad=old.requires_grad))
                module._parameters[name] = made
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype, device="cpu")


class _Alive(TorchDispatchMode):
    """Counts the bytes of all tensors that are alive, but for those `given`."""

    def __init__(self, given: Iterable[Tensor]) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known = {tensor.untyped_storage()._cdata for tensor in given}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                if (key := storage._cdata) not in self._known:
                    self._known.add(key)
                    self.now += storage.nbytes()
                    self.peak = max(self.peak, self.now)
                    weakref.finalize(storage, self._gone, key, storage.nbytes())
        return out

    def _gone(self, key: int, nbytes: int) -> None:
        self._known.discard(key)
        self.now -= nbytes
