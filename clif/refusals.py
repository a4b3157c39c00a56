"""What pydantic refuses, said in sentences."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel


def sentence(error: dict[str, Any], root: type[BaseModel]) -> str:
    """One error of pydantic as a sentence that says what to change; root: the model of the whole tree."""
    where = ".".join(str(part) for part in error["loc"])
    if error["type"] == "extra_forbidden":
        return f"unknown key {where}: remove it or correct its spelling ({_known(error['loc'], root)})"
    if error["type"] == "missing":
        return f"{where} is required: add it"
    message = error["msg"].removeprefix("Value error, ")
    given = error.get("input")
    shown = f" (given: {given!r})" if isinstance(given, (str, int, float, bool, type(None))) else ""
    return f"{where}: {message}{shown}" if where and error["type"] != "value_error" else message


def _known(loc: tuple[Any, ...], root: type[BaseModel]) -> str:
    model: Any = root
    for part in loc[:-1]:
        field = model.model_fields.get(part) if hasattr(model, "model_fields") else None
        model = field.annotation if field is not None else None
        if not hasattr(model, "model_fields"):
            return "see clif/config.py"
    return "known: " + ", ".join(model.model_fields)
