"""POST /v1/completions."""

from __future__ import annotations

import time
from array import array

import msgspec

from ...client import TokenLogprobs
from ..answers import Completion, CompletionChoice, CompletionLogprobs, PromptTokensDetails, Usage
from ..context import ServerContext, context_length_exceeded
from ..errors import ApiError, invalid, not_supported
from ..generation import Delta, Generation, Prompt
from ..logprobs import LogprobFormat
from ..patience import Patience
from ..protocol import MAX_PROMPTS, CompletionRequest
from ..reply import reply
from ..sampling import check_ids, check_stream_options, num_logprobs, refuse_best_of, sampling_params
from ..sse import DONE, Exchange

_encode = msgspec.json.encode
_DEFAULT_MAX_TOKENS = 16


async def create_completion(context: ServerContext, request: CompletionRequest, exchange: Exchange) -> None:
    """The continuation of one or more texts, whole or as a stream.

    Answers on ``exchange``. Raises ``ApiError`` for a request that cannot be served."""
    model = context.check_model(request.model, exchange.key)
    check_stream_options(request)
    refuse_best_of(request.best_of, request.n or 1)
    if request.echo and request.logprobs is not None:
        raise not_supported("echo", "echo with logprobs (log-probabilities of the prompt)")
    max_tokens = _DEFAULT_MAX_TOKENS if request.max_tokens is None else request.max_tokens
    if max_tokens == 0 and not request.echo:
        raise invalid("max_tokens", "max_tokens 0 is only allowed with echo")
    prompts = await prompts_of(context, request)
    if max_tokens == 0:
        return await _echo_only(context, request, prompts, model, exchange)
    generation = _generation(context, request, prompts, max_tokens, exchange)
    answer = _Answer(context, request, generation, model, exchange.request_id)
    await reply(exchange, generation, answer, stream=bool(request.stream))
    return None


async def prompts_of(context: ServerContext, request: CompletionRequest) -> list[Prompt]:
    """The four shapes of ``prompt``: a text, a list of ids, or a list of either. Raises ``ApiError``."""
    given = request.prompt
    if isinstance(given, str):
        return [await _from_text(context, given, request, "prompt")]
    kinds = {type(item) for item in given}
    if len(kinds) > 1:
        raise ApiError("invalid_type", "'prompt': a list holds texts, ids or lists of ids, not a mixture", "prompt")
    if kinds == {int}:
        return [_from_ids(context, [item for item in given if isinstance(item, int)], "prompt")]
    if len(given) > MAX_PROMPTS:
        raise invalid("prompt", f"prompt has {len(given)} entries, at most {MAX_PROMPTS} are allowed")
    prompts: list[Prompt] = []
    for i, item in enumerate(given):
        if isinstance(item, str):
            prompts.append(await _from_text(context, item, request, f"prompt[{i}]"))
        elif isinstance(item, list):
            prompts.append(_from_ids(context, item, f"prompt[{i}]"))
    return prompts


async def _from_text(context: ServerContext, text: str, request: CompletionRequest, param: str) -> Prompt:
    if not text:
        raise invalid(param, f"{param} is empty")
    ids = await context.encode(text, request.add_special_tokens is not False, param)
    return Prompt(_check_length(context, ids, param), text)


def _from_ids(context: ServerContext, ids: list[int], param: str) -> Prompt:
    if not ids:
        raise invalid(param, f"{param} is empty")
    check_ids(param, ids, context.facts.vocab_size)
    return Prompt(_check_length(context, array("i", ids), param))


def _check_length(context: ServerContext, ids: array[int], param: str) -> array[int]:
    limit = context.facts.max_model_len
    if len(ids) >= limit:
        raise context_length_exceeded(limit, len(ids), param)
    if not ids:
        raise invalid(param, f"{param} has no tokens")
    return ids


def _generation(
    context: ServerContext, request: CompletionRequest, prompts: list[Prompt], max_tokens: int, exchange: Exchange
) -> Generation:
    facts = context.facts
    logprobs = -1
    if request.logprobs is not None:
        logprobs = num_logprobs(request.logprobs, "logprobs", context.config.server.max_logprobs)
    # One set of parameters serves all prompts: the engine ends each at its own room, too.
    room = facts.max_model_len - min(len(prompt.token_ids) for prompt in prompts)
    params = sampling_params(request, facts, max_tokens=min(max_tokens, room), logprobs=logprobs, seed=context.seed())
    salt = context.cache_salt(exchange.key_name, request.cache_salt)
    patience = Patience.of(request, exchange.timeout, context.config.scheduler)
    n, priority, rank = request.n or 1, request.priority or 0, context.rank(exchange.rank)
    return Generation(context, prompts, params, n, priority, salt, rank, exchange.arrived, patience)


def _echoed(context: ServerContext, prompt: Prompt) -> str:
    if prompt.text is not None:
        return prompt.text
    return context.text.tokenizer.decode(prompt.token_ids, skip_special_tokens=False)


async def _echo_only(
    context: ServerContext, request: CompletionRequest, prompts: list[Prompt], model: str, exchange: Exchange
) -> None:
    """``max_tokens`` 0 with ``echo``: nothing is generated."""
    if request.stream:
        raise not_supported("max_tokens", "max_tokens 0 on a stream")
    n = request.n or 1
    count = sum(len(prompt.token_ids) for prompt in prompts)
    choices = [
        CompletionChoice(index=i, text=_echoed(context, prompts[i // n]), finish_reason="length")
        for i in range(len(prompts) * n)
    ]
    usage = Usage(
        prompt_tokens=count, completion_tokens=0, total_tokens=count, prompt_tokens_details=PromptTokensDetails()
    )
    completion = Completion(
        id=f"cmpl-{exchange.request_id}",
        created=int(time.time()),
        model=model,
        choices=choices,
        usage=usage,
        system_fingerprint=context.fingerprint,
    )
    await exchange.answer(_encode(completion))


class _Answer:
    """One request's answer in the completion format; what is equal in all events is encoded once."""

    def __init__(
        self, context: ServerContext, request: CompletionRequest, generation: Generation, model: str, request_id: str
    ) -> None:
        self.generation = generation
        self._id, self._created, self._model = f"cmpl-{request_id}", int(time.time()), model
        self._fingerprint = context.fingerprint
        self._format = LogprobFormat(context.text.tokenizer, bool(request.return_tokens_as_token_ids))
        self._num_logprobs = request.logprobs
        self._wants_ids = bool(request.return_token_ids)
        options = request.stream_options
        self._wants_usage = bool(options and options.include_usage)
        self._usage_always = bool(options and options.continuous_usage_stats)
        self._plain = not (self._num_logprobs is not None or self._wants_ids or self._usage_always)
        head = {
            "id": self._id,
            "object": "text_completion",
            "created": self._created,
            "model": model,
            "system_fingerprint": self._fingerprint,
        }
        self._head = b"data: " + _encode(head)[:-1]
        self._choice_heads = [
            self._head + b',"choices":[{"index":%d,"text":' % choice.index for choice in generation.choices
        ]
        usage = b',"usage":null' if self._wants_usage else b""
        self._tail = b',"logprobs":null,"finish_reason":null}]' + usage + b"}\n\n"
        self._echo = [_echoed(context, prompt) for prompt in generation.prompts] if request.echo else None
        count = len(generation.choices)
        self._texts: list[list[str]] = [[] for _ in range(count)]
        self._ids: list[list[int]] = [[] for _ in range(count)]
        self._logprobs: list[list[TokenLogprobs]] = [[] for _ in range(count)]
        self._offsets = [0] * count
        self._begun: set[int] = set()

    def events(self, deltas: list[Delta]) -> bytes:
        parts: list[bytes] = []
        for delta in deltas:
            index = delta.choice.index
            first = index not in self._begun
            if first:
                self._begun.add(index)
                if self._echo is not None:
                    delta.text = self._echo[index // self.generation.n] + delta.text
            if delta.choice.finish_reason is not None or not self._plain:
                parts.append(self._full_event(delta, first))
            elif delta.text:
                parts += (self._choice_heads[index], _encode(delta.text), self._tail)
        return b"".join(parts)

    def _full_event(self, delta: Delta, first: bool) -> bytes:
        choice = delta.choice
        logprobs = self._some_logprobs(choice.index, delta.token_ids, delta.logprobs)
        fields = [b',"logprobs":' + _encode(logprobs), b',"finish_reason":' + _encode(choice.finish_reason)]
        if choice.finish_reason is not None:
            fields.append(b',"stop_reason":' + _encode(choice.stop_reason))
        if self._wants_ids:
            fields.append(b',"token_ids":' + _encode(delta.token_ids))
            if first:
                fields.append(b',"prompt_token_ids":' + _encode(list(choice.prompt.token_ids)))
        if self._usage_always:
            usage = b',"usage":' + _encode(self.generation.usage())
        else:
            usage = b',"usage":null' if self._wants_usage else b""
        head = self._choice_heads[choice.index] + _encode(delta.text)
        return b"".join((head, *fields, b"}]", usage, b"}\n\n"))

    def _some_logprobs(self, index: int, ids: list[int], entries: list[TokenLogprobs]) -> CompletionLogprobs | None:
        if self._num_logprobs is None:
            return None
        found, self._offsets[index] = self._format.completion(ids, entries, self._num_logprobs, self._offsets[index])
        return found

    def last_events(self) -> bytes:
        if not self._wants_usage:
            return DONE
        usage = _encode(self.generation.usage())
        return b"".join((self._head, b',"choices":[],"usage":', usage, b"}\n\n", DONE))

    def collect(self, deltas: list[Delta]) -> None:
        for delta in deltas:
            index = delta.choice.index
            self._texts[index].append(delta.text)
            self._ids[index] += delta.token_ids
            self._logprobs[index] += delta.logprobs

    def whole(self) -> Completion:
        return Completion(
            id=self._id,
            created=self._created,
            model=self._model,
            choices=[self._choice(i) for i in range(len(self.generation.choices))],
            usage=self.generation.usage(),
            system_fingerprint=self._fingerprint,
        )

    def _choice(self, index: int) -> CompletionChoice:
        choice = self.generation.choices[index]
        assert choice.finish_reason is not None
        echo = "" if self._echo is None else self._echo[index // self.generation.n]
        return CompletionChoice(
            index=index,
            text=echo + "".join(self._texts[index]),
            logprobs=self._some_logprobs(index, self._ids[index], self._logprobs[index]),
            finish_reason=choice.finish_reason,
            stop_reason=choice.stop_reason,
            token_ids=self._ids[index] if self._wants_ids else msgspec.UNSET,
            prompt_token_ids=list(choice.prompt.token_ids) if self._wants_ids else msgspec.UNSET,
        )
