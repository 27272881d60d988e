"""Whether `bench serve` and guidellm say the same of one server: turn by turn, each beside what the server counted.

    python -m venv GL && GL/bin/pip install guidellm     # outside of this repository
    PYTHONPATH=python python benchmarks/bench_agreement.py --guidellm GL/bin/guidellm --pace 0.05 --first 1
    PYTHONPATH=python python benchmarks/bench_agreement.py --guidellm GL/bin/guidellm --url http://127.0.0.1:8000

With --pace SECONDS it starts a server of its own, over an engine that keeps to a timetable: a stream's first token
--first seconds after it has come, then one every --pace seconds, whatever else the machine does. Its speed cannot move,
and the clients' figures must agree. A real server's speed may change from one minute to the next; what must not is the
ratio of a client's mean to the server's own mean over the same requests (/metrics before and after).
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import re
import socket
import statistics
import subprocess
import sys
import tempfile
import urllib.request
from pathlib import Path

from http_stream import demo_tokenizer, serve

Figures = dict[str, float]  # mean TTFT and ITL in ms, output tokens a second
NAMES = ("ttft", "itl", "tok/s")


def counts(url: str) -> Figures:
    text = urllib.request.urlopen(f"{url}/metrics").read().decode()
    return {
        f"{name}_{what}": float(re.findall(rf"^vllm:{name}_seconds_{what}\{{.*\}} (\S+)$", text, re.MULTILINE)[0])
        for name in ("time_to_first_token", "inter_token_latency")
        for what in ("sum", "count")
    }


def server_means(before: Figures, after: Figures) -> Figures:
    def mean(name: str) -> float:
        return (after[f"{name}_sum"] - before[f"{name}_sum"]) / (after[f"{name}_count"] - before[f"{name}_count"]) * 1e3

    return {"ttft": mean("time_to_first_token"), "itl": mean("inter_token_latency")}


def ours(chosen: argparse.Namespace, seed: int, folder: Path) -> Figures:
    run = f"bench serve --base-url {chosen.url} --num-warmups 0 --ignore-eos --seed {seed} --save-result"
    run += f" --num-prompts {chosen.requests} --max-concurrency {chosen.streams} --result-dir {folder}"
    run += f" --random-input-len {chosen.prompt_tokens} --random-output-len {chosen.output_tokens}"
    subprocess.run([sys.executable, "-m", "hybrid_serve", *run.split()], check=True, stdout=subprocess.DEVNULL)
    (file,) = folder.glob("*.json")
    found = json.loads(file.read_text())
    file.unlink()
    return {"ttft": found["mean_ttft_ms"], "itl": found["mean_itl_ms"], "tok/s": found["output_throughput"]}


def guidellm(chosen: argparse.Namespace, seed: int, folder: Path) -> Figures:
    demo_tokenizer().backend.save(str(folder / "tokenizer.json"))
    described = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|im_end|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(described))
    options = {
        "backend": f"kind=openai_http,target={chosen.url},request_format=/v1/completions",
        "profile": f"kind=concurrent,streams={chosen.streams}",
        "constraint": f"kind=max_requests,count={chosen.requests}",
        "tokenizer": f"kind=huggingface_auto,model={folder}",
        "data": f"kind=synthetic_text,prompt_tokens={chosen.prompt_tokens},output_tokens={chosen.output_tokens}",
        "seed": f"kind=static,value={seed}",
        "output": f"kind=json,path={folder}/found.json",
    }
    words = [word for name, text in options.items() for word in (f"--{name}", text)]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    environment.pop("PYTHONPATH", None)
    command = [chosen.guidellm, "run", *words, "--disable-console"]
    subprocess.run(command, check=True, env=environment, stdout=subprocess.DEVNULL)
    (one,) = json.loads((folder / "found.json").read_text())["benchmarks"]
    means = {name: value["successful"]["mean"] for name, value in one["metrics"].items() if name.endswith("_ms")}
    tokens = one["metrics"]["output_token_count"]["successful"]["total_sum"]
    return {
        "ttft": means["time_to_first_token_ms"],
        "itl": means["inter_token_latency_ms"],
        "tok/s": tokens / one["duration"],
    }


CLIENTS = {"bench serve": ours, "guidellm": guidellm}


def paced(pace: float, first: float) -> str:
    """The URL of a server in a process that ends with this one."""
    listener = socket.socket(proto=socket.IPPROTO_TCP)
    listener.bind(("127.0.0.1", 0))
    listener.listen(100)
    port = listener.getsockname()[1]
    multiprocessing.get_context("fork").Process(target=serve, args=(listener, pace, first), daemon=True).start()
    listener.close()
    return f"http://127.0.0.1:{port}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--guidellm", required=True, metavar="PATH", help="the program")
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--pace", type=float, default=0.0, metavar="SECONDS")
    parser.add_argument("--first", type=float, default=1.0, metavar="SECONDS")
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--streams", type=int, default=4)
    parser.add_argument("--requests", type=int, default=24, help="of a round")
    parser.add_argument("--prompt-tokens", type=int, default=64)
    parser.add_argument("--output-tokens", type=int, default=48)
    chosen = parser.parse_args()
    if chosen.pace:
        chosen.url = paced(chosen.pace, chosen.first)
    found: dict[str, list[Figures]] = {name: [] for name in CLIENTS}
    print("| round | client | TTFT ms | by the server | ITL ms | by the server | out tok/s |")
    print("|---|---|---|---|---|---|---|")
    for round in range(chosen.rounds):
        for name, client in list(CLIENTS.items())[:: -1 if round % 2 else 1]:
            before = counts(chosen.url)
            with tempfile.TemporaryDirectory() as folder:
                figures = client(chosen, round, Path(folder))
            server = server_means(before, counts(chosen.url))
            found[name].append(figures | {f"{key} ratio": figures[key] / server[key] for key in server})
            shown = [figures["ttft"], server["ttft"], figures["itl"], server["itl"], figures["tok/s"]]
            print(f"| {round + 1} | {name} | " + " | ".join(f"{value:.2f}" for value in shown) + " |", flush=True)
    print("\n| median of the rounds | bench serve | guidellm | difference |\n|---|---|---|---|")
    for key in (*NAMES, "ttft ratio", "itl ratio"):
        one, other = (statistics.median(figures[key] for figures in found[name]) for name in CLIENTS)
        print(f"| {key} | {one:.3f} | {other:.3f} | {(one / other - 1) * 100:+.1f} % |")


if __name__ == "__main__":
    main()
