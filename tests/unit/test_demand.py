"""What requests ask of a replica, and by how much training may lengthen the gaps between their tokens."""

from __future__ import annotations

import pytest

from clif.config import EngineConfig, SloConfig
from clif.engine.build import make_strategy
from clif.engine.coserving.demand import Asked, Demand
from clif.engine.coserving.interleaved import GAP, LEAST_SHARE, PARTS, Interleaved
from clif.engine.coserving.strategy import StepView
from clif.engine.jobs import Slice, SliceKind
from clif.engine.scheduler import Sequence
from clif.types import Request, Sampling, SlackLimit

BACKWARD = Slice(SliceKind.BACKWARD, tokens=100, units=60)
FITTED = 200
"""Measurements after which a cost is what was measured, to a few percent."""
FIXED_S, ROW_S, LAYER_S = 0.02, 0.001, 0.002
HEAVY = Asked(tokens_per_s=500, prompt_tokens=40)
"""Of 500 tokens/s serving alone would keep 20 requests running: n of them take 20 + n ms for n tokens."""
LIGHT = Asked(tokens_per_s=1, prompt_tokens=4)


class Settings:
    """As much of a configuration as a strategy reads."""

    engine, slo = EngineConfig(slice_ms=20), SloConfig(tpot_ms=300, margin=0.3)


def strategy(layer_s: float = LAYER_S) -> Interleaved:
    made = make_strategy("interleaved", Settings, keeps_gaps=True)
    for n in range(1, FITTED):
        made.costs.observe_step(n % 64 + 1, 0, FIXED_S + ROW_S * (n % 64 + 1))
        made.costs.observe_slice(SliceKind.BACKWARD, 100 + n % 2, n % 24 + 1, layer_s * (n % 24 + 1))
    return made


def view(asked: Asked, running: int = 20, **more):
    requests = (Request(id=i, prompt=(1, 2), sampling=Sampling(max_tokens=9)) for i in range(running))
    answering = tuple(Sequence(request, 0.0, [1, 2, 3], last_s=0.0) for request in requests)
    return StepView(0.0, running, 2 * running, answering, asked=asked, **more)


def test_demand_is_the_rate_of_requests_times_the_length_of_the_answers_that_ended():
    demand = Demand()
    assert demand.tokens_per_s(1.0) == 0.0
    for second in range(60):
        demand.arrived(second, 2, 2 * 30, 2 * 500)
        demand.answered(second + 0.5, 2 * 40, 2)
    assert demand.tokens_per_s(60.0) == pytest.approx(2 * 40, rel=0.06)
    assert demand.tokens_per_s(90.0) < 10, "requests that came long ago ask for nothing any more"


def test_before_any_answer_ended_each_may_get_as_long_as_it_asks_for():
    demand = Demand()
    for tenth in range(20):
        demand.arrived(tenth / 10, 1, 30 if tenth % 2 else 50, 64)
        demand.answered(tenth / 10, 3, 0)
    assert demand.tokens_per_s(2.0) == pytest.approx(640, rel=0.1)
    assert demand.prompt_tokens == pytest.approx(40, rel=0.1)


def test_a_step_with_its_slice_is_as_long_as_the_usual_gap_of_serving_alone_and_a_quarter():
    """That is a step with a prompt beside the answers that would run without training: 20 + 20 + 40 ms."""
    decision = strategy().between(view(HEAVY), BACKWARD)
    assert decision.slack.limit is SlackLimit.GAP
    assert decision.units * LAYER_S == pytest.approx(GAP * 0.08 - 0.04, abs=0.008)
    fuller = strategy().between(view(HEAVY, running=30), BACKWARD)
    assert fuller.units * LAYER_S == pytest.approx(GAP * 0.08 - 0.05, abs=0.008), "the gap does not grow with the batch"


def test_a_gap_as_short_as_a_slice_is_not_felt_whatever_is_usual():
    """Also of one answer that began long ago, when nothing is asked for any more."""
    Settings.engine = EngineConfig(slice_ms=100)
    try:
        decision = strategy().between(view(LIGHT, running=1), BACKWARD)
    finally:
        Settings.engine = EngineConfig(slice_ms=20)
    assert decision.units * LAYER_S == pytest.approx(0.1 - 0.021, abs=0.006)


def test_training_goes_on_slowly_where_steps_alone_are_longer_than_what_was_expected():
    """What requests ask for is an estimate. A layer is longer than its part of a step: it runs once in several."""
    asked, ran = strategy(layer_s=0.015), 0
    for _ in range(100):
        decision = asked.between(view(Asked(), running=28), BACKWARD)
        ran += decision.units
        asked.spent(0.015 * decision.units)
    assert 0.7 * 100 * LEAST_SHARE * 0.048 < ran * 0.015 <= 100 * LEAST_SHARE * 0.048


def test_work_that_is_not_worth_a_slice_in_part_runs_once_its_time_has_come():
    asked = strategy(layer_s=0.0066)
    rows = Slice(SliceKind.BACKWARD, tokens=100, units=60, least=10)
    decisions = [asked.between(view(HEAVY), rows) for _ in range(4)]
    assert [d.units >= 10 for d in decisions] == [False, True, True, True]


def test_passes_that_begin_during_serving_have_layers_of_which_several_fit_a_gap():
    asked, whole = strategy(), Slice(SliceKind.PACK, 1, 5000, least=10)
    asked.costs.slices.clear()
    assert asked.pack_tokens(view(HEAVY), whole) == 5000, "nothing is known of a layer"
    for n in range(FITTED):
        rows, layers = 50 + n % 7 * 50, 1 + n % 3
        asked.costs.observe_slice(SliceKind.BACKWARD, rows, layers, 0.0001 * rows * layers)
    tokens = asked.pack_tokens(view(HEAVY), whole)
    assert tokens == pytest.approx(GAP * 0.08 / PARTS / 0.0001, rel=0.2)
    assert asked.pack_tokens(StepView(0.0, 0, 0), whole) == 5000, "nothing is served"
