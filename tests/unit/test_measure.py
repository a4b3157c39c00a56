"""The measurement that decides how a replica co-serves: what it decides, what it counts, and what it leaves behind."""

from __future__ import annotations

import itertools
import logging

import pytest
import torch
from helpers import answer, finish, make_rig, request

from clif.config import EngineConfig, config_from_tree
from clif.distributed.collectives import TpGroup
from clif.engine import build
from clif.engine.build import choose_coserving, is_measured
from clif.engine.coserving.measure import Load, Measured, Progress, Trial, Work, choose_by
from clif.engine.jobs import WAIT, Job, Slice, SliceKind
from clif.engine.stopwatch import HostTiming
from clif.engine.streams import OneStream
from clif.engine.train_stream import TrainStream
from clif.replica.build import choose_by_trial
from clif.training.trainer import ShadowTrainer
from clif.types import CoservingMode, TrainSample

INTERLEAVED, CONCURRENT, FUSED = CoservingMode.INTERLEAVED, CoservingMode.CONCURRENT, CoservingMode.FUSED
SAMPLES = [TrainSample(id=i, ids=tuple(range(5, 35)), target_start=11) for i in range(4)]


def measured(**trials: tuple[float, float, float]) -> Measured:
    """Serving and training of each mode in tokens/s, of 1000 and 100 alone, and the longest gap."""
    return Measured(Trial(1000, 100, 0.01), {CoservingMode(mode): Trial(*trial) for mode, trial in trials.items()})


def test_the_mode_in_which_both_lose_least_is_chosen_and_all_figures_are_told():
    mode, why = choose_by(
        measured(interleaved=(700, 30, 0.02), concurrent=(900, 60, 0.02), fused=(950, 40, 0.03)), 0.05
    )
    assert mode is CONCURRENT
    assert "interleaved 1.00 with gaps up to 20 ms" in why and "concurrent 1.50" in why and "fused 1.35" in why


def test_a_mode_whose_gaps_are_longer_than_promised_is_not_chosen_unless_all_are():
    trials = {"interleaved": (700, 30, 0.04), "concurrent": (900, 60, 0.07)}
    assert choose_by(measured(**trials), 0.05)[0] is INTERLEAVED
    assert choose_by(measured(**trials), 0.01)[0] is INTERLEAVED, "the shortest"


def test_a_simpler_mode_stays_unless_another_is_clearly_better():
    assert choose_by(measured(interleaved=(900, 50, 0.02), concurrent=(910, 50, 0.02)), 0.05)[0] is INTERLEAVED
    assert choose_by(measured(interleaved=(900, 50, 0.02), concurrent=(990, 50, 0.02)), 0.05)[0] is CONCURRENT


def test_nothing_is_divided_by_what_was_not_reached():
    none = Measured(Trial(), {INTERLEAVED: Trial(), FUSED: Trial()})
    assert choose_by(none, 0.05)[0] is INTERLEAVED


@pytest.mark.parametrize(("kv_tokens", "context"), [(8192, 4096), (64, 4096), (8192, 40), (16, 16)])
def test_the_made_up_requests_fit_the_cache_and_the_context_all_at_a_time(kv_tokens, context):
    load = Load.of(EngineConfig(kv_tokens=kv_tokens, max_batch=64), context)
    one = load.one(3)
    assert load.requests >= 1 and one.sampling.max_tokens >= 1
    if kv_tokens > 16:
        assert load.requests * one.max_total_tokens <= kv_tokens and one.max_total_tokens <= context


def test_training_is_counted_by_layers_wherever_they_are_computed():
    """Of 4 layers and 10 tokens: half of the forward by its own work, the rest along with a step; then the backward."""
    done = []

    def work():
        yield Slice(SliceKind.FORWARD, 10, 4, done.append)
        yield Slice(SliceKind.FORWARD, 10, 2, done.append, fused_pass=object())
        yield Slice(SliceKind.HEAD, 1, 30, done.append)
        yield Slice(SliceKind.BACKWARD, 10, 4, done.append)

    progress = Progress(Work(work, tokens=10, layers=4))
    job = Job("trial", progress.repeated())
    job.run(2)
    assert progress.tokens == 2.5
    job.resume(None)
    job.run()
    assert progress.tokens == 5 and progress.repeats == 0
    job.run()
    assert progress.tokens == 10 and progress.repeats == 1 and done == [2, 30, 4]
    job.close()


def test_rows_that_pad_a_pass_are_no_tokens():
    """A pass of 10 tokens in 16 rows: half of its layers are half of its tokens, once a whole one was seen."""

    def work():
        yield Slice(SliceKind.FORWARD, 16, 4, lambda units: None)
        yield Slice(SliceKind.BACKWARD, 16, 4, lambda units: None)

    progress = Progress(Work(work, tokens=10, layers=4))
    job = Job("trial", progress.repeated())
    for expected in (8, 10, 15, 20):
        job.run()
        assert progress.tokens == expected


def test_counted_work_that_waits_is_known_to_wait():
    """The engine asks again in each step. It takes a copy for a slice without units, which never runs."""

    def work():
        yield WAIT
        yield Slice(SliceKind.OPTIMIZER, 1, 1, lambda units: None)

    job = Job("trial", Progress(Work(work, tokens=10, layers=4)).repeated())
    assert job.upcoming is WAIT
    job.run(1)
    assert job.upcoming.kind is SliceKind.OPTIMIZER


def test_a_replica_measures_before_it_serves_and_begins_as_if_it_had_not(tiny_config, monkeypatch, caplog):
    """The clock is made up; engine, requests and training are real."""
    threads = []

    def thread(device, streams, _):
        threads.append(TrainStream(OneStream(), HostTiming))
        return threads[-1]

    monkeypatch.setattr(build, "choose_thread", thread)
    rigs = [make_rig(f"random:{tiny_config}") for _ in range(2)]
    rig = rigs[0]
    rig.engine.clock = itertools.count(0, 4e-3).__next__
    bank = rig.bank
    before = [bank.shadow.detach().clone(), *(layer.a.clone() for layer in bank.layers)]
    with caplog.at_level(logging.INFO):
        choose_by_trial(rig.engine, rig.train_runner, rig.config, SAMPLES)
    (line,) = [record.getMessage() for record in caplog.records if "measured" in record.getMessage()]
    assert all(f"{mode} " in line for mode in (INTERLEAVED, CONCURRENT, FUSED))
    assert len(threads) >= 1 and not any(one.poll(wait=True) for one in threads)
    assert not bank.gradient.any()
    after = [bank.shadow.detach(), *(layer.a for layer in bank.layers)]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    engine = rig.engine
    assert not engine.jobs and not engine.serving and not engine.cost_model.slices and not engine.cost_model.captures
    assert engine.scheduler.pool.used_tokens == 0 and engine.scheduler.slots.active == 0
    results = []
    for one in rigs:
        trainer = ShadowTrainer(one.train_runner, one.bank, SAMPLES, one.config.train)
        # Training is disabled in these rigs but for their trainer.
        trainer.cursor = type("All", (), {"claim": lambda self, n: list(range(n))})()
        finish(trainer.step(4, 1))
        results.append((answer(one.run([request(1, [5, 6, 7], max_tokens=12)])[1]), one.bank.shadow.detach().clone()))
    assert results[0][0] == results[1][0] and torch.equal(results[0][1], results[1][1])


@pytest.mark.parametrize(
    ("device", "sections", "expected"),
    [
        ("cuda", {}, True),
        ("cpu", {}, False),
        ("cuda", {"engine": {"coserving": "fused"}}, False),
        ("cuda", {"train": {"enabled": False}}, False),
        ("cuda", {"load": {"kind": "none"}}, False),
        ("cuda", {"run": {"mode": "time_slice"}}, False),
    ],
)
def test_it_is_measured_where_the_mode_is_open_and_a_gpu_both_serves_and_trains(data, device, sections, expected):
    tree = {"model": {"path": "m"}, "data": {"path": data}, "load": {"kind": "poisson"}} | sections
    assert is_measured(config_from_tree(tree), torch.device(device), TpGroup()) is expected


def test_a_gpu_has_all_modes_and_its_own_choice_where_none_is_measured(data):
    tree = {"model": {"path": "m"}, "data": {"path": data}, "load": {"kind": "poisson"}}
    chosen = {}
    for mode in CoservingMode:
        config = config_from_tree({**tree, "engine": {"coserving": mode.value}})
        chosen[mode] = choose_coserving(config, torch.device("cuda"), TpGroup(), 1)
    assert chosen.pop(CoservingMode.AUTO) == INTERLEAVED, "until they have been measured"
    assert all(mode == way for mode, way in chosen.items())
    serves = config_from_tree({**tree, "train": {"enabled": False}})
    assert choose_coserving(serves, torch.device("cuda"), TpGroup(), 1) == INTERLEAVED
