"""The dual LoRA kernels on one GPU against cuBLAS, PEFT and the usual four launches: ratios within one run.

    python benchmarks/bench_kernels.py            # needs torch, Triton and this repository; matplotlib for the plot
    python benchmarks/bench_kernels.py --dry      # interpreter on a CPU, tiny shapes: its figures mean nothing

Every result is first checked against the specification. Run `make tune-gpu` before it: otherwise the default tiles run.
"""

from __future__ import annotations

import argparse
import datetime
import os
import platform
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from checkout import REPO, commit, use_checkout

if "--dry" in sys.argv:
    os.environ["TRITON_INTERPRET"] = "1"
use_checkout()

import torch
import triton
from rivals import (
    AUGMENTED,
    BASE,
    COMPILED,
    DGRAD,
    FOUR,
    FOUR_PUBLISHED,
    FUSED,
    ONE_PRODUCT,
    PEFT,
    PEFT_BACKWARD,
    PEFT_MIXED,
    PER_SEGMENT,
    backward_ways,
    forward_ways,
)
from timing import Timing, contest
from tune_gpu import Tuner

from clif.kernels.dual_lora_host import FusedLinear, KernelLauncher
from clif.kernels.dual_lora_reference import SHADOW
from clif.kernels.testing.dual_lora_specification import Batch, computed, violations
from clif.kernels.tiles import GradTiles, LinearTiles
from clif.kernels.tuning import Defaults, TileTable, kernel_tiles, load_table, table_path

Lengths = tuple[tuple[int, int | None], ...]


@dataclass(frozen=True)
class Case:
    """One comparison. lengths: rows of each slot; compiled: with torch.compile, which takes seconds per case."""

    name: str
    sizes: tuple[int, ...]
    depth: int
    r: int
    lengths: Lengths
    backward: bool = False
    compiled: bool = False


@dataclass(frozen=True)
class Goal:
    """A ratio of two ways and its bounds; the worst of the cases counts."""

    text: str
    cases: tuple[str, ...]
    way: str
    against: str
    must: float
    stretch: float
    at_most: bool = True


def decode(rows: int) -> Lengths:
    """Rows of two versions, as after a promotion."""
    old = rows // 4
    return ((rows - old, 0), (old, 1)) if old else ((rows, 0),)


def mixed(training: int) -> Lengths:
    """64 requests beside rows that learn."""
    return ((64, 0), (training, SHADOW))


SQUARE = ((4096,), 4096)
CASES = (
    *(Case(f"decode {n}, r={r}", *SQUARE, r, decode(n), compiled=n == 64) for r in (16, 64) for n in (1, 16, 64, 256)),
    Case("decode 64, 2048x2048", (2048,), 2048, 16, decode(64)),
    Case("decode 64, 4096x1024", (1024,), 4096, 16, decode(64)),
    Case("decode 64, q+k+v", (4096, 1024, 1024), 4096, 16, decode(64)),
    *(Case(f"64+{n}, r={r}", *SQUARE, r, mixed(n), compiled=n == 2048) for r in (16, 64) for n in (1984, 2048)),
    Case("64 bare", *SQUARE, 16, ((64, None),)),
    Case("64+2048 bare", *SQUARE, 16, ((2112, None),)),
    *(Case(f"backward 2048, r={r}", *SQUARE, r, ((2048, SHADOW),), backward=True) for r in (16, 64)),
)
DRY_CASES = (
    Case("decode 8", (32,), 32, 8, decode(8)),
    Case("8+16", (32, 16), 32, 8, ((8, 0), (16, SHADOW))),
    Case("8 bare", (32,), 32, 8, ((8, None),)),
    Case("backward 16", (32,), 32, 8, ((16, SHADOW),), backward=True),
)
WIDE = {r: tuple(f"decode {n}, r={r}" for n in (1, 16, 64, 256)) for r in (16, 64)}
MIXED = {r: (f"64+1984, r={r}", f"64+2048, r={r}") for r in (16, 64)}
GOALS = (
    Goal("fused / base, decode 1-256 rows, r=16", WIDE[16], FUSED, BASE, 1.10, 1.05),
    Goal("fused / base, decode 1-256 rows, r=64", WIDE[64], FUSED, BASE, 1.15, 1.08),
    Goal("fused / base, decode, small", ("decode 64, 2048x2048", "decode 64, 4096x1024"), FUSED, BASE, 1.25, 1.15),
    Goal("fused / base, mixed, r=16", MIXED[16], FUSED, BASE, 1.08, 1.05),
    Goal("fused / base, mixed, r=64", MIXED[64], FUSED, BASE, 1.12, 1.08),
    Goal("no adapter / base", ("64 bare", "64+2048 bare"), FUSED, BASE, 1.03, 1.00),
    Goal("four launches / fused, decode", ("decode 64, r=16",), FOUR, FUSED, 1.6, 1.8, at_most=False),
    Goal("four launches / fused, mixed", MIXED[16], FOUR, FUSED, 1.12, 1.25, at_most=False),
    Goal("PEFT eager / fused, decode", ("decode 64, r=16",), PEFT, FUSED, 4, 6, at_most=False),
    Goal("PEFT mixed batch / fused, mixed", MIXED[16], PEFT_MIXED, FUSED, 1.25, 1.35, at_most=False),
    Goal("backward / dgrad, r=16", ("backward 2048, r=16",), FUSED, DGRAD, 1.10, 1.05),
    Goal("backward / dgrad, r=64", ("backward 2048, r=64",), FUSED, DGRAD, 1.18, 1.10),
    Goal("PEFT autograd / backward", ("backward 2048, r=16", "backward 2048, r=64"), PEFT_BACKWARD, FUSED, 1.3, 1.5,
         at_most=False),
)  # fmt: skip
ORDER = (
    BASE,
    DGRAD,
    FUSED,
    PER_SEGMENT,
    ONE_PRODUCT,
    FOUR,
    FOUR_PUBLISHED,
    AUGMENTED,
    PEFT,
    PEFT_MIXED,
    COMPILED,
    PEFT_BACKWARD,
)


class Kernels:
    """Tiles for the benchmark: the kernel's best tiles if it was tuned, also if CLIF would choose torch."""

    def __init__(self, defaults: Defaults, path: Path | None) -> None:
        own = kernel_tiles(path) if path else {}
        gradients = load_table(path, None, defaults).gradients if path else {}
        self._table = TileTable(own, gradients, defaults, defaults)

    def linear(self, *shape: Any) -> LinearTiles:
        return self._table.linear(*shape)

    def grads(self, *shape: Any) -> GradTiles:
        return self._table.grads(*shape)


@dataclass
class Findings:
    """Measurements of each case: timings by way, ways that failed, faults of the results."""

    timings: dict[str, dict[str, Timing]] = field(default_factory=dict)
    failed: dict[str, dict[str, str]] = field(default_factory=dict)
    faults: dict[str, list[str]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def ratio(self, goal: Goal) -> float | None:
        """The worst over the goal's cases; None if one of them is missing."""
        ratios = []
        for case in goal.cases:
            found = self.timings.get(case, {})
            if goal.way not in found or goal.against not in found:
                return None
            ratios.append(found[goal.way].median / found[goal.against].median)
        return max(ratios) if goal.at_most else min(ratios)


def measure(cases: Sequence[Case], tuner: Tuner, kernels: Kernels, repeats: int, seconds: float) -> Findings:
    """All cases, as far as time allows."""
    findings, end = Findings(), time.monotonic() + seconds
    for case in cases:
        if time.monotonic() > end:
            findings.notes.append(f"time was up before: {case.name}")
            continue
        batches = tuner.batches(case.sizes, case.depth, case.r, case.lengths)
        launcher = KernelLauncher(tuner.device, kernels)
        findings.faults[case.name] = violations(
            batches[0], computed(batches[0], FusedLinear(batches[0].merged, launcher))
        )
        ways = backward_ways(batches, launcher) if case.backward else forward_ways(batches, launcher, case.compiled)
        found, failed = contest(ways, len(batches), repeats, tuner.device)
        findings.timings[case.name], findings.failed[case.name] = found, failed
        if tuner.device.type == "cuda":
            findings.notes.append(f"{case.name}: {launches(ways[FUSED])}; {rates(case, batches[0], found[FUSED])}")
        print(case.name, {name: str(t) for name, t in found.items()}, failed or "", flush=True)
    return findings


def launches(way: Any) -> str:
    """The launches of one call."""
    from torch.profiler import ProfilerActivity, profile

    way(0)
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as record:
        way(0)
        torch.cuda.synchronize()
    names = [e.name for e in record.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    return f"{len(names)} launches ({', '.join(sorted(set(names)))})"


def rates(case: Case, batch: Batch, timing: Timing) -> str:
    """The least bytes to move and the operations of the base product, per second."""
    p, rows = batch.merged, len(batch.x)
    out, depth = p.weight.shape
    used = {s.slot for s in batch.segments}
    factors = sum(p.a[s].nbytes + p.b[s].nbytes for s in used)
    moved = p.weight.nbytes + factors + (2 if case.backward else 1) * rows * (out + depth) * 2
    seconds = timing.median * 1e-6
    return f"{moved / seconds / 1e9:.0f} GB/s, {2 * rows * out * depth / seconds / 1e12:.0f} TFLOP/s"


def limits(device: torch.device) -> str:
    """Copy bandwidth and matrix rate of this GPU, measured now."""
    source = torch.empty(1 << 30, dtype=torch.uint8, device=device)
    target, matrix = torch.empty_like(source), torch.randn(8192, 8192, device=device).to(torch.bfloat16)
    found, _ = contest({"copy": lambda _: target.copy_(source), "product": lambda _: matrix @ matrix}, 1, 20, device)
    copy, product = (2 * source.nbytes / found["copy"].median * 1e6, 2 * 8192**3 / found["product"].median * 1e6)
    return f"copy {copy / 1e9:.0f} GB/s (read and written), bfloat16 product {product / 1e12:.0f} TFLOP/s"


def report(findings: Findings, cases: Sequence[Case], about: Sequence[str], plot: str | None) -> str:
    """Markdown."""
    lines = [f"# Dual LoRA kernels, {datetime.date.today().isoformat()}", "", *[f"* {line}" for line in about], ""]
    lines += ["## Goals", "", "| ratio (worst case) | must | stretch | measured | |", "|---|---|---|---|---|"]
    for goal in GOALS:
        ratio, sign = findings.ratio(goal), "<=" if goal.at_most else ">="
        value = "" if ratio is None else f"{ratio:.3f}"
        lines.append(f"| {goal.text} | {sign} {goal.must:g} | {goal.stretch:g} | {value} | {verdict(goal, ratio)} |")
    ways = [w for w in ORDER if any(w in t for t in findings.timings.values())]
    lines += ["", "## Microseconds per layer: median (10 % to 90 %)", "", f"| case | {' | '.join(ways)} |"]
    lines.append("|---" * (len(ways) + 1) + "|")
    for case in cases:
        found = findings.timings.get(case.name, {})
        lines.append(f"| {case.name} | {' | '.join(str(found[w]) if w in found else '' for w in ways)} |")
    lines += ["", "## Correctness", ""]
    wrong = {name: faults for name, faults in findings.faults.items() if faults}
    lines += [f"* {name}: {'; '.join(faults)}" for name, faults in wrong.items()]
    lines += [] if wrong else ["* every case is within the specification (kernels/testing/dual_lora_specification.py)"]
    failed = [f"* {c}: {way} failed: {why}" for c, ways in findings.failed.items() for way, why in ways.items()]
    lines += ["", "## Notes", "", *failed, *[f"* {note}" for note in findings.notes], ""]
    return "\n".join(lines + ([f"![{plot}]({plot})", ""] if plot else []))


def verdict(goal: Goal, ratio: float | None) -> str:
    if ratio is None:
        return "not measured"
    better = ratio.__le__ if goal.at_most else ratio.__ge__
    return "stretch" if better(goal.stretch) else "must" if better(goal.must) else "missed"


def draw(findings: Findings, path: Path) -> str | None:
    """Time of every way over that of the base alone, by case; None without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return None
    figure = Figure(figsize=(12, 5))
    axes = figure.add_subplot()
    names = list(findings.timings)
    ways = [w for w in ORDER if any(w in t for t in findings.timings.values()) and w not in (BASE, DGRAD)]
    for i, way in enumerate(ways):
        heights = []
        for name in names:
            found = findings.timings[name]
            base = found.get(BASE) or found.get(DGRAD)
            heights.append(found[way].median / base.median if way in found and base else 0.0)
        axes.bar([x + i / (len(ways) + 1) for x in range(len(names))], heights, 1 / (len(ways) + 1), label=way)
    axes.axhline(1.0, color="black", linewidth=0.8)
    axes.set_xticks([x + 0.4 for x in range(len(names))], names, rotation=45, ha="right")
    axes.set_ylabel("time / time of the base product alone")
    axes.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    return path.name


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dry", action="store_true", help="interpreter on a CPU, tiny shapes: figures mean nothing")
    parser.add_argument("--seconds", type=float, default=240.0, help="no new case is begun after so long")
    parser.add_argument("--out", type=Path, default=REPO / "benchmarks", help="folder for the dated file")
    args = parser.parse_args()
    if not args.dry and not torch.cuda.is_available():
        parser.error("no NVIDIA GPU here: use --dry, or a machine that has one")
    tuner = Tuner.here(args.dry)
    name = "CPU, interpreter: figures mean nothing" if args.dry else torch.cuda.get_device_name(tuner.device)
    table = table_path(name)
    tuned = not args.dry and table.is_file()
    cases = DRY_CASES if args.dry else CASES
    kernels = Kernels(tuner.defaults, table if tuned else None)
    findings = measure(cases, tuner, kernels, 2 if args.dry else 30, args.seconds)
    about = [
        f"command: `{' '.join(['python', 'benchmarks/bench_kernels.py', *sys.argv[1:]])}`",
        f"machine: {name}{'' if args.dry else f'; {limits(tuner.device)}; {clocks()}'}",
        f"versions: Python {platform.python_version()}, torch {torch.__version__}, Triton {triton.__version__}",
        f"commit: {commit()}",
        f"tiles: {'tuned, ' + table.name if tuned else 'defaults, not tuned'}",
    ]
    stem = f"kernels{'-dry' if args.dry else ''}-{datetime.date.today().isoformat()}"
    plot = draw(findings, args.out / f"{stem}.png")
    (args.out / f"{stem}.md").write_text(report(findings, cases, about, plot))
    print((args.out / f"{stem}.md").read_text())
    return any(findings.faults.values())


def clocks() -> str:
    """Current clocks of the GPU."""
    query = ["nvidia-smi", "--query-gpu=clocks.sm,clocks.mem,driver_version", "--format=csv,noheader"]
    done = subprocess.run(query, capture_output=True, text=True)
    return f"clocks and driver: {done.stdout.strip() or 'unknown'}"


if __name__ == "__main__":
    sys.exit(main())
