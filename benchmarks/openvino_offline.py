#!/usr/bin/env python3
"""The workloads of serve.py on OpenVINO GenAI in process: no server, no client, which flatters it beside a server.

    optimum-cli export openvino -m FOLDER --task text-generation-with-past --weight-format fp16 OUT
    python benchmarks/openvino_offline.py OUT tokenizer.json --rounds 3

Needs openvino-genai, tokenizers, aiohttp.
"""

from __future__ import annotations

import argparse
import json
import time

import numpy as np
import openvino
import openvino_genai as genai
from serve import WORKLOADS, Prompts
from tokenizers import Tokenizer


def run(pipeline: genai.ContinuousBatchingPipeline, prompts: Prompts, name: str, seed: str) -> dict[str, object]:
    workload = WORKLOADS[name]
    config = genai.GenerationConfig()
    config.max_new_tokens, config.ignore_eos, config.do_sample = workload.output, True, False
    ids = [prompts.tokenizer.encode(text, add_special_tokens=False).ids for text in prompts.make(name, seed)]
    waiting = [openvino.Tensor(np.array([prompt], dtype=np.int64)) for prompt in ids]
    running: list[genai.GenerationHandle] = []
    output = added = 0
    start = time.perf_counter()
    while waiting or running:
        while waiting and len(running) < workload.concurrency:
            running.append(pipeline.add_request(added, waiting.pop(0), config))
            added += 1
        pipeline.step()
        finished = [handle for handle in running if handle.get_status() == genai.GenerationStatus.FINISHED]
        output += sum(len(handle.read_all()[0].generated_ids) for handle in finished)
        running = [handle for handle in running if handle not in finished]
    return {"workload": name, "output_tok_s": round(output / (time.perf_counter() - start), 1)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder that optimum-cli exported")
    parser.add_argument("tokenizer", help="a tokenizer.json")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    scheduler = genai.SchedulerConfig()
    scheduler.cache_size, scheduler.enable_prefix_caching, scheduler.max_num_batched_tokens = 2, True, 2048
    pipeline = genai.ContinuousBatchingPipeline(options.model, scheduler, "CPU")
    prompts = Prompts(Tokenizer.from_file(options.tokenizer))
    run(pipeline, prompts, "W1", "warm-up")
    for index in range(options.rounds):
        for name in WORKLOADS:
            print(json.dumps(run(pipeline, prompts, name, str(index))), flush=True)


if __name__ == "__main__":
    main()
