"""Captured training passes on a GPU: real graphs learn what eager passes learn, and nothing waits for them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers import Rig, finish, make_rig, random_state

from clif.config import TrainConfig
from clif.engine.capture import CudaRecorder
from clif.engine.jobs import Job
from clif.models.dual_linear import SHADOW
from clif.training.layer_graphs import CapturedPass
from clif.training.layer_pieces import PiecedPass
from clif.training.passes import PIECE_UNIT, Pass, pack
from clif.training.train_runner import TrainRunner
from clif.training.trainer import ShadowTrainer, StepCut
from clif.types import TrainSample

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU here")]
SIZES = (64, 128, 256)
LENGTHS = (7, 120, 33, 31, 64, 12, 200, 40, 16, 256)


def sample(number: int, length: int) -> TrainSample:
    ids = torch.randint(1, 250, (length,), generator=torch.Generator().manual_seed(number)).tolist()
    return TrainSample(id=number, ids=tuple(ids), target_start=max(1, length // 3))


SAMPLES = [sample(i, length) for i, length in enumerate(LENGTHS)]


def trainer_on_gpu(tiny_config: Path, captured: bool, activation_mib: int = 64) -> tuple[Rig, ShadowTrainer]:
    model, engine = {"dtype": "bfloat16", "max_context": 256}, {"activation_mib": activation_mib}
    rig = make_rig(f"random:{tiny_config}", device="cuda", model=model, engine=engine)
    assert rig.runner.stack.varlen is not None
    rig.runner.fuses = False
    rig.runner.train_recorder = CudaRecorder(torch.cuda.Stream()) if captured else None
    runner = TrainRunner(rig.runner, SIZES)
    rig.bank.set_shadow(random_state(rig.bank, 5))
    config = TrainConfig(warmup_steps=0, lr=1e-3, clip_norm=1e9)
    return rig, ShadowTrainer(runner, rig.bank, SAMPLES, config)


def gradients(rig: Rig, trainer: ShadowTrainer) -> list[tuple[float, torch.Tensor]]:
    """Of each sample alone, of several in one pass, and of all."""
    found = []
    for chosen in (*[[one] for one in SAMPLES], SAMPLES[:4], SAMPLES):
        rig.bank.gradient.zero_()
        loss = finish(trainer.runner.loss_and_gradients(chosen, sum(s.targets for s in chosen)))
        found.append((float(loss), rig.bank.gradient.clone()))
    return found


@pytest.mark.parametrize("activation_mib", [64, 1])
def test_replays_have_the_gradients_of_eager_passes(tiny_config: Path, activation_mib: int) -> None:
    """Twice: nothing is left of the pass before, of another size. With 1 MiB, layers are computed again."""
    eager, captured = (trainer_on_gpu(tiny_config, on, activation_mib) for on in (False, True))
    for _ in range(2):
        for (expected_loss, expected), (loss, found) in zip(gradients(*eager), gradients(*captured), strict=True):
            assert loss == pytest.approx(expected_loss, rel=1e-2)
            # bfloat16, and products with other numbers of rows: sums are rounded in another order.
            assert (found - expected).norm() <= 0.03 * expected.norm()


def test_every_sample_that_fits_a_size_is_launched_as_graphs(tiny_config: Path) -> None:
    _, trainer = trainer_on_gpu(tiny_config, True)
    assert trainer.runner.graphs is not None and [*trainer.runner.graphs.sizes] == [256, 128, 64]
    runs = [trainer.runner._next_pass([one], SHADOW, True, 10_000) for one in SAMPLES]
    assert all(isinstance(run, CapturedPass) for run in runs)
    assert [run.rows for run in runs] == [64, 128, 64, 64, 64, 64, 256, 64, 64, 256]


def test_a_pass_is_launched_without_a_wait(tiny_config: Path) -> None:
    _, trainer = trainer_on_gpu(tiny_config, True)
    finish(trainer.step(3, 1))
    work, result, kinds = trainer.step(3, 1), None, set()
    while (piece := work.send(result)).kind != "optimizer":
        torch.cuda.set_sync_debug_mode("error")
        try:
            result = piece.work(piece.units)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        kinds.add(piece.kind)
    assert {"pack", "forward", "head", "backward"} <= kinds
    with pytest.raises(StopIteration) as end:
        work.send(piece.work(1))
    assert end.value.value.finite


def test_a_step_that_was_cut_leaves_nothing_behind(tiny_config: Path) -> None:
    rig, trainer = trainer_on_gpu(tiny_config, True)
    before = gradients(rig, trainer)
    job = Job("step", trainer.step(4, 1))
    while job.upcoming is not None and job.upcoming.kind != "backward":
        job.run(1)
    job.run(1)
    with pytest.raises(StepCut, match="time is up"):
        job.interrupt(StepCut("time is up"))
    for (expected_loss, expected), (loss, found) in zip(before, gradients(rig, trainer), strict=True):
        # Attention's backward adds up in no fixed order.
        assert loss == pytest.approx(expected_loss, rel=1e-5)
        assert (found - expected).norm() <= 1e-2 * expected.norm()


def test_a_sample_in_pieces_has_the_gradients_of_a_whole_one(tiny_config: Path) -> None:
    rig, trainer = trainer_on_gpu(tiny_config, captured=False)
    stack, batch, found = rig.runner.stack, pack([sample(0, 200)]), []
    for run in (
        Pass(stack, batch, SHADOW, trainer.runner.activations),
        PiecedPass(stack, batch, SHADOW, PIECE_UNIT, learns=True),
    ):
        rig.bank.gradient.zero_()
        run.forward(run.left)
        run.head(run.targets.left, 100.0)
        run.backward(run.pending)
        found.append((float(run.targets.loss), rig.bank.gradient.clone()))
    (loss, whole), (in_pieces, gradient) = found
    assert whole.norm() > 0
    assert in_pieces == pytest.approx(loss, rel=0.03)
    assert (gradient - whole).norm() <= 0.03 * whole.norm()
