"""CLIF serves a language model from replicas and fine-tunes it, federated, in their slack."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from clif.llm import LLM, Completion, StreamEvent
    from clif.types import Constraint, Sampling, TokenLogprob

__version__ = "0.1.0"
__all__ = ["LLM", "Completion", "Constraint", "Sampling", "StreamEvent", "TokenLogprob", "__version__"]


def __getattr__(name: str) -> Any:
    """The library's names, imported at first use: the command line works without torch."""
    if name in ("Constraint", "Sampling", "TokenLogprob"):
        from clif import types

        return getattr(types, name)
    if name in ("LLM", "Completion", "StreamEvent"):
        from clif import llm

        return getattr(llm, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
