"""The training half of a step: passes begin, the upcoming slice is planned, and as much of it runs as was planned.

Invariants: a slice that is not the planned one is not computed, since its cost was not considered; an error in training
costs the job and no request; nothing here waits for the device: the time of a slice is noted once it is known.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from clif.engine.coserving.strategy import StepView, Strategy
from clif.engine.job_queue import JobQueue
from clif.engine.jobs import WAIT, Slice, SliceKind
from clif.engine.step_plan import NO_TRAINING, StepPlan, plan_training
from clif.engine.step_record import StepRecord
from clif.engine.stopwatch import Clock, HostTiming, Stopwatch, Timing


@dataclass(frozen=True)
class Timed:
    """A slice that the device has been given; piece None: passes that began. during_serving: there was serving, too."""

    timing: Timing
    piece: Slice | None
    units: int
    during_serving: bool


@dataclass
class TrainingHalf:
    """shared: several ranks follow the plans of their leader. stopwatch: measures slices.

    ahead: slices that the device may have been given at a time while nothing is served. A device that takes several
    has no pause between two.
    """

    strategy: Strategy
    jobs: JobQueue = field(default_factory=JobQueue)
    shared: bool = False
    stopwatch: Stopwatch = HostTiming
    ahead: int = 1
    _planned: Slice | None = None
    _finished: tuple[Slice, int, float] | None = None
    _packing: Timing | None = None
    _timed: deque[Timed] = field(default_factory=deque)
    _had_slice: bool = False
    _unspent_s: float = 0.0

    @property
    def holds_up(self) -> bool:
        """Whether a request that has just arrived may have waited for a slice."""
        return self._had_slice or self._under_way > 0

    @property
    def _under_way(self) -> int:
        """Slices between steps that the device has been given and has not done."""
        return sum(timed.piece is not None and not timed.timing.done() for timed in self._timed)

    def collect(self) -> bool:
        """Take what the thread has finished. Returns whether there is a slice to plan."""
        self._finished, self._planned = self.jobs.collect(), None
        return self.jobs.upcoming is not None

    def plan(self, view: StepView, serving: bool, clock: Clock) -> StepPlan:
        """Decide the training of this step, and begin the passes that come first: their size is a decision, too."""
        packing, packs = self.stopwatch(clock), list[int]()
        if not serving and self._under_way >= self.ahead:
            # A request that arrives waits for all of them.
            return NO_TRAINING
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
        if packs:
            packing.stop()
        self._planned, self._packing = piece, packing if packs else None
        return plan_training(self.strategy, view if serving else None, piece, tuple(packs), self._longest_s)

    @property
    def _longest_s(self) -> float:
        """Seconds of a slice while nothing is served. A request that arrives waits for all that are under way."""
        config = self.strategy.config
        longest_ms = config.concurrent_slice_ms if self.jobs.always_started else config.slice_ms / self.ahead
        return longest_ms / 1000

    def follow(self, plan: StepPlan) -> None:
        """On the leader's peers: begin the passes that it began while it planned."""
        for tokens in plan.packs:
            self.jobs.run(tokens)
        self._planned = self.jobs.upcoming

    def begin(self, plan: StepPlan) -> StepRecord:
        """The record of a step with this plan: passes that began, and the slice that the thread has finished."""
        record = StepRecord(slack=plan.slack)
        if self._packing is not None and not self.jobs.always_started:
            # Otherwise no step waits for it.
            self._timed.append(Timed(self._packing, None, 0, plan.slack is not None))
        self._packing, self._had_slice = None, False
        self.note_done(record)
        if self._finished is not None:
            self._note(record, *self._finished)
            self._finished = None
        return record

    def note_done(self, record: StepRecord) -> None:
        """Note the slices that the device has done since, in their order."""
        while self._timed and self._timed[0].timing.done():
            done = self._timed.popleft()
            seconds = done.timing.seconds()
            record.gap_s += seconds
            self._unspent_s += seconds if done.during_serving else 0.0
            if done.piece is not None:
                self._note(record, done.piece, done.units, seconds)
                if done.piece.kind is SliceKind.OPTIMIZER:
                    # Slices behind it belong to another optimizer step: they have a record of their own.
                    return

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
            self.strategy.spent(self._unspent_s)
            self._unspent_s = 0.0

    def fused(self, plan: StepPlan) -> Slice | None:
        """The forward that the serving step takes along, if it is still the planned one."""
        piece = self.jobs.upcoming
        return piece if plan.fuse and piece is self._planned else None

    def _carry_out(self, piece: Slice, plan: StepPlan, record: StepRecord, clock: Clock) -> None:
        if plan.concurrent or self.jobs.always_started:
            self.jobs.start(plan.units)
        elif plan.whole_step:
            self._finish_step(piece, plan, record, clock)
        else:
            self._compute(piece, plan.units, plan, record, clock)

    def _finish_step(self, piece: Slice, plan: StepPlan, record: StepRecord, clock: Clock) -> None:
        """This slice and those behind it, up to the end of the optimizer step, or of what can run now.

        A strategy that decides so belongs to replicas of one rank, and its passes are as large as they may be.
        """
        upcoming: Slice | None = piece
        while upcoming is not None and upcoming is not WAIT:
            self._compute(upcoming, upcoming.units, plan, record, clock)
            if upcoming.kind is SliceKind.OPTIMIZER:
                return
            upcoming = self.jobs.upcoming

    def _compute(self, piece: Slice, units: int, plan: StepPlan, record: StepRecord, clock: Clock) -> None:
        timing = self.stopwatch(clock)
        self.jobs.run(units)
        timing.stop()
        self._had_slice = True
        noted = None if piece.kind is SliceKind.PACK else piece
        self._timed.append(Timed(timing, noted, units, plan.slack is not None))
        self.note_done(record)

    def _note(self, record: StepRecord, piece: Slice, units: int, seconds: float) -> None:
        record.note_slice(piece.kind, seconds)
        self.strategy.costs.observe_slice(piece.kind, piece.tokens, units, seconds)
