"""The tokenizer against the reference libraries, on the real vocabulary of the demo model (S35)."""

from __future__ import annotations

import json
import random
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from demo_model import demo_metadata, demo_tokenizer
from hybrid_serve.errors import StartupError
from hybrid_serve.text.gguf_vocabulary import tokenizer_from_gguf
from hybrid_serve.text.loading import load_chat_template, load_tokenizer
from tiny_models import make_tiny_model

SAMPLES = [
    "Hello, world!",
    "In 1984, 3.14159 and 1,000,000 were numbers; 007 too.",
    "x=12345678901234567890",
    "naïve café Größe Ünïcödé",
    "日本語のテキストと中文，还有한국어",
    "emoji 😀👩‍👩‍👧‍👦🏳️‍🌈 and flags 🇩🇪",
    "   leading, trailing   \n\n\ttabs\t\r\nCRLF",
    "don't I'm we'll they'd it's you've we're DON'T",
    "def f(x):\n    return {'a': [1, 2, 3][x % 3]}\n",
    "<|im_start|>user\nhi<|im_end|>\n<|endoftext|>",
    "a" * 300,
    "\u0000\u0001 control \x7f",
    "٣٤٥ Arabic digits, ½ and ² and Ⅷ",
]


def reference() -> Tokenizer:
    """The tokenizer as its authors publish it: digits one by one, then GPT-2's byte-level BPE."""
    metadata = demo_metadata()
    tokens = metadata["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in metadata["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    digits = pre_tokenizers.Digits(individual_digits=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in tokens[:17]])
    return tokenizer


def test_gguf_tokenizer_of_smollm2_equals_its_published_form() -> None:
    ours, theirs = demo_tokenizer(), reference()
    for text in SAMPLES:
        assert list(ours.encode(text)) == theirs.encode(text).ids, text


def test_gguf_tokenizer_of_smollm2_equals_transformers_once_its_digits_are_restored() -> None:
    """transformers' own conversion drops the Digits step; everything else must agree."""
    transformers = pytest.importorskip("transformers")
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=reference())
    ours = demo_tokenizer()
    for text in SAMPLES:
        assert list(ours.encode(text)) == fast.encode(text), text


def test_every_text_comes_back_from_its_tokens() -> None:
    """S35"""
    random.seed(1)
    tokenizer = demo_tokenizer()
    for _ in range(1000):
        text = "".join(
            chr(random.choice((random.randrange(32, 127), random.randrange(0xA0, 0xD7FF)))) for _ in range(20)
        )
        assert tokenizer.decode(tokenizer.encode(text), skip_special_tokens=False) == text


@settings(max_examples=300, deadline=None)
@given(st.lists(st.integers(0, 49151), max_size=30), st.booleans())
def test_decoding_any_ids_equals_the_tokenizers_library_even_where_they_are_not_utf8(
    ids: list[int], skip: bool
) -> None:
    tokenizer = demo_tokenizer()
    assert tokenizer.decode(ids, skip) == tokenizer.backend.decode(ids, skip_special_tokens=skip)


def test_the_real_vocabulary_loads_in_half_a_second() -> None:
    """Of CPU time, so that a busy machine does not matter."""
    metadata = demo_metadata()
    times = []
    for _ in range(3):
        start = time.process_time()
        tokenizer_from_gguf(metadata)
        times.append(time.process_time() - start)
    assert min(times) < 0.5


def test_special_ids_and_strings_come_from_the_metadata() -> None:
    tokenizer = demo_tokenizer()
    assert tokenizer.special.eos_token_ids == (2,)
    assert (tokenizer.special.bos_token, tokenizer.special.eos_token) == ("<|im_start|>", "<|im_end|>")
    assert list(tokenizer.encode("x")) == list(tokenizer.encode("x", add_special_tokens=False))  # add_bos is false


def test_bytes_of_a_token_are_exact_where_its_text_is_half_a_character() -> None:
    """B5"""
    tokenizer = demo_tokenizer()
    ids = tokenizer.encode("😀")
    assert len(ids) > 1
    assert b"".join(map(tokenizer.bytes_of, ids)) == "😀".encode()
    assert tokenizer.bytes_of(10**6) == tokenizer.bytes_of(-1) == b""


def byte_level_metadata(**changes: Any) -> dict[str, Any]:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, special_tokens=["<s>", "</s>"])
    tokenizer.train_from_iterator(SAMPLES * 3, trainer)
    model = json.loads(tokenizer.to_str())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].__getitem__)
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.merges": [" ".join(merge) for merge in model["merges"]],
        "tokenizer.ggml.token_type": [3, 3, *[1] * (len(tokens) - 2)],
        "tokenizer.ggml.bos_token_id": 0,
        "tokenizer.ggml.eos_token_id": 1,
    } | changes


@pytest.mark.parametrize(
    ("kind", "text", "cuts"),
    [
        ("llama-bpe", "It's 12345 a-b", ["It", "'s", " ", "123", "45", " a", "-b"]),
        ("qwen2", "It's 12345", ["It", "'s", " ", "1", "2", "3", "4", "5"]),
        ("gpt-2", "It's 12345", ["It", "'s", " 12345"]),
        ("smollm", "It's 123", ["It", "'s", " ", "1", "2", "3"]),
        ("default", "a=12345!", ["a", "=", "123", "45", "!"]),
        ("tekken", "helloWorld 42", ["hello", "World", " ", "4", "2"]),
    ],
)
def test_each_pre_tokenizer_kind_cuts_as_its_model_does(kind: str, text: str, cuts: list[str]) -> None:
    tokenizer = tokenizer_from_gguf(byte_level_metadata(**{"tokenizer.ggml.pre": kind}))
    pieces = tokenizer.backend.pre_tokenizer.pre_tokenize_str(text)
    assert [text[start:end] for _, (start, end) in pieces] == cuts


def test_llama3_kind_begins_with_bos_unless_told_otherwise() -> None:
    llama3 = {"tokenizer.ggml.pre": "llama-bpe"}
    assert tokenizer_from_gguf(byte_level_metadata(**llama3)).encode("a")[0] == 0
    assert tokenizer_from_gguf(byte_level_metadata(**llama3)).encode("a", add_special_tokens=False)[0] != 0
    off = llama3 | {"tokenizer.ggml.add_bos_token": False}
    assert tokenizer_from_gguf(byte_level_metadata(**off)).encode("a")[0] != 0


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"tokenizer.ggml.pre": "klingon"}, "pre-tokenizer kind is 'klingon'"),
        ({"tokenizer.ggml.model": "bert"}, "tokenizer kind is 'bert'"),
        ({"tokenizer.ggml.merges": ["ab"]}, "not a pair"),
        ({"tokenizer.ggml.merges": ["zzzz yyyy"]}, "disagree"),
        ({"tokenizer.ggml.merges": []}, "no tokenizer.ggml.merges"),
        ({"tokenizer.ggml.tokens": []}, "no tokenizer.ggml.tokens"),
        ({"tokenizer.ggml.eos_token_id": 10**6}, "eos token id 1000000"),
        ({"tokenizer.ggml.token_type": [1]}, "1 token types"),
    ],
)
def test_a_vocabulary_that_cannot_be_used_is_a_start_up_error_that_says_why(changes: dict[str, Any], why: str) -> None:
    """F-54"""
    with pytest.raises(StartupError) as caught:
        tokenizer_from_gguf(byte_level_metadata(**changes))
    assert why in caught.value.failure.why
    assert caught.value.failure.exit_code == 11


def sentencepiece_like() -> tuple[dict[str, Any], Tokenizer]:
    """A BPE in SentencePiece's spelling, once as GGUF metadata (scores) and once as tokenizers' own object (merges)."""
    theirs = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    from tokenizers import normalizers

    theirs.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    byte_tokens = [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(vocab_size=500, special_tokens=["<unk>", "<s>", "</s>", *byte_tokens])
    theirs.train_from_iterator(["the cat sat on the mat", "the hat that the cat had"] * 5, trainer)
    model = json.loads(theirs.to_str())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].__getitem__)
    ranks = {"".join(merge): rank for rank, merge in enumerate(model["merges"])}
    metadata = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": [-float(ranks.get(token, 10**6)) for token in tokens],
        "tokenizer.ggml.token_type": [2, 3, 3, *[6] * 256, *[1] * (len(tokens) - 259)],
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
    }
    return metadata, theirs


def test_sentencepiece_scores_give_the_same_tokens_as_the_merges_they_came_from() -> None:
    metadata, theirs = sentencepiece_like()
    ours = tokenizer_from_gguf(metadata)
    for text in ("the cat sat", "that hat", "a mat, the cat", "tathe  the"):
        assert list(ours.encode(text, add_special_tokens=False)) == theirs.encode(text).ids, text
        assert ours.encode(text)[0] == 1  # bos by default
        assert ours.decode(ours.encode(text)) == text
    assert ours.decode(ours.encode("é the 日")) == "é the 日"  # by bytes


def test_tokenizer_json_folder_loads_with_its_special_ids_and_template(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(make_tiny_model(tmp_path / "tiny"))
    assert tokenizer.special.eos_token_ids == (2,)
    assert tokenizer.decode(tokenizer.encode("hello wörld 😀")) == "hello wörld 😀"
    template = load_chat_template(tokenizer, "")
    assert template is not None
    assert template.render([{"role": "user", "content": "x"}]).startswith("<|im_start|>user\nx<|im_end|>")


def test_given_template_beats_the_models_own_and_a_missing_file_is_an_error(tmp_path: Path) -> None:
    tokenizer = demo_tokenizer()
    (tmp_path / "t.jinja").write_text("from file {{ messages[0].content }}")
    for given_template in (str(tmp_path / "t.jinja"), "from file {{ messages[0].content }}"):
        template = load_chat_template(tokenizer, given_template)
        assert template is not None
        assert template.render([{"role": "user", "content": "x"}]) == "from file x"
    with pytest.raises(StartupError, match="HS-E052"):
        load_chat_template(tokenizer, str(tmp_path / "no.jinja"))


def test_unusable_tokenizer_json_is_a_start_up_error(tmp_path: Path) -> None:
    """F-54, ADV-14: nothing but tokenizer.json is looked at."""
    (tmp_path / "tokenizer.json").write_text("{not json")
    (tmp_path / "tokenizer.pkl").write_bytes(b"\x80\x04hostile")
    with pytest.raises(StartupError) as caught:
        load_tokenizer(tmp_path)
    assert caught.value.failure.exit_code == 11
