"""Training slices run concurrently with serving: on a CPU on half of the rank's threads, on a GPU on a stream of less
priority.

No token waits for such a slice, but serving steps are slower while it lasts: it starts only if every running and
waiting request can afford them.
"""

from __future__ import annotations

from clif.engine.coserving.strategy import Decision, StepView, Strategy
from clif.engine.jobs import Slice
from clif.types import Regime


class Concurrent(Strategy):
    def first_steps(self, view: StepView) -> int:
        """All steps of the prompts that wait are slower beside the slice."""
        prompts = sum(s.num_uncomputed_tokens for s in view.sequences if s.last_s is None)
        return max(1, -(-prompts // self.config.max_prefill_tokens))

    def between(self, view: StepView, piece: Slice) -> Decision:
        slack = self.slack(view, Regime.CONCURRENT)
        units = self.units_within(piece, self.config.concurrent_slice_ms / 1000) or piece.least
        return Decision(units if slack.seconds >= 0 else 0, slack, concurrent=True)
