"""Writes the HDF5 file of one process, which can be opened after SIGKILL at any moment. Free of torch.

Default libver, no SWMR, every data set created and flushed at the start, rows appended at each flush. A flush passes
the rows to the operating system: they survive a crash of the process, not of the host.
"""

from __future__ import annotations

import errno
import operator
import os
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

import h5py
import numpy as np

from clif.metrics.schema import REQUIRED, TABLES, Column, Table, create
from clif.storage.disk_space import POLL_S, Room, free_bytes, is_full

SPARE_BYTES = 1 << 20
"""Bytes kept free beside the rows: for HDF5's own structures, and for other writers."""


class MetricsError(ValueError):
    """A row, table or file that does not fit the schema; the message says what to change."""


def next_path(run_dir: Path, stem: str) -> Path:
    """Path of a new file of this process: stem.h5, or stem.r1.h5, stem.r2.h5 … after restarts."""
    path, restart = run_dir / f"{stem}.h5", 0
    while path.exists():
        restart += 1
        path = run_dir / f"{stem}.r{restart}.h5"
    return path


class TableWriter:
    """Buffers rows and appends them to the tables of one file. Not thread-safe.

    clock: monotonic seconds; its value at construction is the file's time 0, whose wall time is the attribute
    start_unix (for orientation only). end_s stays NaN if the process is killed. Raises MetricsError for an unknown
    table and for a file that exists.
    """

    def __init__(
        self,
        path: Path,
        tables: tuple[str, ...],
        attributes: dict[str, Any],
        clock: Callable[[], float] = time.monotonic,
        flush_s: float = 1.0,
        flush_rows: int = 2000,
    ) -> None:
        unknown = set(tables) - set(TABLES)
        if unknown:
            raise MetricsError(f"unknown table {', '.join(sorted(unknown))}: known are {', '.join(TABLES)}")
        self._clock, self._flush_s, self._flush_rows = clock, flush_s, flush_rows
        path.parent.mkdir(parents=True, exist_ok=True)
        self._room = Room(path, clock=clock)
        if free_bytes(path.parent) < SPARE_BYTES:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        try:
            self._file = h5py.File(path, "x")
        except FileExistsError as error:
            raise MetricsError(f"{path} exists: ask next_path() for a new name") from error
        self.path = path
        self.start = clock()
        self._file.attrs.update(attributes)
        self._file.attrs["start_unix"] = time.time()
        self._file.attrs["end_s"] = np.nan
        self._tables = {name: _Buffer(TABLES[name], create(self._file, TABLES[name])) for name in tables}
        self._pending = 0
        self._file.flush()
        self._flushed = self.start

    def since_start(self, stamp: float) -> float:
        """Convert a value of the clock to the file's time, for columns of stamps."""
        return stamp - self.start

    def row(self, table: str, **values: Any) -> None:
        """Buffer one row; `t` is now unless given, None is NaN in a column of floats.

        Raises MetricsError for an unknown table, an unknown or missing column, or a value of the wrong type.
        """
        buffer = self._tables.get(table)
        if buffer is None:
            raise MetricsError(f"no table {table} in {self.path.name}: it has {', '.join(self._tables)}")
        if "t" not in values:
            values["t"] = self._clock() - self.start
        buffer.add(values)
        self._pending += 1

    def maybe_flush(self) -> bool:
        """Flush if flush_rows rows wait or flush_s seconds have passed; returns whether it did."""
        due = self._pending >= self._flush_rows or self._clock() - self._flushed >= self._flush_s
        return due and self.flush()

    def flush(self) -> bool:
        """Append the buffered rows; returns whether it did: on a full disk the rows wait for the next flush.

        Raises OSError after the disk has been full for disk_space.LIMIT_S, and for its other errors.
        """
        self._flushed = self._clock()
        if not self._pending:
            return True
        try:
            written = self._has_room() and self._append()
        except (OSError, RuntimeError) as error:
            if not is_full(error):
                raise
            written = False
        if written:
            self._room.accepted()
        else:
            self._room.refused()
        return written

    def _has_room(self) -> bool:
        """Checked before HDF5 writes: if it runs out of room during a write, it can no longer close the file."""
        return free_bytes(self.path.parent) >= SPARE_BYTES + sum(b.waiting_bytes for b in self._tables.values())

    def _append(self) -> bool:
        for buffer in self._tables.values():
            buffer.write()
        self._file.flush()
        for buffer in self._tables.values():
            buffer.settle()
        self._pending = 0
        return True

    def close(self) -> None:
        """Flush, record the end (attribute end_s) and close, waiting for a full disk. Closing twice is harmless.

        Raises OSError as flush() does.
        """
        if not self._file:
            return
        while not self.flush():
            time.sleep(POLL_S)
        try:
            self._file.attrs.modify("end_s", self._clock() - self.start)
        finally:
            self._file.close()

    def __enter__(self) -> TableWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class RowFormat:
    """Checks and converts the rows of one table."""

    def __init__(self, table: Table) -> None:
        self._table = table
        self._defaults = {c.name: c.default for c in table.columns if c.default is not REQUIRED}
        self._converters = [(c.name, _converter(c)) for c in table.columns]

    def convert(self, values: dict[str, Any]) -> tuple[Any, ...]:
        """The row as it is stored, in the order of the columns. Raises MetricsError for a row that does not fit."""
        given = self._defaults | values
        try:
            row = tuple([convert(given[name]) for name, convert in self._converters])
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise MetricsError(self._complaint(given)) from error
        if len(given) != len(row):
            raise MetricsError(self._complaint(given))
        return row

    def _complaint(self, given: dict[str, Any]) -> str:
        names = [column.name for column in self._table.columns]
        problems = [f"unknown column {name}" for name in given if name not in names]
        problems += [f"missing column {name}" for name in names if name not in given]
        problems += [
            f"{column.name}={given[column.name]!r} is no {column.kind}"
            for column in self._table.columns
            if column.name in given and not _fits(column, given[column.name])
        ]
        return f"table {self._table.name}: {'; '.join(problems)} (columns: {', '.join(names)})"


class _Buffer:
    """Rows of one table that wait for the next flush."""

    def __init__(self, table: Table, data: h5py.Dataset) -> None:
        self._data, self._dtype, self._format = data, table.dtype, RowFormat(table)
        self._rows: list[tuple[Any, ...]] = []
        self._stored = 0

    @property
    def waiting_bytes(self) -> int:
        """Bytes that the waiting rows need at most: the last chunk may be a new one."""
        chunk: int = self._data.chunks[0]
        return (len(self._rows) + chunk) * self._dtype.itemsize if self._rows else 0

    def add(self, values: dict[str, Any]) -> None:
        self._rows.append(self._format.convert(values))

    def write(self) -> None:
        if not self._rows:
            return
        end = self._stored + len(self._rows)
        self._data.resize((end,))
        self._data[self._stored : end] = np.array(self._rows, dtype=self._dtype)

    def settle(self) -> None:
        self._stored += len(self._rows)
        self._rows.clear()


def _converter(column: Column) -> Callable[[Any], Any]:
    if column.kind == "f8":
        return _number
    if column.kind == "text":
        return _text(column.width)
    if column.kind == "bool":
        return _flag
    return _integer(np.iinfo(column.dtype))


def _number(value: Any) -> float:
    return float("nan") if value is None else float(value)


def _flag(value: Any) -> bool:
    if not isinstance(value, (bool, np.bool_)):
        raise TypeError("not a bool")
    return bool(value)


def _integer(limits: np.iinfo[Any]) -> Callable[[Any], int]:
    low, high = int(limits.min), int(limits.max)

    def convert(value: Any) -> int:
        number = operator.index(value)
        if not low <= number <= high:
            raise ValueError("out of range")
        return number

    return convert


def _text(width: int) -> Callable[[Any], bytes]:
    def convert(value: Any) -> bytes:
        data: bytes = value.encode("utf-8", "replace")
        if len(data) > width:
            data = data[: width - 3].decode("utf-8", "ignore").encode() + b"..."
        return data

    return convert


def _fits(column: Column, value: Any) -> bool:
    try:
        _converter(column)(value)
    except (TypeError, ValueError, AttributeError):
        return False
    return True
