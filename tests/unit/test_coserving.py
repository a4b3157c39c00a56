"""Promise 5 in the engine: neither side changes what the other computes, and serving never waits for long."""

from __future__ import annotations

import itertools
import threading
import time
from functools import partial

import h5py
import msgspec
import numpy as np
import pytest
import torch
from helpers import answer, finish, make_rig, random_state, request

from clif.config import ConfigError, MetricsConfig, TrainConfig
from clif.engine.build import make_strategy
from clif.engine.coserving.backlog import NO_BACKLOG, STALE_S, Backlog
from clif.engine.jobs import Job, Slice
from clif.engine.step_record import StepRecord
from clif.engine.stopwatch import HostTiming
from clif.engine.streams import OneStream
from clif.engine.train_stream import TrainStream
from clif.engine.train_thread import TrainThread
from clif.models.dual_linear import SHADOW
from clif.replica.records import RankRecords
from clif.replica.replica import Replica
from clif.training.passes import Pass, pack
from clif.training.trainer import ShadowTrainer
from clif.types import Regime, SlackLimit, TrainingSlack, TrainSample, Waiting
from clif.wire import messages as m

SAMPLES = [
    TrainSample(id=0, ids=tuple(range(5, 25)), target_start=11),
    TrainSample(id=1, ids=tuple(range(40, 49)), target_start=3),
    TrainSample(id=2, ids=tuple(range(90, 140)), target_start=30),
    TrainSample(id=3, ids=(7, 8, 9), target_start=2),
]
REQUESTS = [([3, 4, 5], 24), (list(range(60, 100)), 18), ([200, 17], 30), (list(range(9, 40)), 12)]


class Forever:
    """A clock that stands still: every promise has all its time left."""

    def __call__(self) -> float:
        return 0.0


def build(tiny_config, coserving="interleaved", **engine):
    rig = make_rig(f"random:{tiny_config}", engine=engine)
    rig.engine.training_half.strategy = make_strategy(coserving, rig.config)
    rig.engine.clock = Forever()
    rig.fill(1, seed=8)
    rig.bank.set_shadow(random_state(rig.bank, 5))
    return rig


def trainer_for(rig) -> ShadowTrainer:
    return ShadowTrainer(rig.train_runner, rig.bank, SAMPLES, TrainConfig(warmup_steps=0, clip_norm=1e9))


def submit(rig) -> None:
    """Requests on the base, on version 1 and, after a promotion, on version 2: rows of three kinds."""
    for i, (prompt, tokens) in enumerate(REQUESTS):
        rig.engine.scheduler.add(request(i, prompt, max_tokens=tokens, ignore_eos=True), 0.0)


def step(rig, got) -> None:
    for event in rig.engine.step():
        got.setdefault(event.request_id, []).append(event)


def serve_alone(tiny_config):
    rig = build(tiny_config)
    submit(rig)
    got = {}
    while rig.engine.serving:
        step(rig, got)
    return {i: answer(events) for i, events in got.items()}


def gradient_alone(tiny_config):
    rig = build(tiny_config)
    finish(trainer_for(rig).step(4, 1))
    return rig.bank.gradient.clone()


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize(
    ("coserving", "thread"),
    [
        ("interleaved", None),
        ("fused", None),
        ("concurrent", partial(TrainThread, 1)),
        ("concurrent", partial(TrainStream, OneStream(), HostTiming)),
    ],
    ids=["interleaved", "fused", "on a thread", "on a stream"],
)
def test_serving_and_training_together_compute_what_each_computes_alone(tiny_config, coserving, thread, overlap):
    rig = build(tiny_config, coserving, overlap=overlap)
    rig.engine.jobs.thread = thread and thread()
    rig.engine.jobs.append(Job("step", trainer_for(rig).step(4, 1)))
    submit(rig)
    got, regimes = {}, set()
    while rig.engine.serving or rig.engine.jobs:
        step(rig, got)
        regimes.add(rig.engine.record.regime)
    assert {i: answer(events) for i, events in got.items()} == serve_alone(tiny_config)
    expected = gradient_alone(tiny_config)
    assert (rig.bank.gradient - expected).norm() <= 1e-5 * expected.norm()
    if coserving != "interleaved":
        assert coserving in regimes, "it must have happened, or the test says nothing"


def test_a_forward_may_join_a_step_at_any_layer(tiny_config):
    expected = gradient_alone(tiny_config)
    rig = build(tiny_config)
    for joins in range(rig.runner.stack.num_layers):
        rig.bank.gradient.zero_()
        run = Pass(rig.runner.stack, pack(SAMPLES), SHADOW, rig.train_runner.activations)
        run.forward(joins)
        rig.engine.scheduler.add(request(joins, [5, 6, 7], max_tokens=1), 0.0)
        rig.runner.forward(rig.runner.fill(chunks := rig.engine.scheduler.schedule()), run)
        rig.engine.scheduler.settle(chunks, [1] * len(chunks), 0.0)
        run.head(run.targets.left, sum(s.targets for s in SAMPLES))
        run.backward(len(run.cuts))
        assert (rig.bank.gradient - expected).norm() <= 1e-5 * expected.norm(), joins


def test_rows_that_serve_leave_nothing_in_the_graph(tiny_config):
    """What autograd keeps of a fused step is what it keeps of the training rows alone."""

    def kept(served: int) -> int:
        rig, size = build(tiny_config), 0

        def note(tensor):
            nonlocal size
            size += tensor.numel() * tensor.element_size()
            return tensor

        run = Pass(rig.runner.stack, pack(SAMPLES), SHADOW, rig.train_runner.activations)
        with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
            if served:
                rig.engine.scheduler.add(request(0, [5] * served, max_tokens=2), 0.0)
                rig.runner.forward(rig.runner.fill(rig.engine.scheduler.schedule()), run)
            else:
                run.forward(run.left)
        return size

    assert kept(20) == kept(3) == kept(0) > 0


@pytest.mark.parametrize("kept_layers", [0, 1, 2])
def test_layers_beyond_the_budget_are_computed_again_with_the_same_gradients(tiny_config, kept_layers):
    expected = gradient_alone(tiny_config)
    rig = build(tiny_config)
    keep, lengths = rig.train_runner.activations, [len(s.ids) for s in SAMPLES]
    room = sum(lengths) * keep.entry * keep.layers + (kept_layers + 1) * keep.of_layer(lengths)
    rig.train_runner.activations = type(keep)(room, keep.layers, keep.entry, keep.layer, keep.square)
    assert rig.train_runner.activations.kept(lengths) == kept_layers < keep.layers
    finish(trainer_for(rig).step(4, 1))
    assert (rig.bank.gradient - expected).norm() <= 1e-5 * expected.norm()


def test_activations_never_exceed_their_budget(tiny_config):
    """Counted by storage, over a whole step whose samples do not fit one pass."""
    rig = build(tiny_config)
    keep = rig.train_runner.activations
    longest = max(len(s.ids) for s in SAMPLES)
    budget = longest * keep.entry * keep.layers + 2 * keep.of_layer([longest])
    rig.train_runner.activations = type(keep)(budget, keep.layers, keep.entry, keep.layer, keep.square)
    linears = rig.runner.stack.linears
    held = [t for one in linears for t in (*one.base.tensors, one.lora.compute_a, one.lora.compute_b)]
    frozen = {t.untyped_storage().data_ptr() for t in held}
    frozen |= {p.untyped_storage().data_ptr() for p in rig.loaded.model.parameters()}
    live: dict[int, int] = {}
    most = 0

    class Held:
        def __init__(self, tensor):
            nonlocal most
            self.tensor, storage = tensor, tensor.untyped_storage()
            self.pointer = storage.data_ptr()
            if self.pointer not in frozen:
                live[self.pointer] = storage.nbytes()
            most = max(most, sum(live.values()))

        def __del__(self):
            live.pop(self.pointer, None)

    with torch.autograd.graph.saved_tensors_hooks(Held, lambda held: held.tensor):
        finish(trainer_for(rig).step(4, 1))
    assert 0 < most <= budget
    with pytest.raises(ConfigError, match=r"engine\.activation_mib"):
        rig.train_runner.check_samples(longest * 4)


def test_a_burst_in_the_middle_of_a_backward_waits_for_one_slice(tiny_config):
    rig = build(tiny_config)
    rig.engine.jobs.append(Job("step", trainer_for(rig).step(4, 1)))
    while rig.engine.jobs[0].upcoming.kind != "backward":
        rig.engine.step()
    rig.engine.step()
    submit(rig)
    steps, slices, got = 0, [], {}
    while rig.engine.serving:
        step(rig, got)
        steps += 1
        slices.append(rig.engine.record.train_kind)
    assert got[0][0].tokens and steps > 1
    assert slices[0] == "backward", "it goes on between two steps, a layer at a time"
    assert {i: answer(events) for i, events in got.items()} == serve_alone(tiny_config)


def test_a_request_that_arrives_waits_for_one_slice_at_most(tiny_config):
    """It may have waited for the slice of the step in which it arrived: the next step has none, the one after has."""
    rig = build(tiny_config)
    rig.engine.clock = itertools.count(0, 1e-4).__next__
    rig.engine.jobs.append(Job("step", trainer_for(rig).step(4, 1)))
    submit(rig)
    rig.engine.step()
    assert rig.engine.record.train_kind == "forward"
    late = [request(9, [1, 2, 3])]
    plan = rig.engine.plan(late)
    assert (plan.units, plan.slack.limit, plan.slack.request) == (0, SlackLimit.FIRST_TOKEN, 9)
    rig.engine.step(plan)
    assert not rig.engine.record.train_kind and rig.engine.record.decode_rows
    assert rig.engine.plan(late).units > 0, "many arrivals do not stop training for ever"


def test_prompts_that_arrive_with_a_step_are_rows_of_it_when_it_is_planned(tiny_config):
    """A forward that fits beside answers does not fit beside a long prompt as well."""
    rig = build(tiny_config, "fused", max_prefill_tokens=500)
    for rows in range(1, 200):
        rig.engine.cost_model.observe_step(rows, 0, 0.001 * rows)
        rig.engine.cost_model.observe_step(rows, 0, 0.001 * rows, Regime.FUSED)
    rig.engine.jobs.append(Job("step", trainer_for(rig).step(4, 1)))
    rig.engine.scheduler.add(request(0, [3, 4, 5], max_tokens=9), 0.0)
    rig.engine.serve()
    assert rig.engine.plan().fuse
    plan = rig.engine.plan([request(1, [7] * 200)])
    assert not plan.fuse and plan.slack.limit is SlackLimit.NEXT_TOKEN, "the reason is kept"


def test_what_was_planned_of_a_slice_that_is_gone_is_not_done_to_another(tiny_config):
    rig = build(tiny_config)
    rig.engine.jobs.append(Job("round", trainer_for(rig).step(4, 1)))
    plan = rig.engine.plan()
    assert plan.units > 0 and plan.packs
    rig.engine.jobs.drop("round")
    rig.engine.jobs.append(Job("evaluate", rig.train_runner.loss(SAMPLES, None)))
    upcoming = rig.engine.jobs.upcoming
    rig.engine.step(plan)
    assert rig.engine.jobs.upcoming is upcoming and not rig.engine.record.train_kind


def test_training_stands_still_when_a_burst_leaves_no_slack_and_comes_back_after_it(tiny_config):
    rig = build(tiny_config)
    rig.engine.jobs.append(Job("step", trainer_for(rig).step(4, 1)))
    for layers in range(1, 60):
        rig.engine.cost_model.observe_step(layers, 0, 0.15)
        rig.engine.cost_model.observe_slice("forward", 82, layers, 0.1 * layers)
    submit(rig)
    got = {event.request_id: [event] for event in rig.engine.serve()}
    step(rig, got)
    assert got and not rig.engine.record.train_s, "a slice of 0.1 s and a step of 0.15 s do not fit 0.2 s less 30 %"
    slack = rig.engine.record.slack
    assert slack.seconds < 0 and slack.limit is SlackLimit.NEXT_TOKEN and slack.request in got, "the reason is kept"
    while rig.engine.serving:
        step(rig, got)
    rig.engine.step()
    assert rig.engine.record.train_s >= 0 and rig.engine.record.train_kind == "forward"


@pytest.mark.parametrize("coserving", ["fused", "concurrent"])
def test_an_error_in_training_costs_the_job_and_no_token(tiny_config, coserving):
    rig = build(tiny_config, coserving)
    if coserving == "concurrent":
        rig.engine.jobs.thread = TrainThread(1)

    class Broken:
        at = 0

        def enter(self):
            raise RuntimeError("out of memory")

    def work():
        def fail(units):
            raise RuntimeError("out of memory")

        yield Slice("forward", 4, 2, fail, fused_pass=Broken())

    rig.engine.jobs.append(Job("step", work()))
    submit(rig)
    got, errors = {}, 0
    while rig.engine.serving:
        try:
            step(rig, got)
        except RuntimeError as error:
            assert "out of memory" in str(error)
            errors += 1
            rig.engine.jobs.drop("step")
    assert errors == 1
    assert {i: answer(events) for i, events in got.items()} == serve_alone(tiny_config)


def test_tokens_flow_while_a_slice_beside_them_takes_its_time(tiny_config):
    """A slice that does not end before requests do: they are answered all the same."""
    rig = build(tiny_config, "concurrent")
    rig.engine.jobs.thread = TrainThread(1)
    release = threading.Event()

    def work():
        yield Slice("forward", 4, 2, lambda units: release.wait())

    rig.engine.jobs.append(Job("step", work()))
    submit(rig)
    got = {}
    while rig.engine.serving:
        step(rig, got)
        assert rig.engine.training
    release.set()
    deadline = time.monotonic() + 10
    while rig.engine.jobs and time.monotonic() < deadline:
        step(rig, got)
    assert not rig.engine.jobs
    assert {i: answer(events) for i, events in got.items()} == serve_alone(tiny_config)


def test_prefixes_of_the_former_version_are_not_read_after_a_promotion(tiny_config):
    """With and without reuse: the same answers, on the old version and on the new one."""
    prompt = list(range(50, 80))

    def answers(reuse: bool):
        rig = build(tiny_config, prefix_reuse=reuse)
        got = [answer(rig.run([request(0, prompt, max_tokens=8, ignore_eos=True)])[0])]
        got.append(answer(rig.run([request(1, prompt, max_tokens=8, ignore_eos=True)])[1]))
        rig.fill(2, seed=9)
        got.append(answer(rig.run([request(2, prompt, max_tokens=8, ignore_eos=True)])[2]))
        return got, rig.engine.scheduler.reused_tokens

    with_reuse, reused = answers(True)
    without, none = answers(False)
    assert with_reuse == without and none == 0
    assert reused == 28, "all full blocks of 4 but for the last token's, once: never across the promotion"
    assert with_reuse[0] == with_reuse[1] != with_reuse[2]


def test_nothing_is_trained_while_every_place_is_taken_and_who_waits_is_not_known(tiny_config):
    """Unless it is known whether somebody waits at the dispatcher then, whose first token has no cost here."""
    rig = build(tiny_config, max_batch=len(REQUESTS))
    rig.engine.backlog = None
    rig.engine.jobs.append(Job("step", trainer_for(rig).step(4, 1)))
    submit(rig)
    full, got = [], {}
    while rig.engine.serving:
        taken = len(rig.engine.scheduler.running) + len(rig.engine.scheduler.waiting) == len(REQUESTS)
        step(rig, got)
        if taken and len(rig.engine.scheduler.running) == len(REQUESTS):
            full.append(rig.engine.record.train_s)
            assert rig.engine.record.slack.limit is SlackLimit.FULL
    assert full and not any(full)
    assert not rig.engine.jobs or rig.engine.jobs[0].upcoming.kind != "forward", "it went on when places were free"


def test_a_full_batch_trains_while_nobody_waits_and_stops_for_one_who_does(tiny_config):
    """Answers are those of serving alone."""
    rig = build(tiny_config, max_batch=len(REQUESTS))
    rig.engine.jobs.append(Job("step", trainer_for(rig).step(4, 1)))
    submit(rig)
    got, trained = {}, []
    for waits in (False, True):
        rig.engine.backlog = Backlog(1, (Waiting(99, 60.0, 4, 4),), heard_s=0.0) if waits else NO_BACKLOG
        for _ in range(3):
            step(rig, got)
            assert len(rig.engine.scheduler.running) == len(REQUESTS), "it was full all the time"
            trained.append(rig.engine.record.train_kind)
    assert all(trained[:3]) and not any(trained[3:])
    assert rig.engine.record.slack.reason.startswith("request 99 waits at the dispatcher")
    while rig.engine.serving:
        step(rig, got)
    assert {i: answer(events) for i, events in got.items()} == serve_alone(tiny_config)


def test_what_a_replica_is_told_of_the_backlog_counts_for_the_plan_of_the_same_step(tiny_config):
    rig = build(tiny_config, max_batch=len(REQUESTS))
    rig.engine.jobs.append(Job("step", trainer_for(rig).step(4, 1)))
    submit(rig)
    replica = Replica(rig.config, 0, rig.engine, member=None, records=None, send=print)

    def plan(*orders: m.Down):
        return replica._agree([msgspec.msgpack.encode(order) for order in orders])[1]

    assert plan().slack.limit is SlackLimit.FULL, "nothing was told yet"
    assert plan(m.Backlog()).units > 0
    overdue = plan(m.Backlog(waiting=1, oldest=(Waiting(99, 60.0, 4, 4),)))
    assert (overdue.units, overdue.slack.limit, overdue.slack.request) == (0, SlackLimit.QUEUED, 99)
    rig.engine.clock = lambda: STALE_S + 1
    assert plan().slack.limit is SlackLimit.FULL, "it was told too long ago"


@pytest.mark.parametrize("breaks", [False, True])
def test_a_job_given_up_beside_serving_takes_its_slice_along_and_no_other_job(tiny_config, breaks):
    rig = build(tiny_config, "concurrent")
    rig.engine.jobs.thread = TrainThread(1)
    release, done = threading.Event(), []

    def work(name):
        def slow(units):
            release.wait(10)
            if breaks and name == "dropped":
                raise RuntimeError("out of memory")
            done.append(name)

        yield Slice("forward", 4, 1, slow)

    for name, given_up in (("kept", "dropped"), ("dropped", "dropped")):
        release.clear()
        rig.engine.jobs.append(Job(name, work(name)))
        rig.engine.scheduler.add(request(len(done), [3, 4, 5], max_tokens=30, ignore_eos=True), 0.0)
        rig.engine.step()
        assert rig.engine.training
        release.set()
        rig.engine.jobs.drop(given_up)
        while rig.engine.serving or rig.engine.jobs:
            step(rig, {})
    assert done == ["kept"] if breaks else done == ["kept", "dropped"], "each slice was done once"


def test_the_reason_of_the_decision_is_in_the_table_ticks(tiny_config, tmp_path):
    rig = build(tiny_config)
    records = RankRecords(tmp_path, 0, MetricsConfig(), {})
    slack = TrainingSlack(0.012, SlackLimit.DEADLINE, 3)
    for number, decided in enumerate((slack, None)):
        records.engine_step(number, StepRecord(serve_s=0.1, slack=decided), rig.engine.scheduler)
    records.close()
    with h5py.File(tmp_path / "rank-00000.h5") as file:
        with_slack, without = file["ticks"][:]
    assert (with_slack["slack_s"], with_slack["slack_limit"], with_slack["slack_request"]) == (0.012, b"deadline", 3)
    assert np.isnan(without["slack_s"]) and (without["slack_limit"], without["slack_request"]) == (b"", -1)


def test_time_slices_do_a_whole_optimizer_step_between_two_serving_steps(tiny_config):
    rig = build(tiny_config, "time_slice")
    trainer = trainer_for(rig)
    rig.engine.jobs.append(Job("steps", trainer.step(4, 1)))
    submit(rig)
    got = {}
    step(rig, got)
    assert got and trainer.steps == 1 and rig.engine.record.train_kind == "optimizer"
    assert rig.engine.record.slack.limit is SlackLimit.SHARE
