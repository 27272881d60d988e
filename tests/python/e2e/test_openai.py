"""The official client against the real server and the demo model (S29, S30, S35, B5, B7, B8, B14)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest

from .server import Server

QUESTION = "What is the opposite of hot?"  # no near tie before the word that is looked for, on any instruction set


@pytest.fixture(scope="module")
def client(server: Server) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=server.url + "/v1", api_key="any", max_retries=0) as made:
        yield made


def test_chat_replies_in_sane_english(client: openai.OpenAI) -> None:
    model = client.models.list().data[0].id
    reply = client.chat.completions.create(
        model=model, messages=[{"role": "user", "content": QUESTION}], temperature=0, max_tokens=40
    )
    assert "cold" in (reply.choices[0].message.content or "")
    assert reply.choices[0].finish_reason in ("stop", "length")
    assert reply.usage is not None
    assert reply.usage.total_tokens == reply.usage.prompt_tokens + reply.usage.completion_tokens


def test_a_stream_says_what_the_plain_reply_says(client: openai.OpenAI) -> None:
    ask = {"model": client.models.list().data[0].id, "temperature": 0, "max_tokens": 48}
    messages = [{"role": "user", "content": "Write one sentence about the sea."}]
    plain = client.chat.completions.create(messages=messages, **ask)  # type: ignore[call-overload]
    pieces, usage = [], None
    with client.chat.completions.create(  # type: ignore[call-overload]
        messages=messages, stream=True, stream_options={"include_usage": True}, **ask
    ) as stream:
        for chunk in stream:
            usage = chunk.usage or usage
            pieces += [choice.delta.content or "" for choice in chunk.choices]
    assert "".join(pieces) == plain.choices[0].message.content
    assert usage is not None
    assert usage.completion_tokens == plain.usage.completion_tokens


def test_choices_of_one_request_are_as_if_asked_alone(client: openai.OpenAI) -> None:
    """n greedy choices share the prompt's blocks and are equal; seeded ones repeat themselves (B7, B10)."""
    model = client.models.list().data[0].id
    greedy = client.completions.create(model=model, prompt="Once upon a time", n=3, temperature=0, max_tokens=16)
    assert len({choice.text for choice in greedy.choices}) == 1
    seeded = [
        client.completions.create(model=model, prompt="Once upon a time", n=3, temperature=1.0, seed=7, max_tokens=16)
        for _ in range(2)
    ]
    assert [c.text for c in seeded[0].choices] == [c.text for c in seeded[1].choices]
    assert len({c.text for c in seeded[0].choices}) == 3


@pytest.mark.parametrize(
    ("prompt", "choices"),
    [("Hello", 1), (["Hello", "Good morning"], 2), ([504, 260], 1), ([[504], [260, 504]], 2)],
    ids=["text", "texts", "ids", "lists of ids"],
)
def test_completions_take_all_four_prompt_shapes(client: openai.OpenAI, prompt: Any, choices: int) -> None:
    reply = client.completions.create(
        model=client.models.list().data[0].id,
        prompt=prompt,
        max_tokens=3,
        temperature=0,
        n=2,
        extra_body={"ignore_eos": True},
    )
    assert [choice.index for choice in reply.choices] == list(range(2 * choices))
    assert reply.usage is not None
    assert reply.usage.completion_tokens == 3 * 2 * choices


def test_logprobs_name_the_greedy_token_first(client: openai.OpenAI) -> None:
    reply = client.chat.completions.create(
        model=client.models.list().data[0].id,
        messages=[{"role": "user", "content": QUESTION}],
        temperature=0,
        max_tokens=8,
        logprobs=True,
        top_logprobs=4,
    )
    assert reply.choices[0].logprobs is not None
    content = reply.choices[0].logprobs.content or []
    assert len(content) == 8
    for entry in content:
        assert len(entry.top_logprobs) == 4
        assert entry.token == entry.top_logprobs[0].token
        assert entry.logprob == entry.top_logprobs[0].logprob <= 0
        assert entry.bytes is not None


def test_a_second_equal_prompt_is_found_in_the_cache(client: openai.OpenAI) -> None:
    """B1: cached_tokens is the prompt but for its last block."""
    ask = {"model": client.models.list().data[0].id, "max_tokens": 4, "temperature": 0}
    prompt = "The quick brown fox jumps over the lazy dog. " * 20
    first = client.completions.create(prompt=prompt, **ask)  # type: ignore[call-overload]
    second = client.completions.create(prompt=prompt, **ask)  # type: ignore[call-overload]
    assert second.choices[0].text == first.choices[0].text
    assert second.usage.prompt_tokens_details.cached_tokens >= second.usage.prompt_tokens - 16
    salted = client.completions.create(prompt=prompt, extra_body={"cache_salt": "mine"}, **ask)  # type: ignore[call-overload]
    assert salted.usage.prompt_tokens_details.cached_tokens == 0
    assert salted.choices[0].text == first.choices[0].text


def test_tokenize_gives_what_chat_feeds_the_model(server: Server, client: openai.OpenAI) -> None:
    messages = [{"role": "user", "content": QUESTION}]
    tokens = httpx.post(server.url + "/tokenize", json={"messages": messages}).json()
    reply = client.chat.completions.create(
        model=client.models.list().data[0].id,
        messages=messages,  # type: ignore[arg-type]
        max_tokens=1,
        extra_body={"return_token_ids": True},
    )
    assert reply.model_extra is not None
    assert reply.model_extra["prompt_token_ids"] == tokens["tokens"]
    text = httpx.post(server.url + "/detokenize", json={"tokens": tokens["tokens"]}).json()["prompt"]
    assert QUESTION in text


def test_a_prompt_past_the_context_is_refused_with_both_numbers(client: openai.OpenAI) -> None:
    """F-33: never a silent truncation."""
    model = client.models.list().data[0].id
    with pytest.raises(openai.BadRequestError) as refused:
        client.completions.create(model=model, prompt=[[5] * 3000][0], max_tokens=1)
    assert refused.value.code == "context_length_exceeded"
    assert "2048" in refused.value.message
    assert "3000" in refused.value.message


def test_an_unknown_model_is_a_404_that_lists_the_served_ones(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as refused:
        client.chat.completions.create(model="no-such-model", messages=[{"role": "user", "content": "hi"}])
    assert client.models.list().data[0].id in refused.value.message
