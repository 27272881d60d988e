"""Which executor an engine computes with: --distributed-executor-backend."""

from __future__ import annotations

from importlib import import_module

from ..config import Config
from ..errors import StartupError
from .executor import Executor, Load, Report, load_inline
from .worker_executor import load_worker

# ray: it is said of engines, not of what computes in one.
_OURS: dict[str, Load] = {"uni": load_inline, "mp": load_worker, "ray": load_inline}
_METHODS = [name for name, value in vars(Executor).items() if callable(value) and not name.startswith("_")]


def load(config: Config, report: Report) -> Executor:
    """An ``executor.Load``. A class of the user's is one, too: it is called like this function, and its objects are
    executors. Raises StartupError."""
    name = config.parallel.distributed_executor_backend
    if name in _OURS:
        return _OURS[name](config, report)
    found = _executor_class(name)
    executor: Executor = found(config, report)
    depth = getattr(executor, "depth", None)
    if not isinstance(depth, int) or depth < 1:
        raise _unusable(name, f"its depth is {depth!r}", "an attribute depth: how many steps may be under way, 1 or 2")
    return executor


def _executor_class(name: str) -> type:
    """Before anything is loaded."""
    module, _, attribute = name.rpartition(".")
    try:
        found = getattr(import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        fix = f"{', '.join(_OURS)}, or package.module.Class"
        raise _unusable(name, f"{type(error).__name__}: {error}", fix) from error
    if not isinstance(found, type):
        raise _unusable(name, f"it is no class but a {type(found).__name__}", "the name of a class")
    if missing := [method for method in _METHODS if not callable(getattr(found, method, None))]:
        raise _unusable(name, f"it has no {', '.join(missing)}", "a class with the methods of engine/executor.py")
    return found


def _unusable(name: str, why: str, fix: str) -> StartupError:
    return StartupError("HS-E048", f"the executor {name} cannot be used", why, fix)
