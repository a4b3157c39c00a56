"""The report of the co-serving comparison, as markdown. Pure: all figures come in."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from measures import Capacity, Measures, compare


@dataclass(frozen=True)
class Goal:
    """A bound for a ratio of measures.compare: an upper bound, or a lower one."""

    key: str
    text: str
    bound: float
    at_most: bool = False

    def reached(self, value: float) -> bool:
        return value <= self.bound if self.at_most else value >= self.bound


GOALS = (
    Goal("efficiency", "co-serving efficiency", 1.15),
    Goal("training", "training / training alone", 0.45),
    Goal("attainment_lost", "SLO attainment lost to training", 0.01, at_most=True),
    Goal("itl_p99", "p99 gap between tokens / that of serving alone", 1.25, at_most=True),
    Goal("goodput", "goodput / that of the better of time_slice and split", 1.3),
)
COLUMNS: tuple[tuple[str, str, Callable[[Measures], float]], ...] = (
    ("requests", ".0f", lambda r: r.requests),
    ("output tokens/s", ".0f", lambda r: r.output_tps),
    ("training tokens/s", ".0f", lambda r: r.train_tps),
    ("TTFT p50, ms", ".0f", lambda r: r.ttft_ms[0]),
    ("TTFT p99, ms", ".0f", lambda r: r.ttft_ms[1]),
    ("gap p50, ms", ".0f", lambda r: r.itl_ms[0]),
    ("gap p99, ms", ".0f", lambda r: r.itl_ms[1]),
    ("SLO attainment", ".3f", lambda r: r.attainment),
    ("goodput, requests/s", ".2f", lambda r: r.goodput_rps),
)


@dataclass
class Results:
    """All that was measured. main_load: the load at which modes are compared; shares: time_slice, one per repeat."""

    main_load: float
    capacities: list[Capacity] = field(default_factory=list)
    rows: list[Measures] = field(default_factory=list)
    shares: list[float] = field(default_factory=list)

    def ratios(self) -> list[dict[str, float]]:
        """measures.compare of each repeat."""
        return [
            compare([r for r in self.rows if r.repeat == n and r.load == self.main_load], capacity)
            for n, capacity in enumerate(self.capacities, 1)
        ]


def markdown(title: str, provenance: Sequence[str], config: str, results: Results, plots: Sequence[str]) -> str:
    """The whole report. config: the text of the YAML file; plots: names of the files beside the report."""
    lines = [f"# {title}", "", *[f"* {line}" for line in provenance], ""]
    lines += ["Figures: median (least to most) over the repeats. Ratios are taken within a repeat.", ""]
    lines += ["## Goals", "", *goal_table(results.ratios()), "", "## Alone", "", *capacity_table(results), ""]
    lines += ["## Together", "", *row_table(results), "", *_notes(results)]
    lines += [line for plot in plots for line in (f"![{plot}]({plot})", "")]
    return "\n".join([*lines, "## Configuration", "", "```yaml", config.rstrip(), "```", ""])


def goal_table(ratios: Sequence[dict[str, float]]) -> list[str]:
    lines = ["| goal | bound | measured | reached |", "|---|---|---|---|"]
    for goal in GOALS:
        values = [r[goal.key] for r in ratios if math.isfinite(r.get(goal.key, math.nan))]
        verdict = "not measured" if not values else "yes" if goal.reached(statistics.median(values)) else "no"
        bound = f"at {'most' if goal.at_most else 'least'} {goal.bound:g}"
        lines.append(f"| {goal.text} | {bound} | {spread(values, '.3f')} | {verdict} |")
    return lines


def capacity_table(results: Results) -> list[str]:
    serve, train = ([getattr(c, name) for c in results.capacities] for name in ("serve_tps", "train_tps"))
    return [
        "| what | tokens/s |",
        "|---|---|",
        f"| serving only, saturated | {spread(serve, '.0f')} |",
        f"| training only | {spread(train, '.0f')} |",
    ]


def row_table(results: Results) -> list[str]:
    """One line per mode and load. Efficiency is taken with the capacities of the same repeat."""
    names = ["mode", "load", *(name for name, *_ in COLUMNS), "efficiency"]
    lines = [f"| {' | '.join(names)} |", f"|{'---|' * len(names)}"]
    for mode, load in dict.fromkeys((r.mode, r.load) for r in results.rows):
        rows = [r for r in results.rows if (r.mode, r.load) == (mode, load)]
        cells = [spread([figure(r) for r in rows], form) for _, form, figure in COLUMNS]
        cells.append(spread([results.capacities[r.repeat - 1].efficiency(r) for r in rows], ".2f"))
        lines.append(f"| {mode} | {load:.0%} | {' | '.join(cells)} |")
    return lines


def _notes(results: Results) -> list[str]:
    shares = ", ".join(f"{share:.2f}" for share in results.shares) or "none"
    return [
        "* load: share of the serving capacity of the first repeat, which all repeats take, on average: bursty "
        "arrivals of a minute scatter about it. A repeat has the same requests at the same times in all modes.",
        "* prompts: what they begin with in common is computed once, in all modes alike. No run finds what a former "
        "one computed, since each has processes of its own. Within a run each promotion empties the prefix cache: that "
        "costs the modes that train, and serve_only nothing.",
        "* training tokens/s: of optimizer steps that ended within the load and whose round was committed.",
        "* gap: between two tokens of a request, all gaps of all requests.",
        f"* time_slice had run.training_share {shares}, chosen to train as much as clif in the same repeat. As the two "
        "training columns tell how well that was met, read goodput beside them.",
        "* efficiency: output / serving only + training / training only.",
        "",
    ]


def spread(values: Iterable[float], form: str) -> str:
    """Median (least to most); a dash where nothing was measured."""
    known = sorted(v for v in values if math.isfinite(v))
    if not known:
        return "-"
    median = format(statistics.median(known), form)
    return median if len(known) == 1 else f"{median} ({format(known[0], form)} to {format(known[-1], form)})"
