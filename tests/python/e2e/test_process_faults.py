"""What dies takes nothing with it that it should not (F-06, F-08, F-12, F-16, S11), and what is missing around a server
does not end it (F-60, F-62)."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import httpx
import psutil

from tiny_models import make_tiny_model

from .server import Server, command, free_port, serving, wait_until


def test_kill_9_of_the_supervisor_leaves_no_orphan(demo_gguf: Path) -> None:
    with serving(str(demo_gguf), "--max-model-len", "512") as server:
        tree = server.tree()
        assert len(tree) >= 3
        tree[0].kill()
        server.process.wait(10)

        def gone() -> bool:
            return not [p for p in tree if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]

        wait_until(gone, "all processes are gone", timeout=30)
        assert server.process.returncode != 0
        # A killed process's last thread may hold the port for a moment after it counts as gone.
        wait_until(lambda: is_free(server.port), "the port is free", timeout=30)


def test_sigterm_lets_the_running_stream_finish(demo_gguf: Path) -> None:
    with serving(str(demo_gguf), "--max-model-len", "1024") as server:
        lines: list[str] = []
        started = threading.Event()

        def read() -> None:
            body = {"prompt": "Count:", "max_tokens": 200, "temperature": 0, "ignore_eos": True, "stream": True}
            with httpx.stream("POST", server.url + "/v1/completions", json=body, timeout=60) as response:
                for line in response.iter_lines():
                    lines.append(line)
                    started.set()

        reader = threading.Thread(target=read)
        reader.start()
        assert started.wait(30)
        server.process.send_signal(signal.SIGTERM)
        wait_until(lambda: httpx.get(server.url + "/ready").status_code == 503, "/ready says draining", timeout=30)
        refused = httpx.post(server.url + "/v1/completions", json={"prompt": "x", "max_tokens": 1})
        assert refused.status_code == 503
        assert "retry-after" in refused.headers
        reader.join(60)
        assert server.process.wait(30) == 0, server.log()
        events = [line for line in lines if line.startswith("data: ")]
        assert events[-1] == "data: [DONE]"
        assert json.loads(events[-2][6:])["choices"][0]["finish_reason"] == "length"


def test_a_server_without_locale_and_home_whose_log_nobody_reads_serves_and_counts_the_lines(tmp_path: Path) -> None:
    """F-60, F-62: 100 lines of the access log do not fit into the pipe."""
    read, write = os.pipe()
    fcntl.fcntl(write, fcntl.F_SETPIPE_SZ, 4096)
    model = make_tiny_model(tmp_path / "tiny")
    bare = {"PATH": os.environ["PATH"], "LC_ALL": "C", "HOME": "/nonexistent", "PYTHONPATH": os.pathsep.join(sys.path)}
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
    words = command("serve", str(model), "--port", str(port), "--access-log", "all")
    with tempfile.NamedTemporaryFile() as log:
        process = subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=log, stderr=write, env=bare, cwd="/")
        server = Server(process, port, log)
        try:
            wait_until(server.ready, "the server is ready")
            with httpx.Client(base_url=server.url, timeout=30) as client:
                for _ in range(100):
                    assert client.get("/v1/models").status_code == 200
                body = {"prompt": "x", "max_tokens": 4}
                assert client.post("/v1/completions", json=body).status_code == 200
            assert server.metric("hybrid_log_lines_dropped_total") > 20
            process.send_signal(signal.SIGTERM)
            assert process.wait(30) == 0
        finally:
            process.kill()
            os.close(read)
            os.close(write)


def is_free(port: int) -> bool:
    with socket.socket() as s:
        s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            s.bind(("127.0.0.1", port))
        except OSError:
            return False
        return True


def run_serve(*args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command("serve", *args), capture_output=True, text=True, timeout=30)


def last_lines(result: subprocess.CompletedProcess[str]) -> str:
    assert "Traceback" not in result.stderr, result.stderr
    return "\n".join(result.stderr.strip().splitlines()[-6:])


def test_a_busy_port_is_named_before_the_model_loads(server: Server, demo_gguf: Path) -> None:
    result = run_serve(str(demo_gguf), "--port", str(server.port))
    assert result.returncode == 13
    assert str(server.port) in last_lines(result)
    assert str(server.process.pid) in last_lines(result)


def test_a_mistyped_path_suggests_the_right_one(tmp_path: Path) -> None:
    (tmp_path / "my-model").mkdir()
    result = run_serve(str(tmp_path / "my-modle"), "--port", str(free_port()))
    assert result.returncode == 10
    assert "my-model" in last_lines(result)


def test_a_truncated_gguf_is_one_clear_error(tmp_path: Path, demo_gguf: Path) -> None:
    """F-53."""
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(demo_gguf.read_bytes()[: 40 * 2**20])
    result = run_serve(str(broken), "--port", str(free_port()))
    assert result.returncode == 11, result.stderr
    assert "broken.gguf" in last_lines(result)


def test_a_corrupt_safetensors_is_one_clear_error(tmp_path: Path) -> None:
    """F-52."""
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 128, "vocab_size": 512,
        "max_position_embeddings": 256, "rms_norm_eps": 1e-5,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").write_bytes((2**62).to_bytes(8, "little") + b"{}")
    result = run_serve(str(tmp_path), "--port", str(free_port()))
    assert result.returncode == 11, result.stderr
    assert "model.safetensors" in last_lines(result)
