"""GET /docs: the description of the routes as a page. It needs no script, no other file and no network."""

from __future__ import annotations

import json
from html import escape
from typing import Any

HEADERS = {"content-security-policy": "default-src 'none'; style-src 'unsafe-inline'"}
_STYLE = """body{font:16px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem}
summary{cursor:pointer;padding:.4rem 0}code{background:#8882;padding:.1rem .3rem}
table{border-collapse:collapse;width:100%}td,th{text-align:left;vertical-align:top;padding:.2rem .6rem .2rem 0}"""


def page(document: dict[str, Any]) -> str:
    """``document``: what GET /openapi.json answers."""
    info, schemas = document["info"], document["components"]["schemas"]
    routes = [
        _route(method.upper(), path, operation, schemas)
        for path, methods in document["paths"].items()
        for method, operation in methods.items()
    ]
    title = escape(f"{info['title']} {info['version']}")
    head = f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{title}</title><style>{_STYLE}</style>'
    intro = 'The same for programs: <a href="openapi.json">openapi.json</a>.'
    return f"{head}<h1>{title}</h1><p>{intro}</p>{''.join(routes)}</html>"


def _route(method: str, path: str, operation: dict[str, Any], schemas: dict[str, Any]) -> str:
    key = "" if operation.get("security") != [] else " (needs no key)"
    content = operation.get("requestBody", {}).get("content", {})
    fields = "".join(_fields(_resolved(each["schema"], schemas)) for each in content.values())
    answers = "".join(
        f"<tr><td>{escape(status)}<td>{escape(answer['description'])}"
        for status, answer in operation["responses"].items()
    )
    return (
        f"<details><summary><code>{method} {escape(path)}</code> {escape(operation['summary'])}{key}</summary>"
        f"{fields}<h3>Answers</h3><table>{answers}</table></details>"
    )


def _fields(schema: dict[str, Any]) -> str:
    rows = []
    for name, field in schema.get("properties", {}).items():
        default = "required" if name in schema.get("required", ()) else json.dumps(field.get("default"))
        rows.append(f"<tr><td><code>{escape(name)}</code><td>{escape(_kind(field))}<td>{escape(default)}")
    return f"<h3>Body</h3><table><tr><th>field<th>values<th>default{''.join(rows)}</table>" if rows else ""


def _kind(field: dict[str, Any]) -> str:
    """In words: ``number 0.0 to 2.0 or null``."""
    if "anyOf" in field:
        return " or ".join(_kind(each) for each in field["anyOf"])
    if "$ref" in field:
        return str(field["$ref"]).rpartition("/")[2]
    words = [str(field.get("type", "any"))]
    if "enum" in field:
        words = [", ".join(map(json.dumps, field["enum"]))]
    if field.get("items"):
        words.append(f"of {_kind(field['items'])}")
    low, high = field.get("minimum", field.get("exclusiveMinimum")), field.get("maximum")
    if low is not None:
        words.append(f"{'above' if 'exclusiveMinimum' in field else 'from'} {low}")
    if high is not None:
        words.append(f"to {high}")
    return " ".join(words)


def _resolved(schema: dict[str, Any], schemas: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = schemas[schema["$ref"].rpartition("/")[2]] if "$ref" in schema else schema
    return found
