"""The products of the CPU kernels: right for awkward sizes, each row by itself, each adapter for its own rows only."""

from __future__ import annotations

import itertools

import pytest
import torch

from clif.kernels.cpu import host, library
from clif.kernels.cpu.arena import HUGE_PAGE, Arena
from clif.kernels.cpu.library import GELU
from clif.kernels.cpu.products import PackedFactors, PackedMatrix, pack, packed_size, product

try:
    MACHINE = library.level()
except library.Absent as absent:
    pytest.skip(f"the kernels for CPUs do not run here: {absent}", allow_module_level=True)

LEVELS = [level for level in (library.AVX512, library.AMX) if level <= MACHINE]
SIZES = [(8, 1), (24, 17), (33, 49), (576, 96), (31, 32), (1, 5), (100, 130)]
ROWS = [1, 2, 7, 16, 17, 32, 33, 70]


def numbers(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


def expected(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None, adapters: list | None = None
) -> torch.Tensor:
    """In float64, with the one rounding between A and B that the kernels make. adapters: (a, b, scale) for each row."""
    y = x.double() @ weight.double().T
    if bias is not None:
        y += bias.double()
    for row, adapter in enumerate(adapters or []):
        if adapter:
            a, b, scale = adapter
            y[row] += (a.double() @ x[row].double()).bfloat16().double() @ (scale * b).double().T
    return y


def assert_close(y: torch.Tensor, wanted: torch.Tensor, inputs: int) -> None:
    # One rounding to bfloat16, of sums in float32 whose error grows with their terms.
    torch.testing.assert_close(y.double(), wanted, rtol=2**-8, atol=1e-4 * inputs**0.5 + 1e-6)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize(("in_", "out"), SIZES)
def test_products_of_all_sizes_are_those_of_float64_rounded_once(level, in_, out):
    weight, bias = numbers(out, in_), numbers(out, seed=1)
    packed = PackedMatrix.of(weight)
    for rows, offset in itertools.product(ROWS, (None, bias)):
        x = numbers(rows, in_, seed=rows)
        assert_close(product(x, packed, offset, level=level), expected(x, weight, offset), in_)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize(("in_", "out"), [(33, 49), (576, 96)])
def test_a_row_has_the_same_bits_whatever_lies_beside_it_and_however_many_threads_compute(level, in_, out):
    weight, x = numbers(out, in_), numbers(70, in_, seed=1)
    packed = PackedMatrix.of(weight)
    factors = PackedFactors(numbers(3, 8, in_, seed=2), numbers(3, out, 8, seed=3), 2.0)
    slots = torch.tensor([(i // 9) % 4 - 1 for i in range(70)], dtype=torch.int32)
    whole = product(x, packed, None, factors, slots, level=level, threads=1)
    for threads in (2, 3):
        assert torch.equal(whole, product(x, packed, None, factors, slots, level=level, threads=threads))
    for start, stop in ((0, 1), (3, 20), (9, 41), (37, 70), (69, 70)):
        alone = product(x[start:stop], packed, None, factors, slots[start:stop].contiguous(), level=level)
        assert torch.equal(alone, whole[start:stop])


@pytest.mark.parametrize("level", LEVELS)
def test_many_rows_on_many_threads_have_the_bits_of_one_thread(level):
    x, packed = numbers(700, 40), PackedMatrix.of(numbers(33, 40))
    whole = product(x, packed, level=level, threads=1)
    for threads in (2, 3, 4, 8):
        assert torch.equal(whole, product(x, packed, level=level, threads=threads))


@pytest.mark.parametrize("level", LEVELS)
def test_strided_rows_are_read_and_nothing_beside_them_is_read_or_written(level):
    in_, out, rows = 33, 49, 19
    weight = numbers(out, in_)
    wide = torch.full((rows, in_ + 6), float("nan"), dtype=torch.bfloat16)
    wide[:, 3 : 3 + in_] = numbers(rows, in_, seed=1)
    into = torch.full((rows + 2, out + 5), 7.0, dtype=torch.bfloat16)
    x, y = wide[:, 3 : 3 + in_], into[1:-1, 2 : 2 + out]
    product(x, PackedMatrix.of(weight), out=y, level=level)
    assert_close(y, expected(x, weight), in_)
    y.fill_(7.0)
    assert (into == 7.0).all()


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("rank", [4, 8, 33])
@pytest.mark.parametrize(
    "slots",
    [[1] * 40, [-1] * 40, [-1] * 5 + [0] * 20 + [2] * 15, [i % 4 - 1 for i in range(40)], [0] * 33 + [-1] * 7],
    ids=["one", "none", "stretches", "mingled", "with and without"],
)
def test_each_row_gets_the_adapter_of_its_slot(level, rank, slots):
    in_, out, scale = 70, 49, 0.5
    weight, bias, x = numbers(out, in_), numbers(out, seed=1), numbers(40, in_, seed=2)
    a, b = numbers(3, rank, in_, seed=3), numbers(3, out, rank, seed=4)
    y = product(
        x,
        PackedMatrix.of(weight),
        bias,
        PackedFactors(a, b, scale),
        torch.tensor(slots, dtype=torch.int32),
        level=level,
    )
    wanted = expected(x, weight, bias, [(a[s], b[s], scale) if s >= 0 else None for s in slots])
    # The sums before the rounding between A and B are in float32 here: a few are rounded to the other side.
    torch.testing.assert_close(y.double(), wanted, rtol=2**-7, atol=0.3)
    assert (y.double() - wanted).norm() <= 3e-3 * wanted.norm()


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_in_its_row_and_its_slot(level, bad):
    in_, out = 70, 49
    slots = torch.tensor([i % 3 - 1 for i in range(40)], dtype=torch.int32)
    packed, x = PackedMatrix.of(numbers(out, in_)), numbers(40, in_, seed=2)
    a, b = numbers(2, 8, in_, seed=3), numbers(2, out, 8, seed=4)
    clean = product(x, packed, None, PackedFactors(a, b, 1.0), slots, level=level)
    for factor in (a, b):
        kept = factor[1].clone()
        factor[1] = bad
        y = product(x, packed, None, PackedFactors(a, b, 1.0), slots, level=level)
        assert not y[slots == 1].isfinite().any()
        assert torch.equal(y[slots != 1], clean[slots != 1])
        factor[1] = kept
    x[7] = bad
    y = product(x, packed, None, PackedFactors(a, b, 1.0), slots, level=level)
    assert not y[7].isfinite().any()
    others = torch.arange(40) != 7
    assert torch.equal(y[others], clean[others])


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("inner", [16, 48, 96])
def test_a_gated_product_has_the_bits_of_the_product_and_the_gate_after_it(level, inner):
    packed, bias = PackedMatrix.of(numbers(2 * inner, 70)), numbers(2 * inner, seed=1)
    factors = PackedFactors(numbers(2, 8, 70, seed=3), numbers(2, 2 * inner, 8, seed=4), 2.0)
    for rows, threads in itertools.product((1, 16, 45, 300), (1, 2, 3)):
        x = numbers(rows, 70, seed=rows)
        mingled = torch.tensor([i % 3 - 1 for i in range(rows)], dtype=torch.int32)
        for layer in ((), (bias,), (bias, factors, mingled), (None, factors, torch.zeros_like(mingled))):
            wide = product(x, packed, *layer, level=level)
            gated = product(x, packed, *layer, gated=True, level=level, threads=threads)
            assert torch.equal(gated, host.gated(wide))
            by_gelu = product(x, packed, *layer, gated=True, activation=GELU, level=level, threads=threads)
            assert torch.equal(by_gelu, host.gated(wide, GELU))
    with pytest.raises(ValueError, match="multiples of 16"):
        product(numbers(1, 70), PackedMatrix.of(numbers(40, 70)), gated=True)


def test_a_refreshed_slot_has_its_new_factors_and_the_others_keep_theirs():
    packed, x = PackedMatrix.of(numbers(32, 64)), numbers(4, 64, seed=1)
    a, b = numbers(2, 4, 64, seed=2), numbers(2, 32, 4, seed=3)
    factors = PackedFactors(a, b, 2.0)
    slots = torch.tensor([0, 1, 0, 1], dtype=torch.int32)
    before = product(x, packed, None, factors, slots)
    a[1], b[1] = numbers(4, 64, seed=5), numbers(32, 4, seed=6)
    assert torch.equal(product(x, packed, None, factors, slots), before)
    factors.refresh(1)
    after = product(x, packed, None, factors, slots)
    assert torch.equal(after, product(x, packed, None, PackedFactors(a, b, 2.0), slots))
    assert torch.equal(after[::2], before[::2]) and not torch.equal(after[1::2], before[1::2])


def test_a_packed_matrix_is_padded_with_zeros_and_scaled_and_rounded_once():
    matrix = numbers(17, 33)
    packed = torch.full((packed_size(17, 33),), float("nan"), dtype=torch.bfloat16)
    assert len(packed) == 32 * 64
    pack(matrix, packed, 0.3)
    laid = packed.view(2, 2, 16, 16, 2)  # panels of outputs, tiles of inputs, pairs, outputs, two of a pair
    plain = laid.permute(0, 3, 1, 2, 4).reshape(32, 64)
    assert torch.equal(plain[:17, :33], (matrix.float() * 0.3).bfloat16())
    assert plain[17:].count_nonzero() == 0 and plain[:, 33:].count_nonzero() == 0


def test_a_packed_transpose_multiplies_gradients():
    weight, grad = numbers(49, 33), numbers(5, 49, seed=1)
    assert_close(product(grad, PackedMatrix.of(weight.T)), grad.double() @ weight.double(), 49)


def test_leading_dimensions_are_kept_and_other_types_and_shapes_are_refused():
    packed = PackedMatrix.of(numbers(8, 16))
    assert product(numbers(2, 3, 16), packed).shape == (2, 3, 8)
    assert product(numbers(0, 16), packed).shape == (0, 8)
    with pytest.raises(TypeError, match="bfloat16"):
        product(torch.zeros(1, 16), packed)
    with pytest.raises(TypeError, match="bfloat16"):
        PackedMatrix.of(torch.zeros(8, 16))
    with pytest.raises(ValueError, match="15 inputs"):
        product(numbers(1, 15), packed)


def test_an_arena_gives_aligned_tensors_that_outlive_it_and_says_when_it_is_full():
    weight = numbers(40, 50)
    size = Arena.rounded(packed_size(40, 50))
    arena = Arena(size + Arena.rounded(33) + 32)
    first = arena.cut(33)
    packed = PackedMatrix.of(weight, arena)
    assert first.data_ptr() % HUGE_PAGE == 0 and packed.numbers.data_ptr() % 64 == 0
    with pytest.raises(ValueError, match="32 numbers left"):
        arena.cut(33)
    del arena, first
    x = numbers(3, 50, seed=1)
    assert torch.equal(product(x, packed), product(x, PackedMatrix.of(weight)))
