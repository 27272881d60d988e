"""Prompts to measure with: texts of an exact number of tokens, cut from Python's own documentation, or a file's."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from ...config import ModelConfig
from ..http_client import HttpClient, HttpFailure
from ..usage import UsageError
from .load import Prompt

_TRIES = 500
# Of a file of conversations, as `vllm bench` takes them: no shorter, and no longer, in tokens.
_SHORTEST, _LONGEST_PROMPT, _LONGEST = 4, 1024, 2048
# Synthetic chat: median and spread of log-normal lengths; many short, few long.
_CHAT_INPUT, _CHAT_OUTPUT = (80, 1.3), (160, 0.9)


class Tokens(Protocol):
    """Text to token ids and back, wherever that is done."""

    async def encode(self, text: str) -> list[int]: ...
    async def decode(self, ids: Sequence[int]) -> str: ...


class ServerTokens:
    """By the server that is measured; ours and vLLM have these routes."""

    def __init__(self, client: HttpClient, model: str) -> None:
        self._client, self._model = client, model

    async def encode(self, text: str) -> list[int]:
        said = {"model": self._model, "prompt": text, "add_special_tokens": False}
        return list((await self._ask("/tokenize", said))["tokens"])

    async def decode(self, ids: Sequence[int]) -> str:
        return str((await self._ask("/detokenize", {"model": self._model, "tokens": list(ids)}))["prompt"])

    async def _ask(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        try:
            async with self._client.request("POST", path, json.dumps(body).encode()) as answer:
                data, status = await answer.read(), answer.status
        except HttpFailure as error:
            raise UsageError(f"{path}: {error}") from None
        if status != 200:
            raise UsageError(f"the server has no {path} (HTTP {status}): name its tokenizer, --tokenizer FOLDER")
        return dict(json.loads(data))


class LocalTokens:
    """By the tokenizer of a model folder, a GGUF file or a hub id."""

    def __init__(self, name: str) -> None:
        """Raises StartupError."""
        from ...text.loading import load_tokenizer, locate_tokenizer

        self._tokenizer = load_tokenizer(locate_tokenizer(name, ModelConfig()))

    async def encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, False).tolist()

    async def decode(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=False)


@dataclass(frozen=True)
class RandomLengths:
    """``range_ratio`` r: lengths are drawn evenly from (1 - r) to (1 + r) times the given ones."""

    input_len: int
    output_len: int
    prefix_len: int = 0  # tokens that all prompts begin with, besides input_len
    range_ratio: float = 0.0


class Corpus:
    """Cuts texts of an exact number of tokens out of a long text; the same ones for the same seed."""

    def __init__(self, tokens: Tokens, ids: list[int], seed: int) -> None:
        self._tokens, self._ids, self._random = tokens, ids, random.Random(seed)

    @classmethod
    async def open(cls, tokens: Tokens, seed: int) -> Corpus:
        from pydoc_data.topics import topics

        text = " ".join(" ".join(topics[key] for key in sorted(topics)).split())
        return cls(tokens, await tokens.encode(text), seed)

    async def text(self, num_tokens: int, prefix: str = "") -> str:
        """``num_tokens`` counts the prefix, too. Raises UsageError where the tokenizer splits no text so."""
        own = num_tokens - (len(await self._tokens.encode(prefix)) if prefix else 0)
        ids = self._ids * (1 + own // len(self._ids))
        for _ in range(_TRIES):
            at = self._random.randrange(max(1, len(ids) - own))
            text = prefix + await self._tokens.decode(ids[at : at + own])
            if "\ufffd" not in text and len(await self._tokens.encode(text)) == num_tokens:
                return text
        raise UsageError(f"found no text of exactly {num_tokens} tokens in {_TRIES} tries")

    async def random(self, count: int, lengths: RandomLengths) -> list[Prompt]:
        prefix = await self.text(lengths.prefix_len) if lengths.prefix_len else ""
        prompts = []
        for _ in range(count):
            input_len = lengths.prefix_len + self._about(lengths.input_len, lengths.range_ratio)
            text = await self.text(input_len, prefix)
            prompts.append(Prompt(text, input_len, self._about(lengths.output_len, lengths.range_ratio)))
        return prompts

    async def like_chat(self, count: int) -> list[Prompt]:
        prompts = []
        for _ in range(count):
            input_len, output_len = (self._skewed(*shape) for shape in (_CHAT_INPUT, _CHAT_OUTPUT))
            prompts.append(Prompt(await self.text(input_len), input_len, output_len))
        return prompts

    def _about(self, length: int, ratio: float) -> int:
        return max(1, round(length * self._random.uniform(1 - ratio, 1 + ratio)))

    def _skewed(self, median: int, spread: float) -> int:
        length = median * self._random.lognormvariate(0, spread)
        return min(max(_SHORTEST, round(length)), _LONGEST_PROMPT)


async def conversations(tokens: Tokens, path: str, count: int, output_len: int | None, seed: int) -> list[Prompt]:
    """First turn and length of the second, of conversations in ShareGPT's format. Raises UsageError."""
    try:
        entries = json.loads(Path(path).read_text(encoding="utf-8"))
        turns = [
            [str(turn["value"]) for turn in entry.get("conversations") or entry.get("conversation") or ()][:2]
            for entry in entries
        ]
    except OSError as error:
        raise UsageError(f"--dataset-path {path}: {error.strerror}") from None
    except (ValueError, TypeError, KeyError, AttributeError):
        raise UsageError(
            f'--dataset-path {path}: is not a list of {{"conversations": [{{"value": TEXT}}, ...]}}'
        ) from None
    usable = [pair for pair in turns if len(pair) == 2]
    random.Random(seed).shuffle(usable)
    prompts: list[Prompt] = []
    for asked, answered in usable:
        if len(prompts) == count:
            break
        input_len = len(await tokens.encode(asked))
        wanted = output_len or len(await tokens.encode(answered))
        is_short = min(input_len, wanted) < _SHORTEST
        is_long = input_len > _LONGEST_PROMPT or input_len + wanted > _LONGEST
        if not is_short and not is_long:
            prompts.append(Prompt(asked, input_len, wanted))
    if not prompts:
        raise UsageError(f"--dataset-path {path}: has no conversation of usable length")
    return [prompts[i % len(prompts)] for i in range(count)]
