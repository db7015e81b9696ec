"""A small language model and a source of made-up private notes, both part of the package.

`MODEL_DIR` is a Hugging Face model folder (8 Llama layers, about 3.5 million parameters) trained on
the notes of `noren.embedded.notes`. The weights and the notes exist so that examples and tests can run
without a network and without any real person's data. Importing this package loads no weights.
"""

from __future__ import annotations

from pathlib import Path

__all__ = ["MODEL_DIR"]

MODEL_DIR: Path = Path(__file__).resolve().parent / "model"
"""Folder of the embedded model: weights, configuration, tokenizer and model card."""
