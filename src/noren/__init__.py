"""Noren: one large language model, cut across parties that do not share their data.

with noren.load("run.toml") as model:      # an ordinary transformers model; its middle is elsewhere
    model.generate(...)
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["Document", "Guard", "Handler", "Message", "NorenError", "Plan", "Stage", "load"]

_HOMES = {
    "Document": "noren.config",
    "Guard": "noren.types",
    "Handler": "noren.types",
    "Message": "noren.types",
    "NorenError": "noren.errors",
    "Plan": "noren.partition.plan",
    "Stage": "noren.partition.stage",
    "load": "noren.parties.load",
}

if TYPE_CHECKING:
    from noren.config import Document
    from noren.errors import NorenError
    from noren.parties.load import load
    from noren.partition.plan import Plan
    from noren.partition.stage import Stage
    from noren.types import Guard, Handler, Message


def __getattr__(name: str) -> Any:
    """Import a public name at its first use: `import noren` stays instant."""
    if name not in _HOMES:
        raise AttributeError(f"module 'noren' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    """The public names."""
    return sorted(__all__)
