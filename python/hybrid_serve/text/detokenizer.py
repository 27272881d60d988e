"""Token ids to text while they arrive, and the search for stop strings in it."""

from __future__ import annotations

from codecs import utf_8_decode
from collections.abc import Sequence

from ..wire import FinishReason, SamplingParams
from .tokenizer import Tokenizer


class Detokenizer:
    """The text of one choice; knows no other choice, no JSON, no engine.

    What ``feed`` returns, concatenated, is the decoding of all ids (up to the stop), however they were cut into calls.
    Text that could still become a stop string, or bytes that could still become a character, are held back:

        released | held: longest end that begins a stop string | pending: bytes of an unfinished character
    """

    __slots__ = (
        "_first",
        "_held",
        "_ids_are_stops",
        "_keep_stop",
        "_last",
        "_min_tokens",
        "_pending",
        "_reach",
        "_stops",
        "_table",
        "num_tokens",
        "stop_reason",
        "stopped",
    )  # fmt: skip

    def __init__(self, tokenizer: Tokenizer, params: SamplingParams, eos_token_ids: Sequence[int] = ()) -> None:
        self._table = tokenizer.visible_bytes if params.skip_special_tokens else tokenizer.token_bytes
        self._stops = params.stop
        self._first = frozenset(stop[0] for stop in params.stop)
        self._last = frozenset(stop[-1] for stop in params.stop)
        self._reach = max(map(len, params.stop), default=0) - 1
        self._keep_stop = params.include_stop_str_in_output
        self._min_tokens = params.min_tokens
        self._ids_are_stops = frozenset(params.stop_token_ids) - (
            frozenset() if params.ignore_eos else {*eos_token_ids}
        )
        self._pending = b""
        self._held = ""
        self.num_tokens = 0  # ids taken; those after a stop string are not
        self.stopped = False  # a stop string was found
        self.stop_reason: str | int | None = None  # the stop string or stop_token_id that ended the text

    def feed(self, token_ids: Sequence[int], finish: FinishReason = FinishReason.NONE) -> str:
        """The text that is now sure. ``finish`` is the engine's word on the last of these ids; after it, or after
        ``stopped``, nothing may be fed."""
        ended = finish is not FinishReason.NONE
        count = len(token_ids)
        if finish is FinishReason.STOP and token_ids:
            if token_ids[-1] in self._ids_are_stops:
                self.stop_reason = token_ids[-1]
            if not self._keep_stop:
                token_ids = token_ids[:-1]
        if not self._stops:
            self.num_tokens += count
            return self._decode(token_ids, ended)
        text = self._feed_and_search(token_ids, ended)
        if not self.stopped:
            self.num_tokens += count - len(token_ids)
        return text

    def _decode(self, token_ids: Sequence[int], ended: bool) -> str:
        table = self._table
        try:
            data = self._pending + b"".join([table[i] for i in token_ids])
        except IndexError:  # an id of the model's padding, past the vocabulary: it has no text
            data = self._pending + b"".join([table[i] for i in token_ids if i < len(table)])
        text, used = utf_8_decode(data, "replace", ended)
        self._pending = data[used:]
        return text

    def _feed_and_search(self, token_ids: Sequence[int], ended: bool) -> str:
        # Token by token: which token completed the stop string decides what is counted, whatever came with it.
        released = ""
        for token_id in token_ids:
            self.num_tokens += 1
            text = self._decode((token_id,), False)
            if self.num_tokens <= self._min_tokens:
                released += text
            elif text:
                released += self._search(text)
                if self.stopped:
                    return released
        if ended:
            rest = self._decode((), True)
            if rest:
                released += self._search(rest)
            if not self.stopped:
                released += self._held
                self._held = ""
        return released

    def _search(self, text: str) -> str:
        """Adds ``text`` to what is held and releases what can no longer be part of a stop string."""
        window = self._held + text
        if not self._last.isdisjoint(text):
            found = self._first_stop(window, len(self._held))
            if found is not None:
                start, stop = found
                self.stopped, self.stop_reason, self._held = True, stop, ""
                return window[: start + len(stop)] if self._keep_stop else window[:start]
        keep = self._possible_stop(window)
        self._held = window[keep:]
        return window[:keep]

    def _first_stop(self, window: str, held: int) -> tuple[int, str] | None:
        """The match that ends first (of those, the longest): the one that feeding by characters would find."""
        best: tuple[int, int, str] | None = None
        for stop in self._stops:
            start = window.find(stop, max(0, held - len(stop) + 1))
            if start >= 0 and (best is None or (start + len(stop), start) < best[:2]):
                best = (start + len(stop), start, stop)
        return None if best is None else (best[1], best[2])

    def _possible_stop(self, window: str) -> int:
        """Where the longest end of ``window`` begins that a stop string begins with."""
        for start in range(max(0, len(window) - self._reach), len(window)):
            if window[start] in self._first:
                tail = window[start:]
                for stop in self._stops:
                    if stop.startswith(tail):
                        return start
        return len(window)
