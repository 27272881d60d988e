"""POST /v1/chat/completions: shapes, fields, streams (S29, B5, B7, B8, B9, B13, B14)."""

from __future__ import annotations

from array import array
from collections.abc import Callable
from typing import Any

import pytest

from api_harness import CHAT, MESSAGES, REPLY, Api, events_of, says, text_of
from demo_model import demo_template, demo_tokenizer
from fake_engine import FakeEngine

MakeApi = Callable[..., Api]


def test_answer_has_openais_shape(api: Api) -> None:
    """S29"""
    body = api.chat()
    count = len(demo_tokenizer().encode(REPLY)) + 1  # and the end of turn
    prompt = len(demo_tokenizer().encode(demo_template().render(MESSAGES)))
    assert body.pop("id").startswith("chatcmpl-")
    assert isinstance(body.pop("created"), int)
    assert body.pop("system_fingerprint").startswith("fp_")
    assert body == {
        "object": "chat.completion",
        "model": "demo",
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": REPLY, "refusal": None},
                "logprobs": None,
                "finish_reason": "stop",
                "stop_reason": None,
            }
        ],
        "usage": {
            "prompt_tokens": prompt,
            "completion_tokens": count,
            "total_tokens": prompt + count,
            "prompt_tokens_details": {"cached_tokens": 0},
        },
        "service_tier": None,
    }


def test_engine_is_given_the_templates_tokens_and_openais_defaults(api: Api) -> None:
    api.chat()
    call = api.engine.calls[0]
    assert array("i", call.token_ids) == demo_tokenizer().encode(demo_template().render(MESSAGES))
    params = call.params
    assert params.max_tokens == 256 - len(call.token_ids)  # the rest of the context
    assert (params.temperature, params.top_p, params.top_k, params.min_p) == (1.0, 1.0, 0, 0.0)
    assert params.seed is not None
    assert 0 <= params.seed < 2**63
    assert (call.n, call.priority, call.eos_token_ids, call.cache_salt) == (1, 0, (2,), b"")
    assert call.left
    assert call.unfinished_when_left == 0


def test_every_sampling_field_reaches_the_engine(api: Api) -> None:
    """B9"""
    fields: dict[str, Any] = {
        "max_completion_tokens": 5,
        "max_tokens": 7,
        "min_tokens": 2,
        "temperature": 0.5,
        "top_p": 0.25,
        "top_k": 3,
        "min_p": 0.125,
        "frequency_penalty": -2,
        "presence_penalty": 2,
        "repetition_penalty": 1.5,
        "seed": -5,
        "stop": ["x", "yy"],
        "stop_token_ids": [7],
        "ignore_eos": True,
        "include_stop_str_in_output": True,
        "skip_special_tokens": False,
        "logit_bias": {"5": 1000, "6": -1000, "7": 0.5},
        "allowed_token_ids": [5, 6],
        "priority": -3,
        "cache_salt": "mine",
        "n": 2,
    }
    api.chat(**fields)
    call = api.engine.calls[0]
    params = call.params
    assert (params.max_tokens, params.min_tokens, params.seed) == (5, 2, -5)
    assert (params.temperature, params.top_p, params.top_k, params.min_p) == (0.5, 0.25, 3, 0.125)
    assert (params.frequency_penalty, params.presence_penalty, params.repetition_penalty) == (-2, 2, 1.5)
    assert (params.stop, params.stop_token_ids, params.ignore_eos) == (("x", "yy"), (7,), True)
    assert (params.include_stop_str_in_output, params.skip_special_tokens) == (True, False)
    assert (params.logit_bias, params.allowed_token_ids) == ({5: 100.0, 6: -100.0, 7: 0.5}, (5, 6))
    assert (call.n, call.priority, call.cache_salt, call.eos_token_ids) == (2, -3, b"mine", ())


def test_null_is_the_default_everywhere(api: Api) -> None:
    names = (
        "model stream stream_options n max_tokens min_tokens temperature top_p top_k min_p frequency_penalty seed stop"
    )
    more = (
        "presence_penalty repetition_penalty stop_token_ids ignore_eos logit_bias allowed_token_ids priority cache_salt"
    )
    rest = "max_completion_tokens logprobs top_logprobs chat_template_kwargs tools tool_choice response_format user"
    api.chat(**dict.fromkeys(f"{names} {more} {rest}".split()))
    api.chat()
    first, second = (call.params for call in api.engine.calls)
    assert first.seed != second.seed
    assert [getattr(first, name) for name in first.__struct_fields__ if name != "seed"] == [
        getattr(second, name) for name in second.__struct_fields__ if name != "seed"
    ]


def test_tiny_temperature_is_raised_and_zero_stays_greedy_for_any_n(api: Api) -> None:
    api.chat(temperature=1e-5)
    api.chat(temperature=0, n=3)
    assert [call.params.temperature for call in api.engine.calls] == [0.01, 0.0]


def test_max_tokens_beyond_the_room_is_the_room(api: Api) -> None:
    """F-33"""
    api.chat(max_tokens=100_000)
    call = api.engine.calls[0]
    assert call.params.max_tokens == 256 - len(call.token_ids)


def test_length_is_the_reason_when_max_tokens_ends_the_reply(api: Api) -> None:
    choice = api.chat(max_tokens=3)["choices"][0]
    assert choice["finish_reason"] == "length"
    assert choice["message"]["content"] == "Hello, this"


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("tokens_per_step", [1, 4])
def test_stop_string_ends_the_reply_and_aborts_the_choice(
    make_api: MakeApi, stream: bool, tokens_per_step: int
) -> None:
    engine = FakeEngine(says(REPLY), tokens_per_step=tokens_per_step)
    api = make_api(engine)
    fields: dict[str, Any] = {"stop": ["of 😀", "nothing"]}
    if stream:
        events = api.stream(CHAT, **fields)
        text, last = text_of(events), events[-1]["choices"][0]
    else:
        last = api.chat(**fields)["choices"][0]
        text = last["message"]["content"]
    assert text == "Hello, this is a wörld "
    assert (last["finish_reason"], last["stop_reason"]) == ("stop", "of 😀")
    assert engine.calls[0].aborted_choices == [0]


def test_stop_token_id_is_the_stop_reason(api: Api) -> None:
    comma = demo_tokenizer().encode(",")[0]
    choice = api.chat(stop_token_ids=[comma])["choices"][0]
    assert (choice["message"]["content"], choice["finish_reason"], choice["stop_reason"]) == ("Hello", "stop", comma)


def test_stream_begins_with_the_role_and_its_last_delta_has_the_reason(api: Api) -> None:
    """S29"""
    events = api.stream(CHAT)
    assert events[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert {event["object"] for event in events} == {"chat.completion.chunk"}
    assert len({(event["id"], event["created"], event["model"]) for event in events}) == 1
    assert text_of(events) == REPLY
    reasons = [event["choices"][0]["finish_reason"] for event in events]
    assert reasons == [None] * (len(events) - 1) + ["stop"]
    assert all("usage" not in event for event in events)


def test_stream_and_whole_answer_agree_for_every_choice(make_api: MakeApi) -> None:
    """B7"""
    scripts = [list(demo_tokenizer().encode(text)) for text in ("one", "two and a half", "three 😀")]
    api = make_api(FakeEngine(lambda call, choice: scripts[choice], tokens_per_step=2))
    whole = api.chat(n=3)
    events = api.stream(CHAT, n=3, stream_options={"include_usage": True})
    for choice in whole["choices"]:
        assert text_of(events, choice["index"]) == choice["message"]["content"]
    assert [choice["message"]["content"] for choice in whole["choices"]] == ["one", "two and a half", "three 😀"]
    assert events[-1]["usage"] == whole["usage"]


def test_usage_comes_in_an_event_of_its_own_where_asked_for(api: Api) -> None:
    """B8"""
    events = api.stream(CHAT, stream_options={"include_usage": True})
    assert [event["usage"] for event in events[:-1]] == [None] * (len(events) - 1)
    assert events[-1]["choices"] == []
    assert events[-1]["usage"] == api.chat()["usage"]


def test_continuous_usage_grows_with_the_stream(api: Api) -> None:
    """B8"""
    events = api.stream(CHAT, max_tokens=4, stream_options={"continuous_usage_stats": True})
    assert [event["usage"]["completion_tokens"] for event in events] == [1, 1, 2, 3, 4]


def test_cached_tokens_are_counted_once_a_prompt(make_api: MakeApi) -> None:
    """B1"""
    api = make_api(FakeEngine(says("x"), cached_tokens=16))
    assert api.chat(n=3)["usage"]["prompt_tokens_details"] == {"cached_tokens": 16}


def test_logprobs_name_tokens_and_their_bytes(api: Api) -> None:
    """B5"""
    content = api.chat(logprobs=True, top_logprobs=2)["choices"][0]["logprobs"]["content"]
    ids = [*demo_tokenizer().encode(REPLY), 2]
    assert len(content) == len(ids)
    assert b"".join(bytes(entry["bytes"]) for entry in content[:-1]).decode() == REPLY
    assert [entry["logprob"] for entry in content] == [-0.5] * len(ids)
    assert all([top["logprob"] for top in entry["top_logprobs"]] == [-0.5, -1.5] for entry in content)
    assert api.chat(logprobs=True)["choices"][0]["logprobs"]["content"][0]["top_logprobs"] == []
    streamed = [event["choices"][0]["logprobs"] for event in api.stream(CHAT, logprobs=True, top_logprobs=2)]
    assert [entry for part in streamed if part for entry in part["content"]] == content


def test_tokens_can_be_named_by_their_ids(api: Api) -> None:
    content = api.chat(logprobs=True, return_tokens_as_token_ids=True)["choices"][0]["logprobs"]["content"]
    assert [entry["token"] for entry in content[:-1]] == [f"token_id:{i}" for i in demo_tokenizer().encode(REPLY)]


def test_token_ids_come_back_where_asked_for(api: Api) -> None:
    """B14"""
    body = api.chat(return_token_ids=True)
    assert body["prompt_token_ids"] == api.engine.calls[0].token_ids
    assert body["choices"][0]["token_ids"] == [*demo_tokenizer().encode(REPLY), 2]
    events = api.stream(CHAT, return_token_ids=True)
    assert events[0]["prompt_token_ids"] == api.engine.calls[0].token_ids
    assert [i for event in events for i in event["choices"][0].get("token_ids", [])] == body["choices"][0]["token_ids"]


def test_text_parts_are_joined_and_developer_is_the_system(api: Api) -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    api.chat(messages=[{"role": "developer", "content": "sys"}, {"role": "user", "content": parts}])
    expected = demo_template().render([{"role": "system", "content": "sys"}, {"role": "user", "content": "a\nb"}])
    assert array("i", api.engine.calls[0].token_ids) == demo_tokenizer().encode(expected)


def test_final_message_can_be_continued(api: Api) -> None:
    """B13"""
    messages = [*MESSAGES, {"role": "assistant", "content": "The sky"}]
    api.chat(messages=messages, continue_final_message=True)
    text = demo_tokenizer().decode(api.engine.calls[0].token_ids, skip_special_tokens=False)
    assert text.endswith("<|im_start|>assistant\nThe sky")
    api.chat(messages=messages, add_generation_prompt=False)
    text = demo_tokenizer().decode(api.engine.calls[1].token_ids, skip_special_tokens=False)
    assert text.endswith("The sky<|im_end|>\n")


def test_fields_without_effect_are_named_in_a_header(api: Api) -> None:
    """F-32"""
    fields = {"user": "me", "store": True, "zzz": 1, "chat_template_kwargs": {"enable_thinking": False}, "a\r\nb: c": 1}
    response = api.post(CHAT, {"messages": MESSAGES} | fields)
    assert response.status_code == 200
    assert response.headers["x-hybrid-ignored"] == "?,store,user,zzz,chat_template_kwargs.enable_thinking"
    streamed = api.post(CHAT, {"messages": MESSAGES, "stream": True, "zzz": 1})
    assert streamed.headers["x-hybrid-ignored"] == "zzz"
    assert "x-hybrid-ignored" not in api.post(CHAT, {"messages": MESSAGES, "tools": None}).headers


def test_seedless_requests_repeat_with_the_servers_seed(make_api: MakeApi) -> None:
    """B10"""
    seeds = []
    for _ in range(2):
        api = make_api(seed=7)
        api.chat()
        api.chat()
        seeds.append([call.params.seed for call in api.engine.calls])
    assert seeds[0] == seeds[1]
    assert len(set(seeds[0])) == 2


def test_no_event_of_a_stream_shows_part_of_a_stop_string(make_api: MakeApi) -> None:
    """F-38"""
    api = make_api(FakeEngine(says("go on E EN END and more")))
    events = api.stream(CHAT, stop=["END"])
    assert text_of(events) == "go on E EN "
    so_far = ""
    for event in events:
        so_far += event["choices"][0]["delta"]["content"]
        assert so_far == "go on E EN "[: len(so_far)]


def test_done_is_the_last_event_of_a_stream(api: Api) -> None:
    response = api.post(CHAT, {"messages": MESSAGES, "stream": True})
    assert events_of(response.text)[-1] == "[DONE]"
    assert response.text.count("[DONE]") == 1
