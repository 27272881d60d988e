"""``hybrid-serve bench KIND``: finds the kind and imports only that one."""

from __future__ import annotations

from importlib import import_module

from ..usage import UsageError, did_you_mean

# Kind -> (module of this folder, summary); the module has a function of the kind's name: argv -> exit code.
KINDS = {
    "serve": ("serve", "load on a running server, ours or any other with OpenAI's API"),
    "sweep": ("sweep", "serve at several loads, with a plot of latency over throughput"),
    "throughput": ("offline", "tokens a second of the engine without a server"),
    "latency": ("offline", "seconds of one batch in the engine without a server"),
    "startup": ("startup", "seconds from the command to the first token, by phase"),
}


def bench(argv: list[str]) -> int:
    """Exit code of the kind; help without one."""
    if not argv or argv[0] in ("-h", "--help"):
        lines = ["usage: hybrid-serve bench KIND [OPTION ...]", "", "Measures. KIND is one of:"]
        lines += [f"  {name:<12} {summary}" for name, (_, summary) in KINDS.items()]
        print("\n".join([*lines, "", "hybrid-serve bench KIND --help says more about one."]))
        return 0
    name, *rest = argv
    if name not in KINDS:
        raise UsageError(f"unknown kind {name!r}{did_you_mean(name, KINDS)}; there are {', '.join(KINDS)}")
    module = import_module(f".{KINDS[name][0]}", __package__)
    return int(getattr(module, name)(rest))
