"""``ps``: the running servers of this user, found by their run directories and asked how they are."""

from __future__ import annotations

import json
import os
import ssl
import time
import urllib.error
import urllib.request
from http.client import HTTPException
from pathlib import Path
from typing import Any

import psutil

from ..launch import run_directory
from .settings import settings
from .usage import Parser, dashed

_ASK_SECONDS = 2.0


def ps(argv: list[str]) -> int:
    """Prints one line a server; none is not a failure."""
    parser = Parser("hybrid-serve ps", "Lists the servers of this user.")
    parser.add_argument("--json", action="store_true", help="as a JSON list")
    arguments = parser.parse_args(dashed(argv))
    found = servers()
    if arguments.json:
        print(json.dumps(found, indent=1))
    elif not found:
        print("no server of this user is running")
    else:
        print(f"{'PID':>7}  {'URL':<28} {'STATE':<16} {'UP':>8} {'MEMORY':>9}  COMMAND")
        for one in found:
            up = f"{one['seconds'] / 60:.0f} min" if one["seconds"] >= 60 else f"{one['seconds']:.0f} s"
            memory = f"{one['resident_bytes'] / 2**20:.0f} MiB"
            print(f"{one['pid']:>7}  {one['url'] or '-':<28} {one['state']:<16} {up:>8} {memory:>9}  {one['command']}")
    return 0


def servers() -> list[dict[str, Any]]:
    """The facts of each, oldest first."""
    locks = {str(path / run_directory.LOCK) for path in run_directory.alive()}
    found = []
    for process in psutil.process_iter() if locks else ():
        try:
            if process.uids().real == os.getuid() and any(file.path in locks for file in process.open_files()):
                found.append(_facts(process))
        except psutil.Error:
            continue  # it ended, or is not ours to look at
    return sorted(found, key=lambda one: -one["seconds"])


def _facts(process: psutil.Process) -> dict[str, Any]:
    family = [process, *process.children(recursive=True)]
    words = process.cmdline()
    has_tls = any(word.startswith("--ssl") for word in words)
    # The first that it opened is the one for clients; a head has another one for engines.
    connections = sorted(process.net_connections("inet"), key=lambda one: one.fd)
    listening = [one.laddr for one in connections if one.status == "LISTEN"]
    url = _url("https" if has_tls else "http", *listening[0]) if listening else None
    return {
        "pid": process.pid,
        "url": url,
        "state": "headless" if "--headless" in words else _state(url),
        "seconds": time.time() - process.create_time(),
        "resident_bytes": sum(_resident(one) for one in family),
        # Keys given as flags are in there; they are in the system's own ps as well, but not by us.
        "command": _shown(words),
    }


def _url(scheme: str, host: str, port: int) -> str:
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"{scheme}://[{host}]:{port}" if ":" in host else f"{scheme}://{host}:{port}"


def _state(url: str | None) -> str:
    """ready, or the phase that a start is in. Nothing secret is asked, so no certificate is checked."""
    if url is None:
        return "starting"
    try:
        anyone = ssl._create_unverified_context() if url.startswith("https:") else None
        with urllib.request.urlopen(f"{url}/ready", timeout=_ASK_SECONDS, context=anyone) as answer:
            return str(json.loads(answer.read())["state"])
    except urllib.error.HTTPError as error:
        try:
            body = json.loads(error.read())
            return f"{body['state']} {body.get('progress', 0):.0%}"
        except (ValueError, KeyError):
            return f"HTTP {error.code}"
    except (OSError, ValueError, KeyError, HTTPException):
        return "no answer"


def _resident(process: psutil.Process) -> int:
    try:
        return int(process.memory_info().rss)
    except psutil.Error:
        return 0


def _shown(words: list[str]) -> str:
    secret = {setting.flag for setting in settings() if setting.option.secret}
    shown, is_key = [], False
    for word in words:
        is_key = is_key and not word.startswith("-")
        name, equals, _ = word.partition("=")
        is_flag = name.replace("_", "-") in secret
        shown.append("***" if is_key else f"{name}=***" if is_flag and equals else word)
        is_key = is_key or (is_flag and not equals)
    return " ".join(Path(word).name if i < 2 else word for i, word in enumerate(shown))
