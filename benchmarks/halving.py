"""The fastest of many candidates by successive halving: short heats for all, longer ones for the best few.

Pure: what a candidate costs, and whether time is up, are asked for. Timings that are compared come from one heat, in
which candidates take turns, so that a drift of clocks affects all of them.

Sources: Karnin et al. 2013 and Jamieson and Talwalkar 2016: successive halving.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from typing import Generic, TypeVar

from timing import Timing

C = TypeVar("C", bound=Hashable)
TIE = 1.01
"""A candidate this near to the fastest, and within its spread, is as fast."""


@dataclass(frozen=True)
class Heats:
    """first: samples of each candidate; second: of the best few; kept: share of the candidates that are these."""

    first: int = 3
    second: int = 9
    kept: float = 1 / 3
    least: int = 3
    """Samples of everyone in the second heat without which both heats count."""


@dataclass
class Ranking(Generic[C]):
    """times: of those that the last heat had; left_out: why others have none.

    complete: every group has a time; cut_short: time was up before the end of the last heat.
    """

    times: dict[C, Timing] = field(default_factory=dict)
    left_out: dict[C, str] = field(default_factory=dict)
    complete: bool = False
    cut_short: bool = False


def rank(
    candidates: Sequence[C],
    group: Callable[[C], Hashable],
    cost: Callable[[C, int], Sequence[float]],
    late: Callable[[], bool],
    heats: Heats = Heats(),
) -> Ranking[C]:
    """Times of the best candidates, and of the best of each group in any case.

    candidates: the simplest first. cost(candidate, n) gives n samples, or raises: the candidate is then left out. When
    time is up, what has been measured counts; `complete` says whether all groups have been.
    """
    ranking: Ranking[C] = Ranking()
    samples: dict[C, list[float]] = {}

    def take(candidate: C, count: int) -> None:
        try:
            samples.setdefault(candidate, []).extend(cost(candidate, count))
        except Exception as error:  # noqa: BLE001 - whatever it was, it is reported in the candidate's place
            samples.pop(candidate, None)
            ranking.left_out[candidate] = said(error)

    for candidate in _by_turns(candidates, group):
        if late():
            break
        take(candidate, heats.first)
    reached = {group(c) for c in samples}
    ranking.complete = bool(samples) and all(group(c) in reached or c in ranking.left_out for c in candidates)
    before = {candidate: list(found) for candidate, found in samples.items()}
    finalists = _finalists(candidates, before, group, heats)
    samples.clear()
    for turn in range(heats.second):
        for candidate in finalists[:: 1 if turn % 2 else -1]:
            if candidate not in ranking.left_out and not late():
                take(candidate, 1)
    ranking.cut_short = late()
    alone = all(len(samples.get(c, ())) >= heats.least for c in finalists if c not in ranking.left_out)
    for candidate in finalists:
        if candidate not in ranking.left_out:
            own = samples.get(candidate, [])
            ranking.times[candidate] = Timing.of(own if alone else before[candidate] + own)
    return ranking


def said(error: BaseException) -> str:
    """The kind of an error, and the first line of its message."""
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0]}" if text else type(error).__name__


def fastest(
    times: Mapping[C, Timing], among: Iterable[C], right: Callable[[C], str | None], left_out: dict[C, str]
) -> C | None:
    """The fastest whose results are right; of those that are as fast, the one that comes first in `among`.

    right: why a candidate's results are wrong; such a candidate moves to `left_out`. None if no candidate is left.
    """
    left = [c for c in among if c in times and c not in left_out]
    while left:
        best = min(left, key=lambda c: times[c].median)
        limit = min(times[best].p90, TIE * times[best].median)
        chosen = next(c for c in left if times[c].median <= max(limit, times[best].median))
        wrong = right(chosen)
        if wrong is None:
            return chosen
        left_out[chosen] = wrong
        left.remove(chosen)
    return None


def _by_turns(candidates: Sequence[C], group: Callable[[C], Hashable]) -> list[C]:
    """One of each group after the other, so that a heat that is cut short has some of all."""
    groups: dict[Hashable, list[C]] = {}
    for candidate in dict.fromkeys(candidates):
        groups.setdefault(group(candidate), []).append(candidate)
    return [c for row in zip_longest(*groups.values()) for c in row if c is not None]


def _finalists(
    candidates: Sequence[C], samples: Mapping[C, list[float]], group: Callable[[C], Hashable], heats: Heats
) -> list[C]:
    """The best share of all that were measured, and the best of each group, in the candidates' order."""
    times = {candidate: Timing.of(found).median for candidate, found in samples.items()}
    ordered = sorted(times, key=lambda c: times[c])
    kept = set(ordered[: max(1, round(heats.kept * len(ordered)))])
    for name in {group(c) for c in ordered}:
        kept.add(next(c for c in ordered if group(c) == name))
    return [c for c in dict.fromkeys(candidates) if c in kept]
