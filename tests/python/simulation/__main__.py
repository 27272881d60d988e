"""``python -m simulation [--show] FIRST [COUNT]`` runs seeds, says which fail and how requests end; Ctrl-C: so far."""

from __future__ import annotations

import argparse
import gc
import signal
import time
from collections import Counter

from .world import SimulationFailed, run


def main() -> int:
    parser = argparse.ArgumentParser(prog="simulation", description=__doc__)
    parser.add_argument("first", type=int, help="seed")
    parser.add_argument("count", type=int, nargs="?", default=1, help="so many seeds from there on")
    parser.add_argument("--show", action="store_true", help="every event")
    options = parser.parse_args()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # also where a shell started this in the background
    num_done, num_failed, ends, counts, began = 0, 0, Counter[str](), Counter[str](), time.monotonic()
    for seed in range(options.first, options.first + options.count):
        try:
            outcome = run(seed, print if options.show else None)
        except KeyboardInterrupt:
            break
        except SimulationFailed as error:
            num_failed += 1
            print(error, flush=True)
        else:
            ends += outcome.ends
            counts += outcome.counts
        num_done += 1
        if num_done % 100 == 0:
            gc.collect()  # engines are in cycles, and each has files open
    seconds = time.monotonic() - began
    print(f"{num_done} seeds, {num_failed} failed, {seconds:.0f} s; requests: {dict(ends)}; {dict(counts)}")
    return int(num_failed > 0)


if __name__ == "__main__":
    raise SystemExit(main())
