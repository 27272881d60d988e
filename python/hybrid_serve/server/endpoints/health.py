"""GET /live, /ready, /health, /load, /version and /."""

from __future__ import annotations

from ... import __version__
from ..answers import Alive, Load, Ready, Version
from ..context import ServerContext
from ..exposition import usage


def live() -> Alive:
    """The process answers."""
    return Alive()


def ready(context: ServerContext) -> tuple[int, Ready]:
    """The HTTP status and what the server is doing: 200 only if a request would be taken now."""
    phase = context.lifecycle.phase()
    status = context.lifecycle.status
    engines = {str(engine.index): engine.status.phase for engine in context.engines}
    share, seconds = status.progress, status.seconds
    is_known = phase == status.phase and 0 < share < 1 and seconds > 0
    eta = round(seconds * (1 - share) / share, 1) if is_known else None
    ready = Ready(phase, share, status.message, seconds, eta, engines)
    return (200 if phase == "ready" else 503), ready


def load(context: ServerContext) -> Load:
    """An engine that cannot serve now counts neither for the wait nor for the cache."""
    engines = context.engines
    ready = [engine for engine in engines if engine.status.phase == "ready"]
    return Load(
        context.exposition.num_open(),
        sum(engine.stats.num_running for engine in engines),
        sum(engine.stats.num_waiting for engine in engines),
        round(max((usage(engine.stats) for engine in ready), default=0.0), 4),
        round(min((engine.wait_seconds for engine in ready), default=0.0), 3),
    )


def version() -> Version:
    return Version(__version__)


def links() -> dict[str, str]:
    """For whoever opens the bare address."""
    return {
        "server": f"hybrid-serve {__version__}",
        "chat": "/v1/chat/completions",
        "completions": "/v1/completions",
        "models": "/v1/models",
        "openapi": "/openapi.json",
        "docs": "/docs",
        "health": "/ready",
        "metrics": "/metrics",
    }
