"""The fields of the configuration, as the code and as docs/configuration.md have them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, get_args

from clif.config import Config

DOCS = (Path(__file__).resolve().parents[1] / "docs" / "configuration.md").read_text()


def fields(section: Any = Config, before: str = "") -> dict[str, Any]:
    """Every field of the configuration, as section.field, with pydantic's description of it."""
    found: dict[str, Any] = {}
    for name, field in section.model_fields.items():
        inner = next((t for t in (field.annotation, *get_args(field.annotation)) if hasattr(t, "model_fields")), None)
        found |= {before + name: field} if inner is None else fields(inner, f"{before}{name}.")
    return found


def documented() -> dict[str, str]:
    """Field to default, as the tables of docs/configuration.md have them."""
    found, section = {}, ""
    for line in DOCS.splitlines():
        if heading := re.match(r"#{2,3} ([a-z.]+)$", line):
            section = heading[1]
        elif row := re.match(r"\| `([a-z_]+)` \| (?:`([^`]*)`|(required)) \|", line):
            found[f"{section}.{row[1]}"] = row[2] or row[3]
    return found
