"""ADV-05: no field of any request is ever made into an object by a deserialiser that runs code."""

from __future__ import annotations

import base64
import io
import os
import pickle
import sys
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest

from api_harness import COMPLETIONS, MESSAGES, Api
from demo_model import demo_tokenizer
from hybrid_serve.server.app import POST_ROUTES

MakeApi = Callable[..., Api]
WATCHED = {"pickle.find_class", "os.system", "os.posix_spawn", "os.mkdir", "subprocess.Popen"}
_seen: list[str] | None = None  # while somebody looks


def _hook(event: str, _: object) -> None:
    if _seen is not None and event in WATCHED:
        _seen.append(event)


@contextmanager
def audited() -> Iterator[list[str]]:
    """What the interpreter was told to do of the things that such an object would do. A hook can never be taken off."""
    global _seen
    if _hook not in _hooks:
        sys.addaudithook(_hook)
        _hooks.append(_hook)
    found: list[str] = []
    _seen = found
    try:
        yield found
    finally:
        _seen = None


_hooks: list[Callable[[str, object], None]] = []


class Bomb:
    """Unpickled, it makes a folder."""

    def __init__(self, folder: Path) -> None:
        self._folder = str(folder)

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (self._folder,)


def payloads(folder: Path) -> dict[str, str]:
    """As clients of servers with such a hole send them: text, of a pickle and of what torch.save writes."""
    pickled = pickle.dumps(Bomb(folder))
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("archive/data.pkl", pickled)
        file.writestr("archive/version", "3\n")
    return {"pickle": base64.b64encode(pickled).decode(), "torch": base64.b64encode(archive.getvalue()).decode()}


def bodies(payload: str) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """(path, where, body): the payload in every field of every schema, and wherever a schema leaves room below one."""
    whole: dict[str, dict[str, Any]] = {
        "/v1/chat/completions": {"messages": MESSAGES},
        "/v1/completions": {"prompt": "hi"},
        "/tokenize": {"prompt": "hi"},
        "/detokenize": {"tokens": [1, 2]},
    }
    for route in POST_ROUTES:
        for field in msgspec.structs.fields(route.request):
            values: list[Any] = [payload, [payload], {"data": payload}, {"__reduce__": payload, "py/reduce": [payload]}]
            for value in values:
                yield route.path, field.encode_name, whole[route.path] | {field.encode_name: value}
        yield route.path, "an unknown field", whole[route.path] | {"custom_logit_processor": payload}
    for name in ("content", "name", "reasoning", "tool_calls", "function_call", "audio", "role"):
        values = [payload, [{"type": "text", "text": payload}], {"data": payload}]
        for value in values:
            yield "/v1/chat/completions", f"messages.{name}", {"messages": [MESSAGES[0] | {name: value}]}


def test_the_payload_of_this_test_does_harm_where_it_is_loaded(tmp_path: Path) -> None:
    made = base64.b64decode(payloads(tmp_path / "made")["pickle"])
    with audited() as seen:
        pickle.loads(made)
    assert (tmp_path / "made").is_dir()
    assert seen == ["pickle.find_class", "os.mkdir"]


@pytest.mark.parametrize("kind", ["pickle", "torch"])
def test_a_serialised_object_in_any_field_is_refused_or_a_plain_text(
    make_api: MakeApi, tmp_path: Path, kind: str
) -> None:
    api = make_api()
    payload = payloads(tmp_path / "made")[kind]
    statuses: dict[int, int] = {}
    with audited() as seen:
        for path, where, body in bodies(payload):
            status = api.post(path, body).status_code
            assert status in (200, 400, 404), (path, where, status)
            statuses[status] = statuses.get(status, 0) + 1
    assert seen == []
    assert not (tmp_path / "made").exists()
    assert statuses[400] > 100, "most fields are no texts"
    assert statuses[200] > 4, "and some are"


def test_a_serialised_object_as_a_prompt_is_its_characters(make_api: MakeApi, tmp_path: Path) -> None:
    api = make_api()
    payload = payloads(tmp_path / "m")["pickle"][:100]
    assert api.post(COMPLETIONS, {"prompt": payload, "max_tokens": 1}).status_code == 200
    assert demo_tokenizer().decode(api.engine.calls[-1].token_ids) == payload
