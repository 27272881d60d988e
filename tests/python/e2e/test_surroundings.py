"""F-62: a server whose surroundings lack what others have serves, or ends and names the cause. In namespaces of mounts
and processes, as a container has: what is missing is really missing."""

from __future__ import annotations

import os
import platform
import socket
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path

import httpx
import psutil
import pytest

import seccomp
from tiny_models import make_tiny_model

from .server import Server, command, free_port, wait_until

SHELL = """
read_only() { mount --bind "$1" "$1"; mount -o remount,bind,ro,nosuid,nodev "$1"; }
nothing_writable() {
    for each in /tmp /var/tmp /usr/tmp; do if [ -d $each ]; then read_only $each; fi; done
    read_only "$1"; cd "$1"
    for each in /tmp "$1"; do if touch $each/x 2>/dev/null; then exit 99; fi; done
}
"""
WITHOUT_PRIVILEGES = ["setpriv", "--bounding-set=-all", "--inh-caps=-all"]


@cache
def namespace() -> list[str]:
    """The command that makes one, of root or of a plain user."""
    said = ""
    for user in ([], ["-Ur"]):
        words = ["unshare", *user, "-mpf", "--mount-proc", "--kill-child"]
        tried = subprocess.run([*words, "true"], capture_output=True, text=True)
        if tried.returncode == 0:
            return words
        said = tried.stderr.strip()
    pytest.skip(f"this machine makes no namespaces: {said}")


def forbidding(*names: str) -> list[str]:
    if platform.machine() != "x86_64":
        pytest.skip("the numbers of system calls are those of x86-64")
    return [sys.executable, seccomp.__file__, *names, "--"]


class Surrounded:
    """`hybrid-serve serve` of a tiny model, in a namespace that ``setup`` changes first if there is any."""

    def __init__(self, folder: Path, setup: str = "", wrapper: list[str] | None = None, **variables: str) -> None:
        self.home, self.port = folder / "home", free_port()
        self.home.mkdir()
        self._model = make_tiny_model(folder / "tiny")
        prepared = ["sh", "-c", f'set -e\n{SHELL}\n{setup}\nexec "$@"', "sh"]
        self._before = [*([*namespace(), *prepared] if setup else []), *(wrapper or [])]
        path = os.pathsep.join(filter(None, sys.path))
        self._environment = {"PATH": os.environ["PATH"], "PYTHONPATH": path, "HOME": str(self.home), **variables}

    @property
    def _words(self) -> list[str]:
        serve = command("serve", str(self._model), "--port", str(self.port), "--max-model-len", "128")
        return [*self._before, *serve]

    def check_serves(self) -> None:
        with tempfile.NamedTemporaryFile() as log:
            process = subprocess.Popen(
                self._words, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=self._environment
            )
            server = Server(process, self.port, log)
            try:
                wait_until(server.ready, "the server is ready")
                body = {"prompt": "x", "max_tokens": 4, "ignore_eos": True}
                response = httpx.post(server.url + "/v1/completions", json=body, timeout=60)
                assert response.json()["usage"]["completion_tokens"] == 4
                for child in psutil.Process(process.pid).children():
                    child.terminate()
                assert process.wait(30) == 0, server.log()
                assert "Traceback" not in server.log()
            finally:
                process.kill()
                process.wait()

    def check_is_refused(self, code: str, *words: str) -> None:
        done = subprocess.run(self._words, env=self._environment, capture_output=True, text=True, timeout=60)
        assert done.returncode == 13, done.stderr
        assert "Traceback" not in done.stderr
        box = "\n".join(done.stderr.splitlines()[-5:])
        assert all(word in box for word in (code, *words)), box


def test_a_container_that_may_write_one_small_folder_and_do_little_is_enough(tmp_path: Path) -> None:
    """A read-only file system and HOME, no /dev/shm, no capability, no call that a default profile forbids."""
    room, dev = tmp_path / "room", tmp_path / "dev"
    room.mkdir()
    dev.mkdir()
    setup = f"""
        nothing_writable "$HOME"
        mount -t tmpfs -o size=256k none {room}
        mount -t tmpfs none {dev}
        for each in null urandom; do touch {dev}/$each; mount --bind /dev/$each {dev}/$each; done
        mount --rbind {dev} /dev
        test ! -e /dev/shm
    """
    wrapper = [*WITHOUT_PRIVILEGES, *forbidding(*(set(seccomp.NUMBERS) - seccomp.ALLOWED))]
    Surrounded(tmp_path, setup, wrapper, TMPDIR=str(room)).check_serves()


def test_a_server_without_proc_and_with_a_full_dev_shm_serves(tmp_path: Path) -> None:
    setup = """
        mount -t tmpfs -o size=16k none /dev/shm
        if head -c 64k /dev/zero > /dev/shm/full 2>/dev/null; then exit 99; fi
        mount -t tmpfs none /proc
    """
    Surrounded(tmp_path, setup).check_serves()


def test_where_no_folder_can_have_its_sockets_all_are_named(tmp_path: Path) -> None:
    surrounded = Surrounded(tmp_path, 'nothing_writable "$HOME"', XDG_RUNTIME_DIR="/nonexistent")
    surrounded.check_is_refused("HS-E033", "/nonexistent: No such file or directory, /tmp: Read-only file system")


def test_a_folder_without_room_for_sockets_is_passed_over_and_named(tmp_path: Path) -> None:
    full = tmp_path / "full"
    full.mkdir()
    setup = f'nothing_writable "$HOME"; mount -t tmpfs -o nr_inodes=3 none {full}'
    surrounded = Surrounded(tmp_path, setup, XDG_RUNTIME_DIR=str(full))
    surrounded.check_is_refused("HS-E033", f"{full}: No space left on device, /tmp: Read-only file system")


def test_a_system_that_gives_no_memory_to_share_is_named(tmp_path: Path) -> None:
    surrounded = Surrounded(tmp_path, wrapper=forbidding("memfd_create"))
    surrounded.check_is_refused("HS-E033", "memfd_create: Operation not permitted")


def test_a_busy_port_of_a_process_that_cannot_be_seen_is_named(tmp_path: Path) -> None:
    surrounded = Surrounded(tmp_path, "mount -t proc -o hidepid=2 proc /proc", WITHOUT_PRIVILEGES)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", surrounded.port))
        taken.listen()
        surrounded.check_is_refused("HS-E031", f"port {surrounded.port} is in use", "may not see")
