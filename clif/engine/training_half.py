"""The training half of a step: passes begin, the upcoming slice is planned, and as much of it runs as was planned.

Invariants: a slice that is not the planned one is not computed, since its cost was not considered; an error in training
costs the job and no request.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from clif.engine.coserving.strategy import StepView, Strategy
from clif.engine.job_queue import JobQueue
from clif.engine.jobs import WAIT, Slice, SliceKind
from clif.engine.step_plan import StepPlan, plan_training
from clif.engine.step_record import StepRecord

Clock = Callable[[], float]


@dataclass
class TrainingHalf:
    """shared: several ranks follow the plans of their leader. slice_s: seconds of this step's slice; 0: it had none."""

    strategy: Strategy
    jobs: JobQueue = field(default_factory=JobQueue)
    shared: bool = False
    slice_s: float = 0.0
    _planned: Slice | None = None
    _finished: tuple[Slice, int, float] | None = None
    _pack_s: float = 0.0

    def collect(self) -> bool:
        """Take what the thread has finished. Returns whether there is a slice to plan."""
        self._finished, self._planned = self.jobs.collect(), None
        return self.jobs.upcoming is not None

    def plan(self, view: StepView, serving: bool, clock: Clock) -> StepPlan:
        """Decide the training of this step, and begin the passes that come first: their size is a decision, too."""
        start, packs = clock(), list[int]()
        try:
            # Nothing here is collective: the peers pack later, in follow(), before they handle the step's messages.
            while (piece := self.jobs.upcoming) is not None and piece.kind is SliceKind.PACK:
                packs.append(self.strategy.pack_tokens(view, piece) if serving else piece.units)
                self.jobs.run(packs[-1])
        except RuntimeError as error:
            if self.shared:
                raise
            self.jobs.fail(error)
            return StepPlan(tuple(packs))
        self._planned, self._pack_s = piece, clock() - start if packs else 0.0
        return plan_training(self.strategy, view if serving else None, piece, tuple(packs))

    def follow(self, plan: StepPlan) -> None:
        """On the leader's peers: begin the passes that it began while it planned."""
        for tokens in plan.packs:
            self.jobs.run(tokens)
        self._planned = self.jobs.upcoming

    def begin(self, plan: StepPlan) -> StepRecord:
        """The record of a step with this plan: passes that began, and the slice that the thread has finished."""
        record = StepRecord(gap_s=self._pack_s, slack=plan.slack)
        self._pack_s = self.slice_s = 0.0
        if self._finished is not None:
            self._note(record, *self._finished)
            self._finished = None
        return record

    def learn(self, plan: StepPlan, record: StepRecord, clock: Clock) -> None:
        """Training between two steps, as planned; nothing if the upcoming slice is another one by now.

        Raises the RuntimeError of a slice that broke.
        """
        self.jobs.raise_error()
        piece = self.jobs.upcoming
        if piece is WAIT:
            self.jobs.run(1)
        elif piece is not None and piece is self._planned and plan.units:
            self._carry_out(piece, plan, record, clock)
        if plan.slack is not None:
            self.strategy.spent(record.gap_s)

    def fused(self, plan: StepPlan) -> Slice | None:
        """The forward that the serving step takes along, if it is still the planned one."""
        piece = self.jobs.upcoming
        return piece if plan.fuse and piece is self._planned else None

    def _carry_out(self, piece: Slice, plan: StepPlan, record: StepRecord, clock: Clock) -> None:
        if plan.concurrent:
            self.jobs.start(plan.units)
        elif plan.whole_step:
            self._finish_step(piece, record, clock)
        else:
            self._compute(piece, plan.units, record, clock)

    def _finish_step(self, piece: Slice, record: StepRecord, clock: Clock) -> None:
        """This slice and those behind it, up to the end of the optimizer step, or of what can run now.

        A strategy that decides so belongs to replicas of one rank, and its passes are as large as they may be.
        """
        upcoming: Slice | None = piece
        while upcoming is not None and upcoming is not WAIT:
            self._compute(upcoming, upcoming.units, record, clock)
            if upcoming.kind is SliceKind.OPTIMIZER:
                return
            upcoming = self.jobs.upcoming

    def _compute(self, piece: Slice, units: int, record: StepRecord, clock: Clock) -> None:
        start = clock()
        self.jobs.run(units)
        seconds = clock() - start
        record.gap_s += seconds
        self.slice_s += seconds
        if piece.kind is not SliceKind.PACK:
            self._note(record, piece, units, seconds)

    def _note(self, record: StepRecord, piece: Slice, units: int, seconds: float) -> None:
        record.note_slice(piece.kind, seconds)
        self.strategy.costs.observe_slice(piece.kind, piece.tokens, units, seconds)
