"""``bench serve``: load on a running server."""

from __future__ import annotations

import asyncio
import json
import math
import os
import time
from argparse import ArgumentTypeError, Namespace
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ..http_client import HttpClient, HttpFailure
from ..progress import Progress
from ..usage import Parser, UsageError, dashed
from . import load, results
from .datasets import Corpus, LocalTokens, RandomLengths, ServerTokens, Tokens, conversations

ENDPOINTS = {"openai": "/v1/completions", "vllm": "/v1/completions", "openai-chat": "/v1/chat/completions"}
_QUICK = {"num_prompts": 16, "random_input_len": 128, "random_output_len": 64, "max_concurrency": 4}


def serve(argv: list[str]) -> int:
    """1: no request succeeded."""
    parser = Parser(
        "hybrid-serve bench serve", "Streams requests to a running server and reports how long tokens took."
    )
    add_load_flags(parser)
    parser.add_argument("--request-rate", type=rate, default=math.inf, metavar="X", help="requests a second (inf)")
    parser.add_argument(
        "--ramp-up-strategy", choices=("linear", "exponential"), help="instead: a rate that changes during the run"
    )
    parser.add_argument("--ramp-up-start-rps", type=rate, metavar="X", help="of its first request")
    parser.add_argument("--ramp-up-end-rps", type=rate, metavar="X", help="of its last")
    parser.add_argument("--max-concurrency", type=count, metavar="N", help="most requests at once (no limit)")
    parser.add_argument(
        "--quick", action="store_true", help="a short look: 16 prompts of 128 tokens, 64 out, 4 at once"
    )
    arguments = parser.parse_args(dashed(argv))
    if arguments.quick:
        vars(arguments).update(_QUICK)
    found = asyncio.run(measure(arguments))
    print(results.table(found, arguments.percentile_metrics, arguments.metric_percentiles))
    if arguments.save_result or arguments.save_detailed:
        path = save(arguments, found)
        print(f"written to {path}")
    return 0 if found["completed"] else 1


def add_load_flags(parser: Parser) -> None:
    """What ``serve`` and ``sweep`` share."""
    add = parser.add_argument
    add("--backend", choices=sorted(ENDPOINTS), default="openai", help="which API; vllm is openai (default: openai)")
    add("--base-url", metavar="URL", help="default: http://HOST:PORT")
    add("--host", default="127.0.0.1", help="default: %(default)s")
    add("--port", type=int, default=8000, help="default: %(default)s")
    add("--endpoint", metavar="PATH", help="default: by the backend")
    add("--api-key", metavar="KEY", help="default: the variable HYBRID_SERVE_API_KEY, then none")
    add("--model", metavar="NAME", help="default: the first that the server lists")
    add(
        "--tokenizer",
        metavar="WHERE",
        help="model folder, GGUF file or hub id; default: the server's own, by /tokenize",
    )
    add("--dataset-name", choices=("random", "sharegpt", "sharegpt-like"), default="random", help="default: random")
    add("--dataset-path", metavar="FILE", help="of sharegpt: a JSON file of conversations")
    add("--num-prompts", type=count, default=100, metavar="N", help="default: %(default)s")
    add("--random-input-len", type=count, default=1024, metavar="N", help="tokens a prompt (default: %(default)s)")
    add("--random-output-len", type=count, default=128, metavar="N", help="tokens a reply (default: %(default)s)")
    add("--random-prefix-len", type=int, default=0, metavar="N", help="tokens before, that all prompts share (0)")
    add("--random-range-ratio", type=float, default=0.0, metavar="X", help="lengths vary by this share, below 1 (0)")
    add("--sharegpt-output-len", type=count, metavar="N", help="instead of the conversations' own")
    add("--burstiness", type=float, default=1.0, metavar="X", help="shape of the gaps; 1: Poisson, less: bursts (1)")
    add("--seed", type=int, default=0, metavar="N", help="of prompts and arrivals (default: %(default)s)")
    add("--num-warmups", type=int, default=1, metavar="N", help="requests before the measurement (1)")
    add("--ignore-eos", action="store_true", help="replies are as long as asked for")
    add("--temperature", type=float, default=0.0, metavar="X", help="default: %(default)s")
    add("--extra-body", type=json_object, default={}, metavar="JSON", help="more fields for every request")
    add("--goodput", nargs="+", type=limit, default=[], metavar="METRIC:MS", help="count requests within these limits")
    add(
        "--percentile-metrics",
        type=metric_names,
        default=results.METRICS,
        metavar="LIST",
        help="shown: ttft,tpot,itl,e2el",
    )
    add("--metric-percentiles", type=numbers, default=(99.0,), metavar="LIST", help="shown and saved, such as 50,90,99")
    add("--ready-check-timeout-sec", type=float, default=60.0, metavar="X", help="how long to wait for the server (60)")
    add("--label", metavar="TEXT", help="kept in the result")
    add("--save-result", action="store_true", help="write a JSON file")
    add("--save-detailed", action="store_true", help="with one entry a request in it")
    add("--result-dir", metavar="FOLDER", default=".", help="default: here")
    add("--result-filename", metavar="NAME", help="default: made of the load, the model and the time")


async def measure(arguments: Namespace) -> dict[str, Any]:
    """Waits for the server, makes prompts, sends them. Raises UsageError if the server cannot be used."""
    pace = _pace(arguments)
    url = arguments.base_url or f"http://{arguments.host}:{arguments.port}"
    key = arguments.api_key or os.environ.get("HYBRID_SERVE_API_KEY", "").split(",")[0]
    client = HttpClient(url, key)
    try:
        served = await _wait_ready(client, url, arguments.ready_check_timeout_sec)
        model = arguments.model or served
        tokens = LocalTokens(arguments.tokenizer) if arguments.tokenizer else ServerTokens(client, model)
        prompts = await _prompts(arguments, tokens)
        path = arguments.endpoint or ENDPOINTS[arguments.backend]
        fields = {"temperature": arguments.temperature, **({"ignore_eos": True} if arguments.ignore_eos else {})}
        fields |= arguments.extra_body
        target = load.Target(client, path, model, arguments.backend == "openai-chat", fields)
        for prompt in (prompts * arguments.num_warmups)[: arguments.num_warmups]:
            # Another text of the same kind: the measured one must not be in a prefix cache already.
            if error := (await load.send(target, load.Prompt("Hello", 1, prompt.output_len))).error:
                raise UsageError(f"the first request failed: {error}")
        times = load.arrivals(len(prompts), pace, arguments.burstiness, arguments.seed)
        with Progress("bench", len(prompts)) as progress:
            outcomes, seconds = await load.run(
                target, prompts, times, arguments.max_concurrency, lambda _: progress.add(1)
            )
    finally:
        client.close()
    return _described(arguments, url, model) | _measured(arguments, outcomes, seconds)


def _pace(arguments: Namespace) -> float | load.Ramp:
    """What ``--request-rate`` or ``--ramp-up-...`` say."""
    given = vars(arguments)  # of a sweep without a ramp: it changes the rate itself
    strategy, start, end = (given.get(f"ramp_up_{name}") for name in ("strategy", "start_rps", "end_rps"))
    if strategy is None and start is None and end is None:
        return float(arguments.request_rate)
    if strategy is None or start is None or end is None or math.isinf(start) or math.isinf(end):
        raise UsageError("--ramp-up-strategy needs --ramp-up-start-rps and --ramp-up-end-rps, two numbers, and they it")
    if math.isfinite(arguments.request_rate):
        raise UsageError("--request-rate and --ramp-up-strategy both set the pace: give one")
    return load.Ramp(start, end, is_exponential=strategy == "exponential")


def _measured(arguments: Namespace, outcomes: Sequence[load.Outcome], seconds: float) -> dict[str, Any]:
    if errors := [outcome.error for outcome in outcomes if outcome.error]:
        print(f"{len(errors)} requests failed, the first by: {errors[0]}")
    found = results.summary(outcomes, seconds, arguments.metric_percentiles, dict(arguments.goodput))
    return found | (results.details(outcomes) if arguments.save_detailed else {})


def _described(arguments: Namespace, url: str, model: str) -> dict[str, Any]:
    ramp = {name: value for name, value in vars(arguments).items() if name.startswith("ramp_up") and value is not None}
    return {
        "date": time.strftime("%Y%m%d-%H%M%S"),
        "backend": arguments.backend,
        "label": arguments.label,
        "base_url": url,
        "model_id": model,
        "tokenizer_id": arguments.tokenizer or model,
        "dataset_name": arguments.dataset_name,
        "num_prompts": arguments.num_prompts,
        "request_rate": arguments.request_rate if math.isfinite(arguments.request_rate) else "inf",
        "burstiness": arguments.burstiness,
        "max_concurrency": arguments.max_concurrency,
        **ramp,
    }


async def _wait_ready(client: HttpClient, url: str, seconds: float) -> str:
    """The first model that the server lists, as soon as it takes requests."""
    end = time.monotonic() + seconds
    while True:
        try:
            async with client.request("GET", "/v1/models") as answer:
                body, status = await answer.read(), answer.status
            if status == 200 and await _takes_requests(client):
                return str(json.loads(body)["data"][0]["id"])
            why = "the model is not loaded" if status == 200 else f"HTTP {status}"
        except HttpFailure as error:
            why = str(error)
        except (ValueError, LookupError, TypeError):
            raise UsageError(f"{url}/v1/models lists no model: name one with --model") from None
        if _is_final(why) or time.monotonic() >= end:
            raise UsageError(f"{url} is not ready: {why}")
        await asyncio.sleep(0.2)


def _is_final(why: str) -> bool:
    """Whether waiting cannot help: a key is missing, or there is no such route."""
    return why in ("HTTP 401", "HTTP 403", "HTTP 404")


async def _takes_requests(client: HttpClient) -> bool:
    async with client.request("GET", "/health") as answer:
        await answer.read()
    return answer.status != 503


async def _prompts(arguments: Namespace, tokens: Tokens) -> list[load.Prompt]:
    if arguments.dataset_name == "sharegpt":
        if not arguments.dataset_path:
            raise UsageError("--dataset-name sharegpt needs --dataset-path FILE (sharegpt-like needs none)")
        return await conversations(
            tokens, arguments.dataset_path, arguments.num_prompts, arguments.sharegpt_output_len, arguments.seed
        )
    corpus = await Corpus.open(tokens, arguments.seed)
    if arguments.dataset_name == "sharegpt-like":
        return await corpus.like_chat(arguments.num_prompts)
    lengths = RandomLengths(
        arguments.random_input_len,
        arguments.random_output_len,
        arguments.random_prefix_len,
        arguments.random_range_ratio,
    )
    return await corpus.random(arguments.num_prompts, lengths)


def save(arguments: Namespace, found: Any) -> Path:
    """Writes the JSON file; its place."""
    model = str(found["model_id"] if isinstance(found, dict) else found[0]["model_id"]).rsplit("/", 1)[-1]
    name = arguments.result_filename or f"{arguments.backend}-{model}-{time.strftime('%Y%m%d-%H%M%S')}.json"
    path = Path(arguments.result_dir, name)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(found, indent=1) + "\n")
    return path


def checked(kind: Callable[[str], Any], is_right: Callable[[Any], bool], what: str) -> Callable[[str], Any]:
    def convert(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            value = None
        if value is None or not is_right(value):
            raise ArgumentTypeError(f"{text!r} is not {what}")
        return value

    return convert


def _limit(text: str) -> tuple[str, float]:
    name, _, milliseconds = text.partition(":")
    return name, float(milliseconds)


count = checked(int, lambda value: value >= 1, "a whole number from 1 on")
rate = checked(float, lambda value: value > 0, "a number above 0, or inf")
json_object = checked(json.loads, lambda value: isinstance(value, dict), "a JSON object")
limit = checked(_limit, lambda pair: pair[0] in results.METRICS and pair[1] > 0, "like ttft:200")
metric_names = checked(
    lambda text: tuple(text.split(",")),
    lambda names: set(names) <= set(results.METRICS),
    f"a list of {', '.join(results.METRICS)}",
)
numbers = checked(
    lambda text: tuple(float(each) for each in text.split(",")),
    lambda values: all(0 <= value <= 100 for value in values),
    "a list of percentages",
)
