"""The tokenizer and chat template of a model folder or GGUF file."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer as Backend

from ..checkpoint.gguf import GgufArray, GgufFile
from ..config import ModelConfig
from ..errors import StartupError
from .chat_template import ChatTemplate, ChatTemplateError
from .gguf_vocabulary import tokenizer_from_gguf
from .tokenizer import SpecialTokens, Spelling, Tokenizer

log = logging.getLogger(__name__)


def locate_tokenizer(given: str, model: ModelConfig) -> Path:
    """The folder that ``--tokenizer`` means: one of this machine, or a hub id, of which only small files are fetched.
    Raises ``StartupError``."""
    path = Path(given).expanduser()
    if path.exists():
        return path
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        folder = snapshot_download(
            given, cache_dir=model.download_dir or None, allow_patterns=["*.json", "*.jinja", "tokenizer.model"]
        )
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError) as error:
        why = f"{given} is neither a folder here nor a model of the hub ({type(error).__name__})"
        raise _no_tokenizer(why, "check --tokenizer") from error
    return Path(folder)


def load_tokenizer(path: Path) -> Tokenizer:
    """From a GGUF file, or a folder with ``tokenizer.json`` or a GGUF file. Raises ``StartupError``."""
    if path.is_file():
        return _from_gguf_file(path)
    if (path / "tokenizer.json").is_file():
        return _from_folder(path, _read_backend(path / "tokenizer.json"))
    files = sorted(path.glob("*.gguf"))
    if files:
        return _from_gguf_file(files[0])
    return _from_folder(path, _convert(path))


def load_chat_template(tokenizer: Tokenizer, given: str) -> ChatTemplate | None:
    """The template that was given (a file, or the source itself), or the model's own. Raises ``StartupError``."""
    source = tokenizer.chat_template
    if given:
        is_source = "{" in given or "\n" in given
        if not is_source and not Path(given).is_file():
            raise StartupError(
                "HS-E052", "the chat template cannot be read", f"there is no file {given}", "check --chat-template"
            )
        source = given if is_source else Path(given).read_text(encoding="utf-8")
    if not source:
        return None
    try:
        return ChatTemplate(source, tokenizer.special.bos_token, tokenizer.special.eos_token)
    except ChatTemplateError as error:
        fix = "pass another template by --chat-template FILE"
        raise StartupError("HS-E053", "the chat template cannot be used", str(error), fix) from error


def _from_gguf_file(path: Path) -> Tokenizer:
    metadata: dict[str, Any] = {}
    for key, value in GgufFile(path).metadata.items():
        if key.startswith("tokenizer."):
            metadata[key] = _elements(value) if isinstance(value, GgufArray) else value
    return tokenizer_from_gguf(metadata)


def _elements(array: GgufArray) -> list[Any]:
    is_text = array.element_type == 8
    return array.strings() if is_text else array.numbers().tolist()


def _read_backend(path: Path) -> Backend:
    try:
        return Backend.from_file(str(path))
    except Exception as error:  # tokenizers raises bare Exception
        raise StartupError(
            "HS-E051", "tokenizer.json cannot be used", str(error)[:300], "download the model again"
        ) from error


def _convert(path: Path) -> Backend:
    """A model without ``tokenizer.json``: transformers can make one, but imports torch into this process."""
    try:
        from transformers import AutoTokenizer
    except ImportError as error:
        raise _no_tokenizer(
            "no tokenizer.json is in the model folder", "pip install transformers, which can make one"
        ) from error
    log.warning("no tokenizer.json in the model folder: converting its tokenizer by transformers")
    try:
        backend = AutoTokenizer.from_pretrained(str(path)).backend_tokenizer
    except (OSError, ValueError, AttributeError, ImportError) as error:
        raise _no_tokenizer("no tokenizer.json is in the model folder", "pass --tokenizer FOLDER") from error
    assert isinstance(backend, Backend)
    return backend


def _no_tokenizer(why: str, fix: str) -> StartupError:
    return StartupError("HS-E050", "the model has no tokenizer", why, fix)


def _from_folder(path: Path, backend: Backend) -> Tokenizer:
    config = _read_json(path / "tokenizer_config.json")
    generation = _read_json(path / "generation_config.json")
    model = _read_json(path / "config.json")
    bos, eos = (_token_text(config.get(name)) for name in ("bos_token", "eos_token"))
    ends: list[int] = []
    for value in (generation.get("eos_token_id"), model.get("eos_token_id"), backend.token_to_id(eos) if eos else None):
        ends += [value] if isinstance(value, int) else value if isinstance(value, list) else []
        if ends:  # generation_config.json has the last word; the others are asked where it is silent
            break
    if eos is not None and (token_id := backend.token_to_id(eos)) is not None:
        ends.append(token_id)
    special = SpecialTokens(bos, eos, tuple(dict.fromkeys(int(end) for end in ends)))
    return Tokenizer(backend, _spelling(backend), special, _folder_template(path, config))


def _spelling(backend: Backend) -> Spelling:
    """How the vocabulary spells bytes, by the decoder of ``tokenizer.json``."""
    decoder = json.loads(backend.to_str()).get("decoder") or {}
    steps = [decoder, *decoder.get("decoders", ())]
    kinds = {step.get("type") for step in steps}
    if "ByteLevel" in kinds:
        return "byte_level"
    if kinds & {"Metaspace", "ByteFallback"} or any(step.get("pattern") == {"String": "\u2581"} for step in steps):
        return "sentencepiece"
    raise StartupError(
        "HS-E051",
        "tokenizer.json cannot be used",
        f"its decoder is {decoder.get('type')!r}",
        "known decoders: ByteLevel, Metaspace, ByteFallback",
    )


def _folder_template(path: Path, config: dict[str, Any]) -> str | None:
    beside = path / "chat_template.jinja"
    if beside.is_file():
        return beside.read_text(encoding="utf-8")
    template = config.get("chat_template")
    if isinstance(template, list):  # named ones; "default" is for plain conversations
        named = {entry.get("name"): entry.get("template") for entry in template if isinstance(entry, dict)}
        template = named.get("default")
    return template if isinstance(template, str) else None


def _token_text(value: Any) -> str | None:
    if isinstance(value, dict):
        value = value.get("content")
    return value if isinstance(value, str) else None


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise StartupError("HS-E051", f"{path.name} cannot be read", str(error), "download the model again") from error
    return value if isinstance(value, dict) else {}
