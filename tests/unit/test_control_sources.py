"""Where requests come from: a load whose times are known, and sources beside it whose requests nobody plans."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from control_run import Run, make_config

from clif.control.policy.phases import Phase
from clif.control.sources import DueRequest, TraceSource
from clif.data.load import ScheduledRequest
from clif.types import Request, Sampling, first_id


def request(number: int) -> Request:
    return Request(id=number, prompt=(2, 6), sampling=Sampling(max_tokens=8))


def test_a_trace_gives_each_request_once_at_its_time_and_the_planned_time_counts_as_arrival() -> None:
    source = TraceSource([ScheduledRequest(at_s=at, request=request(i)) for i, at in enumerate((0.5, 0.5, 2.0))])
    assert list(source.due(100.0)) == [] and source.remaining == 3, "not before it is opened"
    source.open(100.0)
    assert source.wait_s(100.0) == 0.5 and not source.exhausted
    assert [(due.request.id, due.at_s, due.arrival_s) for due in source.due(101.0)] == [
        (0, 0.5, 100.5),
        (1, 0.5, 100.5),
    ]
    assert list(source.due(101.0)) == [] and source.wait_s(101.0) == 1.0
    assert [due.arrival_s for due in source.due(103.0)] == [102.0], "a late loop flatters no latency"
    assert source.exhausted and source.wait_s(103.0) == math.inf


class Visitors:
    """Requests at times that only the test knows. closes_s: from when on no more can come, in seconds of the load."""

    def __init__(self, at_s: Sequence[float], closes_s: float) -> None:
        self._at_s, self._closes_s = list(at_s), closes_s
        self._next_id, self._opened_s, self._now = first_id(7), math.inf, 0.0

    @property
    def exhausted(self) -> bool:
        return self._now >= self._opened_s + self._closes_s

    @property
    def remaining(self) -> int:
        return 0

    def open(self, opened_s: float) -> None:
        self._opened_s = opened_s

    def due(self, now: float) -> Sequence[DueRequest]:
        self._now, found = now, []
        while self._at_s and self._opened_s + self._at_s[0] <= now:
            found.append(DueRequest(request(self._next_id), self._at_s.pop(0), now))
            self._next_id += 1
        return found

    def wait_s(self, now: float) -> float:
        return math.inf


def test_promise_1_requests_of_several_sources_are_answered_and_the_load_lasts_as_long_as_one_is_open(
    tmp_path: Path,
) -> None:
    run = Run(make_config(tmp_path), sources=[Visitors([0.3, 0.3, 1.5], closes_s=2.0)])
    run.go()
    run.assert_promise_1()
    users = {row["id"]: row for row in run.table("requests") if row["purpose"] == "user"}
    assert len(users) == len(run.load) + 3 and {row["finish"] for row in users.values()} == {"stop"}
    assert users[first_id(7) + 2]["arrival_s"] > max(row["t"] for row in run.table("load") if row["request"] < 100)


def test_a_source_that_may_always_have_more_keeps_the_load_open_until_a_drain(tmp_path: Path) -> None:
    def late() -> str:
        return "got SIGTERM" if run.time() > 1003.0 else ""

    run = Run(make_config(tmp_path), sources=[Visitors([0.3], closes_s=math.inf)], signalled=late)
    run.go()
    assert run.server.phase is Phase.DONE and run.server.drained == "got SIGTERM"
    run.assert_promise_1()
    assert {row["finish"] for row in run.table("requests")} == {"stop"}
