"""A model whose layers use the Triton kernels (interpreted) computes what torch's operators do, in fewer launches."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from helpers import Rig, answer, finish, make_rig, random_state, request
from kernel_count import KernelCount
from torch import nn
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

pytest.importorskip("triton", reason="Triton is not installed: pip install triton")

from clif.kernels.elementwise_host import INTERPRET
from clif.models.backends import choose_ops
from clif.models.causal import CausalSequences
from clif.models.dual_linear import LoraRows
from clif.models.layer import DecoderLayer
from clif.models.layer_ops import HeadLayout, TorchGate, TorchNorm, TorchOps, TorchRotary
from clif.models.stack import CausalStack
from clif.models.triton_ops import TritonNorm, TritonOps, TritonRotary, as_rms_norm, triton_gate
from clif.types import TrainSample

pytestmark = pytest.mark.skipif(not INTERPRET, reason="the kernels are compiled in this process: see tests/gpu")
CPU = torch.device("cpu")
SAMPLES = [TrainSample(id=i, ids=tuple(range(5 + i, 17 + 2 * i)), target_start=6) for i in range(2)]
DECODE_KERNELS = 12
"""The most that a layer may launch for decode rows of the base."""


def rig_with(ops: Any, monkeypatch: pytest.MonkeyPatch, model: str, **engine: Any) -> Rig:
    monkeypatch.setattr("clif.engine.base.choose_ops", lambda *_: ops)
    return make_rig(model, engine=engine)


# --- which parts the kernels compute


def test_on_a_gpu_that_can_run_it_and_nowhere_else_layers_use_the_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu, capability = torch.device("cuda"), (9, 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert isinstance(choose_ops(gpu, torch.bfloat16), TritonOps)
    assert isinstance(choose_ops(gpu, torch.float64), TorchOps)
    assert isinstance(choose_ops(CPU, torch.float32), TorchOps)
    capability = (7, 5)
    assert isinstance(choose_ops(gpu, torch.bfloat16), TorchOps)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_norm_is_computed_by_the_kernel_if_it_is_rms_norm_whatever_its_name_is(dtype: torch.dtype) -> None:
    plain = Qwen3RMSNorm(64, eps=1e-5).to(dtype)
    plain.weight.data.normal_(1, 0.3, generator=torch.Generator().manual_seed(0))
    weight, eps = as_rms_norm(plain) or (None, None)
    assert eps == 1e-5 and weight is not None and torch.equal(weight, plain.weight)
    assert isinstance(TritonOps().norm(plain), TritonNorm)
    wrong_eps = Qwen3RMSNorm(64, eps=1e-5).to(dtype)
    wrong_eps.forward = lambda x: Qwen3RMSNorm.forward(plain, x)
    wrong_eps.weight, wrong_eps.variance_epsilon = plain.weight, 1e-3
    for other in (GemmaRMSNorm(64).to(dtype), nn.LayerNorm(64, dtype=dtype), nn.Identity(), wrong_eps):
        assert isinstance(TritonOps().norm(other), TorchNorm)
        rotary = TritonOps().rotary(HeadLayout(2, 1, 64, (plain, other)))
        assert isinstance(rotary, TorchRotary)
    assert isinstance(TritonOps().rotary(HeadLayout(2, 1, 64, (plain, plain))), TritonRotary)


def test_gates_other_than_silu_s_are_torch_s() -> None:
    assert TritonOps().gate(nn.SiLU()) is triton_gate
    assert isinstance(TritonOps().gate(nn.GELU()), TorchGate)


# --- a layer, forward and backward


def layer_run(stack: CausalStack, learns: bool) -> list[torch.Tensor]:
    """Output and, for rows that learn, gradients of both layers' input and of the shadow."""
    lengths = (5, 7)
    positions = torch.cat([torch.arange(3, 3 + n) for n in lengths])
    rows = stack.sub_batch(LoraRows(12, learns=learns), positions, CausalSequences(lengths, CPU))
    hidden = torch.randn(12, stack.spec.hidden_size, generator=torch.Generator().manual_seed(1))
    hidden = hidden.to(stack.embed(torch.tensor([1])).dtype).requires_grad_(learns)
    (out,) = stack.layers(0, 2, [hidden], [rows])
    out = stack.norm(out)
    if not learns:
        return [out]
    wanted = [hidden, *(t for linear in stack.linears for t in (linear.lora.shadow_a, linear.lora.shadow_b))]
    return [out, *torch.autograd.grad(out, wanted, torch.ones_like(out))]


@pytest.mark.parametrize("learns", [False, True], ids=["serves", "learns"])
@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_layers_compute_what_torch_s_do_forward_and_backward(
    two_layers: Any, tmp_path: Any, monkeypatch: pytest.MonkeyPatch, kind: str, learns: bool
) -> None:
    tree = json.loads(two_layers.read_text()) | {"model_type": kind}
    if kind == "qwen3":
        tree |= {"architectures": ["Qwen3ForCausalLM"], "head_dim": 10}
    config = tmp_path / "config.json"
    config.write_text(json.dumps(tree))
    runs = []
    for ops in (TorchOps(), TritonOps()):
        rig = rig_with(ops, monkeypatch, f"random:{config}")
        rig.bank.set_shadow(random_state(rig.bank, 5))
        rig.bank.refresh()
        for name, weight in rig.runner.stack.model.named_parameters():
            if "norm" in name:
                weight.data.normal_(1, 0.3, generator=torch.Generator().manual_seed(len(name)))
        runs.append(layer_run(rig.runner.stack, learns))
    for found, expected in zip(*runs, strict=True):
        assert expected.norm() > 0
        assert (found - expected).norm() <= 1e-5 * expected.norm()


# --- an engine


def serve_and_train(rig: Rig) -> tuple[list[list[int]], float, torch.Tensor]:
    """Answers of two versions and the base's, and loss and gradient of the shadow."""
    requests = [request(0, [3, 9, 20, 11], max_tokens=3, ignore_eos=True)]
    answers = [answer(rig.run(requests)[0])]
    rig.fill(1, seed=4)
    rig.bank.set_shadow(random_state(rig.bank, 5))
    events = rig.run([request(i, [i, *range(9)], max_tokens=3, ignore_eos=True) for i in (1, 2)], arrive={2: 1})
    loss = finish(rig.train_runner.loss_and_gradients(SAMPLES, 10.0))
    return [*answers, *(answer(events[i]) for i in (1, 2))], loss, rig.bank.gradient.clone()


def test_an_engine_with_the_kernels_gives_torch_s_tokens_loss_and_gradient(
    two_layers: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prompts, continued prompts, answers with and without adapter, and training with a layer computed again."""
    (tokens, loss, grad), (found, found_loss, found_grad) = (
        serve_and_train(rig_with(ops, monkeypatch, f"random:{two_layers}", max_prefill_tokens=8))
        for ops in (TorchOps(), TritonOps())
    )
    assert found == tokens
    assert found_loss == pytest.approx(loss, rel=1e-5)
    assert (found_grad - grad).norm() <= 1e-5 * grad.norm()


def test_activations_that_rows_leave_behind_are_no_more_than_torch_s(
    two_layers: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    torchs, kernels = (
        rig_with(ops, monkeypatch, f"random:{two_layers}").train_runner.activations.layer
        for ops in (TorchOps(), TritonOps())
    )
    assert kernels <= torchs


# --- counts of kernels


def decode_kernels(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """What each layer of each step that only decodes launches."""
    # The first launch of a kernel allocates its workspace.
    rig.run([request(9, [1, 2], max_tokens=2, ignore_eos=True)])
    counts, run = [], DecoderLayer.__call__

    def counted(layer: DecoderLayer, hidden: Any, sub_batches: Any) -> list[torch.Tensor]:
        with KernelCount() as count:
            out = run(layer, hidden, sub_batches)
        counts.append((len(hidden[0]), count.names))
        return out

    monkeypatch.setattr(DecoderLayer, "__call__", counted)
    rig.run([request(i, [3, 9, 20, 11, 5], max_tokens=3, ignore_eos=True) for i in range(2)])
    return [names for rows, names in counts if rows == 2]


def test_a_layer_of_a_decode_step_is_at_most_twelve_kernels(two_layers: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Besides LoRA: the rows use the base."""
    rig = rig_with(TritonOps(), monkeypatch, f"random:{two_layers}", decode_kernel="triton")
    found = decode_kernels(rig, monkeypatch)
    assert len(found) >= 4
    for names in found:
        assert len(names) <= DECODE_KERNELS, "\n".join(names)
        for kernel in ("add_rms_norm", "add_rms_norm", "rotate_heads", "paged_decode", "swiglu"):
            names.remove(kernel)


def test_the_rule_counts_torch_s_operators_too(two_layers: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    rig = rig_with(TorchOps(), monkeypatch, f"random:{two_layers}", decode_kernel="triton")
    assert all(len(names) > 2 * DECODE_KERNELS for names in decode_kernels(rig, monkeypatch))
