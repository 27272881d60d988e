"""GET /v1/models and /v1/models/{id}."""

from __future__ import annotations

from ..answers import ModelCard, ModelList
from ..context import ServerContext


def list_models(context: ServerContext) -> ModelList:
    return ModelList([_card(context, name) for name in context.model_names])


def get_model(context: ServerContext, name: str) -> ModelCard:
    """Raises ``ApiError`` (404) that lists the names."""
    return _card(context, context.check_model(name))


def _card(context: ServerContext, name: str) -> ModelCard:
    facts = context.client.facts
    limit = facts.max_model_len if facts is not None else None
    return ModelCard(id=name, created=context.started, root=context.model_names[0], max_model_len=limit)
