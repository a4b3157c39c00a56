"""Training slices run on their own thread, on half of the rank's CPU threads, concurrently with serving.

No token waits for such a slice, but serving steps are slower while it lasts.
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
