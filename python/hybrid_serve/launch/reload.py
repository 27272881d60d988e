"""SIGHUP: the options that can change while a server runs are set to what the configuration says by now."""

from __future__ import annotations

import logging
from collections.abc import Callable

from .. import logging as log_lines
from ..config import Config
from ..live import GROUP_OF, LIVE, LiveOptions, live_problems, value_of

log = logging.getLogger(__name__)


class Reload:
    """Asks for the configuration again and passes it on. Knows no process and no file."""

    def __init__(self, started_with: Config, read: Callable[[], Config] | None, live: LiveOptions) -> None:
        """``read`` raises ValueError for a configuration that cannot be."""
        self._started_with, self._read, self._live = started_with, read, live

    def __call__(self) -> None:
        """All of it or nothing. What was set by PATCH /admin/config is overruled."""
        if self._read is None:
            log.warning("SIGHUP: nothing to read again")
            return
        try:
            wanted = self._read()
            for name, wrong in live_problems(self._started_with, wanted):
                raise ValueError(f"{name} {wrong}")
        except ValueError as error:
            log.error("SIGHUP: the new configuration is not used, all stays as it is: %s", error)
            return
        values = {name: value_of(wanted, name) for name in LIVE}
        self._live.change(values)
        log_lines.set_level(wanted.server.log_level)
        log.warning("SIGHUP sets %s", ", ".join(f"{name}={value}" for name, value in values.items()))
        others = [name for name in GROUP_OF if name not in LIVE and self._differs(wanted, name)]
        if others:
            log.warning("SIGHUP: changed, and taken up by a restart only: %s", ", ".join(others))

    def _differs(self, wanted: Config, name: str) -> bool:
        return bool(value_of(wanted, name) != value_of(self._started_with, name))
