"""From flags, environment and a YAML file to a Config: config.py is the list of options, this file only reads it.

An option ``max_num_seqs`` is the flag ``--max-num-seqs``, the variable ``HYBRID_SERVE_MAX_NUM_SEQS`` and the YAML key
``max_num_seqs``. A flag beats the environment, the environment the file, the file the default (F-64). All three bring
text, and one function turns text into a value, so an option means the same wherever it is written.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..config import Config
from ..problems import problems
from .settings import ENV_PREFIX, Given, Setting, elements, groups, refusal, settings
from .usage import Parser, UsageError, dashed, did_you_mean


@dataclass(frozen=True)
class Options:
    """A configuration and where each option came from that somebody set."""

    config: Config
    origins: Mapping[str, str]  # option name -> "--port", "HYBRID_SERVE_PORT", "server.yaml:3"; no entry: the default

    def summary(self) -> str:
        """One line for the start-up log: what is not a default, and who said so."""
        values = {s.name: s.shown(getattr(getattr(self.config, s.group), s.name)) for s in settings()}
        listed = ", ".join(f"{name}={values[name]} ({origin})" for name, origin in self.origins.items())
        count = len(self.origins)
        return f"{count} option{'' if count == 1 else 's'} set by you" + (f": {listed}" if listed else "")


def parse(argv: Sequence[str], environ: Mapping[str, str]) -> Options:
    """The configuration that ``[MODEL] [--flag ...]``, the environment and the file ask for. Raises UsageError, which
    names the flag, the variable or the file:line that is wrong."""
    known = {setting.name: setting for setting in settings()}
    arguments, extras = parser().parse_known_args(dashed(argv))
    if strangers := [word for word in extras if word.startswith("-")]:
        raise UsageError(refusal(strangers[0].partition("=")[0], [setting.flag for setting in known.values()]))
    if extras:
        raise UsageError(f"unexpected argument {extras[0]!r}: there is one MODEL, before options that take lists")
    flags = vars(arguments)
    model, file = flags.pop("MODEL"), flags.pop("config", environ.get(f"{ENV_PREFIX}CONFIG"))
    given: dict[str, Given] = {}
    if file is not None:
        from .config_file import read  # only here: most starts need no YAML

        given = read(file, known)
    given |= _from_environment(known, environ)
    for name, texts in flags.items():
        if known[name].is_tuple:
            texts = [part for text in texts for part in elements(text, None)]
        given[name] = Given(known[name].flag, texts)
    if model is not None:
        given["model"] = Given("MODEL", [model])
    # Only what wins is converted: a flag must be able to overrule a variable that holds nonsense.
    values = {name: convert(known[name], *given[name]) for name in given}
    config = _build(known, values)
    if wrong := problems(config):
        unset = {name: Given(known[name].flag, []) for name, _ in wrong}
        raise UsageError(*(f"{given.get(name, unset[name]).place(name)} {text}" for name, text in wrong))
    return Options(config, {name: origin for name, (origin, _) in given.items()})


def for_one_model(config: Config) -> Config:
    """The configuration itself, of a command that several models mean nothing to. Raises UsageError."""
    if config.routing.models:
        raise UsageError("--models: is for serve; this command takes one MODEL")
    return config


def stray_variables(environ: Mapping[str, str]) -> list[str]:
    """One line for each variable that looks like an option and is none, most likely a typo."""
    known = {"CONFIG", *(setting.name.upper() for setting in settings())}
    names = [name.removeprefix(ENV_PREFIX) for name in environ if name.startswith(ENV_PREFIX)]
    # Kubernetes sets the excepted ones for a service named hybrid-serve.
    strays = [name for name in names if name not in known and not name.startswith(("SERVICE_", "PORT_"))]
    return [f"{ENV_PREFIX}{name} is set but is no option{did_you_mean(name, known)}" for name in strays]


def parser(shown: Callable[[Setting], bool] = lambda setting: True) -> Parser:
    """The parser of ``serve``; every flag leaves a list of texts. ``shown`` picks what its help lists."""
    titles = {group: (group_type.__doc__ or "").rstrip(".") for group, group_type in groups().items()}
    made = Parser(
        "hybrid-serve serve",
        "Starts the OpenAI-compatible server. MODEL: a local folder, a GGUF file or a hub id; none: the demo model.",
        f"Every option is also a variable ({ENV_PREFIX}MAX_NUM_SEQS) and a key of the --config file (max_num_seqs);\n"
        "a flag beats a variable, a variable the file.",
        add_help=False,
    )
    made.usage = "hybrid-serve serve [MODEL] [OPTION ...]"
    made.add_argument("MODEL", nargs="?", help=argparse.SUPPRESS)
    made.add_argument(
        "-h",
        "--help",
        action="store_true",
        default=argparse.SUPPRESS,
        help=f"the common options; --help=all: every option; --help=GROUP: those of {', '.join(titles)}",
    )
    made.add_argument("--config", metavar="FILE", default=argparse.SUPPRESS, help="YAML file with options")
    shown_groups = {group: made.add_argument_group(f"{group}: {title}") for group, title in titles.items()}
    for setting in settings():
        _add_flag(shown_groups[setting.group], setting, shown(setting))
    return made


def help_text(what: str | None) -> str:
    """``what``: None for the common options, "all", or the name of a group."""
    names = groups()
    if what is None:
        return parser(lambda setting: setting.option.common).format_help()
    if what == "all":
        return parser().format_help()
    if what not in names:
        raise UsageError(
            f"--help={what}: no such group{did_you_mean(what, names)}; there are {', '.join(names)} and all"
        )
    return parser(lambda setting: setting.group == what).format_help()


def _add_flag(group: argparse._ArgumentGroup, setting: Setting, shown: bool) -> None:
    option = setting.option
    names = [setting.flag, *([option.short] if option.short else [])]
    default = f" (default: {setting.shown(setting.default)})" if _says_something(setting.default) else ""
    text = (option.help + default).replace("%", "%%") if shown else argparse.SUPPRESS
    common: dict[str, Any] = {"dest": setting.name, "default": argparse.SUPPRESS}
    if setting.type is bool:
        group.add_argument(*names, action="store_const", const=["true"], help=text, **common)
        opposite = f"the opposite of {setting.flag}" if shown and setting.default else argparse.SUPPRESS
        group.add_argument(f"--no-{setting.flag[2:]}", action="store_const", const=["false"], help=opposite, **common)
        return
    many: dict[str, Any] = {"nargs": "+", "action": "extend"} if setting.is_tuple else {"nargs": 1}
    group.add_argument(*names, metavar=setting.metavar, help=text, **common, **many)


def _says_something(default: Any) -> bool:
    return default is not False and default not in ("", ())


def _from_environment(known: Mapping[str, Setting], environ: Mapping[str, str]) -> dict[str, Given]:
    found = {}
    for setting in known.values():
        text = environ.get(setting.variable)
        if text is not None:
            found[setting.name] = Given(setting.variable, elements(text, ",") if setting.is_tuple else [text])
    return found


def convert(setting: Setting, origin: str, texts: list[str]) -> Any:
    """What somebody wrote as the option's value. Raises UsageError."""
    try:
        if setting.is_tuple:
            return tuple(setting.value(text) for text in texts)
        return setting.value(texts[0])
    except ValueError as error:
        hint = ""
        if origin == setting.variable and texts[0].startswith("tcp://"):
            hint = " (Kubernetes sets this variable for a service named hybrid-serve: enableServiceLinks: false)"
        raise UsageError(f"{Given(origin, texts).place(setting.name)}: {error}{hint}") from None


def _build(known: Mapping[str, Setting], values: Mapping[str, Any]) -> Config:
    made = {}
    for group, group_type in groups().items():
        made[group] = group_type(**{name: value for name, value in values.items() if known[name].group == group})
    return Config(**made)
