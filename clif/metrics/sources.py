"""The process files of a run, read in pieces of bounded size. Free of torch."""

from __future__ import annotations

import logging
import math
import re
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Collection, Generator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from clif.metrics.checked import Checked
from clif.metrics.damage import DAMAGE, checked_attributes, checked_table, cleaned
from clif.metrics.isolated import Crashed, isolated
from clif.metrics.schema import TABLES, Column, Table

log = logging.getLogger(__name__)

PIECE_BYTES = 4 << 20
"""Rows are read, sent and written in pieces of about this size, so that memory does not grow with the table."""

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
    """A description of an unreadable part of a file."""

    text: str


Part = Attributes | Rows | Problem
Alive = Callable[[], None]


def sources(run_dir: Path) -> list[Source]:
    """The process files of a run: control first, then the ranks, each with its restarts in order."""
    matches = ((path, _FILE.fullmatch(path.name)) for path in run_dir.glob("*.h5"))
    found = [Source(p, int(m["rank"] or -1), int(m["restart"] or 0)) for p, m in matches if m]
    return sorted(found, key=lambda source: (source.rank, source.restart))


def earlier_rows(run_dir: Path, table: str) -> np.ndarray[Any, Any]:
    """Rows of a table in the control files of earlier processes, each up to its last flush.

    A file that cannot be read counts as empty, as it does in run.h5; a warning names it.
    """
    parts = [np.empty(0, dtype=TABLES[table].dtype)]
    for source in sources(run_dir):
        if source.rank < 0:
            for part in _read(source, source.path, (table,)):
                if isinstance(part, Rows):
                    # By name: without the columns that only run.h5 has.
                    parts.append(part.rows[list(parts[0].dtype.names or ())].astype(parts[0].dtype))
                elif isinstance(part, Problem):
                    log.warning("%s: %s: what is damaged does not count", source.path.name, part.text)
    return np.concatenate(parts)


def merged_table(name: str) -> Table:
    """A table as run.h5 has it: with the columns source and rank."""
    table = TABLES[name]
    return Table(name, table.doc, (*table.columns, *_ORIGIN))


def read(source: Source) -> Generator[Part, None, None]:
    """The content of a file up to its last flush: attributes, pieces of tables, and problems.

    A damaged table yields a problem and no rows. A crash or hang of HDF5's library is a problem of this file, too.
    Close the iterator to end early.
    """
    # A copy does not change: the process may be writing, and HDF5 refuses a file that is open for writing.
    with tempfile.TemporaryDirectory(prefix=".collect-", dir=source.path.parent) as folder:
        try:
            copy = Path(shutil.copy(source.path, folder))
        except OSError as error:
            yield _problem(error)
            return
        yield from _read(source, copy)


def _read(source: Source, path: Path, tables: Collection[str] | None = None) -> Generator[Part, None, None]:
    try:
        yield from isolated(lambda alive: _parts(source, path, tables, alive))
    except Crashed as error:
        yield _problem(f"damaged: {error}")


def _parts(source: Source, path: Path, tables: Collection[str] | None, alive: Alive) -> Iterator[Part]:
    try:
        with h5py.File(path, "r") as file:
            values, problems = checked_attributes(file)
            yield Attributes(values)
            yield from map(_problem, problems)
            # A kill leaves NaN; a file whose end is damaged is read as if it had been killed.
            closed = math.isfinite(values.get("end_s", math.nan))
            for name in list(file):
                alive()
                if tables is None or name in tables:
                    yield from _table(source, name, file, closed, alive)
    except DAMAGE as error:
        yield _problem(error)


def _table(source: Source, name: str, file: h5py.File, closed: bool, alive: Alive) -> Iterator[Part]:
    if name not in TABLES:
        yield _problem(f"unknown table {name}")
        return
    table = merged_table(name)
    step = max(1, PIECE_BYTES // table.dtype.itemsize)
    damage: Counter[str] = Counter()
    try:
        found, unknown = checked_table(file[name], table)
        data = Checked(found, closed)
        count = _written(data, step, alive)
        for start in range(0, count, step):
            rows = cleaned(_merged(source, table, data[start : min(start + step, count)]), name, damage)
            yield Rows(name, rows)
    except DAMAGE as error:
        yield _problem(f"table {name}: {error}")
        return
    yield from (_problem(f"table {name}: {text} in {number} rows") for text, number in damage.items())
    yield from (_problem(f"table {name}: unknown column {column}") for column in unknown)


def _written(data: Checked, step: int, alive: Alive) -> int:
    """Number of rows, without those at the end that a kill left unwritten.

    It reads the whole table, so that damage is found before any row is used.
    """
    count = 0
    for start in range(0, len(data), step):
        alive()
        good = np.flatnonzero(~np.isnan(data[start : start + step]["t"]))
        if len(good):
            count = start + int(good[-1]) + 1
    return count


def _merged(source: Source, table: Table, rows: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    merged = np.full(len(rows), table.fill, dtype=table.dtype)
    # Columns are copied by name: a file of an older CLIF may lack one, which then keeps its fill value.
    for column in rows.dtype.names or ():
        if column in (merged.dtype.names or ()):
            merged[column] = rows[column]
    merged["source"], merged["rank"] = source.name.encode(), source.rank
    return merged


def _problem(words: object) -> Problem:
    """A problem whose words, which may come from a damaged file, can be printed and stored."""
    text = str(words).encode("utf-8", "backslashreplace").decode()
    return Problem("".join(c if c.isprintable() else "?" for c in text)[:400])
