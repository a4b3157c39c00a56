"""The dispatcher: exactly one terminal event (promise 1), one version per request (promise 2), honest stamps."""

from collections import Counter
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clif.config import Config, config_from_tree
from clif.control.dispatcher import Dispatcher, Hooks, RequestRecord
from clif.control.policy.routing import RoutingView
from clif.control.policy.view import ReplicaView
from clif.states import ReplicaState
from clif.types import FinishReason, Purpose, Request, Sampling, Slo, TokenEvent
from clif.wire.messages import Down, Submit


def make_config(**slo: Any) -> Config:
    return config_from_tree(
        {
            "model": {"path": "m", "max_context": 64},
            "engine": {"kv_tokens": 128},
            "train": {"enabled": False},
            "slo": slo,
        }
    )


class Rig:
    """A dispatcher with two replicas and everything it says on record."""

    def __init__(self, **slo: Any) -> None:
        self.ended: list[RequestRecord] = []
        self.sent: list[tuple[int, Down]] = []
        self.dead: set[int] = set()
        hooks = Hooks(finished=self.ended.append, dispatched=lambda *_: None)
        self.dispatcher = Dispatcher(make_config(**slo), self.send, hooks)

    def send(self, replica: int, message: Down) -> bool:
        self.sent.append((replica, message))
        return replica not in self.dead

    def view(self, max_batch: int = 2) -> RoutingView:
        views = []
        for number in (0, 1):
            count, reserved = self.dispatcher.held.load_of(number)
            state = ReplicaState.FAILED if number in self.dead else ReplicaState.SERVING
            views.append(
                ReplicaView(
                    number, state=state, outstanding=count, reserved=reserved, max_batch=max_batch, kv_tokens=128
                )
            )
        return RoutingView(views)

    def dispatch(self, now: float, max_batch: int = 2) -> None:
        self.dispatcher.dispatch(now, lambda: self.view(max_batch))

    def submitted_to(self, replica: int) -> list[int]:
        return [m.request.id for r, m in self.sent if r == replica and isinstance(m, Submit)]


def request(number: int, prompt: int = 4, max_tokens: int = 4, **slo: float) -> Request:
    return Request(id=number, prompt=tuple(range(prompt)), sampling=Sampling(max_tokens=max_tokens), slo=Slo(**slo))


def event(number: int, tokens: int = 1, finish: FinishReason | None = None, version: int = 0) -> TokenEvent:
    return TokenEvent(request_id=number, tokens=(7,) * tokens, finish=finish, version=version)


actions = st.one_of(
    st.tuples(st.just("submit"), st.integers(0, 70), st.integers(1, 8)),
    st.tuples(st.just("dispatch"), st.integers(1, 3), st.just(0)),
    st.tuples(st.just("tokens"), st.integers(0, 12), st.integers(0, 3)),
    st.tuples(st.just("version"), st.integers(0, 12), st.integers(0, 3)),
    st.tuples(st.just("finish"), st.integers(0, 12), st.integers(0, 3)),
    st.tuples(st.just("cancel"), st.integers(0, 12), st.just(0)),
    st.tuples(st.just("requeue"), st.integers(0, 1), st.just(0)),
)


@settings(max_examples=200, deadline=None)
@given(st.lists(actions, max_size=60), st.sampled_from(["serve", "reject"]))
def test_promise_1_every_accepted_request_gets_exactly_one_terminal_event(
    script: list[tuple[str, int, int]], late: str
) -> None:
    rig, count = Rig(late=late, deadline_ms=500.0), 0
    for now, (action, first, second) in enumerate(script):
        if action == "submit":
            rig.dispatcher.submit(now, request(count, first, second, deadline_s=5.0))
            count += 1
        elif action == "dispatch":
            rig.dispatch(now, first)
        elif action == "cancel":
            rig.dispatcher.cancel(now, first)
        elif action == "requeue":
            rig.dead.add(first)
            rig.dispatcher.requeue(now, first, "test")
        else:
            version = 1 if action == "version" else 0
            finish = FinishReason.STOP if action == "finish" else None
            # Both replicas speak of it, though at most one of them holds it.
            for replica in (0, 1):
                rig.dispatcher.on_event(now, replica, event(first, second, finish, version))
    rig.dispatcher.fail_all(1000.0, "the test is over")
    assert Counter(r.request.id for r in rig.ended) == Counter(range(count))
    assert all(r.finish is not None and r.finished_s is not None for r in rig.ended)
    assert rig.dispatcher.outstanding == rig.dispatcher.queued == 0
    assert rig.dispatcher.held.load_of(0) == rig.dispatcher.held.load_of(1) == (0, 0)


def test_promise_1_a_second_terminal_event_is_ignored_and_counted() -> None:
    rig = Rig()
    rig.dispatcher.submit(0.0, request(1))
    rig.dispatch(0.0)
    rig.dispatcher.on_event(1.0, 0, event(1, 1, FinishReason.STOP))
    rig.dispatcher.on_event(2.0, 0, event(1, 0, FinishReason.FAILED))
    assert [r.finish for r in rig.ended] == [FinishReason.STOP]
    assert rig.dispatcher.ignored_events == 1


def test_each_event_with_tokens_is_passed_on_once_and_before_the_end_of_its_request() -> None:
    seen: list[tuple[str, int]] = []
    hooks = Hooks(
        finished=lambda record: seen.append(("end", len(record.tokens))),
        dispatched=lambda *_: None,
        tokens=lambda record, event: seen.append(("tokens", len(event.tokens))),
    )
    rig = Rig()
    rig.dispatcher = Dispatcher(make_config(), rig.send, hooks)
    rig.dispatcher.submit(0.0, request(1))
    rig.dispatch(0.0)
    replica = rig.sent[-1][0]
    for now, step in ((1.0, event(1, tokens=1)), (2.0, event(1, tokens=2)), (3.0, event(1, 0, FinishReason.STOP))):
        rig.dispatcher.on_event(now, replica, step)
    rig.dispatcher.on_event(4.0, replica, event(1))
    assert seen == [("tokens", 1), ("tokens", 2), ("end", 3)], "what comes after the end is nobody's"


def test_a_terminal_event_without_tokens_need_not_name_the_version() -> None:
    rig = Rig()
    rig.dispatcher.submit(0.0, request(1))
    rig.dispatch(0.0)
    rig.dispatcher.on_event(1.0, 0, event(1, version=3))
    rig.dispatcher.on_event(2.0, 0, event(1, tokens=0, finish=FinishReason.STOP))
    assert rig.ended[0].finish is FinishReason.STOP


def test_stamps_and_intervals_come_from_the_callers_clock() -> None:
    rig = Rig()
    rig.dispatcher.submit(10.5, request(1), arrival_s=10.0)
    rig.dispatch(11.0)
    for now in (12.0, 13.0, 16.0):
        rig.dispatcher.on_event(now, 0, event(1))
    rig.dispatcher.on_event(17.0, 0, event(1, 0, FinishReason.LENGTH))
    (record,) = rig.ended
    assert (record.arrival_s, record.dispatched_s, record.first_token_s, record.finished_s) == (10.0, 11.0, 12.0, 17.0)
    assert (record.ttft_s, record.tpot_s, record.e2e_s) == (2.0, 2.0, 7.0)
    assert record.gaps_s == [1.0, 3.0]


@pytest.mark.parametrize(
    ("slo", "met"), [({}, True), ({"ttft_s": 1.0}, False), ({"tpot_s": 1.0, "deadline_s": 9.0}, True)]
)
def test_the_slo_is_met_only_if_every_promise_is(slo: dict[str, float], met: bool) -> None:
    rig = Rig()
    rig.dispatcher.submit(0.0, request(1, **slo))
    rig.dispatch(0.0)
    rig.dispatcher.on_event(2.0, 0, event(1))
    rig.dispatcher.on_event(3.0, 0, event(1, 1, FinishReason.STOP))
    assert rig.ended[0].slo_met is met


@pytest.mark.parametrize(("prompt", "max_tokens", "word"), [(0, 4, "empty"), (61, 4, "max_context")])
def test_bad_requests_are_rejected_at_the_door_with_a_sentence(prompt: int, max_tokens: int, word: str) -> None:
    rig = Rig()
    rig.dispatcher.submit(0.0, request(1, prompt, max_tokens))
    (record,) = rig.ended
    assert record.finish is FinishReason.REJECTED and word in record.detail and record.unservable
    assert not record.slo_met


def test_a_lost_replica_gives_back_all_that_it_held_in_order() -> None:
    rig = Rig()
    for number in (1, 2, 3, 4, 5):
        rig.dispatcher.submit(float(number), request(number))
    rig.dispatch(6.0)
    first = rig.submitted_to(0)
    rig.dispatcher.on_event(7.0, 0, event(first[0]))
    rig.dead.add(0)
    rig.dispatcher.requeue(8.0, 0, "killed")
    assert rig.ended == [] and rig.dispatcher.running == 0
    # They came before 5, so they go before 5.
    rig.dispatch(9.0, max_batch=4)
    assert rig.submitted_to(1)[-2:] == first
    # The dead replica's late words about requests that live elsewhere now mean nothing.
    rig.dispatcher.on_event(10.0, 0, event(first[1], finish=FinishReason.STOP))
    assert rig.ended == []


def moved_to_another_replica(tokens: int, version: int) -> Rig:
    """A request that replica 0 had answered in part when it failed; replica 1 has it now."""
    rig = Rig()
    rig.dispatcher.submit(0.0, request(1))
    rig.dispatch(1.0)
    rig.dispatcher.on_event(2.0, 0, event(1, tokens, version=version))
    rig.dead.add(0)
    rig.dispatcher.requeue(3.0, 0, "out of memory")
    rig.dispatch(4.0)
    return rig


def test_a_running_request_is_gone_on_with_where_its_replica_failed() -> None:
    rig = moved_to_another_replica(tokens=2, version=3)
    assert rig.sent[-1] == (1, Submit(request=request(1), output_ids=(7, 7), version=3))
    rig.dispatcher.on_event(5.0, 1, event(1, 2, FinishReason.LENGTH, version=3))
    (record,) = rig.ended
    assert (record.finish, record.version, record.tokens) == (FinishReason.LENGTH, 3, [7, 7, 7, 7])
    assert record.token_times == [2.0, 2.0, 5.0, 5.0] and record.first_token_s == 2.0


def test_promise_2_where_its_version_is_gone_the_answer_begins_anew_under_one_version() -> None:
    rig = moved_to_another_replica(tokens=2, version=3)
    rig.dispatcher.on_event(5.0, 1, event(1, 1, version=4))
    rig.dispatcher.on_event(6.0, 1, event(1, 1, FinishReason.STOP, version=4))
    (record,) = rig.ended
    assert (record.version, record.tokens, record.token_times) == (4, [7, 7], [5.0, 6.0])


def test_a_request_that_takes_down_every_replica_is_not_tried_for_ever() -> None:
    rig = Rig()
    rig.dispatcher.submit(0.0, request(1))
    for incarnation in range(3):
        rig.dispatch(float(incarnation))
        rig.dispatcher.requeue(incarnation + 0.5, rig.sent[-1][0], "illegal instruction")
    (record,) = rig.ended
    assert record.finish is FinishReason.FAILED
    assert record.detail.startswith("3 replicas were lost with it, the last one ") and "illegal" in record.detail


def test_requests_wait_in_order_while_there_is_no_room() -> None:
    rig = Rig()
    for number in range(6):
        rig.dispatcher.submit(0.0, request(number))
    rig.dispatch(0.0)
    assert rig.dispatcher.queued == 2 and rig.dispatcher.outstanding == 6
    rig.dispatcher.on_event(1.0, 0, event(rig.submitted_to(0)[0], finish=FinishReason.STOP))
    rig.dispatch(1.0)
    assert rig.submitted_to(0)[-1] == 4


def test_a_request_whose_replica_does_not_take_it_keeps_its_place() -> None:
    rig = Rig()
    rig.dispatcher.submit(0.0, request(1))
    view = rig.view()
    rig.dead.add(0)
    rig.dispatcher.dispatch(0.0, lambda: view)
    assert rig.dispatcher.queued == 1 and not rig.ended
    rig.dispatch(1.0)
    assert rig.submitted_to(1) == [1]


def test_waiting_counts_only_users_without_a_first_token() -> None:
    rig = Rig()
    rig.dispatcher.submit(0.0, Request(id=9, prompt=(1,), sampling=Sampling(), purpose=Purpose.PROBE))
    rig.dispatcher.submit(5.0, request(1))
    assert rig.dispatcher.oldest_wait_s(7.0) == 2.0
    rig.dispatch(7.0)
    for number in (9, 1):
        for replica in (0, 1):
            rig.dispatcher.on_event(7.0, replica, event(number))
    assert rig.dispatcher.oldest_wait_s(9.0) == 0.0


def test_an_id_in_use_is_refused() -> None:
    rig = Rig()
    rig.dispatcher.submit(0.0, request(1))
    with pytest.raises(ValueError, match="in use"):
        rig.dispatcher.submit(0.0, request(1))
