"""Training slices run between two serving steps.

A slice runs only if its time fits the slack of every running and waiting request after the next step. On a CPU, whose
steps take longer the more requests run, it also leaves the gaps between tokens about as long as they usually are:
otherwise long ones would fill the batch, and no slice would fit any more until the queue is gone (see demand.py).
"""

from __future__ import annotations

from dataclasses import dataclass

from clif.engine.coserving.strategy import Decision, StepView, Strategy
from clif.engine.jobs import Slice, SliceKind
from clif.types import Regime, SlackLimit, TrainingSlack

LONGEST = 4
"""Longest training slice, as a multiple of engine.slice_ms."""
GAP = 1.25
"""A gap with training, at most, as a multiple of the longest usual one of serving alone."""
PARTS = 4
"""Slices that such a gap has room for, at least: passes that begin meanwhile have so few rows."""
LEAST_SHARE = 0.1
"""Of a step's time, for training in any case: what requests ask for is an estimate."""


@dataclass
class Interleaved(Strategy):
    """keeps_gaps: whether gaps between tokens stay about as long as they are without training."""

    keeps_gaps: bool = False
    _credit_s: float = 0.0

    def pack_tokens(self, view: StepView, piece: Slice) -> int:
        if not self.keeps_gaps or not view.sequences:
            return piece.units
        within = self.costs.slice_tokens_within(SliceKind.BACKWARD, self._gap_s(view) / PARTS)
        return max(1, min(piece.units, within))

    def between(self, view: StepView, piece: Slice) -> Decision:
        slack = self.slack(view, Regime.ALONE)
        units = self.units_within(piece, min(slack.seconds, LONGEST * self.config.slice_ms / 1000))
        if not self.keeps_gaps or not view.sequences:
            return Decision(units, slack)
        fitting, gap = self._units_in_gap(view, piece)
        return Decision(units, slack) if units <= fitting else Decision(fitting, gap)

    def spent(self, seconds: float) -> None:
        self._credit_s -= seconds

    def _gap_s(self, view: StepView) -> float:
        """Seconds that a gap may have: GAP times a step that computes a prompt beside as many answers as would run if
        nothing trained; and engine.slice_ms, which is not felt."""
        each = view.context / len(view.sequences)
        answers = min(self.costs.batch_alone(view.asked.tokens_per_s, each), self.config.max_batch)
        prompt = min(view.asked.prompt_tokens, self.config.max_prefill_tokens)
        return max(GAP * self.costs.step_s(answers + prompt, answers * each), self.config.slice_ms / 1000)

    def _units_in_gap(self, view: StepView, piece: Slice) -> tuple[int, TrainingSlack]:
        """Units that fit the gap beside the next step, and what is left of it.

        What a slice took counts for the next one, and fewest units that are longer than what a step leaves run once
        several steps have left so much.
        """
        step_s = self.step_s(view, Regime.ALONE)
        part_s = max(self._gap_s(view) - step_s, LEAST_SHARE * step_s)
        least_s = self.costs.mean_slice_s(piece.kind, piece.tokens, piece.least)
        self._credit_s = min(self._credit_s + part_s, max(part_s, least_s))
        left = TrainingSlack(self._credit_s, SlackLimit.GAP)
        within = self.costs.units_within(piece.kind, piece.tokens, self._credit_s)
        return max(within, piece.least) if least_s <= self._credit_s else 0, left
