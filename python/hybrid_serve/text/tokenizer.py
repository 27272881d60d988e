"""One vocabulary: text to token ids, token ids to bytes."""

from __future__ import annotations

import logging
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from tokenizers import Tokenizer as Backend

TokenIds = array  # of C int, 4 bytes each: what the wire carries
Spelling = Literal["byte_level", "sentencepiece"]

log = logging.getLogger(__name__)

_METASPACE = "\u2581"


def _byte_level_alphabet() -> dict[int, str]:
    """GPT-2's spelling of bytes: printable Latin-1 is itself, the other 68 bytes are the code points from 256 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}


# Maps a spelled character to the one whose Latin-1 code is the byte. What is not in the alphabet but would survive
# Latin-1 is mapped out of it, so that such a token is noticed.
_FROM_BYTE_LEVEL = dict.fromkeys(range(256), "\uffff") | {
    ord(char): chr(byte) for byte, char in _byte_level_alphabet().items()
}


@dataclass(frozen=True)
class SpecialTokens:
    """What the model's files say about the ends of a text; the strings are what chat templates are given."""

    bos_token: str | None = None
    eos_token: str | None = None
    eos_token_ids: tuple[int, ...] = ()  # any of them ends a reply


class Tokenizer:
    """Ids and bytes of one vocabulary; knows no conversation, no request, no stream.

    A token is a fixed sequence of bytes here, whatever stands beside it: so the bytes of a text are the joined bytes of
    its tokens, and UTF-8 is decoded once, over the joint.
    """

    def __init__(self, backend: Backend, spelling: Spelling, special: SpecialTokens, chat_template: str | None) -> None:
        self.backend = backend
        self.special = special
        self.chat_template = chat_template
        self._spelling = spelling
        added = backend.get_added_tokens_decoder()
        self.special_ids = frozenset(token_id for token_id, token in added.items() if token.special)
        vocabulary = backend.get_vocab(with_added_tokens=True)
        self.vocab_size = max(vocabulary.values(), default=-1) + 1
        self.token_bytes: list[bytes] = [b""] * self.vocab_size
        to_bytes = _bytes_of_byte_level if spelling == "byte_level" else _bytes_of_sentencepiece
        for token, token_id in vocabulary.items():
            self.token_bytes[token_id] = token.encode() if token_id in self.special_ids else to_bytes(token)

    @cached_property
    def visible_bytes(self) -> list[bytes]:
        """``token_bytes`` with special tokens empty."""
        return [b"" if i in self.special_ids else piece for i, piece in enumerate(self.token_bytes)]

    @cached_property
    def longest_token(self) -> int:
        """Bytes of the longest token: no text of n bytes has fewer than n / longest_token tokens."""
        return max(map(len, self.token_bytes), default=1) or 1

    def encode(self, text: str, add_special_tokens: bool = True) -> array[int]:
        """Token ids; their ``tobytes()`` is what the wire carries. Releases the GIL for nearly all of its time."""
        return array("i", self.backend.encode(text, add_special_tokens=add_special_tokens).ids)

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = True) -> str:
        """The text of a whole sequence; ids past the vocabulary (padding rows of a model) have no text."""
        table = self.visible_bytes if skip_special_tokens else self.token_bytes
        size = len(table)
        text = b"".join([table[i] for i in ids if i < size]).decode("utf-8", "replace")
        # SentencePiece marks the beginning of a text by a space that nobody wrote.
        return text[1:] if self._spelling == "sentencepiece" and text.startswith(" ") else text

    def bytes_of(self, token_id: int) -> bytes:
        """The bytes a token stands for; none for an id past the vocabulary."""
        return self.token_bytes[token_id] if 0 <= token_id < self.vocab_size else b""

    def pieces(self, ids: Sequence[int]) -> list[str]:
        """Tokens as the vocabulary spells them."""
        return [self.backend.id_to_token(i) or "" for i in ids]


def _bytes_of_byte_level(token: str) -> bytes:
    try:
        return token.translate(_FROM_BYTE_LEVEL).encode("latin-1")
    except UnicodeEncodeError:  # an added token that is spelled as plain text
        return token.encode()


def _bytes_of_sentencepiece(token: str) -> bytes:
    if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
        try:
            return bytes([int(token[3:5], 16)])
        except ValueError:
            pass  # not a byte token but a text that looks like one
    return token.replace(_METASPACE, " ").encode()
