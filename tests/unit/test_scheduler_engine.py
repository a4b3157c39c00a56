"""Preemption and prefix reuse with a real model: the answers are those of an engine that needs neither (promise 2)."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from helpers import Rig, answer, make_rig, request

from clif.types import FinishReason, Request, TokenEvent

SYSTEM = list(range(30, 51))
SMALL, LARGE = {"kv_tokens": 256, "max_batch": 9}, {"kv_tokens": 2048, "max_batch": 9}


@pytest.fixture
def make(tiny_config):
    return lambda **engine: make_rig(f"random:{tiny_config}", engine=engine)


def crowd() -> list[Request]:
    greedy = [request(i, [60 + i, *range(7 * i, 9 * i + 3)], max_tokens=60 + i, ignore_eos=True) for i in range(6)]
    drawn = [
        request(i, [5, 6, i], max_tokens=63, temperature=0.9, top_p=0.95, seed=i, ignore_eos=True) for i in range(6, 9)
    ]
    return [r for pair in zip(greedy, [*drawn, *[None] * 3], strict=True) for r in pair if r is not None]


def answers(rig: Rig, requests: list[Request], promotions: dict[int, int], arrive: dict[int, int]) -> dict:
    """(version, tokens, end) of each request; promotions: step -> version, whose adapter is random and large."""
    serve, step = rig.engine.serve, 0

    def serve_and_promote():
        nonlocal step
        step += 1
        if step in promotions:
            rig.fill(promotions[step], seed=promotions[step])
        return serve()

    rig.engine.serve = serve_and_promote
    events = rig.run(requests, arrive)
    assert all(sum(e.finish is not None for e in got) == 1 and got[-1].finish for got in events.values())
    assert rig.engine.scheduler.pool.used_tokens == 0 and rig.slots.retiring == ()
    return {i: ({e.version for e in got}, answer(got), got[-1].finish) for i, got in events.items()}


@pytest.mark.parametrize("reuse", [True, False])
def test_answers_with_preemptions_are_those_without(make, reuse):
    """Greedy and drawn tokens: a request keeps its random numbers while it waits."""
    small, large = make(**SMALL, prefix_reuse=reuse), make(**LARGE, prefix_reuse=reuse)
    got = answers(small, crowd(), {}, {})
    assert got == answers(large, crowd(), {}, {})
    assert small.engine.scheduler.preemptions > 3 and large.engine.scheduler.preemptions == 0
    assert all(len(tokens) >= 60 and end is FinishReason.LENGTH for _, tokens, end in got.values())


def test_preempted_requests_stay_on_their_version_across_a_promotion(make):
    """Before the promotion all but the last three requests have begun, and some of them were preempted."""
    small, large = make(**SMALL), make(**LARGE)
    arrive = {6: 0, 7: 0, 8: 40, 4: 40, 5: 40}
    got = answers(small, crowd(), {30: 1}, arrive)
    assert small.engine.scheduler.preemptions > 0
    assert got == answers(large, crowd(), {30: 1}, arrive)
    assert {i: version for i, (version, _, _) in got.items()} == {i: {int(i in (8, 4, 5))} for i in range(9)}


def test_answers_with_prefix_reuse_are_those_without_across_a_promotion(make):
    requests = [request(i, [*SYSTEM, 7 + i % 3, *[9] * (i % 4)], max_tokens=20, ignore_eos=True) for i in range(10)]
    arrive = {i: 4 * i for i in range(10)}
    on, off = make(), make(prefix_reuse=False)
    got = answers(on, requests, {18: 1, 30: 2}, arrive)
    assert got == answers(off, requests, {18: 1, 30: 2}, arrive)
    assert [min(got[i][0]) for i in range(10)] == [0] * 5 + [1] * 3 + [2] * 2
    # 20 tokens of the beginning are 5 full blocks: found by all but the first request of each version, at least.
    assert on.engine.scheduler.reused_tokens >= 7 * 20 and off.engine.scheduler.reused_tokens == 0
    assert got[0][1] != got[6][1] != got[9][1], "the versions do answer differently"


def serve_until(rig: Rig, done: Callable[[], bool], steps: int = 1000) -> list[TokenEvent]:
    """All events of the steps until then."""
    events: list[TokenEvent] = []
    for _ in range(steps):
        if done():
            return events
        events += rig.engine.serve()
    raise AssertionError(f"not done after {steps} steps")


def test_cancelled_while_preempted(make):
    rig = make(**SMALL)
    scheduler = rig.engine.scheduler
    for r in crowd():
        scheduler.add(r, 0.0)
    serve_until(rig, lambda: scheduler.preemptions > 0)
    victim = scheduler.waiting[0]
    assert victim.last_s is not None
    event = scheduler.cancel(victim.request.id)
    assert event is not None and event.finish is FinishReason.CANCELLED and event.tokens == ()
    later = serve_until(rig, lambda: not rig.engine.serving)
    assert len(later) > 60 and all(e.request_id != victim.request.id for e in later)
    rig.fill(1, seed=1)
    assert scheduler.pool.used_tokens == 0 and rig.slots.retiring == (), "nobody reads version 0 any more"
