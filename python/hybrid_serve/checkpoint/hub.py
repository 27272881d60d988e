"""From what the user typed to files on this machine: a folder, a GGUF file, or a hub id, which is downloaded.

Only data files are ever fetched or looked at: no pickles (.bin, .pt), no Python code that a model folder brings along.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ..config import ModelConfig
from ..errors import StartupError
from .failures import not_found, unsupported

SAFETENSORS_PATTERNS = ("*.safetensors", "*.json", "tokenizer.model", "*.jinja")
PICKLES = (".bin", ".pt", ".pth", ".ckpt")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*){0,1}")
_HUB_FILE = re.compile(r"([A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)/([\w./-]+\.gguf)")


@dataclass(frozen=True)
class ResolvedModel:
    """``path`` is the GGUF file or the folder with config.json."""

    path: Path
    kind: Literal["gguf", "hf"]

    @property
    def folder(self) -> Path:
        """Where files beside the weights (tokenizer.json, chat template) are looked for."""
        return self.path.parent if self.kind == "gguf" else self.path


def resolve(config: ModelConfig) -> ResolvedModel:
    """Finds the model, downloading it if it is a hub id. Raises StartupError: HS-E021 (exit 10) if it is not there,
    HS-E023 if only pickles are."""
    if not config.model:
        raise not_found("no model is given", "the model's name is empty", "hybrid-serve serve MODEL")
    path = Path(config.model).expanduser()
    if path.exists():
        return resolve_local(path, config)
    if match := _HUB_FILE.fullmatch(config.model):
        return ResolvedModel(_download(config, match[1], match[2]), "gguf")
    if (
        config.model.startswith((".", "/", "~"))
        or config.model.endswith(".gguf")
        or not _HUB_ID.fullmatch(config.model)
    ):
        raise _missing_path(path, config.model)
    return resolve_local(_download(config, config.model, None), config)


def resolve_metadata(config: ModelConfig) -> ResolvedModel:
    """The same for whoever reads no weights: of a hub id only config.json is downloaded. Raises StartupError, HS-E023
    for a GGUF file of the hub, which has its metadata in the same file as its weights."""
    is_local = Path(config.model).expanduser().exists() or not _HUB_ID.fullmatch(config.model)
    if match := _HUB_FILE.fullmatch(config.model):
        raise unsupported(
            f"{config.model} cannot be read before it is downloaded",
            "a GGUF file has its metadata and its weights in one",
            f"hf download {match[1]} {match[2]}, then give the local file",
        )
    if is_local or config.model.endswith(".gguf"):
        return resolve(config)
    return ResolvedModel(_download(config, config.model, "config.json").parent, "hf")


def resolve_local(path: Path, config: ModelConfig) -> ResolvedModel:
    """A file or folder that exists."""
    if path.is_file():
        if path.suffix == ".gguf":
            return ResolvedModel(path, "gguf")
        if path.suffix in PICKLES:
            raise _only_pickles(path.name)
        raise not_found(
            f"{path} is not a model", "it is neither a folder nor a .gguf file", "give the folder that holds it"
        )
    names = sorted(each.name for each in path.iterdir())
    ggufs = [name for name in names if name.endswith(".gguf")]
    has_config = "config.json" in names
    has_safetensors = any(name.endswith(".safetensors") for name in names)
    if config.load_format == "dummy" and has_config:
        return ResolvedModel(path, "hf")
    if config.load_format != "gguf" and has_config and has_safetensors:
        return ResolvedModel(path, "hf")
    if config.load_format in ("auto", "gguf", "dummy") and ggufs:
        return ResolvedModel(path / _one_gguf(path, ggufs), "gguf")
    if any(name.endswith(PICKLES) for name in names) and not has_safetensors:
        raise _only_pickles(str(path))
    wanted = {"gguf": "a .gguf file", "dummy": "config.json"}.get(
        config.load_format, "config.json with *.safetensors, or a .gguf file"
    )
    raise not_found(
        f"{path} holds no model", f"expected {wanted}, found {_listed(names)}", "check the path and --load-format"
    )


def _one_gguf(folder: Path, names: list[str]) -> str:
    if len(names) > 1:
        raise not_found(f"{folder} holds {len(names)} GGUF files", _listed(names), f"name one: {folder / names[0]}")
    return names[0]


def _only_pickles(where: str) -> StartupError:
    return unsupported(
        f"{where} has its weights only as .bin or .pt files",
        "these are pickles, which can run any code when they are opened, so they are never loaded",
        "convert them to safetensors (huggingface.co/spaces/safetensors/convert), or use a GGUF file",
    )


def _missing_path(path: Path, given: str) -> StartupError:
    parent = path.parent
    while not parent.is_dir():
        parent = parent.parent
    wanted = path.relative_to(parent).parts[0]
    close = _nearest(wanted, (each.name for each in parent.iterdir()))
    fix = f"did you mean {' or '.join(str(parent / name) for name in close)}?" if close else "check the path"
    return not_found(f"no model {given!r}", f"there is no file or folder of that name in {parent.resolve()}", fix)


def _nearest(wanted: str, names: Iterable[str]) -> list[str]:
    lowered = {name.lower(): name for name in names}
    return [lowered[each] for each in difflib.get_close_matches(wanted.lower(), lowered, n=2, cutoff=0.6)]


def _listed(names: list[str]) -> str:
    shown = ", ".join(names[:5]) or "nothing"
    return shown + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def _download(config: ModelConfig, repo: str, file: str | None) -> Path:
    """The local folder of a hub repository, or one file of it."""
    import huggingface_hub
    from huggingface_hub import errors

    revision, cache = config.revision or None, config.download_dir or None
    try:
        if file is not None:
            return Path(huggingface_hub.hf_hub_download(repo, file, revision=revision, cache_dir=cache))
        patterns = ["*.gguf"] if config.load_format == "gguf" else list(SAFETENSORS_PATTERNS)
        if config.load_format == "dummy":
            patterns.remove("*.safetensors")
        return Path(
            huggingface_hub.snapshot_download(repo, revision=revision, cache_dir=cache, allow_patterns=patterns)
        )
    except errors.GatedRepoError as error:
        raise not_found(
            f"no access to {repo}", _reason(error), "accept its terms on its page, then set HF_TOKEN"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise not_found(f"no revision {config.revision!r} of {repo}", _reason(error), "check --revision") from error
    except errors.RepositoryNotFoundError as error:
        raise _no_repository(repo, _reason(error)) from error
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled) as error:
        why = "it is not in the local cache, and the hub is offline or out of reach"
        raise _no_repository(repo, why) from error
    except (errors.HfHubHTTPError, errors.HFValidationError, errors.EntryNotFoundError) as error:
        raise not_found(f"{repo} cannot be downloaded", _reason(error), "check the name, or try again later") from error
    except OSError as error:
        raise not_found(
            f"{repo} cannot be downloaded", _reason(error), "check the network and the free disk space"
        ) from error


def _no_repository(repo: str, why: str) -> StartupError:
    """Suggests what lies here under a similar name: a folder, or a model downloaded before."""
    names = [each.name for each in Path().iterdir()] if "/" not in repo else []
    close = _nearest(repo, [*names, *_cached_repositories()])
    fix = f"did you mean {' or '.join(close)}?" if close else "check the name; a local folder is given by its path"
    return not_found(f"no model {repo!r}", why, fix)


def _cached_repositories() -> list[str]:
    from huggingface_hub import constants

    cache = Path(constants.HF_HUB_CACHE)
    found = cache.glob("models--*") if cache.is_dir() else []
    return [each.name.removeprefix("models--").replace("--", "/") for each in found]


def _reason(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0][:200] if lines else type(error).__name__
