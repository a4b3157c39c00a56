"""The dual LoRA kernels in Triton's interpreter, against the specification that the GPU tests use, too."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

pytest.importorskip("triton", reason="Triton is not installed: pip install triton")

from clif.kernels import workspace
from clif.kernels.dual_lora_forms import DualLoraLinear
from clif.kernels.dual_lora_host import INTERPRET, KernelLauncher
from clif.kernels.dual_lora_reference import SHADOW, MergedLinear, Segment
from clif.kernels.dual_lora_table import StagedRowTable
from clif.kernels.testing.dual_lora_specification import (
    Batch,
    Results,
    by_torch,
    computed,
    random_batch,
    random_layer,
    violations,
)
from clif.kernels.tiles import GradTiles, LinearTiles, piece_width
from clif.kernels.tuning import Defaults, Fixed
from clif.kernels.workspace import Workspace

pytestmark = pytest.mark.skipif(not INTERPRET, reason="the kernels are compiled in this process: see tests/gpu")
CPU = torch.device("cpu")
TILES = LinearTiles(block_m=16, block_n=32, block_k=32, group_m=2, slices=2)
GRADS = GradTiles(block_c=32, block_r=16, slices=2)
MIXED = ((9, 0), (5, None), (18, 1), (21, SHADOW))


def launcher(tiles: LinearTiles = TILES) -> KernelLauncher:
    return KernelLauncher(CPU, Fixed(tiles, GRADS))


def compute(batch: Batch, using: KernelLauncher | None = None) -> Results:
    return computed(batch, DualLoraLinear(batch.merged, using or launcher()))


def without_adapters(batch: Batch) -> torch.Tensor:
    """y by the same launch with a table that has no pairs: segments that the host knows to be none need no launch."""
    table = StagedRowTable((), len(batch.x), TILES.block_m, len(batch.merged.a), CPU)
    return DualLoraLinear(batch.merged, launcher()).forward(batch.x, table)[0]


LAYERS: dict[str, Callable[[], MergedLinear]] = {
    "one": lambda: random_layer([64], 96, 8, dtype=torch.bfloat16),
    "float32": lambda: random_layer([64], 96, 8, dtype=torch.float32),
    "float16": lambda: random_layer([64], 96, 16, dtype=torch.float16),
    "ragged": lambda: random_layer([50], 75, 16, dtype=torch.bfloat16, bias=True),
    "rank_48": lambda: random_layer([64], 64, 48, dtype=torch.bfloat16),
    "packed": lambda: random_layer([64, 20, 20], 80, 8, dtype=torch.bfloat16, bias=True),
    "partly_adapted": lambda: random_layer([40, 24, 32], 64, 8, dtype=torch.bfloat16, adapted=[0, 2]),
    "scale_0": lambda: random_layer([64], 64, 8, dtype=torch.bfloat16, scale=0.0),
}


@pytest.mark.parametrize("name", LAYERS)
def test_results_are_as_near_to_float64_as_torch_s(name: str) -> None:
    batch = random_batch(LAYERS[name](), MIXED)
    assert violations(batch, compute(batch)) == []


def forms() -> Iterator[Any]:
    """Forms, descriptors, splits: all that differ, some of them when there is time."""
    yield pytest.param("separate", False, 1, id="separate")
    for form, tma, split in itertools.product(("fused", "pair"), (False, True), (1, 2, 3)):
        slow = [pytest.mark.slow] if tma and split != 2 else []
        yield pytest.param(form, tma, split, id=f"{form}-{'descriptors' if tma else 'pointers'}-{split}", marks=slow)


@pytest.mark.parametrize(("form", "tma", "split"), forms())
def test_every_form_of_launch_computes_the_same_function(form: Any, tma: bool, split: int) -> None:
    batch = random_batch(random_layer([48, 16], 64, 8, dtype=torch.bfloat16, bias=True), ((9, 0), (5, None), (3, -1)))
    using = KernelLauncher(CPU, Fixed(replace(TILES, form=form, tma=tma, split=split), replace(GRADS, tma=tma)))
    assert violations(batch, compute(batch, using)) == []


@pytest.mark.parametrize(
    "lengths",
    [((0, None),), ((1, None),), ((1, 0),), ((1, SHADOW),), ((33, 2),), ((17, SHADOW),), ((7, None), (1, 1), (0, 2))],
    ids=["0 rows", "1 bare", "1 active", "1 shadow", "only active", "only shadow", "an empty segment"],
)
def test_any_number_of_rows_of_any_kind_will_do(lengths: tuple[tuple[int, int | None], ...]) -> None:
    batch = random_batch(random_layer([40, 24], 64, 8, dtype=torch.bfloat16), lengths)
    assert violations(batch, compute(batch)) == []


@settings(max_examples=12, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    st.lists(st.tuples(st.integers(0, 20), st.sampled_from([None, 0, 1, 2])), max_size=4),
    st.integers(0, 20),
    st.integers(1, 3),
    st.sampled_from([1, 3, 16]),
    st.booleans(),
    st.sampled_from([1, 2, 4]),
)
def test_random_batches_hold_the_bar(
    serving: list[tuple[int, int | None]], learning: int, projections: int, r: int, tma: bool, split: int
) -> None:
    layer = random_layer([24, 17, 40][:projections], 48, r, dtype=torch.bfloat16, adapted=list(range(projections))[-2:])
    batch = random_batch(layer, [*serving, (learning, SHADOW)])
    assert violations(batch, compute(batch, launcher(replace(TILES, tma=tma, split=split)))) == []


def test_rows_of_x_may_lie_apart() -> None:
    batch = random_batch(random_layer([32], 64, 8, dtype=torch.bfloat16), MIXED)
    expected = compute(batch)
    wide = torch.randn(len(batch.x), 200).to(torch.bfloat16)
    wide[:, 3:67] = batch.x
    across = batch.x.T.contiguous().T
    for x in (wide[:, 3:67], across):
        found = compute(replace(batch, x=x, grad=batch.grad.T.contiguous().T))
        assert torch.equal(found.y, expected.y) and torch.equal(found.grad_a, expected.grad_a)


def test_a_b_of_zero_adds_exactly_nothing() -> None:
    layer = random_layer([64], 64, 8, dtype=torch.bfloat16)
    layer.b.zero_()
    batch = random_batch(layer, MIXED)
    assert torch.equal(compute(batch).y, without_adapters(batch))


@pytest.mark.parametrize("store_tma", [False, True], ids=["pointers", "descriptors"])
@pytest.mark.parametrize(("block_m", "block_n"), [(16, 32), (64, 256), (128, 256)], ids=["whole", "halves", "quarters"])
def test_a_tile_is_completed_in_pieces_that_the_registers_hold(block_m: int, block_n: int, store_tma: bool) -> None:
    tiles = replace(TILES, block_m=block_m, block_n=block_n, tma=store_tma, store_tma=store_tma)
    assert block_n // piece_width(tiles) == {16: 1, 64: 2, 128: 4}[block_m]
    batch = random_batch(random_layer([256], 32, 8, dtype=torch.bfloat16, bias=True), ((9, 0), (5, None), (18, 1)))
    layer = DualLoraLinear(batch.merged, launcher(tiles))
    found, _ = layer.forward(batch.x, batch.segments)
    assert violations(batch, replace(by_torch(batch), y=found)) == []


def test_a_result_in_narrow_columns_is_not_stored_by_descriptor_into_the_next_projection() -> None:
    tiles = replace(TILES, tma=True, store_tma=True)
    batch = random_batch(random_layer([40, 24], 64, 8, dtype=torch.bfloat16), MIXED)
    assert violations(batch, compute(batch, launcher(tiles))) == []


def test_what_begins_between_two_multiples_of_16_bytes_is_not_loaded_by_descriptor() -> None:
    tiles, grads = replace(TILES, tma=True), replace(GRADS, tma=True)
    for sizes, r in (([40, 24], 4), ([7, 41], 8)):
        batch = random_batch(random_layer(sizes, 32, r, dtype=torch.bfloat16), ((9, 0), (8, SHADOW)))
        assert violations(batch, compute(batch, KernelLauncher(CPU, Fixed(tiles, grads)))) == []


# Isolation


@pytest.mark.parametrize(
    ("poison", "tma"),
    [
        (float("nan"), False),
        (float("inf"), True),
        pytest.param(float("inf"), False, marks=pytest.mark.slow),
        pytest.param(float("nan"), True, marks=pytest.mark.slow),
    ],
    ids=["nan-pointers", "inf-descriptors", "inf-pointers", "nan-descriptors"],
)
def test_an_adapter_with_nan_or_inf_reaches_no_row_of_another(poison: float, tma: bool) -> None:
    layer = random_layer([32, 24], 64, 8, dtype=torch.bfloat16)
    batch = random_batch(layer, MIXED)
    using = launcher(replace(TILES, tma=tma))
    healthy = compute(batch, using)
    for slot in (0, SHADOW):
        a, b = layer.a.clone(), layer.b.clone()
        a[slot] = poison
        for projection in layer.projections:
            assert projection.block is not None
            b[slot, projection.start : projection.stop, projection.block * 8 : (projection.block + 1) * 8] = poison
        found = compute(replace(batch, merged=replace(layer, a=a, b=b)), using)
        poisoned = next(s for s in batch.segments if s.slot == slot)
        others = torch.ones(len(batch.x), dtype=torch.bool)
        others[poisoned.start : poisoned.stop] = False
        assert torch.equal(found.y[others], healthy.y[others])
        assert not found.y[poisoned.start : poisoned.stop].isfinite().any()
        if slot != SHADOW:
            assert torch.equal(found.grad_a, healthy.grad_a) and torch.equal(found.grad_b, healthy.grad_b)


def test_a_request_s_nan_stays_in_its_own_row() -> None:
    batch = random_batch(random_layer([48], 64, 8, dtype=torch.bfloat16), MIXED)
    x = batch.x.clone()
    x[3] = float("nan")
    found, healthy = compute(replace(batch, x=x)), compute(batch)
    others = [i for i in range(len(x)) if i != 3]
    assert torch.equal(found.y[others], healthy.y[others]) and found.y[3].isnan().all()


def test_rows_without_adapter_compute_what_a_launch_without_adapters_does() -> None:
    layer = random_layer([48], 64, 8, dtype=torch.bfloat16)
    batch = random_batch(layer, MIXED)
    assert torch.equal(compute(batch).y[9:14], without_adapters(batch)[9:14])


def test_gradients_of_the_factors_do_not_depend_on_rows_that_serve() -> None:
    layer = random_layer([48], 64, 8, dtype=torch.bfloat16)
    one, other = (random_batch(layer, ((n, 0), (16, SHADOW)), seed=n) for n in (16, 32))
    other = replace(other, x=torch.cat([other.x[:32], one.x[16:]]), grad=one.grad)
    a, b = compute(one), compute(other)
    assert torch.equal(a.grad_a, b.grad_a) and torch.equal(a.grad_b, b.grad_b) and torch.equal(a.grad_x, b.grad_x)


def test_nothing_is_written_to_the_base_or_to_an_adapter() -> None:
    layer = random_layer([48, 16], 64, 8, dtype=torch.bfloat16, bias=True)
    batch = random_batch(layer, MIXED)
    assert layer.bias is not None
    held = (layer.weight, layer.bias, layer.a, layer.b, batch.x, batch.grad)
    before = [t.clone() for t in held]
    compute(batch)
    assert all(torch.equal(t, was) for t, was in zip(held, before, strict=True))


# Determinism


def test_equal_input_gives_equal_bits_and_the_counters_go_back_to_zero() -> None:
    batch = random_batch(random_layer([64, 32], 64, 8, dtype=torch.bfloat16), MIXED)
    using = launcher()
    first = compute(batch, using)
    for _ in range(3):
        assert not using.workspace().tickets.any()
        again = compute(batch, using)
        for name in ("y", "grad_x", "grad_a", "grad_b"):
            assert torch.equal(getattr(again, name), getattr(first, name))


@pytest.mark.parametrize("programs", [1, 2, 7])
def test_any_number_of_programs_computes_the_same_bits(programs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    batch = random_batch(random_layer([64], 64, 8, dtype=torch.bfloat16), MIXED)
    expected = compute(batch)
    monkeypatch.setattr("clif.kernels.dual_lora_host.INTERPRETED_PROGRAMS", programs)
    assert torch.equal(compute(batch, launcher(replace(TILES, shrinkers=programs))).y, expected.y)


def test_launches_of_different_sizes_share_a_workspace() -> None:
    using = launcher(replace(TILES, split=2))
    small = random_batch(random_layer([16], 32, 8, dtype=torch.bfloat16), ((3, 0), (2, SHADOW)))
    large = random_batch(random_layer([160], 32, 8, dtype=torch.bfloat16), ((40, 0), (30, 2)))
    expected = [compute(batch) for batch in (small, large)]
    for batch, want in zip((small, large, small), (*expected, expected[0]), strict=True):
        found = compute(batch, using)
        assert violations(batch, found) == []
        assert torch.equal(found.grad_a, want.grad_a)


def test_a_workspace_is_made_once_and_not_at_every_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Workspace] = []
    monkeypatch.setattr(workspace, "Workspace", lambda device: made.append(Workspace(device)) or made[-1])
    batch, using = random_batch(LAYERS["one"](), MIXED), launcher()
    first = compute(batch, using)
    again = compute(batch, using)
    assert len(made) == 1 and using.workspace() is made[0]
    assert torch.equal(first.y, again.y)


def test_a_batch_without_rows_needs_no_tiles_and_no_launch() -> None:
    batch = random_batch(LAYERS["packed"](), ((0, 0),))
    layer = DualLoraLinear(batch.merged, KernelLauncher(CPU, Defaults()))
    y, hidden = layer.forward(batch.x, batch.segments)
    assert y.shape == (0, 104) and hidden.shape == (0, 24)
    grad_x, grad_a, grad_b = layer.backward(y, batch.x, hidden, True)
    assert grad_x is not None and grad_x.shape == batch.x.shape
    assert not grad_a.any() and not grad_b.any()


def test_a_refilled_table_serves_other_segments_in_the_same_launch() -> None:
    table = StagedRowTable((Segment(0, 40, 0),), 40, 16, 4, CPU)
    place = table.pairs.data_ptr()
    table.refill((Segment(3, 20, 1), Segment(20, 25, SHADOW)), 25)
    assert table.counts.tolist() == [3] and table.pairs.data_ptr() == place
    assert table.firsts.tolist() == [0, 1, 3, 3]
    assert table.pairs[:3].tolist() == [[3, 16, 1, 0], [16, 20, 1, 1], [20, 25, 3, 1]]
    batch = random_batch(random_layer([32], 64, 8, dtype=torch.bfloat16), ((3, None), (17, 1), (5, SHADOW)))
    layer = DualLoraLinear(batch.merged, launcher())
    assert torch.equal(layer.forward(batch.x, table)[0], layer.forward(batch.x, batch.segments)[0])
    for segments, rows in (((), 16 * 9), (tuple(Segment(i, i + 1, 0) for i in range(40)), 40)):
        with pytest.raises(ValueError, match="more capacity"):
            table.refill(segments, rows)
    assert table.counts.tolist() == [3]


# The bar catches what it should


class Broken(KernelLauncher):
    """A launcher with one fault. The first row tile of the batch has rows of two slots and some of none."""

    def __init__(self, fault: str) -> None:
        super().__init__(CPU, Fixed(TILES, GRADS))
        self.fault = fault

    def linear(self, tiles: Any, x: Any, weight: Any, bias: Any, a: Any, b: Any, *rest: Any) -> None:
        hidden, y, rows, columns, blocks, r, scale = rest
        if self.fault == "base slice":
            weight = weight.clone()
            weight[:, -32:] = 0
        if self.fault == "shrink slice":
            blocks = replace(blocks, tiles=blocks.tiles - torch.tensor([0, 32], dtype=torch.int32))
        if self.fault == "scale":
            scale *= 1.02
        if self.fault == "bias":
            bias = None
        super().linear(tiles, x, weight, bias, a, b, hidden, y, rows, columns, blocks, r, scale)

    def rows(self, segments: Any, *rest: Any) -> Any:
        if self.fault == "slots" and len(segments) > 2:
            first, second, *others = segments
            segments = (first._replace(slot=second.slot), second._replace(slot=first.slot), *others)
        table = super().rows(segments, *rest)
        if self.fault == "rows shifted":
            table.pairs[0, :2] += 1
        if self.fault == "slot skipped":
            table.firsts[1] = 1
        return table

    def grads(self, tiles: Any, x: Any, grad: Any, hidden: Any, grad_hidden: Any, *rest: Any) -> Any:
        if self.fault == "row slice":
            x, grad = x.clone(), grad.clone()
            x[-4:], grad[-4:] = 0, 0
        if self.fault == "factor scale":
            hidden = (hidden.float() * 1.02).to(hidden.dtype)
        return super().grads(tiles, x, grad, hidden, grad_hidden, *rest)


@pytest.fixture(scope="module")
def cleared() -> Batch:
    """A batch with which the bar is cleared by a launcher that has no fault."""
    batch = random_batch(random_layer([32, 32], 64, 8, dtype=torch.bfloat16, bias=True), MIXED)
    assert violations(batch, compute(batch, Broken("none"))) == []
    return batch


FAULTS = (
    "base slice",
    "shrink slice",
    "scale",
    "bias",
    "slots",
    "rows shifted",
    "slot skipped",
    "row slice",
    "factor scale",
)


@pytest.mark.parametrize("fault", FAULTS)
def test_the_bar_is_not_cleared_with(fault: str, cleared: Batch) -> None:
    assert violations(cleared, compute(cleared, Broken(fault)))


def test_a_mask_in_place_of_the_selection_is_found_by_an_adapter_with_nan(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = random_layer([32], 32, 8, dtype=torch.bfloat16)
    batch = random_batch(layer, ((5, 0), (6, 1)))
    layer.b[1] = float("nan")
    assert DualLoraLinear(layer, launcher()).forward(batch.x, batch.segments)[0][:5].isfinite().all()

    def masked(mine: Any, added: Any, acc: Any) -> Any:
        return acc + (added - acc) * mine[:, None].to(acc.dtype)

    monkeypatch.setattr("clif.kernels.dual_lora_kernel._selected", masked)
    assert DualLoraLinear(layer, launcher()).forward(batch.x, batch.segments)[0][:5].isnan().all()


def test_a_float32_sum_in_one_sequence_clears_the_bar_and_products_of_fewer_bits_do_not() -> None:
    batch = random_batch(random_layer([768], 96, 8, dtype=torch.float32, scale=0.0), ((21, SHADOW),))
    exact = by_torch(batch)
    weight, grad_x = batch.merged.weight, torch.zeros_like(exact.grad_x)
    for row in range(768):
        grad_x += batch.grad[:, row : row + 1] * weight[row]
    assert violations(batch, replace(exact, grad_x=grad_x)) == []
    # As tensor cores multiply float32 unless told otherwise: 10 bits of mantissa.
    coarse = (weight.view(torch.int32) & ~0x1FFF).view(torch.float32)
    (wrong, *_) = violations(batch, replace(exact, grad_x=batch.grad @ coarse))
    assert wrong.startswith("grad_x: relative error")


def test_segments_that_overlap_or_leave_the_batch_are_refused() -> None:
    layer = DualLoraLinear(random_layer([16], 16, 4, dtype=torch.float32), launcher())
    for segments in ((Segment(0, 5, 0), Segment(4, 6, 1)), (Segment(0, 9, 0),)):
        with pytest.raises(ValueError, match="overlaps the one before or leaves the batch of 8 rows"):
            layer.forward(torch.zeros(8, 16), segments)
    with pytest.raises(ValueError, match="wants slot 4 of 4"):
        layer.forward(torch.zeros(8, 16), (Segment(0, 8, 4),))
