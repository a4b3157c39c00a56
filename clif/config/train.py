"""Sections of the configuration about training, rounds and the control policies. Free of torch."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from clif.config.base import NotNegative, NotNegativeFloat, Period, Positive, PositiveFloat, Ranks, Section, Share


class TrainConfig(Section):
    enabled: bool = True
    """Whether rounds take place at all."""
    lr: PositiveFloat = 2e-3
    """Learning rate of AdamW after warm-up."""
    weight_decay: NotNegativeFloat = 0.0
    """Of AdamW."""
    warmup_steps: NotNegative = 5
    """[steps] The learning rate rises linearly over this many optimizer steps of a replica."""
    clip_norm: PositiveFloat = 1.0
    """Largest gradient norm."""
    micro_batch: Annotated[int, Field(gt=0, le=65536)] = 4
    """[samples] Samples packed into one forward. The coordinator may choose less; more only once the noise scale is
    known, which takes a few rounds."""
    max_micro_batch: Annotated[int, Field(gt=0, le=65536)] = 8
    """[samples] Upper bound of the coordinator."""
    accumulation: Annotated[int, Field(gt=0, le=65536)] = 1
    """[micro-batches] Micro-batches per optimizer step. Stays as it is when the coordinator changes the micro-batch."""
    replay: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """[share] Part of what jobs of the adapter `clif` train on that is drawn from the run's own training rows, so that
    what these taught is not forgotten; a tenth is a common choice. The epochs of a job count them too."""


class FederationConfig(Section):
    rounds: Positive | None = None
    """[rounds] Rounds to complete in this run, over all its starts, and no more than these. `null`: as many as fit
    while load comes; without load, as many as fit into `run.linger_s`. After the load, rounds go on for `run.linger_s`
    at most. Training is given up, with a warning and in the summary, after twice as many discarded rounds in a row (at
    least 4; 20 for `null`). After a round that was judged and not better, the next one takes other samples and half the
    learning rate; each promotion doubles it again."""
    local_steps: Positive = 20
    """[steps] Optimizer steps of a member in one round at `train.micro_batch`. What counts are their samples: with a
    smaller micro-batch there are more steps."""
    min_members: Ranks = 1
    """[replicas] No round with fewer."""
    round_timeout_s: PositiveFloat = 120.0
    """Local steps end after this time; a step that is under way is given up, and its samples come again. Members are
    weighted by the samples they did."""
    settle_timeout_s: PositiveFloat = 120.0
    """A round whose results, votes or publication take longer than this is discarded."""
    tolerance: NotNegativeFloat = 0.0
    """[share] A candidate is promoted if its held-out loss is at most that of the active adapter x (1 + tolerance)."""
    half_steps: bool = True
    """An average that is no better than the active adapter is judged at half of the way between the two as well, and
    promoted there if it is better. Such a round halves the learning rate of the next one all the same."""
    strategy: Literal["fedavg"] = "fedavg"
    """How shadows are averaged."""


class ControlConfig(Section):
    period_s: Period = 0.25
    """Period of the policy loop: states, pressure, rounds, batch sizes."""
    report_s: Period = 0.1
    """How often a replica reports."""
    lost_after_s: PositiveFloat = 20.0
    """A replica that sends nothing for longer while others report is FAILED. If none reports (say, on a starved host),
    the control process waits `dist.timeout_s` longer, unless the launcher would restart all ranks."""
    retries: NotNegative = 2
    """How often a request whose replica failed is given to another one; then it ends as `failed`."""
    idle_below: Share = 0.6
    """[share] Smoothed utilisation under which a replica has slack: the part of its time that serving needs for its
    promise to the next token, however many requests run."""
    serving_above: Share = 0.9
    """[share] Smoothed utilisation above which it has none. Must be above `idle_below`; between them nothing
    changes."""
    hold_s: NotNegativeFloat = 1.0
    """How long slack, or its lack, must last before the state changes."""
    smoothing_s: PositiveFloat = 2.0
    """Time constant of the utilisation average."""
    window_s: PositiveFloat = 10.0
    """Requests that ended in this window determine the service pressure. After a load begins, rounds wait until the
    latency of serving is known, for this time at most."""
    medium_share: Share = 0.5
    """[share] Part of the idle replicas that may train under medium pressure, rounded up."""
    high_below: Share = 0.8
    """[share] SLO attainment in the window under which pressure is high."""
    medium_below: Share = 0.95
    """[share] SLO attainment in the window under which pressure is medium."""
    reference_batch: Positive = 8
    """[samples] M0 of the coordinator's objective."""

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
