"""``bench throughput`` and ``bench latency``: the engine in this process, no server, no text."""

from __future__ import annotations

import json
import os
import random
import sys
import time
from argparse import Namespace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ... import SamplingParams
from ...errors import StartupError, box
from .. import options
from ..progress import Progress
from ..settings import settings
from ..usage import Parser, UsageError, dashed
from .serve import count

if TYPE_CHECKING:
    from ... import LLM

_PERCENTILES = (10, 25, 50, 75, 90, 99)


def throughput(argv: list[str]) -> int:
    """All prompts at once; requests and tokens a second."""
    parser = _parser("throughput", "Runs all prompts at once through the engine, and reports tokens a second.")
    parser.add_argument("--num-prompts", type=count, default=100, metavar="N", help="default: %(default)s")
    return _run(parser, argv, _throughput)


def latency(argv: list[str]) -> int:
    """One batch, several times; seconds a batch."""
    parser = _parser("latency", "Runs one batch several times, and reports the seconds that it takes.")
    parser.add_argument("--batch-size", type=count, default=8, metavar="N", help="default: %(default)s")
    parser.add_argument("--n", type=count, default=1, metavar="N", help="replies a prompt (default: %(default)s)")
    parser.add_argument("--num-iters-warmup", type=int, default=2, metavar="N", help="default: %(default)s")
    parser.add_argument("--num-iters", type=count, default=10, metavar="N", help="default: %(default)s")
    return _run(parser, argv, _latency)


def _parser(kind: str, description: str) -> Parser:
    parser = Parser(
        f"hybrid-serve bench {kind}", description, "Further words are a MODEL and options of serve that an engine has."
    )
    parser.usage = f"hybrid-serve bench {kind} [MODEL] [OPTION ...]"
    parser.add_argument(
        "--input-len", type=count, default=32, metavar="N", help="tokens a prompt (default: %(default)s)"
    )
    parser.add_argument(
        "--output-len", type=count, default=128, metavar="N", help="tokens a reply (default: %(default)s)"
    )
    parser.add_argument("--output-json", metavar="FILE", help="write the result there, too")
    return parser


def _run(parser: Parser, argv: list[str], measure: Any) -> int:
    arguments, rest = parser.parse_known_args(dashed(argv))
    chosen = options.parse(rest, os.environ)
    given = {}
    for setting in settings():
        origin = chosen.origins.get(setting.name)
        if origin is None:
            continue
        if setting.group in ("server", "parallel", "routing"):
            if origin.startswith("--"):
                raise UsageError(f"{origin}: there is no server in this measurement")
            continue
        given[setting.name] = getattr(getattr(chosen.config, setting.group), setting.name)
    try:
        from ... import LLM

        found = measure(arguments, LLM(**given))
    except StartupError as error:
        print(box(error.failure), file=sys.stderr)
        return error.failure.exit_code
    except ValueError as error:  # longer than the model's context, say
        raise UsageError(str(error)) from None
    if arguments.output_json:
        Path(arguments.output_json).write_text(json.dumps(found, indent=1) + "\n")
    return 0


def _prompts(llm: LLM, num_prompts: int, num_tokens: int, chooser: random.Random) -> list[list[int]]:
    """Random ids, so that no prompt begins as another does and a prefix cache cannot help."""
    return [[chooser.randrange(llm.tokenizer.vocab_size) for _ in range(num_tokens)] for _ in range(num_prompts)]


def _params(output_len: int) -> SamplingParams:
    return SamplingParams(max_tokens=output_len, temperature=0.0, ignore_eos=True)


def _throughput(arguments: Namespace, llm: LLM) -> dict[str, Any]:
    chooser, params = random.Random(0), _params(arguments.output_len)
    llm.generate(_prompts(llm, 1, arguments.input_len, chooser), _params(1))  # the first step of all is slower
    prompts = _prompts(llm, arguments.num_prompts, arguments.input_len, chooser)
    start = time.perf_counter()
    outputs = llm.generate(prompts, params)
    seconds = time.perf_counter() - start
    output = sum(len(reply.token_ids) for one in outputs for reply in one.outputs)
    total = output + arguments.num_prompts * arguments.input_len
    print(
        f"{arguments.num_prompts / seconds:.2f} requests a second, {total / seconds:.1f} tokens a second, "
        f"{output / seconds:.1f} of them output"
    )
    return {
        "elapsed_time": seconds,
        "num_requests": arguments.num_prompts,
        "total_num_tokens": total,
        "requests_per_second": arguments.num_prompts / seconds,
        "tokens_per_second": total / seconds,
        "output_tokens_per_second": output / seconds,
    }


def _latency(arguments: Namespace, llm: LLM) -> dict[str, Any]:
    import numpy as np

    chooser, params, seconds = random.Random(0), _params(arguments.output_len), []
    rounds = arguments.num_iters_warmup + arguments.num_iters
    with Progress("bench", rounds) as progress:
        for _ in range(rounds):
            prompts = _prompts(llm, arguments.batch_size, arguments.input_len, chooser)
            start = time.perf_counter()
            llm.generate(prompts, params, n=arguments.n)
            seconds.append(time.perf_counter() - start)
            progress.add(1)
    measured = seconds[arguments.num_iters_warmup :]
    percentiles = {str(each): float(np.percentile(measured, each)) for each in _PERCENTILES}
    average = sum(measured) / len(measured)
    print(f"average {average:.4f} s a batch of {arguments.batch_size}")
    print("  ".join(f"p{name} {value:.4f} s" for name, value in percentiles.items()))
    return {"avg_latency": average, "latencies": measured, "percentiles": percentiles}
