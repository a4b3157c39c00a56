"""Records, journal and display of a simulated run, in memory. Free of torch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from clif.control.durability.journal import Line
from clif.control.progress import Snapshot
from clif.metrics.schema import CONTROL_TABLES, TABLES
from clif.metrics.writer import RowFormat


class MemorySink:
    """A Sink that keeps all rows: `rows[table]` is a list of dicts with the values that a file would hold.

    clock: seconds; its value at construction is the sink's time 0. Raises MetricsError as a TableWriter does.
    """

    def __init__(self, clock: Callable[[], float], tables: tuple[str, ...] = CONTROL_TABLES) -> None:
        self._clock, self._start_s = clock, clock()
        self._formats = {name: RowFormat(TABLES[name]) for name in tables}
        self.rows: dict[str, list[dict[str, Any]]] = {name: [] for name in tables}

    def row(self, table: str, **values: Any) -> None:
        values.setdefault("t", self.since_start(self._clock()))
        stored = self._formats[table].convert(values)
        names = (column.name for column in TABLES[table].columns)
        self.rows[table].append(
            {n: v.decode() if isinstance(v, bytes) else v for n, v in zip(names, stored, strict=True)}
        )

    def since_start(self, stamp: float) -> float:
        return stamp - self._start_s

    def maybe_flush(self) -> bool:
        return True

    def flush(self) -> bool:
        return True

    def close(self) -> None:
        return


class MemoryLog:
    """A Log that keeps its lines. Its wall clock is the virtual one."""

    def __init__(self) -> None:
        self.lines: list[Line] = []

    def write(self, line: Line) -> None:
        self.lines.append(line)

    def maybe_sync(self) -> None:
        return

    def mark_used(self) -> None:
        return

    def unix(self, stamp: float) -> float:
        return stamp

    def stamp(self, unix: float) -> float:
        return unix


class MemoryDisplay:
    """A Display that keeps its lines and the last snapshot. every_s: period of snapshots, seconds."""

    def __init__(self, every_s: float = float("inf")) -> None:
        self.lines: list[str] = []
        self.last: Snapshot | None = None
        self._every_s, self._next_s = every_s, every_s

    def due(self, now: float) -> bool:
        return now >= self._next_s

    def show(self, now: float, snapshot: Snapshot) -> None:
        self._next_s = now + self._every_s
        self.last = snapshot

    def note(self, line: str) -> None:
        self.lines.append(line)
