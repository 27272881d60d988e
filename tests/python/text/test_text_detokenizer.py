"""Incremental text: what is released never has to be taken back (F-38, ADV-50, B9)."""

from __future__ import annotations

import time
from collections.abc import Sequence

from hypothesis import example, given, settings
from hypothesis import strategies as st

from demo_model import demo_tokenizer
from hybrid_serve.text.detokenizer import Detokenizer
from hybrid_serve.wire import FinishReason, SamplingParams

EOS = (2,)
TEXT = "The quick brown fox. User: naïve café 😀 日本語\n\nEND of it, END. aaab"


def detokenizer(**params: object) -> Detokenizer:
    return Detokenizer(demo_tokenizer(), SamplingParams(**params), EOS)  # type: ignore[arg-type]


def cut(ids: Sequence[int], sizes: Sequence[int]) -> list[list[int]]:
    """``ids`` in pieces of these sizes, the last one takes the rest."""
    pieces, start = [], 0
    for size in sizes:
        pieces.append(list(ids[start : start + size]))
        start += size
    return [piece for piece in [*pieces, list(ids[start:])] if piece]


def feed_all(target: Detokenizer, pieces: list[list[int]], finish: FinishReason = FinishReason.LENGTH) -> list[str]:
    deltas = []
    for i, piece in enumerate(pieces):
        deltas.append(target.feed(piece, finish if i == len(pieces) - 1 else FinishReason.NONE))
        if target.stopped:
            break
    return deltas


sizes = st.lists(st.integers(1, 5), max_size=40)
any_ids = st.lists(st.integers(0, 49151), min_size=1, max_size=40)


@settings(max_examples=300, deadline=None)
@given(any_ids, sizes, st.booleans())
def test_deltas_of_any_ids_cut_anyhow_concatenate_to_the_decoding_of_the_whole(
    ids: list[int], sizes: list[int], skip: bool
) -> None:
    """ADV-50"""
    deltas = feed_all(detokenizer(skip_special_tokens=skip), cut(ids, sizes))
    assert "".join(deltas) == demo_tokenizer().decode(ids, skip)


@settings(max_examples=300, deadline=None)
@given(sizes, st.lists(st.text(st.sampled_from("aENDb .:Usr\n"), min_size=1, max_size=4), min_size=1, max_size=4))
@example([1] * 40, ["END", "ND o"])
@example([3, 3, 3], ["aab", "ab"])
def test_a_stop_string_never_leaks_however_the_tokens_are_cut(sizes: list[int], stops: list[str]) -> None:
    """F-38: the text ends before the match that is complete first; no delta ever holds a part of it."""
    ids = demo_tokenizer().encode(TEXT)
    target = detokenizer(stop=tuple(stops))
    text = "".join(feed_all(target, cut(ids, sizes)))
    ends = [(TEXT.find(stop) + len(stop), TEXT.find(stop), stop) for stop in stops if stop in TEXT]
    if not ends:
        assert text == TEXT
        assert not target.stopped
        return
    _, start, stop = min(ends)
    assert text == TEXT[:start]
    assert target.stopped
    assert target.stop_reason == stop


@settings(max_examples=100, deadline=None)
@given(sizes)
def test_stop_string_is_kept_where_asked_for_and_nothing_after_it(sizes: list[int]) -> None:
    target = detokenizer(stop=("END",), include_stop_str_in_output=True)
    text = "".join(feed_all(target, cut(demo_tokenizer().encode(TEXT), sizes)))
    assert text == TEXT[: TEXT.index("END") + 3]


def test_tokens_after_the_one_that_completed_the_stop_string_are_not_counted() -> None:
    tokenizer = demo_tokenizer()
    ids = list(tokenizer.encode("one two STOP three four"))
    needed = next(n for n in range(len(ids)) if "STOP" in tokenizer.decode(ids[:n]))
    for pieces in ([ids], [[token_id] for token_id in ids]):
        target = detokenizer(stop=("STOP",))
        feed_all(target, pieces)
        assert target.num_tokens == needed


def test_held_text_is_released_when_it_cannot_become_a_stop_string_or_the_end_comes() -> None:
    ids = demo_tokenizer().encode("ab EN EN")
    target = detokenizer(stop=("END",))
    deltas = feed_all(target, [[token_id] for token_id in ids])
    assert "".join(deltas) == "ab EN EN"
    assert all(not "".join(deltas[:i]).endswith("EN") for i in range(len(deltas)))  # held until the end


def test_eos_and_stop_ids_are_not_in_the_text_and_only_the_latter_are_a_stop_reason() -> None:
    ids = list(demo_tokenizer().encode("hello"))
    at_eos = detokenizer(stop_token_ids=(9,), skip_special_tokens=False)
    assert at_eos.feed([*ids, 2], FinishReason.STOP) == "hello"
    assert at_eos.stop_reason is None
    assert at_eos.num_tokens == len(ids) + 1
    at_stop_id = detokenizer(stop_token_ids=(9,), stop=("zzz",))
    assert at_stop_id.feed([*ids, 9], FinishReason.STOP) == "hello"
    assert at_stop_id.stop_reason == 9
    assert at_stop_id.num_tokens == len(ids) + 1
    kept = detokenizer(stop_token_ids=(28,), include_stop_str_in_output=True)
    assert kept.feed([*ids, 28], FinishReason.STOP) == "hello,"


def test_special_tokens_show_only_where_asked_for() -> None:
    ids = [0, *demo_tokenizer().encode("hi"), 1]
    assert feed_all(detokenizer(), [ids]) == ["hi"]
    assert feed_all(detokenizer(skip_special_tokens=False), [ids]) == ["<|endoftext|>hi<|im_start|>"]


def test_stop_strings_do_not_count_before_min_tokens() -> None:
    ids = list(demo_tokenizer().encode(" stop stop stop stop"))
    assert len(ids) == 4
    target = detokenizer(stop=("stop",), min_tokens=2)
    assert "".join(feed_all(target, [[token_id] for token_id in ids])) == " stop stop "
    assert target.num_tokens == 3


def test_unfinished_character_at_the_end_becomes_one_replacement_character() -> None:
    ids = list(demo_tokenizer().encode("x😀"))[:-1]
    deltas = feed_all(detokenizer(), [[token_id] for token_id in ids])
    assert "".join(deltas) == "x\ufffd"
    assert deltas[:-1] == ["x", *[""] * (len(deltas) - 2)]


def test_ids_of_the_models_padding_have_no_text() -> None:
    ids = list(demo_tokenizer().encode("a b"))
    assert detokenizer().feed([*ids, 60_000, *ids]) == "a ba b"


def test_time_grows_with_the_tokens_not_with_their_square() -> None:
    """ADV-32; a token costs a few microseconds."""

    def seconds(repeats: int) -> float:
        ids = demo_tokenizer().encode("The quick brown fox ENDS. " * repeats)
        target = detokenizer(stop=("END.", "\n\nUser:", "</s>", "brown foxes"))
        start = time.process_time()
        for token_id in ids:
            target.feed((token_id,))
        return (time.process_time() - start) / len(ids)

    short, long = min(seconds(300) for _ in range(3)), min(seconds(3000) for _ in range(3))
    assert long < 2.6 * short
    assert long < 50e-6
