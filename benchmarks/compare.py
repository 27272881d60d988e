#!/usr/bin/env python3
"""Starts several servers in turn, round by round, runs `bench serve` against each, and prints a table of medians.

    python benchmarks/compare.py --tokenizer FOLDER --model smollm2 --rounds 3 \\
      --server 'ours=8000=hybrid-serve serve DIR --served-model-name smollm2 --max-model-len 4096 --port 8000' \\
      --server 'vllm=8101=vllm serve DIR --served-model-name smollm2 --max-model-len 4096 --port 8101'

W1: one stream, 3 requests, 128 in / 128 out.        W2: 16 at a time, 32 requests, 256 / 128.
W3: 16 at a time, 32 requests, 512 shared + 32 / 64.  W4: 4 at a time, 8 requests, 1024 / 8.
Prompts have exact token counts and are fresh in every round, so a prefix cache helps inside W3 only.

Only one server runs at a time (they would share the cores), and the order is A B A B ..., so that a machine that drifts
drifts for all. The ratio of a row is the first server's speed over this one's. Ready: seconds from start to the first
200 of /health; memory: the sum of the peak resident sizes of the server's processes.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import signal
import statistics
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections import defaultdict
from pathlib import Path

import psutil

# Name -> flags of `bench serve`.
WORKLOADS = {
    "W1": "--num-prompts 3 --max-concurrency 1 --random-input-len 128 --random-output-len 128",
    "W2": "--num-prompts 32 --max-concurrency 16 --random-input-len 256 --random-output-len 128",
    "W3": "--num-prompts 32 --max-concurrency 16 --random-prefix-len 512 --random-input-len 32 --random-output-len 64",
    "W4": "--num-prompts 8 --max-concurrency 4 --random-input-len 1024 --random-output-len 8",
}


def wait_ready(port: int, process: subprocess.Popen[bytes], limit: float) -> float:
    start = time.monotonic()
    while time.monotonic() - start < limit:
        if process.poll() is not None:
            raise SystemExit(f"server exited with {process.returncode}")
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=1):
                return time.monotonic() - start
        except (urllib.error.URLError, OSError):
            time.sleep(0.02)
    raise SystemExit(f"server on port {port} was not ready within {limit} s")


def peak_bytes(process: psutil.Process) -> int:
    total = 0
    for member in [process, *process.children(recursive=True)]:
        for line in Path(f"/proc/{member.pid}/status").read_text().splitlines():
            if line.startswith("VmHWM"):
                total += int(line.split()[1]) * 1024
    return total


def measure(options: argparse.Namespace, name: str, port: int, workload: str, index: int) -> dict:
    result = Path(options.logs, f"{name}-{workload}-{index}.json")
    client = [sys.executable, "-m", "hybrid_serve", "bench", "serve", "--base-url", f"http://127.0.0.1:{port}"]
    client += ["--model", options.model, "--tokenizer", options.tokenizer, *shlex.split(WORKLOADS[workload])]
    client += ["--seed", str(index), "--ignore-eos", "--save-result"]
    client += ["--result-dir", str(result.parent), "--result-filename", result.name]
    subprocess.run(client, check=True, stdout=subprocess.DEVNULL)
    found = json.loads(result.read_text())
    if found["failed"]:
        raise SystemExit(f"{name}: {found['failed']} requests of {workload} failed")
    return {
        "tag": name,
        "workload": workload,
        "output_tok_s": round(found["output_throughput"], 1),
        "ttft_ms": round(found["median_ttft_ms"], 2),
        "itl_ms": round(found["median_itl_ms"], 2),
        "latency_ms": round(found["median_e2el_ms"], 2),
    }


def one_turn(
    options: argparse.Namespace, name: str, port: int, command: str, index: int
) -> tuple[list[dict], float, int]:
    log = open(f"{options.logs}/{name}-{index}.log", "wb")  # noqa: SIM115 - handed to the child
    process = subprocess.Popen(shlex.split(command), stdout=log, stderr=log, start_new_session=True)
    try:
        ready = wait_ready(port, process, options.ready_limit)
        results = [measure(options, name, port, workload, index) for workload in options.workloads.split(",")]
        return results, ready, peak_bytes(psutil.Process(process.pid))
    finally:
        os.killpg(process.pid, signal.SIGINT)
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--server", action="append", required=True, metavar="NAME=PORT=COMMAND")
    parser.add_argument("--model", required=True)
    parser.add_argument("--tokenizer", required=True, help="model folder or GGUF file")
    parser.add_argument("-w", "--workloads", default=",".join(WORKLOADS))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--ready-limit", type=float, default=300)
    parser.add_argument("--logs", default="/tmp", help="folder for the servers' logs")
    options = parser.parse_args()
    servers = [server.split("=", 2) for server in options.server]
    speed: dict[tuple[str, str], list[dict]] = defaultdict(list)
    ready: dict[str, list[float]] = defaultdict(list)
    memory: dict[str, int] = defaultdict(int)
    for index in range(options.rounds):
        for name, port, command in servers:
            results, seconds, peak = one_turn(options, name, int(port), command, index)
            ready[name].append(seconds)
            memory[name] = max(memory[name], peak)
            for result in results:
                print(json.dumps(result), flush=True)
                speed[name, result["workload"]].append(result)

    print("\n| server | W | out tok/s (min..max) | ratio | TTFT ms | ITL ms |\n|---|---|---|---|---|---|")
    for workload in options.workloads.split(","):
        base = statistics.median(r["output_tok_s"] for r in speed[servers[0][0], workload])
        for name, _, _ in servers:
            runs = speed[name, workload]
            rates = [r["output_tok_s"] for r in runs]
            middle = statistics.median(rates)
            ttft, itl = (statistics.median(r[key] for r in runs) for key in ("ttft_ms", "itl_ms"))
            spread = f"{middle} ({min(rates)}..{max(rates)})"
            print(f"| {name} | {workload} | {spread} | {base / middle:.2f} | {ttft} | {itl} |")
    for name, _, _ in servers:
        print(f"\n{name}: ready in {statistics.median(ready[name]):.1f} s, peak memory {memory[name] / 2**30:.2f} GiB")


if __name__ == "__main__":
    main()
