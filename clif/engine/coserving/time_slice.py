"""A baseline: serving and training alternate by whole optimizer steps, whatever requests wait for."""

from __future__ import annotations

from dataclasses import dataclass

from clif.engine.coserving.strategy import Decision, StepView, Strategy
from clif.engine.jobs import Slice
from clif.types import SlackLimit, TrainingSlack


@dataclass
class TimeSlice(Strategy):
    """share: of the time, for training, while there is both to do. An optimizer step (or an evaluation) runs as soon
    as serving has had its share since the last one.
    """

    share: float = 0.5
    _credit_s: float = 0.0

    def between(self, view: StepView, piece: Slice) -> Decision:
        self._credit_s += view.serve_s * self.share
        slack = TrainingSlack(self._credit_s, SlackLimit.SHARE)
        return Decision(piece.units if self._credit_s >= 0 else 0, slack, whole_step=True)

    def spent(self, seconds: float) -> None:
        self._credit_s -= seconds * (1 - self.share)
