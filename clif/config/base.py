"""What all sections of the configuration share. Free of torch.

Every number has an upper bound, far above sensible values: beyond it are only overflows and endless waits.
"""

from __future__ import annotations

import unicodedata
from pathlib import Path
from typing import Annotated, Any, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator

Positive = Annotated[int, Field(gt=0, le=10**9)]
NotNegative = Annotated[int, Field(ge=0, le=10**9)]
Ranks = Annotated[int, Field(gt=0, le=65536)]
PositiveFloat = Annotated[float, Field(gt=0, le=1e9)]
NotNegativeFloat = Annotated[float, Field(ge=0, le=1e9)]
Period = Annotated[float, Field(ge=0.001, le=3600)]
"""Seconds between two repetitions."""
Share = Annotated[float, Field(ge=0, le=1)]
MAX_TEXT = 4096
"""Characters: the longest path on Linux."""


class Section(BaseModel):
    """Base of all sections: unknown keys are errors, values never change after reading."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _plain(cls, value: Any, info: ValidationInfo) -> Any:
        """Refuse true, which would pass for 1, and text that no file system, file or terminal accepts."""
        name = info.field_name or ""
        kind = cls.model_fields[name].annotation
        if isinstance(value, bool) and kind is not bool and True not in get_args(kind):
            raise ValueError(f"{name} is {str(value).lower()}: give a value, not true or false")
        if isinstance(value, str):
            _check_text(name, value)
            if value.startswith("~") and Path in (kind, *get_args(kind)):
                raise ValueError(f"{name} begins with ~, which only a shell knows: write the path out")
        return value


def _check_text(name: str, text: str) -> None:
    if not text.strip():
        raise ValueError(f"{name} is empty: give a value or leave it out")
    if len(text) > MAX_TEXT:
        raise ValueError(f"{name} has {len(text)} characters: give at most {MAX_TEXT}")
    if any(unicodedata.category(c) in ("Cc", "Cs") for c in text):
        raise ValueError(f"{name} holds a control character or half a character: remove it")


def is_there(path: Path) -> bool:
    """Whether a path names a visible file: False for a name that is too long, or in a folder without permission."""
    try:
        return path.is_file()
    except OSError:
        return False
