"""The request log: one line a generation, with its times; its words only where --log-requests asks for them."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from io import StringIO
from typing import Any

from .answers import Usage
from .generation import Delta, Generation
from .sse import Exchange

log = logging.getLogger(__name__)


class RequestLog:
    """What is written down of one request when it has ended, in whichever way; and what its key has used.

    Where there is a redactor it sees whole texts, before they are cut: half of a secret is none that it would know."""

    def __init__(self, generation: Generation, exchange: Exchange) -> None:
        self._generation, self._exchange = generation, exchange
        self._server = generation.context.config.server
        self._texts = [StringIO() for _ in generation.choices]
        generation.context.timelines.began(exchange.key_name, exchange.request_id, generation)

    def saw(self, deltas: Sequence[Delta]) -> None:
        if self._server.log_requests == "full":
            for delta in deltas:
                text = self._texts[delta.choice.index]
                if self._generation.context.redact is not None or text.tell() < self._server.max_log_len:
                    text.write(delta.text)

    def ended(self) -> None:
        generation = self._generation
        usage, key = generation.usage(), self._exchange.key
        generation.context.timelines.ended(self._exchange.key_name, self._exchange.request_id, generation)
        if key is not None:
            metrics, keys = generation.context.metrics, generation.context.keys
            metrics.key_used(key.name, "prompt_tokens", usage.prompt_tokens)
            metrics.key_used(key.name, "generation_tokens", usage.completion_tokens)
            if keys is not None:
                keys.spend(key, usage.total_tokens)
        if (tracing := generation.context.tracing) is not None:
            tracing.ended(generation, self._exchange)
        if self._server.log_requests != "off":
            self._write_line(usage)

    def _write_line(self, usage: Usage) -> None:
        generation = self._generation
        timing = generation.timing()
        params = generation.params
        fields: dict[str, Any] = {
            "request_id": self._exchange.request_id,
            "key": self._exchange.key_name,
            "n": generation.n,
            "prompt_tokens": usage.prompt_tokens,
            "cached_tokens": usage.prompt_tokens_details.cached_tokens,
            "completion_tokens": usage.completion_tokens,
            "finish": ",".join(choice.finish_reason or "unfinished" for choice in generation.choices),
            "max_tokens": params.max_tokens,
            "temperature": params.temperature,
            "top_p": params.top_p,
            "seed": params.seed,
        }
        if timing is not None:
            fields |= {f"{name}_ms": round(seconds * 1e3, 3) for name, seconds in timing.phases().items()}
            fields["preemptions"] = timing.num_preemptions
        words = [f"{name}={value}" for name, value in fields.items() if value is not None]
        if self._server.log_requests != "meta":
            fields["prompt"] = self._prompts()
            words.append(f"prompt={fields['prompt']!r}")
        if self._server.log_requests == "full":
            fields["text"] = [self._shown(text.getvalue()) for text in self._texts]
            words.append(f"text={fields['text']!r}")
        log.info("request %s", " ".join(words), extra={"fields": fields})

    def _prompts(self) -> list[str]:
        """What the model was given, template included."""
        context = self._generation.context
        most = self._server.max_log_len if context.redact is None else None
        ids = [prompt.token_ids[:most] for prompt in self._generation.prompts]
        return [self._shown(context.text.tokenizer.decode(each, skip_special_tokens=False)) for each in ids]

    def _shown(self, text: str) -> str:
        redact = self._generation.context.redact
        return (text if redact is None else redact(text))[: self._server.max_log_len]
