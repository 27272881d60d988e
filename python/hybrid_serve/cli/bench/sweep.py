"""``bench sweep``: the same measurement at several loads, as a table and a plot of latency over throughput."""

from __future__ import annotations

import asyncio
import math
from argparse import Namespace
from importlib.util import find_spec
from typing import Any

from ..usage import Parser, UsageError, dashed
from .serve import add_load_flags, count, measure, rate, save

_COLUMNS = (
    ("req/s", "request_throughput", ".2f"),
    ("out tok/s", "output_throughput", ".1f"),
    ("TTFT p50", "median_ttft_ms", ".1f"),
    ("TTFT p99", "p99_ttft_ms", ".1f"),
    ("TPOT p50", "median_tpot_ms", ".1f"),
    ("TPOT p99", "p99_tpot_ms", ".1f"),
)


def sweep(argv: list[str]) -> int:
    """1: at some load no request succeeded."""
    parser = Parser("hybrid-serve bench sweep", "Measures a running server at several loads; see also bench serve.")
    add_load_flags(parser)
    loads = parser.add_mutually_exclusive_group()
    loads.add_argument("--max-concurrency", nargs="+", type=count, metavar="N", help="default: 1 2 4 8 16")
    loads.add_argument("--request-rate", nargs="+", type=rate, metavar="X", help="requests a second, instead")
    parser.add_argument("--plot", metavar="FILE", help="latency over throughput, such as out.svg (extra: [bench])")
    arguments = parser.parse_args(dashed(argv))
    if arguments.plot and find_spec("matplotlib") is None:
        raise UsageError("--plot needs matplotlib: pip install 'hybrid-serve[bench]'")
    if 99.0 not in arguments.metric_percentiles:
        arguments.metric_percentiles = (*arguments.metric_percentiles, 99.0)
    found = [asyncio.run(measure(point)) for point in _points(arguments)]
    print(_table(found))
    if arguments.plot:
        plot(found, arguments.plot)
        print(f"plotted to {arguments.plot}")
    if arguments.save_result or arguments.save_detailed:
        print(f"written to {save(arguments, found)}")
    return 0 if all(point["completed"] for point in found) else 1


def _points(arguments: Namespace) -> list[Namespace]:
    """One set of arguments a load. Each has its own seed: what one left in a prefix cache must not help the next."""
    shared = vars(arguments)
    pairs: list[tuple[float, int | None]]
    if arguments.request_rate:
        pairs = [(each, None) for each in arguments.request_rate]
    else:
        pairs = [(math.inf, each) for each in arguments.max_concurrency or (1, 2, 4, 8, 16)]
    return [
        Namespace(**{**shared, "request_rate": pair[0], "max_concurrency": pair[1], "seed": arguments.seed + 1000 * i})
        for i, pair in enumerate(pairs)
    ]


def _name(point: dict[str, Any]) -> str:
    concurrency = point["max_concurrency"]
    return f"{concurrency} at once" if concurrency else f"{point['request_rate']:g} req/s"


def _table(found: list[dict[str, Any]]) -> str:
    lines = [f"{'load':<12}" + "".join(f"{title:>11}" for title, _, _ in _COLUMNS)]
    for point in found:
        lines.append(f"{_name(point):<12}" + "".join(f"{point[key]:>11{form}}" for _, key, form in _COLUMNS))
    return "\n".join(lines)


def plot(found: list[dict[str, Any]], path: str) -> None:
    """Two panels, time to the first token and time a token, over tokens a second; one point a load."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, 2, figsize=(10, 4), layout="constrained")
    across = [point["output_throughput"] for point in found]
    for panel, metric, title in zip(panels, ("ttft", "tpot"), ("first token", "each further token"), strict=True):
        for which in ("median", "p99"):
            panel.plot(across, [point[f"{which}_{metric}_ms"] for point in found], marker="o", label=which)
        for x, point in zip(across, found, strict=True):
            panel.annotate(
                _name(point), (x, point[f"p99_{metric}_ms"]), fontsize=7, xytext=(3, 3), textcoords="offset points"
            )
        panel.set(xlabel="output tokens a second", ylabel=f"{title}, ms", ylim=(0, None))
        panel.grid(alpha=0.3)
        panel.legend()
    figure.suptitle(f"{found[0]['model_id']} at {found[0]['base_url']}")
    try:
        figure.savefig(path)
    except (OSError, ValueError) as error:
        raise UsageError(f"--plot {path}: {error}") from None
    finally:
        pyplot.close(figure)
