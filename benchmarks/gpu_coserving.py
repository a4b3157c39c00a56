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
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial

from gpu_bench import TPOT_MS, TTFT_MS, Bench, Scale, add_job, add_lines, run_stage
from gpu_figures import say
from gpu_load import Load, Outcome, Served, Slo, arrivals, best_way, outcome, percentile

from clif.engine.engine import Engine
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


class Coserving:
    """The measurements of one shape, with an engine for each way that keeps what it has learnt of its costs."""

    def __init__(self, shape: str, scale: Scale) -> None:
        self.scale, self.bench = scale, Bench(shape, scale)
        # Small steps, since what is counted are whole ones.
        self.count, self.length = scale.buckets[-1]
        self.engines: dict[str, Engine] = {}
        self.trainers: dict[str, ShadowTrainer] = {}
        self.efficiencies: dict[str, float] = {}
        self.outcomes: dict[float, list[Outcome]] = {}
        self.served: dict[float, Served] = {}

    def engine(self, way: str) -> Engine:
        """Raises ConfigError for a way that this device does not have."""
        if way not in self.engines:
            self.engines[way] = self.bench.engine(coserving="interleaved" if way == ALONE else way)
        return self.engines[way]

    def trainer(self, way: str) -> ShadowTrainer | None:
        engine = self.engine(way)
        if way != ALONE and way not in self.trainers:
            self.trainers[way] = self.bench.trainer(engine, self.count, self.length)
        return self.trainers.get(way)

    def keep_training(self, engine: Engine, trainer: ShadowTrainer | None) -> None:
        if trainer is not None and not engine.jobs:
            add_job(engine, trainer.step(self.count, 1))

    def finish(self, engine: Engine) -> None:
        """End the requests, and the optimizer step that is under way."""
        self.bench.cancel_all(engine)
        while engine.jobs:
            engine.step()

    def run(
        self, engine: Engine, trainer: ShadowTrainer | None, seconds: float, refill: Callable[[], None] | None = None
    ) -> Rates:
        """Steps of at least this many seconds, with all of their training on the device done."""
        steps, served, gaps = trainer.steps if trainer else 0, 0, []
        self.bench.sync()
        start = last = time.perf_counter()
        while last < start + seconds:
            self.keep_training(engine, trainer)
            if refill is not None:
                refill()
            served += sum(len(event.tokens) for event in engine.step())
            before, last = last, time.perf_counter()
            gaps.append(last - before)
        self.bench.sync()
        took = time.perf_counter() - start
        trained = (trainer.steps - steps) * self.count * self.length if trainer else 0
        return Rates(served / took, trained / took, gaps)

    @cached_property
    def training_alone(self) -> float:
        """Tokens/s."""
        engine = self.bench.engine(coserving="interleaved")
        trainer = self.bench.trainer(engine, self.count, self.length)
        self.run(engine, trainer, self.scale.window_s / 4)
        rates = [self.run(engine, trainer, self.scale.window_s / 2).training for _ in range(self.scale.repeats)]
        engine.close()
        return max(statistics.median(rates), 1e-9)

    @cached_property
    def decode_alone(self) -> Rates:
        return self.decode(ALONE)

    def decode(self, way: str) -> Rates:
        """A full batch of answers that none of them ends, after a third of the time as a warm-up."""
        engine, trainer = self.engine(way), self.trainer(way)
        for _ in range(self.scale.batch):
            engine.scheduler.add(self.bench.request(self.scale.prompt, 2 * self.scale.answer), engine.clock())
        while any(s.num_uncomputed_tokens > 1 for s in engine.scheduler.sequences):
            engine.serve()
        self.run(engine, trainer, self.scale.window_s / 4)
        rates = self.run(engine, trainer, self.scale.window_s / 2)
        self.finish(engine)
        return rates

    def decode_line(self, way: str) -> str:
        alone = self.decode_alone
        rates = alone if way == ALONE else self.decode(way)
        efficiency = rates.serving / max(alone.serving, 1e-9) + rates.training / self.training_alone
        self.efficiencies[way] = efficiency
        gap = percentile(rates.gaps, 0.99)
        figures = f"{rates.serving:.0f} | {rates.training:.0f} | {gap * 1e3:.2f}"
        return f"| {way} | {figures} | {gap / percentile(alone.gaps, 0.99):.2f} | {efficiency:.2f} |"

    @cached_property
    def capacity(self) -> float:
        """Requests/s of serving alone while each that ends is followed by another."""
        engine = self.engine(ALONE)
        refill = partial(self.bench.top_up, engine)
        self.run(engine, None, self.scale.window_s / 2, refill)
        rates = self.run(engine, None, self.scale.window_s, refill)
        self.bench.cancel_all(engine)
        return max(rates.serving / self.scale.answer, 1 / self.scale.window_s)

    def load(self, way: str, share: float) -> Served:
        """An open load whose first third is not counted. Training goes on until the last first token is due."""
        engine, trainer, end = self.engine(way), self.trainer(way), 1.5 * self.scale.window_s
        times = arrivals(share * self.capacity, end, seed=round(100 * share))
        load = Load(engine, [self.bench.mixed_request(seed=i) for i in range(len(times))], times)
        self.pass_time(load, trainer, end / 3)
        begun, steps, output = load.now, trainer.steps if trainer else 0, load.served.output
        self.pass_time(load, trainer, end)
        load.served.seconds, load.served.output = load.now - begun, load.served.output - output
        load.served.trained = (trainer.steps - steps) * self.count * self.length if trainer else 0
        self.pass_time(load, trainer, end + SLO.ttft_s)
        self.finish(engine)
        return load.served

    def pass_time(self, load: Load, trainer: ShadowTrainer | None, until_s: float) -> None:
        """Go on with a load until this time of it, one step at least, with all that the device was given done."""
        again = True
        while again:
            self.keep_training(load.engine, trainer)
            if trainer is None and load.idle:
                time.sleep(0.0002)
            load.step()
            again = load.now < until_s
        self.bench.sync()

    def load_line(self, share: float, way: str) -> str:
        served = self.load(way, share)
        alone = served if way == ALONE else self.served[share]
        self.served.setdefault(share, alone)
        found = outcome(way, alone, served, self.training_alone, SLO)
        if way != ALONE:
            self.outcomes.setdefault(share, []).append(found)
        rate = served.output / served.seconds
        figures = f"{len(served.arrived_s)} | {found.met} | {found.lost} | {rate:.0f} | {found.kept:.0%}"
        latencies = f"{percentile(served.ttft_s, 0.99) * 1e3:.0f} | {percentile(served.gaps, 0.99) * 1e3:.1f}"
        return f"| {share:.0%} | {way} | {figures} | {latencies} | {found.gap:.2f} |"

    def say_figures(self) -> str:
        """The figures of the final table are those of one way, the same for all."""
        way = best_way(self.outcomes)
        if way is None:
            return "* no way was measured"
        if way in self.efficiencies:
            say("efficiency", self.efficiencies[way], way)
        for share, name in NAMED.items():
            for one in self.outcomes.get(share, []):
                if one.way == way:
                    say(f"kept-{name}", one.kept, f"{way}, {one.lost} requests lost")
                    say(f"gap-{name}", one.gap, way)
        return f"* the final table has the figures of {way}: fewest requests lost, then most training kept"


def measure(shape: str, scale: Scale) -> list[str]:
    """Markdown of one shape."""
    together = Coserving(shape, scale)
    lines = [
        f"### Co-serving, {shape}, {scale.batch} streams of decode",
        "",
        f"Training alone: {together.training_alone:.0f} tokens/s, {together.count} x {together.length} a step.",
        "",
        "| way | serving tokens/s | training tokens/s | p99 gap between steps, ms | over serving alone | efficiency |",
        "|---|---|---|---|---|---|",
    ]
    add_lines(lines, [(way, partial(together.decode_line, way)) for way in (ALONE, *WAYS)])
    lines += [
        "",
        f"### Co-serving, {shape}, open load, {scale.prompt} + about {scale.answer} tokens, "
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
    for engine in together.engines.values():
        engine.close()
    return lines


if __name__ == "__main__":
    run_stage(measure, shapes=1)
