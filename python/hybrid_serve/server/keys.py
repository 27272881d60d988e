"""API keys: who may do what, and how much. Knows no header and no route."""

from __future__ import annotations

import hashlib
import hmac
import logging
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from time import monotonic
from typing import Annotated, Literal

import msgspec
import yaml
from msgspec import Meta

from .. import logging as log_lines
from ..config import ServerConfig
from ..errors import StartupError
from .errors import ApiError
from .key_use import KeyUse, Use

MAX_FILE_BYTES = 2**20
log = logging.getLogger(__name__)

Scope = Literal["infer", "metrics", "admin"]
CLIENT: frozenset[Scope] = frozenset(("infer", "metrics"))
EVERYTHING: frozenset[Scope] = frozenset(("infer", "metrics", "admin"))


@dataclass(frozen=True)
class Key:
    """What one key allows; never the key itself."""

    name: str
    digest: bytes  # SHA-256 of the key
    scopes: frozenset[Scope] = CLIENT
    requests_per_minute: int = 0  # 0: no limit
    tokens_per_minute: int = 0  # of prompts and replies; 0: no limit
    max_concurrent: int = 0  # requests at once; 0: no limit
    models: frozenset[str] = frozenset()  # that it may name; none: all
    priority: int = 0  # is added to what its requests say: lower comes first
    weight: float = 1.0  # its share where keys take turns

    @property
    def per_minute(self) -> tuple[int, int]:
        return self.requests_per_minute, self.tokens_per_minute

    @property
    def is_limited(self) -> bool:
        return any((*self.per_minute, self.max_concurrent))


class Entry(msgspec.Struct, forbid_unknown_fields=True):
    """One key as the key file has it."""

    name: Annotated[str, Meta(pattern="^[A-Za-z0-9_.-]{1,64}$")]
    key: str = ""
    sha256: Annotated[str, Meta(pattern="^([0-9a-fA-F]{64})?$")] = ""
    scopes: tuple[Scope, ...] = ("infer",)
    requests_per_minute: Annotated[int, Meta(ge=0, le=10**9)] = 0
    tokens_per_minute: Annotated[int, Meta(ge=0, le=10**12)] = 0
    max_concurrent: Annotated[int, Meta(ge=0, le=10**9)] = 0
    models: tuple[str, ...] = ()
    priority: Annotated[int, Meta(ge=-1000, le=1000)] = 0
    weight: Annotated[float, Meta(ge=0.01, le=100)] = 1.0

    def to_key(self) -> Key:
        if bool(self.key) == bool(self.sha256):
            raise ValueError(f"{self.name} needs either key or sha256")
        if not self.key.isascii() or any(char.isspace() for char in self.key):
            raise ValueError(f"{self.name} has a key with a space or a non-ASCII character, which no header can carry")
        digest = bytes.fromhex(self.sha256) if self.sha256 else digest_of(self.key.encode())
        per_minute = self.requests_per_minute, self.tokens_per_minute
        limits = (*per_minute, self.max_concurrent)
        return Key(
            self.name, digest, frozenset(self.scopes), *limits, frozenset(self.models), self.priority, self.weight
        )


def digest_of(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()


def keys_of_options(config: ServerConfig) -> list[Key]:
    """The keys of --api-key and --admin-api-key."""
    found = [Key(f"api-key-{i}", digest_of(key.encode())) for i, key in enumerate(config.api_key, 1)]
    admins = enumerate(config.admin_api_key, 1)
    return found + [Key(f"admin-api-key-{i}", digest_of(key.encode()), EVERYTHING) for i, key in admins]


def read_key_file(path: Path) -> list[Key]:
    """The keys of a YAML (or JSON) list of entries. Raises ValueError or OSError, whose text has no key in it."""
    data = path.read_bytes()
    if len(data) > MAX_FILE_BYTES:
        raise ValueError(f"it has {len(data)} bytes, at most {MAX_FILE_BYTES} are read")
    try:
        # Texts only: a key of digits is no number.
        entries = msgspec.convert(yaml.load(data, yaml.BaseLoader) or [], list[Entry], strict=False)
    except yaml.YAMLError as error:  # its text would quote the line
        mark = getattr(error, "problem_mark", None)
        raise ValueError(f"it is not YAML, line {mark.line + 1}" if mark else "it is not YAML") from None
    except msgspec.ValidationError as error:
        raise ValueError(str(error)) from None
    keys = [entry.to_key() for entry in entries]
    log_lines.hide(entry.key for entry in entries)
    for what, values in (("name", [key.name for key in keys]), ("key", [key.digest for key in keys])):
        if len(set(values)) < len(values):
            raise ValueError(f"two entries have the same {what}")
    return keys


class KeyRing:
    """The keys of this moment, and whether they may go on. What they have used is ``KeyUse``'s, by name, so that it
    outlives a reload.

    Keys are kept and compared as SHA-256 digests, all of them every time, so that time tells nothing (ADV-41).
    """

    def __init__(self, fixed: Iterable[Key], use: KeyUse, file: Path | None = None) -> None:
        """Raises what ``read_key_file`` does."""
        self._fixed, self._use, self.file = list(fixed), use, file
        self._keys: list[Key] = []
        self.reload()

    def reload(self) -> None:
        """Reads the file again. Raises what ``read_key_file`` does, and keeps the keys as they were."""
        self._keys = self._fixed + (read_key_file(self.file) if self.file else [])

    def find(self, candidates: Iterable[bytes]) -> Key | None:
        """The key that one of the candidates is."""
        found: Key | None = None
        for candidate in candidates:
            digest = digest_of(candidate)
            for key in self._keys:
                if hmac.compare_digest(digest, key.digest):
                    found = key
        return found

    def begin(self, key: Key) -> None:
        """Counts a request that begins. Raises ``ApiError`` (429), with the seconds to wait, if it may not."""
        if not key.is_limited:
            return
        use, is_counted = self._use.begin(key.name, key.per_minute, key.max_concurrent, monotonic())
        if is_counted:
            return
        if key.max_concurrent and use.num_running >= key.max_concurrent:
            text = f"{use.num_running} requests of this key run, {key.max_concurrent} may."
            raise ApiError("too_many_concurrent_requests", text)
        waits = [
            (math.ceil(_seconds_to(1, left, full)), what, full) for left, what, full in _buckets(key, use) if left < 1
        ]
        seconds, what, full = max(waits)
        raise ApiError("rate_limit_exceeded", f"This key has {full} {what} a minute.", retry_after=seconds)

    def end(self, key: Key) -> None:
        """The request that ``begin`` counted is over."""
        if key.is_limited:
            self._use.end(key.name, monotonic())

    def spend(self, key: Key, tokens: int) -> None:
        """Tokens of a prompt and its replies, once they are known."""
        if key.tokens_per_minute:
            self._use.spend(key.name, key.per_minute, tokens, monotonic())

    def headers(self, key: Key) -> list[tuple[bytes, bytes]]:
        """What OpenAI's clients look at; nothing for a key without a limit."""
        if not any(key.per_minute):
            return []
        found = []
        for left, what, full in _buckets(key, self._use.look(key.name, key.per_minute, monotonic())):
            found += [
                (b"x-ratelimit-limit-" + what.encode(), b"%d" % full),
                (b"x-ratelimit-remaining-" + what.encode(), b"%d" % max(0.0, left)),
                (b"x-ratelimit-reset-" + what.encode(), b"%.1fs" % _seconds_to(full, left, full)),
            ]
        return found


def _buckets(key: Key, use: Use) -> list[tuple[float, str, int]]:
    """(what is left, of what, of how many) of those that have a limit."""
    requests, tokens = key.per_minute
    both = [(use.requests_left, "requests", requests), (use.tokens_left, "tokens", tokens)]
    return [each for each in both if each[2]]


def _seconds_to(wanted: float, left: float, per_minute: int) -> float:
    return max(0.0, wanted - left) * 60 / per_minute


def key_ring(config: ServerConfig, use: KeyUse) -> KeyRing | None:
    """None where no key is asked for. Raises StartupError (HS-E042, HS-E044)."""
    if not config.asks_for_keys:
        return None
    fixed, file = keys_of_options(config), Path(config.api_key_file) if config.api_key_file else None
    try:
        if file is not None:
            _check_mode(file)
        return KeyRing(fixed, use, file)
    except (ValueError, OSError) as error:
        why = str(error.strerror) if isinstance(error, OSError) else str(error)
        what, fix = f"key file {config.api_key_file} cannot be used", "docs/security.md has an example"
        raise StartupError("HS-E042", what, why, fix) from error


def _check_mode(file: Path) -> None:
    mode = file.stat().st_mode & 0o777
    if mode & 0o022:
        why = f"others can write to it (mode {mode:o}) and let themselves in"
        raise StartupError("HS-E044", f"key file {file} is not safe", why, f"chmod 600 {file}")
    if mode & 0o004:
        log.warning("every user of this machine can read the key file %s (mode %o)", file, mode)
