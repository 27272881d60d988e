"""The engine without sockets and text on seeded workloads, with random weights in a model's real shape.

    python benchmarks/engine_offline.py CONFIG.json [--workloads single,chat] [--rounds 3] [--profile] [--json OUT]

CONFIG.json: a Hugging Face config.json. Prints output and input tokens a second (median of the rounds); --profile adds,
for steps in the middle of each workload, the time of every kernel and how long the GPU did nothing in between.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import tempfile
import time
from array import array
from collections import defaultdict
from pathlib import Path
from typing import Any

import psutil
import torch
import workloads

from hybrid_serve import _core
from hybrid_serve.checkpoint.hub import resolve
from hybrid_serve.config import Config
from hybrid_serve.engine.executor import InlineExecutor
from hybrid_serve.engine.loop import EngineLoop
from hybrid_serve.engine.process import make_core
from hybrid_serve.runner.model_runner import ModelRunner


class Run:
    """The requests of one workload: the loop's source and sink."""

    def __init__(self, requests: list[tuple[list[int], int]], sampling: dict[str, Any], profile: bool) -> None:
        self.requests, self.sampling = requests, sampling
        self.stopping = False
        self.tokens = self.steps = 0
        self.first_token = 0.0
        self._profile_at = sum(count for _, count in requests) // 2 if profile else -1
        self.profiler: Any = None

    def drain(self, core: _core.Scheduler, wait: bool) -> None:
        for index, (prompt, count) in enumerate(self.requests):
            core.add(index, array("i", prompt), max_tokens=count, **self.sampling)
        self.requests = []
        self.stopping = core.idle  # and not when there is time to sleep: graphs would be captured ahead until then

    def send(self, outputs: _core.Outputs, result: Any) -> None:
        self.tokens += outputs.num_rows
        self.steps += 1
        self.first_token = self.first_token or time.time()
        if self.profiler is not None and self.steps == self._stop_at:
            torch.cuda.synchronize()
            self.profiler.stop()
        if self._profile_at > 0 and self.tokens >= self._profile_at and self.profiler is None:
            torch.cuda.synchronize()
            self.profiler = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA])
            self.profiler.start()
            self._stop_at = self.steps + 12

    def send_stats(self, core: _core.Scheduler, idle: bool) -> None:
        pass


def report_kernels(profiler: Any) -> None:
    spans, begins, totals = [], set(), defaultdict(list)
    for event in profiler.events():
        if event.device_type == torch.autograd.DeviceType.CUDA:
            spans.append((event.time_range.start, event.time_range.end))
            if "HtoD" in event.name:  # a step begins with its one copy to the device
                begins.add(event.time_range.start)
            totals[event.name].append(event.time_range.end - event.time_range.start)
    if not spans:
        return
    spans.sort()
    busy, end, between = 0.0, spans[0][0], []
    for start, stop in spans:
        if start in begins:
            between.append(max(0.0, start - end))
        busy += max(0.0, stop - max(start, end))
        end = max(end, stop)
    wall = end - spans[0][0]
    idle = f", idle between steps {statistics.median(between[1:]):.1f} us (median)" if len(between) > 1 else ""
    print(f"    GPU busy {busy:.0f} of {wall:.0f} us ({busy / wall:.1%}){idle}")
    for name, times in sorted(totals.items(), key=lambda item: -sum(item[1]))[:16]:
        print(f"    {sum(times):9.0f} us {len(times):5} x {statistics.median(times):8.2f} us  {name[:90]}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path)
    parser.add_argument("--workloads", default=",".join(workloads.NAMES))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--json", type=Path)
    parser.add_argument(
        "--set", nargs="*", default=[], metavar="group.field=json", help="e.g. engine.enforce_eager=true"
    )
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        shutil.copy(args.config, Path(folder) / "config.json")
        settings: dict[str, dict[str, Any]] = defaultdict(dict)
        settings["model"] = {"model": folder, "load_format": "dummy", "max_model_len": 8192, "seed": 0}
        settings["scheduler"] = {"max_num_seqs": 256}
        for item in args.set:
            name, _, value = item.partition("=")
            group, _, field = name.partition(".")
            settings[group][field] = json.loads(value)
        config = Config.from_json(json.dumps(settings).encode())
        began_process, imported = psutil.Process().create_time(), time.time()
        executor = InlineExecutor(config, ModelRunner.load(config, resolve(config.model), lambda phase, share: None))
        loaded = time.time()
        facts = executor.allocate()
        for what, num_bytes in facts.memory:
            print(f"memory {num_bytes / 2**30:8.2f} GiB  {what}")
        core = make_core(config, executor, facts)
    names = args.workloads.split(",")
    results: dict[str, Any] = {}
    for turn, name in enumerate([names[0], *names]):  # the first one, once more: it takes the scratch that kernels need
        rates = []
        rounds = args.rounds if turn else 1
        for round_ in range(rounds):
            core.forget_prefixes()
            requests = workloads.make(name, facts.vocab_size)
            sampling = workloads.SAMPLED if name.endswith("_sampled") else {"temperature": 0.0}
            num_in, num_out = sum(len(prompt) for prompt, _ in requests), sum(count for _, count in requests)
            run = Run(requests, sampling, args.profile and turn > 0 and round_ == rounds - 1)
            began = time.perf_counter()
            EngineLoop(core, executor, run, run).run()
            seconds = time.perf_counter() - began
            if not results:
                results["startup"] = {
                    "import_s": imported - began_process,
                    "load_s": loaded - imported,
                    "first_token_s": run.first_token - began_process,
                }
                print("startup", {key: round(value, 2) for key, value in results["startup"].items()}, flush=True)
                results["first"] = name
            assert run.tokens == num_out, (run.tokens, num_out)
            rates.append((num_out / seconds, num_in / seconds, run.steps))
        out, in_, steps = sorted(rates)[len(rates) // 2]
        results[name] = {"out_tok_s": round(out, 1), "in_tok_s": round(in_, 1), "steps": steps,
                         "all_out_tok_s": [round(rate[0], 1) for rate in rates]}  # fmt: skip
        print(f"{name:13} {out:10.1f} out tok/s {in_:10.1f} in tok/s  {steps} steps  "
              f"({min(rates)[0]:.0f} .. {max(rates)[0]:.0f})", flush=True)  # fmt: skip
        if run.profiler is not None:
            report_kernels(run.profiler)
    if args.json:
        args.json.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
