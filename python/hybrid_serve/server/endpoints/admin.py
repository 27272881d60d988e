"""GET and PATCH /admin/config: what of the configuration can be changed while the server runs."""

from __future__ import annotations

import logging
from dataclasses import fields, replace
from typing import Any, get_type_hints

import msgspec
from msgspec import UNSET, UnsetType

from ... import logging as log_lines
from ...config import Config, problems
from ..context import ServerContext
from ..errors import ApiError, invalid

log = logging.getLogger(__name__)

# Fields of config.py that are read again for every request, and what besides has to be told of a change.
LIVE = (
    "log_level",
    "access_log",
    "log_requests",
    "max_log_len",
    "max_num_queued_reqs",
    "max_request_bytes",
    "max_logprobs",
    "strict_requests",
    "sse_keep_alive_interval",
)


def _types() -> dict[str, tuple[str, Any]]:
    """By option: its group and its type."""
    found: dict[str, tuple[str, Any]] = {}
    for group, group_type in get_type_hints(Config).items():
        hints = get_type_hints(group_type)
        found |= {field.name: (group, hints[field.name]) for field in fields(group_type) if field.name in LIVE}
    return {name: found[name] for name in LIVE}


_TYPES = _types()
LiveConfig = msgspec.defstruct("LiveConfig", [(name, kind) for name, (_, kind) in _TYPES.items()])
ConfigChanges = msgspec.defstruct(
    "ConfigChanges", [(name, kind | UnsetType, UNSET) for name, (_, kind) in _TYPES.items()], forbid_unknown_fields=True
)


def live_config(context: ServerContext) -> msgspec.Struct:
    """The values of now."""
    return LiveConfig(*(getattr(getattr(context.config, group), name) for name, (group, _) in _TYPES.items()))


def change_config(context: ServerContext, changes: Any, who: str) -> msgspec.Struct:
    """All of the changes or none; for this API server, except ``max_num_queued_reqs``, which is the engine's. The new
    values. Raises ``ApiError``."""
    given = {name: value for name in LIVE if (value := getattr(changes, name)) is not UNSET}
    new = context.config
    for name, value in given.items():
        group = _TYPES[name][0]
        new = replace(new, **{group: replace(getattr(new, group), **{name: value})})
    for name, wrong in problems(new):
        raise invalid(name, f"'{name}' {wrong}")
    if not given:
        raise ApiError("missing_required_parameter", f"Give at least one of {', '.join(LIVE)}.")
    log.warning("admin: %s sets %s", who, ", ".join(f"{name}={value}" for name, value in given.items()))
    context.config = new
    if "log_level" in given:
        log_lines.set_level(new.server.log_level)
    if "max_num_queued_reqs" in given:
        context.client.limit_queue(new.scheduler.max_num_queued_reqs)
    return live_config(context)
