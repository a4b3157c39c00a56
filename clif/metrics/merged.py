"""Reads RUN/run.h5, which may be of an older CLIF, or damaged since it was made. Free of torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from clif.metrics.collect import CollectError
from clif.metrics.damage import DAMAGE, checked_attributes
from clif.metrics.isolated import Crashed, isolated
from clif.metrics.schema import TABLES
from clif.metrics.sources import merged_table

LOAD_S = 600.0


@dataclass(frozen=True)
class Merged:
    """What a run.h5 holds. tables: all that CLIF knows, by name. files: attributes of each process file, by name."""

    tables: dict[str, np.ndarray[Any, Any]]
    files: dict[str, dict[str, Any]]
    unreadable: list[str]


def load_merged(run_h5: Path) -> Merged:
    """Read all of a run.h5. Raises CollectError if it cannot be read."""
    try:
        (merged,) = isolated(lambda alive: iter([_load(run_h5)]), limit_s=LOAD_S, memory_bytes=None)
    except (Crashed, *DAMAGE) as error:
        raise CollectError(
            f"{run_h5} is damaged ({error}): remove it; it is made anew of the other files of the run"
        ) from error
    return merged


def _load(run_h5: Path) -> Merged:
    with h5py.File(run_h5, "r") as run:
        return Merged(
            {name: _rows(run, name) for name in TABLES},
            {name: checked_attributes(group)[0] for name, group in run["sources"].items()},
            [str(problem) for problem in run.attrs["unreadable"]],
        )


def _rows(run: h5py.File, name: str) -> np.ndarray[Any, Any]:
    """The rows of a table, with fill values for tables and columns that an older CLIF lacks."""
    table = merged_table(name)
    found = run[name][:] if name in run else np.empty(0, dtype=table.dtype)
    rows = np.full(len(found), table.fill, dtype=table.dtype)
    for column in set(rows.dtype.names or ()) & set(found.dtype.names or ()):
        rows[column] = found[column]
    return rows
