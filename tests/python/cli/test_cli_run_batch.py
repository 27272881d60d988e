"""``run-batch`` (S4, F-59): files that are checked first, results in order, and a batch that survives any end."""

from __future__ import annotations

import asyncio
import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from http_script import Seen, answer, scripted
from hybrid_serve.cli.batch.drive import Driver
from hybrid_serve.cli.batch.files import BatchInput, BatchOutput, OutputGone, Response, Result
from hybrid_serve.cli.http_client import HttpClient
from hybrid_serve.cli.main import main
from hybrid_serve.cli.usage import UsageError
from tiny_models import make_tiny_model


def line(custom_id: str, url: str = "/v1/completions", **body: Any) -> str:
    return json.dumps({"custom_id": custom_id, "method": "POST", "url": url, "body": body})


def write(path: Path, *lines: str) -> str:
    path.write_text("".join(each + "\n" for each in lines))
    return str(path)


def result(custom_id: str, text: str = "x") -> Result:
    import msgspec

    return Result("batch_req_1", custom_id, Response(200, "r", msgspec.Raw(json.dumps(text).encode())), None)


# --- The input ---


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ("{", "2: Input data was truncated"),
        ("[]", "2: Expected `object`, got `array`"),
        ('{"method": "POST", "url": "/v1/x", "body": {}}', "2: Object missing required field `custom_id`"),
        (line(""), "2: custom_id is empty"),
        (line("a"), "2: custom_id 'a' is that of line 1, too"),
        (line("b", url="v1/completions"), "2: url is 'v1/completions', expected a path such as"),
        (line("b", url="/v1/x\r\nX: y"), "expected a path such as"),
        ('{"custom_id": "b", "method": "GET", "url": "/v1/x", "body": {}}', "2: Invalid enum value 'GET'"),
        ('{"custom_id": "b", "method": "POST", "url": "/v1/x", "body": [1]}', "2: body is not an object"),
        (line("b", stream=True), "2: body asks for a stream"),
    ],
)
def test_a_bad_line_is_named_before_anything_runs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], bad: str, message: str
) -> None:
    path = write(tmp_path / "in.jsonl", line("a"), bad)
    assert main(["run-batch", "-i", path, "-o", str(tmp_path / "out"), "/no/such/model"]) == 2
    shown = capsys.readouterr().err
    assert message in shown
    assert "nothing was run" in shown
    assert not (tmp_path / "out").exists()


def test_many_bad_lines_are_listed_and_counted(tmp_path: Path) -> None:
    source = BatchInput(write(tmp_path / "in", *["?"] * 25))
    with pytest.raises(UsageError) as caught:
        source.refuse_problems()
    assert [each.partition(": ")[0] for each in caught.value.lines[:20]] == [
        f"{tmp_path / 'in'}:{i}" for i in range(1, 21)
    ]
    assert caught.value.lines[20] == "and 5 more lines"


def test_empty_lines_are_no_requests_and_an_empty_file_is_refused(tmp_path: Path) -> None:
    source = BatchInput(write(tmp_path / "in", "", line("a"), "  ", line("b")))
    assert [(request.number, request.custom_id) for request in source.requests()] == [(2, "a"), (4, "b")]
    with pytest.raises(UsageError, match="has no requests"):
        BatchInput(write(tmp_path / "empty", ""))


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["-i", "x"], "-i FILE and -o FILE must both be given"),
        (["-i", "/no/such", "-o", "o"], "-i /no/such: No such file or directory"),
        (["-i", "x", "-o", "o", "--max-inflight", "0"], "'0' is not a whole number from 1 on"),
        (["-i", "x", "-o", "o", "--port", "1"], "--port: run-batch chooses it"),
        (["-i", "x", "-o", "o", "--resume", "--overwrite"], "not allowed with"),
    ],
)
def test_wrong_arguments_are_one_line(capsys: pytest.CaptureFixture[str], argv: list[str], message: str) -> None:
    assert main(["run-batch", *argv]) == 2
    assert message in capsys.readouterr().err.splitlines()[0]


# --- The output ---


def test_an_output_that_is_there_is_neither_replaced_nor_continued_unasked(tmp_path: Path) -> None:
    path = tmp_path / "out"
    path.write_text("precious\n")
    with pytest.raises(UsageError, match="exists; --resume goes on"):
        BatchOutput(str(path), resume=False, overwrite=False)
    assert path.read_text() == "precious\n"
    output = BatchOutput(str(path), resume=True, overwrite=False)
    with pytest.raises(UsageError, match="is no result"):
        output.count_done(iter(()))
    output.close()
    assert path.read_text() == "precious\n"


def test_only_one_run_writes_an_output(tmp_path: Path) -> None:
    first = BatchOutput(str(tmp_path / "out"), resume=True, overwrite=False)
    with pytest.raises(UsageError, match="another run-batch"):
        BatchOutput(str(tmp_path / "out"), resume=True, overwrite=False)
    first.close()


def test_results_of_another_input_are_refused(tmp_path: Path) -> None:
    source = BatchInput(write(tmp_path / "in", line("a"), line("b")))
    output = BatchOutput(str(tmp_path / "out"), resume=True, overwrite=False)
    output.append([result("a"), result("c")])
    with pytest.raises(UsageError, match="2: of 'c', should be of 'b'"):
        output.count_done(source.requests())
    with pytest.raises(UsageError, match="one line too many"):
        output.count_done(iter(()))
    output.close()


def test_a_file_cut_at_any_byte_goes_on_without_a_lost_or_doubled_line(tmp_path: Path) -> None:
    """F-59: what a kill or a power failure may leave."""
    names = ["a", "b"]
    source = BatchInput(write(tmp_path / "in", *map(line, names)))
    path = tmp_path / "out"
    whole = BatchOutput(str(path), resume=False, overwrite=False)
    whole.append([result(name, "é") for name in names])
    whole.close()
    data = path.read_bytes()
    for length in range(len(data) + 1):
        path.write_bytes(data[:length])
        output = BatchOutput(str(path), resume=True, overwrite=False)
        done = output.count_done(source.requests())
        assert done == data[:length].count(b"\n")
        output.append([result(name, "é") for name in names[done:]])
        output.close()
        assert path.read_bytes() == data


def test_a_full_disk_leaves_whole_lines(tmp_path: Path) -> None:
    """F-59, by the limit of a file's size, which cuts a write in the middle as a full disk does."""
    path = tmp_path / "out"
    output = BatchOutput(str(path), resume=False, overwrite=False)
    output.append([result("a")])
    before = path.read_bytes()
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 50, old[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            output.append([result("b", "long " * 30)])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
    assert path.read_bytes() == before
    output.append([result("b")])
    assert path.read_bytes().count(b"\n") == 2
    output.close()


def test_an_output_that_was_removed_is_noticed(tmp_path: Path) -> None:
    output = BatchOutput(str(tmp_path / "out"), resume=False, overwrite=False)
    output.append([result("a")])
    (tmp_path / "out").unlink()
    with pytest.raises(OutputGone, match="removed"):
        output.append([result("b")])
    output.close()


# --- The driver ---


def driven(handler: Any, source: BatchInput, max_inflight: int = 4) -> tuple[list[Result], list[Seen]]:
    results: list[Result] = []

    async def run() -> list[Seen]:
        async with scripted(handler) as server:
            driver = Driver(HttpClient(server.url, "key"), max_inflight, results.extend)
            await asyncio.wait_for(driver.run(source.requests()), 20)
            return server.seen

    return results, asyncio.run(run())


def test_results_keep_the_order_of_requests_that_end_in_another(tmp_path: Path) -> None:
    source = BatchInput(write(tmp_path / "in", *(line(f"r{i}", turn=i) for i in range(24))))

    async def backwards(seen: Seen, writer: asyncio.StreamWriter) -> None:
        turn = json.loads(seen.body)["turn"]
        await asyncio.sleep(0.02 * (turn % 4 == 0))
        writer.write(answer(b'{"turn":\n%d}' % turn, 200 if turn % 5 else 400, x_request_id=f"id{turn}"))

    results, seen = driven(backwards, source)
    assert [each.custom_id for each in results] == [f"r{i}" for i in range(24)]
    assert [each.response and each.response.status_code for each in results] == [
        200 if i % 5 else 400 for i in range(24)
    ]
    assert [bytes(each.response.body) for each in results if each.response] == [b'{"turn":%d}' % i for i in range(24)]
    assert {one.headers["authorization"] for one in seen} == {"Bearer key"}
    assert len(seen) == 24


def test_a_busy_server_and_a_broken_connection_are_tried_again(tmp_path: Path) -> None:
    source = BatchInput(write(tmp_path / "in", line("a"), line("b")))
    tries = {"busy": 0}

    async def busy_first(seen: Seen, writer: asyncio.StreamWriter) -> None:
        tries["busy"] += 1
        if tries["busy"] == 1:
            writer.write(answer(b"{}", 503, retry_after="0"))
        elif tries["busy"] == 2:
            writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 100\r\n\r\nhalf")
            writer.close()
        else:
            writer.write(answer(b"[]"))

    results, seen = driven(busy_first, source)
    assert [each.response and each.response.status_code for each in results] == [200, 200]
    assert len(seen) == 4


def test_bad_lines_become_error_records_and_are_not_sent(tmp_path: Path) -> None:
    """F-59."""
    source = BatchInput(write(tmp_path / "in", line("a"), "?", line("b", url="x")))

    async def fine(seen: Seen, writer: asyncio.StreamWriter) -> None:
        writer.write(answer(b"{}"))

    results, seen = driven(fine, source)
    assert len(seen) == 1
    assert [(each.custom_id, each.response is None) for each in results] == [("a", False), (None, True), ("b", True)]
    assert results[1].error is not None
    assert results[1].error["message"].startswith("line 2: ")


def test_a_stop_keeps_what_is_finished_in_order_and_sends_no_more(tmp_path: Path) -> None:
    source = BatchInput(write(tmp_path / "in", *(line(f"r{i}") for i in range(20))))
    results: list[Result] = []

    async def run() -> int:
        async def fine(seen: Seen, writer: asyncio.StreamWriter) -> None:
            if len(server.seen) == 6:
                driver.stop()
            writer.write(answer(b"{}"))

        async with scripted(fine) as server:
            driver = Driver(HttpClient(server.url), 2, results.extend)
            await asyncio.wait_for(driver.run(source.requests()), 20)
            return len(server.seen)

    sent = asyncio.run(run())
    assert sent <= 8
    assert [each.custom_id for each in results] == [f"r{i}" for i in range(len(results))]
    assert 4 <= len(results) <= sent


# --- The command ---


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(make_tiny_model(tmp_path_factory.mktemp("tiny") / "llama"))


@pytest.fixture
def environment() -> dict[str, str]:
    return {**os.environ, "HYBRID_SERVE_MAX_NUM_SEQS": "4", "HYBRID_SERVE_CPU_THREADS": "1"}


def command(*argv: str) -> list[str]:
    return [sys.executable, "-m", "hybrid_serve", "run-batch", *argv]


def requests_of(count: int, tokens: int) -> Iterator[str]:
    for i in range(count):
        if i % 3 == 0:
            yield line(f"r{i}", "/v1/chat/completions", messages=[{"role": "user", "content": "hi"}], max_tokens=3)
        elif i == 4:
            yield line(f"r{i}", max_tokens="many")
        else:
            yield line(f"r{i}", prompt=f"the bat {i}", max_tokens=tokens, temperature=0, ignore_eos=True)


def test_a_batch_killed_in_the_middle_is_finished_by_resume(
    tmp_path: Path, model: str, environment: dict[str, str]
) -> None:
    """S4 and F-59: on the real server and engine."""
    source, out = write(tmp_path / "in.jsonl", *requests_of(40, 100)), tmp_path / "out.jsonl"
    argv = command("-i", source, "-o", str(out), model, "--max-inflight", "4")
    first = subprocess.Popen(argv, env=environment, stderr=subprocess.PIPE)
    end = time.monotonic() + 60
    while not out.exists() or out.read_bytes().count(b"\n") < 5:
        assert first.poll() is None, first.stderr and first.stderr.read()
        assert time.monotonic() < end
        time.sleep(0.005)
    first.send_signal(signal.SIGKILL)
    first.communicate(timeout=20)
    done = out.read_bytes().count(b"\n")
    assert 5 <= done < 40
    refused = subprocess.run(argv, env=environment, capture_output=True, text=True, timeout=60)
    assert (refused.returncode, "--resume goes on" in refused.stderr) == (2, True)
    second = subprocess.run([*argv, "--resume"], env=environment, capture_output=True, text=True, timeout=60)
    assert second.returncode == 0, second.stderr
    assert f"40 requests, {done} done" in second.stderr
    records = [json.loads(each) for each in out.read_text().splitlines()]
    assert [each["custom_id"] for each in records] == [f"r{i}" for i in range(40)]
    assert [each["response"]["status_code"] for each in records] == [200 if i != 4 else 400 for i in range(40)]
    assert records[4]["response"]["body"]["error"]["hs_code"] == "HS-E102"
    assert records[3]["response"]["body"]["object"] == "chat.completion"
    assert records[5]["response"]["body"]["usage"]["completion_tokens"] == 100
    third = subprocess.run([*argv, "--resume"], env=environment, capture_output=True, text=True, timeout=60)
    assert (third.returncode, third.stdout) == (0, f"{out}: all 40 results are there\n")


def test_ctrl_c_finishes_what_runs_and_can_be_resumed(tmp_path: Path, model: str, environment: dict[str, str]) -> None:
    source, out = write(tmp_path / "in.jsonl", *requests_of(60, 200)), tmp_path / "out.jsonl"
    argv = command("-i", source, "-o", str(out), model, "--max-inflight", "4")
    running = subprocess.Popen(argv, env=environment, stderr=subprocess.PIPE, text=True)
    end = time.monotonic() + 60
    while not out.exists() or out.read_bytes().count(b"\n") < 2:
        assert running.poll() is None
        assert time.monotonic() < end
        time.sleep(0.005)
    running.send_signal(signal.SIGINT)
    _, said = running.communicate(timeout=30)
    assert running.returncode == 130, said
    assert "with --resume does the rest" in said
    records = [json.loads(each) for each in out.read_text().splitlines()]
    assert [each["custom_id"] for each in records] == [f"r{i}" for i in range(len(records))]
    assert len(records) < 60


def test_a_full_disk_ends_the_command_with_the_reason(tmp_path: Path, model: str, environment: dict[str, str]) -> None:
    source = write(tmp_path / "in.jsonl", *requests_of(4, 3))
    done = subprocess.run(
        command("-i", source, "-o", "/dev/full", model), env=environment, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 1, done.stderr
    assert done.stderr.endswith("run-batch: /dev/full: No space left on device\n")


def test_a_model_that_cannot_be_loaded_is_a_box_with_its_exit_code(tmp_path: Path, environment: dict[str, str]) -> None:
    source = write(tmp_path / "in.jsonl", line("a"))
    argv = command("-i", source, "-o", str(tmp_path / "out"), str(tmp_path / "none"))
    done = subprocess.run(argv, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 10
    assert "HS-E021" in done.stderr
    assert "Traceback" not in done.stderr
