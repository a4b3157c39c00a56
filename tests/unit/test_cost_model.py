"""Promise 5: training can take only what serving leaves, with a margin, and gives it back."""

from __future__ import annotations

import math

import msgspec
import pytest
from helpers import request
from hypothesis import given
from hypothesis import strategies as st

from clif.config import SloConfig
from clif.engine.cost_model import CostModel, Rate, training_slack
from clif.engine.scheduler import Sequence
from clif.types import Purpose, Regime, SlackLimit, Slo, TrainingSlack

SLO = SloConfig(ttft_ms=1000, tpot_ms=100, margin=0.3)


def running(last_s: float, id: int = 0) -> Sequence:
    return Sequence(request(id, [1]), 0.0, [1], last_s=last_s)


def may_train(now: float, slice_s: float, step_s: float, sequences: list[Sequence], slo: SloConfig):
    """Whether training of slice_s seconds fits before the next serving step, and the slack that decides it."""
    slack = training_slack(now, step_s, sequences, slo)
    return slack.seconds >= slice_s, slack


def waiting(arrived_s: float, id: int = 1) -> Sequence:
    return Sequence(request(id, [1]), arrived_s, [1])


def test_nobody_waits_so_training_may_run():
    answer, slack = may_train(0.0, 99.0, 99.0, [], SLO)
    assert answer and slack.reason == "no request waits"


@pytest.mark.parametrize(("slice_ms", "allowed"), [(39, True), (41, False)])
def test_the_margin_is_never_spent(slice_ms, allowed):
    """Budget of a gap: 100 ms less 30 %; 10 ms are gone and the next step takes 20."""
    answer, slack = may_train(0.010, slice_ms / 1000, 0.020, [running(0.0)], SLO)
    assert answer is allowed and "next token of request 0" in slack.reason


@pytest.mark.parametrize(
    ("sequences", "limit", "request_id"),
    [
        ([running(0.0, 7)], "next_token", 7),
        ([waiting(-0.6, 8), running(0.0, 7)], "next_token", 7),
        ([], "no_request", -1),
    ],
)
def test_the_reason_names_the_promise_that_allows_no_more(sequences, limit, request_id):
    slack = training_slack(0.010, 0.020, sequences, SLO)
    assert (slack.limit.value, slack.request) == (limit, request_id)
    assert slack.seconds == pytest.approx(0.04) if sequences else math.isinf(slack.seconds)


def test_each_limit_has_a_sentence_that_is_made_when_it_is_shown():
    for limit in SlackLimit:
        assert TrainingSlack(0.012, limit, 3).reason
    assert TrainingSlack(0.012, SlackLimit.DEADLINE, 3).reason == "deadline of request 3 has 12 ms of slack"


@given(gone_s=st.floats(0, 0.2), step_s=st.floats(0, 0.2), margin=st.floats(0, 1))
def test_the_margin_holds_at_the_exact_edge(gone_s, step_s, margin):
    """Promise 5."""
    slo = SloConfig(ttft_ms=9e5, tpot_ms=500, margin=margin)
    room_s = slo.tpot_ms / 1000 * (1 - slo.margin) - gone_s - step_s
    if room_s > 0:
        assert may_train(gone_s, room_s, step_s, [running(0.0)], slo)[0]
    assert not may_train(gone_s, max(room_s, 0) + 1e-6 + max(-room_s, 0), step_s, [running(0.0)], slo)[0]


@pytest.mark.parametrize(("slice_ms", "allowed"), [(190, True), (210, False)])
def test_a_waiting_request_has_its_first_token_to_lose(slice_ms, allowed):
    answer, slack = may_train(0.4, slice_ms / 1000, 0.1, [waiting(0.0)], SLO)
    assert answer is allowed and "first token of request 1" in slack.reason


@pytest.mark.parametrize(
    ("sequence", "own"),
    [(running(0.0), Slo(ttft_s=9.0, tpot_s=0.05)), (waiting(0.0), Slo(ttft_s=0.05, tpot_s=9.0))],
    ids=["next token", "first token"],
)
def test_a_requests_own_promise_counts_before_the_configured_one(sequence, own):
    """Budget: 50 ms less 30 %, though the configuration would leave 100 and 1000."""
    sequence.request = msgspec.structs.replace(sequence.request, slo=own)
    assert may_train(0.010, 0.020, 0.004, [sequence], SLO)[0]
    assert not may_train(0.010, 0.022, 0.004, [sequence], SLO)[0]


def test_the_most_pressed_request_decides():
    assert not may_train(0.10, 0.01, 0.01, [running(0.1, 5), running(0.0, 6)], SLO)[0]


def test_probes_do_not_hold_training_back():
    sequence = running(0.0)
    sequence.request = msgspec.structs.replace(sequence.request, purpose=Purpose.PROBE)
    assert may_train(5.0, 1.0, 1.0, [sequence], SLO)[0]


def test_an_unknown_slice_is_tried_in_its_smallest_form_and_then_measured():
    costs = CostModel()
    assert "backward" not in costs.slices
    assert costs.units_within("backward", 100, seconds=0.05) == 1
    for layers in [*range(1, 41)] * 2:
        costs.observe_slice("backward", 100, layers, 0.004 * layers)
    assert costs.slices["backward"].upper_bound(100 * 30 / 1000, 30) == pytest.approx(0.12, rel=0.1)
    assert 10 <= costs.units_within("backward", 100, seconds=0.05) <= 13


def test_each_regime_has_its_own_price():
    """A step that runs while a slice runs has fewer threads; one that is fused with a forward has more rows."""
    costs = CostModel()
    for n in [*range(1, 41)] * 2:
        costs.observe_step(n, 0, 0.01 + 0.001 * n, "alone")
        costs.observe_step(n, 0, 0.02 + 0.002 * n, "concurrent")
    assert costs.step_s(20, 0) == pytest.approx(0.03, rel=0.1)
    assert costs.step_s(20, 0, "concurrent") == pytest.approx(0.06, rel=0.1)
    assert costs.step_s(60, 0, "fused") == costs.step_s(60, 0), "unknown: all rows, as alone"
    assert 15 <= costs.tokens_within(20, 0, seconds=0.05) <= 21


def test_a_captured_step_has_its_own_price_and_an_eager_one_never_changes_it():
    costs = CostModel()
    assert costs.step_s(20, 0, captured=True) == costs.step_s(20, 0), "unknown: as an eager one"
    for n in [*range(1, 41)] * 2:
        costs.observe_step(n, 0, 0.02 + 0.001 * n)
        assert not costs.captures
    for n in [*range(1, 41)] * 2:
        costs.observe_step(n, 0, 0.002, captured=True)
    assert costs.captures
    assert costs.step_s(20, 0) == pytest.approx(0.04, rel=0.1)
    assert costs.step_s(20, 0, captured=True) == pytest.approx(0.002, rel=0.1)
    assert costs.step_s(20, 0, Regime.CONCURRENT, True) == costs.step_s(20, 0, captured=True), "unknown: as alone"
    for n in [*range(1, 41)] * 2:
        costs.observe_step(n, 0, 0.003, Regime.CONCURRENT, captured=True)
    assert costs.step_s(20, 0, Regime.CONCURRENT, True) == pytest.approx(0.003, rel=0.1)
    assert costs.step_s(20, 0, captured=True) == pytest.approx(0.002, rel=0.1)


def test_beside_a_slice_the_slower_of_what_was_measured_counts():
    """A few steps that happened to be fast beside a slice do not let training in."""
    costs = CostModel()
    for n in [*range(1, 41)] * 2:
        costs.observe_step(n, 0, 0.02)
        costs.observe_step(n, 0, 0.01, Regime.CONCURRENT)
    assert costs.step_s(20, 0, Regime.CONCURRENT) == costs.step_s(20, 0)


def test_a_deadline_counts_an_eager_step_once_and_the_captured_ones_after_it():
    """5 tokens are left: one step of 30 ms with a prompt, four of 3 ms, of 100 ms less the margin."""
    sequence = Sequence(request(0, [1], max_tokens=6), 0.0, [1, 7], last_s=0.0)
    sequence.request = msgspec.structs.replace(sequence.request, slo=Slo(tpot_s=9.0, deadline_s=0.1))
    slack = training_slack(0.0, 0.03, [sequence], SLO, later_s=0.003)
    assert slack.limit is SlackLimit.DEADLINE and slack.seconds == pytest.approx(0.07 - 0.03 - 4 * 0.003)


@pytest.mark.parametrize(
    ("own_s", "configured_ms"),
    [(0.3 / 0.7, None), (None, 300 / 0.7), (0.3 / 0.7, 9e6), (0.3 / 0.7, 1.0)],
    ids=["own", "configured", "own before a later one", "own before an earlier one"],
)
def test_a_deadline_counts_all_the_steps_that_are_left(own_s, configured_ms):
    """10 of 15 tokens of 20 ms are left and 0.3 s of a deadline less its margin: 100 ms are to spare."""
    slo = SLO.model_copy(update={"deadline_ms": configured_ms})
    sequence = Sequence(request(0, [1], max_tokens=15), 0.0, [1, 7, 7, 7, 7, 7], last_s=0.0)
    sequence.request = msgspec.structs.replace(sequence.request, slo=Slo(tpot_s=9.0, deadline_s=own_s))
    assert may_train(0.0, 0.09, 0.02, [sequence], slo)[0]
    answer, slack = may_train(0.0, 0.11, 0.02, [sequence], slo)
    assert not answer and "deadline" in slack.reason
    assert may_train(1.0, 0.11, 0.02, [sequence], slo)[0], "a lost deadline holds nobody back"


@given(st.lists(st.floats(0.01, 0.1), min_size=20, max_size=60))
def test_a_price_is_above_the_mean_of_what_was_seen(seconds):
    rate = Rate()
    for s in seconds:
        rate.observe(s)
    assert rate.mean <= rate.upper_bound <= rate.mean + 2 * 0.1
    assert min(seconds) - 1e-9 <= rate.mean <= max(seconds) + 1e-9


def test_a_price_leaves_room_for_what_varies():
    """The mean alone would be exceeded half the time."""
    rate = Rate()
    for i in range(200):
        rate.observe(0.02 if i % 2 else 0.04)
    assert rate.mean < 0.04 < rate.upper_bound


def test_measurements_that_wait_for_a_question_are_fitted_as_if_each_had_been_at_once():
    asked, silent = CostModel(), CostModel()
    for i in range(200):
        rows, seconds = 1 + i % 32, 0.01 + 0.0003 * (i * 7 % 32)
        for costs in (asked, silent):
            costs.observe_step(rows, 100 * rows, seconds)
        asked.step_s(rows, 0)
    assert not silent.steps[Regime.ALONE, False].model.seen
    for rows in (1, 8, 32):
        assert asked.step_s(rows, 50 * rows) == silent.step_s(rows, 50 * rows)
