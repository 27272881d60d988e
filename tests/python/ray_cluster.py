"""A Ray cluster for tests: nodes of one machine, in a process of their own, whose standard input says what to do.

Run as a script it is that process; imported it has no Ray in it."""

from __future__ import annotations

import os
import secrets
import subprocess
import sys

import psutil


class RayCluster:
    """Started on entering, a head of two CPUs and, if asked for, a worker of one; nothing of it is left on leaving."""

    def __init__(self, *, has_token: bool = True, has_worker: bool = True) -> None:
        mode = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
        self.environment = mode if has_token else {"RAY_AUTH_MODE": "disabled"}
        self._words = ["worker"] if has_worker else []

    def __enter__(self) -> RayCluster:
        quiet = {"RAY_USAGE_STATS_ENABLED": "0", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        self._process = subprocess.Popen(
            [sys.executable, __file__, *self._words],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={**os.environ, **quiet, **self.environment},
            text=True,
        )
        self.environment = {**self.environment, "RAY_ADDRESS": self._answer()}
        return self

    def remove_worker(self) -> None:
        self._say("remove")
        assert self._answer() == "removed"

    def processes(self, title: str = "") -> list[psutil.Process]:
        """Those of its nodes whose command has that in it."""
        found = []
        for process in psutil.Process(self._process.pid).children(recursive=True):
            try:
                if title in " ".join(process.cmdline()):
                    found.append(process)
            except psutil.Error:
                continue  # it has just ended
        return found

    def __exit__(self, *_: object) -> None:
        family = self.processes()
        try:
            self._say("exit")
            self._process.wait(30)
        except (OSError, subprocess.TimeoutExpired):
            self._process.kill()
        for process in family:
            if process.is_running():
                process.kill()
        self._process.communicate()

    def _say(self, word: str) -> None:
        assert self._process.stdin is not None
        print(word, file=self._process.stdin, flush=True)

    def _answer(self) -> str:
        """The next line that is for us; Ray may have something to say as well."""
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith("> "):
                return line[2:].strip()
        raise AssertionError("the cluster ended")


def _answer(text: str) -> None:
    print(f"> {text}", flush=True)


def main(words: list[str]) -> None:
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "include_dashboard": False})
    worker = cluster.add_node(num_cpus=1) if "worker" in words else None
    _answer(cluster.address)
    for line in sys.stdin:
        if line.strip() == "remove":
            cluster.remove_node(worker, allow_graceful=False)
            _answer("removed")
        elif line.strip() == "exit":
            break
    cluster.shutdown()


if __name__ == "__main__":
    main(sys.argv[1:])
