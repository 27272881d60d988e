"""The options: each field of config.py as a flag, a variable and a key, and one function from text to its value."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import MISSING, dataclass, fields
from functools import cache
from typing import Any, Literal, NamedTuple, get_args, get_origin, get_type_hints

from ..config import Config, Option
from .usage import did_you_mean
from .vllm_flags import NOT_SUPPORTED, why_not

ENV_PREFIX = "HYBRID_SERVE_"

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([kmgt]i?)?b?", re.IGNORECASE | re.ASCII)
_BOOLEANS = {"true": True, "yes": True, "on": True, "1": True, "false": False, "no": False, "off": False, "0": False}


@dataclass(frozen=True)
class Setting:
    """One field of one group of the configuration, as the outside world sees it."""

    group: str
    name: str
    type: Any
    default: Any
    option: Option

    @property
    def flag(self) -> str:
        return "--" + self.name.replace("_", "-")

    @property
    def variable(self) -> str:
        return ENV_PREFIX + self.name.upper()

    @property
    def is_tuple(self) -> bool:
        return get_origin(self.type) is tuple

    @property
    def choices(self) -> tuple[str, ...]:
        return get_args(self.type) if get_origin(self.type) is Literal else ()

    def value(self, text: str) -> Any:
        """One text as a value of this option (of one of its elements, for a tuple). Raises ValueError without the text
        of a secret."""
        if self.choices:
            if text not in self.choices:
                raise ValueError(f"{text!r} is not one of {', '.join(self.choices)}")
            return text
        if self.type is bool:
            return _lookup(_BOOLEANS, text.lower(), f"{text!r} is not true or false")
        if self.type is int:
            return _whole_number(text, self.option.metavar)
        if self.type is float:
            return _parsed(float, text, "a number")
        return text

    @property
    def metavar(self) -> str:
        if self.choices:
            return "{" + ",".join(self.choices) + "}"
        return self.option.metavar or {int: "N", float: "X"}.get(self.type, "TEXT")

    def shown(self, value: Any) -> str:
        """The value for a log or a help text: as one would write it, secrets masked."""
        if self.option.secret and value:
            return "***"
        if self.is_tuple:
            return ",".join(value)
        if self.option.metavar == "N|auto" and value == 0:
            return "auto"
        if self.option.metavar == "SIZE" and value:
            unit = next(unit for unit in ("Ti", "Gi", "Mi", "Ki", "") if value % _UNITS[unit.lower()] == 0)
            return f"{value // _UNITS[unit.lower()]}{unit and unit + 'B'}"
        return str(value).lower() if self.type is bool else str(value)


class Given(NamedTuple):
    """What somebody wrote for an option, and where."""

    origin: str  # "--port", "HYBRID_SERVE_PORT", "server.yaml:3"
    texts: list[str]  # one, or any number for an option that is a list

    def place(self, name: str) -> str:
        """The beginning of a complaint: a flag and a variable name the option, a line of a file does not."""
        return f"{self.origin}: {name}" if ":" in self.origin else self.origin


@cache
def groups() -> Mapping[str, type[Any]]:
    """What config.py groups options in; evaluated once, so that a reload while the server runs evaluates nothing."""
    return get_type_hints(Config)


@cache
def settings() -> tuple[Setting, ...]:
    """Every option, in the order of config.py."""
    found = []
    for group, group_type in groups().items():
        hints = get_type_hints(group_type, include_extras=True)
        for field in fields(group_type):
            bare, option = get_args(hints[field.name])
            if field.default is MISSING:
                raise TypeError(f"{group}.{field.name} has no default")
            found.append(Setting(group, field.name, bare, field.default, option))
    return tuple(found)


def elements(text: str, separator: str | None) -> list[str]:
    """One text as texts of a list: a JSON list, as vLLM takes, or the parts between separators, or itself."""
    if text.startswith("["):
        try:
            found = json.loads(text)
        except ValueError:
            found = None
        if isinstance(found, list) and all(isinstance(item, str) for item in found):
            return found
    return text.split(separator) if separator else [text]


def refusal(word: str, known: Iterable[str]) -> str:
    """Why ``word``, a flag or a key that is not in ``known``, is refused."""
    name = word.lstrip("-").partition(".")[0].replace("_", "-")
    name = name if name in NOT_SUPPORTED else name.removeprefix("no-")
    if name in NOT_SUPPORTED:
        why = why_not(name)
        return f"not supported: {word}" + (f" ({why})" if why else "")
    return f"unknown option {word}{did_you_mean(word, known)}"


def _whole_number(text: str, metavar: str | None) -> int:
    if metavar == "N|auto" and text in ("auto", "-1"):  # -1 is vLLM's older word for it
        return 0
    if metavar != "SIZE":
        return int(_parsed(int, text, "a whole number" + (" or auto" if metavar == "N|auto" else "")))
    match = _SIZE.fullmatch(text.strip())
    if not match:
        raise ValueError(f"{text!r} is not a size such as 2GiB, 512MB or a number of bytes")
    amount, unit = match[1], _UNITS[(match[2] or "").lower()]
    return int(amount) * unit if amount.isdigit() else int(float(amount) * unit)


def _parsed(kind: Callable[[str], Any], text: str, what: str) -> Any:
    try:
        return kind(text)
    except ValueError:
        raise ValueError(f"{text[:80]!r} is not {what}") from None


def _lookup(table: Mapping[str, Any], key: str, otherwise: str) -> Any:
    if key not in table:
        raise ValueError(otherwise)
    return table[key]
