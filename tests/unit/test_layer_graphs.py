"""Captured passes compute what eager ones compute, for every size and whatever came before; on a CPU, by the rules."""

from __future__ import annotations

import gc
import json
import math
import weakref
from dataclasses import replace

import pytest
import torch
from helpers import answer, finish, make_rig, random_state, request

from clif.config import EngineConfig, TrainConfig
from clif.engine.build import use_coserving
from clif.engine.capture import choose_train_recorder
from clif.engine.checked_capture import CaptureError, CheckedRecorder
from clif.engine.jobs import Job
from clif.models.dual_linear import SHADOW
from clif.models.varlen import varlen_reference
from clif.training import train_runner
from clif.training.heldout import Heldout
from clif.training.layer_graphs import SIZES, CapturedPass
from clif.training.pass_buffers import most_sequences
from clif.training.passes import Pass
from clif.training.train_runner import TrainRunner
from clif.training.trainer import ShadowTrainer, StepCut
from clif.types import TrainSample

SMALL_SIZES = (16, 32, 64)
LENGTHS = (7, 20, 3, 31, 64, 12, 5, 40, 16, 9)
"""One fills the largest size, and another the smallest."""


def sample(number: int, length: int) -> TrainSample:
    rng = torch.Generator().manual_seed(number)
    ids = torch.randint(1, 120, (length,), generator=rng).tolist()
    return TrainSample(id=number, ids=tuple(ids), target_start=max(1, length // 3))


SAMPLES = [sample(i, length) for i, length in enumerate(LENGTHS)]


class Training:
    """A trainer with eager passes, or with captured ones."""

    def __init__(self, tiny_config, captured: bool, samples=SAMPLES, sizes=SMALL_SIZES, **sections) -> None:
        self.rig = make_rig(f"random:{tiny_config}", **sections)
        self.rig.runner.stack.varlen = varlen_reference
        self.recorder = CheckedRecorder()
        if captured:
            self.rig.runner.train_recorder = self.recorder
        self.runner = TrainRunner(self.rig.runner, sizes)
        self.rig.bank.set_shadow(random_state(self.rig.bank, 5))
        config = TrainConfig(warmup_steps=0, lr=1e-3, clip_norm=1e9)
        self.trainer = ShadowTrainer(self.runner, self.rig.bank, samples, config)

    @property
    def gradient(self) -> torch.Tensor:
        return self.rig.bank.gradient

    def gradient_of(self, *samples: TrainSample) -> tuple[float, torch.Tensor]:
        self.gradient.zero_()
        loss = finish(self.runner.loss_and_gradients(samples, sum(s.targets for s in samples)))
        return float(loss), self.gradient.clone()

    @property
    def launches(self) -> int:
        return sum(region.replays for region in self.recorder.regions)


def pair(tiny_config, **options) -> tuple[Training, Training]:
    return Training(tiny_config, False, **options), Training(tiny_config, True, **options)


def assert_near(found: torch.Tensor, expected: torch.Tensor, relative: float = 1e-5) -> None:
    assert (found - expected).norm() <= relative * expected.norm()


@pytest.fixture(scope="module")
def both(tiny_config):
    return pair(tiny_config)


@pytest.mark.parametrize("lengths", [(16,), (15,), (2,), (9, 7), (20, 3, 8), (32,), (64,), (33,), (5,) * 12, (63,)])
def test_loss_and_gradients_of_a_pass_are_those_of_an_eager_one(both, lengths):
    eager, captured = both
    samples, before = [sample(i, length) for i, length in enumerate(lengths)], captured.launches
    (expected_loss, expected), (loss, found) = (one.gradient_of(*samples) for one in (eager, captured))
    assert loss == pytest.approx(expected_loss, rel=1e-6)
    assert_near(found, expected)
    layers = eager.rig.runner.stack.num_layers
    assert captured.launches - before == 1 + 2 * layers, "one launch begins, each layer is one in each direction"


@pytest.mark.parametrize("micro_batch", [1, 3, 10])
def test_steps_of_ragged_samples_learn_what_eager_steps_learn(two_layers, micro_batch):
    eager, captured = pair(two_layers)
    for _ in range(3):
        expected, found = (finish(one.trainer.step(micro_batch, 2)) for one in (eager, captured))
        assert found.loss == pytest.approx(expected.loss, rel=1e-5)
        assert found.grad_norm == pytest.approx(expected.grad_norm, rel=1e-3)
        assert (found.samples, found.tokens, found.targets) == (expected.samples, expected.tokens, expected.targets)
    # Adam divides by the size of a gradient: where that is nearly zero, rounding decides.
    assert_near(captured.rig.bank.shadow.data, eager.rig.bank.shadow.data, 1e-3)


def test_the_sizes_of_a_gpu_compute_what_eager_passes_compute(two_layers, tmp_path):
    longer = tmp_path / "config.json"
    longer.write_text(json.dumps({**json.loads(two_layers.read_text()), "max_position_embeddings": 2048}))
    lengths = (40, 300, 700, 1100)
    samples = [sample(i, length) for i, length in enumerate(lengths)]
    room = {"model": {"max_context": 2048}, "engine": {"kv_tokens": 2048}}
    eager, captured = (Training(longer, on, samples=samples, sizes=SIZES, **room) for on in (False, True))
    assert [*captured.runner.graphs.sizes] == [2048, 1024, 512, 256]
    for one in samples:
        (expected_loss, expected), (loss, found) = (t.gradient_of(one) for t in (eager, captured))
        assert loss == pytest.approx(expected_loss, rel=1e-6)
        assert_near(found, expected)


@pytest.mark.parametrize("kept", [0, 1])
def test_layers_beyond_the_budget_are_computed_again_in_their_backward(tiny_config, monkeypatch, kept):
    eager = Training(tiny_config, False)
    keep = eager.runner.activations
    room = 64 * keep.entry * keep.layers + (kept + 1) * keep.of_layer([64])
    budget = replace(keep, budget=room)
    assert budget.kept([64]) == kept < keep.layers
    monkeypatch.setattr(train_runner, "measure_activations", lambda *_: budget)
    captured = Training(tiny_config, True)
    expected, found = (finish(one.trainer.step(10, 1)) for one in (eager, captured))
    assert found.loss == pytest.approx(expected.loss, rel=1e-6)
    assert_near(captured.gradient, eager.gradient)


@pytest.mark.parametrize("targets", [("q_proj", "down_proj"), r".*\.[12]\..*", r".*\.0\.mlp\..*"])
def test_so_they_are_where_only_some_modules_or_layers_are_adapted(tiny_config, targets):
    eager, captured = pair(tiny_config, adapter={"target_modules": targets})
    expected, found = (finish(one.trainer.step(10, 1)) for one in (eager, captured))
    assert found.loss == pytest.approx(expected.loss, rel=1e-6)
    assert_near(captured.gradient, eager.gradient)


def test_a_sample_longer_than_every_size_is_a_pass_of_its_own_and_eager(tiny_config):
    samples = [sample(0, 10), sample(1, 100), sample(2, 11)]
    eager, captured = pair(tiny_config, samples=samples)
    passes, left = [], list(samples)
    while left:
        passes.append(captured.runner._next_pass(left, SHADOW, True, 10_000))
    assert [type(run) for run in passes] == [CapturedPass, Pass, CapturedPass]
    assert [run.rows for run in passes] == [16, 100, 16]
    (expected_loss, expected), (loss, found) = (one.gradient_of(*samples) for one in (eager, captured))
    assert loss == pytest.approx(expected_loss, rel=1e-6)
    assert_near(found, expected)


def test_a_pass_has_no_more_sequences_than_its_size_has_places_for(tiny_config):
    captured = Training(tiny_config, True, sizes=(64,))
    left = [sample(i, 2) for i in range(20)]
    first = captured.runner._next_pass(left, SHADOW, True, 10_000)
    assert isinstance(first, CapturedPass) and len(left) == 20 - (most_sequences(64) - 1), "one place is the padding's"
    graphs = captured.runner.graphs
    assert graphs.of([4] * 16) is not None and graphs.of([4] * 15 + [3]) is None
    assert graphs.of([65]) is None and graphs.of([64]) is not None


def test_an_evaluation_of_the_shadow_is_captured_and_one_of_a_version_is_not(tiny_config):
    eager, captured = pair(tiny_config)
    for one in (eager, captured):
        one.rig.fill(1, seed=8)
    losses = [Heldout(one.runner, SAMPLES, max_tokens=64) for one in (eager, captured)]
    for slot, launched in ((SHADOW, True), (0, False), (None, False)):
        before = captured.launches
        expected, found = (finish(heldout.loss(slot)) for heldout in losses)
        assert found == pytest.approx(expected, rel=1e-6)
        assert (captured.launches > before) is launched
        assert captured.gradient.count_nonzero() == 0


@pytest.mark.parametrize("kind", ["forward", "head", "backward", "optimizer"])
def test_a_step_that_is_cut_anywhere_leaves_nothing_to_the_next(tiny_config, kind):
    """Layer by layer, up to the slice that is cut; other sizes, an evaluation and a step follow."""
    eager, captured = pair(tiny_config)
    job = Job("step", captured.trainer.step(3, 2))
    while job.upcoming.kind != kind:
        job.run(1)
    if kind in ("forward", "backward"):
        job.run(1)
    with pytest.raises(StepCut, match="time is up"):
        job.interrupt(StepCut("time is up"))
    for step in (3, 10):
        expected, found = (finish(one.trainer.step(step, 1)) for one in (eager, captured))
        assert found.loss == pytest.approx(expected.loss, rel=1e-5)
        assert found.grad_norm == pytest.approx(expected.grad_norm, rel=1e-3)


def test_a_nan_in_the_shadow_reaches_its_own_step_and_no_later_one(tiny_config):
    eager, captured = pair(tiny_config)
    snapshot, broken = captured.trainer.snapshot(), captured.rig.bank.shadow.clone()
    broken[3] = math.nan
    captured.rig.bank.load_shadow(broken)
    assert not finish(captured.trainer.step(10, 1)).finite
    captured.trainer.restore(snapshot)
    (expected_loss, expected), (loss, found) = (one.gradient_of(*SAMPLES[:3]) for one in (eager, captured))
    assert loss == pytest.approx(expected_loss, rel=1e-6)
    assert_near(found, expected)


def test_serving_and_promotions_between_slices_change_neither_answers_nor_gradients(tiny_config):
    eager, captured = pair(tiny_config)
    finish(eager.trainer.step(4, 1))
    rig = captured.rig
    rig.fill(1, seed=8)
    quiet = answer(rig.run([request(0, [4, 5, 6], max_tokens=20, ignore_eos=True)])[0])
    rig.engine.scheduler.add(request(1, [4, 5, 6], max_tokens=20, ignore_eos=True), 0.0)
    job, got, served = Job("step", captured.trainer.step(4, 1)), [], 0
    while job.upcoming is not None or rig.engine.serving:
        got += [t for event in rig.engine.serve() for t in event.tokens]
        if job.upcoming is not None:
            job.run(1)
            served += 1
        if served == 5:
            rig.fill(2, seed=9)
    assert got == quiet
    assert_near(captured.gradient, eager.gradient)


def test_a_captured_pass_is_sliced_by_layers_and_is_never_fused(tiny_config):
    captured = Training(tiny_config, True)
    layers, work, result = captured.rig.runner.stack.num_layers, captured.trainer.step(2, 1), None
    launches = {"forward": [], "backward": []}
    while True:
        try:
            piece = work.send(result)
        except StopIteration:
            break
        before = captured.launches
        result = piece.work(1 if piece.kind in launches else piece.units)
        assert piece.fused_pass is None
        if piece.kind in launches:
            launches[piece.kind].append((piece.tokens, piece.units, captured.launches - before))
    assert launches["forward"] == launches["backward"] == [(32, layers - i, 1) for i in range(layers)]


def test_passes_are_eager_while_serving_steps_may_take_them_along(tiny_config):
    """Which mode serves and trains best is measured when a replica starts: one runner makes the passes of all modes."""
    captured = Training(tiny_config, True)
    engine, config = captured.rig.engine, captured.rig.config
    for mode, kind in (("interleaved", CapturedPass), ("fused", Pass), ("time_slice", CapturedPass)):
        use_coserving(engine, config, mode)
        run = captured.runner._next_pass(list(SAMPLES), SHADOW, True, 64)
        assert type(run) is kind and (run.fused_pass is run) is (mode == "fused")


def test_rows_of_padding_get_no_gradient_and_give_none(tiny_config):
    captured = Training(tiny_config, True, sizes=(32,))
    graphs = captured.runner.graphs.sizes[32]
    _, expected = captured.gradient_of(sample(0, 20))
    assert graphs.gradient[20:].count_nonzero() == 0 < graphs.gradient[:19].count_nonzero()
    captured.gradient_of(sample(1, 32))
    _, found = captured.gradient_of(sample(0, 20))
    assert torch.equal(found, expected), "nothing of a pass without padding is left"


class Holding:
    """Holds results as CUDA graphs do. alive: tensors of results that are still there when each region is captured."""

    def __init__(self) -> None:
        self.made: list[weakref.ref] = []
        self.alive: list[int] = []
        self.bytes = 0

    def capture(self, region):
        for _ in range(2):
            region()
        self.alive.append(sum(ref() is not None for ref in self.made))
        return Held(self, region())


class Held:
    def __init__(self, recorder: Holding, result) -> None:
        self._held = [result]
        tensors = [result] if isinstance(result, torch.Tensor) else [*result[1]] if len(result) == 2 else []
        recorder.made += [weakref.ref(tensor) for tensor in tensors]

    @property
    def result(self):
        return self._held[0]

    def replay(self) -> None:
        raise AssertionError("for memory alone")

    def release(self) -> None:
        self._held.clear()


def test_what_a_layer_keeps_is_given_to_the_next_size_and_to_the_layers_below(tiny_config):
    training = Training(tiny_config, False)
    training.rig.runner.train_recorder = recorder = Holding()
    # Nothing collects garbage between two captures: there must be none.
    gc.collect()
    gc.disable()
    try:
        runner = TrainRunner(training.rig.runner, (16, 32))
    finally:
        gc.enable()
    layers = training.rig.runner.stack.num_layers
    assert len(recorder.alive) == 2 * (1 + 2 * layers)
    forward, backward = recorder.alive[: layers + 2], recorder.alive[layers + 1 : 2 * layers + 1]
    assert forward == sorted(forward) and forward[-1] > forward[-2] > 0, "all that a pass keeps is held"
    assert backward == sorted(backward, reverse=True) and backward[-1] < backward[0]
    assert recorder.alive[2 * layers + 1] == 0, "the next size begins with all the memory"
    assert runner.graphs is not None and not any(ref() is not None for ref in recorder.made)


@pytest.mark.parametrize(
    ("graphs", "device", "tp_size", "varlen", "fuses", "why"),
    [
        ("off", "cuda", 1, True, False, "engine.graphs is off"),
        ("auto", "cpu", 1, True, False, "a cpu has none"),
        ("auto", "cuda", 2, True, False, "several ranks share the model"),
        ("auto", "cuda", 1, False, False, "attention is padded to the lengths of sequences"),
        ("auto", "cuda", 1, True, True, "serving steps compute training forwards, see engine.coserving"),
    ],
)
def test_where_no_graph_can_be_made_the_log_says_why(caplog, graphs, device, tp_size, varlen, fuses, why):
    caplog.set_level("INFO")
    assert choose_train_recorder(EngineConfig(graphs=graphs), torch.device(device), tp_size, varlen, fuses) is None
    assert f"no CUDA graphs of training: {why}" in caplog.text


def test_layers_that_cannot_be_captured_are_launched_kernel_by_kernel(tiny_config, caplog):
    class Refusing(CheckedRecorder):
        def capture(self, region):
            region()
            raise CaptureError("float() reads a tensor on the host")

    eager, other = Training(tiny_config, False), Training(tiny_config, False)
    other.rig.runner.train_recorder = Refusing()
    other.trainer.runner = TrainRunner(other.rig.runner, SMALL_SIZES)
    assert "reads a tensor on the host" in caplog.text
    expected, found = (finish(one.trainer.step(4, 1)) for one in (eager, other))
    assert found.loss == expected.loss and torch.equal(other.gradient, eager.gradient)


def test_sizes_whose_activations_do_not_fit_are_left_out(tiny_config):
    captured = Training(tiny_config, True, sizes=(16, 64, 1 << 20))
    assert [*captured.runner.graphs.sizes] == [64, 16]


def test_without_room_for_any_size_passes_are_as_large_as_without_graphs(tiny_config):
    captured = Training(tiny_config, True, sizes=(1 << 20,))
    run = captured.runner._next_pass(list(SAMPLES), SHADOW, True, 10_000)
    assert captured.runner.graphs is None and isinstance(run, Pass) and run.rows == sum(LENGTHS)


def kept_by_autograd(training: Training) -> int:
    """Factors whose node of an earlier pass still lives: autograd would use it, with its stream, in every later one."""
    layers = range(training.rig.runner.stack.num_layers)
    nodes = {(at, i): m for at in layers for i, m in enumerate(training.rig.runner.stack.masters(at))}
    for _ in range(2):
        seen = 0
        for factor in nodes.values():
            node = factor.view_as(factor).grad_fn.next_functions[0][0]
            seen += "seen" in node.metadata
            node.metadata["seen"] = True
    return seen


def test_nothing_of_autograd_is_left_when_a_capture_begins(tiny_config):
    """Neither of the measurement of activations nor of passes that have ended."""
    training = Training(tiny_config, captured=False)
    assert kept_by_autograd(training) == 0
    finish(training.runner.loss_and_gradients(SAMPLES[:3], 1.0))
    assert kept_by_autograd(training) == 0
    held = training.rig.runner.stack.masters(0)[0].view_as(training.rig.runner.stack.masters(0)[0])
    assert kept_by_autograd(training) == 1, "the check sees a pass that is held"
    del held
