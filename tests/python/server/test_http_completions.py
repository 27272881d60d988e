"""POST /v1/completions, /tokenize and /detokenize (S30, S35, B13)."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

import pytest

from api_harness import COMPLETIONS, MESSAGES, REPLY, Api, says, text_of
from demo_model import demo_tokenizer
from fake_engine import Call, FakeEngine

MakeApi = Callable[..., Api]
IDS = list(demo_tokenizer().encode("hi you"))


def tells_its_prompt(call: Call, choice: int) -> Sequence[int]:
    """A script that shows which prompt and choice it belongs to."""
    return demo_tokenizer().encode(f"{call.token_ids} {choice}")


def test_answer_has_openais_shape(api: Api) -> None:
    """S30"""
    body = api.complete("hi", max_tokens=3)
    assert body.pop("id").startswith("cmpl-")
    assert isinstance(body.pop("created"), int)
    assert body.pop("system_fingerprint").startswith("fp_")
    assert body == {
        "object": "text_completion",
        "model": "demo",
        "choices": [
            {"index": 0, "text": "Hello, this", "logprobs": None, "finish_reason": "length", "stop_reason": None}
        ],
        "usage": {
            "prompt_tokens": 1,
            "completion_tokens": 3,
            "total_tokens": 4,
            "prompt_tokens_details": {"cached_tokens": 0},
        },
    }


def test_sixteen_tokens_are_the_default(api: Api) -> None:
    api.complete()
    assert api.engine.calls[0].params.max_tokens == 16


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("hi you", [IDS]),
        (["hi you", "hi"], [IDS, IDS[:1]]),
        (IDS, [IDS]),
        ([IDS, [5, 6], [0]], [IDS, [5, 6], [0]]),
    ],
)
def test_all_four_shapes_of_a_prompt(make_api: MakeApi, prompt: Any, expected: list[list[int]]) -> None:
    """S30: choice p * n + j is the j-th reply to prompt p."""
    api = make_api(FakeEngine(tells_its_prompt))
    body = api.complete(prompt, n=2, max_tokens=40)
    assert sorted(call.token_ids for call in api.engine.calls) == sorted(expected)
    texts = [choice["text"] for choice in body["choices"]]
    assert texts == [f"{ids} {j}" for ids in expected for j in range(2)]
    assert [choice["index"] for choice in body["choices"]] == list(range(2 * len(expected)))
    assert body["usage"]["prompt_tokens"] == sum(map(len, expected))
    events = api.stream(COMPLETIONS, prompt=prompt, n=2, max_tokens=40, stream_options={"include_usage": True})
    assert [text_of(events, i) for i in range(len(texts))] == texts
    assert events[-1]["usage"] == body["usage"]


def test_two_hundred_prompts_are_answered_in_order(make_api: MakeApi) -> None:
    api = make_api(FakeEngine(tells_its_prompt))
    body = api.complete([[i, i + 1] for i in range(200)], max_tokens=30)
    assert [choice["text"] for choice in body["choices"]] == [f"[{i}, {i + 1}] 0" for i in range(200)]


@pytest.mark.parametrize("prompt", ["say 😀", list(demo_tokenizer().encode("say 😀"))])
def test_echo_puts_the_prompt_first(api: Api, prompt: Any) -> None:
    """B13"""
    assert api.complete(prompt, echo=True, max_tokens=1)["choices"][0]["text"] == "say 😀Hello"
    assert text_of(api.stream(COMPLETIONS, prompt=prompt, echo=True, max_tokens=1)) == "say 😀Hello"


def test_echo_without_tokens_asks_no_engine(api: Api) -> None:
    body = api.complete(["a", "b"], echo=True, max_tokens=0)
    assert [choice["text"] for choice in body["choices"]] == ["a", "b"]
    assert [choice["finish_reason"] for choice in body["choices"]] == ["length"] * 2
    assert body["usage"]["completion_tokens"] == 0
    assert api.engine.calls == []


def test_logprobs_have_the_older_shape(api: Api) -> None:
    """B5"""
    logprobs = api.complete("hi", max_tokens=4, logprobs=2)["choices"][0]["logprobs"]
    assert logprobs["tokens"] == ["Hello", ",", " this", " is"]
    assert logprobs["token_logprobs"] == [-0.5] * 4
    assert logprobs["text_offset"] == [0, 5, 6, 11]
    assert [len(top) for top in logprobs["top_logprobs"]] == [2] * 4
    assert all(top[token] == -0.5 for top, token in zip(logprobs["top_logprobs"], logprobs["tokens"], strict=True))
    parts = [event["choices"][0]["logprobs"] for event in api.stream(COMPLETIONS, max_tokens=4, logprobs=2)]
    assert [offset for part in parts for offset in part["text_offset"]] == [0, 5, 6, 11]
    assert api.complete("hi", max_tokens=4, logprobs=0)["choices"][0]["logprobs"]["top_logprobs"] is None


def test_token_ids_come_back_where_asked_for(api: Api) -> None:
    """B14"""
    choice = api.complete("hi you", max_tokens=2, return_token_ids=True)["choices"][0]
    assert choice["prompt_token_ids"] == IDS
    assert choice["token_ids"] == list(demo_tokenizer().encode(REPLY))[:2]
    again = api.complete(choice["prompt_token_ids"] + choice["token_ids"])
    assert again["usage"]["prompt_tokens"] == len(IDS) + 2


def test_stream_of_a_completion_has_texts_and_one_reason(api: Api) -> None:
    events = api.stream(COMPLETIONS, max_tokens=4)
    assert text_of(events) == "Hello, this is"
    assert [event["choices"][0]["finish_reason"] for event in events] == [None, None, None, "length"]
    assert {event["object"] for event in events} == {"text_completion"}


def test_best_of_equal_to_n_is_n(api: Api) -> None:
    assert len(api.complete(n=2, best_of=2)["choices"]) == 2


def test_tokenize_and_detokenize_are_inverse(api: Api) -> None:
    """S35"""
    random.seed(3)
    for _ in range(100):
        text = "".join(
            chr(random.choice((random.randrange(32, 127), random.randrange(0xA0, 0xD7FF)))) for _ in range(9)
        )
        tokens = api.post("/tokenize", {"prompt": text}).json()
        assert tokens["count"] == len(tokens["tokens"])
        assert tokens["max_model_len"] == 256
        assert api.post("/detokenize", {"tokens": tokens["tokens"]}).json() == {"prompt": text}
    assert api.post("/tokenize", {"prompt": "", "model": "demo"}).json()["tokens"] == []
    pieces = api.post("/tokenize", {"prompt": "hi you", "return_token_strs": True}).json()["token_strs"]
    assert pieces == ["hi", "Ġyou"]


def test_tokenized_conversation_is_what_chat_feeds_the_engine(make_api: MakeApi) -> None:
    """S35"""
    api = make_api(FakeEngine(says("x")))
    for fields in ({}, {"add_generation_prompt": False}):
        tokens = api.post("/tokenize", {"messages": MESSAGES} | fields).json()["tokens"]
        api.chat(**fields)
        assert api.engine.calls[-1].token_ids == tokens
