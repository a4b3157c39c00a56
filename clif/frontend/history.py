"""What the run's status was: a row each second for ten minutes, fewer of what is older. Free of torch, in memory.

A front end that is started again begins with an empty history; the run's tables hold all of it.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator
from contextlib import suppress
from typing import Any

import msgspec

from clif.frontend.link import Link

EVERY_S = 1.0
AGES = ((1.0, 600), (10.0, 660), (60.0, 1320))
"""(seconds of a row, rows): ten minutes, two hours, a day."""
EVENTS = 1000
SHOWN = 16
"""Replicas whose state is in each row; of more there are sums alone."""
CODES = {"serving": "s", "idle": "i", "combined": "c", "failed": "f"}
COLUMNS = (
    *("unix", "serving", "idle", "combined", "failed", "replicas", "running", "waiting", "ttft_p50_ms", "ttft_p99_ms"),
    *("itl_p50_ms", "itl_p99_ms", "met", "finished", "pressure", "generated_tokens", "steps", "loss", "version"),
)
"""Of a row. replicas: a letter of CODES for each of the first SHOWN. Latencies are empty where no request ended."""
Row = list[Any]


class History:
    """Rows by age. message: the latest of what the live page is sent, JSON; empty before the first status."""

    def __init__(self) -> None:
        self.message = ""
        self._rows: tuple[deque[Row], ...] = tuple(deque(maxlen=count) for _, count in AGES)
        self._events: deque[dict[str, Any]] = deque(maxlen=EVENTS)
        self._last_event = 0
        self._ended = -1
        self._woken = asyncio.Condition()
        self._closed = False

    async def follow(self, link: Link) -> None:
        """Take the status once a second, until the control process is gone. Then all readers of messages end."""
        while not link.over.is_set():
            status = msgspec.json.decode(link.readiness.body)
            if "run" in status:
                await self.add(status, link.readiness.ready)
            with suppress(TimeoutError):
                await asyncio.wait_for(link.over.wait(), EVERY_S)
        await self.close()

    async def close(self) -> None:
        """No further row comes."""
        self._closed = True
        async with self._woken:
            self._woken.notify_all()

    async def add(self, status: dict[str, Any], ready: bool) -> None:
        """A status becomes a row, and wakes those that wait for the next message."""
        row, events = self._row(status), self._new(status["events"])
        self._append(row, 0)
        self._events.extend(events)
        shown = {name: value for name, value in status.items() if name not in ("totals", "events")}
        shown["totals"] = {name: value for name, value in status["totals"].items() if not name.endswith("_s")}
        self.message = msgspec.json.encode({"ready": ready, "status": shown, "row": row, "events": events}).decode()
        async with self._woken:
            self._woken.notify_all()

    async def messages(self) -> AsyncIterator[str]:
        """Each message as it comes, the present one first. One that the reader is too slow for is left out."""
        while not self._closed:
            if self.message:
                yield self.message
            async with self._woken:
                await self._woken.wait()

    def body(self) -> dict[str, Any]:
        """All rows, oldest first, and the events."""
        rows: list[Row] = []
        for older in reversed(self._rows):
            begins = older[0][0] if older else 0
            rows = [*(row for row in rows if row[0] < begins), *older] if older else rows
        return {"columns": COLUMNS, "rows": rows, "events": [*self._events]}

    def _append(self, row: Row, age: int) -> None:
        """What falls off one list goes on to the next, if that has no row of the same time yet."""
        rows = self._rows[age]
        fallen = rows[0] if len(rows) == rows.maxlen else None
        rows.append(row)
        if fallen is None or age + 1 == len(AGES):
            return
        older, every_s = self._rows[age + 1], AGES[age + 1][0]
        if not older or fallen[0] // every_s != older[-1][0] // every_s:
            self._append(fallen, age + 1)

    def _row(self, status: dict[str, Any]) -> Row:
        run, promise, totals, states = (status[name] for name in ("run", "promise", "totals", "states"))
        ended = sum(totals["requests"].values())
        fresh, self._ended = ended != self._ended, ended
        latencies = [*run["ttft_ms"].values(), *run["itl_ms"].values()] if fresh else [None] * 4
        running = min(run["outstanding"], run["in_batches"])
        return [
            status["unix"],
            *(states.get(state, 0) for state in CODES),
            "".join(CODES[replica["state"]] for replica in status["replicas"][:SHOWN]),
            running,
            run["outstanding"] - running,
            *latencies,
            promise["met"],
            promise["finished"],
            run["pressure"],
            totals["generated_tokens"],
            run["training_steps"],
            run["last_loss"],
            run["version"],
        ]

    def _new(self, events: list[dict[str, Any]]) -> list[dict[str, Any]]:
        fresh = [event for event in events if event["number"] > self._last_event]
        self._last_event = max((event["number"] for event in events), default=self._last_event)
        return fresh
