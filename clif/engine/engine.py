"""The engine of one replica: serving steps, and training slices in what they leave.

Invariants: a token never waits for more than one slice; a slice is begun only when every running and waiting
request can afford it; an error in training costs the job and no request. What depends on a clock is the leader's to
decide, so that all ranks of a replica do the same.
"""

from __future__ import annotations

import logging
import math
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

from clif.config import Config, EngineConfig, SloConfig
from clif.distributed.collectives import TpGroup
from clif.engine.batch import Batch
from clif.engine.cost_model import UNLIMITED, CostModel, may_train, training_slack
from clif.engine.jobs import WAIT, Job, Slice, SliceKind
from clif.engine.passes import Pass
from clif.engine.runner import ModelRunner
from clif.engine.sampling import SampledTokens
from clif.engine.scheduler import Chunk, Scheduler
from clif.engine.train_thread import TrainThread
from clif.types import Regime, SlackLimit, TokenEvent, TrainingSlack

if TYPE_CHECKING:
    from clif.models.weights.loading import LoadedModel

log = logging.getLogger(__name__)
LONGEST = 4
"""Longest training slice, as a multiple of engine.slice_ms."""
FULL = TrainingSlack(-1.0, SlackLimit.FULL)


@dataclass
class StepRecord:
    """What one step did. Seconds; 0 rows: nothing was served.

    train_s: of the slice that was finished in this step. gap_s: by how much training made the step itself longer.
    slack: what training might have taken, where there was both training to do and serving; else None.
    """

    decode_rows: int = 0
    prefill_tokens: int = 0
    serve_s: float = 0.0
    train_kind: str = ""
    train_s: float = 0.0
    gap_s: float = 0.0
    regime: Regime = Regime.ALONE
    slack: TrainingSlack | None = None


@dataclass(frozen=True)
class Launched:
    """A step under way. fused: the training forward that it took along; start: on the engine's clock."""

    chunks: list[Chunk]
    tokens: SampledTokens
    fused: Slice | None
    regime: Regime
    start: float


@dataclass
class Engine:
    """Serves and learns. jobs: training work in the order in which it is done; record: what the last step did.

    coserving: "interleaved" (slices between steps), "fused" (forwards ride on steps, the rest between them) or
    "concurrent" (slices on threads of their own). "time_slice" is a baseline: whole optimizer steps, whoever waits;
    training gets `share` of the time while there is both to do.
    """

    runner: ModelRunner
    scheduler: Scheduler
    slo: SloConfig
    coserving: str = "interleaved"
    share: float = 0.5
    clock: Callable[[], float] = time.monotonic
    cost_model: CostModel = field(default_factory=CostModel)
    jobs: deque[Job] = field(default_factory=deque)
    record: StepRecord = field(default_factory=StepRecord)
    train_thread: TrainThread | None = None
    tp_group: TpGroup = field(default_factory=TpGroup)
    _beside: tuple[Slice, int] | None = None
    _credit_s: float = 0.0
    _broken: RuntimeError | None = None
    _launched: Launched | None = None
    _settled_s: float = -math.inf

    @classmethod
    def from_config(cls, config: Config, loaded: LoadedModel | None = None, tp_group: TpGroup | None = None) -> Engine:
        """Everything of one process that serves and learns: model, adapters, KV cache, scheduler. Collective.

        loaded: by default the model that the configuration names, on the first device that it allows. It is taken
        apart: one engine only. tp_group: the ranks that share the model. Raises ConfigError, and LayoutError where
        they cannot share it.
        """
        # Not above: the builder knows this class.
        from clif.engine.build import load_engine

        return load_engine(config, loaded, tp_group)

    def __post_init__(self) -> None:
        self.runner.pace = EnginePace(self)

    @property
    def config(self) -> EngineConfig:
        return self.scheduler.config

    def serve(self) -> list[TokenEvent]:
        """One step over all running requests: schedule, fill, forward, settle."""
        self.record = StepRecord()
        self._collect()
        return self._overlapped_step() if self.config.overlap else self._normal_step()

    def _normal_step(self) -> list[TokenEvent]:
        chunks = self.scheduler.schedule()
        return self._settle(self._launch(chunks)) if chunks else []

    def _overlapped_step(self) -> list[TokenEvent]:
        """Launch this step, then settle the one before: the device computes while the host does everything else.

        Its rows take their ids from the step before on the device. What it computes for a sequence that turns out to
        have ended is thrown away when it is settled, and only then are blocks and versions released.
        """
        chunks = self.scheduler.schedule()
        before, self._launched = self._launched, self._launch(chunks) if chunks else None
        return self._settle(before) if before else []

    def _launch(self, chunks: list[Chunk]) -> Launched:
        fused, start = self._rider(chunks), self.clock()
        batch = self.runner.fill(chunks)
        tokens, fused = self._forward(batch, fused)
        return Launched(chunks, tokens, fused, Regime.CONCURRENT if self._beside else Regime.ALONE, start)

    def _forward(self, batch: Batch, fused: Slice | None) -> tuple[SampledTokens, Slice | None]:
        """The step's tokens, and the training forward that it really took along."""
        if fused is None:
            return self.runner.forward(batch), None
        try:
            tokens = self.runner.forward(batch, fused.rider)
        except RuntimeError as error:
            if self.tp_group.size > 1:
                # The others are in the middle of the same step.
                raise
            # The rows that serve did nothing wrong: they are computed again, over what they have written.
            self._broken = error
            return self.runner.forward(batch), None
        self._resume(None)
        return tokens, fused

    def _settle(self, step: Launched) -> list[TokenEvent]:
        tokens, now = step.tokens.read(), self.clock()
        # A step that was launched while the one before still ran began when that one ended.
        self._note(step, now - max(step.start, self._settled_s))
        self._settled_s = now
        return self.scheduler.settle(step.chunks, tokens, now)

    def learn(self) -> None:
        """At most one slice of the first job, and only if every running and waiting request can afford it.

        Raises the RuntimeError of a slice that broke.
        """
        if self._broken is not None:
            error, self._broken = self._broken, None
            raise error
        piece = self._upcoming()
        if piece is None or self._beside is not None:
            return
        if piece is WAIT:
            self._here(piece, 1)
        elif not self.serving:
            self._here(piece, self._leaders(self._units(piece, self.config.slice_ms / 1000) or piece.least))
        elif self.coserving == "time_slice":
            self._whole_step()
        elif self.coserving == "fused" and self._leaders(self._may_ride(piece)):
            return
        elif self.coserving == "concurrent" and self.train_thread is not None:
            self._start_beside(piece, self.train_thread)
        elif units := self._leaders(
            self._units(piece, min(self._slack(Regime.ALONE), LONGEST * self.config.slice_ms / 1000))
        ):
            self._here(piece, units)

    def _agree(self, values: list[int]) -> list[int]:
        """The leader's values on all ranks of the replica."""
        return self.tp_group.broadcast_ints(values, self.runner.device)

    def _leaders(self, value: int) -> int:
        """What the leader decides: peers have clocks and costs of their own, and must all do the same."""
        return self._agree([int(value)])[0]

    def drop(self, name: str) -> None:
        """Give up the jobs of this name; a slice of theirs that is under way is waited for.

        A slice of another job goes on: done twice it would do its layers twice.
        """
        if self._beside is not None and self.train_thread is not None and self.jobs[0].name == name:
            self._beside = None
            try:
                self.train_thread.poll(wait=True)
            except RuntimeError:
                log.exception("a slice of job %s broke while the job was given up", name)
        for job in [job for job in self.jobs if job.name == name]:
            job.close()
            self.jobs.remove(job)

    def interrupt(self, name: str, why: Exception) -> None:
        """Have the job of this name give up what it would do next; a slice of it that is under way is waited for."""
        if self._beside is not None and self.train_thread is not None and self.jobs[0].name == name:
            self._beside = None
            try:
                self.train_thread.poll(wait=True)
            except RuntimeError as error:
                self._broken = error
                return
        for job in self.jobs:
            if job.name == name:
                job.interrupt(why)

    def close(self) -> None:
        """Give up all training; nothing of it runs any more."""
        for name in {job.name for job in self.jobs}:
            self.drop(name)
        if self.train_thread is not None:
            self.train_thread.close()

    @property
    def busy(self) -> bool:
        """There is something to do at once."""
        return self.serving or (self._beside is None and any(j.upcoming not in (None, WAIT) for j in self.jobs))

    @property
    def serving(self) -> bool:
        return bool(self.scheduler.running or self.scheduler.waiting or self._launched)

    @property
    def training(self) -> bool:
        """A slice runs beside this step, or ran in it."""
        return self._beside is not None or self.record.train_s > 0

    def _upcoming(self) -> Slice | None:
        while self.jobs and self.jobs[0].upcoming is None:
            self.jobs.popleft()
        return self.jobs[0].upcoming if self.jobs else None

    def _units(self, piece: Slice, seconds: float) -> int:
        """How much of a slice may be done in so many seconds; 0 if not even the least of it."""
        units = min(piece.units, self.cost_model.units_within(piece.kind, piece.tokens, seconds))
        if piece.kind not in self.cost_model.slices:
            return piece.least if units else 0
        return units if units >= piece.least else 0

    def _here(self, piece: Slice, units: int) -> None:
        start = self.clock()
        self.jobs[0].run(units)
        if piece is not WAIT:
            seconds = self.clock() - start
            self._learnt(piece, units, seconds)
            self.record.gap_s += seconds

    def _start_beside(self, piece: Slice, train_thread: TrainThread) -> None:
        """A token does not wait for a slice beside it but for the slower steps while it lasts."""
        units = self._units(piece, self.config.concurrent_slice_ms / 1000) or piece.least
        if self._slack(Regime.CONCURRENT) >= 0:
            self._beside = piece, units
            train_thread.start(partial(piece.work, units))

    def _whole_step(self) -> None:
        """A whole optimizer step (or evaluation) once serving has had its share since the last one."""
        self._credit_s += self.record.serve_s * self.share
        self.record.slack = TrainingSlack(self._credit_s, SlackLimit.SHARE)
        while self._credit_s >= 0 and (piece := self._upcoming()) not in (None, WAIT):
            self._here(piece, piece.units)
            if piece.kind is SliceKind.OPTIMIZER:
                break
        self._credit_s -= self.record.gap_s * (1 - self.share)

    def _collect(self) -> None:
        """Take what the thread has finished."""
        if self._beside is None or self.train_thread is None:
            return
        piece, units = self._beside
        try:
            done = self.train_thread.poll()
        except RuntimeError as error:
            self._broken, self._beside = error, None
            return
        if done is not None:
            self._beside = None
            self._resume(done[0])
            self._learnt(piece, units, done[1])

    def _resume(self, result: object) -> None:
        """What a job does between two slices must not reach the step either: learn() raises it."""
        try:
            self.jobs[0].resume(result)
        except RuntimeError as error:
            self._broken = error

    def _learnt(self, piece: Slice, units: int, seconds: float) -> None:
        record = self.record
        record.train_kind, record.train_s = piece.kind, record.train_s + seconds
        self.cost_model.observe_slice(piece.kind, piece.tokens, units, seconds)

    def _rider(self, chunks: Sequence[Chunk]) -> Slice | None:
        """The forward that this step takes along, if there is one and everybody can afford it."""
        piece = self._upcoming()
        if self.coserving != "fused" or piece is None or piece.rider is None:
            return None
        if self._full:
            self.record.slack = FULL
            return None
        rows, context = sum(c.stop - c.start for c in chunks), sum(c.stop for c in chunks)
        alone = self.cost_model.step_s(rows, context)
        more = max(0.0, self.cost_model.step_s(rows + piece.tokens, context, Regime.FUSED) - alone)
        sequences = (*self.scheduler.running, *self.scheduler.waiting)
        may, self.record.slack = may_train(self.clock(), more, alone, sequences, self.slo)
        return piece if self._leaders(may) else None

    def _may_ride(self, piece: Slice) -> bool:
        """Whether a step that begins in time could take this forward along: then it does not go alone."""
        run = piece.rider
        if not isinstance(run, Pass):
            return False
        rows, context = self.next_step
        left = self.slo.tpot_ms / 1000 * (1 - self.slo.margin)
        left -= self.cost_model.step_s(rows + piece.tokens, context, Regime.FUSED)
        if left >= 0 and self.record.slack is None:
            self.record.slack = TrainingSlack(left, SlackLimit.RIDE)
        return left >= 0

    @property
    def next_step(self) -> tuple[int, int]:
        """Rows and cached tokens of the next step: a token per answer, and prompts within the step's budget."""
        running, waiting = self.scheduler.running, self.scheduler.waiting
        prompts = sum(s.num_uncomputed_tokens for s in (*running, *waiting) if s.num_uncomputed_tokens > 1)
        answers = sum(s.num_uncomputed_tokens == 1 for s in running)
        return answers + min(prompts, self.config.max_prefill_tokens), sum(s.num_computed_tokens for s in running)

    @property
    def _full(self) -> bool:
        """Every place is taken: somebody may wait at the dispatcher, whom nobody here can cost."""
        return len(self.scheduler.running) + len(self.scheduler.waiting) >= self.scheduler.max_batch

    def _slack(self, regime: Regime) -> float:
        """Seconds that training may take now, if the next step runs in this regime.

        Negative while every place is taken.
        """
        sequences = (*self.scheduler.running, *self.scheduler.waiting)
        if self._full:
            self.record.slack = FULL
        else:
            step_s = self.cost_model.step_s(*self.next_step, regime)
            self.record.slack = training_slack(self.clock(), step_s, sequences, self.slo)
        return self.record.slack.seconds

    def _note(self, step: Launched, seconds: float) -> None:
        chunks, record, regime = step.chunks, self.record, step.regime
        decode = sum(c.is_decode for c in chunks)
        rows, context = sum(c.stop - c.start for c in chunks), sum(c.stop for c in chunks)
        record.decode_rows, record.prefill_tokens, record.serve_s = decode, rows - decode, seconds
        if step.fused is not None:
            regime, record.train_kind = Regime.FUSED, step.fused.kind
            record.gap_s = max(0.0, seconds - self.cost_model.step_s(rows, context))
            # What the forward cost is what it made the step longer by: the step's own part is serving.
            record.train_s, record.serve_s = record.gap_s, seconds - record.gap_s
            rows += step.fused.tokens
        record.regime = regime
        self.cost_model.observe_step(rows, context, seconds, regime)


@dataclass
class EnginePace:
    """Forwards that a step can take along, while there are steps."""

    engine: Engine

    def pass_tokens(self) -> int:
        """Half of a token's budget: a forward that only just fits would hardly ever find a step to ride on."""
        engine = self.engine
        if engine.coserving != "fused" or not engine.serving:
            return UNLIMITED
        seconds = engine.slo.tpot_ms / 1000 * (1 - engine.slo.margin) / 2
        return engine._leaders(engine.cost_model.tokens_within(*engine.next_step, seconds))
