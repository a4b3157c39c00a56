"""An open load on one engine, and what became of its requests. What is not Load is pure, and free of torch."""

from __future__ import annotations

import math
import random
import time
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice, pairwise
from typing import TYPE_CHECKING

from clif.engine.coserving.backlog import Backlog
from clif.types import Request, Waiting

if TYPE_CHECKING:
    from clif.engine.engine import Engine

LISTED = 8
"""Waiting requests of which an engine is told more than their number."""


@dataclass(frozen=True)
class Slo:
    """Seconds to the first token, and on average for each one after it."""

    ttft_s: float
    tpot_s: float

    def met(self, arrived_s: float, stamps: Sequence[float]) -> bool:
        """Whether an answer is in time, as far as it has come: its tokens came at these times."""
        if not stamps or stamps[0] - arrived_s > self.ttft_s:
            return False
        return stamps[-1] - stamps[0] <= self.tpot_s * max(1, len(stamps) - 1)


@dataclass
class Served:
    """What became of a load. arrived_s: of each request, in their order; stamps: of the tokens of each, both in seconds
    since the start.

    seconds: without the beginning, when the batch is not yet what it will be; trained: training tokens, and output:
    tokens of answers, within them.
    """

    seconds: float = 0.0
    trained: float = 0.0
    output: int = 0
    arrived_s: dict[int, float] = field(default_factory=dict)
    stamps: dict[int, list[float]] = field(default_factory=dict)

    def met(self, slo: Slo) -> set[int]:
        """Positions of the requests that are answered in time."""
        return {i for i, (id, at) in enumerate(self.arrived_s.items()) if slo.met(at, self.stamps[id])}

    @property
    def gaps(self) -> list[float]:
        """Seconds between two tokens of a request, of all requests."""
        return [b - a for stamps in self.stamps.values() for a, b in pairwise(stamps)]

    @property
    def ttft_s(self) -> list[float]:
        return [stamps[0] - self.arrived_s[id] for id, stamps in self.stamps.items() if stamps]


def arrivals(rate: float, seconds: float, seed: int) -> list[float]:
    """Times of a Poisson process, the same for the same seed; one request at least."""
    rng, at, found = random.Random(seed), 0.0, [0.0]
    while (at := at + rng.expovariate(rate)) < seconds:
        found.append(at)
    return found


def percentile(values: Iterable[float], share: float) -> float:
    """The value that this share of the values does not exceed; NaN of none."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, math.ceil(share * len(ordered)) - 1)] if ordered else math.nan


@dataclass(frozen=True)
class Outcome:
    """A way of co-serving at one load, against serving alone with the same arrivals and training alone.

    kept: its training tokens/s over those of training alone. lost: requests that serving alone met and this did not.
    gap: p99 of the gaps between tokens, over the same of serving alone.
    """

    way: str
    met: int
    lost: int
    kept: float
    gap: float


def outcome(way: str, alone: Served, both: Served, train_tps: float, slo: Slo) -> Outcome:
    met = both.met(slo)
    gap = percentile(both.gaps, 0.99) / percentile(alone.gaps, 0.99)
    kept = both.trained / both.seconds / train_tps if both.seconds and train_tps else 0.0
    return Outcome(way, len(met), len(alone.met(slo) - met), kept, gap)


def best_way(loads: Mapping[float, Sequence[Outcome]]) -> str | None:
    """The way with the fewest lost requests over all loads, and among those the most training kept.

    None without any. A way that was not measured at a load that another one was is not chosen.
    """
    by_way: dict[str, list[Outcome]] = {}
    for found in loads.values():
        for one in found:
            by_way.setdefault(one.way, []).append(one)
    most = max(map(len, by_way.values()), default=0)
    whole = {way: found for way, found in by_way.items() if len(found) == most}
    return min(whole, key=lambda way: (sum(o.lost for o in whole[way]), -sum(o.kept for o in whole[way])), default=None)


class Load:
    """Runs requests that arrive at given times through an engine, as a dispatcher and a replica would.

    A request waits here for a slot in the batch, and the engine is told.
    """

    def __init__(self, engine: Engine, requests: Sequence[Request], times: Sequence[float]) -> None:
        self.engine, self.served = engine, Served()
        self._due = deque(zip(times, requests, strict=True))
        for at, request in self._due:
            self.served.arrived_s[request.id], self.served.stamps[request.id] = at, []
        self._waiting: deque[tuple[float, Request]] = deque()
        self._start_s = time.perf_counter()

    @property
    def now(self) -> float:
        return time.perf_counter() - self._start_s

    @property
    def idle(self) -> bool:
        """There is nothing to serve until the next arrival."""
        return not (self.engine.serving or self._waiting or (self._due and self._due[0][0] <= self.now))

    def step(self) -> None:
        """One step: the plan of training knows of its arrivals before they are added."""
        arrivals = self._take()
        plan = self.engine.plan([request for _, request in arrivals])
        for at, request in arrivals:
            self.engine.scheduler.add(request, self.engine.clock() - (self.now - at))
        self.engine.learn(plan)
        for event in self.engine.serve(plan):
            # Others are of an earlier load, and were cancelled.
            if event.request_id in self.served.stamps:
                self.served.stamps[event.request_id] += [self.now] * len(event.tokens)
                self.served.output += len(event.tokens)

    def _take(self) -> list[tuple[float, Request]]:
        """Those that begin now; and what the engine knows of the others."""
        now = self.now
        while self._due and self._due[0][0] <= now:
            self._waiting.append(self._due.popleft())
        free = self.engine.scheduler.max_batch - len(self.engine.scheduler.sequences)
        begun = [self._waiting.popleft() for _ in range(min(free, len(self._waiting)))]
        oldest = [
            Waiting(request.id, now - at, len(request.prompt), request.sampling.max_tokens)
            for at, request in islice(self._waiting, LISTED)
        ]
        self.engine.backlog = Backlog(len(self._waiting), tuple(oldest), self.engine.clock())
        return begun
