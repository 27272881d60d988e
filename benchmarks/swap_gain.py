"""What --swap-space gives requests that are preempted, with a real model: the same requests with KV for all of them,
with KV for a share of them, and with that share and swap space, turn by turn.

    PYTHONPATH=python python benchmarks/swap_gain.py [--model MODEL] [--share 0.6] [--prompt-tokens 512] [--rounds 3]

Prints, by workload, output tokens a second of wall time and of the process's CPU time (which other work on the machine
moves less), preemptions, and how many tokens the steps computed for each that was needed. Checks that the tokens are
those of the run with KV for all.
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import NamedTuple

import numpy as np

from hybrid_serve import LLM, SamplingParams

CASES = ("all", "share", "share + swap")


class Found(NamedTuple):
    by_wall: float
    by_cpu: float
    preemptions: int
    computed: float  # tokens, of each that was needed
    tokens: list[list[int]]


def run(llm: LLM, prompts: list[list[int]], params: SamplingParams) -> Found:
    llm.core.forget_prefixes()
    before, cpu, wall = llm.core.stats(), time.process_time(), time.perf_counter()
    outputs = llm.generate(prompts, params)
    wall, cpu, after = time.perf_counter() - wall, time.process_time() - cpu, llm.core.stats()
    tokens = [output.outputs[0].token_ids for output in outputs]
    made = sum(map(len, tokens))
    needed = sum(map(len, prompts)) + made - len(prompts)  # nothing is computed for the last token of a reply
    computed = (after.step_tokens - before.step_tokens) / needed
    return Found(made / wall, made / cpu, after.num_preemptions - before.num_preemptions, computed, tokens)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="")
    parser.add_argument("--share", type=float, default=0.6, help="KV blocks, of those that all requests need at once")
    parser.add_argument("--requests", type=int, default=16)
    parser.add_argument("--prompt-tokens", type=int, nargs="+", default=[128, 512, 1024])
    parser.add_argument("--output-tokens", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=3)
    chosen = parser.parse_args()
    print("| prompt / reply | KV | tok/s | tok/CPU s | preemptions | computed / needed |\n|---|---|---|---|---|---|")
    for length in chosen.prompt_tokens:
        random = np.random.default_rng(length)
        prompts = random.integers(100, 30_000, (chosen.requests, length)).tolist()
        params = SamplingParams(max_tokens=chosen.output_tokens, temperature=0, ignore_eos=True)
        need = chosen.requests * -(-(length + chosen.output_tokens) // 16)
        blocks = {"all": need + 8, "share": int(need * chosen.share), "share + swap": int(need * chosen.share)}
        llms = {
            case: LLM(
                chosen.model,
                num_gpu_blocks_override=blocks[case],
                max_model_len=length + chosen.output_tokens,
                max_num_seqs=chosen.requests,
                swap_space=2.0 if case == CASES[-1] else 0.0,
            )
            for case in CASES
        }
        found: dict[str, list[Found]] = {case: [] for case in CASES}
        for turn in range(chosen.rounds):
            for case in CASES[turn % 3 :] + CASES[: turn % 3]:
                found[case].append(run(llms[case], prompts, params))
                assert found[case][-1].tokens == found["all"][0].tokens if found["all"] else True, case
        for case in CASES:
            rows = found[case]
            rates = [statistics.median(getattr(row, name) for row in rows) for name in ("by_wall", "by_cpu")]
            print(
                f"| {length} / {chosen.output_tokens} | {case} | {rates[0]:.1f} | {rates[1]:.1f} "
                f"| {rows[0].preemptions} | {rows[0].computed:.2f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
