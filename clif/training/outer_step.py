"""How far a round goes from its base version to the members' average: all of the way, or half of it.

At a constant learning rate the members' steps go back and forth about a minimum, and the average may lie beyond it. An
average that is no better than its base is therefore not the end of the round: the middle between the two is judged as
well, a line search with one further step. Only rounds that would come to nothing pay for it, with one more pass over
the held-out rows. All members pool their losses, so that they propose the same point.

Sources: Reddi et al., "Adaptive Federated Optimization" (2021), for the average as an outer step; Armijo, "Minimization
of functions having Lipschitz continuous first partial derivatives" (1966), for steps that are halved; Izmailov et al.,
"Averaging Weights Leads to Wider Optima and Better Generalization" (2018), for averages along the path of training.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from clif.adapters.bank import AdapterBank
from clif.engine.jobs import Slices
from clif.models.dual_linear import SHADOW
from clif.training.heldout import Heldout

WHOLE, HALF = 1.0, 0.5
"""Outer steps: shares of the way from the base version to the average."""

Pool = Callable[[list[float]], Slices[list[float]]]
"""Means over all members of a round, the same on each of them."""


def is_half_tried(average: float, base: float) -> bool:
    """Whether the half step is judged: the average is finite and no better than the base. Both losses are pooled."""
    return math.isfinite(average) and average >= base


def outer_step(average: float, half: float) -> float:
    """HALF if its loss is less than that of the average, otherwise WHOLE. Both losses are pooled."""
    return HALF if half < average else WHOLE


def judge_half(
    bank: AdapterBank, base: torch.Tensor, gate: Heldout, average_loss: float, base_loss: float, pool: Pool
) -> Slices[tuple[float, float]]:
    """Judge the half step where the average, which lies in the shadow, is no better than the base [n].

    Leaves what is better of both in the shadow; returns its loss, and the outer step. Losses are this member's, as
    sums. Collective over the members.
    """
    pooled = yield from pool([average_loss, base_loss])
    if not is_half_tried(*pooled):
        return average_loss, WHOLE
    average = bank.shadow.detach().clone()
    bank.load_shadow(torch.lerp(base, average, HALF))
    half_loss = yield from gate.loss(SHADOW)
    (half,) = yield from pool([half_loss])
    if outer_step(pooled[0], half) == HALF:
        return half_loss, HALF
    bank.load_shadow(average)
    return average_loss, WHOLE
