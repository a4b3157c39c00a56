"""Training launches work and does not wait for it: the host reads once per optimizer step, at its end."""

from __future__ import annotations

import contextlib
import math

import pytest
import torch
from helpers import finish, make_rig, random_state, tp_group_of
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import _disable_current_modes

from clif.config import TrainConfig
from clif.distributed.collectives import TpGroup
from clif.engine.checked_capture import READS, CaptureError, CheckedRecorder, forbid_host_reads
from clif.engine.jobs import WAIT
from clif.kernels import staging
from clif.models import causal
from clif.models.varlen import varlen_reference
from clif.training import head_loss, passes, trainer
from clif.training.device_work import on_host, until_done
from clif.training.head_loss import HEAD_PIECES, HeadPieces
from clif.training.heldout import Heldout
from clif.training.noise_scale import AFTER_STEPS, HALVED
from clif.training.pass_buffers import PassBuffers
from clif.training.train_runner import TrainRunner
from clif.training.trainer import ShadowTrainer
from clif.types import TrainSample

SAMPLES = [TrainSample(id=i, ids=tuple(range(5 + i, 25 + 3 * i)), target_start=7) for i in range(8)]


class Reads(TorchFunctionMode):
    """Writes down what reads a tensor on the host."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        name = getattr(func, "__name__", "")
        if name in READS and getattr(torch.Tensor, name, None) is func:
            self.found.append(name)
        return func(*args, **(kwargs or {}))


@pytest.fixture
def rig(tiny_config, monkeypatch):
    """What is staged is let through: on a GPU it is a copy from pinned memory, for which the host does not wait."""

    def staged(*arguments):
        with _disable_current_modes(), torch._C.DisableTorchFunction():
            return staging.send_ints(*arguments)

    for module in (causal, passes, head_loss):
        monkeypatch.setattr(module, "send_ints", staged)
    rig = make_rig(f"random:{tiny_config}")
    rig.bank.set_shadow(random_state(rig.bank, 5))
    return rig


def trainer_for(rig) -> ShadowTrainer:
    return ShadowTrainer(rig.train_runner, rig.bank, SAMPLES, TrainConfig(warmup_steps=0, lr=1e-3))


def without_waiting(work, reads_in=()):
    """Do a job under the rule that only slices of these kinds read; the host code between slices keeps it as well."""
    result, reads = None, {}
    while True:
        try:
            with forbid_host_reads():
                piece = work.send(result)
        except StopIteration as end:
            return end.value, reads
        with Reads() as seen, contextlib.nullcontext() if piece.kind in reads_in else forbid_host_reads():
            result = piece.work(piece.units)
        reads.setdefault(piece.kind, []).extend(seen.found)


@pytest.mark.parametrize(("micro_batch", "accumulation"), [(4, 1), (2, 2), (1, 1)])
def test_an_optimizer_step_reads_once_in_its_last_slice_and_nowhere_before(rig, micro_batch, accumulation):
    trainer = trainer_for(rig)
    for _ in range(AFTER_STEPS + HALVED + 2):
        result, reads = without_waiting(trainer.step(micro_batch, accumulation), ("optimizer",))
        assert reads["optimizer"] == ["tolist"], "loss, norm and noise come together"
        assert not any(found for kind, found in reads.items() if kind != "optimizer")
        assert math.isfinite(result.loss) and result.finite
    assert trainer.noise.scale.seen > 0, "steps that compare groups were among them"


def test_layers_beyond_the_budget_and_several_passes_wait_for_nothing_either(rig):
    keep = rig.train_runner.activations
    room = 60 * keep.entry * keep.layers + 2 * keep.of_layer([60])
    rig.train_runner.activations = type(keep)(room, keep.layers, keep.entry, keep.layer, keep.square)
    _, reads = without_waiting(trainer_for(rig).step(8, 1), ("optimizer",))
    assert reads["optimizer"] == ["tolist"]


def test_captured_passes_wait_for_nothing_either(rig, monkeypatch):
    """Their buffers are filled from pinned memory: what the host writes there is no read."""
    rig.runner.stack.varlen = varlen_reference
    rig.runner.train_recorder = CheckedRecorder()
    runner, fill = TrainRunner(rig.runner, (64, 128)), PassBuffers.fill

    def staged(*arguments):
        with _disable_current_modes(), torch._C.DisableTorchFunction():
            fill(*arguments)

    monkeypatch.setattr(PassBuffers, "fill", staged)
    trainer = ShadowTrainer(runner, rig.bank, SAMPLES, TrainConfig(warmup_steps=0, lr=1e-3))
    result, reads = without_waiting(trainer.step(8, 1), ("optimizer",))
    assert result.finite and reads["optimizer"] == ["tolist"]
    assert not any(found for kind, found in reads.items() if kind != "optimizer")


def test_a_heldout_loss_is_read_once_behind_its_last_slice(rig):
    heldout = Heldout(rig.train_runner, SAMPLES, max_tokens=64)
    expected = finish(heldout.loss(-1))
    work, result = heldout.loss(-1), None
    with pytest.raises(CaptureError, match=r"tolist\(\) reads"):
        without_waiting(work)
    with Reads() as seen, pytest.raises(StopIteration) as end:
        work = heldout.loss(-1)
        while True:
            piece = work.send(result)
            result = piece.work(piece.units)
    assert seen.found == ["tolist"] and end.value.value == expected


def test_the_rule_refuses_a_slice_that_reads(rig):
    def reads():
        yield from ()
        return float(rig.bank.gradient.sum())

    with pytest.raises(CaptureError, match="reads a tensor on the host"):
        without_waiting(reads())


def test_slices_of_the_head_are_whole_pieces_where_a_device_wants_them(rig, monkeypatch):
    """On a GPU a piece of the head has 1,024 rows: no slice asks for less, unless nothing more is left."""
    assert HEAD_PIECES["cuda"].unit * HEAD_PIECES["cuda"].least >= 1024 <= HEAD_PIECES["cuda"].rows
    expected = finish(rig.train_runner.loss_and_gradients(SAMPLES, 1.0))
    gradient = rig.bank.gradient.clone()
    rig.bank.gradient.zero_()
    monkeypatch.setitem(HEAD_PIECES, "cpu", HeadPieces(rows=16, unit=16, least=1))
    targets, pieces = sum(s.targets for s in SAMPLES), []
    work, result = rig.train_runner.loss_and_gradients(SAMPLES, 1.0), None
    with pytest.raises(StopIteration) as end:
        while True:
            piece = work.send(result)
            if piece.kind == "head":
                pieces.append((piece.tokens, piece.units, piece.least))
            result = piece.work(1 if piece.kind == "head" else piece.units)
    assert pieces[0] == (16, -(-targets // 16), 1) and pieces[-1] == (targets % 16 or 16, 1, 1)
    assert len(pieces) == pieces[0][1]
    assert float(end.value.value) == pytest.approx(float(expected), rel=1e-6)
    assert (rig.bank.gradient - gradient).norm() <= 1e-5 * gradient.norm()


def test_a_job_waits_for_a_gpu_between_slices_and_not_in_one(monkeypatch):
    """Serving goes on meanwhile. Ranks that share a model wait in the read: their slices must come in one order."""

    class Event:
        left = 3

        def record(self, stream):
            assert stream == "stream"

        def query(self):
            self.left -= 1
            return self.left < 0

    class OnGpu:
        is_cuda, device = True, torch.device("cuda")

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: "stream")
    assert list(until_done(OnGpu(), TpGroup())) == [WAIT] * 3
    assert not list(until_done(OnGpu(), tp_group_of(1, 2))) and not list(until_done(torch.zeros(1), TpGroup()))


def test_numbers_that_are_on_their_way_while_others_run_make_the_same_step(rig, monkeypatch):
    """On a GPU the end of a step waits for nothing: what the host must know is in its memory before."""
    expected = finish(trainer_for(rig).step(4, 1))
    shadow = rig.bank.shadow.detach().clone()
    rig.bank.set_shadow(random_state(rig.bank, 5))
    monkeypatch.setattr(trainer, "reads_later", lambda *_: True)
    again = trainer_for(rig)
    result, reads = without_waiting(again.step(4, 1), ("optimizer",))
    assert reads["optimizer"] == ["tolist"], "of what is in the host's memory by now"
    assert result == expected and torch.equal(rig.bank.shadow, shadow)
    assert finish(on_host(torch.arange(3.0), TpGroup())).tolist() == [0, 1, 2]
