"""In every Python process that a test starts: writes down what the interpreter is told to do, once it serves, of the
things that a payload would do (ADV-01). Knows where the processes serve and where these things are meant; no test."""

from __future__ import annotations

import _thread
import os
import sys
import threading
import time
from types import FrameType

FILE = "TEST_AUDIT_FILE"  # variable: where to, a line for each event of any process
PROOF = "TEST_AUDIT_PROOF"  # variable: once this file exists, every process does what it should not
WATCHED = {
    "code.__new__", "compile", "ctypes.dlopen", "exec", "import", "os.exec", "os.fork", "os.forkpty", "os.posix_spawn",
    "os.spawn", "os.system", "pickle.find_class", "pty.spawn", "subprocess.Popen",
}  # fmt: skip
Places = dict[str, tuple[str, ...]]  # by function's name: how its file's path ends
SERVES: Places = {  # where the main thread is from the end of its process's start-up on
    "run": (
        "/hybrid_serve/launch/supervisor.py",
        "/hybrid_serve/engine/loop.py",
        "/hybrid_serve/engine/worker.py",
        "/uvloop/__init__.py",
    )
}
MEANT: Places = {
    "start": ("/hybrid_serve/launch/local.py",),  # a child of the plan, by the same words each time
    # Jinja compiles the template of a model that is loaded.
    "load_text_model": ("/hybrid_serve/server/process.py",),
    # What is made before the first connection is accepted, but in the loop.
    "_serve_one": ("/hybrid_serve/server/process.py",),
    "_serve_several": ("/hybrid_serve/server/process.py",),
    "load": ("/uvicorn/config.py",),
}


def install() -> None:
    """A hook can never be taken off."""
    main, path = _thread.get_ident(), os.environ[FILE]

    def hook(event: str, arguments: object) -> None:
        if event in WATCHED and is_within(sys._current_frames().get(main), SERVES):
            caller = sys._getframe().f_back
            if not is_within(caller, MEANT):
                write(path, f"{event} {arguments!r:.200}", caller)

    sys.addaudithook(hook)
    if PROOF in os.environ:
        threading.Thread(target=misbehave, args=(os.environ[PROOF],), daemon=True).start()


def is_within(frame: FrameType | None, places: Places) -> bool:
    while frame is not None:
        ends = places.get(frame.f_code.co_name)
        if ends is not None and frame.f_code.co_filename.endswith(ends):
            return True
        frame = frame.f_back
    return False


def write(path: str, event: str, frame: FrameType | None) -> None:
    places = []  # innermost first
    while frame is not None:
        places.append(f"{frame.f_code.co_filename}:{frame.f_code.co_name}")
        frame = frame.f_back
    file = os.open(path, os.O_WRONLY | os.O_APPEND)
    os.write(file, f"{os.getpid()} {event} in {' < '.join(places):.2000}\n".encode())
    os.close(file)


def misbehave(path: str) -> None:
    while not os.path.exists(path):
        time.sleep(0.02)
    import pickle
    import subprocess

    exec(compile("pass", "text of a request", "exec"))
    pickle.loads(b"cbuiltins\nlen\n.")
    os.system("true")
    subprocess.run(["true"])
