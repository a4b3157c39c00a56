"""The gradient noise scale is that of the gradients, however a step is made up; the default configuration has one."""

from __future__ import annotations

import math

import pytest
import torch
from helpers import finish, make_rig

from clif.config import TrainConfig
from clif.engine.jobs import Slice
from clif.training import noise_scale as noise
from clif.training.noise_scale import AFTER_STEPS, HALVED, NoiseScale
from clif.training.trainer import ShadowTrainer
from clif.types import TrainSample

SAMPLES = [TrainSample(id=i, ids=tuple(range(5, 11 + i % 7)), target_start=4) for i in range(20)]
SIGNAL, NOISE = 0.1, 0.15


class KnownNoise:
    """In place of a model: each sample's gradient is SIGNAL in all coordinates, plus noise of deviation NOISE."""

    def __init__(self, bank) -> None:
        self.bank, self.rng = bank, torch.Generator().manual_seed(0)
        self.passes: list[int] = []
        self.breaks = False

    def loss_and_gradients(self, samples, divisor):
        self.passes.append(len(samples))
        for sample in samples:
            noise = torch.randn(self.bank.gradient.shape, generator=self.rng)
            self.bank.gradient.add_(SIGNAL + NOISE * noise, alpha=1 / divisor * sample.targets)
        if self.breaks:
            self.bank.gradient[0] = math.nan
        yield Slice("backward", 1, 1)
        return torch.tensor(1.0 * sum(s.targets for s in samples))


@pytest.fixture(scope="module")
def bank(tiny_config):
    return make_rig(f"random:{tiny_config}").bank


def train(bank, steps: int, micro_batch: int, accumulation: int) -> ShadowTrainer:
    """Samples of one length, so that their mean is that of their tokens."""
    same = [SAMPLES[0]] * 8
    trainer = ShadowTrainer(KnownNoise(bank), bank, same, TrainConfig(warmup_steps=0, lr=1e-6, clip_norm=1e9))
    for _ in range(steps):
        finish(trainer.step(micro_batch, accumulation))
    return trainer


@pytest.mark.parametrize(("micro_batch", "accumulation"), [(4, 1), (3, 1), (2, 1), (1, 1), (2, 3)])
def test_the_noise_scale_of_a_problem_with_a_known_one_needs_no_accumulation(bank, micro_batch, accumulation):
    trainer = train(bank, AFTER_STEPS + 12 * HALVED, micro_batch, accumulation)
    assert trainer.noise.scale.noise_scale == pytest.approx(NOISE**2 / SIGNAL**2, rel=0.15)


def test_the_default_configuration_knows_its_noise_scale_after_one_round(bank):
    """Twenty steps of one micro-batch, as train.accumulation 1 has them."""
    config = TrainConfig()
    trainer = train(bank, 20, config.micro_batch, config.accumulation)
    assert trainer.noise.scale.noise_scale is not None


def test_only_one_step_in_some_is_computed_in_halves(bank):
    trainer = train(bank, AFTER_STEPS + 2 * HALVED, 4, 1)
    passes = trainer.runner.passes
    assert sum(passes) == 4 * (AFTER_STEPS + 2 * HALVED) and passes.count(2) == 2 * passes[AFTER_STEPS:].count(4) / 3


def test_gradients_of_the_first_steps_do_not_rule_the_estimate(bank):
    """Adam's second moment is tiny then. Divided as Adam divides it, equal gradients look equal at any step."""
    share = SIGNAL**2 / (SIGNAL**2 + NOISE**2 / 4)
    for steps in (9, 40):
        scale = train(bank, steps, 4, 1).noise.scale
        assert scale._signal / bank.gradient[:: noise.STRIDE].numel() == pytest.approx(share, rel=0.25), steps


def test_an_observation_in_four_steps_counts_as_four():
    each, rare = NoiseScale(), NoiseScale()
    for scale in (each, rare):
        for _ in range(10):
            scale.observe([2.0, 2.0], 6.0, [1, 1])
    for _ in range(4):
        each.observe([3.0, 3.0], 10.0, [1, 1])
    rare.observe([3.0, 3.0], 10.0, [1, 1], steps=4)
    assert rare._signal == pytest.approx(each._signal) and rare._noise == pytest.approx(each._noise)


def test_one_group_says_nothing_about_noise():
    scale = NoiseScale()
    scale.observe([1.0], 1.0, [4])
    assert scale.noise_scale is None


def test_groups_of_unequal_size_count_with_their_sizes():
    """Gradients drawn around a known mean with known noise: phi = tr(Sigma) / |G|^2."""
    rng = torch.Generator().manual_seed(0)
    mean, sigma, sizes = torch.full((200,), 0.1), 0.5, [1, 3, 6]
    scale = NoiseScale(smoothing=0.01)
    for _ in range(800):
        groups = torch.stack([mean + sigma / size**0.5 * torch.randn(200, generator=rng) for size in sizes])
        scale.observe(groups.square().sum(1).tolist(), float(groups.sum(0).square().sum()), sizes)
    assert scale.noise_scale == pytest.approx(200 * sigma**2 / 2.0, rel=0.1)


def test_a_gradient_that_is_not_finite_does_not_stay_in_the_estimate(bank):
    trainer = train(bank, AFTER_STEPS + 2 * HALVED, 4, 1)
    trainer.runner.breaks = True
    before = trainer.noise.scale.noise_scale
    while trainer.steps % HALVED:
        trainer.steps += 1
    assert not finish(trainer.step(4, 1)).finite
    assert trainer.noise.scale.noise_scale == before is not None


def test_samples_of_two_rounds_are_not_compared(bank):
    """Between them the shadow became an average, or what it was before."""
    trainer = train(bank, 2 * HALVED + 1, 1, 1)
    seen = trainer.noise.scale.seen
    trainer.commit()
    finish(trainer.step(1, 1))
    assert trainer.noise.scale.seen == seen
