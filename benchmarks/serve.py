#!/usr/bin/env python3
"""Streams fixed workloads from any OpenAI-compatible server, one JSON line a run; needs aiohttp and tokenizers.

    python benchmarks/serve.py --base-url http://127.0.0.1:8000 --model NAME --tokenizer tokenizer.json -w W1,W2

W1: one stream, 3 requests, 128 in / 128 out.        W2: 16 at a time, 32 requests, 256 / 128.
W3: 16 at a time, 32 requests, 512 shared + 32 / 64.  W4: 4 at a time, 8 requests, 1024 / 8.
Prompts have exact token counts and are fresh in every round, so a prefix cache helps inside W3 only.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import random
import statistics
import time
from dataclasses import dataclass
from pydoc_data.topics import topics
from typing import Any

import aiohttp
from tokenizers import Tokenizer


@dataclass(frozen=True)
class Workload:
    requests: int
    concurrency: int
    shared: int  # prompt tokens that all requests of a round begin with
    own: int  # prompt tokens of each request alone
    output: int


WORKLOADS = {
    "W1": Workload(3, 1, 0, 128, 128),
    "W2": Workload(32, 16, 0, 256, 128),
    "W3": Workload(32, 16, 512, 32, 64),
    "W4": Workload(8, 4, 0, 1024, 8),
}


class Prompts:
    """Texts of an exact number of tokens, cut from Python's own documentation."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.words = " ".join(topics[key] for key in sorted(topics)).split()

    def count(self, text: str) -> int:
        return len(self.tokenizer.encode(text, add_special_tokens=False).ids)

    def text(self, tokens: int, rng: random.Random, lead: str = "") -> str:
        for _ in range(500):
            at = rng.randrange(len(self.words) - 2 * tokens - 50)
            words = lead + " ".join(self.words[at : at + 2 * tokens + 20])
            ids = self.tokenizer.encode(words, add_special_tokens=False).ids[:tokens]
            text = self.tokenizer.decode(ids, skip_special_tokens=False)
            if "\ufffd" not in text and self.count(text) == tokens:
                return text
        raise RuntimeError(f"found no text of exactly {tokens} tokens")

    def make(self, name: str, seed: str) -> list[str]:
        workload, rng = WORKLOADS[name], random.Random(f"{name}-{seed}")
        shared = self.text(workload.shared, rng) if workload.shared else ""
        prompts: list[str] = []
        while len(prompts) < workload.requests:
            prompt = shared + self.text(workload.own, rng, " " if shared else "")
            if self.count(prompt) == workload.shared + workload.own:
                prompts.append(prompt)
        return prompts


async def request(
    session: aiohttp.ClientSession, options: argparse.Namespace, prompt: str, tokens: int
) -> dict[str, Any]:
    body = {
        "model": options.model,
        "prompt": prompt,
        "max_tokens": tokens,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
        "ignore_eos": True,
    }
    start, times, usage = time.perf_counter(), [], {}
    async with session.post(options.base_url + "/v1/completions", json=body) as response:
        if response.status != 200:
            raise RuntimeError(f"HTTP {response.status}: {(await response.text())[:300]}")
        async for line in response.content:
            if not line.startswith(b"data:") or line[5:].strip() == b"[DONE]":
                continue
            event = json.loads(line[5:])
            if "error" in event:
                raise RuntimeError(str(event["error"]))
            usage = event.get("usage") or usage
            if any(choice.get("text") for choice in event["choices"]):
                times.append(time.perf_counter())
    return {
        "ttft": times[0] - start,
        "latency": time.perf_counter() - start,
        "gaps": [b - a for a, b in itertools.pairwise(times)],
        "output": usage["completion_tokens"],
    }


async def run(options: argparse.Namespace, prompts: list[str], name: str) -> dict[str, Any]:
    workload, gate = WORKLOADS[name], asyncio.Semaphore(WORKLOADS[name].concurrency)
    connector = aiohttp.TCPConnector(limit=0, force_close=True)
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=300), connector=connector) as session:

        async def gated(prompt: str) -> dict[str, Any]:
            async with gate:
                return await request(session, options, prompt, workload.output)

        start = time.perf_counter()
        results = await asyncio.gather(*(gated(prompt) for prompt in prompts))
        wall = time.perf_counter() - start
    output = sum(result["output"] for result in results)
    if output != workload.requests * workload.output:
        raise RuntimeError(f"{name}: {output} tokens instead of {workload.requests * workload.output}")
    gaps = [gap for result in results for gap in result["gaps"]] or [0.0]

    def ms(values: list[float]) -> float:
        return round(1e3 * statistics.median(values), 2)

    return {
        "tag": options.tag,
        "workload": name,
        "output_tok_s": round(output / wall, 1),
        "ttft_ms": ms([result["ttft"] for result in results]),
        "itl_ms": ms(gaps),
        "latency_ms": ms([result["latency"] for result in results]),
    }


async def drive(options: argparse.Namespace) -> None:
    prompts = Prompts(Tokenizer.from_file(options.tokenizer))
    async with aiohttp.ClientSession() as session:
        await request(session, options, "Hello there, how are you", 8)  # warm-up
    for index in range(options.first_round, options.first_round + options.rounds):
        for name in options.workloads.split(","):
            print(json.dumps(await run(options, prompts.make(name, str(index)), name)), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base-url", default="http://127.0.0.1:8000")
    parser.add_argument("--model", required=True)
    parser.add_argument("--tokenizer", required=True, help="a tokenizer.json")
    parser.add_argument("-w", "--workloads", default="W1,W2,W3,W4")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--first-round", type=int, default=0, help="seeds the prompts")
    parser.add_argument("--tag", default="server")
    asyncio.run(drive(parser.parse_args()))


if __name__ == "__main__":
    main()
