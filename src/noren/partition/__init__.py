"""Cutting a Hugging Face model: which party holds which layers, and the modules that stand on each side of a cut."""
