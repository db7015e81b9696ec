"""`noren generate`: one prompt through all parties' layers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from noren.cli.show import AsJson, Insecurely, RunFile, say

if TYPE_CHECKING:
    from noren.config import Document
    from noren.parties.client import Client

Adapter = Annotated[
    Path | None,
    typer.Option(help="A PEFT folder for all parties' layers. Default: the run's own, if it was trained."),
]
Bare = Annotated[bool, typer.Option("--no-adapter", help="Use the model as it is.")]
MaxNewTokens = Annotated[int, typer.Option(min=1, help="Tokens to write at most.")]
Temperature = Annotated[
    float | None, typer.Option(min=0.0, help="0: always the likeliest token, the default unless --top-p is given.")
]
TopP = Annotated[float | None, typer.Option(min=0.0, max=1.0, help="Draw from the likeliest tokens of this share.")]
Seed = Annotated[int | None, typer.Option(help="Of the drawing; default: the run's.")]


def generate(
    run: RunFile,
    prompt: Annotated[str, typer.Option(help="The text to continue.")],
    adapter: Adapter = None,
    no_adapter: Bare = False,
    max_new_tokens: MaxNewTokens = 64,
    temperature: Temperature = None,
    top_p: TopP = None,
    num_beams: Annotated[int, typer.Option(min=1, help="Continuations to keep in the search.")] = 1,
    seed: Seed = None,
    insecure: Insecurely = False,
    as_json: AsJson = False,
) -> None:
    """Continue a prompt, and print what follows it."""
    from noren.config import Document
    from noren.parties.train import load_tokenizer

    document = Document.read(run)
    folder = chosen_adapter(document, adapter, no_adapter)
    tokenizer = load_tokenizer(document.model)
    client = open_client(document, folder, insecure=insecure)
    with client.model as model:
        inputs = tokenized(tokenizer, prompt, model, max_new_tokens)
        settings = sampling(temperature, top_p, document.run.seed if seed is None else seed)
        before = client.traffic.copy()
        ids = model.generate(**inputs, max_new_tokens=max_new_tokens, num_beams=num_beams, **settings)
        crossed = client.traffic.since(before)
    fresh = ids[0, inputs["input_ids"].shape[1] :]
    text = tokenizer.decode(fresh, skip_special_tokens=True)
    if not as_json:
        typer.echo(text)
        return
    record = {
        "text": text, "tokens": len(fresh), "prompt_tokens": int(inputs["input_ids"].shape[1]),
        "round_trips_per_token": crossed.round_trips / len(fresh), "bytes_per_token": crossed.total_bytes / len(fresh),
        "bytes_up": crossed.sent_bytes, "bytes_down": crossed.received_bytes,
        "adapter": str(folder) if folder else None,
    }  # fmt: skip
    typer.echo(json.dumps(record, ensure_ascii=False))


def chosen_adapter(document: Document, adapter: Path | None, no_adapter: bool) -> Path | None:
    """Return the adapter folder to use, and say on stderr which it is. Raises ConfigError."""
    from noren.errors import ConfigError

    if document.run.task != "causal-lm":
        raise ConfigError(f"the run's task is {document.run.task!r}; only a causal-lm model writes text")
    if adapter is not None and no_adapter:
        raise ConfigError("--adapter and --no-adapter exclude each other")
    if adapter is not None and not adapter.is_dir():
        raise ConfigError(f"{adapter}: no such adapter folder")
    if adapter is not None and document.run.adapter is None:
        raise ConfigError(f"{adapter}: the run document needs the [adapter] that this folder was made with")
    own = document.out / "adapter"
    if adapter is None and not no_adapter and own.is_dir() and document.run.adapter is not None:
        adapter = own
    say(f"adapter: {adapter}" if adapter else "adapter: none, the model as it is", error=True)
    return adapter


def open_client(document: Document, adapter: Path | None, *, insecure: bool) -> Client:
    """Connect, with the adapter or with the base model alone."""
    import msgspec

    from noren.config import Document
    from noren.parties.load import connect

    settings = document.run.adapter if adapter else None
    own = Document(msgspec.structs.replace(document.run, adapter=settings), document.base)
    return connect(own, adapter, insecure=insecure)


def tokenized(tokenizer: Any, text: str, model: Any, more: int) -> dict[str, Any]:
    """Return `text` as the model's inputs. Raises ConfigError if it is empty, or too long with `more` after it."""
    from noren.errors import ConfigError

    encoded = tokenizer(text, return_tensors="pt", return_token_type_ids=False)
    count, limit = encoded["input_ids"].shape[1], getattr(model.config, "max_position_embeddings", None)
    if not count:
        raise ConfigError("the prompt is empty, and this model's tokenizer adds no token before it; write something")
    if isinstance(limit, int) and count + more > limit:
        raise ConfigError(
            f"the prompt has {count} tokens, and {more} more may follow; the model takes {limit}: shorten the prompt "
            "or lower --max-new-tokens"
        )
    return {name: tensor.to(model.device) for name, tensor in encoded.items()}


def sampling(temperature: float | None, top_p: float | None, seed: int) -> dict[str, Any]:
    """Return the arguments of `generate` for a way of drawing tokens, and seed it."""
    import torch

    torch.manual_seed(seed)
    if temperature == 0 or (temperature is None and top_p is None):
        return {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
    return {"do_sample": True, "temperature": temperature or 1.0, "top_p": top_p or 1.0}
