"""GET /v1/models and /v1/models/{id}; POST /v1/models/{id}/load and /unload."""

from __future__ import annotations

import logging

from msgspec import UNSET

from ..answers import ModelCard, ModelList
from ..context import ServerContext
from ..errors import ApiError
from ..keys import Key
from ..several import Gate

log = logging.getLogger(__name__)


def list_models(context: ServerContext, key: Key | None) -> ModelList:
    return ModelList([_card(context, name) for name in context.names_for(key)])


def get_model(context: ServerContext, name: str, key: Key | None) -> ModelCard:
    """Raises ``ApiError`` (404) that lists the names."""
    return _card(context, context.check_model(name, key))


async def load_model(context: ServerContext, name: str, who: str) -> ModelCard:
    """Load one of several models, as a request of it would."""
    gate = _gate(context, name)
    log.warning("admin: %s loads %s", who, gate.name)
    await gate.load()
    return _card(context, gate.name)


async def unload_model(context: ServerContext, name: str, who: str) -> ModelCard:
    """Let the requests of one of several models end, and put it away."""
    gate = _gate(context, name)
    log.warning("admin: %s puts %s away", who, gate.name)
    await gate.put_away()
    return _card(context, gate.name)


def _gate(context: ServerContext, name: str) -> Gate:
    if context.models is None:
        context.check_model(name)
        raise ApiError("not_found", "This server has one model, which stays loaded; --models serves several.")
    return context.models.gate(name)


def _card(context: ServerContext, name: str) -> ModelCard:
    gate = context.models.gate(name) if context.models is not None else None
    facts = (gate.context if gate else context).client.facts
    limit = facts.max_model_len if facts is not None else None
    root = context.model_names[0] if gate is None else gate.context.config.model.model
    card = ModelCard(id=name, created=context.started, root=root, max_model_len=limit)
    if gate is not None:
        card.state, card.message = gate.state.phase, gate.message or UNSET
    return card
