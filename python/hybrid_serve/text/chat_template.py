"""Conversations to prompts by the model's own Jinja template, which is not trusted."""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from time import monotonic
from typing import Any, NoReturn

from jinja2 import Environment, TemplateError, TemplateSyntaxError, meta, nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment

MAX_PROMPT_CHARS = 16 * 2**20
MAX_RENDER_SECONDS = 1.0
# Names that the server itself gives to templates.
RESERVED = frozenset(
    [
        "messages",
        "tools",
        "documents",
        "add_generation_prompt",
        "continue_final_message",
        "tokenize",
        "bos_token",
        "eos_token",
        "raise_exception",
        "strftime_now",
    ]
)
_TICK = "__tick__"
_WIDE_FORMAT = re.compile(r"%[^%a-zA-Z]*(\*|\d{4})")


class ChatTemplateError(ValueError):
    """The conversation cannot be rendered; the message may go to the client."""


class _Generation(Extension):
    """``{% generation %}`` marks replies for training; for a prompt it is transparent."""

    tags = {"generation"}  # noqa: RUF012 - jinja2's own declaration

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Environment(ImmutableSandboxedEnvironment):
    """The sandbox plus bounds on what one operator may produce: jinja2's own stops code, not memory or time."""

    intercepted_binops = frozenset(("*", "**", "%"))

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        if operator == "**" and not (abs(left) <= 2**32 and abs(right) <= 64):
            raise SecurityError("a power that large")
        if operator == "*" and _product_size(left, right) > MAX_PROMPT_CHARS:
            raise SecurityError("a repetition that long")
        if operator == "%" and isinstance(left, str) and _WIDE_FORMAT.search(left):
            raise SecurityError("a format that wide")
        return super().call_binop(context, operator, left, right)

    def call(self, context: Context, obj: Any, /, *args: Any, **kwargs: Any) -> Any:
        obj_itself = getattr(obj, "__wrapped__", obj)  # str.format comes in a wrapper of jinja2's
        owner = getattr(obj_itself, "__self__", None)
        if isinstance(owner, str):
            if obj_itself.__name__ in ("format", "format_map") and ":" in owner:
                raise SecurityError("a format with widths")
            if any(isinstance(arg, int) and arg > MAX_PROMPT_CHARS for arg in (*args, *kwargs.values())):
                raise SecurityError(f"str.{obj_itself.__name__} with a number that large")
        return super().call(context, obj, *args, **kwargs)


def _product_size(left: Any, right: Any) -> int:
    for many, times in ((left, right), (right, left)):
        if isinstance(many, (str, list, tuple)) and isinstance(times, int):
            return len(many) * max(0, times)
    if isinstance(left, int) and isinstance(right, int):
        return (left.bit_length() + right.bit_length()) // 8
    return 0


class ChatTemplate:
    """A checked template; knows no tokenizer, no request. Rendering is bounded in time and length.

    Raises ``ChatTemplateError`` on construction if the source is not Jinja or reaches for what the sandbox forbids.
    """

    def __init__(self, source: str, bos_token: str | None = None, eos_token: str | None = None) -> None:
        environment = _Environment(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols])
        environment.filters["tojson"] = _to_json
        for name in ("attr", "center", "format", "indent", "pprint", "wordwrap", "xmlattr"):
            del environment.filters[name]  # each makes much text out of little or names attributes by value
        del environment.globals["lipsum"]
        environment.globals.update(raise_exception=_raise_exception, strftime_now=_strftime_now)
        try:
            tree = environment.parse(source)
            self.variables = frozenset(meta.find_undeclared_variables(tree))
            _refuse_private_names(tree)
            _count_loops(tree, environment)
            self._template = environment.from_string(tree)
        except (TemplateError, RecursionError) as error:
            why = getattr(error, "message", None) or "it is nested too deeply"
            line = f" (line {error.lineno})" if isinstance(error, TemplateSyntaxError) else ""
            raise ChatTemplateError(f"the chat template is not usable: {why}{line}") from error
        self._tokens = {"bos_token": bos_token or "", "eos_token": eos_token or ""}

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        """The prompt. ``continue_final_message``: it ends with the last message's content, open to be continued.
        Raises ``ChatTemplateError``."""
        if not continue_final_message:
            return self._render(messages, add_generation_prompt, variables)
        # Templates trim contents and close turns in their own ways: a mark that nobody can guess shows where it ended.
        mark = secrets.token_hex(16)
        last = messages[-1]
        marked = [*messages[:-1], {**last, "content": f"{last['content']}{mark}"}]
        text = self._render(marked, False, variables)
        end = text.rfind(mark)
        if end < 0:
            raise ChatTemplateError("the chat template does not show the final message, so it cannot be continued")
        return text[:end].replace(mark, "")

    def _render(
        self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool, variables: Mapping[str, Any] | None
    ) -> str:
        deadline = monotonic() + MAX_RENDER_SECONDS
        values = dict(variables or {}) | self._tokens
        values |= {
            "messages": messages,
            "tools": None,
            "documents": None,
            "add_generation_prompt": add_generation_prompt,
        }
        values[_TICK] = _ticker(deadline)
        pieces: list[str] = []
        length = 0
        try:
            for piece in self._template.generate(values):
                pieces.append(piece)
                length += len(piece)
                if length > MAX_PROMPT_CHARS:
                    raise ChatTemplateError(f"the chat template made more than {MAX_PROMPT_CHARS} characters")
        except ChatTemplateError:
            raise
        except TemplateError as error:
            raise ChatTemplateError(f"the chat template refused the conversation: {error.message}") from error
        except (TypeError, ValueError, KeyError, IndexError, AttributeError, ArithmeticError, RecursionError) as error:
            # The template's own mistake, or a conversation that it does not expect; Python's words stay here.
            raise ChatTemplateError("the chat template failed on this conversation") from error
        return "".join(pieces)


def _ticker(deadline: float) -> Callable[[], None]:
    def tick() -> None:
        if monotonic() > deadline:
            raise ChatTemplateError(f"the chat template took more than {MAX_RENDER_SECONDS:g} seconds")

    return tick


def _count_loops(tree: nodes.Template, environment: Environment) -> None:
    """Has every loop turn and macro call look at the clock: a loop that prints nothing would run unseen."""
    for node in tree.find_all((nodes.For, nodes.Macro, nodes.CallBlock)):
        call = nodes.Call(nodes.Name(_TICK, "load"), [], [], None, None)
        statement = nodes.ExprStmt(call).set_lineno(node.lineno).set_environment(environment)
        node.body.insert(0, statement)  # type: ignore[attr-defined]


def _refuse_private_names(tree: nodes.Template) -> None:
    """The sandbox would refuse these when they run; a template that holds one is hostile and is not started with."""
    for attribute in tree.find_all(nodes.Getattr):
        _check_name(attribute.attr)
    for item in tree.find_all(nodes.Getitem):
        if isinstance(item.arg, nodes.Const):
            _check_name(item.arg.value)
    for name in tree.find_all(nodes.Name):
        _check_name(name.name if name.name.startswith("__") else "")


def _check_name(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError(f"it reaches for {name!r}")


def _raise_exception(message: str) -> NoReturn:
    raise TemplateError(str(message)[:200])


def _strftime_now(format: str) -> str:
    return datetime.now().strftime(format)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
