"""Prints a run's status for a terminal; readable in a plain log, too. Free of torch."""

from __future__ import annotations

import datetime
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from clif.clients.operation import Status, duration
from clif.metrics.summary_print import print_scores

LATEST = 12
Row = Sequence[object]


def print_status(status: Status, console: Console | None = None) -> None:
    """The run in one table, and what needs a table of its own where there is any."""
    console = console or Console(highlight=False, soft_wrap=True)
    if status.note:
        console.print(status.note, markup=False)
    _pairs(console, _run(status.body))
    for show in (print_replicas, print_jobs, print_versions, print_quality, print_rounds):
        show(status.body, console)


def print_replicas(body: dict[str, Any], console: Console) -> None:
    rows = [
        (
            row["replica"],
            row["state"] + (f", drained: {row['drained']}" if row["drained"] else ""),
            f"{row['outstanding']}/{row['max_batch']}",
            f"{row['utilisation']:.0%}",
            f"{row['kv_used'] / max(1, row['kv_tokens']):.0%}",
            row["version"],
            row["slack"] or "-",
        )
        for row in body["replicas"]
    ]
    names = ("replica", "state", "running", "utilisation", "kv", "version", "slack of training")
    _table(console, "Replicas", names, rows)
    if (more := body["replica_count"] - len(rows)) > 0:
        console.print(f"and {more} more")


def print_rounds(body: dict[str, Any], console: Console) -> None:
    rows = [
        (
            row["round_id"],
            row["state"],
            row["members"],
            row["job"] or "own data",
            loss(row["train_loss"]),
            f"{loss(row['heldout_active'])} -> {loss(row['heldout_candidate'])}",
            row["reason"],
        )
        for row in body["rounds"][::-1][:LATEST]
    ]
    _table(console, "Rounds", ("round", "state", "members", "job", "loss", "held-out", "reason"), rows)


def print_versions(body: dict[str, Any], console: Console) -> None:
    rows = [
        (row["id"], row["state"], loss(row["heldout_loss"]), row["round_id"] or "-", row.get("requests", "-"))
        for row in map(_renamed, body["versions"])
    ]
    _table(console, "Versions", ("version", "state", "held-out loss", "round", "requests"), rows)


def print_quality(body: dict[str, Any], console: Console) -> None:
    """Scores of answers to held-out rows; of a server without any, nothing."""
    print_scores("Quality", body.get("quality", []), console)


def print_jobs(body: dict[str, Any], console: Console) -> None:
    rows = [
        (
            row["id"],
            row["status"],
            row["adapter"],
            f"{row['counted']}/{row['wanted']}",
            row["completed"],
            row["version"] or "-",
            row["error"] or row["event"],
        )
        for row in body["jobs"]["rows"]
    ]
    _table(console, "Jobs", ("job", "status", "adapter", "samples", "rounds", "version", "last event"), rows)


def print_events(body: dict[str, Any], console: Console) -> None:
    rows = [
        (datetime.datetime.fromtimestamp(row["unix"]).strftime("%H:%M:%S"), row["kind"], row["text"])
        for row in body["events"]
    ]
    _table(console, "Events", ("time", "kind", "what"), rows)


def print_answer(answer: Any, console: Console) -> None:
    """What an action answered: names and values."""
    _pairs(console, [(name, _plain(value)) for name, value in answer.items() if name != "versions"])
    if "versions" in answer:
        print_versions(answer, console)


PRINTED: dict[str, Callable[[dict[str, Any], Console], None]] = {
    "states": print_replicas,
    "rounds": print_rounds,
    "jobs": print_jobs,
    "events": print_events,
}


def _run(body: dict[str, Any]) -> list[tuple[str, object]]:
    run, promise, training, totals = (body[name] for name in ("run", "promise", "training", "totals"))
    states = ", ".join(f"{count} {state}" for state, count in sorted(body["states"].items()))
    ends = ", ".join(f"{reason} {count}" for reason, count in totals["requests"].items() if count)
    met = f"{promise['met']} of {promise['finished']} in the last {promise['window_s']:g} s"
    return [
        ("run", f"{run['name']}, {run['model']}, CLIF {body['version']}"),
        ("phase", f"{run['phase']}, after {duration(run['seconds'])}"),
        ("replicas", states or "-"),
        ("requests", f"{run['outstanding']} open, {run['queued']} of them queued; ended: {ends or 'none'}"),
        ("in the promise", met if promise["finished"] else "nothing ended lately"),
        ("first token", f"{_latency(run['ttft_ms'])}, promise {promise['ttft_ms']:g} ms"),
        ("between tokens", f"{_latency(run['itl_ms'])}, promise {promise['tpot_ms']:g} ms"),
        ("pressure", f"{run['pressure']}: {run['pressure_reason'] or '-'}"),
        ("training", _training(training)),
        (
            "trained",
            f"{training['steps']} steps, loss {loss(training['last_loss'])}; {totals['trained_tokens']} tokens",
        ),
        ("rounds", f"{totals['rounds']['committed']} committed, {totals['rounds']['discarded']} discarded"),
        ("answers", f"by version {run['version']} of adapter clif" if run["version"] else "by the base model"),
    ]


def _training(training: dict[str, Any]) -> str:
    now = training["round"]
    if not training["enabled"]:
        return "off (train.enabled is false)"
    if now is not None:
        more = f", job {now['job']}" if now["job"] else ""
        more += f"; then paused: {training['paused']}" if training["paused"] else ""
        return f"round {now['round_id']} {now['state']} for {duration(now['seconds'])}, {now['members']} members{more}"
    return f"paused: {training['paused']}" if training["paused"] else f"no round: {training['reason'] or '-'}"


def _renamed(row: dict[str, Any]) -> dict[str, Any]:
    """The listing of versions calls it a round."""
    return {**row, "round_id": row.get("round_id", row.get("round"))}


def _plain(value: object) -> object:
    """As a person reads it."""
    if isinstance(value, dict):
        return ", ".join(f"{name} {each}" for name, each in value.items()) or "-"
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "-" if value is None or value == "" else value


def _latency(quantiles: dict[str, float | None]) -> str:
    if quantiles["p50"] is None:
        return "-"
    return f"{quantiles['p50']:g} ms median, {quantiles['p99']:g} ms p99"


def loss(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _pairs(console: Console, pairs: Iterable[tuple[str, object]]) -> None:
    table = Table("", "", show_header=False, box=box.ASCII)
    for name, text in pairs:
        # Without markup: reasons come from other processes and may hold brackets.
        table.add_row(name, Text(str(text)))
    console.print(table)


def _table(console: Console, title: str, names: Sequence[str], rows: Sequence[Row]) -> None:
    if not rows:
        return
    table = Table(*names, title=title, title_justify="left", box=box.ASCII)
    for row in rows:
        table.add_row(*(Text(str(value)) for value in row))
    console.print(table)
