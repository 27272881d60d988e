"""POST /tokenize and /detokenize."""

from __future__ import annotations

import msgspec

from ..answers import Detokenized, Tokenized
from ..context import ServerContext
from ..conversation import render_prompt
from ..errors import ApiError
from ..protocol import ChatCompletionRequest, DetokenizeRequest, TokenizeRequest
from ..sampling import check_ids
from ..sse import Exchange


async def tokenize(context: ServerContext, request: TokenizeRequest, exchange: Exchange) -> None:
    """Ids of a text, or of a conversation exactly as chat completions would feed it."""
    context.check_model(request.model, exchange.key)
    if (request.prompt is None) == (request.messages is None):
        raise ApiError("missing_required_parameter", "either 'prompt' or 'messages' is required", "prompt")
    if request.messages is not None:
        chat = ChatCompletionRequest(
            messages=request.messages,
            add_generation_prompt=request.add_generation_prompt,
            continue_final_message=request.continue_final_message,
            chat_template_kwargs=request.chat_template_kwargs,
        )
        text, unused = await render_prompt(context, chat)
        exchange.name_ignored(unused)
        add_special_tokens = bool(request.add_special_tokens)
    else:
        text = request.prompt or ""
        add_special_tokens = request.add_special_tokens is not False
    tokenizer = context.text.tokenizer
    ids = await context.off_loop(len(text), lambda: tokenizer.encode(text, add_special_tokens))
    pieces = tokenizer.pieces(ids) if request.return_token_strs else None
    await exchange.answer(msgspec.json.encode(Tokenized(len(ids), context.facts.max_model_len, list(ids), pieces)))


async def detokenize(context: ServerContext, request: DetokenizeRequest, exchange: Exchange) -> None:
    """The text of ids, special tokens included."""
    context.check_model(request.model, exchange.key)
    check_ids("tokens", request.tokens, max(context.text.tokenizer.vocab_size, context.facts.vocab_size))
    tokenizer = context.text.tokenizer
    text = await context.off_loop(
        len(request.tokens), lambda: tokenizer.decode(request.tokens, skip_special_tokens=False)
    )
    await exchange.answer(msgspec.json.encode(Detokenized(text)))
