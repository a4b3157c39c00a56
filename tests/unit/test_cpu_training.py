"""The C++ kernels of training against float64, on any number of threads and on both levels."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import pytest
import torch
from torch.nn.functional import cross_entropy, gelu, silu
from torch.nn.functional import scaled_dot_product_attention as sdpa

from clif.kernels.cpu.host import RmsNorm, scores_of
from clif.kernels.cpu.library import AVX512, GELU, Absent, level
from clif.kernels.cpu.training import LearningFactors, TrainingKernels
from clif.models.scores import Scores

try:
    level()
except Absent as absent:
    pytest.skip(f"no C++ kernels: {absent}", allow_module_level=True)

BF16 = torch.bfloat16
ROUNDED = 3e-3
"""Relative error of what is rounded to bfloat16 once; products of what was rounded before."""
SUMMED = 1e-6


def error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.double() - expected.double()).norm() / expected.double().norm())


def draw(*shape: int, scale: float = 1.0) -> torch.Tensor:
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape))) * scale).to(BF16)


@pytest.fixture(params=[1, 2, 3])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.fixture(params=["best", "avx512"])
def kernels(request: pytest.FixtureRequest) -> TrainingKernels:
    made = TrainingKernels()
    if request.param == "avx512":
        made._level = AVX512
    return made


def factors_of(inputs: int, outputs: Sequence[int], r: int, left_out: int | None = None) -> LearningFactors:
    """Of merged modules, one of which may have no adapter."""
    adapted = [i for i in range(len(outputs)) if i != left_out]
    starts = [sum(outputs[:i]) for i in range(len(outputs))]
    a, b = draw(len(adapted) * r, inputs, scale=0.1), torch.zeros(sum(outputs), len(adapted) * r, dtype=BF16)
    spans = [(starts[i], starts[i] + outputs[i]) for i in adapted]
    for block, (start, stop) in enumerate(spans):
        b[start:stop, block * r : (block + 1) * r] = draw(stop - start, r, scale=0.1)
    gradients = torch.ones(a.shape), torch.ones(sum(stop - start for start, stop in spans), r)
    return LearningFactors(a, b, r, 2.0, spans, gradients)


@pytest.mark.parametrize(
    ("rows", "inputs", "outputs", "r", "left_out"),
    [
        (512, 192, [96, 32, 64], 8, None),
        (37, 64, [32, 96], 4, 0),
        (7, 96, [64], 16, None),
        (530, 64, [1312], 8, None),
        (33, 32, [32, 64], 24, None),
    ],
)
def test_the_backward_of_a_linear_layer_is_that_of_float64_and_adds_to_the_factors_gradients(
    kernels, threads, rows, inputs, outputs, r, left_out
):
    factors = factors_of(inputs, outputs, r, left_out)
    weight, x, grad = draw(sum(outputs), inputs, scale=0.1), draw(rows, inputs), draw(rows, sum(outputs))
    low = x @ factors.a.T
    found = kernels.learning_backward(weight, factors, grad, x, low, True)
    low_grad = factors.scale * grad.double() @ factors.b.double()
    assert error(found, grad.double() @ weight.double() + low_grad @ factors.a.double()) < ROUNDED
    assert error(factors.gradients[0] - 1, low_grad.T @ x.double()) < ROUNDED
    of_b = factors.scale * grad.double().T @ low.double()
    blocks = [of_b[start:stop, i * r : (i + 1) * r] for i, (start, stop) in enumerate(factors.outputs)]
    assert error(factors.gradients[1] - 1, torch.cat(blocks)) < SUMMED * 10


def test_a_linear_layer_without_factors_carries_the_gradient_down(kernels, threads):
    weight, grad = draw(1664, 64), draw(70, 1664)
    assert error(kernels.linear_backward(weight, grad), grad.double() @ weight.double()) < ROUNDED


def test_gradients_of_factors_do_not_depend_on_the_number_of_threads():
    found, before = [], torch.get_num_threads()
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        factors = factors_of(160, [96, 32], 8)
        x, grad = draw(75, 160), draw(75, 128)
        down = TrainingKernels().learning_backward(draw(128, 160), factors, grad, x, x @ factors.a.T, True)
        found.append((down, *factors.gradients))
    torch.set_num_threads(before)
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))


@pytest.mark.parametrize(
    ("lengths", "heads", "kv_heads", "head_dim"),
    [
        ([128, 128], 6, 2, 64),
        ([5, 1, 33, 64, 65, 100], 4, 2, 64),
        ([70, 17], 2, 2, 16),
        ([300, 20], 4, 1, 128),
        ([40], 3, 3, 80),
        ([3, 9], 2, 1, 8),
    ],
)
def test_causal_attention_and_its_backward_are_those_of_float64(kernels, threads, lengths, heads, kv_heads, head_dim):
    sizes = [heads, kv_heads, kv_heads]
    qkv, grad = draw(sum(lengths), sum(sizes), head_dim), draw(sum(lengths), heads * head_dim)
    ends = torch.tensor([sum(lengths[:i]) for i in range(len(lengths) + 1)], dtype=torch.int32)
    scale = head_dim**-0.5
    out, log_sums = kernels.causal(*qkv.split(sizes, 1), ends, scores_of(scale))
    grads = kernels.causal_backward(*qkv.split(sizes, 1), ends, scores_of(scale), out, log_sums, grad)
    wide = qkv.double().requires_grad_()
    expected = torch.cat([by_float64(part, sizes) for part in wide.split(lengths)])
    expected.backward(grad.double())
    assert error(out, expected.detach()) < ROUNDED
    for found, wanted in zip(grads, wide.grad.split(sizes, 1), strict=True):
        assert error(found, wanted) < 2 * ROUNDED


def by_float64(qkv: torch.Tensor, sizes: list[int]) -> torch.Tensor:
    q, k, v = (one.transpose(0, 1) for one in qkv.split(sizes, 1))
    return sdpa(q, k, v, is_causal=True, enable_gqa=True).transpose(0, 1).flatten(1)


@pytest.mark.parametrize("window", [None, 1, 24, 70])
@pytest.mark.parametrize(("softcap", "sinks"), [(None, False), (1.5, False), (None, True), (2.0, True)])
def test_scores_of_every_kind_and_their_gradients_are_those_of_float64(kernels, window, softcap, sinks):
    sizes, lengths, d = [4, 2, 2], [5, 1, 33, 130, 200], 32
    scores = Scores(0.3, window, softcap, torch.tensor([-1e4, 0.5, 2.0, 30.0], dtype=BF16) if sinks else None)
    qkv, grad = draw(sum(lengths), sum(sizes), d), draw(sum(lengths), 4 * d)
    ends = torch.tensor([sum(lengths[:i]) for i in range(len(lengths) + 1)], dtype=torch.int32)
    struct, parts = scores_of(*scores), qkv.split(sizes, 1)
    out, log_sums = kernels.causal(*parts, ends, struct)
    grads = kernels.causal_backward(*parts, ends, struct, out, log_sums, grad)
    wide = qkv.double().requires_grad_()
    expected = torch.cat([masked_by_float64(part, sizes, scores) for part in wide.split(lengths)])
    expected.backward(grad.double())
    # A sink that takes nearly all leaves roundings of small numbers.
    assert error(out, expected.detach()) < 2 * ROUNDED
    for found, wanted in zip(grads, wide.grad.split(sizes, 1), strict=True):
        assert error(found, wanted) < 3 * ROUNDED or float(wanted.norm()) < 1e-9


def masked_by_float64(qkv: torch.Tensor, sizes: list[int], scores: Scores) -> torch.Tensor:
    at = torch.arange(len(qkv))
    ago = at[:, None] - at
    seen = (ago >= 0) & (ago < (scores.window or len(qkv)))
    q, k, v = (one.transpose(0, 1) for one in qkv.split(sizes, 1))
    # Out of place: this is differentiated.
    products = (q.unflatten(0, (len(k), -1)) * scores.scale) @ k.transpose(-1, -2).unsqueeze(1)
    if scores.softcap is not None:
        products = scores.softcap * torch.tanh(products / scores.softcap)
    weights = scores.softmax(products.masked_fill(~seen, -torch.inf), 1, 0)
    return (weights @ v.unsqueeze(1)).flatten(0, 1).transpose(0, 1).flatten(1)


def test_a_sequence_that_is_not_finite_leaves_the_others_as_they_are(kernels):
    sizes, ends = [4, 2, 2], torch.tensor([0, 40, 75], dtype=torch.int32)
    clean, grad = draw(75, 8, 32), draw(75, 128)
    bad = clean.clone()
    bad[:40] = torch.nan
    results = []
    for qkv in (clean, bad):
        scores = scores_of(0.2)
        out, log_sums = kernels.causal(*qkv.split(sizes, 1), ends, scores)
        results.append((out, *kernels.causal_backward(*qkv.split(sizes, 1), ends, scores, out, log_sums, grad)))
    for one, other in zip(*results, strict=True):
        assert torch.equal(one[40:], other[40:]) and other[:40].isnan().all(1).any()


@pytest.mark.parametrize(("rows", "width"), [(1, 16), (33, 100), (70, 576)])
def test_the_backward_of_a_norm_is_that_of_float64(threads, rows, width):
    x, weight, grad, beside = draw(rows, width), draw(width), draw(rows, width, scale=0.5), draw(rows, width, scale=0.3)
    wide = x.double().requires_grad_()
    normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-5) * weight.double()
    normed.backward(grad.double())
    kernels = TrainingKernels()
    narrow, offset = (RmsNorm(one, 1e-5) for one in (weight, weight.float()))
    assert error(kernels.rms_norm_backward(x, narrow, grad, None), wide.grad) < ROUNDED
    found = (kernels.rms_norm_backward(x, norm, grad, beside) for norm in (narrow, offset))
    assert torch.equal(*found)
    assert (
        error(kernels.rms_norm_backward(x, RmsNorm(weight, 1e-5), grad, beside), wide.grad + beside.double()) < ROUNDED
    )


@pytest.mark.parametrize(("rows", "inner"), [(1, 16), (33, 100), (70, 256)])
def test_the_backward_of_a_gate_is_that_of_float64(threads, rows, inner):
    x, grad = draw(rows, 2 * inner, scale=3.0), draw(rows, inner)
    wide = x.double().requires_grad_()
    gate, up = wide.chunk(2, -1)
    (silu(gate) * up).backward(grad.double())
    assert error(TrainingKernels().gate_backward(x, grad), wide.grad) < ROUNDED
    wide.grad = None
    gate, up = wide.chunk(2, -1)
    (gelu(gate, approximate="tanh") * up).backward(grad.double())
    assert error(TrainingKernels().gate_backward(x, grad, GELU), wide.grad) < ROUNDED


@pytest.mark.parametrize("head_dim", [8, 64, 80])
def test_the_backward_of_a_rotation_turns_queries_and_keys_back_and_no_values(threads, head_dim):
    angles, grad = draw(9, 2, head_dim), draw(9, 5, head_dim)
    wide = draw(9, 3, head_dim).double().requires_grad_()
    cos, sin = angles.double().split(1, 1)
    torch.addcmul(wide * cos, wide.roll(head_dim // 2, -1), sin).backward(grad[:, :3].double())
    found = grad.clone()
    TrainingKernels().rotate_backward_(found, angles, 3)
    assert error(found[:, :3], wide.grad) < ROUNDED and torch.equal(found[:, 3:], grad[:, 3:])
    padded = torch.cat((grad, grad), -1)
    TrainingKernels().rotate_backward_(padded, angles, 3)
    assert torch.equal(padded, torch.cat((found, grad), -1))


@pytest.mark.parametrize("width", [5, 32, 1000])
def test_losses_and_their_gradient_are_those_of_float64(threads, width):
    logits, targets = draw(11, width, scale=4.0), torch.arange(11) % width
    wide = logits.double().requires_grad_()
    expected = cross_entropy(wide, targets, reduction="none")
    (expected.sum() / 7).backward()
    kernels, found = TrainingKernels(), logits.clone()
    assert error(kernels.cross_entropy_(found, targets, None), expected.detach()) < SUMMED
    assert torch.equal(found, logits)
    assert error(kernels.cross_entropy_(found, targets, 7.0), expected.detach()) < SUMMED
    assert error(found, wide.grad) < ROUNDED


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_the_loss_of_a_row_that_is_not_finite_is_not_finite_and_no_other(value):
    logits, targets = draw(3, 40), torch.tensor([1, 2, 3])
    logits[1, 20] = value
    losses = TrainingKernels().cross_entropy_(logits, targets, 3.0)
    assert losses.isfinite().tolist() == [True, False, True]
