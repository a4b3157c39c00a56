"""What a co-serving strategy decides, from a view alone: no engine, no model, no clock."""

from __future__ import annotations

import math
from typing import Any

import pytest

from clif.config import EngineConfig, SloConfig
from clif.engine.build import make_strategy
from clif.engine.coserving.backlog import NO_BACKLOG, Backlog
from clif.engine.coserving.strategy import StepView
from clif.engine.cost_model import CostModel
from clif.engine.jobs import Slice, SliceKind
from clif.engine.scheduler import Sequence
from clif.types import CoservingMode, Regime, Request, Sampling, SlackLimit, Waiting

FORWARD = Slice(SliceKind.FORWARD, tokens=100, units=24, fused_pass=object())
BACKWARD = Slice(SliceKind.BACKWARD, tokens=100, units=24)
FITTED = 200
"""Measurements after which a cost is what was measured, to a few percent."""


class Settings:
    """As much of a configuration as a strategy reads."""

    class run:
        training_share = 0.25

    engine, slo = EngineConfig(slice_ms=20, concurrent_slice_ms=100), SloConfig(tpot_ms=100, margin=0.3)


def strategy(mode: str, step_s: float = 0.01, layer_s: float = 0.005):
    """One that has measured steps of step_s, whatever is in them, and layers of layer_s."""
    made = make_strategy(mode, Settings)
    for regime in Regime:
        for rows in range(1, FITTED):
            made.costs.observe_step(rows, 0, step_s, regime)
    for units in range(1, FITTED):
        for kind in (SliceKind.FORWARD, SliceKind.BACKWARD):
            made.costs.observe_slice(kind, 100, units % 24 + 1, layer_s * (units % 24 + 1))
    return made


def answering(last_s: float, id: int = 7) -> Sequence:
    """A sequence that got its last token at that time: the next one is due 100 ms less 30 % later."""
    request = Request(id=id, prompt=(1, 2), sampling=Sampling(max_tokens=9))
    return Sequence(request, 0.0, [1, 2, 3], last_s=last_s)


def view(now: float = 0.0, free_slots: int = 1, serve_s: float = 0.0, idle: bool = False, **more: Any):
    return StepView(now, 1, 2, () if idle else (answering(0.0),), free_slots, serve_s=serve_s, **more)


MODES = [mode.value for mode in CoservingMode if mode is not CoservingMode.AUTO]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("now", [0.0, 0.02, 0.05])
def test_what_runs_between_two_steps_fits_what_the_next_token_leaves(mode, now):
    asked = strategy(mode)
    decision = asked.between(view(now), BACKWARD)
    assert decision.slack.limit is SlackLimit.NEXT_TOKEN and decision.slack.request == 7
    regime = Regime.CONCURRENT if decision.concurrent else Regime.ALONE
    assert decision.slack.seconds == pytest.approx(0.07 - now - asked.costs.step_s(1, 2, regime))
    taken_s, too_long_s = (
        asked.costs.slices[BACKWARD.kind].upper_bound(0.1 * units, units)
        for units in (decision.units, decision.units + 1)
    )
    assert decision.concurrent or taken_s <= decision.slack.seconds < too_long_s


@pytest.mark.parametrize("mode", MODES)
def test_nothing_runs_when_a_token_is_already_late(mode):
    decision = strategy(mode).between(view(0.08), BACKWARD)
    assert decision.units == 0 and decision.slack.seconds < 0


@pytest.mark.parametrize("mode", MODES)
def test_nothing_runs_while_requests_may_queue_where_the_replica_does_not_see_them(mode):
    decision = strategy(mode).between(view(free_slots=0), BACKWARD)
    assert (decision.units, decision.slack.limit) == (0, SlackLimit.FULL)


@pytest.mark.parametrize("mode", MODES)
def test_a_full_batch_with_nobody_behind_it_has_the_slack_of_its_own_requests(mode):
    asked = strategy(mode)
    assert asked.between(view(free_slots=0, backlog=NO_BACKLOG), BACKWARD) == asked.between(view(), BACKWARD)


@pytest.mark.parametrize("free_slots", [0, 1])
@pytest.mark.parametrize("mode", MODES)
def test_nothing_runs_while_a_request_at_the_dispatcher_is_overdue(mode, free_slots):
    overdue = Backlog(1, (Waiting(31, 0.8, 9, 9),), heard_s=0.0)
    decision = strategy(mode).between(view(free_slots=free_slots, backlog=overdue), BACKWARD)
    assert (decision.units, decision.slack.limit, decision.slack.request) == (0, SlackLimit.QUEUED, 31)
    assert strategy("fused").fuse(view(free_slots=free_slots, backlog=overdue), FORWARD).units == 0


@pytest.mark.parametrize("mode", MODES)
def test_nothing_runs_before_the_first_step_of_a_request_that_has_waited_for_a_slice(mode):
    decision = strategy(mode).between(view(held_up=9), BACKWARD)
    assert (decision.units, decision.slack.limit, decision.slack.request) == (0, SlackLimit.FIRST_TOKEN, 9)
    assert decision.slack.seconds < 0


def test_a_slice_between_steps_has_a_longest_length_whatever_the_slack():
    decision = strategy("interleaved").between(view(idle=True), BACKWARD)
    assert decision.slack.seconds == math.inf and decision.units == pytest.approx(4 * 0.02 / 0.005, abs=1.5)


def test_a_concurrent_slice_has_a_length_of_its_own_and_needs_no_slack_beyond_its_slower_steps():
    decision = strategy("concurrent").between(view(0.05), BACKWARD)
    assert decision.concurrent and decision.units == pytest.approx(0.1 / 0.005, abs=1.5)


def test_a_concurrent_slice_starts_only_if_a_waiting_prompt_can_afford_all_the_steps_beside_it():
    """Two steps of 512 tokens; 400 ms to the first token less 30 %. One step alone would fit."""
    asked = strategy("concurrent", step_s=0.2)
    waits = Sequence(Request(id=5, prompt=(1,) * 600, sampling=Sampling(max_tokens=9)), 0.0, [1] * 600)
    seen = StepView(0.0, 512, 0, (waits,))
    asked.slo = SloConfig(ttft_ms=400, margin=0.3)
    decision = asked.between(seen, BACKWARD)
    assert (decision.units, decision.slack.limit, decision.slack.request) == (0, SlackLimit.FIRST_TOKEN, 5)
    asked.slo = SloConfig(ttft_ms=700, margin=0.3)
    assert asked.between(seen, BACKWARD).units > 0


def test_before_a_captured_step_there_is_the_slack_that_captured_steps_leave():
    asked = strategy("interleaved", step_s=0.05)
    for rows in range(1, FITTED):
        asked.costs.observe_step(rows, 0, 0.005, captured=True)
    prompts, answers = view(), view(decodes=True)
    assert asked.between(prompts, BACKWARD).slack.seconds == pytest.approx(0.02, abs=0.006)
    assert asked.between(answers, BACKWARD).slack.seconds == pytest.approx(0.065, abs=0.006)


def test_a_forward_is_fused_where_every_request_can_afford_the_longer_step_and_not_elsewhere():
    fused = strategy("fused")
    for rows in range(1, FITTED):
        fused.costs.observe_step(rows, 0, 0.04, Regime.FUSED)
    assert fused.fuse(view(0.01), FORWARD).units == FORWARD.units
    late = fused.fuse(view(0.05), FORWARD)
    assert (late.units, late.slack.limit) == (0, SlackLimit.NEXT_TOKEN)
    assert fused.fuse(view(0.01, free_slots=0), FORWARD).slack.limit is SlackLimit.FULL
    assert fused.fuse(view(0.01, free_slots=0, backlog=NO_BACKLOG), FORWARD).units == FORWARD.units


def test_a_forward_waits_for_a_step_that_can_take_it_along_and_runs_alone_if_none_ever_can():
    fused = strategy("fused")
    waits = fused.between(view(), FORWARD)
    assert (waits.units, waits.slack.limit) == (0, SlackLimit.FUSE)
    assert fused.between(view(), BACKWARD).units > 0, "only forwards can be fused"
    for rows in range(1, FITTED):
        fused.costs.observe_step(rows, 0, 0.2, Regime.FUSED)
    alone = fused.between(view(), FORWARD)
    assert alone.units > 0 and alone.slack.limit is SlackLimit.NEXT_TOKEN


def test_a_pass_that_is_to_be_fused_is_packed_for_half_of_a_tokens_budget():
    piece = Slice(SliceKind.PACK, units=10_000)
    assert strategy("interleaved").pack_tokens(view(), piece) == 10_000, "between steps the memory decides"
    fused = make_strategy("fused", Settings)
    for rows in range(1, FITTED):
        fused.costs.observe_step(rows, 0, 0.005 + 0.0001 * rows, Regime.FUSED)
    assert fused.pack_tokens(view(), piece) == pytest.approx(300, rel=0.15)


def test_time_slices_share_the_time_by_whole_optimizer_steps():
    """Training gets 25 %: after a step of 1 s it waits until serving has had 3 s."""
    sliced = strategy("time_slice")
    first = sliced.between(view(serve_s=0.0), BACKWARD)
    assert first.units == BACKWARD.units and first.whole_step and first.slack.limit is SlackLimit.SHARE
    sliced.spent(1.0)
    waited = 0.0
    while not sliced.between(view(serve_s=0.1), BACKWARD).units:
        sliced.spent(0.0)
        waited += 0.1
    assert waited == pytest.approx(3.0, abs=0.15)


def test_a_strategy_starts_without_measurements_and_tries_a_slice_in_its_smallest_form():
    fresh = make_strategy("interleaved", Settings)
    assert isinstance(fresh.costs, CostModel) and fresh.between(view(), BACKWARD).units == BACKWARD.least
