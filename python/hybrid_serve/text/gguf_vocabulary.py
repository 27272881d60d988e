"""A tokenizer from the metadata of a GGUF file (keys ``tokenizer.ggml.*`` and ``tokenizer.chat_template``)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers import Tokenizer as Backend

from ..errors import StartupError
from .tokenizer import SpecialTokens, Spelling, Tokenizer

# tokenizer.ggml.token_type
_UNKNOWN, _CONTROL, _USER_DEFINED = 2, 3, 4

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_LLAMA3 = _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_QWEN2 = _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_TEKKEN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)"


def _split(pattern: str) -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Split(Regex(pattern), behavior="isolated")


def _spell(*first: pre_tokenizers.PreTokenizer, use_regex: bool) -> pre_tokenizers.PreTokenizer:
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=use_regex)
    return pre_tokenizers.Sequence([*first, byte_level]) if first else byte_level


def _digits() -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Digits(individual_digits=True)


# tokenizer.ggml.pre -> how text is cut before merging. Kinds with equal rules share a maker.
_GPT2_KINDS = ("gpt-2", "gpt2", "phi-2", "olmo", "mpt", "jais", "trillion", "exaone4")
_DIGIT_KINDS = ("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone")
_LLAMA3_KINDS = ("llama3", "llama-v3", "llama-bpe", "falcon3", "pixtral", "lfm2")
_QWEN2_KINDS = ("qwen2", "deepseek-r1-qwen", "stablelm2", "hunyuan", "megrez")
_WHOLE_WORD_KINDS = (*_LLAMA3_KINDS, "tekken")  # a word that is itself a token is not merged up to it


def _pre_tokenizer(kind: str) -> pre_tokenizers.PreTokenizer:
    if kind in _DIGIT_KINDS:
        return _spell(_digits(), use_regex=True)
    if kind in _GPT2_KINDS:
        return _spell(use_regex=True)
    if kind in _LLAMA3_KINDS:
        return _spell(_split(_LLAMA3), use_regex=False)
    if kind in _QWEN2_KINDS:
        return _spell(_split(_QWEN2), use_regex=False)
    if kind == "tekken":
        return _spell(_split(_TEKKEN), use_regex=False)
    if kind == "default":
        cuts = (r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", "[0-9][0-9][0-9]")
        return _spell(*map(_split, cuts), use_regex=False)
    known = sorted({"default", "tekken", *_GPT2_KINDS, *_DIGIT_KINDS, *_LLAMA3_KINDS, *_QWEN2_KINDS})
    raise _corrupt(f"its pre-tokenizer kind is {kind!r}", f"known kinds: {', '.join(known)}")


def tokenizer_from_gguf(metadata: Mapping[str, Any]) -> Tokenizer:
    """Builds the tokenizer. Raises ``StartupError`` (exit code 11) for a kind we do not know or lists that disagree."""
    tokens = _required(metadata, "tokens")
    kind = str(_required(metadata, "model"))
    if kind == "gpt2":
        backend = _byte_level(metadata, tokens)
    elif kind == "llama":
        backend = _sentencepiece(metadata, tokens)
    else:
        raise _corrupt(
            f"its tokenizer kind is {kind!r}", "known kinds: gpt2 (byte-level BPE), llama (SentencePiece BPE)"
        )
    _add_special_tokens(backend, tokens, metadata.get("tokenizer.ggml.token_type"))
    _add_bos(backend, metadata, tokens, by_default=kind == "llama" or _pre_kind(metadata) in _LLAMA3_KINDS)
    bos, eos = _special_id(metadata, "bos", tokens), _special_id(metadata, "eos", tokens)
    ends = (eos, _special_id(metadata, "eot", tokens), _special_id(metadata, "eom", tokens))
    special = SpecialTokens(
        bos_token=None if bos is None else str(tokens[bos]),
        eos_token=None if eos is None else str(tokens[eos]),
        eos_token_ids=tuple(dict.fromkeys(end for end in ends if end is not None)),
    )
    template = metadata.get("tokenizer.chat_template")
    spelling: Spelling = "byte_level" if kind == "gpt2" else "sentencepiece"
    return Tokenizer(backend, spelling, special, str(template) if template else None)


def _pre_kind(metadata: Mapping[str, Any]) -> str:
    return str(metadata.get("tokenizer.ggml.pre", "default"))


def _byte_level(metadata: Mapping[str, Any], tokens: Sequence[str]) -> Backend:
    merges = [tuple(merge.split(" ", 1)) for merge in _required(metadata, "merges")]
    if any(len(merge) != 2 for merge in merges):
        raise _corrupt("a merge rule is not a pair of tokens", "convert the model again")
    kind = _pre_kind(metadata)
    vocabulary = {token: i for i, token in enumerate(tokens)}
    try:
        backend = Backend(models.BPE(vocab=vocabulary, merges=merges, ignore_merges=kind in _WHOLE_WORD_KINDS))
    except Exception as error:  # tokenizers raises bare Exception; its text names the token
        raise _corrupt(f"its merge rules and tokens disagree: {error}", "convert the model again") from error
    if kind in _QWEN2_KINDS:
        backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = _pre_tokenizer(kind)
    backend.decoder = decoders.ByteLevel()
    return backend


def _sentencepiece(metadata: Mapping[str, Any], tokens: Sequence[str]) -> Backend:
    scores = _required(metadata, "scores")
    if len(scores) != len(tokens):
        raise _corrupt(f"it has {len(tokens)} tokens but {len(scores)} scores", "convert the model again")
    vocabulary = {token: i for i, token in enumerate(tokens)}
    unknown = _special_id(metadata, "unknown", tokens)
    backend = Backend(
        models.BPE(
            vocab=vocabulary,
            merges=_merges_by_score(vocabulary, scores),
            unk_token=None if unknown is None else str(tokens[unknown]),
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    steps: list[normalizers.Normalizer] = [normalizers.Replace(" ", "\u2581")]
    if metadata.get("tokenizer.ggml.add_space_prefix", True):
        steps.insert(0, normalizers.Prepend("\u2581"))
    backend.normalizer = normalizers.Sequence(steps)
    return backend


def _merges_by_score(vocabulary: dict[str, int], scores: Sequence[float]) -> list[tuple[str, str]]:
    """SentencePiece merges whichever neighbours give the best-scored token: as rules, best first."""
    merges: list[tuple[float, int, int, str, str]] = []
    for token, token_id in vocabulary.items():
        for cut in range(1, len(token)):
            left, right = vocabulary.get(token[:cut]), vocabulary.get(token[cut:])
            if left is not None and right is not None:
                merges.append((-float(scores[token_id]), left, right, token[:cut], token[cut:]))
    return [(left, right) for *_, left, right in sorted(merges)]


def _add_special_tokens(backend: Backend, tokens: Sequence[str], types: Sequence[int] | None) -> None:
    if types is None:
        return
    if len(types) != len(tokens):
        raise _corrupt(f"it has {len(tokens)} tokens but {len(types)} token types", "convert the model again")
    kinds = [int(kind) for kind in types]
    control = [tokens[i] for i, kind in enumerate(kinds) if kind in (_CONTROL, _UNKNOWN)]
    user = [tokens[i] for i, kind in enumerate(kinds) if kind == _USER_DEFINED]
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in control])
    backend.add_tokens([AddedToken(token, special=False, normalized=False) for token in user])


def _add_bos(backend: Backend, metadata: Mapping[str, Any], tokens: Sequence[str], by_default: bool) -> None:
    add_bos = metadata.get("tokenizer.ggml.add_bos_token", by_default)
    add_eos = metadata.get("tokenizer.ggml.add_eos_token", False)
    bos = _special_id(metadata, "bos", tokens) if add_bos else None
    eos = _special_id(metadata, "eos", tokens) if add_eos else None
    around = [(str(tokens[i]), i) for i in (bos, eos) if i is not None]
    if not around:
        return
    single = [*([str(tokens[bos])] if bos is not None else []), "$A", *([str(tokens[eos])] if eos is not None else [])]
    backend.post_processor = processors.TemplateProcessing(single=single, pair=None, special_tokens=around)


def _special_id(metadata: Mapping[str, Any], name: str, tokens: Sequence[str]) -> int | None:
    value = metadata.get(f"tokenizer.ggml.{name}_token_id")
    if value is None:
        return None
    if not 0 <= int(value) < len(tokens):
        raise _corrupt(
            f"its {name} token id {int(value)} is not among its {len(tokens)} tokens", "convert the model again"
        )
    return int(value)


def _required(metadata: Mapping[str, Any], name: str) -> Any:
    value = metadata.get(f"tokenizer.ggml.{name}")
    if value is None or len(value) == 0:
        raise _corrupt(f"it has no tokenizer.ggml.{name}", "use a GGUF file that holds its tokenizer, or --tokenizer")
    return value


def _corrupt(why: str, fix: str) -> StartupError:
    return StartupError("HS-E051", "the tokenizer of the GGUF file cannot be used", why, fix)
