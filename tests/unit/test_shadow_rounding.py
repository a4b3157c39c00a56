"""The shadow's rows see its masters, rounded, as they are now; all layers are rounded by as many copies as one."""

from __future__ import annotations

import math

import pytest
import torch
from helpers import finish, make_rig, random_state, stack_logits
from torch.utils._python_dispatch import TorchDispatchMode

from clif.adapters.bank import AdapterBank
from clif.adapters.rounding import equal_distances
from clif.config import TrainConfig
from clif.engine.jobs import Job
from clif.models.dual_linear import SHADOW
from clif.training.trainer import ShadowTrainer
from clif.types import TrainSample

SAMPLES = [TrainSample(id=i, ids=tuple(range(5 + i, 25 + 3 * i)), target_start=11) for i in range(8)]
SUBSETS = ["all-linear", ("q_proj", "v_proj", "down_proj"), r".*\.[02]\.mlp\.(gate|up)_proj"]


def make(tiny_config, **adapter):
    rig = make_rig(f"random:{tiny_config}", adapter=adapter, model={"dtype": "bfloat16"})
    trainer = ShadowTrainer(rig.train_runner, rig.bank, SAMPLES, TrainConfig(warmup_steps=0, lr=0.01))
    rig.bank.set_shadow(random_state(rig.bank, 5))
    return rig, trainer


def logits_of_masters(rig) -> torch.Tensor:
    """Those of a serving slot that the masters were copied into, name by name."""
    rig.bank.fill_slot(0, rig.bank.shadow_state())
    return stack_logits(rig.runner.stack, torch.arange(5, 15), 0)


def by_step(rig, trainer):
    assert finish(trainer.step(2, 1)).finite


def by_several_passes(rig, trainer):
    assert finish(trainer.step(2, 3)).finite


def by_rollback(rig, trainer):
    snapshot = trainer.snapshot()
    snapshot["shadow"] = torch.randn_like(snapshot["shadow"])
    trainer.rollback(snapshot)


def by_resume(rig, trainer):
    snapshot = trainer.snapshot()
    snapshot["shadow"] = torch.randn_like(snapshot["shadow"])
    trainer.resume(snapshot, {})


def by_state(rig, trainer):
    rig.bank.set_shadow(random_state(rig.bank, 6))


def by_average(rig, trainer):
    rig.bank.load_shadow(rig.bank.shadow * 0.5)


def by_reset(rig, trainer):
    rig.bank.reset(11)


CHANGES = [by_step, by_several_passes, by_rollback, by_resume, by_state, by_average, by_reset]


@pytest.mark.parametrize("change", CHANGES)
def test_a_forward_after_the_masters_changed_uses_them_and_they_are_rounded_once(tiny_config, monkeypatch, change):
    rig, trainer = make(tiny_config)
    calls, refresh = [], AdapterBank.refresh
    monkeypatch.setattr(AdapterBank, "refresh", lambda bank: (calls.append(1), refresh(bank)))
    before = rig.bank.shadow.detach().clone()
    change(rig, trainer)
    assert len(calls) == 1 and not torch.equal(before, rig.bank.shadow.data)
    assert torch.equal(stack_logits(rig.runner.stack, torch.arange(5, 15), SHADOW), logits_of_masters(rig))


def test_a_step_that_was_cut_or_not_finite_changes_nothing_and_rounds_nothing(tiny_config, monkeypatch):
    rig, trainer = make(tiny_config)
    expected, calls = logits_of_masters(rig), []
    monkeypatch.setattr(AdapterBank, "refresh", lambda bank: calls.append(1))
    job = Job("step", trainer.step(2, 1))
    while job.upcoming.kind != "backward":
        job.run()
    job.close()
    monkeypatch.setattr(trainer, "_clip", lambda: torch.tensor(math.nan))
    assert not finish(trainer.step(2, 1)).finite
    assert not calls
    assert torch.equal(stack_logits(rig.runner.stack, torch.arange(5, 15), SHADOW), expected)


@pytest.mark.parametrize("targets", SUBSETS)
def test_every_layer_is_rounded_whatever_is_adapted(tiny_config, targets):
    rig, _ = make(tiny_config, target_modules=targets)
    rig.bank.load_shadow(torch.randn_like(rig.bank.shadow))
    for layer in rig.bank.layers:
        assert torch.equal(layer.compute_a, layer.shadow_a.bfloat16())
        assert torch.equal(layer.gather_b(layer.compute_b), layer.shadow_b.bfloat16())
        assert layer.compute_b.count_nonzero() == layer.shadow_b.count_nonzero(), "zeros stay zeros"


def test_the_number_of_copies_does_not_grow_with_the_layers(tiny_config):
    class Count(TorchDispatchMode):
        copies = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.copies += func._schema.name == "aten::copy_"
            return func(*args, **(kwargs or {}))

    rig, _ = make(tiny_config)
    with Count() as count:
        rig.bank.refresh()
    assert count.copies == 4 + 7, "A of each merged layer, B of each module"
    assert len(rig.bank.layers) == 4 * rig.runner.stack.num_layers > 4


def test_numbers_are_cut_where_their_distance_changes():
    assert equal_distances([]) == []
    assert equal_distances([7]) == [[7]]
    assert equal_distances([0, 5, 10, 11, 12, 20]) == [[0, 5, 10], [11, 12], [20]]
