"""The training half on a device that is given work and does it later: nothing waits, and no second is lost."""

from __future__ import annotations

import itertools

import h5py
import pytest
from helpers import request

from clif.config import EngineConfig, MetricsConfig, SloConfig
from clif.engine.build import make_strategy
from clif.engine.coserving.strategy import StepView
from clif.engine.job_queue import JobQueue
from clif.engine.jobs import Job, Slice, SliceKind
from clif.engine.scheduler import Scheduler, Sequence
from clif.engine.step_record import StepRecord
from clif.engine.streams import OneStream
from clif.engine.train_stream import TrainStream
from clif.engine.training_half import TrainingHalf
from clif.replica.records import RankRecords
from clif.training.trainer import StepResult

SECONDS = 0.25
SERVING = StepView(0.0, 1, 2, (Sequence(request(7, [1, 2]), 0.0, [1, 2, 3], last_s=0.0),))


class Settings:
    """As much of a configuration as a strategy reads."""

    class run:
        training_share = 0.25

    engine, slo = EngineConfig(slice_ms=20), SloConfig()


class Device:
    """Does what it was given when it is told to, SECONDS each."""

    def __init__(self) -> None:
        self.given: list[Later] = []

    def __call__(self, clock) -> Later:
        later = Later()
        self.given.append(later)
        return later

    def do(self, count: int = 1) -> None:
        for later in [one for one in self.given if one.stopped and not one.is_done][:count]:
            later.is_done = True


class Later:
    stopped = is_done = False

    def stop(self) -> None:
        self.stopped = True

    def done(self) -> bool:
        return self.is_done

    def wait(self) -> None:
        raise AssertionError("nothing waits for the device")

    def seconds(self) -> float:
        assert self.is_done
        return SECONDS


def half(*kinds: SliceKind, ahead: int = 2, mode: str = "interleaved"):
    """A training half with a job of these slices, four units each, and the device that does them."""
    device, done = Device(), []

    def work():
        for kind in kinds:
            yield Slice(kind, 10, 4, done.append, least=4)

    made = TrainingHalf(make_strategy(mode, Settings), JobQueue(), stopwatch=device, ahead=ahead)
    made.jobs.append(Job("round", work()))
    return made, device, done


def step(made: TrainingHalf, serving: bool = False) -> StepRecord:
    made.collect()
    plan = made.plan(SERVING, serving, itertools.count().__next__)
    record = made.begin(plan)
    made.learn(plan, record, itertools.count().__next__)
    return record


def test_a_slice_is_noted_in_the_step_that_finds_it_done():
    made, device, done = half(SliceKind.FORWARD, SliceKind.BACKWARD)
    first = step(made)
    assert done == [4] and not first.train_s and not made.strategy.costs.slices
    device.do()
    second = step(made)
    assert done == [4, 4]
    assert (second.train_kind, second.train_s, second.gap_s) == ("forward", SECONDS, SECONDS)
    assert made.strategy.costs.slices[SliceKind.FORWARD].seen == 1
    device.do()
    made.note_done(second)
    assert (second.train_kind, second.gap_s) == ("backward", 2 * SECONDS), "or when the step's tokens have been read"


def test_while_nothing_is_served_the_device_has_as_many_slices_as_it_may_and_no_more():
    """A request that arrives waits for all of them: together they are as long as one may be."""
    made, device, done = half(*[SliceKind.FORWARD] * 9)
    for _ in range(5):
        step(made)
    assert len(done) == 2
    device.do()
    for _ in range(5):
        step(made)
    assert len(done) == 3


def test_the_slices_that_are_under_way_share_the_length_that_one_may_have():
    """20 ms, as the settings have it."""
    units = []
    for ahead in (1, 2):
        made, _, done = half(ahead=ahead)

        def work(done=done):
            yield Slice(SliceKind.FORWARD, 10, 400, done.append)

        made.jobs.append(Job("round", work()))
        for size in range(1, 300):
            made.strategy.costs.observe_slice(SliceKind.FORWARD, 10, size, 0.001 * size)
        step(made)
        units += done
    assert units == [pytest.approx(20, abs=2), pytest.approx(10, abs=1)]


def test_a_request_that_arrives_while_a_slice_is_under_way_may_have_waited_for_it():
    made, device, _ = half(SliceKind.FORWARD)
    step(made)
    assert made.holds_up
    step(made)
    assert made.holds_up, "this step had none, and the device still has the one before"
    device.do()
    step(made)
    assert not made.holds_up


def on_a_stream(*kinds: SliceKind):
    """The same with a stream for slices of their own."""
    made, device, done = half(*kinds, mode="concurrent")
    made.jobs.thread = TrainStream(OneStream(), device)
    return made, device, done


@pytest.mark.parametrize("serving", [False, True])
def test_a_slice_on_its_own_stream_is_noted_once_it_is_done_and_no_step_is_longer_for_it(serving):
    made, device, done = on_a_stream(SliceKind.FORWARD, SliceKind.BACKWARD)
    for _ in range(3):
        record = step(made, serving)
        assert done == [4] and made.jobs.under_way and not record.train_s and not made.holds_up
    device.do()
    record = step(made, serving)
    assert done == [4, 4] and made.jobs.under_way
    assert (record.train_kind, record.train_s, record.gap_s) == ("forward", SECONDS, 0.0)


def test_an_error_of_a_launch_is_the_jobs_and_not_the_steps_that_run_beside_it():
    made, device, _ = on_a_stream()

    def fail(units):
        raise RuntimeError("out of memory")

    def work():
        yield Slice(SliceKind.FORWARD, 10, 4, fail, least=4)

    made.jobs.append(Job("round", work()))
    step(made, serving=True)
    assert made.jobs.under_way
    device.do()
    with pytest.raises(RuntimeError, match="out of memory"):
        step(made, serving=True)
    made.jobs.drop("round")
    assert not made.jobs and not made.jobs.under_way


def test_a_time_slice_is_charged_when_its_seconds_are_known():
    made, device, done = half(*[SliceKind.FORWARD, SliceKind.OPTIMIZER] * 2, mode="time_slice")
    step(made, serving=True)
    assert len(done) == 2 and made.strategy._credit_s == 0.0
    device.do(2)
    step(made, serving=True)
    assert made.strategy._credit_s == pytest.approx(-2 * SECONDS * 0.75)


def test_an_optimizer_step_has_the_seconds_of_its_own_slices_and_of_no_other(tmp_path):
    """Also where the slices of the next one were launched before the last of this one was done."""
    kinds = [SliceKind.FORWARD, SliceKind.OPTIMIZER] * 2
    made, device, _ = half(*kinds)
    records = RankRecords(tmp_path, 0, MetricsConfig(), {})
    scheduler = Scheduler.__new__(Scheduler)
    scheduler.running, scheduler.waiting = [], []
    scheduler.preemptions = scheduler.reused_tokens = 0
    scheduler.pool = type("Pool", (), {"used_tokens": 0})

    class Plan:
        round_id = 1

    for number in range(12):
        before = made.jobs.upcoming
        record = step(made)
        if before is not made.jobs.upcoming and before.kind is SliceKind.OPTIMIZER:
            records.train_step(Plan, StepResult(number, 1, 1, 1, 0.0, 0.0, 0.1, True, None))
        records.engine_step(number, record, scheduler)
        if number % 3 == 2:
            device.do(2)
    records.close()
    with h5py.File(tmp_path / "rank-00000.h5") as file:
        assert [row["seconds"] for row in file["train_steps"][:]] == [2 * SECONDS, 2 * SECONDS]
        assert [row["train_kind"] for row in file["ticks"][:]] == [b"optimizer", b"optimizer"]
