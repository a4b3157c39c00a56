"""What a step of the engine did, for reports and for the table `ticks`. Free of torch."""

from __future__ import annotations

from dataclasses import dataclass

from clif.types import Regime, TrainingSlack


@dataclass
class StepRecord:
    """What one step did. Seconds; 0 rows: nothing was served.

    train_s: of the slice that was finished in this step. gap_s: by how much training made the step itself longer.
    slack: what training might have taken, where there was both training to do and serving; otherwise None.
    """

    decode_rows: int = 0
    prefill_tokens: int = 0
    serve_s: float = 0.0
    train_kind: str = ""
    train_s: float = 0.0
    gap_s: float = 0.0
    regime: Regime = Regime.ALONE
    slack: TrainingSlack | None = None
