"""Figures of single runs for the co-serving comparison, from their run.h5. All but read_run is pure.

Stamps are seconds since the start of the load. Those of training come from another process than those of serving and
are shifted by the files' wall times: all processes of a benchmark run on one host, and a window lasts for seconds.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np

Floats = np.ndarray[Any, np.dtype[np.float64]]
Rows = np.ndarray[Any, Any]


@dataclass(frozen=True)
class RunData:
    """The records of a run: stamps (_s) by request, token, optimizer step and round; gaps_s between tokens of a
    request.

    met: requests that were answered and met their SLO. step_* and round_* are those of committed rounds only.
    """

    arrival_s: Floats
    dispatched_s: Floats
    finished_s: Floats
    ttft_s: Floats
    met: Rows
    token_s: Floats
    gaps_s: Floats
    step_s: Floats
    step_tokens: Floats
    round_s: Floats
    round_tokens: Floats


@dataclass(frozen=True)
class Measures:
    """One run under load. load: share of the serving capacity; output and training tokens/s within the load's time.

    Latencies in milliseconds, (p50, p99). attainment: share of requests within their SLO; goodput: those per second.
    """

    mode: str
    load: float
    repeat: int
    requests: int
    output_tps: float
    train_tps: float
    ttft_ms: tuple[float, float]
    itl_ms: tuple[float, float]
    attainment: float
    goodput_rps: float


@dataclass(frozen=True)
class Capacity:
    """Tokens/s of the machine in one repeat, of serving alone and of training alone."""

    serve_tps: float
    train_tps: float

    def efficiency(self, row: Measures) -> float:
        """Co-serving efficiency: the sum of the shares of the two capacities."""
        return ratio(row.output_tps, self.serve_tps) + ratio(row.train_tps, self.train_tps)


def read_run(run_h5: Path) -> RunData:
    """Read a finished run."""
    with h5py.File(run_h5, "r") as file:
        tables = {name: data[:] for name, data in file.items() if isinstance(data, h5py.Dataset)}
        started = {name: float(group.attrs["start_unix"]) for name, group in file["sources"].items()}
    users = tables["requests"][tables["requests"]["purpose"] == b"user"]
    opened = _opened(users, tables["load"])
    rounds = tables["rounds"][tables["rounds"]["state"] == b"committed"]
    steps = tables["train_steps"][np.isin(tables["train_steps"]["round_id"], rounds["round_id"])]
    shift = np.array([started[s.decode()] - started["control"] for s in steps["source"]], dtype=float)
    return RunData(
        arrival_s=users["arrival_s"] - opened,
        dispatched_s=users["dispatched_s"] - opened,
        finished_s=users["finished_s"] - opened,
        ttft_s=users["ttft_s"],
        met=users["slo_met"],
        token_s=_token_stamps(users, tables["gaps"]) - opened,
        gaps_s=tables["gaps"]["itl_s"],
        step_s=steps["t"] + shift - opened,
        step_tokens=steps["tokens"].astype(float),
        round_s=rounds["ended_s"] - opened,
        round_tokens=rounds["tokens"].astype(float),
    )


def _opened(users: Rows, load: Rows) -> float:
    """Stamp of the start of the load: a request arrives at its planned time after it. 0 if there was no load."""
    planned = dict(zip(load["request"].tolist(), load["at_s"].tolist(), strict=True))
    stamps = [float(u["arrival_s"]) - planned[int(u["id"])] for u in users]
    return min(stamps, default=0.0)


def _token_stamps(users: Rows, gaps: Rows) -> Floats:
    """Stamp of every output token: a request's first one, and its gaps, which were written in order."""
    stamps: list[Floats] = [np.zeros(0)]
    for user in users[np.isfinite(users["first_token_s"])]:
        own = gaps["itl_s"][gaps["request"] == user["id"]]
        stamps.append(user["first_token_s"] + np.concatenate([[0.0], np.cumsum(own)]))
    return np.sort(np.concatenate(stamps))


def serve_capacity(run: RunData) -> float:
    """Output tokens/s of a saturated run, from the first request handed to a replica to the last.

    Until the last hand-over other requests wait, so the batch is full. Requests that arrived together end together:
    between two hand-overs lie complete waves of prompts and answers.
    """
    dispatched = run.dispatched_s[np.isfinite(run.dispatched_s)]
    start, end = (float(dispatched.min()), float(dispatched.max())) if len(dispatched) else (0.0, 0.0)
    tokens = int(((run.token_s >= start) & (run.token_s < end)).sum())
    if not tokens:
        raise ValueError("no request had to wait, so nothing was saturated: raise the number of requests")
    return tokens / (end - start)


def train_capacity(run: RunData) -> float:
    """Training tokens/s of rounds back to back, from the end of the first: it pays for the start-up."""
    if len(run.round_s) < 2:
        raise ValueError(
            f"{len(run.round_s)} rounds were committed, 2 are needed: see the run's log for why the others were not"
        )
    order = np.argsort(run.round_s)
    ended, tokens = run.round_s[order], run.round_tokens[order]
    return float(tokens[1:].sum() / (ended[-1] - ended[0]))


def measure(run: RunData, mode: str, load: float, repeat: int, load_s: float) -> Measures:
    """Figures of a run whose load lasted load_s. Every request counts; rates count the time of the load."""

    def within(stamps: Floats) -> Rows:
        return (stamps >= 0) & (stamps < load_s)

    return Measures(
        mode=mode,
        load=load,
        repeat=repeat,
        requests=len(run.met),
        output_tps=float(within(run.token_s).sum()) / load_s,
        train_tps=float(run.step_tokens[within(run.step_s)].sum()) / load_s,
        ttft_ms=_percentiles(run.ttft_s),
        itl_ms=_percentiles(run.gaps_s),
        attainment=ratio(float(run.met.sum()), len(run.met)),
        goodput_rps=float(run.met.sum()) / load_s,
    )


def _percentiles(seconds: Floats) -> tuple[float, float]:
    known = seconds[np.isfinite(seconds)] * 1000
    return tuple(np.percentile(known, (50, 99)).tolist()) if len(known) else (math.nan, math.nan)


def ratio(part: float, whole: float) -> float:
    """part / whole; NaN without a whole."""
    return part / whole if whole > 0 else math.nan


def compare(rows: list[Measures], capacity: Capacity) -> dict[str, float]:
    """Ratios of CLIF to the baselines within one repeat, at the same load; NaN for a baseline that did not run."""
    by_mode = {row.mode: row for row in rows}
    clif, alone = by_mode.get("clif"), by_mode.get("serve_only")
    others = [by_mode[m].goodput_rps for m in ("time_slice", "split") if m in by_mode]
    if clif is None:
        return {}
    return {
        "efficiency": capacity.efficiency(clif),
        "training": ratio(clif.train_tps, capacity.train_tps),
        "attainment_lost": alone.attainment - clif.attainment if alone else math.nan,
        "itl_p99": ratio(clif.itl_ms[1], alone.itl_ms[1]) if alone else math.nan,
        "goodput": ratio(clif.goodput_rps, max(others)) if others else math.nan,
    }


def slice_share(wanted: float, gain: float) -> float:
    """run.training_share with which time_slice trains about `wanted` (share of the training capacity).

    gain: training per share in the previous repeat, 1 at first. It exceeds 1 if serving leaves idle time, which
    training gets on top of its share; 0 only shows that the share was too small.
    """
    return min(1.0, max(0.01, wanted / gain if gain > 0 else wanted))
