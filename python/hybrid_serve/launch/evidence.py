"""Evidence: what is kept of an engine that died, hangs or is asked about. Knows its memory and a folder."""

from __future__ import annotations

import logging
import tempfile
import time
from pathlib import Path

from .. import flight

log = logging.getLogger(__name__)


def keep(memory: memoryview, folder: str, engine: int, why: str) -> str:
    """Writes the recording in ``memory`` to a file and says so in the log; its path, or nothing if there is none."""
    recording = flight.read_memory(memory)
    if recording is None:
        log.debug("engine %d has recorded nothing yet", engine)
        return ""
    now = time.time()
    try:
        path = flight.new_path(Path(folder or tempfile.gettempdir()), engine, now)
        said = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(now))
        flight.write(path, recording, time=said, engine=engine, why=why)
    except (OSError, flight.BadRecording) as error:
        log.warning("the last steps of engine %d cannot be kept: %s", engine, error)
        return ""
    log.error("the last steps of engine %d are kept: hybrid-serve replay %s", engine, path)
    return str(path)
