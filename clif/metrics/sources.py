"""The process files of a run, read in pieces of bounded size. Free of torch."""

from __future__ import annotations

import logging
import re
import shutil
import tempfile
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from clif.metrics.schema import TABLES, Column, Table

log = logging.getLogger(__name__)

PIECE_BYTES = 4 << 20
"""Rows are read, sent and written in pieces of about this size, so that memory does not grow with a table."""

_FILE = re.compile(r"(?P<stem>control|rank-(?P<rank>\d+))(\.r(?P<restart>\d+))?\.h5")
_ORIGIN = (
    Column("source", "text", "", "process file the row comes from, without .h5", width=48),
    Column("rank", "i8", "", "rank that wrote the row; -1: the control process"),
)


@dataclass(frozen=True)
class Source:
    """A process file. rank is -1 for the control process; restart 0 is the first start."""

    path: Path
    rank: int
    restart: int

    @property
    def name(self) -> str:
        return self.path.stem


@dataclass(frozen=True)
class Attributes:
    """Attributes of a file; comes before its rows."""

    values: dict[str, Any]


@dataclass(frozen=True)
class Rows:
    """A piece of a table as run.h5 has it, shape (rows,); pieces of a table come in order."""

    table: str
    rows: np.ndarray[Any, Any]


@dataclass(frozen=True)
class Problem:
    """Something of a file that cannot be read, in words."""

    text: str


Part = Attributes | Rows | Problem


def sources(run_dir: Path) -> list[Source]:
    """The process files of a run: control first, then the ranks, each with its restarts in order."""
    matches = ((path, _FILE.fullmatch(path.name)) for path in run_dir.glob("*.h5"))
    found = [Source(p, int(m["rank"] or -1), int(m["restart"] or 0)) for p, m in matches if m]
    return sorted(found, key=lambda source: (source.rank, source.restart))


def earlier_rows(run_dir: Path, table: str) -> np.ndarray[Any, Any]:
    """Rows of a table in the control files of processes that are gone, each up to its last flush.

    A file that cannot be read counts as empty, as it does in run.h5; a warning names it.
    """
    parts = [np.empty(0, dtype=TABLES[table].dtype)]
    for source in sources(run_dir):
        if source.rank >= 0:
            continue
        try:
            with h5py.File(source.path, "r") as file:
                found = file[table][: _written(file[table], max(1, len(file[table])))]
        except (OSError, RuntimeError, KeyError) as error:
            log.warning("%s cannot be read, so its rows do not count: %s", source.path.name, error)
            continue
        part = np.full(len(found), TABLES[table].fill, dtype=TABLES[table].dtype)
        for column in set(found.dtype.names) & set(part.dtype.names):
            part[column] = found[column]
        parts.append(part)
    return np.concatenate(parts)


def merged_table(name: str) -> Table:
    """A table as run.h5 has it: with the columns source and rank."""
    table = TABLES[name]
    return Table(name, table.doc, (*table.columns, *_ORIGIN))


def read(source: Source) -> Generator[Part, None, None]:
    """What a file holds, up to its last flush: attributes, pieces of tables, and what could not be read.

    A table that is damaged anywhere gives a problem and no rows. Close the iterator to end early.
    """
    # A copy stands still: the process may be writing, and HDF5 refuses a file that is open for writing.
    with tempfile.TemporaryDirectory(prefix=".collect-", dir=source.path.parent) as folder:
        try:
            copy = shutil.copy(source.path, folder)
            with h5py.File(copy, "r") as file:
                yield Attributes(dict(file.attrs))
                # A list: h5py keeps its lock as long as an iterator over a file is suspended.
                for name, data in list(file.items()):
                    yield from _table(source, name, data)
        except (OSError, RuntimeError) as error:
            yield Problem(str(error))


def _table(source: Source, name: str, data: Any) -> Iterator[Part]:
    if name not in TABLES:
        yield Problem(f"unknown table {name}")
        return
    step = max(1, PIECE_BYTES // merged_table(name).dtype.itemsize)
    try:
        count = _written(data, step)
    except (OSError, RuntimeError, ValueError, LookupError, TypeError) as error:
        yield Problem(f"table {name}: {error}")
        return
    for start in range(0, count, step):
        yield Rows(name, _merged(source, name, data[start : min(start + step, count)]))
    known = merged_table(name).dtype.names or ()
    for column in data.dtype.names or ():
        if column not in known:
            yield Problem(f"table {name}: unknown column {column}")


def _written(data: Any, step: int) -> int:
    """Number of rows without those at the end that a kill left unwritten.

    Reads all of the table, so that damage shows before a row is taken.
    """
    count = 0
    for start in range(0, len(data), step):
        good = np.flatnonzero(~np.isnan(data[start : start + step]["t"]))
        if len(good):
            count = start + int(good[-1]) + 1
    return count


def _merged(source: Source, name: str, rows: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    table = merged_table(name)
    merged = np.full(len(rows), table.fill, dtype=table.dtype)
    # By name: a file of an older CLIF may lack a column, which then keeps its fill value.
    for column in rows.dtype.names or ():
        if column in (merged.dtype.names or ()):
            merged[column] = rows[column]
    merged["source"], merged["rank"] = source.name.encode(), source.rank
    return merged
