"""``config explain``: each option's effective value and who set it, without starting anything."""

from __future__ import annotations

import json
import os

from . import options
from .settings import settings
from .usage import Parser, UsageError, dashed, did_you_mean


def config(argv: list[str]) -> int:
    """Prints the configuration that `serve` with the same words would run with."""
    parser = Parser(
        "hybrid-serve config",
        "config explain [MODEL] [OPTION ...]: the options that serve would run with, and where each came from.",
        "Further words are those of serve.",
    )
    parser.usage = "hybrid-serve config explain [MODEL] [OPTION ...]"
    parser.add_argument("--all", action="store_true", help="also the options that nobody set")
    parser.add_argument("--json", action="store_true", help="as one JSON object, with all")
    arguments, rest = parser.parse_known_args(dashed(argv))
    action, rest = (rest[0], rest[1:]) if rest else ("", [])
    if action.startswith("-"):
        options.parse([action, *rest], os.environ)  # a flag that no command has is refused by its name
    if action != "explain":
        raise UsageError(f"expected explain, got {action!r}{did_you_mean(action, ['explain'])}")
    chosen = options.parse(rest, os.environ)
    found = explained(chosen)
    if arguments.json:
        print(json.dumps(found, indent=1))
        return 0
    shown = {name: one for name, one in found.items() if arguments.all or one["origin"] != "default"}
    width = max((len(name) for name in shown), default=0)
    for name, one in shown.items():
        note = "" if one["origin"] == "default" else f"   (default {one['default'] or 'none'})"
        print(f"{name:<{width}}  {one['value'] or 'none':<24} {one['origin']}{note}")
    hidden = len(found) - len(shown)
    if hidden:
        print(f"{hidden} options have their defaults; --all shows them")
    for line in options.stray_variables(os.environ):
        print(f"note: {line}")
    return 0


def explained(chosen: options.Options) -> dict[str, dict[str, str]]:
    """Option name -> value, origin and default, as texts; secrets are masked."""
    found = {}
    for setting in settings():
        value = setting.shown(getattr(getattr(chosen.config, setting.group), setting.name))
        origin = chosen.origins.get(setting.name, "default")
        found[setting.name] = {"value": value, "origin": origin, "default": setting.shown(setting.default)}
    return found
