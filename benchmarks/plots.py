"""Plots of the co-serving comparison: distributions of latencies, and training over the load."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # No display is needed; before pyplot, which would choose another one.

import matplotlib.pyplot as plt
import numpy as np
from measures import Floats, RunData

COLOURS = {"serve_only": "tab:gray", "clif": "tab:blue", "time_slice": "tab:orange", "split": "tab:green"}
BIN_S = 2.0


def plot_latency(runs: dict[str, list[RunData]], slo_ms: tuple[float, float], path: Path) -> None:
    """Cumulative distributions of TTFT and of inter-token gaps by mode, all repeats together."""
    figure, axes = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    for axis, title, name, slo in zip(axes, ("TTFT", "gap between tokens"), ("ttft_s", "gaps_s"), slo_ms, strict=True):
        for mode, repeats in runs.items():
            x, y = cumulative(np.concatenate([getattr(run, name) for run in repeats]))
            axis.plot(x, y, label=mode, color=COLOURS.get(mode))
        axis.axvline(slo, color="black", linestyle=":", label="SLO" if name == "ttft_s" else "SLO (mean of a request)")
        axis.set(xscale="log", xlabel=f"{title}, ms", ylabel="share at most", ylim=(0, 1.01))
        axis.grid(alpha=0.3)
        axis.legend()
    _save(figure, path)


def plot_timeline(run: RunData, load_s: float, train_tps: float, path: Path) -> None:
    """Running requests above, training tokens/s below, over the time of the load. train_tps: training capacity."""
    figure, (above, below) = plt.subplots(2, 1, figsize=(11, 5), sharex=True, layout="constrained")
    moments = np.arange(0.0, load_s, 0.1)
    above.fill_between(moments, running(run, moments), step="post", color=COLOURS["clif"], alpha=0.5)
    above.set(ylabel="running requests")
    starts, rates = training_rates(run, load_s)
    below.bar(starts, rates, width=BIN_S, align="edge", color="tab:red", alpha=0.6)
    below.axhline(train_tps, color="black", linestyle=":", label="training alone")
    below.set(ylabel="training tokens/s", xlabel="seconds since the start of the load", xlim=(0, load_s))
    below.legend()
    _save(figure, path)


def cumulative(seconds: Floats) -> tuple[Floats, Floats]:
    """Milliseconds in order, and the share of all that is at most that."""
    known = np.sort(seconds[np.isfinite(seconds)]) * 1000
    # A logarithmic axis has no zero: gaps of tokens of one message lie at its left end.
    return np.maximum(known, 0.1), np.arange(1, len(known) + 1) / max(1, len(known))


def running(run: RunData, moments: Floats) -> Floats:
    """Requests that are at a replica at each moment."""
    begun = np.searchsorted(np.sort(run.dispatched_s), moments, side="right")
    ended = np.searchsorted(np.sort(run.finished_s[np.isfinite(run.dispatched_s)]), moments, side="right")
    return (begun - ended).astype(float)


def training_rates(run: RunData, load_s: float) -> tuple[Floats, Floats]:
    """Starts of bins of BIN_S seconds and training tokens/s in each; a step counts where it ends."""
    edges = np.arange(0.0, load_s + BIN_S, BIN_S)
    tokens, _ = np.histogram(run.step_s, edges, weights=run.step_tokens)
    return edges[:-1], tokens / BIN_S


def _save(figure: Any, path: Path) -> None:
    figure.savefig(path, dpi=110)
    plt.close(figure)
