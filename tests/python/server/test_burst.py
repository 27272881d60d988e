"""Three thousand requests at once, on a server that takes a fifth of them: who is let in ends well, who is not is told
so, and afterwards all is as before (F-44)."""

from __future__ import annotations

import asyncio
import json
import resource
import time
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from demo_model import demo_file
from fake_executor import expected
from server_process import ServerProcess

BURST, CONNECTIONS = 3000, 1000
MAY_WAIT, MAY_RUN, TOKENS = 512, 32, 12


class Answer(NamedTuple):
    number: int
    status: int
    headers: dict[bytes, bytes]
    body: dict[str, Any]
    seconds: float


class Burst:
    """So many requests over so many connections, each of which sends the next as soon as it has its answer."""

    def __init__(self, port: int, num_requests: int) -> None:
        self._port, self._numbers = port, iter(range(num_requests))
        self.answers: list[Answer] = []

    async def run(self, num_connections: int) -> float:
        """Seconds until the last answer."""
        ends = [await asyncio.open_connection("127.0.0.1", self._port) for _ in range(num_connections)]
        began = time.monotonic()
        await asyncio.gather(*(self._ask(*each) for each in ends))
        seconds = time.monotonic() - began
        for _, writer in ends:
            writer.close()
        return seconds

    async def _ask(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        for number in self._numbers:
            fields = {"prompt": prompt(number), "max_tokens": TOKENS, "seed": number, "ignore_eos": True}
            body = json.dumps(fields | {"return_token_ids": True}).encode()
            head = b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
            began = time.monotonic()
            writer.write(b"%scontent-length: %d\r\n\r\n%s" % (head, len(body), body))
            first, *lines = (await reader.readuntil(b"\r\n\r\n")).lower().split(b"\r\n")
            headers = dict(line.split(b": ", 1) for line in lines if line)
            answer = json.loads(await reader.readexactly(int(headers[b"content-length"])))
            self.answers.append(Answer(number, int(first.split()[1]), headers, answer, time.monotonic() - began))


def prompt(number: int) -> list[int]:
    return [number % 900, number // 900, 7]


def check_complete(answer: Answer) -> None:
    (choice,) = answer.body["choices"]
    assert choice["token_ids"] == expected(prompt(answer.number), answer.number, TOKENS)
    assert choice["finish_reason"] == "length"


@pytest.mark.timeout(120)
def test_a_burst_is_taken_as_far_as_there_is_room_and_refused_beyond_and_leaves_nothing_behind(tmp_path: Path) -> None:
    """F-44"""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, min(hard, 4096)), hard))
    with ServerProcess(
        tmp_path,
        "fake?delay=0.02",
        api_entry="hybrid_serve.server.process:main",
        model_options={"tokenizer": str(demo_file())},
        scheduler={"max_num_queued_reqs": MAY_WAIT, "max_num_seqs": MAY_RUN},
    ) as server:
        server.wait_ready(60)
        port = server.address[1]

        def ask(num_requests: int, num_connections: int) -> tuple[list[Answer], float]:
            burst = Burst(port, num_requests)
            seconds = asyncio.run(burst.run(num_connections))
            assert sorted(answer.number for answer in burst.answers) == list(range(num_requests)), "each is answered"
            return burst.answers, seconds

        while ask(1, 1)[0][0].status != 200:  # the tokenizer may still be loading
            time.sleep(0.05)
        _, before = ask(4 * MAY_RUN, MAY_RUN)
        answers, _ = ask(BURST, CONNECTIONS)
        again, after = ask(4 * MAY_RUN, MAY_RUN)
        good, refused = [[a for a in answers if (a.status == 200) == is_good] for is_good in (True, False)]
        for answer in good + again:
            assert answer.status == 200, answer
            check_complete(answer)
        for answer in refused:
            assert answer.status == 503, answer
            assert answer.body["error"]["code"] == "overloaded"
            assert int(answer.headers[b"retry-after"]) >= 1
        assert len(good) >= MAY_WAIT + MAY_RUN
        assert len(refused) > BURST // 4
        assert after < 3 * before + 1, "the server is as fast as before"
        assert "Traceback" not in server.errors
