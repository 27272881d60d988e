"""The shelf without a supervisor around it: real keepers, API servers that a test speaks for (P9)."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import zmq

from hybrid_serve.config import Config, ModelConfig, RoutingConfig
from hybrid_serve.launch import shelf as shelf_module
from hybrid_serve.launch.shelf import Shelf
from hybrid_serve.served import ServedModel
from hybrid_serve.wire import Kind, ModelState, Order, Use, pack, unpack

API = b"api-0"
PATIENCE = 60.0


class Told:
    """A shelf of fake models, and what it says of them."""

    def __init__(self, directory: Path, *models: str) -> None:
        config = Config(routing=RoutingConfig(models="models.yaml", max_loaded_models=1))
        served = [
            ServedModel(name=f"m{index}", config=Config(model=ModelConfig(model=model)), first_engine=index)
            for index, model in enumerate(models)
        ]
        self.shelf = Shelf(config, served, directory, "fake_executor:load")
        self.poller, self.news = zmq.Poller(), list[tuple[str, str]]()
        self.open: set[str] = set()  # models that are not let go when they are drained
        self.shelf.register(self.poller)
        self.shelf.on_news = self._take
        self.shelf.greet(API)

    def _take(self, message: list[Any]) -> None:
        state = unpack(message[1], ModelState)
        self.news.append((state.name, state.phase))
        if state.phase == "draining" and state.name not in self.open:
            self.use(state.name, drain=state.drain)

    def use(self, name: str, **what: Any) -> None:
        self.shelf.take(API, Kind.USE, pack(Kind.USE, Use(name, **what))[1])

    def order(self, name: str, *, is_load: bool) -> None:
        self.shelf.take(API, Kind.ORDER, pack(Kind.ORDER, Order(name, is_load))[1])

    def wait(self, *news: tuple[str, str]) -> None:
        end = time.monotonic() + PATIENCE
        while self.news[: len(news)] != list(news):
            assert time.monotonic() < end, self.news
            self.poller.poll(100)
            self.shelf.take_messages()
            self.shelf.look()
        del self.news[: len(news)]


@pytest.fixture
def told(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Told]:
    made = Told(tmp_path, *request.param)
    yield made
    made.shelf.close()


@pytest.mark.parametrize("told", [("fake?refuse=1",)], indirect=True)
def test_a_failed_model_is_tried_again_after_a_while_if_somebody_waits(
    told: Told, monkeypatch: pytest.MonkeyPatch
) -> None:
    told.use("m0", is_waited_for=True)
    told.wait(("m0", "loading"), ("m0", "failed"))
    told.shelf.look()
    assert told.news == [], "30 seconds have not passed"
    told.order("m0", is_load=True)
    told.wait(("m0", "unloaded"), ("m0", "loading"))
    monkeypatch.setattr(shelf_module, "RETRY_SECONDS", 0.0)
    told.wait(("m0", "failed"), ("m0", "unloaded"), ("m0", "loading"))


@pytest.mark.parametrize("told", [("fake", "fake")], indirect=True)
def test_a_model_that_nobody_waits_for_any_more_is_not_loaded(told: Told) -> None:
    told.order("m0", is_load=True)
    told.use("m1", is_waited_for=True)
    told.use("m1")
    told.wait(("m0", "loading"), ("m0", "ready"))
    told.shelf.look()
    assert told.news == []
    told.use("m1", is_waited_for=True)
    told.wait(("m0", "draining"), ("m0", "unloaded"), ("m1", "loading"), ("m1", "ready"))


@pytest.mark.parametrize("told", [("fake", "fake")], indirect=True)
def test_what_is_ordered_away_while_it_is_loaded_goes_when_it_has_served_who_waited(told: Told) -> None:
    told.use("m0", is_waited_for=True)
    told.order("m0", is_load=False)
    told.wait(("m0", "loading"), ("m0", "ready"))
    told.shelf.look()
    assert told.news == []
    told.open.add("m0")
    told.use("m0", is_open=True)
    told.wait(("m0", "draining"))
    assert told.news == [], "a request is open"
    told.use("m0", drain=1)
    told.wait(("m0", "unloaded"))
    told.order("m0", is_load=False)
    told.wait(("m0", "unloaded"))


@pytest.mark.parametrize("told", [("fake",)], indirect=True)
def test_what_an_api_server_says_of_an_unknown_model_is_refused(told: Told) -> None:
    with pytest.raises(ValueError, match="no model 'm7'"):
        told.use("m7", is_open=True)
