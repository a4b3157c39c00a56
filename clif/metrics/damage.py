"""Separates the reliable content of a metrics file from its damage, which is described in words. Free of torch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import h5py
import numpy as np

from clif.metrics.schema import Table
from clif.states import ReplicaState
from clif.types import FinishReason, Purpose

DAMAGE = (
    OSError, RuntimeError, ValueError, TypeError, LookupError, AttributeError, ArithmeticError, MemoryError,
)  # fmt: skip
"""Errors that h5py raises for damaged files."""
UNWRITTEN_ROWS = 1_000_000
"""Rows of a table that a kill may have left unwritten; a larger number is damage."""
NUMBERS: Mapping[str, Callable[[float], bool]] = {"end_s": lambda s: not s < 0, "start_unix": lambda s: 0 <= s < 1e11}
"""Attributes that must be numbers, and which; a kill leaves end_s NaN. The others are text or numbers."""

LONGEST_TEXT = 60_000
"""Bytes of an attribute; HDF5 holds 64 KiB."""

_FITTING = {"f": "fiu", "i": "iub", "b": "b", "S": "S"}
"""Kinds of numbers in a file, by the kind that a column has."""
_WORDS: Mapping[tuple[str, str], frozenset[bytes]] = {
    ("transitions", "from_state"): frozenset(state.value.encode() for state in ReplicaState),
    ("transitions", "to_state"): frozenset(state.value.encode() for state in ReplicaState),
    ("requests", "finish"): frozenset(reason.value.encode() for reason in FinishReason),
    ("requests", "purpose"): frozenset(purpose.value.encode() for purpose in Purpose),
}
"""Columns that hold one of these words."""


def checked_attributes(file: h5py.File) -> tuple[dict[str, Any], list[str]]:
    """(intact attributes, descriptions of the damaged ones)."""
    values: dict[str, Any] = {}
    problems: list[str] = []
    for name in list(file.attrs):
        try:
            value = file.attrs[name]
            _check_attribute(name, value)
        except DAMAGE as error:
            problems.append(f"attribute {name}: {error}")
        else:
            values[name] = value
    return values, problems


def _check_attribute(name: str, value: Any) -> None:
    name.encode()
    if name in NUMBERS and (isinstance(value, str) or not NUMBERS[name](float(value))):
        raise ValueError(f"{value!r} is not possible")
    texts = [value] if isinstance(value, str) else value.tolist() if _holds_objects(value) else []
    for text in texts:
        if not isinstance(text, str):
            raise TypeError(f"holds a {type(text).__name__}")
        if "\0" in text or len(text.encode()) > LONGEST_TEXT:
            raise ValueError("its text is damaged")
    if not isinstance(value, (str, float, int, np.generic, np.ndarray, h5py.Empty)):
        raise TypeError(f"a {type(value).__name__} in place of text or numbers")


def _holds_objects(value: Any) -> bool:
    return isinstance(value, np.ndarray) and value.dtype.kind == "O" and value.ndim == 1


def checked_table(data: Any, table: Table) -> tuple[h5py.Dataset, list[str]]:
    """(the data set of a table, its columns that the table does not have). Raises ValueError if it is none."""
    if not isinstance(data, h5py.Dataset) or data.ndim != 1 or not data.dtype.names:
        raise ValueError("is no table")
    for column in table.columns:
        if column.name in data.dtype.names:
            kind = data.dtype[column.name].kind
            if kind not in _FITTING[column.dtype.kind]:
                raise ValueError(f"column {column.name} holds {data.dtype[column.name]}, not {column.dtype}")
    if "t" not in data.dtype.names:
        raise ValueError("has no column t")
    # Compression expands a byte to some 1,000 at most.
    held = data.id.get_storage_size() * 1100 // data.dtype.itemsize
    if len(data) > held + UNWRITTEN_ROWS:
        raise ValueError(f"claims {len(data)} rows and holds {held} at most")
    known = {column.name for column in table.columns}
    return data, [name for name in data.dtype.names if name not in known]


def cleaned(rows: np.ndarray[Any, Any], table: str, damage: Counter[str]) -> np.ndarray[Any, Any]:
    """The rows with known words, their text made valid UTF-8; damage counts all changes, in words."""
    whole = np.ones(len(rows), dtype=bool)
    for name in rows.dtype.names or ():
        if (table, name) in _WORDS:
            known = np.isin(rows[name], list(_WORDS[table, name]))
            damage.update([f"a damaged word in column {name}, left out"] * int((~known & whole).sum()))
            whole &= known
        elif rows.dtype[name].kind == "S":
            for row in _not_text(rows[name]):
                rows[name][row] = rows[name][row].decode("utf-8", "replace").encode("ascii", "replace")
                damage[f"damaged text in column {name}"] += 1
    return rows[whole]


def _not_text(column: np.ndarray[Any, Any]) -> list[int]:
    """Positions of text that is not UTF-8. Only the few that are not ASCII are decoded one by one."""
    letters = np.ascontiguousarray(column).view(np.uint8).reshape(len(column), -1)
    return [int(row) for row in np.flatnonzero((letters >= 128).any(axis=1)) if not _is_text(column[row])]


def _is_text(data: bytes) -> bool:
    try:
        data.decode()
    except UnicodeDecodeError:
        return False
    return True
