"""Replicas of several ranks on one machine: tensor parallelism, FedAvg, and the cost of a round for requests.

    python benchmarks/parallel.py            # needs the demo's assets; idle cores

Ratios within one run. Every measurement starts new processes, and every request has its own prompt, so that no layout
profits from the caches of another one. Ranks are processes on gloo. *Communication* is the time in all-reduces of one
rank's steps.
"""

from __future__ import annotations

import datetime
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import typer

from clif.config import config_from_tree
from clif.distributed.collectives import TpGroup, WeightedMean
from clif.distributed.launch_env import RankEnv
from clif.distributed.topology import Topology, make_topology
from clif.engine.engine import Engine
from clif.metrics.provenance import cpu_model, git_commit
from clif.models.weights.loading import load_model
from clif.types import Request, Sampling

os.environ.setdefault("TQDM_DISABLE", "1")
REPO = Path(__file__).resolve().parents[1]
ADAPTER_BYTES = 84 << 20
"""An adapter of rank 16 on all linear layers of an 8B model, in two bytes a number."""
BATCH, PROMPT, ANSWER = 16, 48, 64


def start(world: int, threads: int, tp_size: int, body: Callable[..., Any], *args: Any) -> list[Any]:
    """Run body(topology, *args) on `world` processes; returns their results."""
    with tempfile.TemporaryDirectory() as folder:
        mp.start_processes(_rank, (world, threads, tp_size, folder, body, args), nprocs=world, start_method="spawn")
        return [torch.load(Path(folder) / f"{rank}.pt", weights_only=False) for rank in range(world)]


def _rank(
    rank: int, world: int, threads: int, tp_size: int, folder: str, body: Callable[..., Any], args: tuple[Any, ...]
) -> None:
    torch.set_num_threads(threads)
    config = config_from_tree(
        {"model": {"path": "none", "device": "cpu"}, "train": {"enabled": False}, "layout": {"tp_size": tp_size}}
    )
    store = dist.FileStore(str(Path(folder) / "store"), world)
    topology = make_topology(config, RankEnv(rank, world, rank, world), store)
    torch.save(body(topology, *args), Path(folder) / f"{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


class Clock:
    """Adds up the time of this rank's all-reduces, and counts those of the layers without the head's."""

    def __init__(self) -> None:
        self.seconds, self.calls = 0.0, 0
        original = TpGroup.all_reduce_

        def timed(tp_group: TpGroup, tensor: torch.Tensor) -> torch.Tensor:
            begin = time.perf_counter()
            result = original(tp_group, tensor)
            self.seconds += time.perf_counter() - begin
            self.calls += 1
            return result

        all_gather_columns = TpGroup.all_gather_columns

        def of_the_head(tp_group: TpGroup, part: torch.Tensor, start: int, total: int) -> torch.Tensor:
            before = self.calls
            result = all_gather_columns(tp_group, part, start, total)
            self.calls = before
            return result

        TpGroup.all_reduce_, TpGroup.all_gather_columns = timed, of_the_head  # type: ignore[method-assign]


def serving(topology: Topology, model: str, dtype: str, seconds: float) -> dict[str, float]:
    """Closed loop of BATCH requests: tokens/s, share of the time in communication, all-reduces per layer and step."""
    engine, layers = build_engine(topology, model, dtype)
    clock = Clock()
    ids, tokens, steps, begin = iter(range(1 << 60)), 0, 0, 0.0
    # The leader's clock ends the run for all: see TpGroup.broadcast_ints.
    go_on = topology.tp_group.broadcast_ints
    while go_on([int(not begin or time.perf_counter() < begin + seconds)])[0]:
        if steps == 20:
            begin, tokens, clock.seconds, clock.calls = time.perf_counter(), 0, 0.0, 0
        while len(engine.scheduler.running) + len(engine.scheduler.waiting) < BATCH:
            engine.scheduler.add(request(next(ids)), 0.0)
        tokens += sum(len(event.tokens) for event in engine.serve())
        steps += 1
    spent = time.perf_counter() - begin
    return {
        "tokens_s": tokens / spent,
        "communication": clock.seconds / spent,
        "per_layer": clock.calls / (steps - 20) / layers,
    }


def build_engine(topology: Topology, model: str, dtype: str) -> tuple[Engine, int]:
    """An engine with an adapter that answers, and its number of layers."""
    tree = {
        "model": {"path": model, "dtype": dtype, "max_context": 256, "device": "cpu"},
        "engine": {"kv_tokens": 4096, "max_batch": BATCH, "coserving": "interleaved"},
        "train": {"enabled": False},
    }
    config = config_from_tree(tree)
    loaded = load_model(config.model, topology.device, 0, topology.tp_group)
    engine = Engine.from_config(config, loaded, topology.tp_group)
    engine.runner.bank.fill_slot(0, engine.runner.bank.shadow_state())
    engine.scheduler.slots.promote(1, 0)
    return engine, engine.runner.stack.num_layers


def request(number: int) -> Request:
    rng = torch.Generator().manual_seed(number)
    prompt = tuple(torch.randint(100, 40_000, (PROMPT,), generator=rng).tolist())
    return Request(id=number, prompt=prompt, sampling=Sampling(max_tokens=ANSWER + number % ANSWER, ignore_eos=True))


def averaging(topology: Topology, repeats: int) -> dict[str, list[float]]:
    """Seconds of FedAvg and of a bare all-reduce of the same bytes, in turn."""
    members = tuple(range(len(topology.layout.replicas)))
    group = topology.combined_group((members, (0,) * len(members)), 1).result()
    vector, buffer = torch.randn(ADAPTER_BYTES // 4), torch.zeros(ADAPTER_BYTES // 4 + 1)
    found: dict[str, list[float]] = {"FedAvg": [], "bare": []}
    for repeat in range(repeats + 1):
        for name in found:
            group.allreduce([torch.ones(1)]).wait()
            begin = time.perf_counter()
            if name == "bare":
                group.allreduce([vector]).wait()
            else:
                mean = WeightedMean(vector, 3, group, buffer=buffer)
                while not mean.done():
                    time.sleep(0.001)
                mean.result()
            if repeat:
                found[name].append(time.perf_counter() - begin)
        vector.fill_(1.0)
    return found


def stall(topology: Topology, model: str, dtype: str) -> dict[str, float]:
    """Gaps between steps of a full batch while nothing else happens, and while an average and a promotion do."""
    engine, _ = build_engine(topology, model, dtype)
    bank, slots = engine.runner.bank, engine.scheduler.slots
    group, ids = topology.combined_group(((0, 1), (0, 0)), 1).result(), iter(range(1 << 60))
    quiet: list[float] = []
    busy: list[float] = []
    mean: WeightedMean | None = None
    promoted = False
    last = time.perf_counter()
    for step in range(240):
        while len(engine.scheduler.running) + len(engine.scheduler.waiting) < BATCH:
            engine.scheduler.add(request(next(ids)), 0.0)
        engine.serve()
        prefill = engine.record.prefill_tokens
        if step == 120:
            mean = WeightedMean(bank.shadow.detach(), 3, group)
        if mean is not None and not promoted and mean.done():
            bank.load_shadow(mean.result()[0])
            if (slot := slots.free_slot()) is not None:
                bank.fill_slot(slot, bank.shadow_state())
                slots.promote(2, slot)
                promoted = True
        now = time.perf_counter()
        # Steps with a prompt are long for another reason.
        if step > 20 and not prefill:
            (busy if mean is not None and len(busy) < 40 and step >= 120 else quiet).append(now - last)
        last = now
    assert promoted, "the promotion did not happen within the steps that were watched"
    return {"quiet": statistics.median(quiet), "quiet_max": max(quiet), "busy_max": max(busy)}


def main(
    seconds: Annotated[float, typer.Option(help="of each serving measurement")] = 12.0,
    repeats: Annotated[int, typer.Option(min=1)] = 3,
    model: Annotated[str, typer.Option()] = str(REPO / "assets" / "smollm2-135m-instruct.gguf"),
    dtype: Annotated[str, typer.Option()] = "float32",
    tp_size: Annotated[int, typer.Option(help="that divides the model's heads")] = 3,
    out: Annotated[Path, typer.Option(help="folder for the dated file")] = REPO / "benchmarks",
) -> None:
    """Measure and write a dated file."""
    cores = os.cpu_count() or 1
    today = datetime.date.today().isoformat()
    lines = [
        f"# Replicas of several ranks, {today}",
        "",
        f"* command: `{' '.join(['python', 'benchmarks/parallel.py', *sys.argv[1:]])}`",
        f"* machine: {cpu_model()}, {cores} cores; load before: {os.getloadavg()[0]:.2f}; commit {git_commit()}",
        f"* versions: Python {platform.python_version()}, torch {version('torch')}; gloo, {dtype}",
        "",
        "## Serving, closed loop of 16",
        "",
        "| ranks x threads | tokens/s | communication | all-reduces per layer and step |",
        "|---|---|---|---|",
    ]
    for _ in range(repeats):
        for ranks, threads in ((1, cores), (tp_size, 1)):
            found = start(ranks, threads, ranks, serving, model, dtype, seconds)[0]
            shares = f"{found['communication']:.0%} | {found['per_layer']:.2f}"
            lines.append(f"| {ranks} x {threads} | {found['tokens_s']:.0f} | {shares} |")
            print(lines[-1], flush=True)
    lines += [
        "",
        "## FedAvg of 84 MB",
        "",
        "| ranks | bare, MB/s | FedAvg, MB/s | FedAvg / bare |",
        "|---|---|---|---|",
    ]
    for ranks in (2, 4, 8):
        times = start(ranks, 1, 1, averaging, 5)[0]
        bare, ours = (ADAPTER_BYTES / statistics.median(times[n]) / 1e6 for n in ("bare", "FedAvg"))
        ratios = [b / f for b, f in zip(times["bare"], times["FedAvg"], strict=True)]
        spread = f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
        lines.append(f"| {ranks} | {bare:.0f} | {ours:.0f} | {spread} |")
        print(lines[-1], flush=True)
    lines += ["", "## What an average and a promotion cost the requests", ""]
    lines += ["| repeat | median step, ms | longest quiet step | longest step meanwhile |", "|---|---|---|---|"]
    for repeat in range(repeats):
        found = start(2, 1, 1, stall, model, dtype)[0]
        figures = " | ".join(f"{found[name] * 1e3:.1f}" for name in ("quiet", "quiet_max", "busy_max"))
        lines.append(f"| {repeat + 1} | {figures} |")
        print(lines[-1], flush=True)
    path = out / f"parallel-{today}.md"
    path.write_text("\n".join([*lines, ""]))
    print(path.read_text())


if __name__ == "__main__":
    typer.run(main)
