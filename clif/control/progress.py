"""Progress for a person: a live table on a terminal, plain lines elsewhere, nothing under CI."""

from __future__ import annotations

import logging
import os
import sys
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol, TextIO

import numpy as np
from rich.console import Console
from rich.live import Live
from rich.table import Table

from clif.control.policy.phases import Phase

PLAIN_S = 3.0
LIVE_S = 0.25
RECENT = 200
SLACK_SHOWN = 3
Mode = Literal["live", "plain", "off"]


@dataclass(frozen=True)
class Snapshot:
    """What is shown. seconds: since the start of the run. states: number of replicas in each.

    finished: requests of users by finish reason, in this start; the words are those of the summary.
    last_loss: of the last optimizer step, nats per answer token. slack: by replica, what limits its training.
    """

    seconds: float
    phase: str
    pressure: str
    states: Mapping[str, int]
    running: int
    queued: int
    load_left: int
    finished: Mapping[str, int]
    ttft_s: Sequence[float]
    itl_s: Sequence[float]
    last_loss: float | None
    training_steps: int
    version: int
    round: str
    slack: Mapping[int, str] = field(default_factory=dict)

    def cells(self) -> list[tuple[str, str]]:
        """Titles and texts, in the order in which they are shown."""
        loss = "-" if self.last_loss is None else f"{self.last_loss:.3f}"
        states = " ".join(f"{count} {state}" for state, count in sorted(self.states.items()))
        finished = ", ".join(f"{reason} {count}" for reason, count in self.finished.items() if count)
        return [
            ("time", f"{self.seconds:.0f} s"),
            ("phase", self.phase),
            ("load", f"{self.running} running {self.queued} queued {self.load_left} to come"),
            ("finished", finished or "-"),
            ("ttft p50/p99", _percentiles(self.ttft_s)),
            ("itl p50/p99", _percentiles(self.itl_s)),
            ("pressure", self.pressure),
            ("states", states),
            ("training", f"{self.training_steps} steps, loss of the last {loss}"),
            ("slack", _slack(self.slack)),
            ("round", self.round),
            ("adapter", f"v{self.version}"),
        ]


class RecentLatencies:
    """Recent latencies, for the display only; the tables hold all of them."""

    def __init__(self) -> None:
        self.ttft_s: deque[float] = deque(maxlen=RECENT)
        self.itl_s: deque[float] = deque(maxlen=RECENT * 10)

    def add(self, ttft_s: float | None, gaps_s: Sequence[float]) -> None:
        if ttft_s is not None:
            self.ttft_s.append(ttft_s)
        self.itl_s.extend(gaps_s)


class Display(Protocol):
    """Where the progress of a run is shown."""

    def due(self, now: float) -> bool:
        """Whether a snapshot would be shown now; making one is not free."""
        ...

    def show(self, now: float, snapshot: Snapshot) -> None: ...

    def note(self, line: str) -> None:
        """Show one line, beside the snapshots."""
        ...


class Progress:
    """A Display on a stream: snapshots at their own pace, and single lines (note) above them.

    A logging handler may write by note.
    """

    def __init__(self, wanted: Literal["auto", "live", "plain", "off"], stream: TextIO | None = None) -> None:
        stream = sys.stderr if stream is None else stream
        self.mode: Mode = choose_mode(wanted, stream.isatty(), os.environ)
        # A table whose lines the terminal folds is taller than rich assumes: its upper part would stay on the screen.
        self._console = Console(file=stream, highlight=False, soft_wrap=self.mode != "live")
        self._live = Live(console=self._console, auto_refresh=False) if self.mode == "live" else None
        self._next_s = 0.0

    def due(self, now: float) -> bool:
        """Whether a snapshot would be shown now; making one is not free."""
        return self.mode != "off" and now >= self._next_s

    def show(self, now: float, snapshot: Snapshot) -> None:
        if self.mode == "off":
            return
        self._next_s = now + (LIVE_S if self._live is not None else PLAIN_S)
        if self._live is not None:
            # Ranks that load write to the terminal as well, which would tear the table.
            if snapshot.phase != Phase.GATHER.value:
                self._live.start()
                self._live.update(_table(snapshot), refresh=True)
        else:
            self._print(" | ".join(f"{title} {text}" for title, text in snapshot.cells()))

    def note(self, line: str) -> None:
        """Say one thing, unless all is off."""
        if self.mode != "off":
            self._print(line)

    def close(self) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None

    def _print(self, line: str) -> None:
        self._console.print(f"clif: {line}", markup=False)


class ProgressHandler(logging.Handler):
    """Logging by way of the progress display, so that log lines do not tear the live table. Warnings are never off."""

    def __init__(self, progress: Progress) -> None:
        super().__init__()
        self._progress = progress

    def emit(self, record: logging.LogRecord) -> None:
        if self._progress.mode == "off" and record.levelno >= logging.WARNING:
            print(f"clif: {self.format(record)}", file=sys.stderr)
        else:
            self._progress.note(self.format(record))


def choose_mode(
    wanted: Literal["auto", "live", "plain", "off"], is_terminal: bool, environment: Mapping[str, str]
) -> Mode:
    """auto: off under CI, live on a terminal, plain elsewhere."""
    if wanted != "auto":
        return wanted
    if environment.get("CI"):
        return "off"
    return "live" if is_terminal else "plain"


def _slack(reasons: Mapping[int, str]) -> str:
    shown = [f"replica {replica}: {reason}" for replica, reason in list(reasons.items())[:SLACK_SHOWN]]
    more = len(reasons) - len(shown)
    return "; ".join([*shown, *([f"and {more} more"] if more else [])]) or "-"


def _percentiles(seconds: Sequence[float]) -> str:
    if not seconds:
        return "-"
    median, tail = np.percentile(list(seconds), (50, 99)) * 1000
    return f"{median:.0f}/{tail:.0f} ms"


def _table(snapshot: Snapshot) -> Table:
    table = Table(title="CLIF", show_header=False)
    for title, text in snapshot.cells():
        table.add_row(title, text)
    return table
