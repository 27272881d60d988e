"""Flight recordings (P25, F-23): a file replays to the same decisions, tells nothing that was said, and is no code."""

from __future__ import annotations

import json
import mmap
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hybrid_serve import _core, flight
from hybrid_serve.cli.main import main

VOCAB = 30_000


class Recorded:
    """A busy scheduler with a small pool, whose last steps are recorded."""

    def __init__(self, seed: int = 1, depth: int = 1, num_steps: int = 60, num_host_blocks: int = 0) -> None:
        self.random, self.next_id = random.Random(seed), 1 << 48
        config = _core.Config(
            num_blocks=24,
            block_size=16,
            max_num_seqs=8,
            max_num_batched_tokens=96,
            max_model_len=512,
            vocab_size=VOCAB,
            depth=depth,
            num_host_blocks=num_host_blocks,
            hash_key=self.random.randbytes(16),
        )
        num_bytes, _ = _core.batch_layout(config)
        self.memory = mmap.mmap(-1, 2**20)
        self.core = _core.Scheduler(config, [mmap.mmap(-1, num_bytes) for _ in range(depth + 1)])
        self.core.record(self.memory, num_steps)
        self.depth = depth
        self.prompts = [[self.random.randrange(VOCAB) for _ in range(150)] for _ in range(3)]

    def add(self) -> None:
        options: dict[str, Any] = {"max_tokens": self.random.randint(20, 120), "priority": self.random.randint(0, 1)}
        options["n"] = self.random.choice([1, 1, 3])
        if self.random.random() < 0.3:
            options |= {"frequency_penalty": 1.0, "min_tokens": 1, "stop_token_ids": (7,)}
        prompt = self.random.choice(self.prompts)[: self.random.randint(1, 150)]
        self.core.add(self.next_id, np.array(prompt, np.int32), **options)
        self.next_id += options["n"]

    def run(self, steps: int) -> None:
        in_flight: list[_core.Batch] = []
        for _ in range(steps):
            if self.random.random() < 0.3 and self.core.stats().num_waiting < 4:
                self.add()
            if self.random.random() < 0.05:
                self.core.abort(np.array([self.next_id - self.random.randint(1, 9)], np.uint64))
            while len(in_flight) < self.depth and (batch := self.core.schedule()) is not None:
                in_flight.append(batch)
            if in_flight:
                batch = in_flight.pop(0)
                tokens = np.array([self.random.randrange(50) for _ in range(batch.num_sampled)], np.int32)
                self.core.commit(batch.step, tokens)

    def write(self, path: Path) -> Path:
        recording = flight.read_memory(memoryview(self.memory))
        assert recording is not None
        flight.write(path, recording, time="2026-01-01T00:00:00Z", why="the test wants it")
        return path


@pytest.mark.parametrize(("depth", "num_host_blocks"), [(1, 0), (2, 0), (1, 20), (2, 20)])
def test_a_recording_replays_to_the_same_decisions_every_time(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], depth: int, num_host_blocks: int
) -> None:
    recorded = Recorded(depth=depth, num_host_blocks=num_host_blocks)
    recorded.run(500)
    assert (recorded.core.stats().blocks_swapped_in > 0) == (num_host_blocks > 0)
    assert recorded.core.stats().num_preemptions > 0, "the test means nothing without"
    assert recorded.core.stats().prefix_hits > 0
    path = recorded.write(tmp_path / "a.jsonl")
    said = []
    for _ in range(2):
        assert main(["replay", str(path)]) == 0
        said.append(capsys.readouterr().out)
    assert said[0] == said[1]
    assert "the test wants it" in said[0]
    trailer = json.loads(path.read_bytes().splitlines()[-1])
    assert f"sha256 {trailer['sha256']}: the same again" in said[0]
    assert sum(line.startswith(b'["step"') for line in path.read_bytes().splitlines()) >= 60
    assert path.stat().st_mode & 0o777 == 0o600


def test_a_difference_is_printed_as_the_first_decision_that_differs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As if the policy had changed: one block more, which the recorded scheduler did not have."""
    recorded = Recorded()
    recorded.run(200)
    recording = flight.read(recorded.write(tmp_path / "a.jsonl"))
    events = [(name, list(words)) for name, words in flight.split(recording.events)]
    at, changed = next((i, words) for i, (name, words) in enumerate(events) if name == "step" and i > len(events) / 2)
    was = f'["step", {changed[0]}, {changed[1]}'
    changed[-1] += 1  # sampled rows
    numbers = {name: number for number, (name, _) in flight.EVENTS.items()}
    words = [word for name, words in events for word in (numbers[name] | len(words) << 8, *words)]
    flight.write(tmp_path / "b.jsonl", recording._replace(events=np.array(words, np.int64).tobytes()))
    assert main(["replay", str(tmp_path / "b.jsonl")]) == 1
    out = capsys.readouterr().out
    assert "differs:" in out
    assert out.count(was) == 2, "neither side of the step is shown"
    before = [words[0] for name, words in events[:at] if name == "step"][-1]
    assert f"after step {before}, differs" in out


def test_a_recording_says_nothing_of_what_was_said(tmp_path: Path) -> None:
    """Two engines that were asked different things of the same lengths: no number tells which is which."""
    files = []
    for offset in (0, 11_111):
        recorded = Recorded()
        recorded.prompts = [[(token + offset) % VOCAB for token in prompt] for prompt in recorded.prompts]
        recorded.run(60)
        files.append(recorded.write(tmp_path / f"{offset}.jsonl").read_bytes().splitlines())
    lines = [[line for line in file if not line.startswith((b'["hash"', b'["state"'))] for file in files]
    assert lines[0] == lines[1]
    hashes = [[json.loads(line)[3] for line in file if line.startswith(b'["hash"')] for file in files]
    assert len(hashes[0]) == len(hashes[1]) > 10
    assert set(hashes[0]).isdisjoint(hashes[1])  # of a key that each engine draws, and that is in no file


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (
            b"\x80\x04\x95\x1d\x00\x00\x00\x00\x00\x00\x00\x8c\x05posix\x94\x8c\x06system\x94\x93\x94.",
            "first line is not",
        ),
        (b"", "first line is not"),
        (b'{"schema": "hybrid-serve/flight", "version": 9}\n{"num_events": 0}\n', "of version 9"),
        (b'{"schema": "hybrid-serve/flight", "version": 2}\n{"num_events": 0}\n', "malformed"),
        (b'{"schema": "hybrid-serve/flight", "version": 2}\n', "0 events and no at its end"),
    ],
    ids=["pickle", "empty", "version", "no config", "cut"],
)
def test_another_file_is_refused_with_one_line_and_never_run(  # ADV-06
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: bytes, complaint: str
) -> None:
    path = tmp_path / "dump.pkl"
    path.write_bytes(content)
    assert main(["replay", str(path)]) == 2
    assert complaint in capsys.readouterr().err


def test_a_file_whose_decisions_were_changed_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recorded = Recorded()
    recorded.run(100)
    path = recorded.write(tmp_path / "a.jsonl")
    lines = path.read_bytes().splitlines(keepends=True)
    last = max(i for i, line in enumerate(lines) if line.startswith(b'["step"'))
    lines[last] = lines[last].replace(b"]", b",1,1]")
    path.write_bytes(b"".join(lines))
    assert main(["replay", str(path)]) == 2
    assert "was changed" in capsys.readouterr().err


def test_only_the_newest_files_of_a_folder_are_kept(tmp_path: Path) -> None:
    (tmp_path / "other.jsonl").touch()
    for second in range(flight.KEPT_FILES + 5):
        flight.new_path(tmp_path, 0, 1e9 + second).touch()
    kept = sorted(tmp_path.glob("hybrid-serve-flight-*"))
    assert len(kept) == flight.KEPT_FILES
    assert kept[-1] == max(kept)
    assert (tmp_path / "other.jsonl").exists()


def test_files_of_one_millisecond_have_names_of_their_own(tmp_path: Path) -> None:
    names = {flight.new_path(tmp_path, 0, 1e9 + microseconds / 1e6) for microseconds in range(0, 1000, 100)}
    assert len(names) == 10


def test_memory_of_an_engine_that_recorded_nothing_is_no_recording() -> None:
    assert flight.read_memory(memoryview(mmap.mmap(-1, 2**16))) is None
