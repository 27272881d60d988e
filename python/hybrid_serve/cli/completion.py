"""``completion bash|zsh|fish``: a script that completes commands and flags without starting Python at every TAB.

The flags are read from each command's own --help, so there is no second list of them.
"""

from __future__ import annotations

import contextlib
import io
import re
from collections.abc import Callable, Mapping

from . import main
from .bench.command import KINDS
from .settings import settings
from .usage import Parser, UsageError, did_you_mean

_FLAG_LINE = re.compile(r"^  +(-[\w-]+.*?)(?:  |$)", re.MULTILINE)
_FLAG = re.compile(r"(?<![\w-])--?[a-z][a-z0-9-]*")


def completion(argv: list[str]) -> int:
    """Prints the script."""
    parser = Parser(
        "hybrid-serve completion",
        'Prints the completion script of a shell: eval "$(hybrid-serve completion bash)" in ~/.bashrc.',
    )
    parser.add_argument("SHELL", nargs="?", help=", ".join(_SHELLS))
    shell = parser.parse_args(argv).SHELL
    if shell not in _SHELLS:
        raise UsageError(f"name a shell: {', '.join(_SHELLS)}{did_you_mean(shell or '', _SHELLS)}")
    print(_SHELLS[shell](flags()))
    return 0


def flags() -> dict[str, list[str]]:
    """Command ("serve", "bench sweep") -> its flags."""
    found = {}
    for name in main.COMMANDS:
        found[name] = _flags_of([name])
    for kind in KINDS:
        found[f"bench {kind}"] = _flags_of(["bench", kind])
    found["serve"] = _flags_of(["serve"], "--help=all")
    for name in ("run-batch", "fit", "config", "bench throughput", "bench latency", "bench startup"):
        found[name] = list(dict.fromkeys([*found[name], *found["serve"]]))  # they take serve's options, too
    return found


def _flags_of(command: list[str], flag: str = "--help") -> list[str]:
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.suppress(SystemExit):
        main.main([*command, flag])
    lines = _FLAG_LINE.findall(said.getvalue())
    return sorted({flag for line in lines for flag in _FLAG.findall(line) if flag.startswith("--")})


def _choices() -> dict[str, tuple[str, ...]]:
    return {setting.flag: setting.choices for setting in settings() if setting.choices}


def _bash(found: Mapping[str, list[str]]) -> str:
    cases = "\n".join(f'    "{name}") words="{" ".join(words)}" ;;' for name, words in found.items())
    values = "\n".join(
        f'    {flag}) COMPREPLY=($(compgen -W "{" ".join(choices)}" -- "$word")); return ;;'
        for flag, choices in _choices().items()
    )
    return f"""_hybrid_serve() {{
  local word="${{COMP_WORDS[COMP_CWORD]}}" last="${{COMP_WORDS[COMP_CWORD - 1]}}" command="${{COMP_WORDS[1]}}" words=
  if [ "$COMP_CWORD" -eq 1 ]; then COMPREPLY=($(compgen -W "{" ".join(main.COMMANDS)}" -- "$word")); return; fi
  if [ "$command" = bench ]; then
    if [ "$COMP_CWORD" -eq 2 ]; then COMPREPLY=($(compgen -W "{" ".join(KINDS)}" -- "$word")); return; fi
    command="bench ${{COMP_WORDS[2]}}"
  fi
  case "$last" in
{values}
  esac
  case "$command" in
{cases}
  esac
  case "$word" in
    -*) COMPREPLY=($(compgen -W "$words" -- "$word")) ;;
    *) COMPREPLY=() ;;
  esac
}}
complete -o default -F _hybrid_serve hybrid-serve"""


def _zsh(found: Mapping[str, list[str]]) -> str:
    cases = "\n".join(f'    "{name}") flags=({" ".join(words)}) ;;' for name, words in found.items())
    commands = " ".join(f"'{name}:{command.summary}'" for name, command in _summaries().items())
    kinds = " ".join(f"'{name}:{_quoted(summary)}'" for name, (_, summary) in KINDS.items())
    values = "\n".join(f"    {flag}) compadd {' '.join(choices)}; return ;;" for flag, choices in _choices().items())
    return f"""#compdef hybrid-serve
_hybrid_serve() {{
  local command="$words[2]"
  local -a entries flags
  if (( CURRENT == 2 )); then entries=({commands}); _describe command entries; return; fi
  if [[ "$command" == bench ]]; then
    if (( CURRENT == 3 )); then entries=({kinds}); _describe kind entries; return; fi
    command="bench $words[3]"
  fi
  case "$words[CURRENT-1]" in
{values}
  esac
  case "$command" in
{cases}
  esac
  if [[ "$words[CURRENT]" == -* ]]; then compadd -- $flags; else _files; fi
}}
compdef _hybrid_serve hybrid-serve"""


def _fish(found: Mapping[str, list[str]]) -> str:
    lines = [
        f"complete -c hybrid-serve -n __fish_use_subcommand -f -a {name} -d '{command.summary}'"
        for name, command in _summaries().items()
    ]
    only = "__fish_seen_subcommand_from bench; and not __fish_seen_subcommand_from " + " ".join(KINDS)
    for name, (_, summary) in KINDS.items():
        lines.append(f"complete -c hybrid-serve -n '{only}' -f -a {name} -d '{_quoted(summary)}'")
    choices = _choices()
    for name, words in found.items():
        seen = "; and ".join(f"__fish_seen_subcommand_from {word}" for word in name.split())
        for word in words:
            values = f" -x -a '{' '.join(choices[word])}'" if word in choices else ""
            lines.append(f"complete -c hybrid-serve -n '{seen}' -l {word[2:]}{values}")
    return "\n".join(lines)


def _summaries() -> dict[str, main.Command]:
    return {name: command._replace(summary=_quoted(command.summary)) for name, command in main.COMMANDS.items()}


def _quoted(text: str) -> str:
    """For single quotes in zsh and fish, and _describe's colon."""
    return text.replace("'", "").replace(":", " -")


_SHELLS: dict[str, Callable[[Mapping[str, list[str]]], str]] = {"bash": _bash, "zsh": _zsh, "fish": _fish}
