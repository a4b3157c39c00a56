"""Prints the summary of a run for a terminal; also readable in a plain log. Free of torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from clif.metrics.quality import PHASES, score_table

MOST_GROUPS = 12
"""Lines by class and client that are printed; summary.json has all."""


def print_summary(summary: dict[str, Any], console: Console | None = None) -> None:
    """Print what summarize() returned, readable in a plain log too; console defaults to standard output."""
    console = console or Console(highlight=False)
    for title, rows in _sections(summary):
        table = Table("", "", title=title, title_justify="left", show_header=False, box=box.ASCII)
        table.columns[0].min_width = 22
        for name, text in rows:
            # Without markup: reasons come from other processes and may hold brackets.
            table.add_row(name, Text(text))
        console.print(table)
    print_quality(summary["quality"], console, "quality.groups in summary.json")


def print_quality(figures: Mapping[str, Sequence[Mapping[str, Any]]], console: Console, whole: str) -> None:
    """Tables of `versions` and `groups`, as in the summary. whole: where all groups are found."""
    print_scores("Quality, version by version", figures["versions"], console)
    print_scores("Quality by class and client", figures["groups"][:MOST_GROUPS], console)
    if (more := len(figures["groups"]) - MOST_GROUPS) > 0:
        console.print(f"and {more} more lines by class and client: {whole}")


def print_scores(title: str, lines: Sequence[Mapping[str, Any]], console: Console) -> None:
    """A table of scores, a line for each version; nothing if there is no score."""
    if not any(line["scores"] for line in lines):
        return
    heads, rows = score_table(lines)
    table = Table(*heads, title=title, title_justify="left", box=box.ASCII)
    for row in rows:
        table.add_row(*map(Text, row))
    console.print(table)


def _sections(summary: dict[str, Any]) -> list[tuple[str, list[tuple[str, str]]]]:
    requests, slo, training, adapters = (summary[key] for key in ("requests", "slo", "training", "adapters"))
    latencies = [(name.replace("_ms", " ms"), _pairs(slo[name])) for name in ("ttft_ms", "tpot_ms", "itl_ms", "e2e_ms")]
    states = [(f"replica {replica}", _pairs(seconds)) for replica, seconds in summary["states"].items()]
    failures = [(f"replica {f['replica']}", f"{f['reason']}; {_back(f['rebuild_s'])}") for f in summary["failures"]]
    promotions = [(f"promotion of {p['version']}", _pairs(p)) for p in adapters["promotions"]]
    return [
        ("Run", _run(summary["run"])),
        (
            "Requests",
            [(k, _text(requests[k])) for k in ("submitted", "accepted", "unfinished", "duplicate_ends")]
            + [("finished", _pairs(requests["finished"]))]
            + [(k, f"{r['count']}: {r['reason']}") for k, reasons in requests["reasons"].items() for r in reasons],
        ),
        (
            "SLO",
            [(k, _text(slo[k])) for k in ("attainment", "goodput_rps", "output_tokens_per_s", "duration_s")]
            + latencies,
        ),
        ("Training", [(key, _text(value)) for key, value in training.items()]),
        ("Quality", _quality_rows(summary["quality"])),
        ("Adapters (requests by version)", [("served", _pairs(adapters["versions_served"])), *promotions]),
        ("Replica states, seconds", states),
        *([("Failures of replicas", failures)] if failures else []),
    ]


def _quality_rows(figures: dict[str, Any]) -> list[tuple[str, str]]:
    rows = [(key, _text(figures[key])) for key in ("heldout_loss_before", "heldout_loss_after")]
    for phase in PHASES:
        key = f"exact_match_{phase}"
        text, interval = _text(figures[key]), figures[f"{key}_interval"]
        if interval is not None:
            low, high = map(_text, interval)
            text += f" (95 %: {low} to {high}, {figures[f'{key}_rows']} answers)"
        rows.append((key, text))
    return rows


def _back(seconds: float | None) -> str:
    return "not rebuilt" if seconds is None else f"back after {_text(seconds)} s"


def _run(figures: dict[str, Any]) -> list[tuple[str, str]]:
    plain = [(key, _text(value)) for key, value in figures.items() if key != "unclosed"]
    return plain + [("not closed", _ended(file)) for file in figures["unclosed"]]


def _ended(file: dict[str, Any]) -> str:
    """The end of a file that was not closed. The file does not show whether its process still runs."""
    if file["last_row_s"] is None:
        rows = "no rows"
    else:
        minutes, seconds = divmod(round(file["last_row_s"]), 60)
        rows = f"rows up to its last flush, {minutes // 60:02d}:{minutes % 60:02d}:{seconds:02d} after its start"
    return f"{file['source']} ({file['host'] or 'unknown host'}) ended without closing, or still runs: {rows}"


def _pairs(values: dict[str, Any]) -> str:
    return ", ".join(f"{key} {_text(value)}" for key, value in values.items()) or "-"


def _text(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "none"
    if isinstance(value, float):
        return f"{value:.4g}" if abs(value) < 1000 else f"{value:.0f}"
    return str(value)
