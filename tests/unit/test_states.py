"""The whole product of states: nothing moves but by the table."""

from __future__ import annotations

import itertools

import pytest

from clif.states import TRANSITIONS, IllegalTransition, ReplicaState, RequestState, RoundState, advance

KINDS = [ReplicaState, RequestState, RoundState]
PAIRS = [pair for kind in KINDS for pair in itertools.product(kind, kind)]


@pytest.mark.parametrize(("current", "target"), PAIRS, ids=lambda s: f"{type(s).__name__}.{s.value}")
def test_exactly_the_listed_transitions_are_allowed(current, target):
    if target in TRANSITIONS[current]:
        assert advance(current, target) is target
    else:
        with pytest.raises(IllegalTransition, match=f"not {target.value}"):
            advance(current, target)


def test_table_covers_every_state_and_stays_within_its_kind():
    assert set(TRANSITIONS) == {state for kind in KINDS for state in kind}
    assert all(type(target) is type(state) for state, targets in TRANSITIONS.items() for target in targets)


def test_the_table_is_the_one_that_was_agreed():
    """Written out once more, because the test above would follow the table wherever it goes."""
    agreed = {
        ReplicaState: "serving>idle serving>failed idle>serving idle>combined idle>failed combined>serving "
        "combined>idle combined>failed failed>serving",
        RequestState: "queued>dispatched queued>finished dispatched>running dispatched>queued dispatched>finished "
        "running>queued running>finished",
        RoundState: "training>aggregating training>discarded aggregating>settling aggregating>discarded "
        "settling>committed settling>discarded",
    }
    for kind, listed in agreed.items():
        assert {f"{a.value}>{b.value}" for a in kind for b in TRANSITIONS[a]} == set(listed.split())


@pytest.mark.parametrize(
    ("current", "target", "sentence"),
    [
        (
            ReplicaState.SERVING,
            ReplicaState.COMBINED,
            "ReplicaState serving may become failed, idle, not combined",
        ),
        (
            RoundState.TRAINING,
            RoundState.COMMITTED,
            "RoundState training may become aggregating, discarded, not committed",
        ),
        (RequestState.FINISHED, RequestState.QUEUED, "RequestState finished may become nothing, not queued"),
    ],
)
def test_a_refusal_names_what_would_have_been_allowed(current, target, sentence):
    with pytest.raises(IllegalTransition, match=f"^{sentence}$"):
        advance(current, target)


def test_ends_are_ends():
    for state in (RequestState.FINISHED, RoundState.COMMITTED, RoundState.DISCARDED):
        assert not TRANSITIONS[state]


def test_every_round_can_be_discarded_until_it_is_over_and_every_replica_can_fail():
    open_states = (RoundState.TRAINING, RoundState.AGGREGATING, RoundState.SETTLING)
    assert all(RoundState.DISCARDED in TRANSITIONS[state] for state in open_states)
    assert all(ReplicaState.FAILED in TRANSITIONS[s] for s in ReplicaState if s is not ReplicaState.FAILED)


def test_only_a_running_request_can_be_gone_on_with_and_nothing_else_runs_without_being_dispatched():
    """Its tokens were given out under one version: it waits for a replica like all others."""
    assert TRANSITIONS[RequestState.RUNNING] == {RequestState.QUEUED, RequestState.FINISHED}
    assert [s for s in RequestState if RequestState.RUNNING in TRANSITIONS[s]] == [RequestState.DISPATCHED]
