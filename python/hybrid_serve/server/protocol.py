"""Request bodies: what they may hold, within which bounds. The same Structs validate and document (OpenAPI)."""

from __future__ import annotations

import re
from functools import cache
from typing import Annotated, Any, Protocol, TypeVar

import msgspec
from msgspec import Meta, Struct

from .errors import ApiError, from_validation, not_supported

MAX_CHOICES = 16
MAX_PROMPTS = 1024
MAX_STOP_STRINGS = 4
MAX_STOP_CHARS = 1024
MAX_ID_LIST = 1024  # stop_token_ids, logit_bias
MAX_MESSAGES = 10_000
_MAX_IGNORED_NAMES = 20

Int32 = Annotated[int, Meta(ge=-(2**31), le=2**31 - 1)]
TokenId = Annotated[int, Meta(ge=0, le=2**31 - 1)]
Seconds = Annotated[float, Meta(gt=0.0, le=86400.0)]
Penalty = Annotated[float, Meta(ge=-2.0, le=2.0)]
StopString = Annotated[str, Meta(min_length=1, max_length=MAX_STOP_CHARS)]


class StreamOptions(Struct):
    include_usage: bool | None = False
    continuous_usage_stats: bool | None = False


class ModelRequest(Struct, kw_only=True):
    """What every request of a model has. ``null`` is the default everywhere."""

    model: str | None = None


class SamplingRequest(ModelRequest, kw_only=True):
    """What chat and completion requests have in common."""

    stream: bool | None = False
    stream_options: StreamOptions | None = None
    n: Annotated[int, Meta(ge=1, le=MAX_CHOICES)] | None = 1
    max_tokens: Annotated[int, Meta(ge=0, le=2**31 - 1)] | None = None
    min_tokens: Annotated[int, Meta(ge=0, le=2**31 - 1)] | None = 0
    temperature: Annotated[float, Meta(ge=0.0, le=2.0)] | None = 1.0
    top_p: Annotated[float, Meta(gt=0.0, le=1.0)] | None = 1.0
    top_k: Annotated[int, Meta(ge=-1, le=2**31 - 1)] | None = 0
    min_p: Annotated[float, Meta(ge=0.0, le=1.0)] | None = 0.0
    frequency_penalty: Penalty | None = 0.0
    presence_penalty: Penalty | None = 0.0
    repetition_penalty: Annotated[float, Meta(gt=0.0, le=1000.0)] | None = 1.0
    seed: Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)] | None = None
    stop: StopString | Annotated[list[StopString], Meta(max_length=MAX_STOP_STRINGS)] | None = None
    stop_token_ids: Annotated[list[TokenId], Meta(max_length=MAX_ID_LIST)] | None = None
    include_stop_str_in_output: bool | None = False
    ignore_eos: bool | None = False
    skip_special_tokens: bool | None = True
    logit_bias: Annotated[dict[str, float], Meta(max_length=MAX_ID_LIST)] | None = None
    allowed_token_ids: Annotated[list[TokenId], Meta(min_length=1)] | None = None
    priority: Int32 | None = 0
    max_queue_time_s: Seconds | None = None
    ttft_slo_ms: Annotated[float, Meta(gt=0.0, le=86400e3)] | None = None
    deadline_s: Seconds | None = None
    cache_salt: Annotated[str, Meta(min_length=1, max_length=128, pattern=r"^[^@/\\\x00]*$")] | None = None
    return_token_ids: bool | None = False
    return_tokens_as_token_ids: bool | None = False


class ContentPart(Struct):
    type: str
    text: str | None = None


class Message(Struct):
    role: str
    content: str | list[ContentPart] | None = None
    name: str | None = None
    reasoning: str | None = None
    reasoning_content: str | None = None
    tool_calls: list[Any] | None = None
    tool_call_id: str | None = None
    function_call: Any = None
    audio: Any = None


Messages = Annotated[list[Message], Meta(min_length=1, max_length=MAX_MESSAGES)]
TemplateKwargs = Annotated[dict[str, Any], Meta(max_length=16)]


class ChatPrompt(Protocol):
    """What makes a conversation a prompt: in chat completions and in ``/tokenize``."""

    messages: list[Message]
    add_generation_prompt: bool | None
    continue_final_message: bool | None
    chat_template_kwargs: dict[str, Any] | None


class ChatCompletionRequest(SamplingRequest, kw_only=True):
    messages: Messages
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = False
    add_special_tokens: bool | None = False
    chat_template_kwargs: TemplateKwargs | None = None
    max_completion_tokens: Annotated[int, Meta(ge=0, le=2**31 - 1)] | None = None
    logprobs: bool | None = False
    top_logprobs: Annotated[int, Meta(ge=0, le=2**31 - 1)] | None = 0


# One text or list of ids, or a list of either: told apart by `prompts_of`, since JSON cannot say "all of one kind".
PromptField = str | Annotated[list[str | TokenId | list[TokenId]], Meta(min_length=1)]


class CompletionRequest(SamplingRequest, kw_only=True):
    prompt: PromptField
    echo: bool | None = False
    logprobs: Annotated[int, Meta(ge=0, le=2**31 - 1)] | None = None
    best_of: Annotated[int, Meta(ge=1)] | None = None
    add_special_tokens: bool | None = True


class TokenizeRequest(ModelRequest, kw_only=True):
    """A text, or a conversation as chat completions would feed it."""

    prompt: str | None = None
    messages: Messages | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = False
    add_special_tokens: bool | None = None
    chat_template_kwargs: TemplateKwargs | None = None
    return_token_strs: bool | None = False


class DetokenizeRequest(ModelRequest, kw_only=True):
    tokens: list[TokenId]


_NONE: tuple[Any, ...] = (None,)
_TOOL_CHOICES = (None, "none", "auto")
# Fields of other servers that would change the answer: the values listed change nothing, any other is refused.
REFUSED: dict[str, tuple[Any, ...]] = {
    "audio": _NONE,
    "bad_words": (None, []),
    "best_of": (None, 1),
    "chat_template": _NONE,
    "custom_logit_processor": _NONE,
    "documents": (None, []),
    "echo": (None, False),
    "function_call": _TOOL_CHOICES,
    "functions": _NONE,
    "guided_choice": _NONE,
    "guided_grammar": _NONE,
    "guided_json": _NONE,
    "guided_regex": _NONE,
    "kv_transfer_params": _NONE,
    "logit_processors": (None, []),
    "logits_processors": (None, []),
    "logprob_token_ids": _NONE,
    "media_io_kwargs": (None, {}),
    "mm_processor_kwargs": (None, {}),
    "modalities": (None, ["text"]),
    "prompt_embeds": _NONE,
    "prompt_logprobs": _NONE,
    "repetition_detection": _NONE,
    "response_format": (None, {"type": "text"}),
    "structured_outputs": _NONE,
    "suffix": (None, ""),
    "thinking_token_budget": _NONE,
    "tool_choice": _TOOL_CHOICES,
    "tools": _NONE,
    "truncate_prompt_tokens": _NONE,
    "use_beam_search": (None, False),
}

R = TypeVar("R", bound=Struct)
_fields = msgspec.json.Decoder(dict[str, msgspec.Raw])
_FIELD_NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}")


@cache
def decoder_of(as_type: type[R]) -> msgspec.json.Decoder[R]:
    """Asked for together with the route: msgspec evaluates the annotations of all fields, for which its first request
    would have to wait."""
    return msgspec.json.Decoder(as_type)


def decode_request(body: bytes, as_type: type[R], strict: bool = False) -> tuple[R, list[str]]:
    """The request, and the names of its fields that have no effect. Raises ``ApiError``."""
    decoder = decoder_of(as_type)
    try:
        if not body.isascii():
            body.decode()  # also where no field is read
        fields = _fields.decode(body)  # first: what is not JSON is told as that, not as a wrong field
        request = decoder.decode(body)
    except msgspec.ValidationError as error:
        raise from_validation(error) from None
    except msgspec.DecodeError as error:
        raise ApiError("invalid_json", f"The body is not valid JSON: {error}") from None
    except UnicodeDecodeError as error:
        raise ApiError("invalid_json", f"The body is not UTF-8: byte {error.start}") from None
    except RecursionError:
        raise ApiError("invalid_json", "The body is nested too deeply.") from None
    ignored = [name for name in fields if name not in as_type.__struct_fields__]
    return request, _without_effect(ignored, fields, strict) if ignored else ignored


def _without_effect(names: list[str], fields: dict[str, msgspec.Raw], strict: bool) -> list[str]:
    ignored = []
    for name in names:
        harmless = REFUSED.get(name)
        if harmless is None:
            ignored.append(name if _FIELD_NAME.fullmatch(name) else "?")
        elif msgspec.json.decode(fields[name]) not in harmless:
            raise not_supported(name)
    if strict and ignored:
        raise ApiError("unknown_parameter", f"'{ignored[0]}' is not a parameter of this route", ignored[0])
    return sorted(set(ignored))[:_MAX_IGNORED_NAMES]
