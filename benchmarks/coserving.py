"""CLIF against its baselines: the real program under the same load in every run.mode, as ratios within repeats.

    python benchmarks/coserving.py                       # about 9 minutes per repeat on 2 cores
    python benchmarks/coserving.py --smoke --out /tmp    # a trial of all parts, within a minute or two

Each repeat measures the machine's capacity for serving alone and for training alone, and then serves the same requests
in every mode. The report is read from the folders of these runs, which are kept.
"""

from __future__ import annotations

import datetime
import os
import platform
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Annotated

import typer
from measures import Capacity, RunData, measure, ratio, read_run, serve_capacity, slice_share, train_capacity
from plots import plot_latency, plot_timeline
from report import Results, markdown

from clif.config import load_config
from clif.metrics.provenance import cpu_model, git_commit, gpu_names

REPO = Path(__file__).resolve().parents[1]
MODES = ("clif", "serve_only", "time_slice", "split")
"""In the order of a repeat: time_slice is given the training that clif reached."""
RANKS = 2
"""Replicas in every mode unless --ranks says otherwise, each with its share of the cores, so that modes and days
compare. Two with half of the threads served more than one with all of them before there were C++ kernels (639 against
393 tokens/s); with them one serves more, since it reads the weights once (766 against 664,
engine-peers-instances-2026-11-28.md)."""
LOAD, LIGHT_LOADS = 0.7, (0.3, 0.05)
SATURATING_RPS = 1000
TRAINING_ROUNDS = 4
"""Of training alone; the first pays for the start-up."""


@dataclass(frozen=True)
class Plan:
    """Settings of all runs. threads: of the machine; load_s: length of the load of each mode."""

    config: Path
    folder: Path
    threads: int
    load_s: float
    saturating_requests: int
    modes: tuple[str, ...]
    loads: tuple[float, ...]
    ranks: int = RANKS

    @property
    def threads_per_rank(self) -> int:
        return max(1, self.threads // self.ranks)


@dataclass
class Comparison:
    """The runs of all repeats and their results. rate: requests/s at full capacity, known from repeat 1 on."""

    plan: Plan
    results: Results = field(default_factory=lambda: Results(LOAD))
    runs: dict[str, list[RunData]] = field(default_factory=dict)
    rate_rps: float = 0.0
    slice_gain: float = 1.0
    adapter: Path | None = None
    busy: float = field(default_factory=lambda: os.getloadavg()[0])
    """Load average of the machine before the first run: other programs distort everything."""

    def repeat(self, number: int) -> None:
        capacity = self._capacity(number)
        self.results.capacities.append(capacity)
        if not self.rate_rps:
            self.rate_rps = capacity.serve_tps / load_config(self.plan.config).load.max_tokens
        for mode in self.plan.modes:
            self._under_load(mode, LOAD, number, capacity)
        for load in self.plan.loads:
            self._under_load("clif", load, number, capacity)

    def _capacity(self, number: int) -> Capacity:
        burst = [f"load.max_requests={self.plan.saturating_requests}", f"load.rate_rps={SATURATING_RPS}"]
        # Limited by work and not by time, so that a slow machine completes the rounds, too. run.max_s bounds them.
        rounds = [f"federation.rounds={TRAINING_ROUNDS}", "run.linger_s=3600"]
        name = f"{number}-training"
        alone = launch(self.plan, "train_only", name, number, rounds)
        self.adapter = self.adapter or self.plan.folder / name
        full = self._serve("serve_only", f"{number}-capacity", number, ["load.kind=constant", *burst])
        return Capacity(serve_capacity(full), train_capacity(alone))

    def _serve(self, mode: str, name: str, seed: int, extra: list[str]) -> RunData:
        """All modes answer with an adapter from the first token on: such rows cost more than rows without one."""
        assert self.adapter is not None
        folder = self.plan.folder / name
        folder.mkdir()
        shutil.copytree(self.adapter / "adapters", folder / "adapters")
        shutil.copy(self.adapter / "config.json", folder)
        return launch(self.plan, mode, name, seed, [*extra, "run.resume=true"])

    def _under_load(self, mode: str, load: float, number: int, capacity: Capacity) -> None:
        extra = [f"load.rate_rps={self.rate_rps * load:.4f}", f"load.duration_s={self.plan.load_s}"]
        if mode == "time_slice":
            self.results.shares.append(slice_share(self._wanted(number, capacity), self.slice_gain))
            extra.append(f"run.training_share={self.results.shares[-1]:.3f}")
        run = self._serve(mode, f"{number}-{mode}-{load:.0%}".rstrip("%"), number, extra)
        row = measure(run, mode, load, number, self.plan.load_s)
        self.results.rows.append(row)
        if load == LOAD:
            self.runs.setdefault(mode, []).append(run)
        if mode == "time_slice":
            self.slice_gain = ratio(row.train_tps, capacity.train_tps) / self.results.shares[-1]
        print(f"repeat {number}: {row}", flush=True)

    def _wanted(self, number: int, capacity: Capacity) -> float:
        """Training of clif in this repeat, as a share of the capacity; half if clif does not run."""
        rows = [r for r in self.results.rows if (r.mode, r.load, r.repeat) == ("clif", LOAD, number)]
        return ratio(rows[0].train_tps, capacity.train_tps) if rows else 0.5


def command(plan: Plan, mode: str, name: str, seed: int, extra: list[str]) -> list[str]:
    """How a run is started. All modes have the same cores and the same replicas."""
    own = {"serve_only": ["train.enabled=false"], "train_only": ["load.kind=none"]}.get(mode, [])
    where = [f"run.out_dir={plan.folder}", f"run.name={name}", f"run.seed={seed}", f"run.mode={mode}"]
    threads = f"dist.threads_per_rank={plan.threads_per_rank}"
    torchrun = [sys.executable, "-P", "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
    torchrun.append(str(plan.ranks))
    layout = f"layout.replicas={plan.ranks}"
    return [*torchrun, "launch/run.py", "--config", str(plan.config), *where, threads, layout, *own, *extra]


def launch(plan: Plan, mode: str, name: str, seed: int, extra: list[str]) -> RunData:
    """Start a run, wait for its end and read it. Raises RuntimeError, naming its log, if the run fails."""
    log = plan.folder / f"{name}.log"
    environment = {**os.environ, "OMP_NUM_THREADS": str(plan.threads_per_rank)}
    with log.open("w") as output:
        line = command(plan, mode, name, seed, extra)
        done = subprocess.run(line, cwd=REPO, env=environment, stdout=output, stderr=subprocess.STDOUT)
    if done.returncode:
        raise RuntimeError(f"{shlex.join(line)} ended with {done.returncode}: see {log}")
    return read_run(plan.folder / name / "run.h5")


def write(comparison: Comparison, out: Path, stem: str) -> Path:
    """The report and its plots beside it."""
    plan, slo = comparison.plan, load_config(comparison.plan.config).slo
    plots = [f"{stem}-latency.png"]
    plot_latency(comparison.runs, (slo.ttft_ms, slo.tpot_ms), out / plots[0])
    if "clif" in comparison.runs:
        plots.append(f"{stem}-timeline.png")
        train_tps = comparison.results.capacities[0].train_tps
        plot_timeline(comparison.runs["clif"][0], plan.load_s, train_tps, out / plots[1])
    path = out / f"{stem}.md"
    path.write_text(markdown(stem, _provenance(comparison), plan.config.read_text(), comparison.results, plots))
    return path


def _provenance(comparison: Comparison) -> list[str]:
    plan = comparison.plan
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "peft"))
    return [
        f"command: `python {shlex.join(sys.argv)}`",
        f"machine: {', '.join([cpu_model(), *gpu_names()])}, {plan.threads} threads, {platform.system()}; "
        f"load average before the first run {comparison.busy:.2f}",
        f"versions: Python {platform.python_version()}, {versions}; commit {git_commit() or 'unknown'}",
        f"{len(comparison.results.capacities)} repeats, modes in turns; {plan.load_s:g} s of load each; full load is "
        f"{comparison.rate_rps:.2f} requests/s",
        f"layout: {plan.ranks} replicas with {plan.threads_per_rank} threads each"
        + ("; split: half of them serve, half train" if "split" in plan.modes else ""),
        "all modes answer with a rank-8 adapter from the first request on",
    ]


def _modes(given: str) -> tuple[str, ...]:
    wanted = [mode.strip() for mode in given.split(",")]
    unknown = sorted(set(wanted) - set(MODES))
    if unknown:
        raise typer.BadParameter(f"unknown mode {', '.join(unknown)}: known are {', '.join(MODES)}")
    return tuple(mode for mode in MODES if mode in wanted)


def main(
    repeats: Annotated[int, typer.Option(min=1, help="3 or more for figures to be published")] = 3,
    load_s: Annotated[float, typer.Option(min=1, help="seconds of load in each run")] = 50.0,
    modes: Annotated[str, typer.Option(help="which modes run, separated by commas")] = ",".join(MODES),
    light: Annotated[bool, typer.Option(help="clif at lighter loads as well")] = False,
    threads: Annotated[int, typer.Option(min=2, help="CPU threads of the machine to use")] = max(
        2, os.cpu_count() or 1
    ),
    ranks: Annotated[int, typer.Option(min=1, help="replicas; 1 has all threads, and no split")] = RANKS,
    config: Annotated[Path, typer.Option(help="YAML file of all runs")] = REPO / "configs" / "bench.yaml",
    out: Annotated[Path, typer.Option(help="folder for the dated files")] = REPO / "benchmarks",
    runs: Annotated[Path, typer.Option(help="folder for the folders of all runs")] = REPO / "runs",
    smoke: Annotated[
        bool, typer.Option(help="one repeat of seconds on a random model: its figures mean nothing")
    ] = False,
) -> None:
    """Compare CLIF with serving alone, training alone, time slices and a split, and write a dated report."""
    now, requests = datetime.datetime.now(), 160
    chosen = tuple(mode for mode in _modes(modes) if ranks > 1 or mode != "split")
    if not chosen:
        raise typer.BadParameter("split needs two replicas: raise --ranks, or choose another mode")
    stem = f"coserving-{now.date().isoformat()}" + ("" if ranks == RANKS else f"-ranks{ranks}")
    if smoke:
        # One thread: with so small a model more threads only wait for each other, forever beside other programs.
        threads, repeats, load_s, requests = 1, 1, min(load_s, 4.0), 64
        config = REPO / "configs" / "bench-smoke.yaml"
        stem = f"coserving-smoke-{now.date().isoformat()}"
    folder = runs.resolve() / f"{stem}-{now:%H%M%S}"
    folder.mkdir(parents=True)
    # Before the runs: they take minutes, and their report is written last.
    out.mkdir(parents=True, exist_ok=True)
    plan = Plan(config, folder, threads, load_s, requests, chosen, LIGHT_LOADS if light else (), ranks)
    comparison = Comparison(plan)
    for number in range(1, repeats + 1):
        comparison.repeat(number)
    print(write(comparison, out, stem).read_text())


if __name__ == "__main__":
    typer.run(main)
