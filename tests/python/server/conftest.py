"""One API server a test."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from api_harness import Api


@pytest.fixture
def make_api() -> Iterator[Callable[..., Api]]:
    """Makes servers that end with the test."""
    made: list[Api] = []

    def make(*args: object, **kwargs: object) -> Api:
        made.append(Api(*args, **kwargs))  # type: ignore[arg-type]
        return made[-1]

    yield make
    for api in made:
        api.close()


@pytest.fixture
def api(make_api: Callable[..., Api]) -> Api:
    return make_api()
