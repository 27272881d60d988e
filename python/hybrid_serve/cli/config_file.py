"""The YAML file of options: one mapping of keys to scalars or lists of scalars, read as text with its line numbers.

Values stay text (``revision: 1e5`` is the revision "1e5", ``no`` for a name is "no"): settings.py gives them their
type, as it does for flags. Nothing is constructed from YAML tags, and nesting is refused, so aliases cannot multiply.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import yaml

from .settings import Given, Setting, refusal
from .usage import UsageError

MAX_BYTES = 2**20
# What YAML makes of a plain or quoted text; any other tag was written by hand and asks for an object.
_TEXT_TAGS = {f"tag:yaml.org,2002:{kind}" for kind in ("str", "int", "float", "bool", "timestamp", "value", "merge")}


def read(path: str, known: Mapping[str, Setting]) -> dict[str, Given]:
    """Option name -> what the file says. Raises UsageError for what is no such file, for an unknown or repeated key and
    for a value that is neither a scalar nor a list of scalars."""
    root = compose(path, "--config")
    return {} if root is None else of_mapping(path, root, known, lambda name: refusal(name, known))


def of_mapping(
    path: str, root: yaml.Node, known: Mapping[str, Setting], refuse: Callable[[str], str]
) -> dict[str, Given]:
    """The same of a part of a file. ``refuse``: what to say of a key that is not known."""
    if not isinstance(root, yaml.MappingNode):
        raise UsageError(f"{path}:{line_of(root)}: must be a mapping of options, such as `port: 8000`")
    given: dict[str, Given] = {}
    for key, value in root.value:
        name, where = _name(path, key), f"{path}:{line_of(key)}"
        if name in given:
            raise UsageError(f"{where}: {name} is set twice, first at {given[name].origin}")
        if name not in known:
            raise UsageError(f"{where}: {refuse(name)}")
        given[name] = Given(where, _texts(where, name, value, known[name].is_tuple))
    return given


def compose(path: str, flag: str) -> yaml.Node | None:
    """The file's tree, without a value made of it; None: it is empty. ``flag``: that named it. Raises UsageError."""
    try:
        with open(path, "rb") as file:
            data = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise UsageError(f"{flag} {path}: {error.strerror}") from None
    if len(data) > MAX_BYTES:
        raise UsageError(f"{flag} {path}: larger than {MAX_BYTES} bytes")
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
        raise UsageError(f"{path}:{line_of(key)}: a key must be the name of an option")
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


def line_of(node: yaml.Node) -> int:
    return int(node.start_mark.line) + 1
