"""The private directory of one run, which holds its sockets."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import shutil
import socket
import tempfile
from pathlib import Path
from types import TracebackType

from ..errors import StartupError

PREFIX = "hybrid-serve-"
LOCK = "lock"
LONGEST_SOCKET_PATH = 107  # bytes, of sockaddr_un
LONGEST_NAME = len("/lockstep-000")


class RunDirectory:
    """Mode 0700, made on entering, removed on leaving; one that a killed run left behind is removed by the next run.
    It is where the first of the candidates has room for it."""

    def __enter__(self) -> Path:
        """Raises StartupError."""
        refused = {}
        for base in filter(None, _candidates()):
            try:
                self.path, self._lock = _make(base)
                return self.path
            except OSError as error:
                refused[base] = os.strerror(error.errno or 0)
        why = ", ".join(f"{base}: {reason}" for base, reason in refused.items())
        fix = "TMPDIR=FOLDER, writable and with a short path; docker run --tmpfs /tmp"
        raise StartupError("HS-E033", "there is no folder for the server's sockets", why, fix)

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
    """The user's run-time directory, then temporary ones."""
    temporary = os.environ.get("TMPDIR", "")
    with contextlib.suppress(FileNotFoundError):  # none is writable
        temporary = tempfile.gettempdir()
    return [os.environ.get("XDG_RUNTIME_DIR", ""), temporary, "/tmp"]


def _make(base: str) -> tuple[Path, int]:
    """The directory and its lock. Raises OSError, with nothing left, where it cannot be, or can have no sockets."""
    if len(os.fsencode(base)) + len(f"/{PREFIX}12345678") + LONGEST_NAME > LONGEST_SOCKET_PATH:
        raise OSError(errno.ENAMETOOLONG, os.strerror(errno.ENAMETOOLONG))
    _remove_stale(Path(base))
    path = Path(tempfile.mkdtemp(prefix=PREFIX, dir=base))
    try:
        # Held as long as this process lives, however it ends. Renamed, so that no other run finds it unlocked.
        lock = os.open(path / f"{LOCK}.new", os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
        fcntl.flock(lock, fcntl.LOCK_EX)
        (path / f"{LOCK}.new").rename(path / LOCK)
        with socket.socket(socket.AF_UNIX) as probe:
            probe.bind(str(path / "probe"))
        (path / "probe").unlink()
    except OSError:
        shutil.rmtree(path, ignore_errors=True)
        raise
    return path, lock


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
