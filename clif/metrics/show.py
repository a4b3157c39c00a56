"""Print a summary so that it reads well on a terminal and in a plain log. Free of torch."""

from __future__ import annotations

from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table


def print_summary(summary: dict[str, Any], console: Console | None = None) -> None:
    """Print what summarize() returned; console defaults to standard output."""
    console = console or Console(highlight=False)
    for title, rows in _sections(summary):
        table = Table("", "", title=title, title_justify="left", show_header=False, box=box.ASCII)
        table.columns[0].min_width = 22
        for name, text in rows:
            table.add_row(name, text)
        console.print(table)


def _sections(summary: dict[str, Any]) -> list[tuple[str, list[tuple[str, str]]]]:
    requests, slo, training, adapters = (summary[key] for key in ("requests", "slo", "training", "adapters"))
    latencies = [(name.replace("_ms", " ms"), _pairs(slo[name])) for name in ("ttft_ms", "tpot_ms", "itl_ms", "e2e_ms")]
    states = [(f"replica {replica}", _pairs(seconds)) for replica, seconds in summary["states"].items()]
    promotions = [(f"promotion of {p['version']}", _pairs(p)) for p in adapters["promotions"]]
    return [
        ("Run", [(key, _text(value)) for key, value in summary["run"].items()]),
        (
            "Requests",
            [(k, _text(requests[k])) for k in ("submitted", "accepted", "unfinished", "duplicate_ends")]
            + [("finished", _pairs(requests["finished"]))],
        ),
        ("SLO", [(k, _text(slo[k])) for k in ("attainment", "goodput_rps", "duration_s")] + latencies),
        ("Training", [(key, _text(value)) for key, value in training.items()]),
        ("Quality", [(key, _text(value)) for key, value in summary["quality"].items()]),
        ("Adapters (requests by version)", [("served", _pairs(adapters["versions_served"])), *promotions]),
        ("Replica states, seconds", states),
    ]


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
