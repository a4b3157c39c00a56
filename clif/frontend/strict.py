"""Bodies of requests: JSON of exactly the types and names that a route documents."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from starlette.requests import Request

from clif.frontend.errors import ApiError, invalid

SHOWN = 32
"""Errors of a body that are looked at: it may hold any number."""
REFERENCE = "#/components/schemas/{model}"
LARGE = 2**16
MOST_MEMBERS, MOST_ENTRIES = 2**14, 2**18
"""Bodies of more bytes than LARGE have no more names and no more values: no other client's token waits while one is
read. A byte of text is no matter; a million of objects takes seconds."""
_STRING = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"?', re.DOTALL)
T = TypeVar("T")
Many = Annotated[list[T], Field(fail_fast=True)]
"""A list whose first mistake is looked at alone."""


class Strict(BaseModel):
    """Base of all bodies. An unknown name is refused, and so is a value of another type: "1" is no number.

    NOT_OFFERED: names of OpenAI's protocol that are refused, or of which few values are taken, with the reason. Those
    of parts are written as messages[].name.
    """

    model_config = ConfigDict(
        extra="forbid",
        strict=True,
        frozen=True,
        allow_inf_nan=False,
        protected_namespaces=(),
        use_attribute_docstrings=True,
    )
    NOT_OFFERED: ClassVar[Mapping[str, str]] = {}


Body = TypeVar("Body", bound=Strict)


async def read_body(request: Request, model: type[Body]) -> Body:
    """The body of a request. Raises ApiError."""
    kind = request.headers.get("content-type", "application/json")
    if not kind.startswith("application/json"):
        raise ApiError(415, "the body must be JSON: send it with the header Content-Type: application/json")
    return parse(model, await request.body())


def parse(model: type[Body], body: bytes) -> Body:
    """Raises ApiError, which names the first thing that is wrong."""
    check_parts(body)
    try:
        return model.model_validate_json(body or b"{}")
    except ValidationError as error:
        # The values are the client's own: the sentence leaves them out.
        raise refusal(model, body, error.errors(include_url=False, include_input=False)[:SHOWN]) from None


def check_parts(body: bytes) -> None:
    """Raises ApiError for a body that would take long to read."""
    if len(body) <= LARGE:
        return
    # To leave out millions of strings would take long, too.
    many = body.count(b'"') - body.count(b'\\"') > MOST_ENTRIES
    outside = b"" if many else _STRING.sub(b"", body)
    if many or outside.count(b":") > MOST_MEMBERS or outside.count(b",") > MOST_ENTRIES:
        raise ApiError(
            413, f"more than {MOST_MEMBERS} names or {MOST_ENTRIES} values: send less at once", code="body_too_long"
        )


def refusal(model: type[Strict], body: bytes, errors: Sequence[Any]) -> ApiError:
    """The error that lies deepest, as that tells most of a value that may be of several types."""
    if errors[0]["type"] == "json_invalid":
        return invalid(f"the body is no valid JSON ({errors[0]['ctx']['error']})")
    given = json.loads(body or b"{}")
    paths = [path_of(within(given, error)) for error in errors]
    name = max(paths, key=lambda path: path.count(".") + path.count("["))
    found = [error for error, path in zip(errors, paths, strict=True) if path == name]
    said = " or ".join(dict.fromkeys(error["msg"] for error in found))
    reason = model.NOT_OFFERED.get(re.sub(r"\[\d+\]", "[]", name))
    match found[0]["type"]:
        case "missing":
            return invalid(f"{name} is missing", name, "missing_required_parameter")
        case _ if reason is not None:
            return invalid(f"{name} is not offered: {reason}", name, "unsupported_parameter")
        case "extra_forbidden":
            return invalid(f"unknown parameter: {name}", name, "unknown_parameter")
        case "value_error":
            said = str(found[0]["ctx"]["error"])
    return invalid(f"{name or 'the body'}: {said}", name or None, "invalid_value")


def within(value: Any, error: Any) -> tuple[int | str, ...]:
    """The path of an error in a body, without the names of the types that were tried there."""
    path: list[int | str] = []
    *before, last = error["loc"] or ("",)
    for part in (*before, last):
        inside = part in (value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ())
        if inside:
            value = value[part]
            path.append(part)
    return (*path, last) if error["type"] == "missing" else tuple(path)


def path_of(location: Sequence[int | str]) -> str:
    """As a client would write it: messages[0].content."""
    name = ""
    for part in location:
        name += f"[{part}]" if isinstance(part, int) else f".{part}"
    return name.removeprefix(".")


def documented(model: type[Strict]) -> dict[str, Any]:
    """For a route's openapi_extra: it reads its body by itself, which is faster, and exact about JSON's types."""
    schema = model.model_json_schema(ref_template=REFERENCE)
    body = {"required": True, "content": {"application/json": {"schema": schema}}}
    return {"requestBody": {**body, "x-not-offered": dict(model.NOT_OFFERED)}}


def with_components(document: dict[str, Any]) -> dict[str, Any]:
    """The OpenAPI document, with the parts of bodies where it expects them."""
    found = document.setdefault("components", {}).setdefault("schemas", {})
    for operations in document["paths"].values():
        for operation in operations.values():
            for content in operation.get("requestBody", {}).get("content", {}).values():
                found.update(content["schema"].pop("$defs", {}))
    return document
