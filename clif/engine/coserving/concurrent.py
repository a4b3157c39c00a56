"""Training slices run on a thread of their own, on half of the rank's CPU threads, while serving goes on.

No token waits for such a slice: it waits for the slower serving steps while the slice lasts.
"""

from __future__ import annotations

from clif.engine.coserving.strategy import Decision, StepView, Strategy
from clif.engine.jobs import Slice
from clif.types import Regime


class Concurrent(Strategy):
    def between(self, view: StepView, piece: Slice) -> Decision:
        slack = self.slack(view, Regime.CONCURRENT)
        units = self.units_within(piece, self.config.concurrent_slice_ms / 1000) or piece.least
        return Decision(units if slack.seconds >= 0 else 0, slack, concurrent=True)
