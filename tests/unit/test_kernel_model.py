"""A real model computes the same tokens and gradients with the Triton kernels (interpreted) as with torch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers import Rig, answer, finish, make_rig, random_state, request
from torch.utils._pytree import tree_leaves

from clif.config import ConfigError, EngineConfig, TrainConfig
from clif.engine.jobs import Job
from clif.models.backends import assert_supported, choose_captured_kernels, choose_decode, choose_kernels
from clif.models.dual_linear import SHADOW
from clif.models.layer_ops import TorchOps
from clif.models.varlen import varlen_reference
from clif.training.train_runner import TrainRunner
from clif.training.trainer import ShadowTrainer
from clif.types import TrainSample

triton = pytest.importorskip("triton", reason="Triton is not installed: pip install triton")
SAMPLES = [TrainSample(id=i, ids=tuple(range(5 + i, 30 + 2 * i)), target_start=12) for i in range(2)]


def rig_with(kernel: str, model: str, **adapter: object) -> Rig:
    rig = make_rig(model, engine={"lora_kernel": kernel, "coserving": "fused"}, adapter=dict(adapter))
    # A clock that stands still: every promise has all its time left.
    rig.engine.clock = lambda: 0.0
    return rig


def serve_and_train(rig: Rig) -> tuple[dict[int, list[int]], torch.Tensor]:
    """Two requests of different versions and a training step in their steps: tokens, and the shadow's gradient."""
    trainer = ShadowTrainer(rig.train_runner, rig.bank, SAMPLES, TrainConfig(clip_norm=1e9))
    rig.engine.jobs.append(Job("step", trainer.step(len(SAMPLES), 1)))
    rig.fill(1, seed=4)
    rig.bank.set_shadow(random_state(rig.bank, 5))
    rig.engine.scheduler.add(request(0, [3, 9, 20, 11], max_tokens=3, ignore_eos=True), 0.0)
    tokens: dict[int, list[int]] = {0: [], 1: []}
    added = False
    while rig.engine.serving or rig.engine.jobs:
        for event in rig.engine.step():
            tokens[event.request_id] += event.tokens
        if not added:
            # Behind a promotion: two versions answer in one batch.
            rig.fill(2, seed=6)
            rig.engine.scheduler.add(request(1, [7, 8], max_tokens=2, ignore_eos=True), 0.0)
            added = True
    return tokens, rig.bank.gradient.clone()


def assert_same(model: str, **adapter: object) -> None:
    expected, found = (serve_and_train(rig_with(kernel, model, **adapter)) for kernel in ("torch", "triton"))
    assert found[0] == expected[0]
    assert (found[1] - expected[1]).norm() <= 1e-5 * expected[1].norm()


def test_a_mixed_batch_and_a_training_step_are_those_of_torch(two_layers, monkeypatch: pytest.MonkeyPatch) -> None:
    from clif.kernels.dual_lora_forms import DualLoraLinear

    launches, forward = [], DualLoraLinear.forward

    def watched(self: DualLoraLinear, x: torch.Tensor, segments: tuple, *tables: Any) -> Any:
        launches.append({segment.slot for segment in segments})
        return forward(self, x, segments, *tables)

    monkeypatch.setattr(DualLoraLinear, "forward", watched)
    assert_same(f"random:{two_layers}")
    assert any({0, SHADOW} <= slots for slots in launches) and {0, 1} in launches, (
        "rows of several kinds shared a launch"
    )


def test_so_they_are_where_only_some_packed_projections_are_adapted(two_layers) -> None:
    assert_same(f"random:{two_layers}", target_modules=["q_proj", "v_proj", "down_proj"])


@pytest.mark.slow
def test_so_they_are_in_the_real_260k_model(stories: str) -> None:
    answers, losses = [], []
    for kernel in ("torch", "triton"):
        rig = make_rig(stories, engine={"lora_kernel": kernel})
        rig.fill(1, seed=4)
        rig.bank.set_shadow(random_state(rig.bank, 5))
        events = rig.run([request(0, [1, 403, 407], max_tokens=6, ignore_eos=True)])
        loss = finish(
            rig.train_runner.loss_and_gradients([TrainSample(id=0, ids=tuple(range(1, 12)), target_start=4)], 1.0)
        )
        answers.append(answer(events[0]))
        losses.append((float(loss), rig.bank.gradient.clone()))
    assert answers[0] == answers[1]
    assert losses[0][0] == pytest.approx(losses[1][0], rel=1e-5)
    assert (losses[0][1] - losses[1][1]).norm() <= 1e-5 * losses[0][1].norm()


class Repeated:
    """Stands in for a graph: runs the region at every launch. The interpreter reads tensors on the host."""

    bytes = 0

    def __init__(self) -> None:
        self.launches = 0

    def capture(self, region: Callable[[], Any]) -> Any:
        @torch.no_grad()
        def replay() -> None:
            self.launches += 1
            for static, new in zip(tree_leaves(captured.result), tree_leaves(region()), strict=True):
                static.copy_(new)

        captured = SimpleNamespace(result=region(), replay=replay, release=lambda: None)
        return captured


def test_captured_steps_with_the_kernels_read_slots_and_blocks_of_the_steps_own_tables(two_layers) -> None:
    """Three versions, the base among them, in one replay; rows of padding; a request that ends before the others."""
    from clif.kernels.dual_lora_host import KernelLauncher
    from clif.kernels.paged_decode_host import PagedDecode
    from clif.kernels.tiles import LinearTiles
    from clif.kernels.tuning import Defaults

    class ByRows(Defaults):
        """Steps of different sizes ask for other forms, and for tables of different heights, as on a GPU."""

        def linear(self, rows: int, *shape: Any) -> LinearTiles:
            form, height = ("three", 64) if rows > 2 else ("fused", 16)
            return replace(self.tiles(form, rows, *shape[:3]), block_m=height)

    rigs, recorder = [make_rig(f"random:{two_layers}", engine={"max_batch": 4}) for _ in range(2)], Repeated()
    device = rigs[1].runner.device
    for linear in rigs[1].runner.stack.linears:
        linear.use_kernels(None, KernelLauncher(device, ByRows(programs=4, capability=80)))
    rigs[1].runner.paged = PagedDecode(device)
    rigs[1].runner.capture(recorder, 64)
    found = []
    for rig in rigs:
        tokens: dict[int, list[int]] = {i: [] for i in range(3)}
        for i in range(3):
            asked = request(i, [3 + i, 9, 20, 11], max_tokens=(5, 3, 5)[i], ignore_eos=True)
            rig.engine.scheduler.add(asked, 0.0)
            for event in rig.engine.serve():
                tokens[event.request_id] += event.tokens
            rig.fill(i + 1, seed=4 + i)
        while rig.engine.serving:
            for event in rig.engine.serve():
                tokens[event.request_id] += event.tokens
        found.append(tokens)
    assert found[0] == found[1] and recorder.launches >= 2


@pytest.mark.slow
def test_a_captured_training_pass_with_the_kernels_has_the_gradients_of_torch(two_layers) -> None:
    """All that a layer's graphs launch: products with their adapters, norms, rotation and gate, in both directions."""
    from clif.models.triton_ops import TritonOps

    samples = [TrainSample(id=i, ids=tuple(range(5 + i, 10 + 2 * i)), target_start=3) for i in range(2)]
    found, recorder = [], Repeated()
    for kernel, ops in (("torch", TorchOps()), ("triton", TritonOps(256))):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("clif.engine.base.choose_ops", lambda *_, ops=ops: ops)
            rig = make_rig(f"random:{two_layers}", engine={"lora_kernel": kernel})
        rig.runner.stack.varlen = varlen_reference
        rig.runner.train_recorder = recorder if kernel == "triton" else None
        runner = TrainRunner(rig.runner, (16,))
        rig.bank.set_shadow(random_state(rig.bank, 5))
        loss = finish(runner.loss_and_gradients(samples, 1.0))
        found.append((float(loss), rig.bank.gradient.clone()))
    assert recorder.launches == 1 + 2 * 2 and runner.graphs is not None
    assert all(held for graphs in runner.graphs.sizes.values() for held in graphs._held), "tables of the kernels"
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-5)
    assert (found[0][1] - found[1][1]).norm() <= 1e-5 * found[0][1].norm()


def test_a_nan_in_the_shadow_changes_no_answer_with_the_kernels(two_layers) -> None:
    rig = rig_with("triton", f"random:{two_layers}")
    rig.fill(1, seed=4)
    expected = answer(rig.run([request(0, [3, 9, 20], max_tokens=2, ignore_eos=True)])[0])
    rig.bank.set_shadow({k: torch.full_like(v, float("nan")) for k, v in rig.bank.shadow_state().items()})
    assert answer(rig.run([request(1, [3, 9, 20], max_tokens=2, ignore_eos=True)])[1]) == expected


def test_a_wish_that_cannot_be_met_is_an_error_and_says_what_to_change(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    assert_supported("engine.lora_kernel", cpu, torch.bfloat16, 64)
    with pytest.raises(ConfigError, match=r"adapter.r 65 is above 64: lower it, or set engine.lora_kernel=torch"):
        assert_supported("engine.lora_kernel", cpu, torch.bfloat16, 65)
    with pytest.raises(ConfigError, match="float64 is not supported"):
        assert_supported("engine.lora_kernel", cpu, torch.float64)
    monkeypatch.setattr(triton.knobs.runtime, "interpret", False)
    with pytest.raises(ConfigError, match=r"set TRITON_INTERPRET=1, or set engine\.lora_kernel=torch"):
        choose_kernels("triton", cpu, torch.float32, 8)
    with pytest.raises(ConfigError, match=r"set TRITON_INTERPRET=1, or set engine\.decode_kernel=torch"):
        choose_decode("triton", cpu, torch.float32)
    monkeypatch.setattr("clif.models.backends.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="pip install triton"):
        choose_kernels("triton", cpu, torch.float32, 8)


def test_without_a_table_captured_steps_take_the_kernels_by_rule_and_others_stay_with_torch(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    gpu, bf16 = torch.device("cuda"), torch.bfloat16
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(multi_processor_count=132))
    monkeypatch.setattr("clif.models.backends.table_path", lambda name: tmp_path / "gpu.json")
    assert choose_kernels("auto", gpu, bf16, 64) is None
    captured, wanted = choose_captured_kernels(EngineConfig(), gpu, bf16, 64), choose_kernels("triton", gpu, bf16, 64)
    assert captured is not None and wanted is not None
    forms = [
        {launcher.tiling.linear(rows, 4096, 4096, 64, False).form for rows in (1, 64, 2112)}
        for launcher in (captured, wanted)
    ]
    # Segments of captured steps are data.
    assert forms == [{"fused", "three"}, {"fused", "three", "separate"}]
    assert choose_captured_kernels(EngineConfig(graphs="off"), gpu, bf16, 64) is None
    assert choose_captured_kernels(EngineConfig(lora_kernel="torch"), gpu, bf16, 64) is None


def test_a_table_is_taken_for_its_own_layers_and_one_that_cannot_be_read_is_an_error_with_what_to_do(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from clif.kernels.tile_file import LaunchShape, LinearEntry, Spread, Stamp, TileFile
    from clif.kernels.tiles import LinearTiles

    gpu, bf16, file = torch.device("cuda"), torch.bfloat16, tmp_path / "gpu.json"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(multi_processor_count=132))
    monkeypatch.setattr("clif.models.backends.table_path", lambda name: file)
    # The tuner begins with attention, and may be ended at any time.
    TileFile({"device": "a GPU"}).write(file)
    assert choose_kernels("auto", gpu, bf16, 64) is None
    assert choose_captured_kernels(EngineConfig(), gpu, bf16, 64) is not None
    assert choose_decode("auto", gpu, bf16) is not None
    shape, spread = LaunchShape(64, 4096, 4096, 64, False), Spread(1.0, 2.0, 3.0)
    stamp = Stamp("2026-11-27", "a GPU", "2.11", "3.6", "0123456789ab")
    made = LinearEntry(shape, "fused", "fused", {"fused": LinearTiles()}, {"fused": spread}, {}, stamp)
    TileFile({"device": "a GPU"}, {shape: made}).write(file)
    for wanted, others in (("auto", False), ("triton", True)):
        launcher = choose_kernels(wanted, gpu, bf16, 64)
        assert launcher is not None and launcher.tiling.takes(4096, 4096, 64)
        assert launcher.tiling.takes(576, 1536, 64) is others
    file.write_text('{"about": {}, "linear": [], "grads": []}')
    choices = (
        lambda: choose_kernels("auto", gpu, bf16, 64),
        lambda: choose_captured_kernels(EngineConfig(), gpu, bf16, 64),
        lambda: choose_decode("auto", gpu, bf16),
    )
    assert choose_kernels("torch", gpu, bf16, 64) is None and choose_decode("torch", gpu, bf16) is None
    for choice in choices:
        with pytest.raises(ConfigError, match=r"earlier format.*make tune-gpu AGAIN=1, or remove the file"):
            choice()


def test_on_a_gpu_that_can_run_it_auto_means_the_decode_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu, capability = torch.device("cuda"), (9, 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    assert choose_decode("auto", gpu, torch.bfloat16) is not None
    assert choose_decode("torch", gpu, torch.bfloat16) is None
    assert choose_decode("auto", gpu, torch.float64) is None
    capability = (7, 5)
    assert choose_decode("auto", gpu, torch.bfloat16) is None
    assert choose_decode("auto", torch.device("cpu"), torch.bfloat16) is None


def test_on_a_cpu_auto_means_torch(two_layers) -> None:
    rig = rig_with("auto", f"random:{two_layers}")
    assert all(linear._kernels is None for linear in rig.runner.stack.linears)
    fused = rig_with("triton", f"random:{two_layers}").runner.stack.linears
    assert all(linear._kernels is not None for linear in fused)
