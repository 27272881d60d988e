#!/usr/bin/env python3
"""vLLM's offline engine on the workloads of engine_offline.py, with the same random weights' shapes and the same flags.

    python benchmarks/vllm_offline.py CONFIG.json [--workloads single,chat] [--rounds 3] [--json OUT]

Needs vllm (0.24 was measured). Its own start, compilation and graphs included, is not in the rates; the first workload
is run once more, ahead, as in engine_offline.py.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil
import workloads
from vllm import LLM, SamplingParams


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path)
    parser.add_argument("--workloads", default=",".join(workloads.NAMES))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    began_process, imported = psutil.Process().create_time(), time.time()
    with tempfile.TemporaryDirectory() as folder:
        shutil.copy(args.config, Path(folder) / "config.json")
        llm = LLM(
            model=folder,
            load_format="dummy",
            skip_tokenizer_init=True,
            max_model_len=8192,
            gpu_memory_utilization=0.9,
            max_num_seqs=256,
            seed=0,
        )
    started = time.time()
    vocab_size = json.loads(args.config.read_text())["vocab_size"]
    results: dict[str, Any] = {}
    names = args.workloads.split(",")
    for turn, name in enumerate([names[0], *names]):
        rates = []
        for _ in range(args.rounds if turn else 1):
            llm.reset_prefix_cache()
            requests = workloads.make(name, vocab_size)
            how: dict[str, Any] = workloads.SAMPLED if name.endswith("_sampled") else {"temperature": 0.0}
            sampling = [SamplingParams(**how, max_tokens=count, ignore_eos=True, detokenize=False)
                        for _, count in requests]  # fmt: skip
            prompts = [{"prompt_token_ids": prompt} for prompt, _ in requests]
            began = time.perf_counter()
            outputs = llm.generate(prompts, sampling, use_tqdm=False)
            seconds = time.perf_counter() - began
            num_out = sum(len(output.outputs[0].token_ids) for output in outputs)
            assert num_out == sum(count for _, count in requests), num_out
            rates.append((num_out / seconds, sum(len(prompt) for prompt, _ in requests) / seconds))
        if not results:
            results["startup"] = {"import_s": imported - began_process, "load_s": started - imported,
                                  "first_token_s": time.time() - began_process}  # fmt: skip
            print("startup", {key: round(value, 2) for key, value in results["startup"].items()}, flush=True)
        out, in_ = sorted(rates)[len(rates) // 2]
        results[name] = {"out_tok_s": round(out, 1), "in_tok_s": round(in_, 1),
                         "all_out_tok_s": [round(rate[0], 1) for rate in rates]}  # fmt: skip
        print(f"{name:13} {out:10.1f} out tok/s {in_:10.1f} in tok/s  "
              f"({min(rates)[0]:.0f} .. {max(rates)[0]:.0f})", flush=True)  # fmt: skip
    if args.json:
        args.json.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
