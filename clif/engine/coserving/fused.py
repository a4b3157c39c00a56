"""Training forwards share the products of serving steps; all other slices run between two steps.

On a GPU a decode step is bound by reading the weights, so that more rows in the same products cost little.

Sources: FlexLLM (Miao et al., "FlexLLM: A System for Co-Serving Large Language Model Inference and Parameter-Efficient
Finetuning", 2024), for co-serving in one batch; Orca (Yu et al., OSDI 2022), for batching by iteration.
"""

from __future__ import annotations

from clif.engine.coserving.interleaved import Interleaved
from clif.engine.coserving.strategy import Decision, StepView
from clif.engine.jobs import Slice
from clif.types import Regime, SlackLimit, TrainingSlack


class Fused(Interleaved):
    fuses = True

    def pack_tokens(self, view: StepView, piece: Slice) -> int:
        """Half of a token's budget: a forward that just fits would hardly ever find a step to fuse with."""
        seconds = self._budget_s() / 2
        return min(piece.units, self.costs.tokens_within(view.rows, view.context, seconds))

    def fuse(self, view: StepView, piece: Slice) -> Decision:
        more = max(0.0, self._fused_s(view, piece) - self.step_s(view, Regime.ALONE))
        slack = self.slack_of_all(view, Regime.ALONE)
        return Decision(piece.units if slack.seconds >= more else 0, slack)

    def between(self, view: StepView, piece: Slice) -> Decision:
        """A forward that can still be fused with a step does not run alone."""
        spare_s = self._budget_s() - self._fused_s(view, piece)
        if piece.fused_pass is None or spare_s < 0:
            return super().between(view, piece)
        return Decision(0, TrainingSlack(spare_s, SlackLimit.FUSE))

    def _fused_s(self, view: StepView, piece: Slice) -> float:
        return self.costs.step_s(view.rows + piece.tokens, view.context, Regime.FUSED)

    def _budget_s(self) -> float:
        """The longest time of a step, from the previous token on."""
        return self.slo.tpot_ms / 1000 * (1 - self.slo.margin)
