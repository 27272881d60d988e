"""When a server says that it is ready, whoever asks it is answered."""

from __future__ import annotations

import json
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

from demo_model import demo_file
from server_process import ServerProcess

PATIENCE = 120
OPTIONS: dict[str, Any] = {"api_entry": "hybrid_serve.server.process:main", "api_server_count": 3}


def test_after_ready_no_api_server_still_loads_its_tokenizer(tmp_path: Path) -> None:
    """An engine that is there at once, and 24 connections over three API servers."""
    with ServerProcess(tmp_path, model_options={"tokenizer": str(demo_file())}, **OPTIONS) as server:
        server.wait_ready(PATIENCE)
        connections = [HTTPConnection("127.0.0.1", server.address[1], timeout=PATIENCE) for _ in range(24)]
        for connection in connections:
            body = json.dumps({"prompt": [1, 2, 3], "max_tokens": 1})
            connection.request("POST", "/v1/completions", body, {"content-type": "application/json"})
        answers = [connection.getresponse() for connection in connections]
        assert [(answer.status, answer.read()) for answer in answers if answer.status != 200] == []
        for connection in connections:
            connection.close()


def test_a_tokenizer_that_cannot_be_loaded_ends_the_start_with_its_box(tmp_path: Path) -> None:
    broken = tmp_path / "tokenizer.json"
    broken.write_text("{}")
    with ServerProcess(tmp_path, model_options={"tokenizer": str(tmp_path)}, **OPTIONS) as server:
        assert server.wait_exit(PATIENCE) == 11
        assert "HS-E051" in "\n".join(server.errors.splitlines()[-5:])
        assert "ready in" not in server.output
        server.check_nothing_is_left()
