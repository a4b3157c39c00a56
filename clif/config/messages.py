"""Turns pydantic's errors into sentences that say what to change."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, get_args

from pydantic import BaseModel

from clif.config.renamed import new_key, new_value

MOST = 20
"""Mistakes that are shown at once."""
SHOWN = 60
"""Characters of a value, or of a name, that are repeated."""


def sentences(errors: Iterable[Any], root: type[BaseModel], where: Callable[[tuple[int | str, ...], str], str]) -> str:
    """The errors of pydantic, a line each. root: the model of the whole tree; where: what to add to a sentence."""
    found = ((error["loc"], sentence(error, root)) for error in errors)
    lines = [said + where(loc, said) for loc, said in found]
    return "\n".join([*lines[:MOST], *([f"and {len(lines) - MOST} more"] if len(lines) > MOST else [])])


def sentence(error: Mapping[str, Any], root: type[BaseModel]) -> str:
    """One error of pydantic as a sentence that says what to change; root: the model of the whole tree."""
    where = ".".join(str(part)[:SHOWN] for part in error["loc"])
    if error["type"] == "extra_forbidden" and (key := new_key(where)):
        return f"{where} is named {key} now: write that"
    if error["type"] in ("literal_error", "enum") and (value := new_value(where, error["input"])):
        return f"{where} {error['input']} is named {value} now: write that"
    if error["type"] == "extra_forbidden":
        return f"unknown key {where}: remove it or correct its spelling ({_known(error['loc'], root)})"
    if error["type"] == "missing":
        return f"{where} is required: add it"
    if error["type"] == "value_error":
        message, loc = str(error["msg"]).removeprefix("Value error, "), error["loc"]
        # The validator of a field does not know the name of its section.
        of_field = len(loc) > 1 and message.startswith(f"{loc[-1]} ")
        return f"{'.'.join(map(str, loc[:-1]))}.{message}" if of_field else message
    return f"{where}: {error['msg']}{_given(error.get('input'))}{_remedy(error)}"


def _given(value: Any) -> str:
    if not isinstance(value, (str, int, float, bool, type(None))):
        return ""
    shown = repr(value)
    return f" (given: {shown if len(shown) <= SHOWN else shown[:SHOWN] + '…'})"


def _remedy(error: Mapping[str, Any]) -> str:
    number = isinstance(error.get("input"), (int, float)) and not isinstance(error.get("input"), bool)
    return ': write it in quotes, as in "2026"' if error["type"] == "string_type" and number else ""


def _known(loc: tuple[Any, ...], root: type[BaseModel]) -> str:
    model: Any = root
    for part in loc[:-1]:
        field = model.model_fields.get(part) if hasattr(model, "model_fields") else None
        model = _section(field.annotation) if field is not None else None
        if not hasattr(model, "model_fields"):
            return "see clif/config/schema.py"
    return "known: " + ", ".join(model.model_fields)


def _section(annotation: Any) -> Any:
    """The section's class, also of an optional section."""
    return next((part for part in get_args(annotation) if hasattr(part, "model_fields")), annotation)
