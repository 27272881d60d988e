"""The description of the routes, from the same Structs that validate requests (OpenAPI 3.1)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Protocol

import msgspec

from .. import __version__
from .answers import Alive, ErrorBody, Load, ModelCard, ModelList, Ready, Version
from .endpoints.admin import ConfigChanges, LiveConfig
from .errors import CATALOGUE
from .timeline import Timeline

_REF = "#/components/schemas/{name}"
_GET_ROUTES: tuple[tuple[str, str, type[msgspec.Struct] | None], ...] = (
    ("/v1/models", "Names of the served models", ModelList),
    ("/v1/models/{id}", "One of these names", ModelCard),
    ("/v1/requests/{id}/timeline", "Where the time of a request went, by the id of its x-request-id", Timeline),
    ("/live", "The process answers", Alive),
    ("/ready", "200 if a request would be taken now, else 503", Ready),
    ("/health", "The same as /ready", Ready),
    ("/load", "How much there is to do, for balancers", Load),
    ("/version", "The server's version", Version),
    ("/metrics", "Prometheus text", None),
    ("/admin/config", "What of the configuration can be changed now", LiveConfig),
)
# Without a body.
_ORDERS = (
    ("/v1/models/{id}/load", "Load one of several models, answered when it is there"),
    ("/v1/models/{id}/unload", "Let the requests of one of several models end and put it away, answered when it is"),
)
_PUBLIC = ("/live", "/ready", "/health")


class DescribedRoute(Protocol):
    """What of a POST route is described."""

    @property
    def path(self) -> str: ...
    @property
    def handler(self) -> Any: ...
    @property
    def request(self) -> type[msgspec.Struct]: ...
    @property
    def response(self) -> type[msgspec.Struct]: ...
    @property
    def generates(self) -> bool: ...


def openapi(routes: Iterable[DescribedRoute]) -> dict[str, Any]:
    """The whole document."""
    routes = list(routes)
    structs: list[type[msgspec.Struct]] = [ErrorBody]
    for route in routes:
        structs += (route.request, route.response)
    structs.append(ConfigChanges)
    structs += [struct for _, _, struct in _GET_ROUTES if struct is not None]
    _, schemas = msgspec.json.schema_components(structs, ref_template=_REF)
    paths = {route.path: {"post": _post(route)} for route in routes}
    paths |= {path: {"get": _get(path, summary, struct)} for path, summary, struct in _GET_ROUTES}
    for path, summary in _ORDERS:
        paths[path] = {"post": {**_get(path, summary, ModelCard), "operationId": path.rpartition("/")[2] + "_model"}}
    paths["/admin/config"]["patch"] = _patch("Change some of it; all or nothing", ConfigChanges, LiveConfig)
    return {
        "openapi": "3.1.0",
        "info": {"title": "hybrid-serve", "version": __version__},
        "paths": paths,
        "components": {
            "schemas": schemas,
            "securitySchemes": {"bearer": {"type": "http", "scheme": "bearer"}},
        },
        "security": [{"bearer": []}],
    }


def _post(route: DescribedRoute) -> dict[str, Any]:
    content: dict[str, Any] = {"application/json": {"schema": _ref(route.response)}}
    if route.generates:
        content["text/event-stream"] = {"schema": {"type": "string"}}
    responses = {"200": {"description": "The answer", "content": content}}
    for status in sorted({status for status, _, _ in CATALOGUE.values()} - {408, 431}):
        responses[str(status)] = _error(status)
    return {
        "operationId": route.handler.__name__,
        "summary": (route.handler.__doc__ or route.path).strip().splitlines()[0],
        "requestBody": {"required": True, "content": {"application/json": {"schema": _ref(route.request)}}},
        "responses": responses,
    }


def _patch(summary: str, request: type[msgspec.Struct], response: type[msgspec.Struct]) -> dict[str, Any]:
    answered = {"description": summary, "content": {"application/json": {"schema": _ref(response)}}}
    return {
        "operationId": "patch_admin_config",
        "summary": summary,
        "requestBody": {"required": True, "content": {"application/json": {"schema": _ref(request)}}},
        "responses": {"200": answered, **{str(status): _error(status) for status in (400, 401, 403, 413, 415)}},
    }


def _get(path: str, summary: str, struct: type[msgspec.Struct] | None) -> dict[str, Any]:
    name = path.strip("/").replace("/", "_").replace("{", "").replace("}", "").replace("v1_", "")
    content = (
        {"text/plain": {"schema": {"type": "string"}}}
        if struct is None
        else {"application/json": {"schema": _ref(struct)}}
    )
    responses: dict[str, Any] = {"200": {"description": summary, "content": content}}
    if struct is Ready:
        responses["503"] = {"description": "Not ready", "content": content}
    elif path not in _PUBLIC:
        responses["401"] = _error(401)
    operation: dict[str, Any] = {"operationId": f"get_{name}", "summary": summary, "responses": responses}
    if "{id}" in path:
        schema = {"type": "string"}
        operation["parameters"] = [{"name": "id", "in": "path", "required": True, "schema": schema}]
        responses["404"] = _error(404)
    if path in _PUBLIC:
        operation["security"] = []
    return operation


def _error(status: int) -> dict[str, Any]:
    codes = ", ".join(code for code, (of, _, _) in CATALOGUE.items() if of == status)
    return {"description": codes, "content": {"application/json": {"schema": _ref(ErrorBody)}}}


def _ref(struct: type[msgspec.Struct]) -> dict[str, str]:
    return {"$ref": _REF.format(name=struct.__name__)}
