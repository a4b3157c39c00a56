"""Ten minutes of co-serving with little memory: the KV cache and the activations must keep to the configuration.

    python benchmarks/soak.py --load-s 600

The KV cache is so small that requests are preempted, and the activation budget so small that layers are computed
again. Reads the run's own metrics; exits with 1 if a bound was broken or a request was lost.
"""

from __future__ import annotations

import datetime
import os
import platform
import shlex
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import h5py
import numpy as np
import typer

from clif.metrics.provenance import cpu_model, git_commit

REPO = Path(__file__).resolve().parents[1]
RANKS, KV_TOKENS, ACTIVATION_MIB = 2, 1536, 48
SETTLED_S = 60.0
"""Seconds in which caches of compiled kernels and of the allocator fill up."""


def command(folder: Path, name: str, load_s: float) -> list[str]:
    """A bursty load that exceeds the KV cache, and rounds back to back."""
    torchrun = [sys.executable, "-P", "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(RANKS)]
    memory = [f"engine.kv_tokens={KV_TOKENS}", f"engine.activation_mib={ACTIVATION_MIB}", "data.max_sample_tokens=256"]
    load = ["load.kind=gamma", "load.cv=2", "load.rate_rps=2.5", "load.max_tokens=96", f"load.duration_s={load_s}"]
    where = [f"run.out_dir={folder}", f"run.name={name}", f"run.max_s={load_s + 300}"]
    return [*torchrun, "launch/run.py", "--config", str(REPO / "configs" / "bench.yaml"), *where, *memory, *load]


def judge(ticks: Any, device: Any, requests: Any, offered: int) -> tuple[list[str], bool]:
    """Markdown lines, and whether every bound held."""
    most_kv = int(ticks["kv_used"].max())
    ended = len(requests[requests["purpose"] == b"user"])
    lines = [
        "| what | bound | most seen |",
        "|---|---|---|",
        f"| KV cache of a replica, tokens | {KV_TOKENS} | {most_kv} |",
        f"| requests without an end | 0 | {offered - ended} of {offered} |",
        "",
    ]
    preempted = sum(int(ticks["preemptions"][ticks["rank"] == r].max(initial=0)) for r in range(RANKS))
    lines.append(f"* {preempted} preemptions; failed or rejected: {int(np.isin(requests['finish'], BAD).sum())}")
    for rank in range(RANKS):
        rows = device[device["rank"] == rank]
        late = rows[rows["t"] > SETTLED_S]["rss_bytes"] / 2**20
        if len(late) > 10:
            first, last = np.median(late[: len(late) // 5]), np.median(late[-len(late) // 5 :])
            lines.append(f"* rank {rank}: resident memory {first:.0f} MiB after a minute, {last:.0f} MiB at the end")
    return lines, most_kv <= KV_TOKENS and ended == offered


BAD = (b"failed", b"rejected")


def main(
    load_s: Annotated[float, typer.Option(min=5, help="seconds of load")] = 600.0,
    out: Annotated[Path, typer.Option(help="folder for the dated file")] = REPO / "benchmarks",
    runs: Annotated[Path, typer.Option(help="folder for the run")] = REPO / "runs",
) -> None:
    """Run under load with little memory and write a dated report."""
    now = datetime.datetime.now()
    name = f"soak-{now:%Y-%m-%d-%H%M%S}"
    line = command(runs.resolve(), name, load_s)
    environment = {**os.environ, "OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // RANKS))}
    done = subprocess.run(line, cwd=REPO, env=environment)
    if done.returncode:
        raise typer.Exit(done.returncode)
    with h5py.File(runs.resolve() / name / "run.h5") as run:
        tables = {table: run[table][:] for table in ("ticks", "device", "requests", "load", "rounds")}
    lines, good = judge(tables["ticks"], tables["device"], tables["requests"], len(tables["load"]))
    report = [
        f"# Soak of {load_s:g} s, {now:%Y-%m-%d}",
        "",
        f"* command: `{shlex.join(['python', *sys.argv])}`",
        f"* machine: {cpu_model()}, {os.cpu_count()} cores; commit {git_commit() or 'unknown'}",
        f"* versions: Python {platform.python_version()}, torch {version('torch')}",
        f"* {len(tables['load'])} requests, {len(tables['rounds'])} rounds; activation budget {ACTIVATION_MIB} MiB",
        "",
        *lines,
        "",
    ]
    (out / f"soak-{now:%Y-%m-%d}.md").write_text("\n".join(report))
    print("\n".join(report))
    raise typer.Exit(0 if good else 1)


if __name__ == "__main__":
    typer.run(main)
