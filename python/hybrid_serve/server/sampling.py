"""From a request's fields to ``SamplingParams``: the checks that need to know the model."""

from __future__ import annotations

from collections.abc import Sequence

from ..wire import EngineFacts, SamplingParams
from .errors import ApiError, invalid, not_supported
from .protocol import SamplingRequest

_LEAST_TEMPERATURE = 0.01  # below it logits overflow where they should only be greedy


def sampling_params(
    request: SamplingRequest, facts: EngineFacts, *, max_tokens: int, logprobs: int, seed: int
) -> SamplingParams:
    """``seed``: for a request without one. Raises ``ApiError`` naming the field."""
    vocab_size = facts.vocab_size
    temperature = 1.0 if request.temperature is None else request.temperature
    min_tokens = request.min_tokens or 0
    if min_tokens > max_tokens:
        raise invalid("min_tokens", f"min_tokens ({min_tokens}) is larger than the room for the reply ({max_tokens})")
    return SamplingParams(
        max_tokens=max_tokens,
        min_tokens=min_tokens,
        temperature=max(temperature, _LEAST_TEMPERATURE) if temperature > 0 else 0.0,
        top_p=1.0 if request.top_p is None else request.top_p,
        top_k=request.top_k or 0,
        min_p=request.min_p or 0.0,
        repetition_penalty=1.0 if request.repetition_penalty is None else request.repetition_penalty,
        frequency_penalty=request.frequency_penalty or 0.0,
        presence_penalty=request.presence_penalty or 0.0,
        seed=seed if request.seed is None or request.seed == -1 else request.seed,
        stop=_stop_strings(request.stop),
        stop_token_ids=check_ids("stop_token_ids", request.stop_token_ids or (), vocab_size),
        ignore_eos=bool(request.ignore_eos),
        include_stop_str_in_output=bool(request.include_stop_str_in_output),
        skip_special_tokens=request.skip_special_tokens is not False,
        logit_bias=_logit_bias(request.logit_bias or {}, vocab_size),
        allowed_token_ids=check_ids("allowed_token_ids", request.allowed_token_ids or (), vocab_size),
        logprobs=logprobs,
    )


def check_ids(param: str, ids: Sequence[int], vocab_size: int) -> tuple[int, ...]:
    """Raises ``ApiError`` for an id that the model does not have. The lower bound is in the schema."""
    if ids and max(ids) >= vocab_size:
        index = next(i for i, token_id in enumerate(ids) if token_id >= vocab_size)
        raise invalid(f"{param}[{index}]", f"token id {ids[index]} is not below the vocabulary's size {vocab_size}")
    return tuple(ids)


def check_stream_options(request: SamplingRequest) -> None:
    if request.stream_options is not None and not request.stream:
        raise invalid("stream_options", "stream_options is only allowed with stream=true")


def num_logprobs(asked: int, param: str, most: int) -> int:
    if asked > most:
        raise invalid(param, f"{param} is {asked}, this server allows at most {most}")
    return asked


def refuse_best_of(best_of: int | None, n: int) -> None:
    if best_of is not None and best_of < n:
        raise invalid("best_of", f"best_of ({best_of}) is smaller than n ({n})")
    if best_of is not None and best_of > n:
        raise not_supported("best_of", "best_of larger than n")


def _stop_strings(stop: str | list[str] | None) -> tuple[str, ...]:
    if stop is None:
        return ()
    return (stop,) if isinstance(stop, str) else tuple(dict.fromkeys(stop))


def _logit_bias(bias: dict[str, float], vocab_size: int) -> dict[int, float]:
    result: dict[int, float] = {}
    for key, value in bias.items():
        # Not int(): it takes "1_0", " 1" and digits of any script, and 4,300 of them.
        if not (key.isascii() and key.isdigit() and len(key) <= 10):
            raise ApiError("invalid_type", f"'logit_bias': the key '{key[:64]}' is not a token id", "logit_bias")
        if int(key) >= vocab_size:
            raise invalid("logit_bias", f"token id {key} is not below the vocabulary's size {vocab_size}")
        result[int(key)] = min(100.0, max(-100.0, value))
    return result
