"""The engine of one replica: serving steps, and training slices in what they leave.

A serving step is one iteration over all running requests; a strategy of clif/engine/coserving decides how much
training runs between two of them, or with one.

Invariants: a token waits for one training slice at most; a slice begins only if every running and waiting request can
afford it; an error in training costs the job and no request. Decisions that depend on a clock are the leader's, so
that all ranks of a replica do the same.

Sources: Orca (Yu et al., OSDI 2022), for scheduling by iteration; FlexLLM (Miao et al., 2024), for co-serving.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from clif.config import Config, EngineConfig
from clif.distributed.collectives import TpGroup
from clif.engine.batch import Batch
from clif.engine.coserving.strategy import Decision, StepView, Strategy
from clif.engine.cost_model import CostModel
from clif.engine.job_queue import JobQueue
from clif.engine.jobs import WAIT, Slice, SliceKind
from clif.engine.runner import ModelRunner
from clif.engine.sampling import SampledTokens
from clif.engine.scheduler import Chunk, Scheduler
from clif.engine.step_record import StepRecord
from clif.types import Regime, TokenEvent

if TYPE_CHECKING:
    from clif.models.weights.loading import LoadedModel


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
    """Serves and learns. jobs: training work; record: what the last step did."""

    runner: ModelRunner
    scheduler: Scheduler
    strategy: Strategy
    jobs: JobQueue = field(default_factory=JobQueue)
    tp_group: TpGroup = field(default_factory=TpGroup)
    clock: Callable[[], float] = time.monotonic
    record: StepRecord = field(default_factory=StepRecord)
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

    @property
    def config(self) -> EngineConfig:
        return self.scheduler.config

    @property
    def cost_model(self) -> CostModel:
        return self.strategy.costs

    @property
    def busy(self) -> bool:
        """There is something to do at once."""
        return self.serving or self.jobs.ready

    @property
    def serving(self) -> bool:
        return bool(self.scheduler.running or self.scheduler.waiting or self._launched)

    @property
    def training(self) -> bool:
        """A slice runs concurrently with this step, or ran in it."""
        return self.jobs.under_way or self.record.train_s > 0

    def close(self) -> None:
        """Give up all training; nothing of it runs any more."""
        self.jobs.close()

    def serve(self) -> list[TokenEvent]:
        """One step over all running requests: schedule, fill, forward, settle."""
        self.record = StepRecord()
        if (finished := self.jobs.collect()) is not None:
            self._learnt(*finished)
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
        fused, start = self._fused_slice(chunks), self.clock()
        tokens, fused = self._forward(self.runner.fill(chunks), fused)
        regime = Regime.FUSED if fused else Regime.CONCURRENT if self.jobs.under_way else Regime.ALONE
        return Launched(chunks, tokens, fused, regime, start)

    def _forward(self, batch: Batch, fused: Slice | None) -> tuple[SampledTokens, Slice | None]:
        """The step's tokens, and the training forward that it really took along."""
        if fused is None:
            return self.runner.forward(batch), None
        try:
            tokens = self.runner.forward(batch, fused.fused_pass)
        except RuntimeError as error:
            if self.tp_group.size > 1:
                # The others are in the middle of the same step.
                raise
            # The serving rows did nothing wrong: they are computed again, over what they have written.
            self.jobs.fail(error)
            return self.runner.forward(batch), None
        self.jobs.resume(None)
        return tokens, fused

    def _settle(self, step: Launched) -> list[TokenEvent]:
        tokens, now = step.tokens.read(), self.clock()
        # A step that was launched while the one before still ran began when that one ended.
        self._note(step, now - max(step.start, self._settled_s))
        self._settled_s = now
        return self.scheduler.settle(step.chunks, tokens, now)

    def learn(self) -> None:
        """Training between two steps, as far as the strategy allows; without serving, one slice of engine.slice_ms.

        Raises the RuntimeError of a slice that broke.
        """
        self.jobs.raise_error()
        piece = self._upcoming()
        if piece is None:
            return
        if piece is WAIT:
            self.jobs.run(1)
        elif self.serving:
            self._carry_out(piece, self.strategy.between(self._next_view(), piece))
        else:
            units = self.strategy.units_within(piece, self.config.slice_ms / 1000) or piece.least
            self._compute(piece, self._leaders(units))
        # A pass that begins now can be fused with the next step.
        self._upcoming()

    def _upcoming(self) -> Slice | None:
        """The next slice. A job that begins a pass first learns how many tokens the pass may have."""
        while (piece := self.jobs.upcoming) is not None and piece.kind is SliceKind.PACK:
            tokens = self.strategy.pack_tokens(self._next_view(), piece) if self.serving else piece.units
            self._compute(piece, self._leaders(tokens))
        return piece

    def _carry_out(self, piece: Slice, decision: Decision) -> None:
        self.record.slack = decision.slack or self.record.slack
        units = self._leaders(decision.units)
        if units and decision.concurrent:
            self.jobs.start(units)
        elif units and decision.whole_step:
            self._finish_step(piece)
        elif units:
            self._compute(piece, units)
        self.strategy.spent(self.record.gap_s)

    def _finish_step(self, piece: Slice) -> None:
        """This slice and those behind it, up to the end of the optimizer step, or of what can run now."""
        upcoming: Slice | None = piece
        while upcoming is not None and upcoming is not WAIT:
            self._compute(upcoming, upcoming.units)
            if upcoming.kind is SliceKind.OPTIMIZER:
                return
            upcoming = self._upcoming()

    def _compute(self, piece: Slice, units: int) -> None:
        start = self.clock()
        self.jobs.run(units)
        seconds = self.clock() - start
        self.record.gap_s += seconds
        if piece.kind is not SliceKind.PACK:
            self._learnt(piece, units, seconds)

    def _learnt(self, piece: Slice, units: int, seconds: float) -> None:
        record = self.record
        record.train_kind, record.train_s = piece.kind, record.train_s + seconds
        self.cost_model.observe_slice(piece.kind, piece.tokens, units, seconds)

    def _leaders(self, value: int) -> int:
        """The leader's decision on all ranks of the replica: the others have clocks and costs of their own."""
        return self.tp_group.broadcast_ints([value], self.runner.device)[0]

    def _next_view(self) -> StepView:
        return self._view(*self.scheduler.next_step())

    def _view(self, rows: int, context: int) -> StepView:
        scheduler, record = self.scheduler, self.record
        decided = record.slack is not None
        return StepView(self.clock(), rows, context, scheduler.sequences, scheduler.full, record.serve_s, decided)

    def _fused_slice(self, chunks: Sequence[Chunk]) -> Slice | None:
        """The training forward that this step takes along."""
        piece = self.jobs.upcoming
        if piece is None or piece.fused_pass is None or not self.strategy.fuses:
            return None
        decision = self.strategy.fuse(self._view(*_size(chunks)), piece)
        self.record.slack = decision.slack
        return piece if self._leaders(decision.units) else None

    def _note(self, step: Launched, seconds: float) -> None:
        (rows, context), record = _size(step.chunks), self.record
        decode = sum(c.is_decode for c in step.chunks)
        record.decode_rows, record.prefill_tokens, record.serve_s = decode, rows - decode, seconds
        record.regime = step.regime
        if step.fused is not None:
            # The forward costs what it makes the step longer by: the step's own part is serving.
            gap_s = max(0.0, seconds - self.cost_model.step_s(rows, context))
            record.train_kind, record.gap_s = step.fused.kind, record.gap_s + gap_s
            record.train_s, record.serve_s = gap_s, seconds - gap_s
            rows += step.fused.tokens
        self.cost_model.observe_step(rows, context, seconds, step.regime)


def _size(chunks: Sequence[Chunk]) -> tuple[int, int]:
    """Rows of a step, and the cached tokens that they read."""
    return sum(c.stop - c.start for c in chunks), sum(c.stop for c in chunks)
