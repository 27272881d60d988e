"""The private directory of one run, which holds its sockets."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import tempfile
from pathlib import Path
from types import TracebackType

PREFIX = "hybrid-serve-"
LOCK = "lock"
LONGEST_SOCKET_PATH = 107  # bytes, of sockaddr_un
LONGEST_NAME = len("/lockstep-000")


class RunDirectory:
    """Mode 0700, made on entering, removed on leaving; one that a killed run left behind is removed by the next run."""

    def __enter__(self) -> Path:
        base = _base()
        _remove_stale(base)
        self.path = Path(tempfile.mkdtemp(prefix=PREFIX, dir=base))
        # Held as long as this process lives, however it ends. Renamed, so that no other run finds it unlocked.
        self._lock = os.open(self.path / f"{LOCK}.new", os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
        fcntl.flock(self._lock, fcntl.LOCK_EX)
        (self.path / f"{LOCK}.new").rename(self.path / LOCK)
        return self.path

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        shutil.rmtree(self.path, ignore_errors=True)
        os.close(self._lock)


def alive() -> list[Path]:
    """The directories of this user's runs that have not ended, wherever such a directory may be."""
    found = []
    for path in (path for base in dict.fromkeys(_candidates()) if base for path in Path(base).glob(f"{PREFIX}*")):
        with contextlib.suppress(OSError):  # another user's, or just being removed
            if path.is_symlink() or path.stat().st_uid != os.getuid():
                continue
            lock = os.open(path / LOCK, os.O_RDWR | os.O_CLOEXEC)
            try:
                fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                found.append(path)
            finally:
                os.close(lock)
    return sorted(found)


def _candidates() -> list[str]:
    return [os.environ.get("XDG_RUNTIME_DIR", ""), tempfile.gettempdir(), "/tmp"]


def _base() -> Path:
    """The user's run-time directory, or the first temporary one where a socket's path is short enough."""
    candidates = _candidates()
    for candidate in candidates:
        length = len(os.fsencode(candidate)) + len(f"/{PREFIX}12345678") + LONGEST_NAME
        if candidate and length <= LONGEST_SOCKET_PATH and os.access(candidate, os.W_OK | os.X_OK):
            return Path(candidate)
    raise FileNotFoundError(f"none of {candidates} is a writable directory with a short enough path for a socket")


def _remove_stale(base: Path) -> None:
    for path in base.glob(f"{PREFIX}*"):
        try:
            if path.is_symlink() or path.stat().st_uid != os.getuid():
                continue
            lock = os.open(path / LOCK, os.O_RDWR | os.O_CLOEXEC)
        except OSError:
            continue  # another user's, just being made, or just being removed
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            continue  # its run is alive
        else:
            shutil.rmtree(path, ignore_errors=True)
        finally:
            os.close(lock)
