"""Merge the files of all processes and restarts of a run into RUN/run.h5. Free of torch."""

from __future__ import annotations

import logging
import os
import re
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from clif.metrics.schema import TABLES, Column, Table, create, written

log = logging.getLogger(__name__)

_FILE = re.compile(r"(?P<stem>control|rank-(?P<rank>\d+))(\.r(?P<restart>\d+))?\.h5")
_ORIGIN = (
    Column("source", "text", "", "process file the row comes from, without .h5", width=48),
    Column("rank", "i8", "", "rank that wrote the row; -1: the control process"),
)


class CollectError(RuntimeError):
    """There is nothing to merge; the message says what was looked for."""


@dataclass(frozen=True)
class Source:
    """A process file. rank is -1 for the control process; restart 0 is the first start."""

    path: Path
    rank: int
    restart: int

    @property
    def name(self) -> str:
        return self.path.stem


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
                found = written(file[table][:])
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


def collect(run_dir: Path) -> Path:
    """Write RUN/run.h5 from every process file, each up to its last flush, and return its path.

    Also works while the run goes on. A file that cannot be read is named in a warning and in the attribute
    `unreadable`; the others are merged. Raises CollectError when no file is there or none can be read.
    """
    found = sources(run_dir)
    if not found:
        raise CollectError(
            f"no metrics in {run_dir}: looked for control.h5, rank-00000.h5 and restarts (rank-00000.r1.h5)"
        )
    temporary = run_dir / "run.h5.tmp"
    unreadable: list[str] = []
    try:
        with h5py.File(temporary, "w") as run:
            for name in TABLES:
                create(run, merged_table(name), compression="gzip", compression_opts=1, shuffle=True)
            run.create_group("sources")
            for source in found:
                unreadable += [f"{source.path.name}: {problem}" for problem in _take(source, run)]
            run.attrs["unreadable"] = np.array(unreadable, dtype=h5py.string_dtype())
            if not len(run["sources"]):
                raise CollectError(f"none of the metrics files in {run_dir} can be read: {'; '.join(unreadable)}")
        os.replace(temporary, run_dir / "run.h5")
    finally:
        temporary.unlink(missing_ok=True)
    for problem in unreadable:
        log.warning("not merged: %s", problem)
    return run_dir / "run.h5"


def _take(source: Source, run: h5py.File) -> list[str]:
    """Append a file's rows; returns what could not be read."""
    problems: list[str] = []
    # A copy stands still: the process may be writing, and HDF5 refuses a file that is open for writing.
    with tempfile.TemporaryDirectory(prefix=".collect-", dir=source.path.parent) as folder:
        try:
            copy = shutil.copy(source.path, folder)
            with h5py.File(copy, "r") as file:
                run["sources"].create_group(source.name).attrs.update(dict(file.attrs))
                for name, data in file.items():
                    problems += _append(source, name, data, run)
        except (OSError, RuntimeError) as error:
            problems.append(str(error))
    return problems


def _append(source: Source, name: str, data: Any, run: h5py.File) -> list[str]:
    if name not in TABLES:
        return [f"unknown table {name}"]
    try:
        rows = written(data[:])
    except (OSError, RuntimeError, ValueError, KeyError, TypeError) as error:
        return [f"table {name}: {error}"]
    target = run[name]
    merged = np.full(len(rows), merged_table(name).fill, dtype=target.dtype)
    # By name: a file of an older CLIF may lack a column, which then keeps its fill value.
    for column in rows.dtype.names:
        if column in merged.dtype.names:
            merged[column] = rows[column]
    merged["source"], merged["rank"] = source.name.encode(), source.rank
    start = len(target)
    target.resize((start + len(rows),))
    target[start:] = merged
    return [f"table {name}: unknown column {c}" for c in rows.dtype.names if c not in merged.dtype.names]
