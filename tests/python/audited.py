"""What servers under test did that they should not: the file that ``audit_hook`` writes in their processes."""

from __future__ import annotations

import os
from pathlib import Path

import audit_hook

SITE = str(Path(__file__).parent / "audited_site")


class Audited:
    """Programs that are started in ``environment`` are watched."""

    def __init__(self, folder: Path) -> None:
        self._file = folder / "events"
        self._file.touch()
        self._read = 0
        paths = [SITE, *filter(None, [os.environ.get("PYTHONPATH")])]
        self.environment = {"PYTHONPATH": os.pathsep.join(paths), audit_hook.FILE: str(self._file)}

    def take(self) -> list[str]:
        """The events since this was asked last."""
        with self._file.open(errors="replace") as file:
            file.seek(self._read)
            found = file.read()
            self._read = file.tell()
        return found.splitlines()
