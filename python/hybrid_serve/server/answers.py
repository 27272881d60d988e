"""Response bodies, as OpenAI's clients read them."""

from __future__ import annotations

from typing import Literal

from msgspec import UNSET, Struct, UnsetType

FinishName = Literal["stop", "length"]


class PromptTokensDetails(Struct):
    cached_tokens: int = 0


class Usage(Struct, kw_only=True):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails


class TopLogprob(Struct):
    token: str
    logprob: float
    bytes: list[int]


class TokenLogprob(Struct):
    token: str
    logprob: float
    bytes: list[int]
    top_logprobs: list[TopLogprob]


class ChatLogprobs(Struct):
    content: list[TokenLogprob]
    refusal: None = None


class CompletionLogprobs(Struct):
    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None] | None
    text_offset: list[int]


class AssistantMessage(Struct):
    content: str
    role: str = "assistant"
    refusal: None = None


class ChatChoice(Struct, kw_only=True):
    index: int
    message: AssistantMessage
    logprobs: ChatLogprobs | None = None
    finish_reason: FinishName
    stop_reason: int | str | None = None
    token_ids: list[int] | UnsetType = UNSET


class ChatCompletion(Struct, kw_only=True):
    id: str
    object: str = "chat.completion"
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    system_fingerprint: str
    service_tier: None = None
    prompt_token_ids: list[int] | UnsetType = UNSET


class CompletionChoice(Struct, kw_only=True):
    index: int
    text: str
    logprobs: CompletionLogprobs | None = None
    finish_reason: FinishName
    stop_reason: int | str | None = None
    token_ids: list[int] | UnsetType = UNSET
    prompt_token_ids: list[int] | UnsetType = UNSET


class Completion(Struct, kw_only=True):
    id: str
    object: str = "text_completion"
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage
    system_fingerprint: str


class Tokenized(Struct):
    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None = None


class Detokenized(Struct):
    prompt: str


class ModelCard(Struct, kw_only=True):
    id: str
    object: str = "model"
    created: int
    owned_by: str = "hybrid-serve"
    root: str
    parent: str | None = None
    max_model_len: int | None = None
    state: str | UnsetType = UNSET  # of several models: unloaded, loading, ready, draining, failed
    message: str | UnsetType = UNSET  # why it failed


class ModelList(Struct):
    data: list[ModelCard]
    object: str = "list"


class ErrorFields(Struct):
    message: str
    type: str
    param: str | None
    code: str
    hs_code: str | None = None
    request_id: str | None = None


class ErrorBody(Struct):
    error: ErrorFields


class Ready(Struct):
    state: str
    progress: float
    message: str
    seconds: float
    eta_s: float | None  # of the phase, at its pace so far; None: not known
    engines: dict[str, str]  # rank -> phase


class Load(Struct):
    """What a balancer wants to know, of all API servers and engines together."""

    server_load: int  # requests that are open
    running: int  # choices in the engines' batches
    waiting: int  # choices that wait for a place
    kv_cache_usage: float  # of the fullest engine, 0 to 1
    estimated_wait_s: float  # until a request that comes now has a place, as far as it is known


class Alive(Struct):
    status: str = "alive"


class Version(Struct):
    version: str
