"""Weights of 8 and 4 bits on a GPU: compiled kernels, captured steps, and what is allocated."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES
from helpers import Rig, answer, make_rig, request

pytest.importorskip("triton", reason="Triton is not installed: pip install triton")

from clif.kernels.fp8_matrix import Fp8Matrix
from clif.kernels.quantised import QuantisedMatrix
from clif.kernels.quantised_host import FEW, QuantisedKernels
from clif.models.estimate import estimate, read_spec
from clif.models.expert_linears import Groups
from clif.models.quantising import FORMATS, quantised_fault

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU here")]
DEVICE = torch.device("cuda")
KINDS = [kind for kind in FORMATS if kind != "nf4"]
PROMPTS = [[7, 3, 9], [11, 5, 8, 2, 40, 41, 17], [5], list(range(20, 75))]


@pytest.fixture(autouse=True)
def _has_numbers_of_eight_bits(request: pytest.FixtureRequest) -> None:
    if "fp8" in request.node.name and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("this GPU has no numbers of eight bits")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=["bf16", "fp16", "fp32"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_start_finds_no_fault(kind: str, dtype: torch.dtype) -> None:
    assert quantised_fault(kind, DEVICE, dtype) is None


@pytest.mark.parametrize("rows", [1, 7, 16, 33, 64, 100, 129, FEW])
@pytest.mark.parametrize("kind", KINDS)
def test_products_are_those_of_the_dense_matrix(kind: str, rows: int) -> None:
    rng = torch.Generator(DEVICE).manual_seed(rows)
    kernels = QuantisedKernels(DEVICE)
    for out, depth in ((3072, 2048), (1000, 1024), (16384, 2048)):
        weight = torch.randn(out, depth, generator=rng, device=DEVICE)
        matrix: Fp8Matrix | QuantisedMatrix = FORMATS[kind](weight)
        x = torch.randn(rows, depth, generator=rng, device=DEVICE).bfloat16()
        bias = torch.randn(out, generator=rng, device=DEVICE).bfloat16()
        found = kernels.product(x, matrix, bias)
        expected = x.float() @ matrix.dense(torch.float32).T + bias.float()
        assert (found.float() - expected).norm() <= 5e-3 * expected.norm()
        assert torch.equal(kernels.product(x, matrix, bias), found), "equal input gives equal bits"
        assert torch.equal(kernels.dense(matrix, torch.bfloat16), matrix.dense(torch.bfloat16))


def rig_of(config: Path, kind: str, **engine: Any) -> Rig:
    model = {"weight_dtype": kind, "dtype": "bfloat16"}
    return make_rig(f"random:{config}", model=model, engine=engine, device="cuda")


def answers(rig: Rig) -> list[list[int]]:
    rig.fill(1, seed=4)
    events = rig.run([request(i, ids, max_tokens=12, ignore_eos=True) for i, ids in enumerate(PROMPTS)])
    return [answer(events[i]) for i in range(len(PROMPTS))]


@pytest.mark.parametrize("kind", KINDS)
def test_captured_steps_give_the_answers_of_plain_ones(kind: str, tiny_config: Path) -> None:
    captured, plain = rig_of(tiny_config, kind), rig_of(tiny_config, kind, graphs="off")
    assert all(linear.base.kernels is not None for linear in captured.runner.stack.linears)  # type: ignore[attr-defined]
    found, expected = answers(captured), answers(plain)
    same = sum(a == b for one, other in zip(found, expected, strict=True) for a, b in zip(one, other, strict=True))
    # In bfloat16 a token of a random model may be a tie.
    assert same >= 0.75 * 12 * len(PROMPTS)


@pytest.mark.parametrize("kind", KINDS)
def test_experts_are_one_launch_and_their_steps_are_captured(kind: str, tmp_path: Path) -> None:
    (family,) = (one for one in FAMILIES if one.name == "qwen3_moe")
    file = tmp_path / "config.json"
    file.write_text(json.dumps(family.config))
    captured, plain = rig_of(file, kind), rig_of(file, kind, graphs="off")
    stack = captured.runner.stack
    linears = [one for mlp in stack.routed for one in mlp.linears]
    assert linears and all(one.grouped and one.stored is not None for one in linears)
    assert captured.runner.graphs is not None
    found, expected = answers(captured), answers(plain)
    same = sum(a == b for one, other in zip(found, expected, strict=True) for a, b in zip(one, other, strict=True))
    assert same >= 0.75 * 12 * len(PROMPTS)
    groups = Groups(torch.arange(40, device=DEVICE)[:, None] * 3 % 8, 8)
    for one in linears[:2]:
        x = torch.randn(40, one.stored.matrix.in_, device=DEVICE).bfloat16()
        grad = torch.randn(40, one.stored.matrix.out // 8, device=DEVICE).bfloat16()
        together = one.forward(groups, x), one.backward(groups, grad)
        one.grouped = False
        apart = one.forward(groups, x), one.backward(groups, grad)
        one.grouped = True
        for a, b in zip(together, apart, strict=True):
            assert (a.float() - b.float()).norm() <= 0.01 * b.float().norm()


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_allocated_is_what_the_estimate_says(kind: str, tiny_config: Path) -> None:
    rig = rig_of(tiny_config, kind, graphs="off")
    stack = rig.runner.stack
    held = sum(t.nbytes for part in (*stack.linears, stack.head) for t in part.base.tensors)
    held += sum(p.nbytes for p in rig.loaded.model.parameters())
    assert estimate(rig.config, read_spec(rig.config.model.path), 1, "cuda").weights == pytest.approx(held, rel=0.05)
