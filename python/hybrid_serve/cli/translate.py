"""``translate 'vllm serve ...'``: another server's command as ours, and what of it has no counterpart."""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field

from . import options
from .settings import Setting, settings
from .usage import Parser, UsageError

# Flags that need no counterpart, or have another: what to say instead of "not supported".
_VLLM_NOTES = {
    "async-scheduling": "not needed: the loop overlaps where the device gains by it",
    "chat-template-content-format": "not needed: found out from the template",
    "disable-log-stats": "not needed: no statistics are logged",
    "disable-uvicorn-access-log": "not needed: no access log is written",
    "enable-chunked-prefill": "not needed: always on",
    "enable-prompt-tokens-details": "not needed: always in usage",
    "kv-cache-memory": "there is --kv-cache-memory-bytes SIZE; hybrid-serve fit MODEL says which",
    "trust-remote-code": "never: no code of a model folder is run",
}
# llama-server's flag -> ours ("MODEL": the positional one); flags without a value are in the second table.
_LLAMA = {
    "m": "MODEL",
    "model": "MODEL",
    "hf": "MODEL",
    "hfr": "MODEL",
    "hf-repo": "MODEL",
    "a": "served-model-name",
    "alias": "served-model-name",
    "api-key": "api-key",
    "b": "max-num-batched-tokens",
    "batch-size": "max-num-batched-tokens",
    "c": "max-model-len",
    "ctx-size": "max-model-len",
    "chat-template": "chat-template",
    "chat-template-file": "chat-template",
    "host": "host",
    "np": "max-num-seqs",
    "parallel": "max-num-seqs",
    "port": "port",
    "s": "seed",
    "seed": "seed",
    "t": "cpu-threads",
    "threads": "cpu-threads",
}
_PROGRAMS = {"vllm": "vllm", "llama-server": "llama", "hybrid-serve": "vllm"}
_VLLM_MODULE = "vllm.entrypoints.openai.api_server"


@dataclass
class Translation:
    """Our words, and a line for each of theirs that has none."""

    words: list[str] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)


def translate(argv: list[str]) -> int:
    """Prints our command; on stderr what was left out. 2: our command would be refused."""
    parser = Parser(
        "hybrid-serve translate",
        "Turns a command of vllm serve or llama-server into ours, and says what it leaves out.",
    )
    parser.usage = "hybrid-serve translate 'vllm serve MODEL ...' | -- vllm serve MODEL ..."
    parser.add_argument("COMMAND", nargs="*", help="in quotes, or as words after --")
    if "--" in argv:
        words = argv[argv.index("--") + 1 :]
    else:
        words = parser.parse_args(argv).COMMAND
        words = shlex.split(words[0], comments=True) if len(words) == 1 else words
    found = translated(words)
    print(shlex.join(["hybrid-serve", "serve", *found.words]))
    for line in found.left_out:
        print(f"left out: {line}", file=sys.stderr)
    options.parse(found.words, {})  # a value that we refuse is refused now
    return 0


def translated(words: list[str]) -> Translation:
    """Raises UsageError for a command that is neither vLLM's nor llama.cpp's."""
    words = [word for word in words if word.strip() and word != "\n"]
    while words and re.fullmatch(r"[A-Za-z_]\w*=.*", words[0]):
        words = words[1:]  # VARIABLE=value before the command
    if _VLLM_MODULE in words:
        return _from_vllm(words[words.index(_VLLM_MODULE) + 1 :])
    program = _PROGRAMS.get(words[0].rpartition("/")[2]) if words else None
    if program == "llama":
        return _from_llama(words[1:])
    if program == "vllm" and words[1:2] == ["serve"]:
        return _from_vllm(words[2:])
    raise UsageError(f"expected vllm serve ... or llama-server ..., got {shlex.join(words[:2])!r}")


def _from_vllm(words: list[str]) -> Translation:
    known: Mapping[str, Setting] = {setting.flag[2:]: setting for setting in settings()}
    found = Translation()
    for flag, values in _flags(words):
        name = flag.lstrip("-").replace("_", "-")
        positive = name.removeprefix("no-") if name not in known else name
        if not flag:
            found.words += values
        elif name == "config":
            found.left_out.append(
                f"{shlex.join([flag, *values])}: its keys are vLLM's; see hybrid-serve config explain"
            )
        elif positive in known:
            found.words += [f"--{name}", *values]
        else:
            why = _VLLM_NOTES.get(positive.partition(".")[0], "no counterpart")
            found.left_out.append(f"{shlex.join([flag, *values])}: {why}")
    return found


def _from_llama(words: list[str]) -> Translation:
    found = Translation()
    for flag, values in _flags(words):
        ours = _LLAMA.get(flag.lstrip("-").replace("_", "-")) if flag else None
        if ours == "MODEL" and len(values) == 1:
            found.words[:0] = values
        elif ours is not None:
            found.words += [f"--{ours}", *values]
        else:
            found.left_out.append(f"{shlex.join([word for word in (flag, *values) if word])}: no counterpart")
    return found


def _flags(words: list[str]) -> list[tuple[str, list[str]]]:
    """(flag, its values) in order; the flag is empty for words before the first one."""
    found: list[tuple[str, list[str]]] = []
    for word in words:
        # A negative number is a value.
        if word.startswith("-") and not re.fullmatch(r"-\d+(\.\d+)?", word):
            name, equals, value = word.partition("=")
            found.append((name, [value] if equals else []))
        elif found:
            found[-1][1].append(word)
        else:
            found.append(("", [word]))
    return found
