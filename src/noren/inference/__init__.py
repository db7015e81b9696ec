"""Generating across a cut: who holds which part of the KV cache."""
