"""Rows that learn by the C++ kernels: the gradients of a whole model, and what falls back to torch."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from families import FAMILIES
from helpers import Rig, finish, make_rig

from clif.kernels.cpu.library import Absent, level
from clif.models.cpu_training import PackedSequences, joined
from clif.training.passes import Activations
from clif.training.train_runner import TrainRunner
from clif.types import TrainSample

try:
    level()
except Absent as absent:
    pytest.skip(f"no C++ kernels: {absent}", allow_module_level=True)

LENGTHS = (40, 7, 33)


def samples() -> list[TrainSample]:
    rng = random.Random(5)
    return [
        TrainSample(id=i, ids=tuple(rng.choices(range(64), k=n)), target_start=n // 2) for i, n in enumerate(LENGTHS)
    ]


@pytest.fixture
def even_config(tiny_config: Path, tmp_path: Path) -> Path:
    """A model all of whose widths are multiples of 32."""
    sizes = {"hidden_size": 64, "num_attention_heads": 4, "vocab_size": 320}
    (tmp_path / "config.json").write_text(json.dumps({**json.loads(tiny_config.read_text()), **sizes}))
    return tmp_path / "config.json"


class ComputedAgain(Activations):
    """Room for every pass, and for no layer to keep anything."""

    def kept(self, lengths: Sequence[int]) -> int:
        return 0


def gradients_of(rig: Rig, shadow: torch.Tensor, again: bool = False) -> tuple[float, torch.Tensor]:
    """Loss and gradient of the shadow at these numbers. again: all layers are computed again in the backward."""
    runner = TrainRunner(rig.runner)
    rig.runner.bank.load_shadow(shadow)
    rig.runner.bank.gradient.zero_()
    if again:
        runner.activations = ComputedAgain(**vars(runner.activations))
    loss = finish(runner.loss_and_gradients(samples(), 50.0))
    return float(loss), rig.runner.bank.gradient.clone()


def rig_of(config: Path, dtype: str, cpu_kernels: str) -> Rig:
    return make_rig(f"random:{config}", model={"dtype": dtype}, engine={"cpu_kernels": cpu_kernels})


@pytest.mark.parametrize("config", ["tiny_config", "even_config"])
def test_gradients_in_bfloat16_are_as_near_to_those_of_float32_as_torchs(config, request) -> None:
    compare_with_float32(request.getfixturevalue(config))


def compare_with_float32(file: Path) -> None:
    exact, torchs, ours = (
        rig_of(file, *kind) for kind in (("float32", "off"), ("bfloat16", "off"), ("bfloat16", "auto"))
    )
    shadow = torch.randn(exact.runner.bank.shadow.shape, generator=torch.Generator().manual_seed(1)) * 0.05
    loss, wanted = gradients_of(exact, shadow)
    apart = {}
    for name, rig in (("torch", torchs), ("ours", ours)):
        found, gradient = gradients_of(rig, shadow)
        apart[name] = float((gradient - wanted).norm() / wanted.norm())
        assert found == pytest.approx(loss, rel=0.03)
    assert isinstance(ours.runner.stack.sequences([3]), PackedSequences)
    assert not isinstance(torchs.runner.stack.sequences([3]), PackedSequences)
    assert apart["ours"] < 1.1 * apart["torch"] < 0.3, apart


@pytest.mark.parametrize("name", ["mistral-window", "gemma2", "gemma3", "olmo3", "granite", "phi3-partial"])
def test_gradients_of_families_in_bfloat16_are_as_near_to_those_of_float32_as_torchs(name: str, tmp_path: Path) -> None:
    (family,) = (family for family in FAMILIES if family.name == name)
    (tmp_path / "config.json").write_text(json.dumps(family.config))
    compare_with_float32(tmp_path / "config.json")


def test_gradients_are_the_same_in_every_run_and_on_any_number_of_threads(even_config: Path) -> None:
    rig, found, before = rig_of(even_config, "bfloat16", "auto"), [], torch.get_num_threads()
    shadow = torch.full_like(rig.runner.bank.shadow, 0.02)
    for threads in (1, 2, 2, 3):
        torch.set_num_threads(threads)
        found.append(gradients_of(rig, shadow))
    torch.set_num_threads(before)
    assert all(loss == found[0][0] and torch.equal(gradient, found[0][1]) for loss, gradient in found)


def test_gradients_in_float32_are_torchs(tiny_config: Path) -> None:
    auto, off = (rig_of(tiny_config, "float32", kernels) for kernels in ("auto", "off"))
    shadow = torch.full_like(auto.runner.bank.shadow, 0.02)
    (loss, gradient), (expected, wanted) = gradients_of(auto, shadow), gradients_of(off, shadow)
    assert loss == pytest.approx(expected, rel=1e-6) and (gradient - wanted).norm() < 1e-5 * wanted.norm()


def test_layers_that_are_computed_again_have_the_same_gradients(even_config: Path) -> None:
    rig = rig_of(even_config, "bfloat16", "auto")
    shadow = torch.full_like(rig.runner.bank.shadow, 0.02)
    (loss, kept), (other, again) = gradients_of(rig, shadow), gradients_of(rig, shadow, again=True)
    assert loss == pytest.approx(other, rel=1e-6) and (kept - again).norm() < 1e-3 * kept.norm()


def test_parts_of_the_same_rows_are_joined_without_a_copy_and_others_by_one() -> None:
    rows = torch.randn(5, 8, 4)
    parts = rows.split([4, 2, 2], 1)
    assert joined(parts).data_ptr() == rows.data_ptr() and torch.equal(joined(parts), rows)
    for others in ([part.clone() for part in parts], [parts[0], parts[2], parts[1]]):
        assert torch.equal(joined(others), torch.cat(list(others), 1))
