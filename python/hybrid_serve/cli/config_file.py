"""The YAML file of options: one mapping of keys to scalars or lists of scalars, read as text with its line numbers.

Values stay text (``revision: 1e5`` is the revision "1e5", ``no`` for a name is "no"): settings.py gives them their
type, as it does for flags. Nothing is constructed from YAML tags, and nesting is refused, so aliases cannot multiply.
"""

from __future__ import annotations

from collections.abc import Mapping

import yaml

from .settings import Given, Setting, refusal
from .usage import UsageError

MAX_BYTES = 2**20
# What YAML makes of a plain or quoted text; any other tag was written by hand and asks for an object.
_TEXT_TAGS = {f"tag:yaml.org,2002:{kind}" for kind in ("str", "int", "float", "bool", "timestamp", "value", "merge")}


def read(path: str, known: Mapping[str, Setting]) -> dict[str, Given]:
    """Option name -> what the file says. Raises UsageError for what is no such file, for an unknown or repeated key and
    for a value that is neither a scalar nor a list of scalars."""
    root = _compose(path)
    if root is None:
        return {}
    if not isinstance(root, yaml.MappingNode):
        raise UsageError(f"{path}:{_line(root)}: must be a mapping of options, such as `port: 8000`")
    given: dict[str, Given] = {}
    for key, value in root.value:
        name, where = _name(path, key), f"{path}:{_line(key)}"
        if name in given:
            raise UsageError(f"{where}: {name} is set twice, first at {given[name].origin}")
        if name not in known:
            raise UsageError(f"{where}: {refusal(name, known)}")
        given[name] = Given(where, _texts(where, name, value, known[name].is_tuple))
    return given


def _compose(path: str) -> yaml.Node | None:
    try:
        with open(path, "rb") as file:
            data = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise UsageError(f"--config {path}: {error.strerror}") from None
    if len(data) > MAX_BYTES:
        raise UsageError(f"--config {path}: larger than {MAX_BYTES} bytes")
    try:
        return yaml.compose(data, Loader=yaml.SafeLoader)
    except RecursionError:
        raise UsageError(f"{path}: nested too deeply") from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        raise UsageError(f"{path}:{mark.line + 1 if mark else 1}: {error.problem or error.context}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UsageError(f"{path}: not YAML: {' '.join(str(error).split())}") from None


def _name(path: str, key: yaml.Node) -> str:
    if not isinstance(key, yaml.ScalarNode):
        raise UsageError(f"{path}:{_line(key)}: a key must be the name of an option")
    return str(key.value).replace("-", "_")


def _texts(where: str, name: str, value: yaml.Node, is_tuple: bool) -> list[str]:
    items = value.value if isinstance(value, yaml.SequenceNode) else [value]
    if isinstance(value, yaml.SequenceNode) and not is_tuple:
        raise UsageError(f"{where}: {name} takes one value, not a list")
    for item in items:
        if not isinstance(item, yaml.ScalarNode):
            raise UsageError(f"{where}: {name} takes {'values' if is_tuple else 'one value'}, not a nested structure")
        if item.tag == "tag:yaml.org,2002:null":
            raise UsageError(f"{where}: {name} has no value")
        if item.tag not in _TEXT_TAGS:
            raise UsageError(f"{where}: {name} has the tag {item.tag}, which has no meaning here")
    return [str(item.value) for item in items]


def _line(node: yaml.Node) -> int:
    return int(node.start_mark.line) + 1
