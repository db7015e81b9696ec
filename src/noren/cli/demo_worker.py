"""What one process of the demonstration does: a client that trains across the cut, or the same training in one piece.

Run as `python -m noren.cli.demo_worker client|whole RUN.toml`. Speaks JSON lines on stdout: `{"step": ...}` for every
step, and a last line `{"result": ...}`.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

from noren.adapters.checkpoint import load_folder
from noren.cli.main import quiet
from noren.config import Document
from noren.metrics import peak_memory
from noren.parties.client import Client
from noren.parties.train import MeasuredTrainer, Prepared, load_tokenizer, prepare
from noren.training.loop import Outcome, Progress, Trainer
from noren.types import Forward, Message, guarded

NEW_TOKENS = 60
SAMPLES = 2
PROMPT_WORDS = 6
LISTS = ("lengths", "rows")
"""The only lists of whole numbers that may cross: tokens a sequence, and the order of sequences."""


def say(**line: Any) -> None:
    """Print one line of JSON for the process that started this one."""
    print(json.dumps(line), flush=True)


def note(progress: Progress, crossed: int = 0) -> None:
    """Report one step, and the bytes that crossed so far."""
    speed = progress.tokens / max(progress.seconds, 1e-9)
    say(step=progress.step, loss=progress.loss, tokens_per_second=speed, crossed=crossed)


class Watch:
    """A guard at the client's door: keeps one example of each kind, and checks every message for what may not cross."""

    def __init__(self, hidden_size: int) -> None:
        self.examples: dict[str, dict[str, Any]] = {}
        self.found: set[str] = set()
        self._hidden = hidden_size

    def __call__(self, message: Message, handler: Any) -> Message:
        """Look at a message and at its answer."""
        answer: Message = handler(message)
        for direction, one in (("up", message), ("down", answer)):
            self._look(one)
            if one.kind not in self.examples:
                self.examples[one.kind] = {
                    "direction": direction,
                    "kind": one.kind,
                    "fields": [n for n in one.meta.__struct_fields__ if getattr(one.meta, n) not in (None, [])],
                    "tensors": [
                        f"{name} {list(t.shape)} {str(t.dtype).removeprefix('torch.')}"
                        for name, t in list(one.tensors.items())[:4]
                    ],
                    "bytes": sum(t.nbytes for t in one.tensors.values()),
                }
        return answer

    def _look(self, message: Message) -> None:
        if message.kind in ("state", "push"):
            return  # adapters, which are asked for by name
        for name in message.meta.__struct_fields__:
            value = getattr(message.meta, name)
            if name not in LISTS and isinstance(value, list) and any(isinstance(item, int) for item in value):
                self.found.add(f"whole numbers in the field {name!r}")
        for tensor in message.tensors.values():
            if not tensor.is_floating_point():
                self.found.add("whole numbers in a tensor (token ids, labels, masks or positions)")
            elif tensor.dim() != 2 or tensor.shape[1] != self._hidden:
                self.found.add("a tensor that is not [tokens, hidden size] (logits or padding)")
        if isinstance(message.meta, Forward) and sum(message.meta.lengths) != len(message.tensors["hidden"]):
            self.found.add("padding")


def samples(model: Any, tokenizer: Any, prepared: Prepared) -> list[dict[str, Any]]:
    """Continue the first words of some held-out texts."""
    out = []
    for row in (prepared.held_out or prepared.rows)[:SAMPLES]:
        text = tokenizer.decode(row["input_ids"], skip_special_tokens=True)
        prompt = " ".join(text.split()[:PROMPT_WORDS])
        inputs = tokenizer(prompt, return_tensors="pt").to(model.device)
        room = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "pad_token_id": prepared.pad_id}
        ids = model.generate(**{k: v for k, v in inputs.items() if k in ("input_ids", "attention_mask")}, **room)
        new = ids[0, inputs["input_ids"].shape[1] :]
        out.append({"prompt": prompt, "text": tokenizer.decode(new, skip_special_tokens=True), "ids": new.tolist()})
    return out


def client(document: Document) -> dict[str, Any]:
    """Train one client across the cut, and say what it took."""
    tokenizer = load_tokenizer(document.model)
    prepared = prepare(document, tokenizer)
    party = Client(document)
    watch = Watch(int(party.hf.config.hidden_size))
    party.span.handler = guarded(party.span.handler, watch)
    try:
        party.save_adapter(document.out / "initial")
        before = samples(party.model.eval(), tokenizer, prepared)
        trainer = MeasuredTrainer(
            party.model, prepared.rows, prepared.held_out, document.run.training, pad_id=prepared.pad_id,
            seed=document.run.seed, remote=party.remote(), checkpoint=document.out / "checkpoint",
            report=lambda progress: told(progress),
        )  # fmt: skip
        trainer.traffic = party.traffic
        total = {"bytes": 0, "round_trips": 0, "tokens": 0}

        def told(progress: Progress) -> None:
            measured = trainer.measured(progress)
            total["bytes"] += measured.bytes_up + measured.bytes_down
            total["round_trips"] += measured.round_trips
            total["tokens"] += progress.tokens
            note(progress, total["bytes"])

        outcome = trainer.run()
        adapter = party.save_adapter(document.out / "adapter")
        start = party.traffic.copy()
        after = samples(party.model.eval(), tokenizer, prepared)
        crossed = party.traffic.since(start)
    finally:
        party.close()
    tokens = sum(len(sample["ids"]) for sample in after)
    return _side(outcome) | {
        "adapter": str(adapter),
        **{f"{name}_per_step": value / trainer.steps for name, value in total.items()},
        "generated_tokens": tokens,
        "round_trips_per_token": crossed.round_trips / tokens,
        "bytes_per_token": crossed.total_bytes / tokens,
        "samples": [
            {"prompt": b["prompt"], "before": b["text"], "after": a["text"]} for b, a in zip(before, after, strict=True)
        ],
        "crossings": list(watch.examples.values()),
        "found": sorted(watch.found),
        "hidden_size": watch._hidden,
        "parameters": sum(p.numel() for p in party.part.tensors.values()),
        "file_bytes": party.part.bytes_read,
    }


def whole(document: Document) -> dict[str, Any]:
    """The same training of the whole model in this process, from the same first adapter."""
    from peft import PeftModel

    run = document.run
    prepared = prepare(document, load_tokenizer(document.model))
    base = transformers.AutoModelForCausalLM.from_pretrained(document.model, dtype=getattr(torch, run.dtype))
    model: nn.Module = PeftModel.from_pretrained(base, document.out / "initial", is_trainable=True)
    trainer = Trainer(
        model, prepared.rows, prepared.held_out, run.training, pad_id=prepared.pad_id, seed=run.seed, report=note
    )
    outcome = trainer.run()
    own = {name.replace(".default.", "."): p.detach() for name, p in model.named_parameters() if p.requires_grad}
    split = load_folder(Path(document.out) / "adapter")
    return _side(outcome) | {
        "adapter_difference": max(float((own[f"base_model.model.{k}"] - t).abs().max()) for k, t in split.items()),
        "parameters": sum(p.numel() for n, p in base.named_parameters() if "lora_" not in n),
    }


def _side(outcome: Outcome) -> dict[str, Any]:
    ends = [outcome.evaluations.get(step, float("nan")) for step in (0, outcome.step)]
    return {
        "losses": outcome.losses,
        "held_out_before": ends[0],
        "held_out_after": ends[1],
        "peak_bytes": peak_memory(),
    }


def main(what: str, path: str) -> None:
    """Do one of the two, and print its result."""
    quiet(False)
    transformers.utils.logging.disable_progress_bar()
    document = Document.read(Path(path))
    say(result=client(document) if what == "client" else whole(document))


if __name__ == "__main__":
    main(*sys.argv[1:])
