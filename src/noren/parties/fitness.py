"""Does an architecture survive being cut? Found out before its first use, by comparing split with whole.

The model's own config is shrunk to a tiny random model, which is cut into four stages (client, two remote parties,
client) and run over links that carry real bytes: without a cache, padded, as a prefill, token by token, as a chunk
after a cache, and backward; and once in two stages, the second of which holds the head. An architecture whose numbers
differ is refused. Verdicts are kept on disk.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import os
import re
import tempfile
from pathlib import Path
from typing import Any

import msgspec
import platformdirs
import torch
import transformers
from torch import Tensor
from transformers import DynamicCache, PretrainedConfig, PreTrainedModel

from noren import __version__
from noren.errors import NorenError, UnfitModel
from noren.parties.server import SpanServer
from noren.partition.blocks import family, is_causal
from noren.partition.client import build_client
from noren.partition.shrink import VOCABULARY, shrink, tiny_model
from noren.partition.stage import Stage, open_slice
from noren.types import PROTOCOL, Hello, Message, Terms
from noren.wire.identity import Identity
from noren.wire.local import LocalLink

TOLERANCE = 1e-5
"""Largest difference allowed, relative to the largest value compared (fp32)."""

LAYERS = 12
FOLDER = "noren-check-"
PLAN = "client :4, near 4:8, server 8:-2, client -2:"
HYBRID_PLAN = "client :4, server 4:8, client 8:"
HEAD_TAIL_PLAN = "client :4, server 4:"


class Verdict(msgspec.Struct, frozen=True, kw_only=True):
    """What a check found. `differences` are largest absolute differences in fp32; 0.0 means bit for bit equal."""

    architecture: str
    task: str
    fit: bool
    reason: str
    differences: dict[str, float]
    trainable: bool


def shares_blocks(config: PretrainedConfig) -> bool:
    """Whether layers of the model share their weights, so that no party can train its own."""
    return family(config.model_type).shared_blocks


def check(config: PretrainedConfig, task: str) -> Verdict:
    """Build the architecture small, and compare split with whole. Never raises for an unfit one."""
    name, differences, reason = config.model_type, {}, ""
    try:
        torch_state = torch.get_rng_state()
        try:
            differences = _compare(config, task)
        finally:
            torch.set_rng_state(torch_state)
    except NorenError as error:
        reason = str(error)
    except Exception as error:  # whatever an architecture that does not fit makes transformers raise
        reason = f"{type(error).__name__}: {error}"
    off = {key: value for key, value in differences.items() if not value <= TOLERANCE}
    if off and not reason:
        worst = max(off, key=lambda key: off[key])
        reason = f"split differs from whole by {off[worst]:.2g} in '{worst}' (at most {TOLERANCE:g} is allowed)"
    return Verdict(
        architecture=name,
        task=task,
        fit=not reason,
        reason=_plain(reason),
        differences=differences,
        trainable=not shares_blocks(config),
    )


def _plain(reason: str) -> str:
    """Return a reason on one line, without the name of the folder in which the small model lay."""
    return " ".join(re.sub(rf"\S*{FOLDER}\w+(/config\.json)?:? ?", "", reason).split())[:500]


def require(config: PretrainedConfig, task: str, where: str) -> Verdict:
    """Return the verdict on an architecture, checking it if it was never checked here. Raises UnfitModel."""
    path = _cache_folder() / f"{_key(config, task)}.json"
    verdict = None
    if path.is_file():
        try:
            verdict = msgspec.json.decode(path.read_bytes(), type=Verdict)
        except msgspec.MsgspecError:
            verdict = None  # a file from another version: check again
    if verdict is None:
        verdict = check(config, task)
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as draft:
            draft.write(msgspec.json.encode(verdict))
        os.replace(draft.name, path)
    if not verdict.fit:
        raise UnfitModel(
            f"{where}: {verdict.architecture} ({task}) was checked and cannot be cut: {verdict.reason}; "
            "see `noren check`"
        )
    return verdict


def _cache_folder() -> Path:
    return Path(os.environ.get("NOREN_CACHE") or platformdirs.user_cache_dir("noren")) / "fit"


def _key(config: PretrainedConfig, task: str) -> str:
    skipped = ("token_id", "_name_or_path", "dtype", "architectures", "id2label", "label2id", "vocab_size")
    small = {k: v for k, v in shrink(config, LAYERS).to_dict().items() if not k.endswith(skipped)}
    text = json.dumps(
        [small, task, transformers.__version__, torch.__version__, __version__, 3], sort_keys=True, default=str
    )
    return hashlib.sha256(text.encode()).hexdigest()[:24]


def _compare(config: PretrainedConfig, task: str) -> dict[str, float]:
    if refusal := family(config.model_type).refuse:
        raise UnfitModel(f"{config.model_type} cannot be cut exactly: {refusal}")
    with tempfile.TemporaryDirectory(prefix=FOLDER) as folder:
        tiny_model(config, task, LAYERS).save_pretrained(folder)
        whole = type(tiny_model(config, task, LAYERS)).from_pretrained(folder).eval()
        if task == "causal-lm" and not is_causal(whole):
            raise UnfitModel(
                f"{config.model_type} keeps no cache of earlier tokens, or sees later ones (is_decoder is off), so it "
                "cannot generate across a cut"
            )
        hybrid = "linear_attention" in (getattr(whole.config, "layer_types", None) or [])
        split = cut_in_process(folder, HYBRID_PLAN if hybrid else PLAN, task)
        out = compare(whole, split, gradients=not shares_blocks(config))
        if not family(config.model_type).u_shaped:
            ids = torch.randint(3, VOCABULARY, (3, 11), generator=torch.Generator().manual_seed(2))
            with torch.no_grad():
                out["head-tail"] = _difference(whole(ids), cut_in_process(folder, HEAD_TAIL_PLAN, task)(ids))
        return out


def cut_in_process(folder: str, plan: str, task: str, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """Return the client's model of a cut whose other parties are in this process too."""
    part = open_slice(folder, plan, None, task)
    following = None
    connection: Any = None
    for span in reversed(part.plan.remote):
        server = SpanServer(Stage.load(folder, plan, span.party, task, dtype), following=following)
        connection = server.connect(Identity("check", "client", "check"))
        following = _line_to(connection)
    terms = Terms(
        fingerprint=part.fingerprint, plan=part.plan.lines(), task=task, dtype=str(dtype).removeprefix("torch."),
        lora="", seed=0,
    )  # fmt: skip
    hello = Hello(protocol=PROTOCOL, run="check", terms=terms)
    link = LocalLink(connection)
    link(Message(hello))
    return build_client(part, link, dtype)


def _line_to(connection: Any) -> Any:
    return lambda greet, greeted, expect: LocalLink(connection, expect=expect)


def compare(whole: PreTrainedModel, split: PreTrainedModel, *, gradients: bool = True) -> dict[str, float]:
    """Return the largest differences between two models of one architecture, by way of being called."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, VOCABULARY, (3, 11), generator=generator)
    right = torch.ones_like(ids)
    right[0, 8:], right[2, 10:] = 0, 0
    ids = ids.masked_fill(right == 0, 0)  # classifiers find the last token by the pad id
    out: dict[str, float] = {}
    with torch.no_grad():
        out["no padding"] = _difference(whole(ids), split(ids))
        out["right padding"] = _difference(whole(ids, attention_mask=right), split(ids, attention_mask=right), right)
        if is_causal(whole):
            left = right.flip(1)
            turned = ids.flip(1)
            a, b = whole(turned, attention_mask=left), split(turned, attention_mask=left)
            out["left padding"] = _difference(a, b, left)
            if whole.can_generate():
                out |= _cached(whole, split, turned, left)
    if gradients:
        out["gradients"] = _gradients(whole, split, ids, right)
    return out


def _scores(output: Any) -> Tensor:
    if "start_logits" in output:
        return torch.stack([output.start_logits, output.end_logits], -1)
    return output.logits


def _difference(a: Any, b: Any, mask: Tensor | None = None) -> float:
    x, y = (a, b) if isinstance(a, Tensor) else (_scores(a), _scores(b))
    if mask is not None and x.dim() == 3:
        x, y = x[mask.bool()], y[mask.bool()]
    scale = max(1.0, float(x.abs().max()))
    return float((x - y).abs().max()) / scale


def _cached(whole: PreTrainedModel, split: PreTrainedModel, ids: Tensor, mask: Tensor) -> dict[str, float]:
    """Prefill, four tokens one by one, then a chunk of three: left-padded, on caches."""
    out = {"cached prefill": 0.0, "cached decode": 0.0, "chunk after a cache": 0.0}
    caches = [DynamicCache(config=model.config) for model in (whole, split)]
    more = torch.randint(3, VOCABULARY, (len(ids), 7), generator=torch.Generator().manual_seed(1))
    pieces = [("cached prefill", ids), *[("cached decode", more[:, i : i + 1]) for i in range(4)]]
    for kind, piece in [*pieces, ("chunk after a cache", more[:, 4:])]:
        if kind != "cached prefill":
            mask = torch.cat([mask, torch.ones_like(piece)], 1)
        positions = (mask.cumsum(-1) - 1).clamp(min=0)[:, -piece.shape[1] :]
        arguments: dict[str, Any] = {"attention_mask": mask, "use_cache": True} | _positions(whole, positions)
        a, b = (
            model(piece, past_key_values=cache, **arguments)
            for model, cache in zip((whole, split), caches, strict=True)
        )
        real = mask[:, -piece.shape[1] :]
        out[kind] = max(out[kind], _difference(a, b, real))
    return out


def _positions(model: PreTrainedModel, positions: Tensor) -> dict[str, Tensor]:
    return {"position_ids": positions} if "position_ids" in inspect.signature(model.forward).parameters else {}


def _gradients(whole: PreTrainedModel, split: PreTrainedModel, ids: Tensor, mask: Tensor) -> float:
    """Largest difference between gradients of the client's first layers, which passed through every stage."""
    grads = []
    for model in (whole, split):
        model.requires_grad_(False)
        embedding = model.get_input_embeddings().weight.requires_grad_(True)
        embedding.grad = None
        scores = _scores(model(ids, attention_mask=mask, **({"use_cache": False} if is_causal(model) else {})))
        picked = scores[mask.bool()] if scores.dim() == 3 else scores
        (picked * torch.linspace(-1, 1, picked.shape[-1])).mean().backward()
        grads.append(embedding.grad)
    return _difference(grads[0], grads[1])
