"""Products with weights of 8 and 4 bits in Triton's interpreter: they are those of the numbers that the weights stand
for, beside adapters, in engines and under the rules of captured steps."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers import Rig, answer, make_rig, request

pytest.importorskip("triton", reason="Triton is not installed: pip install triton")

from clif.adapters.bank import AdapterBank
from clif.config import AdapterConfig
from clif.engine.checked_capture import CheckedRecorder
from clif.kernels import quantised_host
from clif.kernels.dual_lora_host import KernelLauncher
from clif.kernels.dual_lora_reference import SHADOW, Segment
from clif.kernels.paged_decode_reference import PagedDecodeReference
from clif.kernels.quantised import QuantisedMatrix
from clif.kernels.quantised_host import INTERPRET, Matrix, ProductTiles, QuantisedKernels, product_tiles
from clif.kernels.tiles import LinearTiles
from clif.kernels.tuning import Fixed
from clif.models import quantising
from clif.models.base_weight import Dense, Permuted, Stacked
from clif.models.dual_linear import DualLinear, LoraRows
from clif.models.expert_linears import ExpertLinears, Groups, StoredExperts
from clif.models.nf4_matrix import Nf4Matrix
from clif.models.quantised_weight import QuantisedWeight
from clif.models.quantising import FORMATS

pytestmark = pytest.mark.skipif(not INTERPRET, reason="the kernels are compiled in this process: see tests/gpu")
CPU = torch.device("cpu")
KINDS = [kind for kind in FORMATS if kind != "nf4"]
"""bitsandbytes widens NF4."""
SMALL = ProductTiles(16, 64, 128, split=2)
EXACT = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 4e-3}


def kernels(split: int = 2) -> QuantisedKernels:
    return QuantisedKernels(CPU, ProductTiles(16, 64, 128, split=split))


def apart(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.double() - expected).norm() / expected.norm())


def product_is_that_of_the_dense(matrix: Matrix, dtype: torch.dtype, rows: int = 21, split: int = 2) -> bool:
    found, x = kernels(split), torch.randn(rows, matrix.in_).to(dtype)
    bias = torch.randn(matrix.out).to(dtype)
    # Numbers with one scale for each output are not rounded before they are multiplied.
    by_group = isinstance(matrix, QuantisedMatrix) and not matrix.by_output
    dense = matrix.dense(dtype if by_group else torch.float32).double()
    y = found.product(x, matrix, bias)
    assert not found.workspace().tickets.any(), "tickets are back at zero"
    return apart(y, x.double() @ dense.T + bias.double()) < EXACT[dtype]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("kind", KINDS)
def test_products_and_dense_parts_are_those_of_what_the_numbers_stand_for(kind: str, dtype: torch.dtype):
    torch.manual_seed(0)
    matrix = FORMATS[kind](torch.randn(70, 200))
    assert product_is_that_of_the_dense(matrix, dtype)
    for part in ((slice(3, 20), slice(32, 100)), (slice(5, 5), slice(None))):
        assert torch.equal(kernels().dense(matrix, dtype, *part), matrix.dense(dtype, *part))
    assert product_is_that_of_the_dense(FORMATS[kind](torch.randn(64, 128)), dtype, rows=1, split=1)


@pytest.mark.parametrize("added", ["least", "zeros", None])
@pytest.mark.parametrize("bits", [8, 4])
def test_groups_of_other_sizes_scales_and_zero_points_are_read(bits: Any, added: str | None):
    torch.manual_seed(1)
    out, in_, group = 70, 200, 64
    shape = (out, -(-in_ // group))
    numbers = torch.randint(-128, 128, (out, in_), dtype=torch.int8)
    if bits == 4:
        numbers = torch.randint(0, 256, (out, 112), dtype=torch.uint8)
    for dtype, of_scales in ((torch.float16, torch.bfloat16), (torch.bfloat16, torch.float16)):
        scales = (torch.rand(shape) + 0.1).to(of_scales)
        more = {"least": scales * -3, "zeros": torch.randint(0, 15, shape, dtype=torch.int8)}
        matrix = QuantisedMatrix(bits, in_, numbers, scales, group=group, **({added: more[added]} if added else {}))
        assert product_is_that_of_the_dense(matrix, dtype)
        part = slice(60, 70), slice(64, 200)
        assert apart(kernels().dense(matrix, dtype, *part), matrix.dense(dtype, *part).double()) < EXACT[dtype]


def test_rows_that_are_many_and_groups_that_do_not_fit_are_left_to_torch(monkeypatch: pytest.MonkeyPatch):
    found, matrix = kernels(), FORMATS["int4"](torch.randn(64, 96))
    assert found.takes(torch.randn(256, 96), matrix) and not found.takes(torch.randn(257, 96), matrix)
    odd = QuantisedMatrix(4, 96, matrix.numbers, matrix.scales[:, :2], group=48)
    assert not found.takes(torch.randn(3, 96), odd)
    monkeypatch.setattr(quantised_host, "FEW", 4)
    x = torch.randn(9, 96)
    for one in (matrix, odd):
        base = QuantisedWeight(one, torch.linspace(-1, 1, 64), torch.float32, found)
        plain = QuantisedWeight(one, base.bias, torch.float32)
        for rows in (x, x[:3]):
            assert torch.allclose(base.forward(rows), plain.forward(rows), atol=1e-5)
        grad = torch.randn(5, 64)
        assert torch.allclose(base.backward(grad), plain.backward(grad), atol=1e-5)


def test_a_nan_stays_in_its_row():
    matrix, x = FORMATS["fp8"](torch.randn(64, 128)), torch.randn(5, 128)
    clean = kernels().product(x, matrix, None)
    x[2] = torch.nan
    found = kernels().product(x, matrix, None)
    assert found[2].isnan().all() and torch.equal(found[[0, 1, 3, 4]], clean[[0, 1, 3, 4]])


def test_what_the_kernel_cannot_read_is_refused_with_a_sentence():
    matrix = FORMATS["int8"](torch.randn(64, 128))
    with pytest.raises(ValueError, match=r"does not fit W \[64, 128\]"):
        kernels().product(torch.randn(3, 64), matrix, None)
    with pytest.raises(ValueError, match="are multiplied"):
        kernels().product(torch.randn(3, 128).double(), matrix, None)


@pytest.mark.parametrize("bits", [8, 4])
def test_tiles_cover_few_rows_once_and_split_short_outputs(bits: int):
    for rows in (1, 16, 17, 64, 65, 256):
        for out, depth in ((3072, 2048), (2048, 8192), (128256, 4096), (64, 64)):
            tiles = product_tiles(rows, out, depth, bits, 132)
            assert tiles.block_m >= min(rows, 128 if bits == 8 else 64) and depth // 128 // tiles.split >= 4 * (
                tiles.split > 1
            )
    assert product_tiles(64, 3072, 2048, bits, 132).split > 1 == product_tiles(64, 28672, 4096, bits, 132).split


def test_weights_as_their_file_has_them_get_the_kernels_in_whatever_they_are_wrapped():
    torch.manual_seed(0)
    plain = QuantisedWeight(FORMATS["int4"](torch.randn(64, 96)), None, torch.float32)
    whole = Stacked((Permuted(plain, torch.randperm(96)), Dense(torch.randn(8, 96), None)))
    part = SimpleNamespace(base=whole)
    quantising.use_kernels(SimpleNamespace(weighed=lambda: [part]), kernels())  # type: ignore[arg-type]
    assert part.base.parts[0].inner.kernels is not None and part.base.parts[1] is whole.parts[1]
    x = torch.randn(3, 96)
    assert torch.allclose(part.base.forward(x), whole.forward(x), atol=1e-5)


# --- with adapters


def layer_with(matrix: Matrix, launcher: KernelLauncher | None) -> DualLinear:
    """Two merged modules of 16 and 48 outputs, the second of which is adapted."""
    layer = DualLinear(["first", "second"], [torch.nn.Linear(32, 16), torch.nn.Linear(32, 48)])
    layer.base = QuantisedWeight(
        matrix, torch.linspace(-1, 1, 64), torch.float32, None if launcher is None else kernels()
    )
    torch.manual_seed(0)
    lora = layer.adapt([1], r=4, scale=0.5, slots=2)
    bank = AdapterBank([lora], AdapterConfig(r=4))
    lora.shadow_b.data.normal_()
    bank.refresh()
    lora.fill_slot(0, {"second": (torch.randn(4, 32), torch.randn(48, 4))})
    if launcher is not None:
        layer.use_kernels(launcher)
        assert layer._kernels is not None
    return layer


@pytest.mark.parametrize("form", ["fused", "pair", "three", "branches", "separate"])
@pytest.mark.parametrize("kind", KINDS)
def test_adapters_beside_a_weight_that_is_not_dense_serve_and_learn(kind: str, form: Any):
    matrix, found = FORMATS[kind](torch.randn(64, 32, generator=torch.Generator().manual_seed(3))), []
    launcher = KernelLauncher(CPU, Fixed(LinearTiles(form=form, block_m=16, block_n=16, block_k=16, slices=2)))
    for one in (None, launcher):
        layer, rng = layer_with(matrix, one), torch.Generator().manual_seed(2)
        served, learnt = torch.randn(5, 32, generator=rng), torch.randn(6, 32, generator=rng).requires_grad_()
        rows = [LoraRows(5, (Segment(1, 4, 0),)), LoraRows(6, (Segment(0, 6, SHADOW),), learns=True)]
        first, second = layer([served, learnt], rows)
        second.backward(torch.ones_like(second))
        assert layer.lora is not None
        found.append([first, second, learnt.grad, layer.lora.shadow_a.grad, layer.lora.shadow_b.grad])
    for expected, got in zip(*found, strict=True):
        assert torch.allclose(got, expected, atol=1e-4, rtol=1e-4)


# --- experts


@pytest.mark.parametrize("ends", [(3, 3, 25, 25, 30), (30, 30, 30, 30, 30), (0, 0, 0, 17, 30)])
@pytest.mark.parametrize("kind", KINDS)
def test_each_row_is_multiplied_with_its_expert_s_matrix(kind: str, ends: tuple[int, ...]):
    torch.manual_seed(0)
    matrix, x = FORMATS[kind](torch.randn(5 * 72, 96)), torch.randn(30, 96)
    assert not isinstance(matrix, Nf4Matrix)
    found = kernels().grouped(x, matrix, torch.tensor(ends, dtype=torch.int32))
    each = matrix.dense(torch.float32).unflatten(0, (5, -1))
    expected = [x[start:stop] @ each[e].T for e, (start, stop) in enumerate(zip((0, *ends), ends, strict=False))]
    assert torch.allclose(found, torch.cat(expected), atol=1e-4)
    assert torch.equal(matrix.select(slice(72, 144)).dense(torch.float32), each[1])


@pytest.mark.parametrize("kind", KINDS)
def test_experts_in_one_product_serve_and_learn_as_one_after_the_other(kind: str):
    torch.manual_seed(0)
    weights, biases = torch.randn(4, 48, 64).bfloat16(), torch.randn(4, 48).bfloat16()
    matrix, found = FORMATS[kind](weights.flatten(0, 1)), kernels()
    assert not isinstance(matrix, Nf4Matrix)
    linears = ExpertLinears(weights, biases)
    for e, one in enumerate(linears.each):
        one.base = QuantisedWeight(matrix.select(slice(48 * e, 48 * e + 48)), None, torch.bfloat16)
    groups = Groups(torch.tensor([[3, 0]] * 9 + [[0, 1]] * 4), 4)
    x, grad = torch.randn(26, 64).bfloat16(), torch.randn(26, 48).bfloat16()
    expected = linears.forward(groups, x), linears.backward(groups, grad)
    linears.stored = StoredExperts(matrix, 4, found)
    linears.grouped = linears.can_group
    assert linears.grouped
    for got, wanted in zip((linears.forward(groups, x), linears.backward(groups, grad)), expected, strict=True):
        assert apart(got, wanted.double()) < 0.01


# --- in engines


def rig_of(model: str, kind: str, monkeypatch: pytest.MonkeyPatch, own: bool, **engine: Any) -> Rig:
    """own: products by the kernels."""
    monkeypatch.setattr("clif.engine.base.choose_quantised", lambda *_: QuantisedKernels(CPU) if own else None)
    return make_rig(model, model={"weight_dtype": kind}, engine=engine)


def test_an_engine_with_the_kernels_gives_the_tokens_of_one_without(monkeypatch: pytest.MonkeyPatch, two_layers: Path):
    found = []
    for own in (False, True):
        rig = rig_of(f"random:{two_layers}", "int4", monkeypatch, own)
        events = rig.run([request(0, [7, 3, 9], max_tokens=2, ignore_eos=True)])
        found.append(answer(events[0]))
        assert (getattr(rig.runner.stack.head.base, "kernels", None) is not None) is own
    assert found[0] == found[1]


@pytest.mark.parametrize("kind", KINDS)
def test_captured_steps_keep_to_the_rules_of_a_graph(monkeypatch: pytest.MonkeyPatch, two_layers: Path, kind: str):
    """By torch, as a CPU can be captured: the interpreter reads what it computes with."""
    rules, asked = CheckedRecorder(), [request(0, [7, 3, 9], max_tokens=5, ignore_eos=True)]
    expected = answer(rig_of(f"random:{two_layers}", kind, monkeypatch, False).run(asked)[0])
    rig = rig_of(f"random:{two_layers}", kind, monkeypatch, False, max_batch=1)
    rig.runner.paged = PagedDecodeReference()  # type: ignore[assignment]
    rig.runner.capture(rules, 256)
    assert answer(rig.run(asked)[0]) == expected
    assert any(region.replays for region in rules.regions)


def test_a_start_says_why_the_kernels_are_not_taken(monkeypatch: pytest.MonkeyPatch):
    assert quantising.quantised_fault("int8", CPU, torch.float32) is None
    monkeypatch.setattr(QuantisedKernels, "product", lambda self, x, matrix, bias: x.new_zeros(len(x), matrix.out))
    assert quantising.quantised_fault("int8", CPU, torch.float32) == "a kernel multiplies wrong here"
    assert quantising.choose_quantised("int8", CPU, torch.float32) is None
