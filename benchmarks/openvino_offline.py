#!/usr/bin/env python3
"""The workloads of compare.py on OpenVINO GenAI in process: no server, no client, which flatters it beside a server.

    optimum-cli export openvino -m FOLDER --task text-generation-with-past --weight-format fp16 OUT
    python benchmarks/openvino_offline.py OUT FOLDER --rounds 3

FOLDER: of the model that was exported, for its tokenizer. Needs openvino-genai.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import time

import numpy as np
import openvino
import openvino_genai as genai
from compare import WORKLOADS

from hybrid_serve.cli.bench.datasets import Corpus, LocalTokens, RandomLengths


def flags(name: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    for flag in ("num-prompts", "max-concurrency", "random-input-len", "random-output-len", "random-prefix-len"):
        parser.add_argument(f"--{flag}", type=int, default=0)
    return parser.parse_args(WORKLOADS[name].split())


async def make(tokens: LocalTokens, workload: argparse.Namespace, seed: int) -> list[list[int]]:
    lengths = RandomLengths(workload.random_input_len, workload.random_output_len, workload.random_prefix_len)
    prompts = await (await Corpus.open(tokens, seed)).random(workload.num_prompts, lengths)
    return [await tokens.encode(prompt.text) for prompt in prompts]


def run(pipeline: genai.ContinuousBatchingPipeline, tokens: LocalTokens, name: str, seed: int) -> dict[str, object]:
    workload = flags(name)
    config = genai.GenerationConfig()
    config.max_new_tokens, config.ignore_eos, config.do_sample = workload.random_output_len, True, False
    ids = asyncio.run(make(tokens, workload, seed))
    waiting = [openvino.Tensor(np.array([prompt], dtype=np.int64)) for prompt in ids]
    running: list[genai.GenerationHandle] = []
    output = added = 0
    start = time.perf_counter()
    while waiting or running:
        while waiting and len(running) < workload.max_concurrency:
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
    parser.add_argument("tokenizer", help="folder of the model that was exported")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    scheduler = genai.SchedulerConfig()
    scheduler.cache_size, scheduler.enable_prefix_caching, scheduler.max_num_batched_tokens = 2, True, 2048
    pipeline = genai.ContinuousBatchingPipeline(options.model, scheduler, "CPU")
    tokens = LocalTokens(options.tokenizer)
    run(pipeline, tokens, "W1", -1)
    for index in range(options.rounds):
        for name in WORKLOADS:
            print(json.dumps(run(pipeline, tokens, name, index)), flush=True)


if __name__ == "__main__":
    main()
