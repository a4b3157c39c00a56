"""Serving and training on two streams of a GPU: what runs beside what, what waits, and what is computed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers import finish, make_rig, random_state, request

from clif.config import TrainConfig
from clif.engine.jobs import Job
from clif.engine.stopwatch import CudaTiming
from clif.engine.streams import TwoStreams
from clif.training.trainer import ShadowTrainer
from clif.types import TrainSample

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU here")]
CYCLES = 1 << 29
"""Of the device's clock: a few tenths of a second."""
SAMPLES = [TrainSample(id=i, ids=tuple(range(5 + i, 40 + 2 * i)), target_start=12) for i in range(3)]


@pytest.fixture
def streams() -> TwoStreams:
    made = TwoStreams(torch.device("cuda"))
    made.synchronize()
    return made


@pytest.fixture(scope="module")
def model(tiny_config: Path) -> str:
    return f"random:{tiny_config}"


def test_serving_does_not_wait_for_what_training_was_given(streams):
    x = torch.zeros(8, device="cuda")
    streams.synchronize()
    with streams.training():
        torch.cuda._sleep(CYCLES)
        slept = torch.cuda.current_stream().record_event()
    with streams.serving():
        x.add_(1)
        torch.cuda.current_stream().record_event().synchronize()
    assert not slept.query() and x.tolist() == [1] * 8
    streams.synchronize()
    assert slept.query()


def test_serving_sees_what_was_published(streams):
    x = torch.zeros(8, device="cuda")
    streams.synchronize()
    with streams.training():
        torch.cuda._sleep(CYCLES)
        x.fill_(3)
        streams.publish()
    with streams.serving():
        assert x.tolist() == [3] * 8


def test_a_slice_is_timed_without_a_wait(streams):
    with streams.training():
        timing = CudaTiming()
        torch.cuda._sleep(CYCLES)
        timing.stop()
    assert not timing.done()
    timing.wait()
    assert timing.done() and timing.seconds() > 0


@pytest.mark.parametrize("overlap", [False, True])
def test_serving_and_training_beside_each_other_compute_what_each_computes_alone(model, overlap):
    outcomes = []
    for way in ("interleaved", "concurrent"):
        rig = make_rig(model, engine={"coserving": way, "overlap": overlap}, device="cuda")
        engine, beside = rig.engine, 0
        # A clock that stands still: every promise has all its time left.
        engine.clock = lambda: 0.0
        with engine.streams.training():
            rig.fill(1, seed=4)
            rig.bank.set_shadow(random_state(rig.bank, 5))
            trainer = ShadowTrainer(rig.train_runner, rig.bank, SAMPLES, TrainConfig(clip_norm=1e9))
            engine.jobs.append(Job("step", trainer.step(3, 1)))
        for i in range(5):
            engine.scheduler.add(request(i, [3 + i, 9, 20 + i], max_tokens=20, ignore_eos=True), 0.0)
        tokens: dict[int, list[int]] = {}
        while engine.serving or engine.jobs:
            for event in engine.step():
                tokens.setdefault(event.request_id, []).extend(event.tokens)
            beside += engine.record.regime == "concurrent"
        engine.close()
        outcomes.append((tokens, rig.bank.gradient.cpu()))
    assert beside, "it must have happened, or the test says nothing"
    assert outcomes[0][0] == outcomes[1][0]
    assert (outcomes[0][1] - outcomes[1][1]).norm() <= 1e-4 * outcomes[0][1].norm()


def test_a_promotion_between_two_steps_is_seen_by_the_next_one(model):
    """The same answer as on the default stream, with the slot filled while the device is busy with training."""
    answers = []
    for way in ("interleaved", "concurrent"):
        rig = make_rig(model, engine={"coserving": way}, device="cuda")
        with rig.engine.streams.training():
            torch.cuda._sleep(CYCLES)
            rig.fill(1, seed=4)
        answers.append([event.tokens for event in rig.run([request(0, [3, 4, 5], max_tokens=9, ignore_eos=True)])[0]])
    assert answers[0] == answers[1]


def test_a_held_out_loss_beside_serving_is_that_of_the_loss_alone(model):
    losses = []
    for way in ("interleaved", "concurrent"):
        rig = make_rig(model, engine={"coserving": way}, device="cuda")
        with rig.engine.streams.training():
            losses.append(float(finish(rig.train_runner.loss(SAMPLES, None))))
    assert losses[0] == pytest.approx(losses[1])
