"""Where torch's varlen_attn is chosen, and what a model does with it: losses and gradients of the padded way."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers import finish, make_rig, random_state

from clif.config import TrainConfig
from clif.models import backends, varlen
from clif.models.backends import choose_varlen
from clif.models.varlen import varlen_attention, varlen_fault, varlen_reference
from clif.training.trainer import ShadowTrainer
from clif.types import TrainSample

SAMPLES = [TrainSample(id=i, ids=tuple(range(5, 5 + n)), target_start=2) for i, n in enumerate((20, 9, 50, 3))]
GPU = SimpleNamespace(type="cuda")


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """A GPU on which nothing is wrong."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(backends, "varlen_fault", lambda device, dtype, head_dim: None)
    return monkeypatch


def test_half_precision_on_a_gpu_takes_torchs_kernel(hopper, caplog):
    caplog.set_level("INFO")
    for dtype in (torch.bfloat16, torch.float16):
        for head_dim in (64, 80, 96, 128, 256):
            assert choose_varlen(GPU, dtype, head_dim) is varlen_attention
    assert "attention of prompts and training: torch's varlen_attn" in caplog.text


def test_what_the_kernel_cannot_do_stays_padded_and_the_log_says_why(hopper, caplog):
    caplog.set_level("INFO")
    assert choose_varlen(GPU, torch.float32, 64) is None
    assert choose_varlen(GPU, torch.bfloat16, 20) is None
    assert choose_varlen(GPU, torch.bfloat16, 264) is None
    hopper.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert choose_varlen(GPU, torch.bfloat16, 64) is None
    for reason in ("torch.float32", "heads of 20", "heads of 264", "compute capability 7.5"):
        assert reason in caplog.text


def test_a_cpu_keeps_its_own_way_without_a_word(hopper, caplog):
    caplog.set_level("INFO")
    assert choose_varlen(torch.device("cpu"), torch.bfloat16, 64) is None and not caplog.text


def test_a_kernel_that_computes_something_else_is_not_chosen(hopper, caplog):
    caplog.set_level("INFO")
    hopper.setattr(backends, "varlen_fault", varlen_fault)
    hopper.setattr(
        varlen, "varlen_attention", lambda q, k, v, spans, scale: varlen_reference(q, k, v, spans, 2 * scale)
    )
    # The device of the check is this one.
    assert varlen_fault(torch.device("cpu"), torch.bfloat16, 16).startswith("varlen_attn is wrong here: result by")
    hopper.setattr(varlen, "varlen_attention", varlen_reference)
    assert varlen_fault(torch.device("cpu"), torch.bfloat16, 16) is None
    hopper.setattr(varlen, "varlen_attention", varlen_attention)
    assert "varlen_attn fails" in varlen_fault(torch.device("cpu"), torch.bfloat16, 16)


@pytest.fixture
def both(tiny_config: Path, monkeypatch: pytest.MonkeyPatch):
    """The same engine, without and with the reference in the place of torch's kernel."""
    plain = make_rig(f"random:{tiny_config}")
    monkeypatch.setattr("clif.engine.base.choose_varlen", lambda *_: varlen_reference)
    other = make_rig(f"random:{tiny_config}")
    assert (plain.runner.stack.varlen, other.runner.stack.varlen) == (None, varlen_reference)
    return plain, other


def trained(rig) -> tuple[float, torch.Tensor]:
    """Loss and gradient of one step over samples of unequal lengths."""
    rig.bank.set_shadow(random_state(rig.bank, 5))
    config = TrainConfig(warmup_steps=0, clip_norm=1e9)
    result = finish(ShadowTrainer(rig.train_runner, rig.bank, SAMPLES, config).step(4, 1))
    return result.loss, rig.bank.gradient.clone()


def test_training_is_that_of_the_padded_way(both):
    (loss, gradient), (other_loss, other_gradient) = map(trained, both)
    assert other_loss == pytest.approx(loss, rel=1e-5)
    assert gradient.norm() > 0 and (other_gradient - gradient).norm() <= 1e-5 * gradient.norm()


def test_no_memory_is_counted_for_probabilities_that_nobody_keeps(both):
    plain, other = (rig.train_runner.activations for rig in both)
    assert plain.square > 0 == other.square
    assert other.of_layer([100]) == other.of_layer([50, 50]) == 100 * other.layer
