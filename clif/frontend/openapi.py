"""Completes the OpenAPI document: keys, errors of every route, and what the answers are that no class describes."""

from __future__ import annotations

from typing import Any

from clif.frontend.auth import ADMIN, OPEN
from clif.frontend.errors import TYPES

ERROR = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string", "enum": sorted({*TYPES.values()})},
                "param": {"type": ["string", "null"], "description": "The argument that is to change."},
                "code": {"type": ["string", "null"], "description": "For programs."},
            },
        }
    },
}
REASONS = {
    400: "What is asked for is wrong; param names it.",
    401: "No key, or a wrong one.",
    403: "The key does not suffice.",
    404: "There is no such thing, or it belongs to another key.",
    405: "The route has other methods.",
    408: "No byte of the body came for serve.http.stall_s.",
    409: "It does not fit the present state.",
    413: "The body is too long: serve.http.max_body_mib, for files serve.http.max_file_mib; or JSON of too many parts.",
    415: "The body must be JSON.",
    429: "A quota of the key, or a bound of the section jobs; Retry-After says when to come again.",
    500: "The server failed; its log says more.",
    503: "No request is accepted now, or too many wait; Retry-After says when to come again.",
    504: "No whole answer came within serve.http.timeout_s.",
    507: "The disk has no room for the file: fewer than jobs.min_free_gib would be left.",
}
ALWAYS = (401, 403, 429, 500, 503)
WITH_BODY = (400, 408, 413, 415)
EVENTS = "text/event-stream"
CONTENT = {
    "/metrics": "text/plain",
    "/admin/live": EVENTS,
    "/v1/files/{file_id}/content": "application/octet-stream",
}
"""Content of answers that are not JSON."""
STREAMED = ("/v1/chat/completions", "/v1/completions", "/v1/responses")
"""Their answers are events where the body says stream=true."""
COUNT = {"type": "integer", "minimum": 0}
USAGE = {
    "type": "object",
    "required": ["total_tokens"],
    "additionalProperties": {},
    "properties": {"total_tokens": COUNT},
}


def answer(kind: str, parts: str) -> dict[str, Any]:
    """The schema of an answer: what all of them have, and the list of its parts."""
    return {
        "type": "object",
        "required": ["id", "object", "model", parts, "usage"],
        "properties": {
            "id": {"type": "string"},
            "object": {"type": "string", "enum": [kind]},
            "model": {"type": "string", "description": "The version that answered."},
            parts: {"type": "array", "items": {"type": "object"}},
            "usage": USAGE,
        },
    }


ANSWERS = {
    "/v1/chat/completions": answer("chat.completion", "choices"),
    "/v1/completions": answer("text_completion", "choices"),
    "/v1/responses": answer("response", "output"),
}


def complete(document: dict[str, Any]) -> dict[str, Any]:
    """The same document, completed."""
    parts = document.setdefault("components", {})
    schemas = parts.setdefault("schemas", {})
    for name in ("HTTPValidationError", "ValidationError"):
        schemas.pop(name, None)
    schemas["Error"] = ERROR
    parts["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            operation["security"] = [] if path in OPEN else [{"key": []}]
            complete_operation(path, method, operation)
    return document


def complete_operation(path: str, method: str, operation: dict[str, Any]) -> None:
    responses = operation["responses"]
    responses.pop("422", None)
    if path in CONTENT:
        responses["200"]["content"] = {CONTENT[path]: {}}
    if path in STREAMED:
        responses["200"]["content"] = {
            "application/json": {"schema": ANSWERS[path]},
            EVENTS: {},
        }
        responses["200"]["headers"] = {
            "x-clif-version": {"description": "The version that answered.", "schema": {"type": "string"}}
        }
    for status in errors_of(path, method, operation):
        content = {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}}
        responses.setdefault(str(status), {"description": REASONS[status], "content": content})


def errors_of(path: str, method: str, operation: dict[str, Any]) -> list[int]:
    """Statuses that this operation may answer with, besides 200."""
    if path in OPEN:
        return [503] if path == "/ready" else []
    found = {*ALWAYS, 400}
    if operation.get("requestBody"):
        found |= {*WITH_BODY}
    if "{" in path or path in STREAMED or operation.get("parameters") or "feedback" in path or "token" in path:
        found |= {404}
    if method != "get" and (path.startswith(("/v1/files", "/v1/fine_tuning", ADMIN))):
        found |= {404, 409}
    if path == "/v1/files" and method == "post":
        found |= {507}
    if path in STREAMED:
        found |= {409, 504}
    return sorted(found)
