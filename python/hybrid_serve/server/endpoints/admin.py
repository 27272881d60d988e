"""GET and PATCH /admin/config: what of the configuration can be changed while the server runs."""

from __future__ import annotations

import logging
from typing import Any, get_type_hints

import msgspec
from msgspec import UNSET, UnsetType

from ...config import Config
from ...live import GROUP_OF, LIVE, live_problems, value_of, with_values
from ..context import ServerContext
from ..errors import ApiError, invalid

log = logging.getLogger(__name__)


def _types() -> dict[str, Any]:
    """By option."""
    hints = {group: get_type_hints(group_type) for group, group_type in get_type_hints(Config).items()}
    return {name: hints[GROUP_OF[name]][name] for name in LIVE}


_TYPES = _types()
LiveConfig = msgspec.defstruct("LiveConfig", [*_TYPES.items()])
ConfigChanges = msgspec.defstruct(
    "ConfigChanges", [(name, kind | UnsetType, UNSET) for name, kind in _TYPES.items()], forbid_unknown_fields=True
)


def live_config(context: ServerContext) -> msgspec.Struct:
    """The values of now."""
    return LiveConfig(*(value_of(context.config, name) for name in LIVE))


def change_config(context: ServerContext, changes: Any, who: str) -> msgspec.Struct:
    """All of the changes or none, for every API server and those that come later. The new values. Raises
    ``ApiError``."""
    given = {name: value for name in LIVE if (value := getattr(changes, name)) is not UNSET}
    for name, wrong in live_problems(context.started_with, with_values(context.config, given)):
        raise invalid(name, f"'{name}' {wrong}")
    if not given:
        raise ApiError("missing_required_parameter", f"Give at least one of {', '.join(LIVE)}.")
    log.warning("admin: %s sets %s", who, ", ".join(f"{name}={value}" for name, value in given.items()))
    context.live.change(given)
    context.take_news()
    return live_config(context)
