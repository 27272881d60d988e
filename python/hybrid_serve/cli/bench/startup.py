"""``bench startup``: from the command to the first token, by the phases that a start itself prints."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections import deque
from pathlib import Path
from typing import Any

from ...checkpoint import demo
from ...checkpoint.hub import resolve
from ...errors import StartupError, box
from .. import options
from ..api_client import ApiClient, ApiError
from ..usage import Parser, UsageError, dashed
from .serve import checked

_PHASE = re.compile(r"\[\d+/\d+\] (\w+)")
_URL = re.compile(r"http://\S+?(?=[ ,]|$)")
_READY = "ready in "
_STOP_SECONDS = 30.0
_LAST_LINES = 20

rounds = checked(int, lambda value: value >= 0, "a whole number from 0 on")


def startup(argv: list[str]) -> int:
    """1: a start failed; its own last lines are shown."""
    parser = Parser(
        "hybrid-serve bench startup",
        "Starts servers and reports the seconds of each phase, up to the first token of a request.",
        "Further words are those of serve: a MODEL and its options. Cold: the model's files are dropped from the "
        "system's\ncache of files before.",
    )
    parser.usage = "hybrid-serve bench startup [MODEL] [OPTION ...]"
    parser.add_argument("--num-iters-cold", type=rounds, default=1, metavar="N", help="default: %(default)s")
    parser.add_argument("--num-iters-warm", type=rounds, default=3, metavar="N", help="default: %(default)s")
    parser.add_argument("--output-json", metavar="FILE", help="write the result there, too")
    arguments, rest = parser.parse_known_args(dashed(argv))
    chosen = options.parse(rest, os.environ)
    if not arguments.num_iters_cold + arguments.num_iters_warm:
        raise UsageError("--num-iters-cold and --num-iters-warm are both 0")
    if "port" in chosen.origins and chosen.origins["port"].startswith("--"):
        raise UsageError("--port: a free one is taken")
    try:
        files = resolve(demo.unless_named(options.for_one_model(chosen.config).model)).folder
        key = next(iter(chosen.config.server.secrets), "")
        found: dict[str, Any] = {}
        for name, repeats in (("cold", arguments.num_iters_cold), ("warm", arguments.num_iters_warm)):
            runs = []
            for _ in range(repeats):
                if name == "cold":
                    forget(files)
                runs.append(_start(rest, key))
            if runs:
                found[name] = _mean(runs)
    except StartupError as error:
        print(box(error.failure), file=sys.stderr)
        return error.failure.exit_code
    except (ApiError, ChildProcessError) as error:
        print(f"bench startup: {error}", file=sys.stderr)
        return 1
    print(_table(found))
    if arguments.output_json:
        Path(arguments.output_json).write_text(json.dumps(found, indent=1) + "\n")
    return 0


def forget(folder: Path) -> None:
    """Drops what the system keeps of the folder's files in memory; clean pages need no privilege for that."""
    for file in folder.iterdir():
        if file.is_file():
            fd = os.open(file, os.O_RDONLY)
            try:
                os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            finally:
                os.close(fd)


def _start(words: list[str], key: str) -> dict[str, float]:
    """Phase -> seconds. Raises ChildProcessError if the server does not come up, ApiError if it does not answer."""
    command = [sys.executable, "-m", "hybrid_serve", "serve", *words, "--port", "0"]
    phases: dict[str, float] = {}
    began = last = time.perf_counter()
    server = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        assert server.stdout is not None
        url, said = "", deque[str](maxlen=_LAST_LINES)
        for line in server.stdout:
            now = time.perf_counter()
            said.append(line)
            url = url or next(iter(_URL.findall(line)), "")
            if match := _PHASE.match(line):
                phases[match[1]] = now - last
                last = now
            if line.startswith(_READY):
                break
        else:
            raise ChildProcessError(f"the server ended with exit code {server.wait()}:\n{''.join(said).strip()}")
        _first_token(url, key)
        now = time.perf_counter()
        phases["first_token"] = now - last
        return phases | {"total": now - began}
    finally:
        server.send_signal(signal.SIGTERM)
        try:
            server.communicate(timeout=_STOP_SECONDS)
        except subprocess.TimeoutExpired:
            server.kill()
            server.communicate()


def _first_token(url: str, key: str) -> None:
    client = ApiClient(f"{url}/v1", key)
    body = {"model": client.first_model(), "prompt": "Hello", "max_tokens": 1, "stream": True}
    with client.stream("/completions", json.dumps(body).encode()) as events:
        for _ in events:
            pass


def _mean(runs: list[dict[str, float]]) -> dict[str, Any]:
    names = list(runs[0])
    means = {name: sum(run[name] for run in runs) / len(runs) for name in names}
    total = means.pop("total")
    return {"phases_s": means, "total_s": total, "totals_s": [run["total"] for run in runs]}


def _table(found: dict[str, Any]) -> str:
    names = list(next(iter(found.values()))["phases_s"])
    lines = [f"{'s':<8}" + "".join(f"{name:>12}" for name in (*names, "total"))]
    for kind, one in found.items():
        values = [*one["phases_s"].values(), one["total_s"]]
        lines.append(f"{kind:<8}" + "".join(f"{value:>12.3f}" for value in values))
    return "\n".join(lines)
