"""Sections of the configuration that say how is trained, and what decides when. Free of torch."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from clif.config.base import NotNegative, NotNegativeFloat, Period, Positive, PositiveFloat, Ranks, Section, Share


class TrainConfig(Section):
    enabled: bool = True
    lr: PositiveFloat = 2e-3
    weight_decay: NotNegativeFloat = 0.0
    warmup_steps: NotNegative = 5
    clip_norm: PositiveFloat = 1.0
    micro_batch: Annotated[int, Field(gt=0, le=65536)] = 4
    """Samples packed into one forward; the coordinator may choose less or more, up to max_micro_batch."""
    max_micro_batch: Annotated[int, Field(gt=0, le=65536)] = 8
    accumulation: Annotated[int, Field(gt=0, le=65536)] = 1
    """Micro-batches per optimizer step."""


class FederationConfig(Section):
    rounds: Positive | None = None
    """Rounds to complete over all starts, not more, before the run may end; None: as many as fit while load lasts."""
    local_steps: Positive = 20
    """Optimizer steps of a member in one round at the configured micro-batch: what counts are their samples."""
    min_members: Ranks = 1
    round_timeout_s: PositiveFloat = 120.0
    """Local steps are cut off after this time, also within a step; members are weighted by the samples they did."""
    settle_timeout_s: PositiveFloat = 120.0
    """A round whose aggregation and votes take longer is discarded."""
    tolerance: NotNegativeFloat = 0.0
    """A candidate is promoted if its held-out loss is at most active * (1 + tolerance)."""
    strategy: Literal["fedavg"] = "fedavg"


class ControlConfig(Section):
    period_s: Period = 0.25
    """Slow loop: states, pressure, batch sizes, rounds."""
    report_s: Period = 0.1
    """How often a replica reports."""
    lost_after_s: PositiveFloat = 20.0
    """A replica that is silent for longer while others speak is FAILED. When nobody speaks, dist.timeout_s more is
    waited, unless the launcher would start all ranks anew."""
    retries: NotNegative = 2
    """How often a request whose replica failed is given to another one; then it ends as failed."""
    idle_below: Share = 0.6
    """Smoothed utilisation under which a replica has slack."""
    serving_above: Share = 0.9
    """Smoothed utilisation above which it has none. Between the two nothing changes (hysteresis)."""
    hold_s: NotNegativeFloat = 1.0
    """Slack, or its lack, must last this long before the state changes."""
    smoothing_s: PositiveFloat = 2.0
    """Time constant of the utilisation average."""
    window_s: PositiveFloat = 10.0
    """Requests finished in this window tell the service pressure."""
    medium_share: Share = 0.5
    """Part of the idle replicas that may train under medium pressure, rounded up."""
    high_below: Share = 0.8
    """SLO attainment in the window under which pressure is high."""
    medium_below: Share = 0.95
    """SLO attainment in the window under which pressure is medium."""
    reference_batch: Positive = 8
    """M0 of the coordinator's objective, samples."""

    @model_validator(mode="after")
    def _order(self) -> ControlConfig:
        if self.idle_below >= self.serving_above:
            raise ValueError(
                f"control.idle_below {self.idle_below} must be under control.serving_above {self.serving_above}"
            )
        if self.high_below > self.medium_below:
            raise ValueError(
                f"control.high_below {self.high_below} must not exceed control.medium_below {self.medium_below}"
            )
        if self.report_s >= self.lost_after_s:
            raise ValueError(
                f"control.report_s {self.report_s:g} must be under control.lost_after_s {self.lost_after_s:g}: every "
                "replica would be lost between two reports"
            )
        return self
