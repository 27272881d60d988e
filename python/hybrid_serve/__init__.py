"""hybrid-serve: an OpenAI-compatible LLM server. ``from hybrid_serve import LLM`` for offline use."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .llm import LLM
    from .wire import SamplingParams

__version__ = "0.1.0"
__all__ = ["LLM", "SamplingParams", "__version__"]


def __getattr__(name: str) -> Any:
    # Lazily, so that `hybrid-serve --help` and the API server never pay for (or import) torch.
    if name == "LLM":
        from .llm import LLM

        return LLM
    if name == "SamplingParams":
        from .wire import SamplingParams

        return SamplingParams
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
