"""Lists in parts, and who may see what of them."""

from __future__ import annotations

from typing import Annotated

import msgspec
from fastapi import Query, Request

from clif.frontend.auth import Caller, caller_of
from clif.frontend.errors import ApiError, invalid

MOST, USUAL = 100, 20
Limit = Annotated[int, Query(ge=1, le=MOST, description="Entries at most.")]
After = Annotated[str | None, Query(max_length=64, description="Id of the last entry of the part before.")]


def sees(caller: Caller) -> str | None:
    """What a Caller is shown: everything, or what its own key has created."""
    return None if caller.admin else caller.name


def check_query(request: Request, *names: str) -> Caller:
    """The caller. Raises ApiError for a parameter of the query that the route does not have."""
    for name in request.query_params:
        if name not in names:
            raise invalid(f"unknown parameter: {name}", name, "unknown_parameter")
    return caller_of(request)


def only(name: str, value: str | None, allowed: str) -> None:
    """Raises ApiError for a value that is not the only one there is."""
    if value not in (None, allowed):
        raise invalid(f"{name} is {value!r}: there is only {allowed!r}", name)


class Reply(msgspec.Struct):
    """A part of a list, as the control process sends it."""

    data: list[msgspec.Raw]
    has_more: bool


def not_training() -> ApiError:
    return ApiError(409, "this run does not train (train.enabled is false): it takes no files and no jobs")
