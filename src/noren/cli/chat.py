"""`noren chat`: write, and read what the model answers, token by token."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Annotated, Any

import typer

from noren.cli.generate import (
    Adapter,
    Bare,
    MaxNewTokens,
    Seed,
    Temperature,
    TopP,
    chosen_adapter,
    open_client,
    sampling,
    tokenized,
)
from noren.cli.show import Insecurely, RunFile, say

Turn = tuple[str, str]
"""Role and content."""


def chat(
    run: RunFile,
    adapter: Adapter = None,
    no_adapter: Bare = False,
    turns: Annotated[
        bool,
        typer.Option(
            help="Without a chat template: write `user:` and `assistant:` lines, as conversations are learned."
        ),
    ] = False,
    max_new_tokens: MaxNewTokens = 128,
    temperature: Temperature = None,
    top_p: TopP = None,
    seed: Seed = None,
    insecure: Insecurely = False,
) -> None:
    """Talk to the model. A model without a chat template continues what is typed, each line on its own."""
    from transformers import TextStreamer

    from noren.config import Document
    from noren.errors import ConfigError
    from noren.parties.train import load_tokenizer

    document = Document.read(run)
    folder = chosen_adapter(document, adapter, no_adapter)
    tokenizer = load_tokenizer(document.model)
    talks = bool(tokenizer.chat_template) or turns
    with open_client(document, folder, insecure=insecure).model as model:
        streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
        settings = sampling(temperature, top_p, document.run.seed if seed is None else seed)
        if turns and not tokenizer.chat_template:
            settings |= {"stop_strings": ["\nuser:"], "tokenizer": tokenizer}
        say("/reset begins anew, /quit or Ctrl-D ends", error=True)
        history: list[Turn] = []
        for line in typed():
            if line == "/reset":
                history.clear()
                continue
            said = [*history, ("user", line)] if talks else []
            try:
                inputs = tokenized(tokenizer, rendered(tokenizer, said) if talks else line, model, max_new_tokens)
            except ConfigError as error:
                say(f"{error}; /reset begins anew", error=True)
                continue
            ids = model.generate(**inputs, max_new_tokens=max_new_tokens, streamer=streamer, **settings)
            reply = tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
            history = [*said, ("assistant", reply.removesuffix("\nuser:").strip())] if talks else []


def rendered(tokenizer: Any, said: list[Turn]) -> str:
    """Return a conversation as the model reads it: by its chat template, or as `role: content` lines."""
    from noren.training.examples import render_plain

    if not tokenizer.chat_template:
        return render_plain(tuple(said), generate=True)
    messages = [{"role": role, "content": content} for role, content in said]
    return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))


def typed() -> Iterator[str]:
    """Yield what is typed, or piped in, line by line without empty ones, until /quit or the end."""
    terminal = sys.stdin.isatty()
    while True:
        if terminal:
            sys.stderr.write("> ")
            sys.stderr.flush()
        line = sys.stdin.readline()
        if not line or line.strip() == "/quit":
            return
        if text := line.strip():
            yield text
