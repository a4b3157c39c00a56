"""What requests ask of a replica, and how far training may stretch its steps before the batch fills up."""

from __future__ import annotations

import pytest

from clif.config import EngineConfig, SloConfig
from clif.engine.build import make_strategy
from clif.engine.coserving.demand import IN_DEMAND, STRETCH, Demand, stretch_of
from clif.engine.coserving.interleaved import Interleaved
from clif.engine.coserving.strategy import StepView
from clif.engine.jobs import Slice, SliceKind
from clif.engine.scheduler import Sequence
from clif.types import Request, Sampling, SlackLimit

BACKWARD = Slice(SliceKind.BACKWARD, tokens=100, units=24)
FITTED = 200
"""Measurements after which a cost is what was measured, to a few percent."""
STEP_S, LAYER_S = 0.02, 0.002
HEAVY, LIGHT = 1e5, 1.0
"""Tokens/s that keep every batch full, and those that keep one request running at most."""


class Settings:
    """As much of a configuration as a strategy reads."""

    engine, slo = EngineConfig(slice_ms=20), SloConfig(tpot_ms=100, margin=0.3)


def strategy(layer_s: float = LAYER_S) -> Interleaved:
    made = make_strategy("interleaved", Settings, stretches=True)
    for n in range(1, FITTED):
        made.costs.observe_step(n % 16 + 1, 0, STEP_S)
        made.costs.observe_slice(SliceKind.BACKWARD, 100, n % 24 + 1, layer_s * (n % 24 + 1))
    return made


def view(tokens_per_s: float, **more):
    answering = Sequence(Request(id=7, prompt=(1, 2), sampling=Sampling(max_tokens=9)), 0.0, [1, 2, 3], last_s=0.0)
    return StepView(0.0, 1, 2, (answering,), tokens_per_s=tokens_per_s, **more)


def test_demand_is_the_rate_of_requests_times_the_length_of_the_answers_that_ended():
    demand = Demand()
    assert demand.tokens_per_s(1.0) == 0.0
    for second in range(60):
        demand.arrived(second, 2, 2 * 500)
        demand.answered(second + 0.5, 2 * 40, 2)
    assert demand.tokens_per_s(60.0) == pytest.approx(2 * 40, rel=0.06)
    assert demand.tokens_per_s(90.0) < 10, "requests that came long ago ask for nothing any more"


def test_before_any_answer_ended_each_may_get_as_long_as_it_asks_for():
    demand = Demand()
    for tenth in range(20):
        demand.arrived(tenth / 10, 1, 64)
        demand.answered(tenth / 10, 3, 0)
    assert demand.tokens_per_s(2.0) == pytest.approx(640, rel=0.1)


def test_training_stretches_steps_by_little_while_the_batch_is_in_demand_and_without_limit_otherwise():
    assert stretch_of(32 * IN_DEMAND, 10, 32) == stretch_of(31.0, 10, 32) == STRETCH
    assert STRETCH < stretch_of(0.8 * 32 * IN_DEMAND, 10, 32) < 4 * STRETCH
    assert stretch_of(1.0, 1, 32) > 1000
    assert stretch_of(1.0, 31, 32) == STRETCH, "a full batch is in demand, whatever was measured"


def test_what_runs_between_steps_in_demand_is_a_share_of_the_step_and_otherwise_what_the_slack_leaves():
    heavy, light = (strategy().between(view(rate), BACKWARD) for rate in (HEAVY, LIGHT))
    assert heavy.slack.limit is SlackLimit.STRETCH and light.slack.limit is SlackLimit.NEXT_TOKEN
    assert heavy.units == pytest.approx((STRETCH - 1) * STEP_S / LAYER_S, abs=1)
    assert light.units > 2 * heavy.units


def test_slices_longer_than_their_part_of_a_step_run_less_often_and_do_not_starve():
    asked, ran = strategy(layer_s=0.015), 0
    for _ in range(100):
        decision = asked.between(view(HEAVY), BACKWARD)
        ran += decision.units
        asked.spent(0.015 * decision.units)
    assert ran * 0.015 == pytest.approx(100 * (STRETCH - 1) * STEP_S, rel=0.1)


def test_work_that_is_not_worth_a_slice_in_part_runs_once_its_time_has_come():
    asked = strategy(layer_s=0.001)
    rows = Slice(SliceKind.BACKWARD, tokens=100, units=24, least=20)
    decisions = [asked.between(view(HEAVY), rows) for _ in range(4)]
    assert [d.units >= 20 for d in decisions] == [False, False, True, True]


def test_a_request_that_waited_for_a_slice_waits_for_another_only_if_both_are_as_short_as_one_may_be():
    held = {"held_up": 9, "held_s": Settings.engine.slice_ms / 1000}
    decision = strategy().between(view(LIGHT, **held), BACKWARD)
    assert (decision.units, decision.slack.limit, decision.slack.request) == (0, SlackLimit.FIRST_TOKEN, 9)
    decision = strategy().between(view(LIGHT, **{**held, "held_s": 0.01}), BACKWARD)
    assert 0 < decision.units * LAYER_S <= 0.01 and decision.slack.request == 9
