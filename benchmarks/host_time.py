"""Host time of a decode step besides the forward, by part: a real replica, engine and batch, a model that does nothing.

python benchmarks/host_time.py [--requests 64] [--steps 400] [--repeats 7] [--cold 96] [--only cpu]

--cold: the model reads so many MiB in each forward, which is not counted. A model's weights leave nothing of the host's
code and data in the caches: what follows costs several times what it costs in a loop of its own.
"""

from __future__ import annotations

import argparse
import random
import statistics
import tempfile
import time
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import checkout
import msgspec
import torch

from clif.adapters.slots import SlotTable
from clif.config import Config, config_from_tree
from clif.engine.batch import Batch, BatchBuilder
from clif.engine.build import make_strategy
from clif.engine.decode_buffers import DecodeBuffers
from clif.engine.engine import Engine
from clif.engine.graphs import DecodeGraphs
from clif.engine.jobs import Job, Slice, SliceKind, Slices
from clif.engine.scheduler import Chunk, Scheduler
from clif.engine.training_half import TrainingHalf
from clif.replica.records import RankRecords
from clif.replica.replica import Replica
from clif.types import Request, Sampling
from clif.wire.messages import Submit

VOCABULARY, PROMPT, WARM_UP = 128_256, 320, 20
SLOTS, HEIGHTS = 4, (16, 32)
TRAIN_TOKENS, TRAIN_LAYERS = 2048, 16


@dataclass(frozen=True)
class Case:
    """graphs: batches of captured steps; cpu: those of kernels for CPUs."""

    graphs: bool = False
    overlap: bool = True
    trains: bool = False
    drawn: bool = False
    cpu: bool = False


class NoModel:
    """Stands in for a runner: real batches, as for the kernels of a GPU or a CPU, and no forward.

    weights: what a forward reads. As a recorder it captures nothing.
    """

    bytes = 0

    def __init__(self, config: Config, case: Case, weights: torch.Tensor) -> None:
        engine, device = config.engine, torch.device("cpu")
        self._builder = BatchBuilder(engine, VOCABULARY, device, torch.bfloat16, step_tables=case.cpu)
        self._weights, self._cpu = weights, case.cpu
        most, spare = config.model.max_context // engine.block_size, engine.kv_tokens // engine.block_size
        buffers = DecodeBuffers(engine.max_batch, most, engine.block_size, spare, SLOTS, device)
        self._graphs = DecodeGraphs(None, buffers, self) if case.graphs else None  # type: ignore[arg-type]
        # Tables of two heights of tiles, which the layers of a model ask for.
        self._tables = buffers.tables(engine.max_batch)
        for height in HEIGHTS:
            self._tables.of(height, SLOTS)

    def capture(self, region: object) -> Any:
        return self

    def fill(self, chunks: list[Chunk], fused: bool = False) -> Batch:
        if self._graphs is not None and self._graphs.can_run(chunks):
            return self._builder.with_draws(self._graphs.fill(chunks))
        batch = self._builder.fill(chunks, paged=True)
        for height in () if self._cpu else HEIGHTS:
            batch.rows.tables.of(height, SLOTS)
        return batch

    def forward(self, batch: Batch, fused: object = None) -> SimpleNamespace:
        tokens = [1000] * sum(chunk.needs_sampling for chunk in batch.chunks)
        self._weights.sum()
        return SimpleNamespace(read=lambda: tokens, seconds=lambda: 0.003, logprobs=dict)


def training() -> Slices[None]:
    """A job that always has a slice to plan, which costs nothing."""
    while True:
        yield Slice(SliceKind.BACKWARD, TRAIN_TOKENS, TRAIN_LAYERS, lambda units: None)


def make_replica(folder: Path, requests: int, case: Case, weights: torch.Tensor) -> Replica:
    config = config_from_tree(
        {
            "model": {"path": "none", "max_context": 2048},
            "engine": {"max_batch": requests, "kv_tokens": 2048 * requests, "max_prefill_tokens": PROMPT * requests},
            "train": {"enabled": False},
        }
    )
    engine = Engine(
        NoModel(config, case, weights),  # type: ignore[arg-type]
        Scheduler(config.engine, SlotTable(3), (), lambda ids: ""),
        TrainingHalf(make_strategy("interleaved", config)),
        overlap=case.overlap,
    )
    if case.trains:
        engine.jobs.append(Job("training", training()))
    records, encoder = RankRecords(folder, 0, config.metrics, {}), msgspec.msgpack.Encoder()
    member: Any = SimpleNamespace(micro_batch=1, job_switch=SimpleNamespace(steps=0))
    return Replica(config, 0, engine, member, records, encoder.encode)


def submit(replica: Replica, requests: int, steps: int, drawn: bool) -> None:
    """Requests of two versions, so that the batch has segments, all of which answer for the whole measurement."""
    rng, half = random.Random(0), requests // 2
    for i in range(requests):
        if i == half and half:
            replica.step([])
            replica.engine.scheduler.slots.promote(1, 0)
        sampling = Sampling(max_tokens=steps, temperature=0.8 * drawn, top_p=0.9, seed=i, ignore_eos=True)
        request = Request(id=i, prompt=tuple(rng.choices(range(VOCABULARY), k=PROMPT)), sampling=sampling)
        replica.step([msgspec.msgpack.encode(Submit(request=request))])


def timed(seconds: dict[str, float], owner: Any, name: str, part: str) -> None:
    """From now on calls of a method add to the seconds of its part."""
    method = getattr(owner, name)

    def call(*args: Any) -> Any:
        start = time.perf_counter()
        result = method(*args)
        seconds[part] += time.perf_counter() - start
        return result

    setattr(owner, name, call)


def measure(requests: int, steps: int, case: Case, cold_mib: int = 0) -> dict[str, list[float]]:
    """Microseconds of each step, whole and by part."""
    found: dict[str, list[float]] = defaultdict(list)
    with tempfile.TemporaryDirectory() as folder:
        replica = make_replica(Path(folder), requests, case, torch.ones(cold_mib * 2**18))
        submit(replica, requests, steps + WARM_UP + 2 * requests, case.drawn)
        engine, seconds = replica.engine, dict[str, float]()
        for owner, name, part in (
            (engine, "plan", "plan"),
            (engine.scheduler, "schedule", "schedule"),
            (engine.runner, "fill", "fill"),
            (engine.runner, "forward", FORWARD),
            (engine.scheduler, "settle", "settle"),
            (engine, "_note", "cost model"),
            (replica, "send", "send"),
            (replica.records, "engine_step", "records"),
            (replica.records, "maybe_flush", "flush"),
        ):
            timed(seconds, owner, name, part)
        for step in range(WARM_UP + steps):
            seconds.update(dict.fromkeys((*PARTS, FORWARD), 0.0))
            start = time.perf_counter()
            replica.step([])
            whole = time.perf_counter() - start - seconds.pop(FORWARD)
            if step >= WARM_UP:
                for part, value in (("step", whole), *seconds.items()):
                    found[part].append(1e6 * value)
        replica.records.close()
    return found


FORWARD = "forward"
PARTS = ("plan", "schedule", "fill", "settle", "cost model", "send", "records", "flush")
CASES = {
    "eager": Case(),
    "captured": Case(graphs=True),
    "captured, not overlapped": Case(graphs=True, overlap=False),
    "captured, drawn by top_p": Case(graphs=True, drawn=True),
    "captured, with training": Case(graphs=True, trains=True),
    "cpu": Case(cpu=True, overlap=False),
    "cpu, with training": Case(cpu=True, overlap=False, trains=True),
}


def yardstick_us() -> float:
    """Microseconds of a fixed piece of Python: how fast the machine is at this moment."""
    found = []
    for _ in range(30):
        start, numbers = time.perf_counter(), {}
        for i in range(1000):
            numbers[i % 64] = (i, len(numbers))
        found.append(1e6 * (time.perf_counter() - start))
    return statistics.median(found)


def spread(values: list[float], digits: int = 0) -> str:
    ordered = sorted(values)
    return f"{statistics.median(ordered):.{digits}f} ({ordered[0]:.{digits}f} to {ordered[-1]:.{digits}f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--cold", type=int, default=0, metavar="MIB")
    parser.add_argument("--only", default="", help="cases whose names begin so")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    print(f"commit {checkout.commit()}, torch {torch.__version__}, {asked.requests} requests, us a step: median of")
    print(f"{asked.repeats} repeats' medians (least to largest), and the median repeat's parts\n")
    print(f"| case | step | step in yardsticks | {' | '.join(PARTS)} |\n|---|---|---|{'---|' * len(PARTS)}")
    runs: dict[str, list[dict[str, float]]] = defaultdict(list)
    for _ in range(asked.repeats):
        # The cases take turns: a drift of the machine affects all of them.
        for case in (case for case in CASES if case.startswith(asked.only)):
            before = yardstick_us()
            found = measure(asked.requests, asked.steps, CASES[case], asked.cold)
            runs[case].append({part: statistics.median(values) for part, values in found.items()})
            runs[case][-1]["ratio"] = 2 * runs[case][-1]["step"] / (before + yardstick_us())
    for case, repeats in runs.items():
        parts = " | ".join(f"{statistics.median(r[part] for r in repeats):.0f}" for part in PARTS)
        steps, ratios = spread([r["step"] for r in repeats]), spread([r["ratio"] for r in repeats], digits=1)
        print(f"| {case} | {steps} | {ratios} | {parts} |")


if __name__ == "__main__":
    main()
