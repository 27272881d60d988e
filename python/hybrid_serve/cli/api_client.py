"""One HTTP connection a request to an OpenAI-compatible server; knows JSON and server-sent events, prints nothing."""

from __future__ import annotations

import http.client
import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlsplit

from .. import __version__
from .usage import UsageError

CONNECT_TIMEOUT = 10.0  # seconds
READ_TIMEOUT = 600.0  # seconds of silence; our server sends a comment line far more often

BROKEN_OFF = "the server closed the connection in the middle of the reply"


class ApiError(Exception):
    """The server cannot be reached, refused, or broke off; one line for the user. ``refused``: it answered with 4xx."""

    def __init__(self, message: str, refused: bool = False) -> None:
        super().__init__(" ".join(message.split()))
        self.refused = refused


class ApiClient:
    """The server at one base URL (".../v1"), with one key ("": none)."""

    def __init__(self, url: str, api_key: str = "") -> None:
        parts = urlsplit(url)
        try:
            self._port = parts.port
        except ValueError:
            raise UsageError(f"--url {url}: the port is not a number from 0 to 65535") from None
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise UsageError(f"--url {url}: must be like http://127.0.0.1:8000/v1")
        if not (api_key.isascii() and api_key.isprintable()):
            raise UsageError("the API key has a character that no HTTP header can carry")
        self._url, self._scheme, self._host, self._path = url, parts.scheme, parts.hostname, parts.path.rstrip("/")
        self._headers = {"Content-Type": "application/json", "User-Agent": f"hybrid-serve/{__version__}"}
        if api_key:
            self._headers["Authorization"] = f"Bearer {api_key}"

    def first_model(self) -> str:
        """The first name that the server lists. Raises ApiError if it lists none."""
        with self._exchange("GET", "/models", None) as response:
            models = _json(response.read())
        try:
            return str(models["data"][0]["id"])
        except (KeyError, IndexError, TypeError):
            raise ApiError(f"{self._url} lists no model, name one with --model-name") from None

    @contextmanager
    def stream(self, path: str, body: bytes) -> Iterator[Iterator[dict[str, Any]]]:
        """The decoded events of a streamed reply, as they come; opened when the first is asked for. Leaving the block
        closes the connection, whatever has been read."""
        events = self._events(path, body)
        try:
            yield events
        finally:
            events.close()

    def _events(self, path: str, body: bytes) -> Any:
        with self._exchange("POST", path, body) as response:
            for line in iter(response.readline, b""):
                if not line.startswith(b"data:"):
                    continue  # a comment that keeps the connection open, or the empty line after an event
                data = line[5:].strip()
                if data == b"[DONE]":
                    return
                event = _json(data)
                if "error" in event:
                    raise ApiError(f"the server broke off: {_message(event)}")
                yield event
        raise ApiError(BROKEN_OFF)

    @contextmanager
    def _exchange(self, method: str, path: str, body: bytes | None) -> Iterator[http.client.HTTPResponse]:
        connect = http.client.HTTPSConnection if self._scheme == "https" else http.client.HTTPConnection
        connection = connect(self._host, self._port, timeout=CONNECT_TIMEOUT)
        try:
            connection.connect()
            connection.sock.settimeout(READ_TIMEOUT)
            connection.request(method, self._path + path, body, self._headers)
            response = connection.getresponse()
            if response.status != 200:
                text = _message(_json(response.read(), response.reason))
                raise ApiError(f"{self._url} answered {response.status}: {text}", refused=400 <= response.status < 500)
            yield response
        except TimeoutError:
            raise ApiError(f"{self._url} does not answer") from None
        except ConnectionRefusedError:
            raise ApiError(f"no server at {self._url} (start one: hybrid-serve serve)") from None
        except http.client.IncompleteRead:
            raise ApiError(BROKEN_OFF) from None
        except (OSError, http.client.HTTPException, UnicodeError) as error:
            raise ApiError(
                f"{self._url}: {getattr(error, 'strerror', None) or error or type(error).__name__}"
            ) from None
        finally:
            connection.close()


def _json(data: bytes, otherwise: str = "something that is not JSON") -> dict[str, Any]:
    """An object. Anything else, such as a proxy's HTML page, becomes an error object that says ``otherwise``."""
    try:
        value = json.loads(data)
    except ValueError:
        value = None
    return value if isinstance(value, dict) else {"error": {"message": otherwise}}


def _message(body: dict[str, Any]) -> str:
    """OpenAI's error text, or the whole body where it has none."""
    error = body.get("error")
    return str(error["message"]) if isinstance(error, dict) and "message" in error else json.dumps(body)
