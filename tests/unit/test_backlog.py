"""Promise 5 for requests that wait at the dispatcher: training leaves them the time that serving alone would."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from clif.config import SloConfig
from clif.control.policy.backlog_updates import INTERVAL_S, REFRESH_S, Update, interval_s, update_due
from clif.engine.coserving.backlog import NO_BACKLOG, STALE_S, Backlog, BatchSlots, backlog_slack
from clif.types import SlackLimit, Slo, Waiting

SLO = SloConfig(ttft_ms=1000, tpot_ms=100, margin=0.3)
STEPS = BatchSlots(free=0, tokens_left=(2, 5, 40), step_s=0.02, chunk_s=0.02, row_s=0.001, chunk=64)
"""BatchSlots come free in 40, 100 and 800 ms; a prompt of 10 tokens takes 30 ms."""


def waits(id: int = 5, wait_s: float = 0.1, prompt_tokens: int = 10, max_tokens: int = 8, slo: Slo | None = None):
    return Waiting(id, wait_s, prompt_tokens, max_tokens, slo or Slo())


def heard(*oldest: Waiting, waiting: int = 0) -> Backlog:
    return Backlog(max(waiting, len(oldest)), oldest, heard_s=0.0)


def test_nobody_waits_so_training_has_no_limit_by_it():
    slack = backlog_slack(9.0, NO_BACKLOG, STEPS, SLO)
    assert (slack.seconds, slack.limit, slack.request) == (math.inf, SlackLimit.NO_REQUEST, -1)


def test_a_request_needs_the_first_slot_that_becomes_free_and_its_prefill():
    """700 ms less its age of 100, 2 steps of 20 until the slot, and 20 + 10 x 1 for its prompt."""
    slack = backlog_slack(0.0, heard(waits()), STEPS, SLO)
    assert slack.seconds == pytest.approx(0.7 - 0.1 - 0.04 - 0.03)
    assert (slack.limit, slack.request) == (SlackLimit.QUEUED, 5)
    assert "request 5 waits at the dispatcher" in slack.reason


def test_what_was_told_ages_by_the_replicas_own_clock_and_a_request_that_is_overdue_ends_training():
    one = heard(waits())
    fresh, later, overdue = (backlog_slack(now, one, STEPS, SLO).seconds for now in (0.0, 0.25, 0.7))
    assert later == pytest.approx(fresh - 0.25) and overdue < 0
    assert one.is_fresh(STALE_S) and not one.is_fresh(STALE_S + 0.1) and NO_BACKLOG.is_fresh(1e9)


def test_each_waits_for_a_slot_of_its_own_behind_those_before_it():
    """The third has arrived last and is the most pressed all the same: its slot comes last."""
    slack = backlog_slack(0.0, heard(waits(1, 0.3), waits(2, 0.2), waits(3, 0.1)), STEPS, SLO)
    assert slack.request == 3 and slack.seconds == pytest.approx(0.7 - 0.1 - 0.8 - 0.05)


def test_those_that_are_not_listed_count_as_no_younger_than_the_last_one_listed():
    listed = backlog_slack(0.0, heard(waits(), waits(6)), STEPS, SLO).seconds
    counted = backlog_slack(0.0, heard(waits(), waiting=2), STEPS, SLO).seconds
    assert counted == pytest.approx(listed)


def test_behind_more_requests_than_slots_a_whole_answer_passes_first():
    assert STEPS.first_token_s(3, 10) == pytest.approx((40 + 2) * 0.02 + 0.03)
    free = BatchSlots(2, (), 0.02, 0.02, 0.001, 64)
    assert free.first_token_s(1, 10) == pytest.approx(0.03), "slots that are free cost no wait"
    assert free.first_token_s(2, 10) == math.inf, "nothing is known of a third"


def test_long_prompts_take_several_steps():
    assert STEPS.first_token_s(0, 200) == pytest.approx((2 + 4) * 0.02 + 0.2)


def test_a_requests_own_promises_count_and_a_lost_deadline_does_not():
    own = backlog_slack(0.0, heard(waits(slo=Slo(ttft_s=0.5))), STEPS, SLO).seconds
    assert own == pytest.approx(0.35 - 0.1 - 0.07)
    dated = backlog_slack(0.0, heard(waits(slo=Slo(deadline_s=0.6))), STEPS, SLO).seconds
    assert dated == pytest.approx(0.42 - 0.1 - 0.07 - 7 * 0.02)
    lost = backlog_slack(0.0, heard(waits(slo=Slo(deadline_s=0.2))), STEPS, SLO).seconds
    assert lost == pytest.approx(0.7 - 0.1 - 0.07)


@given(st.lists(st.floats(0, 2), max_size=6), st.integers(-2, 4), st.floats(0, 1))
def test_more_who_wait_and_more_time_never_leave_more_slack(ages, free, later):
    oldest = [waits(i, age) for i, age in enumerate(sorted(ages, reverse=True))]
    slots = BatchSlots(free, (2, 5, 40), 0.02, 0.02, 0.001, 64)
    slacks = [backlog_slack(0.0, heard(*oldest[:n]), slots, SLO).seconds for n in range(len(oldest) + 1)]
    assert slacks == sorted(slacks, reverse=True)
    assert backlog_slack(later, heard(*oldest), slots, SLO).seconds <= slacks[-1]


@pytest.mark.parametrize(
    ("update", "last", "due"),
    [
        (Update(), None, True),
        (Update(2, (7,)), Update(2, (7,)), False),
        (Update(3, (7,)), Update(2, (7,)), True),
        (Update(2, (8,)), Update(2, (7,)), True),
        (Update(), Update(2, (7,)), True),
        (Update(), Update(), False),
        (Update(2, (7,)), Update(2, (7,), at_s=-REFRESH_S), True),
        (Update(), Update(at_s=-REFRESH_S), True),
    ],
)
def test_a_replica_is_told_what_changed_and_now_and_then_what_did_not(update, last, due):
    answer, reason = update_due(0.0, update, last)
    assert answer is due and reason


def test_with_many_replicas_each_is_told_less_often():
    assert interval_s(1) == INTERVAL_S and interval_s(1000) == pytest.approx(0.5)
