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
from .vllm_flags import INSTEAD, SECRET_VARIABLES, VARIABLES, why_not

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
    """Our words, what stands before the command, and a line for each of theirs that has none."""

    words: list[str] = field(default_factory=list)
    variables: list[str] = field(default_factory=list)
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
    before = [f"{name}={shlex.quote(value)}" for name, _, value in (each.partition("=") for each in found.variables)]
    print(" ".join([*before, shlex.join(["hybrid-serve", "serve", *found.words])]))
    for line in found.left_out:
        print(f"left out: {line}", file=sys.stderr)
    options.parse(found.words, {})  # a value that we refuse is refused now
    return 0


def translated(words: list[str]) -> Translation:
    """Raises UsageError for a command that is neither vLLM's nor llama.cpp's."""
    words = [word for word in words if word.strip() and word != "\n"]
    num_before = next((i for i, word in enumerate(words) if not re.fullmatch(r"(?s)[A-Za-z_]\w*=.*", word)), len(words))
    before, words = words[:num_before], words[num_before:]
    if _VLLM_MODULE in words:
        return _with_variables(before, _from_vllm(words[words.index(_VLLM_MODULE) + 1 :]))
    program = _PROGRAMS.get(words[0].rpartition("/")[2]) if words else None
    if program == "llama":
        return _with_variables(before, _from_llama(words[1:]))
    if program == "vllm" and words[1:2] == ["serve"]:
        return _with_variables(before, _from_vllm(words[2:]))
    raise UsageError(f"expected vllm serve ... or llama-server ..., got {shlex.join(words[:2])!r}")


def _from_vllm(words: list[str]) -> Translation:
    known: Mapping[str, Setting] = {
        spelling.lstrip("-"): setting
        for setting in settings()
        for spelling in (setting.flag, setting.option.short)
        if spelling
    }
    found, others = Translation(), set()
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
            found.words += [known[name].flag if name in known else f"--{name}", *values]
        elif name in INSTEAD:
            others.add(name)
        else:
            why = "not needed: the default" if positive in INSTEAD else why_not(positive) or "no counterpart"
            found.left_out.append(f"{shlex.join([flag, *values])}: {why}")
    # By our flag: of two that mean the same one the later of the table counts.
    for ours in {INSTEAD[name][0]: INSTEAD[name] for name in INSTEAD if name in others}.values():
        found.words += ours
    return found


def _with_variables(before: list[str], found: Translation) -> Translation:
    """``before``: VARIABLE=value in front of the command. Those of vLLM's own become ours or are named, others stay."""
    for word in before:
        name, _, value = word.partition("=")
        if name in VARIABLES:
            found.words += [VARIABLES[name], value]
        elif name in SECRET_VARIABLES:
            found.variables.append(f"{SECRET_VARIABLES[name]}={value}")
        elif name.startswith("VLLM_"):
            found.left_out.append(f"{word}: no counterpart")
        else:
            found.variables.append(word)
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
