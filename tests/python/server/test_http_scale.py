"""Many clients at once; the whole size is a benchmark, benchmarks/http_connections.py (F-41, F-43)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from demo_model import demo_file

ROOT = Path(__file__).parents[3]


@pytest.mark.timeout(150)
def test_a_thousand_idle_connections_and_hundreds_of_streams_cost_nobody_anything() -> None:
    """Every token of every stream in its place, none served before others, /health soon answered, memory bounded."""
    demo_file()  # skips where the model is not installed
    options = {"idle": 1000, "beside": 50, "streams": 300, "tokens": 40, "pause": 0.1}
    command = ["benchmarks/http_connections.py", *(f"--{name}={value}" for name, value in options.items())]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    run = [sys.executable, *command]
    done = subprocess.run(run, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert (found["beside_wrong"], found["streams_wrong"], found["idle_lost"]) == (0, 0, 0)
    assert found["kib_each"] < 100
    assert found["health_p99_ms"] < 1000, "100 on a machine that does nothing else"
    assert found["probes"] >= 20
    assert 1 <= found["most_to_least"] < 2
