"""Tables of docs/api.md, from the OpenAPI document of the server: routes, bodies, errors."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Any

from clif.config import config_from_tree
from clif.frontend.app import make_app
from clif.frontend.auth import ADMIN, OPEN
from clif.frontend.errors import TYPES
from clif.frontend.openapi import ALWAYS, REASONS
from clif.frontend.route_parts import Parts
from clif.models.bytes_tokenizer import byte_tokenizer

TAGS = {"serving": "serving", "models": "models", "training": "files jobs", "operation": "operation"}
"""Tags of the routes of each table."""
BOUNDS = {"minimum": "from", "exclusiveMinimum": "above", "maximum": "to", "exclusiveMaximum": "below"}
SENTINEL = 2**62
"""Bounds of any integer are none."""


@cache
def document() -> dict[str, Any]:
    config = config_from_tree({"model": {"path": "any"}, "serve": {"http": {"port": 0}}})
    # No route is called: none needs a connection.
    return make_app(Parts(config, None, byte_tokenizer(512))).openapi()  # type: ignore[arg-type]


def operations(group: str) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """(method, path, operation) of a group of routes."""
    for path, methods in document()["paths"].items():
        for method, operation in methods.items():
            if operation["tags"][0] in TAGS[group].split():
                yield method.upper(), path, operation


def routes_table(group: str) -> Iterator[str]:
    yield "| route | key | does | parameters | errors besides |"
    yield "|---|---|---|---|---|"
    for method, path, operation in operations(group):
        names = [f"`{one['name']}`" for one in operation.get("parameters", [])]
        body = operation.get("requestBody", {}).get("content", {})
        names += ["a form, below" if "multipart/form-data" in body else "a body, below"] if body else []
        errors = sorted({int(status) for status in operation["responses"]} - {200, *ALWAYS})
        cells = [f"`{method} {path}`", key_of(path), text(operation), ", ".join(names) or "-"]
        yield f"| {' | '.join(cells)} | {', '.join(map(str, errors)) or '-'} |"


def bodies_tables(group: str) -> Iterator[str]:
    """What each body may have, and what of OpenAI's protocol is refused."""
    first = True
    for method, path, operation in operations(group):
        for content in operation.get("requestBody", {}).get("content", {}).values():
            yield from ([] if first else [""])
            first = False
            yield from (f"### `{method} {path}`", "", "| name | value | meaning |", "|---|---|---|")
            schema = content["schema"]
            for name, field in schema["properties"].items():
                needed = "required" if name in schema.get("required", ()) else ""
                yield f"| `{name}` | {'; '.join(filter(None, (value(field), needed)))} | {text(field) or '-'} |"
        refused = operation.get("requestBody", {}).get("x-not-offered")
        if refused:
            yield ""
            yield "Refused by name: " + "; ".join(f"`{name}` ({why})" for name, why in refused.items()) + "."


def errors_table(_: str) -> Iterator[str]:
    yield "| status | type | when |"
    yield "|---|---|---|"
    for status, reason in REASONS.items():
        yield f"| {status} | `{TYPES[status]}` | {reason} |"


def key_of(path: str) -> str:
    if path in OPEN:
        return "none"
    return "admin" if path.startswith(ADMIN) else "any"


def text(of: dict[str, Any]) -> str:
    return " ".join(of.get("description", "").split()).replace("|", "\\|")


def value(schema: dict[str, Any]) -> str:
    """The values of a field, in words."""
    if "$ref" in schema:
        return f"object `{schema['$ref'].rpartition('/')[2]}`"
    kinds = schema.get("anyOf") or schema.get("oneOf")
    if kinds:
        return " or ".join(dict.fromkeys(value(kind) for kind in kinds if kind.get("type") != "null")) or "null"
    if "const" in schema or "enum" in schema:
        return " or ".join(
            f"`{one}`".replace("True", "true").replace("False", "false")
            for one in schema.get("enum", [schema.get("const")])
        )
    if schema.get("type") == "array":
        return "empty list" if schema.get("maxItems") == 0 else f"list of {value(schema.get('items', {}))}"
    found = [f"{word} {schema[name]:g}" for name, word in BOUNDS.items() if abs(schema.get(name, SENTINEL)) < SENTINEL]
    longest = [f"at most {schema['maxLength']} characters"] if "maxLength" in schema else []
    return " ".join([schema.get("type", "any"), ", ".join(found + longest)]).strip()
