"""The fields of the configuration, as the code has them."""

from __future__ import annotations

from typing import Any, get_args

from clif.config import Config


def fields(section: Any = Config, before: str = "") -> dict[str, Any]:
    """Every field of the configuration, as section.field, with pydantic's description of it."""
    found: dict[str, Any] = {}
    for name, field in section.model_fields.items():
        inner = next((t for t in (field.annotation, *get_args(field.annotation)) if hasattr(t, "model_fields")), None)
        found |= {before + name: field} if inner is None else fields(inner, f"{before}{name}.")
    return found
