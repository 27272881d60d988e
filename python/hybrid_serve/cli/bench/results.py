"""From outcomes to numbers: one table for the eye, one object with the keys of `vllm bench serve` for programs."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import numpy as np

from .load import Outcome

METRICS = ("ttft", "tpot", "itl", "e2el")


def summary(
    outcomes: Sequence[Outcome], seconds: float, percentiles: Sequence[float], goodput: dict[str, float]
) -> dict[str, Any]:
    """``goodput``: metric -> milliseconds that a good request does not exceed."""
    good = [outcome for outcome in outcomes if not outcome.error]
    output = sum(outcome.output_tokens for outcome in good)
    prompt = sum(outcome.prompt.num_tokens for outcome in good)
    found: dict[str, Any] = {
        "duration": seconds,
        "completed": len(good),
        "failed": len(outcomes) - len(good),
        "total_input_tokens": prompt,
        "total_output_tokens": output,
        "request_throughput": len(good) / seconds,
        "request_goodput": sum(_is_good(one, goodput) for one in good) / seconds if goodput else None,
        "output_throughput": output / seconds,
        "total_token_throughput": (prompt + output) / seconds,
        "max_concurrent_requests": _most_at_once(good),
    }
    for metric in METRICS:
        values = np.array(_values(good, metric) or [0.0]) * 1000
        found[f"mean_{metric}_ms"] = float(values.mean())
        found[f"median_{metric}_ms"] = float(np.median(values))
        found[f"std_{metric}_ms"] = float(values.std())
        for percentile in percentiles:
            found[f"p{percentile:g}_{metric}_ms"] = float(np.percentile(values, percentile))
    return found


def details(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """One entry a request, for ``--save-detailed``."""
    return {
        "input_lens": [outcome.prompt.num_tokens for outcome in outcomes],
        "output_lens": [outcome.output_tokens for outcome in outcomes],
        "ttfts": [outcome.ttft for outcome in outcomes],
        "itls": [outcome.itl for outcome in outcomes],
        "generated_texts": [outcome.text for outcome in outcomes],
        "errors": [outcome.error for outcome in outcomes],
    }


def table(found: dict[str, Any], metrics: Sequence[str], percentiles: Sequence[float]) -> str:
    total = found["completed"] + found["failed"]
    lines = [
        f"requests  {found['completed']} of {total} in {found['duration']:.2f} s, "
        f"{found['request_throughput']:.2f} a second, at most {found['max_concurrent_requests']} at once",
        f"tokens    {found['total_input_tokens']} in, {found['total_output_tokens']} out; "
        f"{found['output_throughput']:.1f} out a second, {found['total_token_throughput']:.1f} in all",
    ]
    if found["request_goodput"] is not None:
        lines.append(f"goodput   {found['request_goodput']:.2f} requests a second")
    names = ["mean", "median", *(f"p{percentile:g}" for percentile in percentiles)]
    lines.append("ms        " + "".join(f"{name:>10}" for name in names))
    for metric in metrics:
        lines.append(f"{metric.upper():<10}" + "".join(f"{found[f'{name}_{metric}_ms']:>10.1f}" for name in names))
    return "\n".join(lines)


def _values(outcomes: Sequence[Outcome], metric: str) -> list[float]:
    """Seconds."""
    if metric == "itl":
        return [gap for outcome in outcomes for gap in outcome.itl]
    if metric == "tpot":
        return [outcome.tpot for outcome in outcomes if outcome.output_tokens > 1]
    return [outcome.ttft if metric == "ttft" else outcome.latency for outcome in outcomes]


def _is_good(outcome: Outcome, limits: dict[str, float]) -> bool:
    return all(value * 1000 <= limit for name, limit in limits.items() for value in _values([outcome], name))


def _most_at_once(outcomes: Sequence[Outcome]) -> int:
    starts = [(outcome.start, 1) for outcome in outcomes]
    ends = [(outcome.start + outcome.latency, -1) for outcome in outcomes]
    return max(accumulate(change for _, change in sorted(starts + ends)), default=0)
