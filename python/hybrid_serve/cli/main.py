"""The command ``hybrid-serve``: finds the sub-command and imports only that one, so that help costs nothing."""

from __future__ import annotations

import os
import sys
from importlib import import_module
from typing import NamedTuple

from .. import __version__
from .usage import UsageError, did_you_mean


class Command(NamedTuple):
    """Where a sub-command lives: ``module`` of this package has a function ``function(argv) -> exit code``."""

    module: str
    function: str
    summary: str


COMMANDS = {
    "serve": Command("serve", "serve", "start the OpenAI-compatible server"),
    "fit": Command("fit", "fit", "say which context and how many requests fit in memory, before any download"),
    "chat": Command("openai", "chat", "talk to a running server"),
    "complete": Command("openai", "complete", "let a running server continue a text"),
    "run-batch": Command("batch.command", "run_batch", "answer a file of requests into a file of results"),
    "bench": Command("bench.command", "bench", "measure a server, the engine, or a start"),
    "ps": Command("ps", "ps", "list the servers of this user"),
    "config": Command("config_explain", "config", "show each option's value and where it came from"),
    "translate": Command("translate", "translate", "turn a command of vllm serve or llama-server into ours"),
    "keys": Command("keys", "keys", "make the key that engines on several machines share"),
    "doctor": Command("doctor", "doctor", "check this machine, with a fix for each fault; pack a bug report"),
    "replay": Command("replay", "replay", "run a crashed engine's last steps again and compare every decision"),
    "explain": Command("explain", "explain", "say what an error's number (HS-E###) means and what helps"),
    "collect-env": Command("collect_env", "collect_env", "print what a bug report needs to know"),
    "completion": Command("completion", "completion", "print the completion script of a shell"),
}


def usage() -> str:
    lines = ["usage: hybrid-serve COMMAND [OPTION ...]", "", "An OpenAI-compatible LLM server.", "", "commands:"]
    lines += [f"  {name:<12} {command.summary}" for name, command in COMMANDS.items()]
    lines += ["", "options:", "  -h, --help     this text", "  -v, --version  the version", ""]
    return "\n".join([*lines, "hybrid-serve COMMAND --help says more about one."])


def main(argv: list[str] | None = None) -> int:
    """Runs a command; returns its exit code (0 done, 2 usage; others: errors.py)."""
    argv = sys.argv[1:] if argv is None else argv
    try:
        code = _dispatch(argv)
        sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # The reader left (`| head`). Python would complain once more when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141


def _dispatch(argv: list[str]) -> int:
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(usage())
        return 0
    name, *rest = argv
    if name in ("-v", "-V", "--version"):
        print(__version__)
        return 0
    if name not in COMMANDS:
        kind = "option" if name.startswith("-") else "command"
        return _refused("hybrid-serve", [f"unknown {kind} {name!r}{did_you_mean(name, COMMANDS)}"])
    try:
        command = COMMANDS[name]
        module = import_module(f".{command.module}", __package__)
        return int(getattr(module, command.function)(rest))
    except UsageError as error:
        return _refused(f"hybrid-serve {name}", error.lines)


def _refused(prog: str, lines: list[str] | tuple[str, ...]) -> int:
    for line in lines:
        print(f"{prog}: {line}", file=sys.stderr)
    print(f"{prog} --help lists what there is.", file=sys.stderr)
    return 2
