"""A replica in virtual time: engine, scheduler, cost model and strategy are real, and its steps only cost time.

So a test can compare what training took, and what every request got, with serving alone under the same load.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from control_run import Run
from msgspec.structs import replace
from scripted_replica import ScriptedReplica

from clif.adapters.slots import SlotTable
from clif.config import Config
from clif.control.sources import DueRequest, Source, TraceSource
from clif.data.load import ScheduledRequest
from clif.engine.build import make_strategy
from clif.engine.coserving.backlog import Backlog
from clif.engine.engine import Engine
from clif.engine.job_queue import JobQueue
from clif.engine.jobs import WAIT, Job, Slice, SliceKind, Slices
from clif.engine.scheduler import Chunk, Scheduler
from clif.engine.training_half import TrainingHalf
from clif.simulate.channel import SimChannel
from clif.simulate.virtual_time import VirtualTime
from clif.types import Request, Sampling, Slo, TokenLogprob
from clif.wire import messages as wire

STEP_S, ROW_S, LAYER_S, LAYERS = 0.012, 0.0005, 0.003, 24
IDLE_S = 0.002
ENDLESS = 1 << 30
BEGIN_S, FIRST_ID = 3.0, 1000
SLO = Slo(ttft_s=1.0, tpot_s=0.06)


@dataclass
class StepClock:
    """Virtual time, and what the step under way has taken so far."""

    time: VirtualTime
    spent_s: float = 0.0

    def __call__(self) -> float:
        return self.time() + self.spent_s


@dataclass
class Computed:
    tokens: list[int]

    def read(self) -> list[int]:
        return self.tokens

    def logprobs(self) -> dict[int, TokenLogprob]:
        return {}


@dataclass
class TimedBatch:
    chunks: list[Chunk]
    captured: None = None
    late: bool = False


@dataclass
class TimedRunner:
    """Costs what a step of so many rows costs; every token is 1, which ends nothing."""

    clock: StepClock

    def fill(self, chunks: list[Chunk], fused: bool = False) -> TimedBatch:
        return TimedBatch(chunks)

    def forward(self, batch: TimedBatch, fused: object = None) -> Computed:
        self.clock.spent_s += STEP_S + ROW_S * sum(c.stop - c.start for c in batch.chunks)
        return Computed([1 for c in batch.chunks if c.needs_sampling])


@dataclass(frozen=True)
class Step:
    """What a step did. limit: why training got no more; empty: nothing was to be trained."""

    at_s: float
    running: int
    full: bool
    train_s: float
    limit: str


class EngineReplica(ScriptedReplica):
    """Serves and trains by an Engine. forwards: training forwards of a round.

    steps: what was done. updates_s: when it was told of a backlog.
    """

    def __init__(
        self, replica: int, config: Config, time: VirtualTime, trains: bool, forwards: int, deaf: bool
    ) -> None:
        super().__init__(replica)
        self.clock, self.trains, self.trains_until_told = StepClock(time), trains, True
        self.forwards, self.deaf = forwards, deaf
        scheduler = Scheduler(config.engine, SlotTable(3), (0,), lambda ids: "")
        half = TrainingHalf(make_strategy(config.engine.coserving, config), JobQueue())
        self.engine = Engine(TimedRunner(self.clock), scheduler, half, clock=self.clock)  # type: ignore[arg-type]
        self.engine.backlog = None
        self.steps, self.updates_s = list[Step](), list[float]()
        self._config, self._arrivals = config, list[Request]()

    def hello(self) -> wire.Hello:
        engine = self._config.engine
        return replace(super().hello(), max_batch=engine.max_batch, kv_tokens=engine.kv_tokens)

    def report(self) -> wire.Report:
        running = len(self.engine.scheduler.running)
        return wire.Report(
            replica=self.replica, running=running, waiting=0, kv_used=0, busy=float(running > 0),
            version=self.version, training_steps=0, last_loss=None,
            serve_timings=((float(running), 0.0, STEP_S + ROW_S * running),),
        )  # fmt: skip

    def obey(self, message: wire.Down) -> None:
        if isinstance(message, wire.Submit):
            self._arrivals.append(message.request)
        elif isinstance(message, wire.Backlog) and not self.deaf:
            self.updates_s.append(self.clock.time())
            self.engine.backlog = Backlog(message.waiting, message.oldest, self.clock())
        elif isinstance(message, wire.BeginRound) and self.trains:
            self.engine.jobs.append(Job("round", self._round(message.plan.round_id)))
        elif isinstance(message, (wire.FinishSteps, wire.Settle, wire.Stop)):
            self.engine.jobs.drop("round")
        super().obey(message)

    def serve(self) -> None:
        plan = self.engine.plan(self._arrivals)
        for request in self._arrivals:
            self.engine.scheduler.add(request, self.clock())
        self._arrivals = []
        scheduler = self.engine.scheduler
        full = len(scheduler.sequences) >= scheduler.max_batch
        self.engine.learn(plan)
        events = self.engine.serve(plan)
        record = self.engine.record
        limit = record.slack.limit.value if record.slack else ""
        self.steps.append(Step(self.clock.time(), len(scheduler.running), full, record.train_s, limit))
        if events:
            self.send(wire.Tokens(replica=self.replica, events=tuple(events)))

    def _round(self, round_id: int) -> Slices[None]:
        for _ in range(self.forwards):
            yield Slice(SliceKind.FORWARD, 64, LAYERS, self._compute)
        self.steps_done(round_id)
        while True:
            yield WAIT

    def _compute(self, units: int) -> None:
        self.clock.spent_s += LAYER_S * units


def drive_engine(replica: EngineReplica, time: VirtualTime, channel: SimChannel) -> None:
    """Plan the steps of a replica, each when the one before has ended; what it sends leaves at the end of the step."""
    line = channel.connect(replica.replica, replica.take)
    replica.send = lambda message: time.after(replica.clock.spent_s, lambda: line.send(message))

    def step() -> None:
        replica.clock.spent_s = 0.0
        replica.step(time())
        if not replica.over:
            time.after(replica.clock.spent_s or IDLE_S, step)

    replica.start()
    time.after(IDLE_S, step)


@dataclass
class Streams:
    """A Source: so many users at a time, each with the next request as soon as the one before has ended.

    outstanding: how many have not ended. `count` requests come, the first after BEGIN_S.
    """

    streams: int
    count: int
    outstanding: Callable[[], int] = lambda: 0
    asked: int = 0
    _opened_s: float = math.inf

    @property
    def exhausted(self) -> bool:
        return self.asked >= self.count

    @property
    def remaining(self) -> int:
        return self.count - self.asked

    def open(self, opened_s: float) -> None:
        self._opened_s = opened_s

    def due(self, now: float) -> Sequence[DueRequest]:
        if now < self._opened_s + BEGIN_S:
            return ()
        more = min(self.remaining, self.streams - self.outstanding())
        numbers = range(self.asked, self.asked + max(0, more))
        self.asked += len(numbers)
        return [DueRequest(make_request(number), now - self._opened_s, now) for number in numbers]

    def wait_s(self, now: float) -> float:
        return 0.005


def trace(times: Iterable[float]) -> TraceSource:
    """Requests that come at these times, seconds after BEGIN_S."""
    requests = [ScheduledRequest(at_s=BEGIN_S + at_s, request=make_request(i)) for i, at_s in enumerate(times)]
    return TraceSource(requests)


def make_request(number: int) -> Request:
    """Answers of 10 to 30 tokens on prompts of 8 to 24. Its id is none of the configured load's."""
    sampling = Sampling(max_tokens=10 + number * 7 % 21, ignore_eos=True)
    return Request(id=FIRST_ID + number, prompt=(2,) * (8 + number * 5 % 17), sampling=sampling, slo=SLO)


@dataclass(frozen=True)
class Outcome:
    """What a run gave. met: by request, whether its SLO was met. steps, updates_s: of its one replica."""

    met: dict[int, bool]
    steps: list[Step]
    updates_s: list[float]
    opened_s: float


def simulate(config: Config, source: Source, trains: bool, forwards: int = ENDLESS, deaf: bool = False) -> Outcome:
    """A run with one replica. trains: whether its rounds compute anything. forwards: how much they do; by default the
    first one lasts as long as the load. deaf: it hears nothing of a backlog.

    The configured load is light: the first round begins during it. The source's requests come later.
    """
    run = Run(config, leaders=1, sources=[source])
    if isinstance(source, Streams):
        source.outstanding = lambda: run.server.dispatcher.outstanding
    replica = EngineReplica(0, config, run.time, trains, forwards, deaf)
    drive_engine(replica, run.time, run.channel)
    run.server.run()
    run.assert_promise_1()
    met = {row["id"]: bool(row["slo_met"]) for row in run.table("requests") if row["id"] >= FIRST_ID}
    opened_s = replica.steps[0].at_s
    return Outcome(met, replica.steps, replica.updates_s, opened_s)
