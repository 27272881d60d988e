"""ADV-01: that no server of this suite runs a text, loads an object or starts a program once it serves is checked after
every test (conftest.py); here, that it would be seen in each of a server's processes."""

from __future__ import annotations

from pathlib import Path

import httpx

import audit_hook
from audited import Audited
from tiny_models import make_tiny_model

from .server import serving, wait_until

ROLES = {"serve", "api 0", "model 0", "engine 0", "worker of engine 0"}
MISDEEDS = {"exec", "compile", "pickle.find_class", "os.system", "subprocess.Popen"}


def test_what_a_payload_would_do_is_seen_in_every_process_of_a_server(tmp_path: Path) -> None:
    file, proof = tmp_path / "models.yaml", tmp_path / "now"
    file.write_text(f"one: {{model: {make_tiny_model(tmp_path / 'one')}, kv_cache_memory_bytes: 4MiB}}\n")
    watched = Audited(tmp_path)
    environment = watched.environment | {audit_hook.PROOF: str(proof)}
    with serving("--models", str(file), "--distributed-executor-backend", "mp", env=environment) as server:
        body = {"model": "one", "prompt": "x", "max_tokens": 4}
        assert httpx.post(server.url + "/v1/completions", json=body, timeout=60).status_code == 200
        titles = {one.pid: one.cmdline()[0].removeprefix("hybrid-serve: ") for one in server.tree()}
        titles[server.process.pid] = "serve"
        assert set(titles.values()) == ROLES
        assert watched.take() == []
        proof.touch()
        found = set[tuple[str, str]]()

        def all_is_seen() -> bool:
            found.update((pid, deed) for pid, deed, _ in (line.split(" ", 2) for line in watched.take()))
            return found >= {(str(pid), deed) for pid in titles for deed in MISDEEDS}

        wait_until(all_is_seen, "every process is caught")
