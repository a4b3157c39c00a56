"""What benchmarks/learning.py has measured so far, one JSON object a line, and the tables of it."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from report import spread

GOAL = 1.02
"""Held-out loss of two IID replicas over that of central PEFT, at most."""
CEILINGS = {"central": "central PEFT", "single": "one replica with all samples"}
"""Ways that federated replicas are compared with."""
POINTS = 2.0
"""Exact match on the first task that training on a second may cost, in points."""


@dataclass(frozen=True, order=True)
class Unit:
    """One training run, or one measurement of the base. part: compare, forget or sweep; data: of one data set, or
    "first>second"."""

    seed: int
    part: str
    data: str
    way: str


@dataclass(frozen=True)
class Result:
    """loss, exact: on the rows of the report, of the first task in `forget`; second: exact match on the second one.

    gate: loss on the rows that judge rounds, for the sweep. detail: what else is worth knowing.
    """

    unit: Unit
    loss: float
    exact: float
    gate: float = math.nan
    second: float = math.nan
    seconds: float = 0.0
    detail: str = ""


def append(path: Path, result: Result) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.write(json.dumps(asdict(result)) + "\n")


def read(path: Path) -> list[Result]:
    if not path.is_file():
        return []
    trees = [json.loads(line) for line in path.read_text().splitlines()]
    return [Result(**{**tree, "unit": Unit(**tree["unit"])}) for tree in trees]


def left(units: Iterable[Unit], done: Sequence[Result]) -> list[Unit]:
    """Units without a result, in the order given."""
    known = {result.unit for result in done}
    return [unit for unit in units if unit not in known]


def of(results: Sequence[Result], part: str, data: str, way: str) -> dict[int, Result]:
    """By seed."""
    return {r.unit.seed: r for r in results if (r.unit.part, r.unit.data, r.unit.way) == (part, data, way)}


def ratios(over: dict[int, Result], under: dict[int, Result]) -> list[float]:
    """Losses over losses, of the seeds that both have."""
    return [over[seed].loss / under[seed].loss for seed in sorted(over.keys() & under.keys())]


def _names(results: Sequence[Result], part: str) -> list[str]:
    return list(dict.fromkeys(r.unit.data for r in results if r.unit.part == part))


def compare_table(results: Sequence[Result], ways: Sequence[str]) -> list[str]:
    """Loss and exact match of each way, and the loss of IID replicas over those of CEILINGS."""
    over = [f"iid / {way}" for way in CEILINGS]
    lines = [f"| data | measure | {' | '.join([*ways, *over])} |", f"|---|---|{'---|' * (len(ways) + len(over))}"]
    for data in _names(results, "compare"):
        found = {way: of(results, "compare", data, way) for way in ways}
        quotients = [spread(ratios(found["iid"], of(results, "compare", data, way)), ".3f") for way in CEILINGS]
        for measure, form in (("loss", ".3f"), ("exact", ".1%")):
            cells = [spread((getattr(r, measure) for r in found[way].values()), form) for way in ways]
            cells += quotients if measure == "loss" else [""] * len(quotients)
            lines.append(f"| {data} | {measure} | {' | '.join(cells)} |")
    return lines


def forget_table(results: Sequence[Result]) -> list[str]:
    """Exact match and loss on the first task before and after the second, and exact match on that."""
    lines = [
        "| tasks | replay | first before | first after | lost, points | loss before | loss after | second |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for data in _names(results, "forget"):
        before = of(results, "compare", data.split(">")[0], "iid")
        for way in dict.fromkeys(r.unit.way for r in results if r.unit.part == "forget"):
            after = of(results, "forget", data, way)
            seeds = sorted(before.keys() & after.keys())
            cells = (
                spread((before[s].exact for s in seeds), ".1%"),
                spread((after[s].exact for s in seeds), ".1%"),
                spread(lost(before, after), ".1f"),
                spread((before[s].loss for s in seeds), ".3f"),
                spread((after[s].loss for s in seeds), ".3f"),
                spread((after[s].second for s in seeds), ".1%"),
            )
            lines.append(f"| {data} | {way} | {' | '.join(cells)} |")
    return lines


def lost(before: dict[int, Result], after: dict[int, Result]) -> list[float]:
    """Points of exact match on the first task, of the seeds that both have."""
    return [100 * (before[s].exact - after[s].exact) for s in sorted(before.keys() & after.keys())]


def sweep_table(results: Sequence[Result]) -> list[str]:
    """Loss on the gate's rows, which choose, and on the report's."""
    lines = ["| data | recipe | loss, gate | loss, report | exact |", "|---|---|---|---|---|"]
    for data in _names(results, "sweep"):
        for way in dict.fromkeys(r.unit.way for r in results if r.unit.part == "sweep"):
            found = of(results, "sweep", data, way).values()
            columns: tuple[tuple[Callable[[Result], float], str], ...] = (
                (lambda r: r.gate, ".3f"),
                (lambda r: r.loss, ".3f"),
                (lambda r: r.exact, ".1%"),
            )
            cells = [spread(map(read_one, found), form) for read_one, form in columns]
            lines.append(f"| {data} | {way} | {' | '.join(cells)} |")
    return lines


def verdicts(results: Sequence[Result]) -> list[str]:
    """Each goal, and what was measured: the median of all data sets and seeds."""
    said = []
    for ceiling, what in CEILINGS.items():
        all_ratios = [
            ratio
            for data in _names(results, "compare")
            for ratio in ratios(of(results, "compare", data, "iid"), of(results, "compare", data, ceiling))
        ]
        if all_ratios:
            pairs = f"2 IID replicas / {what}, median of {len(all_ratios)} (data set, seed)"
            said.append(_verdict(f"held-out loss, {pairs}", statistics.median(all_ratios), GOAL))
    for way in ("replay 0.1", "replay 0"):
        points = [
            one
            for data in _names(results, "forget")
            for one in lost(of(results, "compare", data.split(">")[0], "iid"), of(results, "forget", data, way))
        ]
        if points:
            said.append(
                _verdict(f"points of exact match lost on the first task, {way}", statistics.median(points), POINTS)
            )
    return said


def _verdict(what: str, found: float, goal: float) -> str:
    return f"* {what}: {found:.3f}, goal {goal:g} at most: {'met' if found <= goal else 'missed'}"
