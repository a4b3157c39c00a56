"""Markdown and plot of the kernels' benchmark."""

from __future__ import annotations

import datetime
from collections.abc import Mapping, Sequence
from pathlib import Path

from kernel_cases import AnyCase, Case, LayerCase, PagedCase
from kernel_goals import (
    AUTO,
    BASE,
    DGRAD,
    FORMS,
    FOUR,
    FOUR_PUBLISHED,
    PAGED,
    READ,
    TRITON_BASE,
    WITHOUT,
    Measured,
    answers,
    goals,
    verdict,
)
from rivals import AUGMENTED, COMPILED, ONE_PRODUCT, PEFT, PEFT_BACKWARD, PEFT_MIXED, PER_SEGMENT

ORDER = (
    BASE, DGRAD, WITHOUT, READ, AUTO, *FORMS, TRITON_BASE, PAGED, FOUR, FOUR_PUBLISHED, PER_SEGMENT, ONE_PRODUCT,
    AUGMENTED, PEFT, PEFT_MIXED, COMPILED, PEFT_BACKWARD,
)  # fmt: skip
ALONE = (BASE, DGRAD, WITHOUT, READ)
"""What each way is compared with; a case has one of them."""
KINDS: dict[str, type] = {
    "Linear layers": Case,
    "Whole decoder layers": LayerCase,
    "Attention of a decode step": PagedCase,
}
Findings = Mapping[str, Measured]


def report(findings: Findings, cases: Sequence[AnyCase], about: Sequence[str], plot: str | None) -> str:
    """Markdown. A case that is not among the findings was not measured."""
    lines = [f"# Kernels, {datetime.date.today().isoformat()}", "", *[f"* {line}" for line in about], ""]
    lines += [*_goals(findings), *_times(findings, cases), *_faults(findings)]
    left = [case.name for case in cases if case.name not in findings]
    lines += ["", "## Notes", "", *([f"* not measured, time was up: {', '.join(left)}"] if left else [])]
    for name, found in findings.items():
        lines += [f"* {name}: {way} failed: {why}" for way, why in found.failed.items()]
        lines += [f"* {name}: {note}" for note in found.notes]
    return "\n".join([*lines, "", *([f"![{plot}]({plot})", ""] if plot else [])])


def _goals(findings: Findings) -> list[str]:
    found = answers(findings)
    lines = ["## Goals", "", "| figure | 2026-11-27 | must | stretch | here | | |", "|---|---|---|---|---|---|---|"]
    for figure, before, goal in goals():
        answer = found.get(goal.name)
        bounds = (goal.bound, goal.stretch)
        must, stretch = (
            "" if bound is None else f"{'>=' if goal.at_least else '<='} {goal.shown(bound)}" for bound in bounds
        )
        here = "" if answer is None else goal.shown(answer.value)
        note = "" if answer is None else answer.note
        lines.append(f"| {figure} | {before} | {must} | {stretch} | {here} | {verdict(goal, answer)} | {note} |")
    return lines


def _in_order(findings: Findings) -> list[str]:
    """The ways that have times; those that ORDER does not know come last."""
    there = dict.fromkeys(way for found in findings.values() for way in found.timings)
    return [*(way for way in ORDER if way in there), *(way for way in there if way not in ORDER)]


def _times(findings: Findings, cases: Sequence[AnyCase]) -> list[str]:
    lines = []
    for title, kind in KINDS.items():
        there = {c.name: findings[c.name] for c in cases if isinstance(c, kind) and c.name in findings}
        ways = _in_order(there)
        if not ways:
            continue
        lines += ["", f"## {title}, microseconds: median (10 % to 90 %)", ""]
        lines += [f"| case | {' | '.join(ways)} | {AUTO} takes |", "|---" * (len(ways) + 2) + "|"]
        for name, found in there.items():
            times = " | ".join(str(found.timings.get(way, "")) for way in ways)
            lines.append(f"| {name} | {times} | {found.taken} |")
    return lines


def _faults(findings: Findings) -> list[str]:
    wrong = [f"* {name}: {'; '.join(found.faults)}" for name, found in findings.items() if found.faults]
    return ["", "## Correctness", "", *(wrong or ["* every case is within its specification"])]


def draw(findings: Findings, path: Path) -> str | None:
    """Time of every way over that of the product alone, by case; None without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return None
    figure = Figure(figsize=(12, 5))
    axes = figure.add_subplot()
    names = list(findings)
    ways = [way for way in _in_order(findings) if way not in ALONE]
    for i, way in enumerate(ways):
        heights = [_over_alone(findings[name], way) for name in names]
        axes.bar([x + i / (len(ways) + 1) for x in range(len(names))], heights, 1 / (len(ways) + 1), label=way)
    axes.axhline(1.0, color="black", linewidth=0.8)
    axes.set_xticks([x + 0.4 for x in range(len(names))], names, rotation=45, ha="right")
    axes.set_ylabel("time / time of what is compared with")
    axes.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    return path.name


def _over_alone(found: Measured, way: str) -> float:
    alone = next((found.timings[name] for name in ALONE if name in found.timings), None)
    return found.timings[way].median / alone.median if way in found.timings and alone else 0.0
