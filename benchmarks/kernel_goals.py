"""What the kernels' benchmark measures of each case, and the figures that follow from it. Free of torch.

A figure is the time of the best of several ways over that of the best of others, within one run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol, get_args

from gpu_figures import KERNEL_ROWS, Goal

from clif.kernels.tiles import Form

AUTO = "CLIF"
"""What the tiling in use takes."""
FORMS: dict[str, Form] = {f"{AUTO}, {form}": form for form in get_args(Form)}
"""Ways of CLIF in which one form is forced."""
BASE, DGRAD, TRITON_BASE = "F.linear alone", "dgrad alone", "Triton's base alone"
FOUR, FOUR_PUBLISHED = "four launches", "four launches, published tiles"
WITHOUT, READ, PAGED = "without adapters", "read at the copy rate", "paged decode"


class Spread(Protocol):
    """Microseconds of a way; timing.Timing."""

    @property
    def median(self) -> float: ...


@dataclass
class Measured:
    """One case. timings: by way; failed: ways that raised, and what; faults: of the results, in words.

    taken: the form that AUTO is; launches: of one call, by way, where they were counted.
    """

    timings: Mapping[str, Spread] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    faults: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    taken: str = ""
    launches: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Answer:
    """The value of a figure, and what a reader has to know about it."""

    value: float
    note: str = ""


class Question(Protocol):
    """A figure of one case; None where it was not measured."""

    @property
    def case(self) -> str: ...

    def answer(self, measured: Measured) -> Answer | None: ...


@dataclass(frozen=True)
class Ratio:
    """Time of the best of `over` / time of the best of `under`. digits: of the result, where noise must not decide."""

    case: str
    over: Sequence[str]
    under: Sequence[str]
    digits: int = 4

    def answer(self, measured: Measured) -> Answer | None:
        found = self._ratio(measured, self.over, self.under)
        if found is None:
            return None
        value, over, under = found
        note = f"{over} {_us(measured, over)} us / {under} {_us(measured, under)} us"
        forced = next((ways for ways in (self.over, self.under) if set(ways) & set(FORMS)), None)
        if forced is None:
            return Answer(value, note)
        auto = self._ratio(measured, *((AUTO,) if ways is forced else tuple(ways) for ways in (self.over, self.under)))
        taken = "was not measured" if auto is None else f"takes {measured.taken}: {auto[0]:.3g}"
        return Answer(value, f"{note}; auto {taken}")

    def _ratio(self, measured: Measured, over: Sequence[str], under: Sequence[str]) -> tuple[float, str, str] | None:
        best = [self._best(measured, ways) for ways in (over, under)]
        if best[0] is None or best[1] is None:
            return None
        value = measured.timings[best[0]].median / measured.timings[best[1]].median
        return round(value, self.digits), best[0], best[1]

    @staticmethod
    def _best(measured: Measured, ways: Sequence[str]) -> str | None:
        there = [way for way in ways if way in measured.timings]
        return min(there, key=lambda way: measured.timings[way].median, default=None)


@dataclass(frozen=True)
class Launches:
    """How many launches one call of a way is."""

    case: str
    way: str

    def answer(self, measured: Measured) -> Answer | None:
        return Answer(float(measured.launches[self.way])) if self.way in measured.launches else None


def _us(measured: Measured, way: str) -> str:
    return f"{measured.timings[way].median:.4g}"


CLIF, FOURS = tuple(FORMS), (FOUR, FOUR_PUBLISHED)
QUESTIONS: dict[str, Question] = {
    "linear-64": Ratio("48+16, r=16", CLIF, (BASE,)),
    "linear-1": Ratio("1 row, r=16", CLIF, (BASE,)),
    "linear-256": Ratio("192+64, r=16", CLIF, (BASE,)),
    "linear-qkv": Ratio("48+16, q+k+v", CLIF, (BASE,)),
    "linear-2048": Ratio("64+1984, r=16", CLIF, (BASE,)),
    "linear-2112": Ratio("64+2048, r=16", CLIF, (BASE,)),
    "bare-64": Ratio("64 bare", (AUTO,), (BASE,), digits=2),
    "bare-2112": Ratio("2112 bare", (AUTO,), (BASE,), digits=2),
    "triton-64": Ratio("64 bare", (BASE,), (TRITON_BASE,)),
    "triton-2112": Ratio("2112 bare", (BASE,), (TRITON_BASE,)),
    "four-launches": Ratio("48+16, r=16", FOURS, CLIF),
    "backward-16": Ratio("backward 2048, r=16", CLIF, (DGRAD,)),
    "backward-64": Ratio("backward 2048, r=64", CLIF, (DGRAD,)),
    "layer-1b": Ratio("layer 1b, 48+16", CLIF, (WITHOUT,)),
    "layer-8b": Ratio("layer 8b, 48+16", CLIF, (WITHOUT,)),
    "launches-fused": Launches("48+16, r=16", f"{AUTO}, fused"),
    "launches-three": Launches("48+16, r=16", f"{AUTO}, three"),
    "paged-64": Ratio("paged, heads of 64", (PAGED,), (READ,)),
    "paged-128": Ratio("paged, heads of 128", (PAGED,), (READ,)),
    "paged-64-fp8": Ratio("paged, heads of 64, fp8", (PAGED,), (READ,)),
    "paged-128-fp8": Ratio("paged, heads of 128, fp8", (PAGED,), (READ,)),
}
"""By the name of the goal in gpu_figures.py."""


def goals() -> Iterator[tuple[str, str, Goal]]:
    """What a figure is, what it was, and its goal, for each figure of the kernels."""
    for row in KERNEL_ROWS:
        for goal in row.goals:
            yield f"{row.figure}{f' ({goal.when})' if goal.when else ''}", row.before, goal


def answers(findings: Mapping[str, Measured]) -> dict[str, Answer]:
    """The figures of the cases that were measured."""
    found = {
        name: question.answer(findings[question.case])
        for name, question in QUESTIONS.items()
        if question.case in findings
    }
    return {name: answer for name, answer in found.items() if answer is not None}


def verdict(goal: Goal, answer: Answer | None) -> str:
    """Which of the bounds is met."""
    if answer is None:
        return "not measured"
    better: Callable[[float], bool] = answer.value.__ge__ if goal.at_least else answer.value.__le__
    if goal.stretch is not None and better(goal.stretch):
        return "stretch"
    return "must" if better(goal.bound) else "missed"
