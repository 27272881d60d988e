"""Log-probabilities in the two shapes that OpenAI's routes give them."""

from __future__ import annotations

from collections.abc import Sequence

from ..client import TokenLogprobs
from ..text.tokenizer import Tokenizer
from .answers import ChatLogprobs, CompletionLogprobs, TokenLogprob, TopLogprob

_LEAST = -9999.0  # JSON has no infinity


def _finite(logprob: float) -> float:
    return logprob if logprob >= _LEAST else _LEAST


class LogprobFormat:
    """Names tokens: by their text, or as ``token_id:N`` where texts would be ambiguous."""

    def __init__(self, tokenizer: Tokenizer, as_ids: bool) -> None:
        self._tokenizer = tokenizer
        self._as_ids = as_ids

    def token(self, token_id: int) -> tuple[str, list[int]]:
        piece = self._tokenizer.bytes_of(token_id)
        return f"token_id:{token_id}" if self._as_ids else piece.decode("utf-8", "replace"), list(piece)

    def chat(self, ids: Sequence[int], logprobs: Sequence[TokenLogprobs]) -> ChatLogprobs:
        """One entry a token; ``bytes`` are exact where the text is not, as in half a character."""
        content: list[TokenLogprob] = []
        for token_id, entry in zip(ids, logprobs, strict=True):
            token, piece = self.token(token_id)
            top = [TopLogprob(*_named(self.token(other), logprob)) for other, logprob in entry.top]
            content.append(TokenLogprob(token, _finite(entry.logprob), piece, top))
        return ChatLogprobs(content)

    def completion(
        self, ids: Sequence[int], logprobs: Sequence[TokenLogprobs], top: int, offset: int
    ) -> tuple[CompletionLogprobs, int]:
        """The entries, and the offset of the text after them. ``offset`` is where the first token's text begins."""
        found = CompletionLogprobs([], [], [] if top else None, [])
        for token_id, entry in zip(ids, logprobs, strict=True):
            token, _ = self.token(token_id)
            found.tokens.append(token)
            found.token_logprobs.append(_finite(entry.logprob))
            found.text_offset.append(offset)
            offset += len(token)
            if found.top_logprobs is not None:
                likely = {self.token(other)[0]: _finite(logprob) for other, logprob in entry.top}
                found.top_logprobs.append(likely | {token: _finite(entry.logprob)})
        return found, offset


def _named(token: tuple[str, list[int]], logprob: float) -> tuple[str, float, list[int]]:
    return token[0], _finite(logprob), token[1]
