"""The YAML file of ``--models``: a mapping of names to options, read as the file of options is.

Each name is one that clients ask for; what stands below it is what that model differs in from what flags, variables
and --config say of all of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, replace
from typing import Any, get_args, get_type_hints

import yaml

from ..config import Config, RoutingConfig
from ..problems import problems
from ..served import MOST_ENGINES, OWN_GROUPS, OWN_OPTIONS, Budget, FileOnly, ServedModel
from .config_file import compose, line_of, of_mapping
from .options import convert
from .settings import Given, Setting, refusal, settings
from .usage import UsageError

_FILE_ONLY = "file"  # instead of a group of config.py
_NEVER = ("served_model_name",)  # the name is the key


def read_models(config: Config) -> list[ServedModel]:
    """The models of ``config.routing.models``, in the file's order. Raises UsageError, which names file and line."""
    path = config.routing.models
    root = compose(path, "--models")
    if not isinstance(root, yaml.MappingNode) or not root.value:
        raise UsageError(f"{path}: must be a mapping of names to options, such as `small: {{model: FOLDER}}`")
    known = _settings()
    found: dict[str, ServedModel] = {}
    first = 0
    for key, value in root.value:
        where = f"{path}:{line_of(key)}"
        name = str(key.value) if isinstance(key, yaml.ScalarNode) else ""
        if not name.strip() or not name.isprintable():
            raise UsageError(f"{where}: a key must be the name of a model")
        if name in found:
            raise UsageError(f"{where}: {name} is there twice")
        given = of_mapping(path, value, known, lambda word: _refusal(word, known))
        found[name] = model = _model(config, name, where, given, known, first)
        first = model.engines.stop
    budget = Budget(config.routing.max_loaded_models, config.routing.max_loaded_bytes)
    if not budget.holds(at_start := [model for model in found.values() if model.at_start]):
        names = ", ".join(model.name for model in at_start)
        raise UsageError(f"{path}: {names} are to be loaded at the start, more than may be loaded at once")
    if first > MOST_ENGINES:
        raise UsageError(f"{path}: its models have {first} engines, {MOST_ENGINES} may be")
    return list(found.values())


def _settings() -> dict[str, Setting]:
    """What may stand below a name."""
    own = [each for each in settings() if each.group in OWN_GROUPS or each.name in OWN_OPTIONS]
    hints = get_type_hints(FileOnly, include_extras=True)
    own += [Setting(_FILE_ONLY, each.name, *_type(hints[each.name], each.default)) for each in fields(FileOnly)]
    return {setting.name: setting for setting in own if setting.name not in _NEVER}


def _refusal(name: str, known: Mapping[str, Setting]) -> str:
    if name in {setting.name for setting in settings()}:
        return f"{name} is of the whole server, not of one model"
    return refusal(name, known)


def _type(hint: Any, default: Any) -> tuple[Any, Any, Any]:
    bare, option = get_args(hint)
    return bare, default, option


def _model(
    config: Config, name: str, where: str, given: Mapping[str, Given], known: Mapping[str, Setting], first: int
) -> ServedModel:
    values = {option: convert(known[option], *each) for option, each in given.items()}
    if not values.get("model"):
        raise UsageError(f"{where}: {name} has no model: a folder, a GGUF file or a hub id")
    own: dict[str, dict[str, Any]] = {}
    for option, value in values.items():
        own.setdefault(known[option].group, {})[option] = value
    file = FileOnly(**own.pop(_FILE_ONLY, {}))
    groups = {group: replace(getattr(config, group), **changes) for group, changes in own.items()}
    changed = replace(config, routing=RoutingConfig(), **groups)
    changed = replace(changed, model=replace(changed.model, served_model_name=(name,)))
    if wrong := problems(changed):
        raise UsageError(*(f"{given[bad].origin if bad in given else where}: {bad} {text}" for bad, text in wrong))
    most = config.routing.max_loaded_bytes
    if most and not 0 < file.memory <= most:
        is_said = f"is {file.memory}" if file.memory else "is not said"
        raise UsageError(f"{where}: memory of {name} {is_said}, max_loaded_bytes is {most}")
    return ServedModel(name=name, config=changed, memory=file.memory, at_start=file.at_start, first_engine=first)
