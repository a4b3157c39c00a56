"""Training slices run between two serving steps.

A slice runs only if its time fits the slack of every running and waiting request after the next step.
"""

from __future__ import annotations

from clif.engine.coserving.strategy import Decision, StepView, Strategy
from clif.engine.jobs import Slice
from clif.types import Regime

LONGEST = 4
"""Longest training slice, as a multiple of engine.slice_ms."""


class Interleaved(Strategy):
    def between(self, view: StepView, piece: Slice) -> Decision:
        slack = self.slack(view, Regime.ALONE)
        longest = LONGEST * self.config.slice_ms / 1000
        return Decision(self.units_within(piece, min(slack.seconds, longest)), slack)
