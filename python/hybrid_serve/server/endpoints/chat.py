"""POST /v1/chat/completions."""

from __future__ import annotations

import time

import msgspec

from ...client import TokenLogprobs
from ..answers import AssistantMessage, ChatChoice, ChatCompletion, ChatLogprobs
from ..context import ServerContext, context_length_exceeded
from ..conversation import render_prompt
from ..errors import invalid
from ..generation import Delta, Generation, Prompt
from ..logprobs import LogprobFormat
from ..patience import Patience
from ..protocol import ChatCompletionRequest
from ..reply import reply
from ..sampling import check_stream_options, num_logprobs, sampling_params
from ..sse import DONE, Exchange

_encode = msgspec.json.encode


async def create_chat_completion(context: ServerContext, request: ChatCompletionRequest, exchange: Exchange) -> None:
    """The next message of a conversation, whole or as a stream.

    Answers on ``exchange``. Raises ``ApiError`` for a request that cannot be served."""
    model = context.check_model(request.model, exchange.key)
    check_stream_options(request)
    generation, unused = await _prepare(context, request, exchange)
    exchange.name_ignored(unused)
    answer = _Answer(context, request, generation, model, exchange.request_id)
    await reply(exchange, generation, answer, stream=bool(request.stream))


async def _prepare(
    context: ServerContext, request: ChatCompletionRequest, exchange: Exchange
) -> tuple[Generation, list[str]]:
    facts = context.facts
    given = request.max_completion_tokens
    param = "max_tokens" if given is None else "max_completion_tokens"
    given = request.max_tokens if given is None else given
    if given == 0:
        raise invalid(param, f"{param} is 0, a reply has at least 1 token")
    logprobs = -1
    if request.logprobs:
        logprobs = num_logprobs(request.top_logprobs or 0, "top_logprobs", context.config.server.max_logprobs)
    elif request.top_logprobs:
        raise invalid("top_logprobs", "top_logprobs needs logprobs=true")
    text, unused = await render_prompt(context, request)
    ids = await context.encode(text, bool(request.add_special_tokens), "messages")
    if not ids:
        raise invalid("messages", "the conversation renders to an empty prompt")
    room = facts.max_model_len - len(ids)
    if room <= 0:
        raise context_length_exceeded(facts.max_model_len, len(ids), "messages")
    params = sampling_params(
        request,
        facts,
        max_tokens=room if given is None else min(given, room),
        logprobs=logprobs,
        seed=context.seed(),
    )
    salt = context.cache_salt(exchange.key_name, request.cache_salt)
    patience = Patience.of(request, exchange.timeout, context.config.scheduler)
    n, priority, rank = request.n or 1, request.priority or 0, context.rank(exchange.rank)
    return Generation(context, [Prompt(ids)], params, n, priority, salt, rank, exchange.arrived, patience), unused


class _Answer:
    """One request's answer in chat's format; what is equal in all events is encoded once."""

    def __init__(
        self,
        context: ServerContext,
        request: ChatCompletionRequest,
        generation: Generation,
        model: str,
        request_id: str,
    ) -> None:
        self.generation = generation
        self._id, self._created, self._model = f"chatcmpl-{request_id}", int(time.time()), model
        self._fingerprint = context.fingerprint
        self._format = LogprobFormat(context.text.tokenizer, bool(request.return_tokens_as_token_ids))
        self._wants_logprobs = bool(request.logprobs)
        self._wants_ids = bool(request.return_token_ids)
        options = request.stream_options
        self._wants_usage = bool(options and options.include_usage)
        self._usage_always = bool(options and options.continuous_usage_stats)
        self._plain = not (self._wants_logprobs or self._wants_ids or self._usage_always)
        head = {
            "id": self._id,
            "object": "chat.completion.chunk",
            "created": self._created,
            "model": model,
            "system_fingerprint": self._fingerprint,
        }
        self._head = b"data: " + _encode(head)[:-1]
        self._choice_heads = [
            self._head + b',"choices":[{"index":%d,"delta":{"content":' % choice.index for choice in generation.choices
        ]
        usage = b',"usage":null' if self._wants_usage else b""
        self._tail = b'},"logprobs":null,"finish_reason":null}]' + usage + b"}\n\n"
        self._begun: set[int] = set()
        count = len(generation.choices)
        self._texts: list[list[str]] = [[] for _ in range(count)]
        self._ids: list[list[int]] = [[] for _ in range(count)]
        self._logprobs: list[list[TokenLogprobs]] = [[] for _ in range(count)]

    def events(self, deltas: list[Delta]) -> bytes:
        parts: list[bytes] = []
        for delta in deltas:
            index = delta.choice.index
            if index not in self._begun:
                self._begun.add(index)
                parts.append(self._first_event(index))
            if delta.choice.finish_reason is not None or not self._plain:
                parts.append(self._full_event(delta))
            elif delta.text:
                parts += (self._choice_heads[index], _encode(delta.text), self._tail)
        return b"".join(parts)

    def _first_event(self, index: int) -> bytes:
        extra = b""
        if self._wants_ids and len(self._begun) == 1:
            extra = b',"prompt_token_ids":' + _encode(list(self.generation.prompts[0].token_ids))
        choice = b',"choices":[{"index":%d,"delta":{"role":"assistant","content":""},' % index
        usage = self._usage_field()
        return b"".join((self._head, choice, b'"logprobs":null,"finish_reason":null}]', extra, usage, b"}\n\n"))

    def _full_event(self, delta: Delta) -> bytes:
        choice = delta.choice
        logprobs = self._format.chat(delta.token_ids, delta.logprobs) if self._wants_logprobs else None
        fields = [
            b"},",
            b'"logprobs":' + _encode(logprobs),
            b',"finish_reason":' + _encode(choice.finish_reason),
        ]
        if choice.finish_reason is not None:
            fields.append(b',"stop_reason":' + _encode(choice.stop_reason))
        if self._wants_ids:
            fields.append(b',"token_ids":' + _encode(delta.token_ids))
        head = self._choice_heads[choice.index] + _encode(delta.text)
        return b"".join((head, *fields, b"}]", self._usage_field(), b"}\n\n"))

    def _usage_field(self) -> bytes:
        if self._usage_always:
            return b',"usage":' + _encode(self.generation.usage())
        return b',"usage":null' if self._wants_usage else b""

    def last_events(self) -> bytes:
        if not self._wants_usage:
            return DONE
        usage = _encode(self.generation.usage())
        return b"".join((self._head, b',"choices":[],"usage":', usage, b"}\n\n", DONE))

    def collect(self, deltas: list[Delta]) -> None:
        for delta in deltas:
            index = delta.choice.index
            self._texts[index].append(delta.text)
            if self._wants_ids or self._wants_logprobs:
                self._ids[index] += delta.token_ids
                self._logprobs[index] += delta.logprobs

    def whole(self) -> ChatCompletion:
        prompt_ids = list(self.generation.prompts[0].token_ids) if self._wants_ids else msgspec.UNSET
        return ChatCompletion(
            id=self._id,
            created=self._created,
            model=self._model,
            choices=[self._choice(i) for i in range(len(self.generation.choices))],
            usage=self.generation.usage(),
            system_fingerprint=self._fingerprint,
            prompt_token_ids=prompt_ids,
        )

    def _choice(self, index: int) -> ChatChoice:
        choice = self.generation.choices[index]
        assert choice.finish_reason is not None
        logprobs: ChatLogprobs | None = None
        if self._wants_logprobs:
            logprobs = self._format.chat(self._ids[index], self._logprobs[index])
        return ChatChoice(
            index=index,
            message=AssistantMessage("".join(self._texts[index])),
            logprobs=logprobs,
            finish_reason=choice.finish_reason,
            stop_reason=choice.stop_reason,
            token_ids=self._ids[index] if self._wants_ids else msgspec.UNSET,
        )
