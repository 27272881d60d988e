"""The official client reads our answers (S29, S30)."""

from __future__ import annotations

from collections.abc import Callable

import httpx
import openai
import pytest
from openai.types.chat import ChatCompletionUserMessageParam

from api_harness import MESSAGES, REPLY, Api

MakeApi = Callable[..., Api]
USER: list[ChatCompletionUserMessageParam] = [{"role": "user", "content": "hi"}]


def client_of(api: Api, key: str = "any") -> openai.AsyncOpenAI:
    transport = httpx.AsyncClient(transport=httpx.ASGITransport(api.app), base_url="http://localhost/v1")
    return openai.AsyncOpenAI(api_key=key, base_url="http://localhost/v1", http_client=transport, max_retries=0)  # type: ignore[arg-type, unused-ignore]


def test_chat_completion_parses(api: Api) -> None:
    client = client_of(api)
    answer = api.run(
        client.chat.completions.create(model="demo", messages=USER, n=2, logprobs=True, top_logprobs=2, max_tokens=64)
    )
    assert [choice.message.content for choice in answer.choices] == [REPLY, REPLY]
    assert answer.usage is not None
    assert answer.usage.prompt_tokens_details is not None
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    logprobs = answer.choices[1].logprobs
    assert logprobs is not None
    assert logprobs.content is not None
    assert len(logprobs.content[0].top_logprobs) == 2
    assert answer.to_dict(mode="json") == answer.model_validate(answer.to_dict(mode="json")).to_dict(mode="json")


def test_chat_stream_parses(api: Api) -> None:
    client = client_of(api)

    async def read() -> tuple[str, list[str], int]:
        text, total = "", 0
        reasons: list[str] = []
        stream = await client.chat.completions.create(
            model="demo", messages=USER, stream=True, stream_options={"include_usage": True}
        )
        async for chunk in stream:
            for choice in chunk.choices:
                text += choice.delta.content or ""
                if choice.finish_reason:
                    reasons.append(choice.finish_reason)
            if chunk.usage:
                total = chunk.usage.total_tokens
        return text, reasons, total

    text, reasons, total = api.run(read())
    assert (text, reasons) == (REPLY, ["stop"])
    assert total > 0


def test_completions_parse_whole_and_streamed(api: Api) -> None:
    client = client_of(api)

    async def read() -> str:
        stream = await client.completions.create(model="demo", prompt="hi", stream=True, max_tokens=64)
        return "".join([choice.text async for chunk in stream for choice in chunk.choices])

    answer = api.run(client.completions.create(model="demo", prompt=["a", "b"], logprobs=1, max_tokens=64, n=2))
    assert [choice.text for choice in answer.choices] == [REPLY] * 4
    assert answer.choices[0].logprobs is not None
    assert api.run(read()) == REPLY


def test_models_parse(api: Api) -> None:
    client = client_of(api)

    async def names() -> list[str]:
        return [model.id async for model in client.models.list()]

    assert api.run(names()) == ["demo"]
    assert api.run(client.models.retrieve("demo")).id == "demo"


def test_errors_arrive_as_the_clients_own_types(make_api: MakeApi) -> None:
    api = make_api(api_key=("secret",))
    client = client_of(api, "secret")
    with pytest.raises(openai.NotFoundError) as missing:
        api.run(client.chat.completions.create(model="gpt-4", messages=USER))
    assert (missing.value.code, missing.value.param, missing.value.type) == (
        "model_not_found",
        "model",
        "invalid_request_error",
    )
    with pytest.raises(openai.BadRequestError) as bad:
        api.run(client.chat.completions.create(model="demo", messages=USER, temperature=5))
    assert bad.value.param == "temperature"
    with pytest.raises(openai.AuthenticationError):
        api.run(client_of(api, "wrong").models.retrieve("demo"))


def test_error_in_a_stream_raises_in_the_client(make_api: MakeApi) -> None:
    """An agent must not take half an answer for a whole one."""
    from fake_engine import FakeEngine

    api = make_api(FakeEngine(lambda call, choice: [5] * 9, dies_after=3))
    client = client_of(api)

    async def read() -> None:
        async for _ in await client.chat.completions.create(model="demo", messages=USER, stream=True):
            pass

    with pytest.raises(openai.APIError, match="engine stopped"):
        api.run(read())
    assert MESSAGES == USER
