"""GPU stage: serving and training together against each alone, in one process and one run.

    python benchmarks/gpu_coserving.py [--dry] [SHAPE ...]

First 64 streams of decode, full from the beginning to the end. Efficiency is serving tokens/s over those of serving
alone, plus training tokens/s over those of training alone; alternating between the two gives at most 1.

Then an open load: requests arrive at random times, at a share of the rate that serving alone completes with a full
batch, and the same requests at the same times in every way. A request is lost if serving alone answered it within the
SLO and this way did not.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, partial

from gpu_bench import TPOT_MS, TTFT_MS, Bench, Scale, add_job, add_lines, run_stage
from gpu_figures import say
from gpu_load import Load, Outcome, Served, Slo, arrivals, best_way, outcome, percentile

from clif.engine.build import STRATEGIES, trial_engine
from clif.engine.coserving.measure import MODES, Progress, Work
from clif.engine.engine import Engine
from clif.replica.build import choose_by_trial
from clif.training.train_runner import TrainRunner
from clif.training.trainer import ShadowTrainer

ALONE = "serving alone"
WAYS = ("concurrent", "interleaved", "fused")
LOADS = (1.0, 0.7, 0.25)
"""Shares of the rate that serving alone completes."""
NAMED = {1.0: "100", 0.7: "70"}
"""Loads of the final table, as its figures name them."""
SLO = Slo(TTFT_MS / 1000, TPOT_MS / 1000)


@dataclass(frozen=True)
class Rates:
    """Tokens/s of serving and of training, and seconds between the steps of serving."""

    serving: float
    training: float
    gaps: list[float]


class Way:
    """An engine that serves and trains in one way, and keeps what it has learnt of its costs.

    progress: of optimizer steps, one after the other; None: it never trains.
    """

    def __init__(self, engine: Engine, trainer: ShadowTrainer | None) -> None:
        self.engine, self.progress = engine, None
        if trainer is not None:
            count, tokens = len(trainer.samples), sum(len(sample.ids) for sample in trainer.samples)
            self.progress = Progress(Work(lambda: trainer.step(count, 1), tokens, trainer.runner.stack.num_layers))

    @property
    def trained(self) -> float:
        """Tokens, through forward and backward."""
        return self.progress.tokens if self.progress else 0.0

    @contextmanager
    def at_work(self) -> Iterator[Engine]:
        """The engine, which trains meanwhile. Serving steps may take a forward along in this way alone."""
        self.engine.runner.fuses = self.engine.training_half.strategy.fuses
        if self.progress is not None:
            add_job(self.engine, self.progress.repeated())
        try:
            yield self.engine
        finally:
            with self.engine.streams.training():
                self.engine.jobs.drop("steps")


class Coserving:
    """The measurements of one shape. All ways share the model, the KV cache and what is captured."""

    def __init__(self, shape: str, scale: Scale) -> None:
        self.scale, self.bench = scale, Bench(shape, scale)
        # Small steps, and one captured pass each.
        self.count, self.length = scale.buckets[-1]
        # A dry run checks every replay, which takes longer than any request may wait.
        graphs = "auto" if scale.device == "cuda" else "off"
        self.base = self.bench.engine(coserving="interleaved", graphs=graphs)
        self.runner: TrainRunner = self.bench.train_runner(self.base)
        self.ways: dict[str, Way] = {}
        self.efficiencies: dict[str, float] = {}
        self.outcomes: dict[float, list[Outcome]] = {}
        self.served: dict[float, Served] = {}

    def way(self, name: str) -> Way:
        if name not in self.ways:
            engine = trial_engine(self.base, self.bench.config, "interleaved" if name == ALONE else name)
            trainer = self.bench.trainer(engine, self.count, self.length, self.runner) if name != ALONE else None
            self.ways[name] = Way(engine, trainer)
        return self.ways[name]

    @cached_property
    def chosen(self) -> str:
        """What engine.coserving auto chooses on this device."""
        graphs, samples = self.runner.graphs, self.bench.samples(self.count, self.length)
        choose_by_trial(self.base, self.runner, self.bench.config, samples, MODES)
        self.runner.graphs = graphs
        kind = type(self.base.training_half.strategy)
        return next(str(mode) for mode, strategy in STRATEGIES.items() if strategy is kind)

    def run(self, way: Way, seconds: float, refill: Callable[[], None] | None = None) -> Rates:
        """Steps of at least this many seconds, or until a request ends that nothing refills, with all that the device
        was given done."""
        self.bench.sync()
        trained, served, gaps = way.trained, 0, []
        running = way.engine.scheduler.running
        requests, start = len(running), time.perf_counter()
        last = start
        while not gaps or (last < start + seconds and (refill is not None or len(running) == requests)):
            if refill is not None:
                refill()
            served += sum(len(event.tokens) for event in way.engine.step())
            gaps.append(time.perf_counter() - last)
            last += gaps[-1]
        self.bench.sync()
        took = time.perf_counter() - start
        return Rates(served / took, (way.trained - trained) / took, gaps)

    @cached_property
    def training_alone(self) -> float:
        """Tokens/s."""
        way = self.way("interleaved")
        with way.at_work():
            self.run(way, self.scale.window_s / 4)
            rates = [self.run(way, self.scale.window_s / 2).training for _ in range(self.scale.repeats)]
        return max(statistics.median(rates), 1e-9)

    @cached_property
    def decode_alone(self) -> Rates:
        return self.decode(ALONE)

    def decode(self, name: str) -> Rates:
        """A full batch of answers of which none ends."""
        way = self.way(name)
        for _ in range(self.scale.batch):
            way.engine.scheduler.add(self.bench.request(self.scale.prompt, 2 * self.scale.answer), way.engine.clock())
        while any(s.num_uncomputed_tokens > 1 for s in way.engine.scheduler.sequences):
            way.engine.serve()
        with way.at_work():
            self.run(way, self.scale.window_s / 8)
            rates = self.run(way, self.scale.window_s / 2)
        self.bench.cancel_all(way.engine)
        return rates

    def decode_line(self, name: str) -> str:
        alone = self.decode_alone
        rates = alone if name == ALONE else self.decode(name)
        efficiency = rates.serving / max(alone.serving, 1e-9) + rates.training / self.training_alone
        self.efficiencies[name] = efficiency
        gap = percentile(rates.gaps, 0.99)
        figures = f"{rates.serving:.0f} | {rates.training:.0f} | {gap * 1e3:.2f}"
        return f"| {name} | {figures} | {gap / percentile(alone.gaps, 0.99):.2f} | {efficiency:.2f} |"

    @cached_property
    def capacity(self) -> float:
        """Requests/s of serving alone while each that ends is followed by another."""
        way = self.way(ALONE)
        refill = partial(self.bench.top_up, way.engine)
        self.run(way, self.scale.window_s / 2, refill)
        rates = self.run(way, self.scale.window_s, refill)
        self.bench.cancel_all(way.engine)
        return max(rates.serving / self.scale.answer, 1 / self.scale.window_s)

    def load(self, name: str, share: float) -> Served:
        """An open load whose first third is not counted. Training goes on until the last first token is due."""
        way, end = self.way(name), 1.5 * self.scale.window_s
        times = arrivals(share * self.capacity, end, seed=round(100 * share))
        # The same prompts in all ways, and others at each load: none is found in the prefix cache.
        requests = [self.bench.mixed_request(seed=round(share * 1e6) + i) for i in range(len(times))]
        with way.at_work() as engine:
            load = Load(engine, requests, times)
            self.pass_time(load, end / 3)
            begun, trained, output = load.now, way.trained, load.served.output
            self.pass_time(load, end)
            load.served.seconds, load.served.output = load.now - begun, load.served.output - output
            load.served.trained = way.trained - trained
            self.pass_time(load, end + SLO.ttft_s)
        self.bench.cancel_all(engine)
        return load.served

    def pass_time(self, load: Load, until_s: float) -> None:
        """Go on with a load until this time of it, one step at least, with all that the device was given done."""
        again = True
        while again:
            if load.idle and not load.engine.jobs:
                time.sleep(0.0002)
            load.step()
            again = load.now < until_s
        self.bench.sync()

    def load_line(self, share: float, name: str) -> str:
        served = self.load(name, share)
        alone = served if name == ALONE else self.served[share]
        self.served.setdefault(share, alone)
        found = outcome(name, alone, served, self.training_alone, SLO)
        if name != ALONE:
            self.outcomes.setdefault(share, []).append(found)
        rate = served.output / served.seconds
        figures = f"{len(served.arrived_s)} | {found.met} | {found.lost} | {rate:.0f} | {found.kept:.0%}"
        latencies = f"{percentile(served.ttft_s, 0.99) * 1e3:.0f} | {percentile(served.gaps, 0.99) * 1e3:.1f}"
        return f"| {share:.0%} | {name} | {figures} | {latencies} | {found.gap:.2f} |"

    def say_figures(self) -> str:
        """The figures of the final table are those of one way, the one that users get."""
        way, best = self.chosen, best_way(self.outcomes)
        if way in self.efficiencies:
            say("efficiency", self.efficiencies[way], way)
        for share, name in NAMED.items():
            for one in self.outcomes.get(share, []):
                if one.way == way:
                    say(f"kept-{name}", one.kept, way)
                    say(f"lost-{name}", float(one.lost))
                    say(f"gap-{name}", one.gap, way)
        return f"* best of all loads, by requests lost and then by training kept: {best}; in the final table: {way}"


def measure(shape: str, scale: Scale) -> list[str]:
    """Markdown of one shape."""
    together = Coserving(shape, scale)
    lines = [
        f"### Co-serving, {scale.shown(shape)}, {scale.batch} streams of decode",
        "",
        f"Training alone: {together.training_alone:.0f} tokens/s, {together.count} x {together.length} a step. "
        f"`engine.coserving: auto` chooses {together.chosen} here (the log has its figures).",
        "",
        "| way | serving tokens/s | training tokens/s | p99 gap between steps, ms | over serving alone | efficiency |",
        "|---|---|---|---|---|---|",
    ]
    add_lines(lines, [(way, partial(together.decode_line, way)) for way in (ALONE, *WAYS)])
    lines += [
        "",
        f"### Co-serving, {scale.shown(shape)}, open load, {scale.prompt} + about {scale.answer} tokens, "
        f"TTFT {TTFT_MS:g} ms, TPOT {TPOT_MS:g} ms",
        "",
        f"100 %: {together.capacity:.1f} requests/s.",
        "",
        "| load | way | requests | in time | lost | serving tokens/s | training kept | p99 TTFT, ms | p99 gap, ms "
        "| over serving alone |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for share in LOADS:
        add_lines(lines, [(f"{share:.0%} | {way}", partial(together.load_line, share, way)) for way in (ALONE, *WAYS)])
        # What is known now stays known if the stage is ended.
        together.say_figures()
    lines += ["", together.say_figures()]
    for way in together.ways.values():
        way.engine.close()
    return lines


if __name__ == "__main__":
    run_stage(measure)
