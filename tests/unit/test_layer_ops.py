"""A model whose layers use the Triton kernels (interpreted) computes what torch's operators do, in fewer launches."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import Rig, answer, random_state, request, small_config
from kernel_count import counted_kernels, whole_launches
from torch import nn
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

pytest.importorskip("triton", reason="Triton is not installed: pip install triton")

from triton.errors import TritonError

from clif.config import Config, TrainConfig
from clif.engine.base import Base, build_base
from clif.engine.build import build_engine
from clif.engine.checked_capture import CheckedRecorder
from clif.engine.jobs import Job
from clif.kernels.elementwise_host import INTERPRET
from clif.kernels.paged_decode_config import DecodeConfig
from clif.kernels.paged_decode_host import PagedDecode
from clif.kernels.paged_decode_reference import PagedDecodeReference
from clif.models import triton_ops
from clif.models.backends import choose_ops
from clif.models.causal import CausalSequences
from clif.models.dual_linear import LoraRows
from clif.models.layer import DecoderLayer
from clif.models.layer_ops import HeadLayout, LayerOps, TorchGate, TorchNorm, TorchOps, TorchRotary, as_offset_norm
from clif.models.stack import CausalStack
from clif.models.triton_ops import TritonNorm, TritonOps, TritonRotary, as_rms_norm, kernel_fault, triton_gate
from clif.models.weights.loading import load_model
from clif.training.trainer import ShadowTrainer
from clif.types import TrainSample

pytestmark = pytest.mark.skipif(not INTERPRET, reason="the kernels are compiled in this process: see tests/gpu")
CPU = torch.device("cpu")
SAMPLES = [TrainSample(id=i, ids=tuple(range(5 + i, 17 + 2 * i)), target_start=6) for i in range(2)]
DECODE_KERNELS = 12
"""The most that a layer may launch for decode rows of the base."""


@pytest.fixture(scope="module")
def bases(two_layers: Path) -> dict[str, Base]:
    """One model with either kind of parts; each test has engines of its own on them."""
    config = small_config(f"random:{two_layers}")
    return {"torch": base_with(TorchOps(), config), "triton": base_with(TritonOps(256), config)}


def base_with(ops: LayerOps, config: Config) -> Base:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("clif.engine.base.choose_ops", lambda *_: ops)
        return build_base(config, load_model(config.model, CPU, 3))


def rig_on(base: Base, **engine: Any) -> Rig:
    base.bank.reset(3)
    config = small_config("random:", engine=engine)
    return Rig(config, base.loaded, build_engine(config, base))


# --- which parts the kernels compute


def test_on_a_gpu_that_can_run_it_and_nowhere_else_layers_use_the_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu, capability = torch.device("cuda"), (9, 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr("clif.models.triton_ops.kernel_fault", lambda *_: None)
    assert isinstance(choose_ops(gpu, torch.bfloat16, 64), TritonOps)
    assert isinstance(choose_ops(gpu, torch.float64, 64), TorchOps)
    assert isinstance(choose_ops(CPU, torch.float32, 64), TorchOps)
    capability = (7, 5)
    assert isinstance(choose_ops(gpu, torch.bfloat16, 64), TorchOps)


def test_kernels_that_fail_or_are_wrong_on_a_device_are_not_used_there(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    assert kernel_fault(CPU, torch.bfloat16) is None and kernel_fault(CPU, torch.float32) is None
    with monkeypatch.context() as wrong:
        wrong.setattr(triton_ops, "launch_swiglu_grad", lambda wide, grad: torch.zeros_like(wide))
        assert (kernel_fault(CPU, torch.float32) or "").startswith("the kernels are wrong here: gradient by")
    with monkeypatch.context() as wrong:
        rotate = triton_ops.launch_rotate_heads
        wrong.setattr(triton_ops, "launch_rotate_heads", lambda *given: rotate(*given[:6]))
        assert (kernel_fault(CPU, torch.float32) or "").startswith("the kernels are wrong here: cache by 1")

    def fails(*_: Any) -> None:
        raise TritonError("no such instruction\nwith a long dump")

    monkeypatch.setattr(triton_ops, "launch_add_rms_norm", fails)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    found = kernel_fault(CPU, torch.bfloat16)
    assert found == "a kernel fails: no such instruction"
    monkeypatch.setattr(triton_ops, "kernel_fault", lambda *_: found)
    with caplog.at_level("INFO"):
        assert isinstance(choose_ops(torch.device("cuda"), torch.bfloat16, 64), TorchOps)
    assert "torch (a kernel fails: no such instruction)" in caplog.text


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_norm_is_computed_by_the_kernel_if_it_is_rms_norm_whatever_its_name_is(dtype: torch.dtype) -> None:
    plain = Qwen3RMSNorm(64, eps=1e-5).to(dtype)
    plain.weight.data.normal_(1, 0.3, generator=torch.Generator().manual_seed(0))
    weight, eps = as_rms_norm(plain) or (None, None)
    assert eps == 1e-5 and weight is not None and torch.equal(weight, plain.weight)
    assert isinstance(TritonOps(256).norm(plain), TritonNorm)
    wrong_eps = Qwen3RMSNorm(64, eps=1e-5).to(dtype)
    wrong_eps.forward = lambda x: Qwen3RMSNorm.forward(plain, x)
    wrong_eps.weight, wrong_eps.variance_epsilon = plain.weight, 1e-3
    for other in (GemmaRMSNorm(64).to(dtype), nn.LayerNorm(64, dtype=dtype), nn.Identity(), wrong_eps):
        assert isinstance(TritonOps(256).norm(other), TorchNorm)
        rotary = TritonOps(256).rotary(HeadLayout(2, 1, 64, (plain, other)))
        assert isinstance(rotary, TorchRotary)
    assert isinstance(TritonOps(256).rotary(HeadLayout(2, 1, 64, (plain, plain))), TritonRotary)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_norm_of_gemma_is_told_by_what_it_computes(dtype: torch.dtype) -> None:
    offset = GemmaRMSNorm(64).to(dtype)
    offset.weight.data.normal_(0, 0.3, generator=torch.Generator().manual_seed(0))
    weight, eps = as_offset_norm(offset) or (None, None)
    assert eps == offset.eps and weight is not None and torch.equal(weight, 1 + offset.weight.float())
    for other in (Qwen3RMSNorm(64).to(dtype), nn.LayerNorm(64, dtype=dtype), nn.Identity()):
        assert as_offset_norm(other) is None


def test_gates_other_than_silu_s_are_torch_s() -> None:
    assert TritonOps(256).gate(nn.SiLU()) is triton_gate
    assert isinstance(TritonOps(256).gate(nn.GELU()), TorchGate)


# --- a layer, forward and backward


def layer_run(base: Base) -> list[torch.Tensor]:
    """Output of layers and last norm for rows that serve, for rows that learn, and gradients of those: of the layers'
    input and of the shadow."""
    stack, lengths, runs = base.stack, (4, 5), []
    base.bank.set_shadow(random_state(base.bank, 5))
    base.bank.refresh()
    for name, weight in stack.model.named_parameters():
        if "norm" in name:
            weight.data.normal_(1, 0.3, generator=torch.Generator().manual_seed(len(name)))
    positions = torch.cat([torch.arange(3, 3 + n) for n in lengths])
    for learns in (False, True):
        rows = stack.sub_batch(LoraRows(9, learns=learns), positions, CausalSequences(lengths, CPU))
        hidden = torch.randn(9, stack.spec.hidden_size, generator=torch.Generator().manual_seed(1))
        (out,) = stack.layers(0, 2, [hidden.requires_grad_(learns)], [rows])
        runs.append(stack.norm(out))
    wanted = [hidden, *(t for linear in stack.linears for t in (linear.lora.shadow_a, linear.lora.shadow_b))]
    return [*runs, *torch.autograd.grad(runs[1], wanted, torch.ones_like(runs[1]))]


@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_layers_compute_what_torch_s_do_forward_and_backward(
    bases: dict[str, Base], two_layers: Path, tmp_path: Path, kind: str
) -> None:
    if kind == "qwen3":
        norms = {"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"], "head_dim": 10}
        (tmp_path / "config.json").write_text(json.dumps(json.loads(two_layers.read_text()) | norms))
        config = small_config(f"random:{tmp_path / 'config.json'}")
        bases = {"torch": base_with(TorchOps(), config), "triton": base_with(TritonOps(256), config)}
    for found, expected in zip(layer_run(bases["triton"]), layer_run(bases["torch"]), strict=True):
        assert expected.norm() > 0
        assert (found - expected).norm() <= 1e-5 * expected.norm()


def test_angles_are_those_of_the_model_bit_for_bit_and_one_launch(bases: dict[str, Base]) -> None:
    positions = torch.tensor([0, 255, 7, 7, 100])
    torchs, table = (base.stack.sub_batch(LoraRows(5), positions, OneKernelPlan()).ropes[0] for base in bases.values())
    assert torch.equal(table.cos, torchs.cos) and torch.equal(table.sin, torchs.sin)
    with counted_kernels() as names:
        beyond = bases["triton"].stack.sub_batch(LoraRows(1), torch.tensor([260]), OneKernelPlan())
    assert names == ["index_select"] and beyond.ropes[0].cos.isfinite().all()


# --- an engine


def serve_and_train(rig: Rig) -> tuple[dict[int, list[int]], torch.Tensor]:
    """Answers of the base and of an adapter, with a training step in their steps; and the shadow's gradient."""
    trainer = ShadowTrainer(rig.train_runner, rig.bank, SAMPLES, TrainConfig(clip_norm=1e9))
    # A clock that stands still: every promise has all its time left.
    rig.engine.clock = lambda: 0.0
    rig.engine.jobs.append(Job("step", trainer.step(len(SAMPLES), 1)))
    rig.engine.scheduler.add(request(0, [3, 9, 20, 11], max_tokens=4, ignore_eos=True), 0.0)
    events = rig.engine.step()
    rig.fill(1, seed=4)
    rig.bank.set_shadow(random_state(rig.bank, 5))
    rig.engine.scheduler.add(request(1, [*range(11)], max_tokens=3, ignore_eos=True), 0.0)
    while rig.engine.serving or rig.engine.jobs:
        events += rig.engine.step()
    return {i: answer([event for event in events if event.request_id == i]) for i in (0, 1)}, rig.bank.gradient.clone()


def test_an_engine_with_the_kernels_gives_torch_s_tokens_and_gradient(
    bases: dict[str, Base], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prompts, prompts that are continued, answers with and without adapter, and training rows in their products."""
    kinds, run = [], DecoderLayer.__call__
    monkeypatch.setattr(DecoderLayer, "__call__", lambda *given: kinds.append(len(given[1])) or run(*given))
    (tokens, grad), (found, found_grad) = (
        serve_and_train(rig_on(base, coserving="fused", max_prefill_tokens=8)) for base in bases.values()
    )
    assert found == tokens and [len(answer) for answer in tokens.values()] == [4, 3]
    assert 2 in kinds, "layers had rows of both kinds"
    assert grad.norm() > 0 and (found_grad - grad).norm() <= 1e-5 * grad.norm()


def test_a_captured_step_keeps_to_the_rules_with_the_kernels(bases: dict[str, Base]) -> None:
    """It runs again with other rows, slots and angles in the same buffers."""
    requests = [request(i, [3 + i, 9, 20], max_tokens=3 + i, ignore_eos=True) for i in range(2)]
    expected, launches = rig_on(bases["torch"], max_batch=2).run(requests), []
    rig, recorder = rig_on(bases["triton"], max_batch=2), CheckedRecorder()
    rig.runner.paged = PagedDecodeReference()
    with whole_launches(launches):
        rig.runner.capture(recorder, 32)
        assert {i: answer(events) for i, events in rig.run(requests).items()} == {
            i: answer(events) for i, events in expected.items()
        }
    assert all(region.replays for region in recorder.regions) and "rotate_heads" in launches


def test_rows_that_learn_leave_no_more_behind_than_torch_s(bases: dict[str, Base]) -> None:
    torchs, kernels = (rig_on(base).train_runner.activations.layer for base in bases.values())
    assert kernels <= torchs


# --- counts of kernels


def decode_kernels(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """What each layer of each step launches that only decodes."""
    counts, run = [], DecoderLayer.__call__

    def counted(layer: DecoderLayer, hidden: Any, added: Any, sub_batches: Any) -> Any:
        with counted_kernels() as names:
            out = run(layer, hidden, added, sub_batches)
        counts.append((len(hidden[0]), names))
        return out

    rig.runner.paged = PagedDecode(CPU, DecodeConfig(block_kv=16, parts=2, least=16))
    # The first launch allocates a workspace.
    rig.run([request(9, [1, 2], max_tokens=2, ignore_eos=True)])
    monkeypatch.setattr(DecoderLayer, "__call__", counted)
    rig.run([request(i, [3, 9, 20, 11, 5], max_tokens=3, ignore_eos=True) for i in range(2)])
    return [names for rows, names in counts if rows == 2]


def test_a_layer_of_a_decode_step_is_at_most_twelve_kernels(
    bases: dict[str, Base], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Besides LoRA: the rows use the base."""
    found = decode_kernels(rig_on(bases["triton"]), monkeypatch)
    assert len(found) >= 4
    for names in found:
        assert len(names) <= DECODE_KERNELS, "\n".join(names)
        assert names == [
            "add_rms_norm", "mm", "rotate_heads", "paged_decode", "mm", "add_rms_norm", "mm", "swiglu", "mm",
        ]  # fmt: skip


def test_the_count_sees_torch_s_operators_too(bases: dict[str, Base], monkeypatch: pytest.MonkeyPatch) -> None:
    assert all(len(names) > 2 * DECODE_KERNELS for names in decode_kernels(rig_on(bases["torch"]), monkeypatch))


class OneKernel(torch.autograd.Function):
    """Stands for attention, which is one launch in each direction: rows that attend to nobody."""

    @staticmethod
    def forward(ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        ctx.shape = key.shape
        return query.neg()

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return gradients[0].neg(), *(gradients[0].new_empty(ctx.shape) for _ in range(2))


class OneKernelPlan:
    def cache_rows(self, layer: int) -> None:
        return None

    def attend(self, layer: int, query: Any, key: Any, value: Any, scale: float) -> torch.Tensor:
        return OneKernel.apply(query, key, value).flatten(1)


def test_a_layer_of_rows_that_learn_is_nine_kernels_and_a_sum_forward_and_nine_backward(bases: dict[str, Base]) -> None:
    """Besides LoRA: a stack without adapters carries the gradient down."""
    stack = CausalStack(bases["triton"].loaded.model.requires_grad_(False), ops=TritonOps(256))
    rows = stack.sub_batch(LoraRows(3, learns=True), torch.arange(3), OneKernelPlan())
    hidden = torch.randn(3, stack.spec.hidden_size, requires_grad=True)
    with counted_kernels() as forward:
        (out,) = stack.layers(1, 2, [hidden], [rows])
    grad = torch.ones_like(out)
    with counted_kernels() as backward:
        out.backward(grad)
    assert forward == [
        "add_rms_norm", "mm", "rotate_heads", "neg", "mm", "add_rms_norm", "mm", "swiglu", "mm", "add",
    ]  # fmt: skip
    assert backward == [
        "mm", "swiglu_grad", "mm", "rms_norm_grad", "mm", "neg", "rotate_heads_grad", "mm", "rms_norm_grad",
    ]  # fmt: skip
