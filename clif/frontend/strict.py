"""Bodies of requests: JSON of exactly the types and names that a route documents."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError
from starlette.requests import Request

from clif.frontend.errors import ApiError, invalid

REFERENCE = "#/components/schemas/{model}"


class Strict(BaseModel):
    """Base of all bodies. An unknown name is refused, and so is a value of another type: "1" is no number.

    NOT_OFFERED: names of OpenAI's protocol that are refused with a reason.
    """

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False, protected_namespaces=())
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
    try:
        return model.model_validate_json(body or b"{}")
    except ValidationError as error:
        # The values are the client's own: the sentence leaves them out.
        first = error.errors(include_url=False, include_input=False, include_context=True)[0]
        raise _refusal(model, first) from None


def _refusal(model: type[Strict], error: Any) -> ApiError:
    name = path_of(error["loc"])
    match error["type"]:
        case "json_invalid":
            return invalid(f"the body is no valid JSON ({error['ctx']['error']})")
        case "extra_forbidden" if name in model.NOT_OFFERED:
            return invalid(f"{name} is not offered: {model.NOT_OFFERED[name]}", name, "unsupported_parameter")
        case "extra_forbidden":
            return invalid(f"unknown parameter: {name}", name, "unknown_parameter")
        case "missing":
            return invalid(f"{name} is missing", name, "missing_required_parameter")
        case "value_error":
            return invalid(str(error["ctx"]["error"]), name or None, "invalid_value")
    return invalid(f"{name or 'the body'}: {error['msg']}", name or None, "invalid_value")


def path_of(location: tuple[int | str, ...]) -> str:
    """As a client would write it: messages[0].content."""
    name = ""
    for part in location:
        name += f"[{part}]" if isinstance(part, int) else f".{part}"
    return name.removeprefix(".")


def documented(model: type[Strict]) -> dict[str, Any]:
    """For a route's openapi_extra: it reads its body by itself, which is faster, and exact about JSON's types."""
    schema = model.model_json_schema(ref_template=REFERENCE)
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}


def with_components(document: dict[str, Any]) -> dict[str, Any]:
    """The OpenAPI document, with the parts of bodies where it expects them."""
    found = document.setdefault("components", {}).setdefault("schemas", {})
    for operations in document["paths"].values():
        for operation in operations.values():
            for content in operation.get("requestBody", {}).get("content", {}).values():
                found.update(content["schema"].pop("$defs", {}))
    return document
