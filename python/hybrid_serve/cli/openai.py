"""``chat`` and ``complete``: clients of a running server, ours or any other with OpenAI's API."""

from __future__ import annotations

import io
import json
import os
import sys
import time
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any

from .api_client import ApiClient, ApiError
from .usage import Parser, UsageError, dashed

Message = dict[str, str]
# A reply may hold what moves the cursor or renames the window; a terminal gets neither.
_UNPRINTABLE = dict.fromkeys([*(code for code in range(32) if chr(code) not in "\n\t"), 127, *range(128, 160)])


def chat(argv: list[str]) -> int:
    """Talks until /quit, or answers one prompt (-q). Exit code 1 and one line on stderr: the server does not answer."""
    parser = _parser(
        "chat", "Talks to a running server. In a talk: /clear forgets it, /quit leaves, Ctrl-C stops a reply."
    )
    parser.add_argument("--system-prompt", metavar="TEXT", help="first message of the talk")
    return _run(parser, argv, _chat)


def complete(argv: list[str]) -> int:
    """Prints the continuation of each text, or of one (-q)."""
    parser = _parser("complete", "Lets a running server continue a text: -q TEXT, or one a line until end of file.")
    return _run(parser, argv, _complete)


@dataclass
class Reply:
    """The pieces of one streamed reply, with the times that ``--stats`` prints."""

    chunks: Iterator[dict[str, Any]]
    text_of: Callable[[dict[str, Any]], str | None]
    started: float
    parts: list[str] = field(default_factory=list)
    first: float = 0.0
    last: float = 0.0
    num_tokens: int = 0

    def show(self) -> None:
        """Prints the pieces as they come."""
        for chunk in self.chunks:
            if usage := chunk.get("usage"):
                self.num_tokens = usage["completion_tokens"]
            for choice in chunk.get("choices", []):
                text = self.text_of(choice)
                if not text:
                    continue
                self.last = time.perf_counter()
                self.first = self.first or self.last
                self.parts.append(text)
                print(text.translate(_UNPRINTABLE) if sys.stdout.isatty() else text, end="", flush=True)

    @property
    def text(self) -> str:
        return "".join(self.parts)

    def stats(self) -> str:
        """Time to the first token, and tokens a second after it: the first one's time is the prompt's."""
        if not self.parts:
            return "TTFT: none, the reply is empty"
        seconds = self.last - self.first
        rate = f"{(self.num_tokens - 1) / seconds:.1f} tok/s" if self.num_tokens > 1 and seconds > 0 else "none"
        return f"TTFT: {(self.first - self.started) * 1000:.1f} ms\nTPS: {rate}"


def _parser(command: str, description: str) -> Parser:
    parser = Parser(f"hybrid-serve {command}", description)
    parser.add_argument(
        "--url", metavar="URL", default="http://127.0.0.1:8000/v1", help="base URL (default: %(default)s)"
    )
    parser.add_argument("--model-name", metavar="NAME", help="default: the first that the server lists")
    parser.add_argument("--api-key", metavar="KEY", help="default: the variable HYBRID_SERVE_API_KEY, then none")
    parser.add_argument("-q", "--quick", metavar="PROMPT", help="one prompt, then leave")
    parser.add_argument("--max-tokens", metavar="N", type=int, help="longest reply in tokens (default: the server's)")
    parser.add_argument("--temperature", metavar="X", type=float, help="0: the likeliest token (default: the server's)")
    parser.add_argument(
        "--stats", action="store_true", help="print time to first token (TTFT) and tokens a second (TPS)"
    )
    return parser


def _run(parser: Parser, argv: list[str], command: Callable[[ApiClient, Namespace], int]) -> int:
    arguments = parser.parse_args(dashed(argv))
    key = arguments.api_key
    if key is None:
        # The server's variable, which may list several keys: any of them will do.
        key = os.environ.get("HYBRID_SERVE_API_KEY", "").split(",")[0]
    elif not key.strip():
        raise UsageError("--api-key is empty")
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a reply may hold what the terminal's encoding cannot show
    try:
        client = ApiClient(arguments.url, key)
        if arguments.model_name is None:
            arguments.model_name = client.first_model()
        return command(client, arguments)
    except ApiError as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 1


def _request(arguments: Namespace, **fields: Any) -> bytes:
    body = {"model": arguments.model_name, "stream": True, "stream_options": {"include_usage": True}, **fields}
    body |= {name: vars(arguments)[name] for name in ("max_tokens", "temperature") if vars(arguments)[name] is not None}
    return json.dumps(body).encode()


def _chat(client: ApiClient, arguments: Namespace) -> int:
    opening = [{"role": "system", "content": arguments.system_prompt}] if arguments.system_prompt else []
    talk: list[Message] = [*opening]
    for prompt in _prompts(arguments):
        if prompt == "/clear":
            talk = [*opening]
            continue
        talk.append({"role": "user", "content": prompt})
        body = _request(arguments, messages=talk)
        reply = _answer(
            client, arguments, "/chat/completions", body, lambda choice: choice.get("delta", {}).get("content")
        )
        if reply is None:
            talk.pop()  # refused, for example too long: as if it had not been said
        else:
            talk.append({"role": "assistant", "content": reply.text})
    return 0


def _complete(client: ApiClient, arguments: Namespace) -> int:
    for prompt in _prompts(arguments):
        _answer(
            client, arguments, "/completions", _request(arguments, prompt=prompt), lambda choice: choice.get("text")
        )
    return 0


def _answer(
    client: ApiClient,
    arguments: Namespace,
    path: str,
    body: bytes,
    text_of: Callable[[dict[str, Any]], str | None],
) -> Reply | None:
    """Prints one reply; None: the server refused the prompt, and the talk can go on."""
    with client.stream(path, body) as chunks:
        reply = Reply(chunks, text_of, time.perf_counter())
        try:
            reply.show()
        except KeyboardInterrupt:
            if arguments.quick is not None:
                raise
            # Leaving the block closes the connection, which ends the request on the server.
        except ApiError as error:
            if arguments.quick is not None or not error.refused:
                raise
            print(f"hybrid-serve: {error}", file=sys.stderr)
            return None
    print()
    if arguments.stats:
        print(reply.stats())
    return reply


def _prompts(arguments: Namespace) -> Iterator[str]:
    """-q's one prompt, else the lines that are typed or piped in, without the empty ones, until /quit or their end."""
    if arguments.quick is not None:
        yield arguments.quick
        return
    interactive = sys.stdin.isatty()
    if interactive:
        with suppress(ImportError):  # a Python may come without it
            import_module("readline")  # gives input() line editing and history
        print(f"{arguments.model_name} at {arguments.url}. /clear forgets, /quit leaves, Ctrl-C stops a reply.")
    while True:
        try:
            line = input("> " if interactive else "").strip()
        except EOFError:
            return
        if line == "/quit":
            return
        if line:
            yield line
