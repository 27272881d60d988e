#!/usr/bin/env python3
"""Ours and vLLM's offline engine in turn on one GPU, A B A B, one process at a time, and a table of medians and ratios.

    python benchmarks/engine_compare.py CONFIG.json --workloads single,batch32,chat --rounds 2 --json SAMPLES.json \\
      [--vllm 'python benchmarks/vllm_offline.py']

Every process runs every workload --runs times. SAMPLES.json is added to if it exists, so that a comparison can be made
in several sittings; the table is over all its samples: median (least .. most), and ours over vLLM's median.
"""

from __future__ import annotations

import argparse
import json
import shlex
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

Samples = dict[str, dict[str, list[float]]]  # engine -> workload -> out tokens/s; "start": seconds to the first token


def measure(command: list[str], config: Path, names: str, runs: int) -> dict[str, list[float]]:
    with tempfile.NamedTemporaryFile(suffix=".json") as result:
        arguments = [str(config), "--workloads", names, "--rounds", str(runs), "--json", result.name]
        subprocess.run([*command, *arguments], check=True)
        found: dict[str, Any] = json.loads(Path(result.name).read_text())
    samples = {name: found[name]["all_out_tok_s"] for name in names.split(",")}
    return samples | {"start": [round(found["startup"]["first_token_s"], 2)]}


def table(samples: Samples) -> str:
    lines = ["| | ours | vLLM | ratio |", "|---|---|---|---|"]
    for name in samples["ours"]:
        cells, medians = [], []
        for engine in ("ours", "vllm"):
            values = samples[engine].get(name, [])
            medians.append(statistics.median(values) if values else float("nan"))
            digits = 1 if name == "start" else 0
            spread = f" ({min(values):,.{digits}f} .. {max(values):,.{digits}f})" if values else ""
            cells.append(f"{medians[-1]:,.{digits}f}{spread}")
        ratio = medians[1] / medians[0] if name == "start" else medians[0] / medians[1]
        label = "process start to first token, s" if name == "start" else f"{name}, out tok/s"
        lines.append(f"| {label} | {cells[0]} | {cells[1]} | {ratio:.2f}x |")
    return "\n".join(lines)


def main() -> None:
    here = Path(__file__).parent
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path)
    parser.add_argument("--workloads", default="single,batch32,chat")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--runs", type=int, default=2)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--ours", default=f"{sys.executable} {here / 'engine_offline.py'}")
    parser.add_argument("--vllm", default=f"{sys.executable} {here / 'vllm_offline.py'}")
    args = parser.parse_args()
    samples: Samples = json.loads(args.json.read_text()) if args.json.exists() else {"ours": {}, "vllm": {}}
    for _ in range(args.rounds):
        for engine in ("ours", "vllm"):
            print(f"== {engine}", flush=True)
            found = measure(shlex.split(getattr(args, engine)), args.config, args.workloads, args.runs)
            for name, values in found.items():
                samples[engine].setdefault(name, []).extend(values)
            args.json.write_text(json.dumps(samples, indent=1))
    print(table(samples))


if __name__ == "__main__":
    main()
