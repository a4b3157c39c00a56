"""Whether the average of a round is promoted: its held-out loss on all members, against the active adapter's."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from clif.config import FederationConfig
from clif.types import Vote


@dataclass(frozen=True)
class Promotion:
    """Result of a vote that passed; losses in nats per answer token, pooled over the members.

    outer_step: how far the candidate lies from the base version to the average, as a share of the way.
    """

    candidate_loss: float
    active_loss: float
    outer_step: float = 1.0


def pooled_losses(votes: Sequence[Vote]) -> tuple[float, float]:
    """(candidate, active) held-out loss in nats per token over all votes; NaN when no token was judged."""
    tokens = sum(v.tokens for v in votes)
    if tokens <= 0:
        return math.nan, math.nan
    return sum(v.candidate_loss for v in votes) / tokens, sum(v.active_loss for v in votes) / tokens


def decide_promotion(votes: Sequence[Vote], config: FederationConfig) -> tuple[Promotion | None, str]:
    """Promote if all losses are finite and pooled candidate loss <= pooled active loss * (1 + federation.tolerance).

    votes: of all members.
    """
    if not votes:
        return None, "nobody voted"
    bad = [v.replica for v in votes if not v.finite or not math.isfinite(v.candidate_loss + v.active_loss)]
    if bad:
        return None, f"not finite on replicas {bad}"
    steps = {v.outer_step for v in votes}
    if len(steps) > 1:
        return None, f"the members judged different steps to the average: {sorted(steps)}"
    if min(v.tokens for v in votes) < 0 or not sum(v.tokens for v in votes):
        return None, "no held-out token was judged"
    candidate, active = pooled_losses(votes)
    if not candidate <= active * (1.0 + config.tolerance):
        return None, f"held-out loss {candidate:.4f} is worse than {active:.4f}"
    step = steps.pop()
    short = "" if step == 1 else f" at {step:g} of the way to the average, which was no better"
    return Promotion(candidate, active, step), f"held-out loss {active:.4f} -> {candidate:.4f}{short}"
