"""What a step of the engine did, for reports and for the table `ticks`. Free of torch."""

from __future__ import annotations

from dataclasses import dataclass

from clif.engine.jobs import SliceKind
from clif.types import Regime, TrainingSlack


@dataclass
class StepRecord:
    """What one step did. Seconds; 0 rows: nothing was served.

    train_s: of the slices that were finished in this step; train_kind: of the last one; step_ended: one of them ended
    an optimizer step. gap_s: by how much training made the step itself longer.
    slack: what training might have taken, where there was both training to do and serving; otherwise None.
    """

    decode_rows: int = 0
    prefill_tokens: int = 0
    serve_s: float = 0.0
    train_kind: str = ""
    train_s: float = 0.0
    step_ended: bool = False
    gap_s: float = 0.0
    regime: Regime = Regime.ALONE
    slack: TrainingSlack | None = None

    def note_serving(self, decode_rows: int, rows: int, regime: Regime, seconds: float) -> None:
        """The serving step that was settled."""
        self.decode_rows, self.prefill_tokens = decode_rows, rows - decode_rows
        self.regime, self.serve_s = regime, seconds

    def note_fused(self, kind: str, seconds: float, alone_s: float) -> None:
        """A forward was fused with the serving step, which would take alone_s without it.

        The forward costs what it makes the step longer by; the step's own part is serving.
        """
        longer_s = max(0.0, seconds - alone_s)
        self.train_kind, self.train_s, self.serve_s = kind, longer_s, seconds - longer_s
        self.gap_s += longer_s

    def note_slice(self, kind: str, seconds: float) -> None:
        """A slice that ran between two steps, or beside them."""
        self.train_kind, self.train_s = kind, self.train_s + seconds
        self.step_ended |= kind == SliceKind.OPTIMIZER
