"""Rounds: who may be promoted (promise 3), and how a round ends, once (promise 6), whatever happens to its members."""

import json
import math
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clif.adapters.store import AdapterStore
from clif.config import FederationConfig
from clif.control.policy.promotion import decide_promotion
from clif.control.records import train_loss
from clif.control.rounds import Outgoing, Round
from clif.states import RoundState
from clif.types import AdapterVersion, RoundPlan, RoundResult, Vote
from clif.wire.messages import Aggregate, BeginRound, FinishSteps, Published, Settle

CONFIG = FederationConfig(round_timeout_s=10.0, settle_timeout_s=5.0)


def vote(replica: int = 0, candidate: float = 1.0, active: float = 2.0, tokens: int = 10, finite: bool = True) -> Vote:
    return Vote(round_id=1, replica=replica, finite=finite, candidate_loss=candidate, active_loss=active, tokens=tokens)


def result(replica: int, samples: int = 8, finite: bool = True) -> RoundResult:
    return RoundResult(
        round_id=1, replica=replica, samples=samples, tokens=80, targets=80, steps=2, loss=1.0, finite=finite
    )


def make_round(members: tuple[int, ...] = (0, 1)) -> Round:
    plan = RoundPlan(
        round_id=1,
        members=members,
        incarnations=(0,) * len(members),
        local_steps=2,
        micro_batch=4,
        accumulation=1,
        base_version=3,
    )
    return Round(plan, next_version=4, now=0.0, config=CONFIG)


def published(version: int = 4, round_id: int = 1, replica: int = 0) -> Published:
    return Published(replica=replica, version=version, round_id=round_id, config_json="{}", weights=b"w")


def targets(messages: Outgoing, kind: type[Any]) -> list[int]:
    return [replica for replica, message in messages if isinstance(message, kind)]


def test_the_training_loss_of_a_round_weighs_members_by_answer_tokens_and_leaves_out_what_is_not_finite() -> None:
    members = [replace_loss(result(0), 2.0, 30), replace_loss(result(1), 6.0, 10), replace_loss(result(2), math.nan, 9)]
    assert train_loss(members) == pytest.approx((2.0 * 30 + 6.0 * 10) / 40)
    assert train_loss([replace_loss(result(0), math.nan, 0)]) is None


def replace_loss(result: RoundResult, loss: float, targets: int) -> RoundResult:
    return msgspec.structs.replace(result, loss=loss, targets=targets)


# --- promotion -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "votes",
    [
        [],
        [vote(finite=False)],
        [vote(0), vote(1, candidate=math.nan)],
        [vote(0), vote(1, candidate=math.inf)],
        [vote(0), vote(1, active=math.nan)],
        [vote(candidate=2.1)],
        [vote(0, candidate=1.0), vote(1, candidate=9.0)],
        [vote(tokens=0, candidate=0.0, active=0.0)],
    ],
    ids=["nobody", "not-finite", "nan", "diverged", "nan-active", "worse", "worse-pooled", "zero-weight"],
)
def test_promise_3_a_non_finite_diverged_or_worse_adapter_is_never_promoted(votes: list[Vote]) -> None:
    verdict, reason = decide_promotion(votes, CONFIG)
    assert verdict is None and reason


def test_votes_are_pooled_by_tokens() -> None:
    verdict, _ = decide_promotion([vote(0, 30.0, 20.0, 10), vote(1, 50.0, 100.0, 50)], CONFIG)
    assert verdict is not None
    assert verdict.candidate_loss == pytest.approx(80 / 60) and verdict.active_loss == pytest.approx(2.0)


def test_a_member_without_held_out_tokens_leaves_the_judgement_to_the_others() -> None:
    verdict, _ = decide_promotion([vote(0, 0.0, 0.0, 0), vote(1, 10.0, 20.0, 10)], CONFIG)
    assert verdict is not None and (verdict.candidate_loss, verdict.active_loss) == (1.0, 2.0)
    refused, reason = decide_promotion([vote(0, tokens=-10), vote(1, tokens=30)], CONFIG)
    assert refused is None and reason == "no held-out token was judged"


def test_tolerance_admits_a_little_worse() -> None:
    tolerant = FederationConfig(tolerance=0.1)
    assert decide_promotion([vote(candidate=2.19)], tolerant)[0] is not None
    assert decide_promotion([vote(candidate=2.21)], tolerant)[0] is None


def test_a_candidate_at_half_of_the_way_is_promoted_as_such_and_all_members_must_have_judged_the_same() -> None:
    short = [msgspec.structs.replace(vote(i), outer_step=0.5) for i in range(2)]
    verdict, reason = decide_promotion(short, CONFIG)
    assert verdict is not None and verdict.outer_step == 0.5 and "at 0.5 of the way" in reason
    refused, reason = decide_promotion([short[0], vote(1)], CONFIG)
    assert refused is None and "[0.5, 1.0]" in reason


number = st.floats(allow_nan=True, allow_infinity=True)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(number, number, st.integers(0, 100), st.booleans()), min_size=1, max_size=4))
def test_promise_3_holds_for_any_votes(values: list[tuple[float, float, int, bool]]) -> None:
    votes = [vote(i, c, a, t, f) for i, (c, a, t, f) in enumerate(values)]
    verdict, _ = decide_promotion(votes, CONFIG)
    if verdict is not None:
        assert all(v.finite and math.isfinite(v.candidate_loss) for v in votes)
        assert verdict.candidate_loss <= verdict.active_loss


# --- a round's life ------------------------------------------------------------------------------


def to_votes(current: Round) -> None:
    for member in current.plan.members:
        current.steps_done(1.0, result(member))


def to_settling(current: Round) -> Outgoing:
    to_votes(current)
    return [m for member in current.plan.members for m in current.voted(2.0, vote(member))]


def test_a_round_goes_from_steps_to_votes_to_commit() -> None:
    current = make_round()
    assert targets(current.begin(), BeginRound) == [0, 1]
    assert current.steps_done(1.0, result(0)) == []
    assert targets(current.steps_done(1.0, result(1)), Aggregate) == [0, 1]
    current.voted(2.0, vote(0))
    settle = current.voted(2.0, vote(1))
    assert [(r, m.commit, m.version, m.publish) for r, m in settle if isinstance(m, Settle)] == [
        (0, True, 4, True),
        (1, True, 4, False),
    ]
    current.settled(3.0, 0)
    assert current.publication(3.0, published()) and not current.over
    current.settled(3.0, 1)
    assert current.over and current.state is RoundState.COMMITTED


def test_a_worse_average_is_discarded_and_all_members_settle_first() -> None:
    current = make_round()
    to_votes(current)
    current.voted(2.0, vote(0, candidate=5.0))
    settle = current.voted(2.0, vote(1, candidate=5.0))
    assert [(m.commit, m.version) for _, m in settle if isinstance(m, Settle)] == [(False, 3), (False, 3)]
    assert current.state is RoundState.DISCARDED and not current.over
    current.settled(3.0, 0)
    current.settled(3.0, 1)
    assert current.over


def test_slow_members_are_cut_off_and_silent_ones_discard_the_round() -> None:
    current = make_round()
    current.steps_done(1.0, result(0))
    assert current.advance(9.0) == []
    assert targets(current.advance(10.0), FinishSteps) == [1]
    assert current.advance(14.0) == []
    assert targets(current.advance(15.0), Settle) == [0, 1]
    assert current.state is RoundState.DISCARDED and "[1]" in current.reason


def test_a_round_that_is_wound_up_is_averaged_and_judged() -> None:
    current = make_round()
    current.steps_done(1.0, result(0))
    assert targets(current.wind_up(2.0), FinishSteps) == [1]
    assert current.wind_up(2.1) == [], "once"
    assert targets(current.steps_done(2.5, result(1, samples=4)), Aggregate) == [0, 1]
    assert current.wind_up(2.6) == [], "what is being averaged is under way already"
    assert current.advance(7.0) == [] and current.state is RoundState.AGGREGATING
    assert targets(current.advance(7.5), Settle) == [0, 1], "settle_timeout_s after the steps"


def test_missing_votes_discard_the_round() -> None:
    current = make_round()
    to_votes(current)
    current.voted(2.0, vote(0))
    assert targets(current.advance(6.0), Settle) == [0, 1]
    assert current.state is RoundState.DISCARDED
    assert not current.left_group_clean, "the other member may still be in the all-reduce"


def test_a_group_is_clean_when_no_all_reduce_was_begun_or_all_have_ended() -> None:
    called_off, judged = make_round(), make_round()
    called_off.steps_done(1.0, result(0))
    called_off.discard(2.0, "a drain")
    assert called_off.left_group_clean
    to_votes(judged)
    judged.voted(2.0, vote(0, candidate=5.0))
    judged.voted(2.0, vote(1, candidate=5.0))
    assert judged.state is RoundState.DISCARDED and judged.left_group_clean


def test_promise_8_a_member_without_finite_samples_does_not_end_the_round_but_only_such_members_do() -> None:
    current = make_round()
    current.steps_done(1.0, result(0, finite=False))
    assert targets(current.steps_done(1.0, result(1)), Aggregate) == [0, 1]
    hopeless = make_round()
    hopeless.steps_done(1.0, result(0, finite=False))
    hopeless.steps_done(1.0, result(1, samples=0))
    assert hopeless.state is RoundState.DISCARDED


@pytest.mark.parametrize("stage", ["training", "aggregating"])
def test_a_member_lost_before_the_decision_discards_the_round(stage: str) -> None:
    current = make_round((0, 1, 2))
    if stage == "aggregating":
        to_votes(current)
    assert targets(current.lost(3.0, 1, "gone"), Settle) == [0, 2]
    assert current.state is RoundState.DISCARDED
    current.settled(4.0, 0)
    current.settled(4.0, 2)
    assert current.over


def test_a_member_lost_after_the_decision_changes_only_who_publishes() -> None:
    current = make_round()
    to_settling(current)
    again = current.lost(3.0, 0, "gone")
    assert [(r, m.publish, m.version) for r, m in again if isinstance(m, Settle)] == [(1, True, 4)]
    assert current.publication(4.0, published())
    current.settled(4.0, 1)
    assert current.state is RoundState.COMMITTED


def test_when_nobody_can_publish_the_round_is_discarded() -> None:
    current = make_round()
    to_settling(current)
    current.lost(3.0, 0, "gone")
    current.lost(3.0, 1, "gone")
    assert current.over and current.state is RoundState.DISCARDED


def test_a_round_failed_in_one_member_is_discarded_but_that_member_stays() -> None:
    current = make_round()
    to_votes(current)
    assert targets(current.failed(2.0, 1, "all-reduce timed out"), Settle) == [0, 1]
    assert "all-reduce" in current.reason


def test_messages_of_other_rounds_are_ignored() -> None:
    current = make_round()
    old = RoundResult(round_id=0, replica=0, samples=1, tokens=1, targets=1, steps=1, loss=1.0, finite=True)
    assert current.steps_done(1.0, old) == [] and not current.results
    to_settling(current)
    assert not current.publication(3.0, published(round_id=9)) and not current.publication(3.0, published(version=9))
    assert current.publication(3.0, published()) and not current.publication(3.0, published())


def test_a_committed_round_does_not_wait_for_ever() -> None:
    current = make_round()
    to_settling(current)
    current.publication(3.0, published())
    current.advance(7.0)
    assert current.over and current.state is RoundState.COMMITTED and "not settled" in current.reason


steps = st.sampled_from(["steps", "vote", "bad", "fail", "lose", "settle", "publish", "advance", "discard"])


@settings(max_examples=150, deadline=None)
@given(st.lists(st.tuples(steps, st.integers(0, 2)), max_size=30))
def test_every_round_comes_to_an_end_whatever_happens(events: list[tuple[str, int]]) -> None:
    current, now = make_round((0, 1, 2)), 0.0
    for kind, member in events:
        now += 1.0
        calls = {
            "steps": lambda m=member, t=now: current.steps_done(t, result(m)),
            "vote": lambda m=member, t=now: current.voted(t, vote(m)),
            "bad": lambda m=member, t=now: current.voted(t, vote(m, candidate=math.nan)),
            "fail": lambda m=member, t=now: current.failed(t, m, "x"),
            "lose": lambda m=member, t=now: current.lost(t, m, "x"),
            "settle": lambda m=member, t=now: current.settled(t, m),
            "publish": lambda m=member, t=now: current.publication(t, published(replica=m)),
            "advance": lambda t=now: current.advance(t),
            "discard": lambda t=now: current.discard(t, "x"),
        }
        calls[kind]()
    for _ in range(8):
        now += 100.0
        current.advance(now)
    assert current.over and current.reason
    if current.state is RoundState.COMMITTED:
        assert current.published and current.promotion is not None


# --- on disk -------------------------------------------------------------------------------------


def test_promise_6_a_version_is_stored_whole_and_becomes_current(tmp_path: Path) -> None:
    store = AdapterStore(tmp_path)
    assert store.current() is None
    version = AdapterVersion(number=1, round_id=5, heldout_loss=0.5)
    # What a crash may leave behind is in nobody's way.
    (tmp_path / "adapters" / ".v0001.tmp").mkdir(parents=True)
    (tmp_path / "adapters" / "v0001").mkdir()
    folder = store.write(version, '{"r": 8}', b"weights")
    assert json.loads((folder / "adapter_config.json").read_text()) == {"r": 8}
    assert (folder / "adapter_model.safetensors").read_bytes() == b"weights"
    assert store.current() == version
    assert sorted(p.name for p in store.folder.iterdir()) == ["current.json", "v0001"]


def test_a_damaged_current_file_is_named(tmp_path: Path) -> None:
    store = AdapterStore(tmp_path)
    store.folder.mkdir()
    (store.folder / "current.json").write_text("{")
    with pytest.raises(ValueError, match="damaged"):
        store.current()
