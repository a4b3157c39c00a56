"""The figures that the GPU stages are asked for, with their goals, and how a stage hands them on. Free of torch.

A stage prints a line for each figure as soon as it is known, so that a stage that is ended keeps what it has found. All
but say() is pure.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

MARK = "FIGURE"


@dataclass(frozen=True)
class Goal:
    """One number. unit: "%", "x", "ms" or nothing; when: what tells it from others of its row; stretch: a better goal.

    at_least: the bound is the least that meets the goal, otherwise the most.
    """

    name: str
    bound: float
    unit: str = ""
    at_least: bool = True
    when: str = ""
    stretch: float | None = None

    def met(self, value: float) -> bool:
        return value >= self.bound if self.at_least else value <= self.bound

    def shown(self, value: float) -> str:
        return (
            f"{value:.0%}" if self.unit == "%" else f"{value:.3g}{f' {self.unit}' if self.unit == 'ms' else self.unit}"
        )

    @property
    def text(self) -> str:
        stretch = "" if self.stretch is None else f" (stretch {self.shown(self.stretch)})"
        return f"{'>=' if self.at_least else '<='} {self.shown(self.bound)}{self._when}{stretch}"

    def answer(self, value: float) -> str:
        return f"{self.shown(value)}{self._when}" if math.isfinite(value) else f"not measured{self._when}"

    @property
    def _when(self) -> str:
        return f" {self.when}" if self.when else ""


@dataclass(frozen=True)
class Row:
    """A row of the final table. before: the first GPU's figure of the engine without graphs."""

    figure: str
    before: str
    goals: tuple[Goal, ...]


ENGINE_ROWS = (
    Row(
        "decode step, 1B, 64 requests, context about 384, whole step with the host: share of the limit",
        "2 to 3 %",
        (Goal("decode-1b", 0.55, "%", stretch=0.65),),
    ),
    Row("the same, 8B", "refused", (Goal("decode-8b", 0.70, "%", stretch=0.80),)),
    Row("tokens/s against transformers.generate, 1B, 64 streams", "2.3 to 3.5x", (Goal("generate-1b", 25, "x"),)),
    Row("decode with LoRA / without", "not measurable", (Goal("lora-1b", 0.93),)),
    Row("training alone, 1B, 16k tokens a step, against PEFT", "0.56x", (Goal("train-16384", 1.3, "x"),)),
    Row("the same, 512 tokens", "1.26x", (Goal("train-512", 4, "x"),)),
    Row("co-serving efficiency, 64 streams of decode", "training 0", (Goal("efficiency", 1.3),)),
    Row(
        "training kept, TTFT 400 ms, TPOT 50 ms, no request lost that serving alone meets",
        "0 %",
        (
            Goal("kept-70", 0.76, "%", when="at 70 % load"),
            Goal("lost-70", 0, at_least=False, when="lost"),
            Goal("kept-100", 0.40, "%", when="at 100 %"),
            Goal("lost-100", 0, at_least=False, when="lost"),
        ),
    ),
    Row(
        "p99 gap between tokens, with training / without",
        "-",
        (
            Goal("gap-70", 1.25, at_least=False, when="at 70 % load"),
            Goal("gap-100", 1.25, at_least=False, when="at 100 %"),
        ),
    ),
    Row("host time of a step outside the graph, 1B", "about 25 ms", (Goal("host-1b", 0.5, "ms", at_least=False),)),
    Row(
        "step with a prompt of 128 tokens beside 31 answers, 1B",
        "17 ms",
        (Goal("prompt-1b", 4, "ms", at_least=False),),
    ),
    Row(
        "kernels of a layer in decode, besides LoRA, 1B",
        "536 in all, 16 layers",
        (Goal("kernels-1b", 12, at_least=False),),
    ),
)
"""`host-1b` is in milliseconds."""


def ratio(name: str, bound: float, stretch: float, when: str = "") -> Goal:
    """A time over another, as small as can be."""
    return Goal(name, bound, at_least=False, when=when, stretch=stretch)


def paged(suffix: str) -> tuple[Goal, ...]:
    """Of attention in decode, by size of a head."""
    return tuple(Goal(f"paged-{d}{suffix}", 1.5, at_least=False, when=f"heads of {d}") for d in (64, 128))


KERNEL_ROWS = (
    Row("best form / base, 48+16 rows 4096x4096, r=16", "2.2, four launches 1.58", (ratio("linear-64", 1.20, 1.10),)),
    Row(
        "the same at 1 row, at 192+64 rows",
        "1.39, 1.84",
        (ratio("linear-1", 1.15, 1.05, "at 1"), ratio("linear-256", 1.20, 1.10, "at 192+64")),
    ),
    Row("the same, q+k+v 4096 -> 6144, 48+16 rows", "2.0", (ratio("linear-qkv", 1.20, 1.10),)),
    Row(
        "the same, 64+1984 and 64+2048 rows",
        "1.52, 1.37",
        (ratio("linear-2048", 1.12, 1.06, "at 64+1984"), ratio("linear-2112", 1.12, 1.06, "at 64+2048")),
    ),
    Row(
        "no adapter / base, by dispatch",
        "1.9, 1.41",
        (ratio("bare-64", 1.00, 0.98, "at 64 rows"), ratio("bare-2112", 1.00, 0.98, "at 2,112")),
    ),
    Row(
        "speed of Triton's base product, of cuBLAS's",
        "0.72, 0.71",
        (Goal("triton-64", 0.95, when="at 64 rows", stretch=1.0), Goal("triton-2112", 0.95, when="at 2,112")),
    ),
    Row(
        "speed of the best form at decode, of the four launches' (48+16 rows, r=16)",
        "0.73x",
        (Goal("four-launches", 1.3, "x", stretch=1.6),),
    ),
    Row(
        "backward (dX, dA, dB) / dgrad, 2,048 rows",
        "1.67, 1.87",
        (ratio("backward-16", 1.15, 1.08, "at r=16"), ratio("backward-64", 1.25, 1.12, "at r=64")),
    ),
    Row(
        "whole layer with adapters / without, 64 rows of decode",
        "-",
        (ratio("layer-1b", 1.10, 1.05, "1B"), ratio("layer-8b", 1.10, 1.05, "8B")),
    ),
    Row(
        "launches of a linear layer with adapters",
        "4",
        (
            Goal("launches-fused", 1, at_least=False, when="fused"),
            Goal("launches-three", 3, at_least=False, when="three"),
        ),
    ),
    Row("paged decode / reading K and V at the copy rate, 64 contexts of 384", "2.5", paged("")),
    Row("the same, K and V of eight bits", "-", paged("-fp8")),
)
"""The best of CLIF's forms counts; the note of a figure says which it is, and what is taken without being forced."""
ROWS = (*ENGINE_ROWS, *KERNEL_ROWS)
"""In the order of the final table."""
NAMES = frozenset(goal.name for row in ROWS for goal in row.goals)


def say(name: str, value: float, note: str = "") -> None:
    """Print a figure of the final table. note: what a reader has to know about it."""
    if name not in NAMES:
        raise ValueError(f"no figure {name}: choose from {', '.join(sorted(NAMES))}")
    print(f"{MARK} {name} {value!r} {note}".rstrip(), flush=True)


def read(lines: Iterable[str]) -> dict[str, tuple[float, str]]:
    """The figures among the lines of logs, with their notes: of two of one name, the later."""
    found = {}
    for line in lines:
        mark, _, rest = line.partition(" ")
        words = rest.split(" ", 2)
        if mark == MARK and len(words) > 1 and words[0] in NAMES:
            found[words[0]] = (float(words[1]), words[2] if len(words) > 2 else "")
    return found


def table(found: dict[str, tuple[float, str]], dry: bool = False) -> list[str]:
    """Markdown of all rows. A figure that was not measured is no figure; a dry run meets and misses nothing."""
    lines = ["## Figures", "", "| figure | first GPU | goal | here | met |", "|---|---|---|---|---|"]
    for row in ROWS:
        values = [found.get(goal.name, (math.nan, ""))[0] for goal in row.goals]
        here = ", ".join(goal.answer(value) for goal, value in zip(row.goals, values, strict=True))
        verdict = "dry run" if dry else _verdict(row, values)
        lines.append(f"| {row.figure} | {row.before} | {', '.join(g.text for g in row.goals)} | {here} | {verdict} |")
    notes = [f"* {name}: {note}" for name, (_, note) in found.items() if note]
    return [*lines, "", *notes, *([""] if notes else [])]


def _verdict(row: Row, values: list[float]) -> str:
    known = [goal.met(value) for goal, value in zip(row.goals, values, strict=True) if math.isfinite(value)]
    if len(known) < len(row.goals):
        return "no" if False in known else "?"
    return "yes" if all(known) else "no"
