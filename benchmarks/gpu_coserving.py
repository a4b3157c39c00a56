"""GPU stage: serving and training together against each alone, in one process and one run.

    python benchmarks/gpu_coserving.py [--dry] [SHAPE ...]

Serving is closed-loop: a new request follows each one that ends, so that the load of the batch stays the same.
Efficiency is serving tokens/s over those of serving alone, plus training tokens/s over those of training alone;
alternating between the two gives at most 1.
"""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass, replace

from gpu_bench import Bench, Scale, run_stage

from clif.engine.jobs import Job
from clif.training.trainer import ShadowTrainer

WAYS = ("interleaved", "fused")
LOADS = (1.0, 0.7, 0.25)
"""Shares of the batch that requests take."""


@dataclass(frozen=True)
class Rates:
    """Tokens/s of serving and of training, and the 99th percentile of the gaps between steps, seconds."""

    serving: float
    training: float
    gap_p99: float


def rates(bench: Bench, trainer: ShadowTrainer, way: str, serves: bool, trains: bool) -> Rates:
    """Measured over window_s, after a warm-up of a third of it."""
    engine, served, trained, gaps = bench.engine(way), 0, 0, [0.0]
    window = bench.scale.window_s
    begin = last = time.perf_counter()
    start = None
    while (now := time.perf_counter()) < begin + window * 4 / 3:
        if start is None and now > begin + window / 3:
            start, served, trained, gaps = now, 0, 0, [0.0]
        if serves:
            bench.top_up(engine)
        if trains and not engine.jobs:
            engine.jobs.append(Job("step", trainer.step(len(trainer.samples), 1)))
        served += sum(len(event.tokens) for event in engine.step())
        if engine.record.train_kind == "optimizer":
            trained += sum(len(sample.ids) for sample in trainer.samples)
        bench.sync()
        gaps.append(time.perf_counter() - last)
        last = time.perf_counter()
    bench.cancel_all(engine)
    seconds = time.perf_counter() - (start or begin)
    return Rates(served / seconds, trained / seconds, sorted(gaps)[int(0.99 * (len(gaps) - 1))])


def measure(shape: str, scale: Scale) -> list[str]:
    """Markdown of one shape."""
    bench = Bench(shape, scale)
    trainer = bench.trainer(*scale.steps[min(1, len(scale.steps) - 1)])
    alone = [rates(bench, trainer, "interleaved", serves=False, trains=True).training for _ in range(scale.repeats)]
    train = statistics.median(alone)
    lines = [
        f"### Co-serving, {shape}, batch {scale.batch}, {scale.prompt} + about {scale.answer} tokens",
        "",
        f"Training alone: {train:.0f} tokens/s ({min(alone):.0f} to {max(alone):.0f}).",
        "",
        "| requests at once | way | serving tokens/s | training tokens/s | gap p99, ms | efficiency |",
        "|---|---|---|---|---|---|",
    ]
    for share in LOADS:
        # The size of the batch stays the same; the number of its requests changes.
        bench.scale = replace(scale, batch=max(1, round(share * scale.batch)))
        quiet = rates(bench, trainer, "interleaved", serves=True, trains=False)
        lines.append(f"| {bench.scale.batch} | serving alone | {quiet.serving:.0f} | 0 | {quiet.gap_p99 * 1e3:.1f} | |")
        print(lines[-1], flush=True)
        for way in WAYS:
            both = rates(bench, trainer, way, serves=True, trains=True)
            # A dry run may be over before a single token or step.
            efficiency = both.serving / max(quiet.serving, 1e-9) + both.training / max(train, 1e-9)
            figures = f"{both.serving:.0f} | {both.training:.0f} | {both.gap_p99 * 1e3:.1f} | {efficiency:.2f}"
            lines.append(f"| {bench.scale.batch} | {way} | {figures} |")
            print(lines[-1], flush=True)
    return lines


if __name__ == "__main__":
    run_stage(measure, shapes=1)
