"""Training slices run between two serving steps.

A slice runs only if its time fits the slack of every running and waiting request after the next step. While the batch
is in demand, training stretches a step by a factor at most, see demand.py.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from clif.engine.coserving.demand import stretch_of
from clif.engine.coserving.strategy import Decision, StepView, Strategy
from clif.engine.jobs import Slice
from clif.types import Regime, SlackLimit, TrainingSlack

LONGEST = 4
"""Longest training slice, as a multiple of engine.slice_ms."""


@dataclass
class Interleaved(Strategy):
    """stretches: whether steps are stretched by a factor at most while the batch is in demand."""

    stretches: bool = False
    _credit_s: float = 0.0

    def between(self, view: StepView, piece: Slice) -> Decision:
        slack = self._slack(view)
        seconds = min(slack.seconds, LONGEST * self.config.slice_ms / 1000)
        units = self.units_within(piece, seconds)
        if not self.stretches or not view.sequences:
            return Decision(units, slack)
        stretched, stretch = self._units_by_stretch(view, piece)
        return Decision(units, slack) if units <= stretched else Decision(stretched, stretch)

    def spent(self, seconds: float) -> None:
        self._credit_s -= seconds

    def _slack(self, view: StepView) -> TrainingSlack:
        """A request that may have waited for a slice waits for another one only if both are as short as one may be."""
        both_s = self.config.slice_ms / 1000 - view.held_s
        if view.held_up is None or not self.stretches or both_s <= 0:
            return self.slack(view, Regime.ALONE)
        both = TrainingSlack(both_s, SlackLimit.FIRST_TOKEN, view.held_up)
        return min(self.slack(replace(view, held_up=None), Regime.ALONE), both, key=lambda one: one.seconds)

    def _units_by_stretch(self, view: StepView, piece: Slice) -> tuple[int, TrainingSlack]:
        """Units that stretch the step as far as it may be, and what is left of it.

        By predicted means, to the nearest unit: what a slice takes more or less counts for the next one, and a unit
        that is longer than a step's part runs once several parts have come together.
        """
        decodes, captured = len(view.sequences), self.costs.captures
        waiting = 0 if view.backlog is None else view.backlog.waiting
        alone = self.costs.batch_alone(view.tokens_per_s, view.context / decodes, captured)
        stretch = stretch_of(alone, decodes + waiting, self.config.max_batch)
        part_s = (stretch - 1) * self.costs.mean_step_s(decodes, view.context, captured)
        least_s = self.costs.mean_slice_s(piece.kind, piece.tokens, piece.least)
        each_s = self.costs.mean_slice_s(piece.kind, piece.tokens, piece.least + 1) - least_s
        self._credit_s = min(self._credit_s + part_s, max(part_s, least_s))
        left = TrainingSlack(self._credit_s, SlackLimit.STRETCH)
        beyond = math.floor((self._credit_s - least_s) / each_s + 0.5) if each_s > 0 else 0
        return max(0, piece.least + beyond) if beyond >= 0 else 0, left
