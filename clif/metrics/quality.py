"""Quality in a run's summary: before and after, version by version, and by class and client. Free of torch."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from clif.metrics.figures import wilson

Rows = np.ndarray[Any, Any]
PHASES = ("before", "after")
GROUPS = ("class", "client")


def quality(measured: Rows, scores: Rows, adapters: Rows) -> dict[str, Any]:
    """exact_match_*_interval is the 95 % interval (Wilson) of the share, of exact_match_*_rows answers.

    versions: a line for each adapter version of the run's own data that was scored or promoted, oldest first: its
    scores by metric, and gate_loss, the held-out loss that it was promoted by. A version that was measured twice has
    its last scores. groups: the same scores of classes and clients.
    """
    last = {(int(r["version"]), r["metric"], r["group"], r["name"]): r for r in scores}
    gates = {int(row["version"]): float(row["heldout_loss"]) for row in adapters if row["adapter"] == b"clif"}
    found: dict[int, dict[str, Any]] = {
        version: {"version": version, "gate_loss": gates.get(version), "scores": {}}
        for version in sorted({*gates, *(key[0] for key in last)})
    }
    groups: dict[tuple[str, str, int], dict[str, Any]] = {}
    for (version, metric, kind, name), row in last.items():
        group, called = kind.decode(), name.decode()
        if group in GROUPS:
            key = (group, called, version)
            line = groups.setdefault(key, {"group": group, "name": called, "version": version, "scores": {}})
        else:
            line = found[version]
        line["scores"][metric.decode()] = _score(row)
    lines = [groups[key] for key in sorted(groups)]
    return {**_before_and_after(measured), "versions": [*found.values()], "groups": lines}


def score_table(lines: Iterable[Mapping[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Heads and rows of a printed table: a metric's versions one below the other. lines: as in `versions` or `groups`.

    It fits a terminal of 80 columns whatever the number of metrics.
    """
    shown = list(lines)
    names = [name for name in ("group", "name", "version", "weights") if any(name in line for line in shown)]
    rows = [
        [metric, *(str(line[name]) for name in names), *_texts(metric, line["scores"][metric])]
        for line, metric in _by_metric(shown)
    ]
    gates = [
        ["gate_loss", *(str(line.get(name, "")) for name in names), number(line["gate_loss"]), "-", "-"]
        for line in shown
        if line.get("gate_loss") is not None
    ]
    return ["metric", *names, "value", "95 % interval", "answers"], gates + rows


def _by_metric(lines: Sequence[Mapping[str, Any]]) -> Iterator[tuple[Mapping[str, Any], str]]:
    """Metric by metric, within it group by group, within that version by version, in the order of `lines`."""
    for metric in dict.fromkeys(metric for line in lines for metric in line["scores"]):
        yield from ((line, metric) for line in lines if metric in line["scores"])


def number(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.3g}" if abs(value) < 100 else f"{value:.1f}" if abs(value) < 1e6 else f"{value:.2g}"


def _texts(metric: str, score: Mapping[str, Any]) -> tuple[str, str, str]:
    """Value, interval and count. Loss and perplexity count tokens."""
    interval = "-" if score["low"] is None else f"{number(score['low'])} to {number(score['high'])}"
    unit = " tokens" if metric in ("loss", "perplexity") else ""
    return number(score["value"]), interval, f"{score['count']}{unit}"


def _score(row: Any) -> dict[str, Any]:
    low, high = float(row["low"]), float(row["high"])
    known = np.isfinite(low) and np.isfinite(high)
    interval = {"low": low if known else None, "high": high if known else None}
    return {"value": float(row["value"]), **interval, "count": int(row["count"])}


def _before_and_after(rows: Rows) -> dict[str, Any]:
    """The first figure of "before" and the last of "after": a resumed run is compared with its beginning."""
    result: dict[str, Any] = {}
    for phase, position in zip(PHASES, (0, -1), strict=True):
        mine = rows[rows["phase"] == phase.encode()]
        losses, shares = (mine[np.isfinite(mine[figure])] for figure in ("heldout_loss", "exact_match"))
        result[f"heldout_loss_{phase}"] = float(losses["heldout_loss"][position]) if len(losses) else None
        share = float(shares["exact_match"][position]) if len(shares) else None
        count = int(shares["exact_match_rows"][position]) if len(shares) else 0
        interval = wilson(round((share or 0.0) * count), count)
        result[f"exact_match_{phase}"] = share
        result[f"exact_match_{phase}_interval"] = None if interval is None else list(interval)
        result[f"exact_match_{phase}_rows"] = count
    return result
