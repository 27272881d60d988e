"""From a conversation to a prompt: contents flattened to text, the model's template rendered."""

from __future__ import annotations

from typing import Any

import msgspec

from ..text.chat_template import RESERVED, ChatTemplateError
from .context import ServerContext
from .errors import ApiError, invalid, not_supported
from .protocol import ChatPrompt, ContentPart, Message

# "developer" is OpenAI's newer name of the same role; templates know "system".
_ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}
_MAX_KWARGS_BYTES = 4096


async def render_prompt(context: ServerContext, request: ChatPrompt) -> tuple[str, list[str]]:
    """The prompt's text, and the names of template variables that the template does not use. Raises ``ApiError``."""
    template = context.text.template
    if template is None:
        raise ApiError(
            "no_chat_template",
            "The model has no chat template: use /v1/completions, or start the server with --chat-template.",
            "messages",
        )
    go_on = bool(request.continue_final_message)
    if go_on and request.add_generation_prompt:
        raise invalid("continue_final_message", "continue_final_message and add_generation_prompt cannot both be true")
    messages = [_flatten(message, i) for i, message in enumerate(request.messages)]
    if go_on and messages[-1]["role"] != "assistant":
        raise invalid("continue_final_message", "continue_final_message needs a last message of the assistant")
    variables = _check_variables(request.chat_template_kwargs or {})
    unused = sorted(f"chat_template_kwargs.{name}" for name in variables if name not in template.variables)
    try:
        text = await context.off_loop(
            sum(len(message["content"]) for message in messages) + 100 * len(messages),
            lambda: template.render(
                messages,
                add_generation_prompt=request.add_generation_prompt is not False,
                continue_final_message=go_on,
                variables=variables,
            ),
        )
    except ChatTemplateError as error:
        raise ApiError("chat_template_failed", str(error), "messages") from error
    return text, unused


def _flatten(message: Message, index: int) -> dict[str, Any]:
    where = f"messages[{index}]"
    role = _ROLES.get(message.role)
    if message.role in ("tool", "function"):
        raise not_supported(f"{where}.role", f"messages of role '{message.role}'")
    if role is None:
        raise invalid(f"{where}.role", f"the role is '{message.role[:64]}', known roles: {', '.join(_ROLES)}")
    for field in ("tool_calls", "tool_call_id", "function_call", "audio"):
        if getattr(message, field) not in (None, []):
            raise not_supported(f"{where}.{field}", f"{field} of a message")
    if message.content is None:
        raise invalid(f"{where}.content", "the content is null")
    content = message.content
    flat: dict[str, Any] = {"role": role, "content": content if isinstance(content, str) else _join(content, where)}
    if message.name is not None:
        flat["name"] = message.name
    reasoning = message.reasoning if message.reasoning is not None else message.reasoning_content
    if reasoning is not None:
        flat["reasoning"] = flat["reasoning_content"] = reasoning
    return flat


def _join(parts: list[ContentPart], where: str) -> str:
    if not parts:
        raise invalid(f"{where}.content", "the content has no parts")
    texts: list[str] = []
    for i, part in enumerate(parts):
        if part.type != "text":
            raise not_supported(f"{where}.content[{i}]", f"content parts of type '{part.type[:64]}'")
        if part.text is None:
            path = f"{where}.content[{i}].text"
            raise ApiError("missing_required_parameter", f"'{path}' is required", path)
        texts.append(part.text)
    return "\n".join(texts)


def _check_variables(variables: dict[str, Any]) -> dict[str, Any]:
    for name in variables:
        if name in RESERVED or name.startswith("_"):
            raise invalid("chat_template_kwargs", f"chat_template_kwargs cannot set '{name[:64]}'")
    if variables and len(msgspec.json.encode(variables)) > _MAX_KWARGS_BYTES:
        raise invalid("chat_template_kwargs", f"chat_template_kwargs has more than {_MAX_KWARGS_BYTES} bytes")
    return variables
