"""The coordinator: batch sizes of replicas that serve and train at the same time."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from clif.config import Config
from clif.control.policy.view import ReplicaView, token_budget_s
from clif.latency import Fit
from clif.states import ReplicaState
from clif.types import RoundPlan

MIN_CONFIDENCE = 0.5
"""Below this the latency models know too little, and the configured sizes stay."""
WORTH_CHANGING = 1.1
"""The best micro-batch replaces the present one only if it is better by this factor: fits fluctuate."""


@dataclass(frozen=True)
class Batches:
    """micro_batch: samples per forward (x1). max_batch: running requests at most (x2). rate: the objective's value."""

    micro_batch: int
    max_batch: int
    rate: float = 0.0


def choose_batches(
    now: float, replica: ReplicaView, members: int, noise_scale: float | None, config: Config
) -> tuple[Batches | None, str]:
    """Sizes for a COMBINED replica, or None to use the configured ones.

    Objective: (x1 g / T_train(x1, x2)) * (phi + M0) / (phi + M), M = x1 g members, g = accumulation; subject to
    T_infer(x2, x1) <= budget. T_train grows with x2, so the literal maximum over both is always x2 = 1, which
    starves serving. Hence x1 is chosen at the x2 that requests ask for now, and then x2 is raised as far as the
    budget allows. Infeasible pairs are left out, never clamped. While phi (noise_scale) is unknown, so is
    the worth of a larger batch, and train.micro_batch is the upper bound instead of max_micro_batch.
    """
    if replica.state is not ReplicaState.COMBINED:
        return None, "not combined"
    if not config.run.adaptive:
        return None, f"run.mode {config.run.mode} keeps the configured sizes"
    if min(replica.serve.confidence, replica.train.confidence) < MIN_CONFIDENCE:
        return None, "latency models know too little"
    demand = min(replica.batch_cap, max(1, replica.outstanding, math.ceil(replica.demand)))
    budget = token_budget_s(config)
    largest = config.train.micro_batch if noise_scale is None else config.train.max_micro_batch
    feasible = [x1 for x1 in range(1, largest + 1) if _fits(replica.serve, demand, x1, budget)]
    if not feasible:
        return None, f"{demand} requests beside any training need more than {budget * 1000:.0f} ms"
    rates = {x1: objective(x1, demand, replica.train, members, noise_scale, config) for x1 in feasible}
    micro_batch = max(feasible, key=lambda x1: (rates[x1], -x1))
    if rates[micro_batch] < WORTH_CHANGING * rates.get(replica.micro_batch, 0.0):
        micro_batch = replica.micro_batch
    max_batch = max(x2 for x2 in range(demand, replica.batch_cap + 1) if _fits(replica.serve, x2, micro_batch, budget))
    batches = Batches(micro_batch, max_batch, rates[micro_batch])
    return batches, f"{batches.rate:.2f} effective samples/s beside {demand} requests"


def of_plan(batches: Batches, plan: RoundPlan, config: Config) -> Batches:
    """The sizes within those of a job that has chosen its own: its steps may become smaller, not larger."""
    configured = (plan.micro_batch, plan.accumulation) == (config.train.micro_batch, config.train.accumulation)
    return batches if configured else replace(batches, micro_batch=min(batches.micro_batch, plan.micro_batch))


def objective(x1: int, x2: int, train: Fit, members: int, noise_scale: float | None, config: Config) -> float:
    """Training samples per second, discounted by what a larger batch is worth.

    noise_scale (phi) is in samples; while it is unknown, every batch size is worth the same per sample.
    Sources: McCandlish et al. 2018, "An Empirical Model of Large-Batch Training", for the discount; Qiao et al. 2021
    (Pollux), for goodput as throughput times statistical efficiency.
    """
    accumulation = config.train.accumulation
    # T_train is the time of one micro-batch, so an optimizer step takes g of them.
    samples_per_s = x1 * accumulation / (accumulation * max(train.predict(x1, x2), 1e-9))
    if noise_scale is None or not math.isfinite(noise_scale) or noise_scale < 0:
        return samples_per_s
    effective = x1 * accumulation * members
    return samples_per_s * (noise_scale + config.control.reference_batch) / (noise_scale + effective)


def _fits(serve: Fit, x2: int, x1: int, budget: float) -> bool:
    return serve.predict(x2, x1) <= budget
