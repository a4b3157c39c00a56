"""The interface of co-serving strategies: what they see, what they decide, and their defaults.

A strategy decides and computes nothing: its decisions are pure functions of a StepView, made at one point of a step,
so that all ranks of a replica can carry out those of its leader.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import ClassVar

from clif.config import EngineConfig, SloConfig
from clif.engine.coserving.backlog import Backlog, BatchSlots, backlog_slack
from clif.engine.coserving.demand import NOTHING_ASKED, Asked
from clif.engine.cost_model import CostModel, training_slack
from clif.engine.jobs import Slice
from clif.engine.scheduler import Scheduler, Sequence
from clif.types import Regime, Request, SlackLimit, TrainingSlack

FULL = TrainingSlack(-1.0, SlackLimit.FULL)


@dataclass(frozen=True)
class StepView:
    """The input of a decision. rows, context: of the next serving step, and the cached tokens that it reads.

    decodes: it continues answers only, so that it is a captured one where such steps are captured. sequences: all
    running and waiting ones. free_slots: how many more may run; 0 or less: requests may wait at the
    dispatcher. backlog: those that do; None: not known. serve_s: seconds of the last serving step. held_up: a request
    that arrived in a step with a training slice, and may have waited for it; or None. asked: what requests ask for.
    """

    now: float
    rows: int
    context: int
    sequences: Seq[Sequence] = ()
    free_slots: int = 1
    backlog: Backlog | None = None
    decodes: bool = False
    serve_s: float = 0.0
    held_up: int | None = None
    asked: Asked = NOTHING_ASKED

    @classmethod
    def of(
        cls,
        scheduler: Scheduler,
        now: float,
        arrivals: Seq[Request],
        serve_s: float,
        held_up: int | None,
        backlog: Backlog | None,
        asked: Asked,
    ) -> StepView:
        """The view of a scheduler that gets these requests before its next step."""
        sequences = (*scheduler.sequences, *(Sequence(request, now, list(request.prompt)) for request in arrivals))
        free_slots = scheduler.max_batch - len(sequences)
        if backlog is not None and not backlog.is_fresh(now):
            backlog = None
        rows, context = scheduler.next_step(arrivals)
        decodes = scheduler.next_decodes and not arrivals
        return cls(now, rows, context, sequences, free_slots, backlog, decodes, serve_s, held_up, asked)


@dataclass(frozen=True)
class Decision:
    """What training does now. units: of the upcoming slice, 0: nothing; slack: the reason, as `ticks` stores it.

    concurrent: on the thread for training, while serving goes on. whole_step: the slices behind it too, up to the end
    of the optimizer step.
    """

    units: int = 0
    slack: TrainingSlack | None = None
    concurrent: bool = False
    whole_step: bool = False


@dataclass
class Strategy:
    """Decides for a replica. costs: seconds of work, as the engine has measured them.

    fuses: fuse() is asked. What spent() keeps is all that a strategy may remember.
    """

    fuses: ClassVar[bool] = False

    costs: CostModel
    config: EngineConfig
    slo: SloConfig

    def pack_tokens(self, view: StepView, piece: Slice) -> int:
        """The most rows of the pass that begins, during serving; a longer sample forms a pass of its own."""
        return piece.units

    def fuse(self, view: StepView, piece: Slice) -> Decision:
        """Whether the serving step of `view` takes the forward `piece` along: units is 0 or all of it."""
        raise NotImplementedError

    def between(self, view: StepView, piece: Slice) -> Decision:
        """How much of `piece` runs before the serving step of `view`."""
        raise NotImplementedError

    def spent(self, seconds: float) -> None:
        """Training took `seconds` between two serving steps."""

    def units_within(self, piece: Slice, seconds: float) -> int:
        """Units of a slice that fit into `seconds`; 0 if not even the fewest do."""
        units = min(piece.units, self.costs.units_within(piece.kind, piece.tokens, seconds))
        if piece.kind not in self.costs.slices:
            return piece.least if units else 0
        return units if units >= piece.least else 0

    def step_s(self, view: StepView, regime: Regime) -> float:
        """Seconds of the next serving step in this regime."""
        return self.costs.step_s(view.rows, view.context, regime, view.decodes)

    def first_steps(self, view: StepView) -> int:
        """Serving steps until every request that waits has its first token, as far as they matter to training."""
        return 1

    def slack(self, view: StepView, regime: Regime) -> TrainingSlack:
        """Seconds that training may take before a serving step of this regime.

        Negative for a request that may have waited for a slice already.
        """
        if view.held_up is not None:
            step_s = self.step_s(view, regime)
            return TrainingSlack(-step_s, SlackLimit.FIRST_TOKEN, view.held_up)
        return self.slack_of_all(view, regime)

    def slack_of_all(self, view: StepView, regime: Regime) -> TrainingSlack:
        """The slack of the most pressed request, here or at the dispatcher.

        Negative while the batch is full and what waits at the dispatcher is not known.
        """
        if view.free_slots <= 0 and view.backlog is None:
            return FULL
        step_s = later_s = self.step_s(view, regime)
        if self.costs.captures:
            # The next step may have prompts; those after it only continue answers.
            later_s = self.costs.step_s(len(view.sequences), view.context, regime, captured=True)
        slack = training_slack(view.now, step_s, view.sequences, self.slo, later_s, self.first_steps(view))
        if view.backlog is None or not view.backlog.oldest:
            return slack
        queued = backlog_slack(view.now, view.backlog, self._batch_slots(view, regime), self.slo)
        return min(slack, queued, key=lambda one: one.seconds)

    def _batch_slots(self, view: StepView, regime: Regime) -> BatchSlots:
        decodes = len(view.sequences)
        step_s = self.costs.step_s(decodes, view.context, regime, captured=True)
        chunk_s = self.costs.step_s(decodes, view.context, regime)
        row_s = self.costs.step_s(decodes + 1, view.context, regime) - chunk_s
        left = sorted(s.request.max_total_tokens - len(s.tokens) for s in view.sequences)
        return BatchSlots(view.free_slots, left, step_s, chunk_s, row_s, self.config.max_prefill_tokens)
