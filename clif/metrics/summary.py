"""The figures of a run, from RUN/run.h5. Free of torch.

Stamps of different files are never subtracted: durations are taken within one control file and added up over restarts.
"""

from __future__ import annotations

import json
import math
import os
from collections import Counter
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from clif.metrics.collect import collect
from clif.metrics.figures import count_reasons
from clif.metrics.merged import load_merged
from clif.metrics.quality import quality
from clif.metrics.sources import sources
from clif.states import ReplicaState
from clif.types import FinishReason

Rows = np.ndarray[Any, Any]

ANSWERED = (FinishReason.STOP.value, FinishReason.LENGTH.value)
PERCENTILES = (50, 90, 99)


def summarize(run_h5: Path) -> dict[str, Any]:
    """Figures of a merged file; null if nothing was measured. Only requests of users count.

    requests: submitted counts requests that were recorded as submitted or as ended; unfinished ones had no terminal
    event; duplicate_ends counts terminal events beyond the first of a request (there should be none).
    reasons: of unanswered requests, by their end; reasons that differ only in numbers count together.
    slo: attainment is the share of requests with a terminal event that were answered (stop, length) and met all
    their promises, so that rejected, failed and cancelled ones count as missed; goodput_rps is their number over
    duration_s, first arrival to last terminal event; output_tokens_per_s counts the tokens of all. Percentiles of
    ttft, tpot and itl take every request that has the figure, those of e2e the answered ones. Milliseconds.
    training: samples and tokens are those of committed rounds; optimizer_steps counts every step done, also in
    discarded rounds; tokens_per_s is tokens over span_s, start of the first round to end of the last. gave_up: why no
    further round was tried although more were wanted; null: they were.
    quality: see clif/metrics/quality.py.
    states: seconds in each state from a replica's first transition to the end of the run, states_end_s.
    failures: of replicas, in order, with the reason and the seconds until it was rebuilt; null: it was not.
    run: name is that of its folder; mode as configured last; started is the wall time of the first start (UTC); engine
    is emulated where no model has computed anything, otherwise clif.
    run.unclosed: files that their process has not closed, with the stamp of their last row in seconds.
    Raises CollectError when the file cannot be read.
    """
    merged = load_merged(run_h5)
    tables, files = merged.tables, merged.files
    users = tables["requests"][tables["requests"]["purpose"] == b"user"]
    ends = {name: _end(name, attributes, tables) for name, attributes in files.items()}
    control_s = sum(end for name, end in ends.items() if name.startswith("control"))
    summary = {
        "run": {
            "name": run_h5.resolve().parent.name,
            **_identity({name: attributes for name, attributes in files.items() if name.startswith("control")}),
            "duration_s": control_s,
            "sources": sorted(files),
            "unreadable": merged.unreadable,
            "unclosed": _unclosed(files, ends),
        },
        "requests": _requests(users, tables["load"]),
        "slo": _slo(users, tables["gaps"]),
        "training": _training(tables["rounds"], tables["train_steps"]),
        "quality": quality(tables["quality"], tables["scores"], tables["adapters"]),
        "adapters": _adapters(users, tables["rounds"]),
        "states": _states(tables["transitions"], ends),
        "states_end_s": control_s,
        "failures": _failures(tables["transitions"]),
    }
    plain: dict[str, Any] = _plain(summary)
    return plain


def write_summary(run_dir: Path) -> dict[str, Any]:
    """Summarize a run into RUN/summary.json; collects first if run.h5 is missing or older than its sources.

    Raises CollectError when there is nothing to collect, and for a damaged run.h5.
    """
    run_h5 = run_dir / "run.h5"
    newest = max((source.path.stat().st_mtime_ns for source in sources(run_dir)), default=0)
    if not run_h5.exists() or run_h5.stat().st_mtime_ns <= newest:
        collect(run_dir)
    summary = summarize(run_h5)
    temporary = run_dir / "summary.json.tmp"
    temporary.write_text(json.dumps(summary, indent=2, allow_nan=False) + "\n")
    os.replace(temporary, run_dir / "summary.json")
    return summary


def _end(name: str, attributes: dict[str, Any], tables: dict[str, Rows]) -> float:
    """Length of a process's file in seconds; that of a killed process from its last row."""
    end = float(attributes.get("end_s", math.nan))
    if math.isfinite(end):
        return end
    stamps = [rows["t"][rows["source"] == name.encode()] for rows in tables.values()]
    return max((float(t.max()) for t in stamps if len(t)), default=0.0)


def _identity(controls: dict[str, dict[str, Any]]) -> dict[str, str | None]:
    """Mode, date and engine, from the files of the control processes."""
    starts = sorted((a for a in controls.values() if "start_unix" in a), key=lambda a: float(a["start_unix"]))
    if not starts:
        return {"mode": None, "started": None, "engine": None}
    started = datetime.fromtimestamp(float(starts[0]["start_unix"]), UTC).isoformat(timespec="seconds")
    engine = str(starts[-1].get("engine", "clif"))
    return {"mode": _mode(str(starts[-1].get("config", ""))), "started": started, "engine": engine}


def _mode(config: str) -> str | None:
    try:
        return str(json.loads(config)["run"]["mode"])
    except (ValueError, LookupError, TypeError):
        return None


def _unclosed(files: dict[str, dict[str, Any]], ends: dict[str, float]) -> list[dict[str, Any]]:
    """Files that were not closed. A run.h5 of an older CLIF lacks the attribute last_row_s."""
    unclosed = {n: a for n, a in sorted(files.items()) if not math.isfinite(a.get("end_s", math.nan))}
    return [
        {
            "source": name,
            "host": str(attributes.get("host", "")),
            "last_row_s": attributes.get("last_row_s", ends[name]),
        }
        for name, attributes in unclosed.items()
    ]


def _by_source(rows: Rows) -> Iterator[tuple[str, Rows]]:
    for source in np.unique(rows["source"]):
        yield source.decode(), rows[rows["source"] == source]


def _requests(users: Rows, load: Rows) -> dict[str, Any]:
    # Matched by id: a request that was accepted before a restart may end after it, in another file.
    ended = set(users["id"].tolist())
    submitted = ended | set(load["request"].tolist())
    counts = Counter(users["finish"].tolist())
    finished = {reason.value: counts[reason.value.encode()] for reason in FinishReason}
    return {
        "submitted": len(submitted),
        "accepted": len(submitted) - finished["rejected"],
        "finished": finished,
        "unfinished": len(submitted - ended),
        "duplicate_ends": len(users) - len(ended),
        "reasons": {r.value: reasons for r in FinishReason if (reasons := _reasons(users, r))},
    }


def _reasons(users: Rows, finish: FinishReason) -> list[dict[str, Any]]:
    if finish.value in ANSWERED:
        return []
    details = users["detail"][users["finish"] == finish.value.encode()]
    return count_reasons(detail.decode(errors="replace") or "no reason given" for detail in details)


def _answered(users: Rows) -> Rows:
    return np.isin(users["finish"], [reason.encode() for reason in ANSWERED])


def _slo(users: Rows, gaps: Rows) -> dict[str, Any]:
    met = int((users["slo_met"] & _answered(users)).sum())
    duration = sum(float(rows["finished_s"].max() - rows["arrival_s"].min()) for _, rows in _by_source(users))
    return {
        "attainment": met / len(users) if len(users) else None,
        "goodput_rps": met / duration if duration > 0 else None,
        "output_tokens_per_s": int(users["output_tokens"].sum()) / duration if duration > 0 else None,
        "duration_s": duration,
        "ttft_ms": _percentiles(users["ttft_s"]),
        "tpot_ms": _percentiles(users["tpot_s"]),
        "itl_ms": _percentiles(gaps["itl_s"]),
        "e2e_ms": _percentiles(users["e2e_s"][_answered(users)]),
    }


def _percentiles(seconds: Rows) -> dict[str, float | None]:
    known = seconds[np.isfinite(seconds)] * 1000
    return {f"p{p}": float(np.percentile(known, p)) if len(known) else None for p in PERCENTILES}


def _training(rounds: Rows, steps: Rows) -> dict[str, Any]:
    committed = rounds[rounds["state"] == b"committed"]
    span = sum(float(rows["ended_s"].max() - rows["started_s"].min()) for _, rows in _by_source(rounds))
    tokens = int(committed["tokens"].sum())
    return {
        "tokens": tokens,
        "tokens_per_s": tokens / span if span > 0 else None,
        "span_s": span,
        "samples": int(committed["samples"].sum()),
        "optimizer_steps": len(steps),
        "rounds_completed": len(committed),
        "rounds_discarded": int((rounds["state"] == b"discarded").sum()),
        "gave_up": _gave_up(rounds),
    }


def _gave_up(rounds: Rows) -> str | None:
    """Why training was given up, in the last start that had rounds, since each start tries again."""
    last = rounds["gave_up"][-1].decode() if len(rounds) else ""
    return last or None


def _adapters(users: Rows, rounds: Rows) -> dict[str, Any]:
    served = Counter(users["version"][users["output_tokens"] > 0].tolist())
    promotions = [
        {
            "version": int(row["version"]),
            "round_id": int(row["round_id"]),
            "running_requests": int(row["running_requests"]),
            "heldout_loss": float(row["heldout_candidate"]),
        }
        for row in rounds[rounds["state"] == b"committed"]
    ]
    return {"versions_served": {str(v): served[v] for v in sorted(served)}, "promotions": promotions}


def _states(transitions: Rows, ends: dict[str, float]) -> dict[str, dict[str, float]]:
    seconds: dict[str, dict[str, float]] = {}
    for source, rows in _by_source(transitions):
        for replica in np.unique(rows["replica"]).tolist():
            mine = rows[rows["replica"] == replica]
            total = seconds.setdefault(str(replica), {state.value: 0.0 for state in ReplicaState})
            # Rows of one file are in the order of time: each state lasts until the next row, the last until the end.
            stops = [*mine["t"][1:], ends[source]]
            for state, start, stop in zip(mine["to_state"], mine["t"], stops, strict=True):
                total[state.decode()] += float(stop - start)
    return seconds


def _failures(transitions: Rows) -> list[dict[str, Any]]:
    failures = []
    for _, rows in _by_source(transitions):
        for row in rows[rows["to_state"] == ReplicaState.FAILED.value.encode()]:
            later = rows[(rows["replica"] == row["replica"]) & (rows["t"] > row["t"])]
            rebuild_s = float(later["t"][0] - row["t"]) if len(later) else None
            failures.append({"replica": int(row["replica"]), "reason": row["reason"].decode(), "rebuild_s": rebuild_s})
    return failures


def _plain(value: Any) -> Any:
    """The same with null in place of values that are not finite: JSON has no NaN."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
