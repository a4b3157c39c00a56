"""Where the time of one replica goes while it serves and trains, on its own CPU time: true also on a busy machine.

    python benchmarks/replica_time.py                                # capacity, training alone, then 70 % load
    python benchmarks/replica_time.py --threads 2 --seconds 20 -- engine.slice_ms=20

The replica is the real one, with its engine, its trainer and its rounds of one member. Its clock is the CPU time of
this process, divided by its threads; while it has nothing to do, the clock jumps to the next event. Requests arrive by
that clock. What is missing is the control process, other replicas, and their use of the memory's bandwidth.
"""

from __future__ import annotations

import gc
import random
import tempfile
import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import msgspec
import numpy as np
import torch
import typer

from clif.config import Config, load_config
from clif.distributed.launch_env import RankEnv
from clif.distributed.topology import make_topology
from clif.engine.base import build_base
from clif.engine.coserving.interleaved import Interleaved
from clif.engine.jobs import STEP_KINDS, SliceKind
from clif.models.weights.loading import load_model
from clif.replica.build import build_replica, load_data
from clif.replica.records import RankRecords
from clif.replica.replica import Replica
from clif.types import Request, RoundPlan, Sampling, Waiting
from clif.wire import messages as m

REPO = Path(__file__).resolve().parents[1]
REPLY_S, ROUND_PAUSE_S, BACKLOG_S = 0.01, 0.125, 0.05
"""Seconds until the control process answers; until it begins the next round; between two updates of the backlog."""


class WorkClock:
    """Seconds of CPU per thread since the start, and those that were skipped."""

    def __init__(self, threads: int) -> None:
        self._threads, self._skipped, self._began = threads, 0.0, time.process_time()

    def __call__(self) -> float:
        return (time.process_time() - self._began) / self._threads + self._skipped

    def skip_to(self, at: float) -> None:
        self._skipped += max(0.0, at - self())


@dataclass
class Parts:
    """Seconds by part; each second belongs to the innermost part that was open."""

    clock: Callable[[], float]
    seconds: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    _open: list[str] = field(default_factory=lambda: ["loop"])
    _since: float = 0.0

    def switch(self, name: str | None) -> None:
        """Open a part; None: close the innermost one."""
        now = self.clock()
        self.seconds[self._open[-1]] += now - self._since
        self._since = now
        if name is None:
            self._open.pop()
        else:
            self._open.append(name)

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        self.switch(name)
        try:
            yield
        finally:
            self.switch(None)

    def wrap(self, owner: Any, method: str, name: str | Callable[..., str]) -> None:
        """From now on calls of a method belong to the part."""
        inner = getattr(owner, method)

        def call(*args: Any, **kwargs: Any) -> Any:
            with self.part(name if isinstance(name, str) else name(*args)):
                return inner(*args, **kwargs)

        setattr(owner, method, call)

    def watch_gc(self) -> None:
        gc.callbacks.append(lambda phase, _: self.switch("garbage collection" if phase == "start" else None))


@dataclass
class Stream:
    """A request's stamps: arrival and tokens."""

    arrived_s: float
    stamps: list[float] = field(default_factory=list)


@dataclass
class Run:
    """A replica at work, and what stands in for the control process."""

    replica: Replica
    clock: WorkClock
    said: list[m.Up]
    parts: Parts
    streams: dict[int, Stream] = field(default_factory=dict)
    layers: list[tuple[float, int]] = field(default_factory=list)
    _orders: list[tuple[float, m.Down]] = field(default_factory=list)
    _queue: deque[Request] = field(default_factory=deque)
    _outstanding: int = 0
    _backlog: tuple[float, tuple[int, ...]] = (-1e9, ())
    rounds: int = 0

    def go(self, arrivals: list[tuple[float, Request]], seconds: float, trains: bool) -> None:
        """Serve the arrivals, (seconds from now, request), and train for as long."""
        began = self.clock()
        end, coming = began + seconds, deque((began + at, request) for at, request in arrivals)
        if trains and self.replica.member.orders is None:
            self._begin_round()
        while (now := self.clock()) < end:
            self._step(now, coming, end)
        # What runs is ended: the next part begins with an empty replica.
        self.replica.engine.jobs.drop("round")
        self.replica.member.discard()
        self._queue.clear()
        running = [sequence.request.id for sequence in self.replica.engine.scheduler.sequences]
        self.replica.step([msgspec.msgpack.encode(m.Cancel(request_id=id)) for id in running])
        self._note(self.clock())
        self._orders.clear()
        self.said.clear()

    def _step(self, now: float, coming: deque[tuple[float, Request]], end: float) -> None:
        engine = self.replica.engine
        while coming and coming[0][0] <= now:
            at, request = coming.popleft()
            self.streams[request.id] = Stream(at)
            self._queue.append(request)
        inbox = [order for at, order in self._orders if at <= now]
        self._orders = [(at, order) for at, order in self._orders if at > now]
        while self._queue and self._outstanding < engine.scheduler.max_batch:
            self._outstanding += 1
            inbox.append(m.Submit(request=self._queue.popleft()))
        inbox += self._backlog_update(now)
        if not inbox and not engine.busy:
            waits = [*[at for at, _ in coming], *[at for at, _ in self._orders], end]
            poll_s = self.replica.wait_s()
            with self.parts.part("idle, a round waits" if engine.jobs else "idle"):
                self.clock.skip_to(min(*waits, now + poll_s) if waits else now + poll_s)
        self.replica.step([msgspec.msgpack.encode(order) for order in inbox])
        self._note(self.clock())

    def _backlog_update(self, now: float) -> list[m.Down]:
        ids = tuple(request.id for request in self._queue)
        at, last = self._backlog
        if now - at < BACKLOG_S or (ids == last and now - at < 1.0):
            return []
        self._backlog = now, ids
        oldest = [
            Waiting(r.id, now - self.streams[r.id].arrived_s, len(r.prompt), r.sampling.max_tokens)
            for r in list(self._queue)[:32]
        ]
        return [m.Backlog(waiting=len(ids), oldest=tuple(oldest))]

    def _note(self, now: float) -> None:
        for message in self.said:
            self._hear(now, message)
        self.said.clear()

    def _hear(self, now: float, message: m.Up) -> None:
        if isinstance(message, m.Tokens):
            for event in message.events:
                self.streams[event.request_id].stamps += [now] * len(event.tokens)
                self._outstanding -= event.finish is not None
        elif isinstance(message, m.StepsDone):
            self._orders.append((now + REPLY_S, m.Aggregate(round_id=self.rounds)))
        elif isinstance(message, m.Voted):
            version = self.replica.engine.scheduler.slots.active + 1
            self._orders.append(
                (now + REPLY_S, m.Settle(round_id=self.rounds, commit=True, version=version, publish=True))
            )
        elif isinstance(message, m.Settled) and message.round_id == self.rounds:
            self._begin_round()

    def _begin_round(self) -> None:
        config, slots = self.replica.config, self.replica.engine.scheduler.slots
        self.rounds += 1
        plan = RoundPlan(
            round_id=self.rounds,
            members=(0,),
            incarnations=(0,),
            local_steps=config.federation.local_steps,
            micro_batch=config.train.micro_batch,
            accumulation=1,
            base_version=slots.active,
        )
        self._orders.append((self.clock() + ROUND_PAUSE_S, m.BeginRound(plan=plan, group=1)))


def build(config: Config, threads: int, folder: Path) -> tuple[Run, list[tuple[int, ...]]]:
    """The replica on its own clock, and prompts."""
    torch.set_num_threads(threads)
    topology = make_topology(config, RankEnv(0, 1, 0, 1))
    loaded = load_model(config.model, topology.device, config.run.seed)
    base = build_base(config, loaded, topology.tp_group)
    # One half of the data, as one of two replicas has it.
    data = load_data(config, loaded.tokenizer, 0, 2)
    said: list[m.Up] = []
    records = RankRecords(folder, 0, config.metrics, {})
    replica = build_replica(config, topology, base, data, folder, records, said.append)
    clock = WorkClock(threads)
    replica.engine.clock = clock
    parts = Parts(clock)
    run = Run(replica, clock, said, parts)
    _instrument(replica, parts)
    _count_layers(run)
    return run, [sample.ids[: sample.target_start] for sample in data.train]


def _count_layers(run: Run) -> None:
    """Rows times layers of training, forward and backward: optimizer steps are too few to be counted in seconds."""
    jobs = run.replica.engine.jobs
    compute = jobs.run

    def counted(units: int) -> None:
        piece = jobs.upcoming
        compute(units)
        if piece is not None and piece.kind in (SliceKind.FORWARD, SliceKind.BACKWARD):
            run.layers.append((run.clock(), piece.tokens * units))

    jobs.run = counted  # type: ignore[method-assign]


def _instrument(replica: Replica, parts: Parts) -> None:
    engine = replica.engine
    parts.watch_gc()
    parts.wrap(replica, "_agree", "plan")
    parts.wrap(replica, "_learn", "training: between slices")
    parts.wrap(replica, "_account", "report")
    parts.wrap(replica, "_send", "report")
    parts.wrap(engine, "serve", "serving: schedule and settle")
    parts.wrap(engine.runner, "fill", "serving: fill")

    def kind_of_step(batch: Any, fused: Any = None) -> str:
        decode = all(chunk.is_decode for chunk in batch.chunks)
        return "serving: forward, decode" if decode else "serving: forward, with prompts"

    parts.wrap(engine.runner, "forward", kind_of_step)
    jobs = engine.jobs

    def kind_of_slice(units: int) -> str:
        assert jobs.upcoming is not None
        kind = jobs.upcoming.kind
        return f"training: {kind.value}" if kind in STEP_KINDS else f"evaluation: {kind.value}"

    parts.wrap(jobs, "run", kind_of_slice)


def requests(prompts: list[tuple[int, ...]], count: int, max_tokens: int, seed: int) -> list[Request]:
    rng = random.Random(seed)
    sampling = Sampling(max_tokens=max_tokens, ignore_eos=True)
    return [Request(id=seed * 100_000 + i, prompt=rng.choice(prompts), sampling=sampling) for i in range(count)]


def poisson(wanted: list[Request], rate: float, seed: int) -> list[tuple[float, Request]]:
    rng, at, arrivals = random.Random(seed), 0.0, []
    for request in wanted:
        at += rng.expovariate(rate)
        arrivals.append((at, request))
    return arrivals


@dataclass
class Figures:
    """Of a window: tokens/s, seconds by part, gaps."""

    output_tps: float
    train_tps: float
    parts: dict[str, float]
    gaps_ms: tuple[float, float, float]
    ttft_ms: tuple[float, float]


def window(run: Run, began: float, seconds: float, before: dict[str, float], settle_s: float = 0.0) -> Figures:
    """Figures of [began, began + seconds)."""
    stamps = [s for stream in run.streams.values() for s in stream.stamps if began <= s < began + seconds]
    gaps = [np.diff(stream.stamps) for stream in run.streams.values() if stream.stamps and stream.stamps[0] >= began]
    all_gaps = np.concatenate(gaps) * 1000 if gaps else np.array([np.nan])
    ttft = [1000 * (s.stamps[0] - s.arrived_s) for s in run.streams.values() if s.stamps and s.arrived_s >= began]
    both_ways = 2 * run.replica.member.trainer.runner.stack.num_layers
    tokens = sum(n for at, n in run.layers if began <= at < began + seconds) / both_ways
    spent = {name: run.parts.seconds[name] - before.get(name, 0.0) for name in run.parts.seconds}
    p = tuple(np.percentile(all_gaps, (50, 99, 100)).tolist())
    t = tuple(np.percentile(ttft, (50, 99)).tolist()) if ttft else (np.nan, np.nan)
    return Figures(len(stamps) / seconds, tokens / seconds, spent, p, t)  # type: ignore[arg-type]


def measured(run: Run, arrivals: list[tuple[float, Request]], seconds: float, trains: bool) -> Figures:
    run.parts.switch("loop")
    before, began = dict(run.parts.seconds), run.clock()
    found: list[Figures] = []
    # The window ends before what runs is ended.
    ended = run.replica.engine.jobs.drop

    def drop(name: str) -> None:
        run.parts.switch("loop")
        found.append(window(run, began, seconds, before))
        ended(name)

    run.replica.engine.jobs.drop = drop  # type: ignore[method-assign]
    run.go(arrivals, seconds, trains)
    run.replica.engine.jobs.drop = ended  # type: ignore[method-assign]
    found[0].gaps_ms = window(run, began, seconds, before).gaps_ms
    return found[0]


def main(
    overrides: Annotated[list[str] | None, typer.Argument()] = None,
    threads: Annotated[int, typer.Option(min=1)] = 1,
    seconds: Annotated[float, typer.Option(help="of each part")] = 15.0,
    load: Annotated[float, typer.Option(help="share of the capacity")] = 0.7,
    config_file: Annotated[Path, typer.Option("--config")] = REPO / "configs" / "bench.yaml",
    capacity: Annotated[float, typer.Option(help="tokens/s of serving alone; 0: measured")] = 0.0,
    alone_s: Annotated[float, typer.Option(help="seconds of training alone; 0: as for the other parts")] = 0.0,
    gaps: Annotated[bool, typer.Option(help="no: slices are as long as the promises leave")] = True,
) -> None:
    """Measure one replica."""
    settings = [f"dist.threads_per_rank={threads}", "load.kind=poisson", *(overrides or [])]
    config = load_config(config_file, tuple(settings))
    tokens = config.load.max_tokens
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode(False):
        run, prompts = build(config, threads, Path(folder))
        if not gaps:
            strategy = run.replica.engine.training_half.strategy
            assert isinstance(strategy, Interleaved)
            strategy.keeps_gaps = False
        batch = config.engine.max_batch
        # Kernels are chosen, memory is touched, costs are learnt.
        measured(run, [(0.0, r) for r in requests(prompts, batch // 2, 16, 1)], 4.0, True)
        if not capacity:
            full = measured(run, [(0.0, r) for r in requests(prompts, int(seconds * 40), tokens, 2)], seconds, False)
            show("serving, saturated", full, seconds, (full.output_tps, 1.0))
            capacity = full.output_tps
        alone = measured(run, [], alone_s or seconds, True)
        show("training alone", alone, seconds, (1.0, alone.train_tps))
        serve_tps, train_tps = capacity, alone.train_tps
        rate = load * serve_tps / tokens
        for trains in (False, True):
            arrivals = poisson(requests(prompts, int(rate * seconds * 1.3) + 5, tokens, 3 + trains), rate, 7)
            arrivals = [(at, r) for at, r in arrivals if at < seconds]
            done = measured(run, arrivals, seconds, trains)
            show(f"{load:.0%} load, {'with' if trains else 'without'} training", done, seconds, (serve_tps, train_tps))


def show(title: str, figures: Figures, seconds: float, capacity: tuple[float, float]) -> None:
    """A table of a window. capacity: tokens/s of serving and training alone."""
    serve, train = figures.output_tps / capacity[0], figures.train_tps / capacity[1]
    print(f"\n## {title}\n")
    print(
        f"output {figures.output_tps:.1f} tokens/s ({serve:.2f}), training {figures.train_tps:.1f} ({train:.2f}): ",
        end="",
    )
    print(f"efficiency {serve + train:.3f}; gap p50 {figures.gaps_ms[0]:.1f}, p99 {figures.gaps_ms[1]:.1f}, ", end="")
    print(f"max {figures.gaps_ms[2]:.1f} ms; TTFT p50 {figures.ttft_ms[0]:.0f}, p99 {figures.ttft_ms[1]:.0f} ms\n")
    total = sum(figures.parts.values())
    for name, spent in sorted(figures.parts.items()):
        if spent > 0.0005 * total:
            print(f"| {name} | {spent:.2f} s | {spent / total:.1%} |")


if __name__ == "__main__":
    typer.run(main)
