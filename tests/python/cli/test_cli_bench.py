"""``bench`` (S5): exact prompts, honest times, the JSON keys of vLLM's, on scripted servers and on the real one."""

from __future__ import annotations

import asyncio
import itertools
import json
import math
import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from e2e.server import serving
from http_script import Seen, answer, scripted
from hybrid_serve.cli.bench import load, results, sweep
from hybrid_serve.cli.bench.datasets import Corpus, LocalTokens, RandomLengths, conversations
from hybrid_serve.cli.http_client import HttpClient
from hybrid_serve.cli.main import main
from hybrid_serve.cli.usage import UsageError
from tiny_models import make_tiny_model


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(make_tiny_model(tmp_path_factory.mktemp("tiny") / "llama"))


@pytest.fixture(scope="module")
def tokens(model: str) -> LocalTokens:
    return LocalTokens(model)


# --- Prompts ---


def test_prompts_have_exact_lengths_a_shared_beginning_and_depend_on_the_seed_alone(tokens: LocalTokens) -> None:
    async def made(seed: int, ratio: float = 0.0) -> list[load.Prompt]:
        corpus = await Corpus.open(tokens, seed)
        return await corpus.random(6, RandomLengths(40, 8, prefix_len=24, range_ratio=ratio))

    first = asyncio.run(made(1))
    assert [len(asyncio.run(tokens.encode(prompt.text))) for prompt in first] == [64] * 6
    assert [(prompt.num_tokens, prompt.output_len) for prompt in first] == [(64, 8)] * 6
    assert len({prompt.text for prompt in first}) == 6
    beginnings = {tuple(asyncio.run(tokens.encode(prompt.text))[:20]) for prompt in first}
    assert len(beginnings) == 1
    assert asyncio.run(made(1)) == first
    assert asyncio.run(made(2)) != first
    varied = asyncio.run(made(1, ratio=0.5))
    assert len({prompt.num_tokens for prompt in varied}) > 1
    assert all(44 <= prompt.num_tokens <= 84 for prompt in varied)
    assert all(len(asyncio.run(tokens.encode(prompt.text))) == prompt.num_tokens for prompt in varied)


def test_lengths_like_chats_are_many_short_ones_and_few_long_ones(tokens: LocalTokens) -> None:
    async def made() -> list[load.Prompt]:
        return await (await Corpus.open(tokens, 0)).like_chat(40)

    lengths = sorted(prompt.num_tokens for prompt in asyncio.run(made()))
    assert 4 <= lengths[0] < 40 < lengths[-1] <= 1024
    assert statistics.mean(lengths) > statistics.median(lengths)


def test_conversations_of_a_file_are_first_turns_with_the_second_ones_length(
    tmp_path: Path, tokens: LocalTokens
) -> None:
    def talk(*turns: str) -> dict[str, Any]:
        return {"conversations": [{"from": "human", "value": turn} for turn in turns]}

    long, short = "word " * 1500, "hi"
    file = tmp_path / "talks.json"
    file.write_text(
        json.dumps([talk("what is a bat", "it is a mammal"), talk("alone " * 9), talk(long, long), talk("q", short)])
    )
    prompts = asyncio.run(conversations(tokens, str(file), 3, None, 0))
    assert [prompt.text for prompt in prompts] == ["what is a bat"] * 3
    assert prompts[0].output_len == len(asyncio.run(tokens.encode("it is a mammal")))
    assert asyncio.run(conversations(tokens, str(file), 1, 7, 0))[0].output_len == 7
    for text, message in (("[]", "no conversation"), ("{", "is not a list of"), ('["x"]', "is not a list of")):
        file.write_text(text)
        with pytest.raises(UsageError, match=message):
            asyncio.run(conversations(tokens, str(file), 1, None, 0))


# --- Arrivals ---


@pytest.mark.parametrize("burstiness", [0.2, 1.0, 50.0])
def test_arrivals_keep_the_rate_whatever_their_shape(burstiness: float) -> None:
    times = load.arrivals(400, 10.0, burstiness, 1)
    assert times == sorted(times)
    assert times == load.arrivals(400, 10.0, burstiness, 1)
    assert times[0] == 0.0
    assert 35 < times[-1] <= 40
    gaps = [b - a for a, b in itertools.pairwise(times)]
    variation = statistics.stdev(gaps) / statistics.mean(gaps)
    assert variation == pytest.approx(1 / math.sqrt(burstiness), rel=0.35)


@pytest.mark.parametrize(("is_exponential", "half"), [(False, 9), (True, 4)])
def test_a_ramp_goes_from_one_rate_to_the_other(is_exponential: bool, half: int) -> None:
    """S5: the sixth of eleven requests has the mean of both rates, the arithmetic or the geometric one."""
    ramp = load.Ramp(1.0, 17.0 if not is_exponential else 16.0, is_exponential)
    rates = ramp.rates(11)
    assert (rates[0], rates[5], rates[10]) == pytest.approx((1.0, half, ramp.end))
    times = load.arrivals(1000, ramp, 100.0, 1)
    assert times == sorted(times)
    early, late = times[50] - times[0], times[-1] - times[-51]
    assert early / late > 5
    assert times[-1] == pytest.approx(sum(1 / rate for rate in ramp.rates(1000)), rel=0.02)


def test_an_infinite_rate_is_all_at_once() -> None:
    assert load.arrivals(3, math.inf, 1.0, 0) == [0.0] * 3


# --- One request ---


def sent(handler: Any, *, is_chat: bool = False, prompts: int = 1, at_once: int | None = None) -> list[load.Outcome]:
    async def run() -> list[load.Outcome]:
        async with scripted(handler) as server:
            target = load.Target(HttpClient(server.url), "/v1/x", "m", is_chat, {"temperature": 0})
            asked = [load.Prompt("hi", 1, 9)] * prompts
            outcomes, _ = await load.run(target, asked, [0.0] * prompts, at_once, lambda _: None)
            target.client.close()
            return outcomes

    return asyncio.run(run())


def streaming(*pieces: bytes, pause: float = 0.0) -> Any:
    async def handler(seen: Seen, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n")
        for piece in pieces:
            await asyncio.sleep(pause)
            writer.write(b"%x\r\n%b\r\n" % (len(piece), piece))
            await writer.drain()
        writer.write(b"0\r\n\r\n")

    return handler


def event(data: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(data).encode() + b"\n\n"


def text(said: str) -> bytes:
    return event({"choices": [{"text": said}]})


USAGE = event({"choices": [], "usage": {"completion_tokens": 4, "prompt_tokens": 1}})


def test_times_are_those_of_texts_and_tokens_those_of_the_servers_count() -> None:
    (outcome,) = sent(
        streaming(b": ping\n\n", text("a"), text("bc"), text("d"), USAGE + b"data: [DONE]\n\n", pause=0.1)
    )
    assert (outcome.error, outcome.text, outcome.output_tokens) == ("", "abcd", 4)
    assert 0.2 <= outcome.ttft < 0.4
    assert len(outcome.itl) == 2
    assert all(0.05 < gap < 0.3 for gap in outcome.itl)
    assert outcome.latency == pytest.approx(outcome.ttft + sum(outcome.itl))
    assert outcome.tpot == pytest.approx((outcome.latency - outcome.ttft) / 3)


def test_an_event_may_be_cut_anywhere_and_a_chat_counts_what_is_said() -> None:
    role = event({"choices": [{"delta": {"role": "assistant", "content": ""}}]})
    whole = (
        role + event({"choices": [{"delta": {"content": "hé"}}]}) + event({"choices": [{"delta": {"content": "y"}}]})
    )
    (outcome,) = sent(streaming(*(whole[i : i + 1] for i in range(len(whole)))), is_chat=True)
    assert (outcome.error, outcome.text, outcome.output_tokens, len(outcome.itl)) == ("", "héy", 2, 1)


async def refusing(seen: Seen, writer: asyncio.StreamWriter) -> None:
    writer.write(answer(b"no such model", 404))


async def leaving(seen: Seen, writer: asyncio.StreamWriter) -> None:
    writer.write(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n")
    writer.close()


@pytest.mark.parametrize(
    ("handler", "error"),
    [
        (refusing, "HTTP 404: no such model"),
        (leaving, "the server closed the connection"),
        (streaming(text("a"), event({"error": {"message": "engine died"}})), "engine died"),
        (streaming(text("a"), b"data: {\n\n"), "truncated"),
        (streaming(b"data: [DONE]\n\n"), "the reply has no text"),
    ],
)
def test_what_fails_is_a_failed_request_with_its_reason(handler: Any, error: str) -> None:
    (outcome,) = sent(handler)
    assert error in outcome.error


def test_no_more_requests_are_under_way_than_allowed_and_connections_are_used_again() -> None:
    now, most = 0, 0
    connections: set[Any] = set()

    async def counting(seen: Seen, writer: asyncio.StreamWriter) -> None:
        nonlocal now, most
        connections.add(writer.get_extra_info("peername"))
        now += 1
        most = max(most, now)
        await asyncio.sleep(0.02)
        now -= 1
        await streaming(text("a"), text("b"))(seen, writer)

    outcomes = sent(counting, prompts=12, at_once=3)
    assert [outcome.error for outcome in outcomes] == [""] * 12
    assert (most, len(connections)) == (3, 3)


# --- Numbers ---


def outcome(start: float, ttft: float, gaps: Sequence[float], tokens: int, error: str = "") -> load.Outcome:
    return load.Outcome(load.Prompt("x", 10, 5), start, ttft, ttft + sum(gaps), list(gaps), tokens, "t", error)


def test_the_summary_is_what_a_hand_computes() -> None:
    outcomes = [
        outcome(0.0, 0.1, [0.1, 0.3], 3),
        outcome(0.2, 0.3, [0.2], 2),
        outcome(5.0, 9.0, [9.0], 2, error="broken"),
    ]
    found = results.summary(outcomes, 2.0, (50.0, 99.0), {"ttft": 200.0})
    assert (found["completed"], found["failed"]) == (2, 1)
    assert (found["total_input_tokens"], found["total_output_tokens"]) == (20, 5)
    assert (found["request_throughput"], found["output_throughput"]) == (1.0, 2.5)
    assert found["total_token_throughput"] == 12.5
    assert found["request_goodput"] == 0.5
    assert found["max_concurrent_requests"] == 2
    assert found["mean_ttft_ms"] == pytest.approx(200)
    assert found["median_itl_ms"] == pytest.approx(200)
    assert found["mean_tpot_ms"] == pytest.approx(200)
    assert found["p50_e2el_ms"] == pytest.approx(500)
    assert found["p99_ttft_ms"] == pytest.approx(298)
    shown = results.table(found, ("ttft", "e2el"), (50.0, 99.0)).splitlines()
    assert shown[-2].split() == ["TTFT", "200.0", "200.0", "200.0", "298.0"]


def test_no_success_is_zeros_and_not_an_error() -> None:
    found = results.summary([outcome(0, 0, [], 0, "e")], 1.0, (99.0,), {})
    assert (found["completed"], found["p99_ttft_ms"], found["max_concurrent_requests"]) == (0, 0.0, 0)


# --- The commands ---


@pytest.fixture(scope="module")
def server(model: str) -> Iterator[str]:
    with serving(model, "--max-num-seqs", "8", "--cpu-threads", "1") as running:
        yield running.url


QUICK = ["--num-prompts", "6", "--random-input-len", "20", "--random-output-len", "6", "--ignore-eos"]


def test_bench_serve_writes_the_keys_of_vllm(server: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """S5; prompts are made by the server's own tokenizer routes."""
    argv = ["bench", "serve", "--base-url", server, *QUICK, "--request-rate", "50", "--save-detailed"]
    assert main([*argv, "--result-dir", str(tmp_path / "new"), "--result-filename", "r.json"]) == 0
    assert "6 of 6 in" in capsys.readouterr().out
    found = json.loads((tmp_path / "new" / "r.json").read_text())
    assert (found["completed"], found["failed"], found["request_rate"]) == (6, 0, 50.0)
    assert (found["total_input_tokens"], found["total_output_tokens"]) == (120, 36)
    assert found["input_lens"] == [20] * 6
    assert found["output_lens"] == [6] * 6
    for metric in ("ttft", "tpot", "itl", "e2el"):
        for name in ("mean", "median", "std", "p99"):
            assert isinstance(found[f"{name}_{metric}_ms"], float)
    assert found["output_throughput"] == pytest.approx(36 / found["duration"])


def test_bench_serve_speaks_chat(server: str, model: str, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["bench", "serve", "--base-url", server, *QUICK, "--backend", "openai-chat", "--tokenizer", model]
    assert main([*argv, "--metric-percentiles", "50,90", "--percentile-metrics", "ttft"]) == 0
    shown = capsys.readouterr().out.splitlines()
    assert shown[-2].split() == ["ms", "mean", "median", "p50", "p90"]
    assert shown[-1].startswith("TTFT")


def test_a_sweep_is_a_line_a_load_and_a_plot(
    server: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    argv = ["bench", "sweep", "--base-url", server, *QUICK, "--max-concurrency", "1", "3"]
    saved = ["--save-result", "--result-dir", str(tmp_path), "--result-filename", "s.json"]
    assert main([*argv, *saved]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line[:12].strip() for line in lines[:3]] == ["load", "1 at once", "3 at once"]
    found = json.loads((tmp_path / "s.json").read_text())
    assert [point["max_concurrency"] for point in found] == [1, 3]
    with monkeypatch.context() as patch:
        patch.setattr(sweep, "find_spec", lambda name: None)
        assert main([*argv, "--plot", "x.svg"]) == 2
        assert "pip install 'hybrid-serve[bench]'" in capsys.readouterr().err
    pytest.importorskip("matplotlib")
    sweep.plot(found, str(tmp_path / "out.svg"))
    assert "<svg" in (tmp_path / "out.svg").read_text()
    with pytest.raises(UsageError, match="--plot"):
        sweep.plot(found, str(tmp_path / "no" / "such.svg"))


RAMP = ["--ramp-up-strategy", "exponential", "--ramp-up-start-rps", "20", "--ramp-up-end-rps", "80"]


def test_a_ramp_is_in_the_result(server: str, tmp_path: Path) -> None:
    """S5"""
    saved = ["--save-result", "--result-dir", str(tmp_path), "--result-filename", "r.json"]
    assert main(["bench", "serve", "--base-url", server, *QUICK, *RAMP, *saved]) == 0
    found = json.loads((tmp_path / "r.json").read_text())
    assert (found["completed"], found["request_rate"], found["ramp_up_strategy"]) == (6, "inf", "exponential")
    assert (found["ramp_up_start_rps"], found["ramp_up_end_rps"]) == (20.0, 80.0)
    assert found["duration"] > 0.1


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["bogus"], "unknown kind 'bogus'"),
        (["serve", "--num-prompts", "0"], "'0' is not a whole number from 1 on"),
        (["serve", "--request-rate", "-1"], "'-1' is not a number above 0, or inf"),
        (["serve", "--goodput", "speed:1"], "'speed:1' is not like ttft:200"),
        (["serve", "--extra-body", "[]"], "'[]' is not a JSON object"),
        (["serve", "--metric-percentiles", "101"], "is not a list of percentages"),
        (["serve", "--base-url", "localhost"], "must be like http://127.0.0.1:8000"),
        (["serve", "--port", "9", "--ready-check-timeout-sec", "0"], "is not ready: cannot connect"),
        (
            ["serve", "--ramp-up-strategy", "linear", "--ramp-up-start-rps", "1"],
            "needs --ramp-up-start-rps and --ramp-up-end",
        ),
        (["serve", "--ramp-up-end-rps", "1"], "--ramp-up-strategy needs"),
        (["serve", *RAMP, "--request-rate", "3"], "--request-rate and --ramp-up-strategy both set the pace"),
        (["throughput", "--port", "9"], "--port: there is no server in this measurement"),
        (["startup", "--port", "9"], "--port: a free one is taken"),
    ],
)
def test_wrong_arguments_are_one_line(capsys: pytest.CaptureFixture[str], argv: list[str], message: str) -> None:
    assert main(["bench", *argv]) == 2
    assert message in capsys.readouterr().err.splitlines()[0]


def test_a_server_without_its_key_is_not_waited_for(capsys: pytest.CaptureFixture[str], model: str) -> None:
    async def closed(seen: Seen, writer: asyncio.StreamWriter) -> None:
        writer.write(answer(b"{}", 401))

    async def run() -> int:
        async with scripted(closed) as running:
            return await asyncio.to_thread(main, ["bench", "serve", "--base-url", running.url])

    assert asyncio.run(run()) == 2
    assert "is not ready: HTTP 401" in capsys.readouterr().err


def test_offline_measurements_count_what_was_asked_for(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "t.json"
    lengths = ["--input-len", "16", "--output-len", "4", "--output-json", str(out)]
    assert main(["bench", "throughput", model, "--num-prompts", "5", *lengths, "--cpu-threads", "1"]) == 0
    found = json.loads(out.read_text())
    assert (found["num_requests"], found["total_num_tokens"]) == (5, 100)
    assert found["tokens_per_second"] == pytest.approx(100 / found["elapsed_time"])
    assert main(["bench", "latency", model, "--batch-size", "2", "--n", "2", "--num-iters", "3", *lengths]) == 0
    found = json.loads(out.read_text())
    assert len(found["latencies"]) == 3
    assert found["avg_latency"] == pytest.approx(statistics.mean(found["latencies"]))
    assert main(["bench", "throughput", model, "--input-len", "9999"]) == 2
    assert "512" in capsys.readouterr().err


def test_the_phases_of_a_start_add_up_to_its_time(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """S5: within 5 %."""
    out = tmp_path / "s.json"
    assert main(["bench", "startup", model, "--num-iters-warm", "0", "--output-json", str(out)]) == 0
    cold = json.loads(out.read_text())["cold"]
    assert list(cold["phases_s"]) == ["config", "load", "memory", "server", "first_token"]
    assert sum(cold["phases_s"].values()) == pytest.approx(cold["total_s"], rel=0.05)
    assert main(["bench", "startup", str(tmp_path / "none")]) == 10
    assert "HS-E021" in capsys.readouterr().err
