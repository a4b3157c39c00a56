"""The forms of a dual LoRA linear layer in Triton's interpreter: one function, isolation and equal bits in each."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import cache
from typing import Any, get_args

import pytest
import torch
from kernel_count import counted_kernels, whole_launches
from torch.nn.functional import linear

pytest.importorskip("triton", reason="Triton is not installed: pip install triton")

from clif.engine.checked_capture import CaptureRules
from clif.kernels import dual_lora_forms, side_stream
from clif.kernels.dual_lora_forms import FORMS, DualLoraLinear
from clif.kernels.dual_lora_host import INTERPRET, KernelLauncher
from clif.kernels.dual_lora_reference import SHADOW, Segment
from clif.kernels.dual_lora_table import RowTable, StagedRowTable
from clif.kernels.side_stream import InOrder, SideStreams
from clif.kernels.testing.dual_lora_specification import (
    Batch,
    Results,
    computed,
    random_batch,
    random_layer,
    violations,
)
from clif.kernels.tiles import Form, GradTiles, LinearTiles
from clif.kernels.tuning import Fixed

pytestmark = pytest.mark.skipif(not INTERPRET, reason="the kernels are compiled in this process: see tests/gpu")
CPU = torch.device("cpu")
# A little work for each program: the interpreter takes its time.
TILES = LinearTiles(block_m=16, block_n=16, block_k=32, slices=1, shrinkers=2)
GRADS = GradTiles(block_c=32, block_r=32, slices=1)
KINDS = ((5, 0), (3, None), (4, 1), (17, SHADOW))
ONE_KERNEL: tuple[Form, ...] = ("fused", "pair")
AFTER_TORCH: tuple[Form, ...] = ("three", "branches", "separate")
EVERY = pytest.mark.parametrize("form", get_args(Form))
OF_TABLES = pytest.mark.parametrize("form", ("fused", "pair", "three", "branches"))


@pytest.fixture(autouse=True)
def _long_segments(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of KINDS the last segment is long, the others are short."""
    monkeypatch.setattr(dual_lora_forms, "LONG", 16)


def small_batch(**layer: Any) -> Batch:
    settings: dict[str, Any] = {"dtype": torch.bfloat16, "bias": True, **layer}
    return random_batch(random_layer([16, 16], 32, 8, **settings), KINDS)


def layer_of(batch: Batch, form: Form, launcher: type[KernelLauncher] = KernelLauncher) -> DualLoraLinear:
    return DualLoraLinear(batch.merged, launcher(CPU, Fixed(replace(TILES, form=form), GRADS)))


@cache
def first(form: Form) -> tuple[Batch, DualLoraLinear, Results]:
    """A batch in float32, whose bits show any difference, its layer, and what that computes first."""
    batch = small_batch(dtype=torch.float32)
    layer = layer_of(batch, form)
    return batch, layer, computed(batch, layer)


def table_of(batch: Batch, segments: tuple[Segment, ...], height: int = TILES.block_m) -> StagedRowTable:
    return StagedRowTable(segments, len(batch.x), height, len(batch.merged.a), CPU)


def test_every_form_has_a_function() -> None:
    assert set(FORMS) == set(get_args(Form))


@EVERY
def test_every_form_is_within_the_specification_forward_and_backward(form: Form) -> None:
    batch, _, found = first(form)
    assert violations(batch, found) == []


@pytest.mark.parametrize("form", ["three", "separate"])
@pytest.mark.parametrize(
    "layer",
    [
        lambda: random_layer([40], 50, 16, dtype=torch.bfloat16, bias=True),
        lambda: random_layer([24, 16], 32, 3, dtype=torch.float16, adapted=[1]),
        lambda: random_layer([24], 32, 48, dtype=torch.bfloat16, scale=0.0),
    ],
    ids=["bfloat16, ragged", "float16, partly adapted", "rank 48, scale 0"],
)
def test_so_are_other_types_and_sizes_that_no_tile_divides(form: Form, layer: Any) -> None:
    batch = random_batch(layer(), KINDS)
    assert violations(batch, computed(batch, layer_of(batch, form))) == []


@EVERY
def test_equal_input_gives_equal_bits_whatever_new_memory_holds(form: Form) -> None:
    batch, layer, expected = first(form)
    torch.use_deterministic_algorithms(True)
    try:
        # So torch fills it.
        assert torch.empty(1).isnan().all()
        again = computed(batch, layer)
    finally:
        torch.use_deterministic_algorithms(False)
    for name in ("y", "grad_x", "grad_a", "grad_b"):
        assert torch.equal(getattr(again, name), getattr(expected, name))


# Isolation


@EVERY
def test_an_adapter_with_nan_and_inf_changes_no_bit_of_rows_of_another(form: Form) -> None:
    batch, _, healthy = first(form)
    p, r = batch.merged, batch.merged.r
    a, b = p.a.clone(), p.b.clone()
    a[1], a[1, ::2] = float("nan"), float("inf")
    for m in p.projections:
        assert m.block is not None
        b[1, m.start : m.stop, m.block * r : (m.block + 1) * r] = float("inf")
    poisoned = replace(batch, merged=replace(p, a=a, b=b))
    y, _ = layer_of(poisoned, form).forward(batch.x, batch.segments)
    own = torch.zeros(len(y), dtype=torch.bool)
    own[8:12] = True
    assert torch.equal(y[~own], healthy.y[~own]) and not y[own].isfinite().any()


@pytest.mark.parametrize("form", AFTER_TORCH)
def test_in_forms_after_torch_s_product_rows_and_columns_without_adapter_keep_its_bits(form: Form) -> None:
    batch, _, found = first(form)
    p = batch.merged
    assert torch.equal(found.y[5:8], linear(batch.x, p.weight, p.bias)[5:8])
    batch = small_batch(adapted=[1], dtype=torch.float32)
    y, _ = layer_of(batch, form).forward(batch.x, batch.segments)
    bare = linear(batch.x, batch.merged.weight, batch.merged.bias)
    # The product of a long segment adds B's zeros to these columns.
    short = 12 if form == "separate" else len(bare)
    assert torch.equal(y[:short, :16], bare[:short, :16]) and not torch.equal(y[:5, 16:], bare[:5, 16:])


@OF_TABLES
def test_a_refilled_table_serves_other_segments_and_rows_without_adapter_keep_their_bits(form: Form) -> None:
    batch, layer, expected = first(form)
    table = table_of(batch, (Segment(0, len(batch.x), 2),))
    table.refill(batch.segments, len(batch.x))
    assert torch.equal(layer.forward(batch.x, table)[0], expected.y)
    table.refill((), len(batch.x))
    bare, _ = layer.forward(batch.x, table)
    assert torch.equal(bare[5:8], expected.y[5:8]) and not torch.equal(bare[:5], expected.y[:5])


# Segments


@EVERY
def test_a_batch_of_which_no_row_has_an_adapter_is_the_base_product_alone(form: Form) -> None:
    batch, layer, _ = first(form)
    p = batch.merged
    for segments in ((), (Segment(4, 4, 1),)):
        with counted_kernels() as names:
            y, _ = layer.forward(batch.x, segments)
        assert names == ["addmm"] and torch.equal(y, linear(batch.x, p.weight, p.bias))


@pytest.mark.parametrize("form", ["three", "separate"])
@pytest.mark.parametrize(
    "lengths", [((0, None),), ((1, 0),), ((17, SHADOW),), ((7, None), (0, 2), (1, 1))], ids=["0", "1", "17", "empty"]
)
def test_any_number_of_rows_of_any_kind_will_do(form: Form, lengths: Any) -> None:
    batch = random_batch(random_layer([24], 32, 8, dtype=torch.bfloat16), lengths)
    assert violations(batch, computed(batch, layer_of(batch, form))) == []


def test_a_table_that_does_not_fit_a_form_is_refused() -> None:
    batch, layer, _ = first("three")
    with pytest.raises(ValueError, match="a table of 32-row tiles does not fit 16-row ones"):
        layer.forward(batch.x, table_of(batch, (), 32))
    with pytest.raises(ValueError, match="'separate' needs segments that the host knows"):
        layer_of(batch, "separate").forward(batch.x, table_of(batch, ()))


@EVERY
def test_segments_that_overlap_or_leave_the_batch_are_refused(form: Form) -> None:
    batch, layer, _ = first(form)
    for segments in ((Segment(0, 20, 0), Segment(19, 29, 1)), (Segment(0, 99, 0),)):
        with pytest.raises(ValueError, match="overlaps the one before or leaves the batch of 29 rows"):
            layer.forward(batch.x, segments)


# Launches


LAUNCHES: dict[Form, list[str]] = {
    "fused": ["dual_lora_linear"],
    "pair": ["dual_lora_linear", "dual_lora_linear"],
    "three": ["addmm", "dual_lora_linear", "dual_lora_expand"],
    "branches": ["addmm", "dual_lora_linear", "dual_lora_expand"],
    # One segment is long, the others are short.
    "separate": ["addmm", "addmm_", "addmm_", "dual_lora_linear", "dual_lora_expand"],
}


@EVERY
def test_a_form_has_its_launches_and_fills_no_memory(form: Form) -> None:
    batch, layer, _ = first(form)
    with counted_kernels() as names:
        layer.forward(batch.x, batch.segments)
    assert names == LAUNCHES[form]
    with counted_kernels() as names:
        _, expected = layer.through(batch.grad, True)
    backward = ["addmm", "addmm_", "addmm_"] if form == "separate" else LAUNCHES[form]
    assert names == ["mm" if name == "addmm" else name for name in backward], "the gradient of x has no bias"
    with counted_kernels() as names:
        grad_x, grad_hidden = layer.through(batch.grad, False)
    assert grad_x is None and len(names) == 1 and torch.equal(grad_hidden, expected), "the gradient of h alone"


@OF_TABLES
def test_a_form_of_tables_keeps_to_the_rules_of_a_captured_step(form: Form) -> None:
    """It reads nothing on the host, and its operators and shapes do not change with the contents of its table."""
    batch, layer, _ = first(form)
    table, rules = table_of(batch, batch.segments), CaptureRules()
    found = []
    for segments in (batch.segments, ()):
        table.refill(segments, len(batch.x))
        launches: list[str] = []
        with whole_launches(launches):
            rules.run(lambda: layer.forward(batch.x, table))
        found.append(([str(operator) for operator in rules.operators], launches))
    assert found[0] == found[1] and found[0][1]


class Events:
    """Stands in for CUDA's streams: what is launched on which, and who waits for whom, in order."""

    class Stream:
        priority = -1

        def __init__(self, events: Events, name: str) -> None:
            self.events, self.cuda_stream, self.name = events, hash(name), name

        def wait_stream(self, other: Events.Stream) -> None:
            self.events.log.append(f"{self.name} waits for {other.name}")

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.log: list[str] = []
        self.made: list[int] = []
        self.current = self.Stream(self, "main")
        patch.setattr(side_stream.torch.cuda, "current_stream", lambda device: self.current)
        patch.setattr(side_stream.torch.cuda, "Stream", self.new)
        patch.setattr(side_stream.torch.cuda, "stream", self.within)

    def new(self, device: torch.device, priority: int) -> Stream:
        self.made.append(priority)
        return self.Stream(self, "side")

    @contextmanager
    def within(self, stream: Stream) -> Iterator[None]:
        held, self.current = self.current, stream
        yield
        self.current = held

    def launch(self, name: str) -> None:
        self.log.append(f"{name} on {self.current.name}")


def test_a_branch_is_forked_before_and_joined_after_and_its_stream_is_made_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    events = Events(monkeypatch)
    side = SideStreams(torch.device("cuda"))
    for _ in range(2):
        events.log.clear()
        side.beside(lambda: events.launch("base"), lambda: events.launch("h"))
        assert events.log == ["side waits for main", "h on side", "base on main", "main waits for side"]
    assert events.made == [-1], "it has the priority of the stream beside which it runs"


def test_a_branch_is_joined_after_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    events = Events(monkeypatch)

    def refuse() -> None:
        raise RuntimeError("no memory")

    with pytest.raises(RuntimeError, match="no memory"):
        SideStreams(torch.device("cuda")).beside(refuse, nullcontext)
    assert events.log[-1] == "main waits for side"


def test_on_a_cpu_the_branches_run_one_after_the_other() -> None:
    done: list[str] = []
    side = side_stream.side_stream(CPU)
    assert isinstance(side, InOrder)
    side.beside(lambda: done.append("base"), lambda: done.append("h"))
    assert done == ["base", "h"]


# The bar catches what it should


class PairSkipped(KernelLauncher):
    def expand(self, tiles: Any, hidden: Any, b: Any, y: Any, rows: RowTable, *rest: Any) -> None:
        rows.counts -= 1
        super().expand(tiles, hidden, b, y, rows, *rest)
        rows.counts += 1


class RowsShifted(KernelLauncher):
    def expand(self, tiles: Any, hidden: Any, b: Any, y: Any, rows: RowTable, *rest: Any) -> None:
        rows.pairs[:2, 1] -= 1
        super().expand(tiles, hidden, b, y, rows, *rest)
        rows.pairs[:2, 1] += 1


class SlotsSwapped(KernelLauncher):
    def expand(self, tiles: Any, hidden: Any, b: torch.Tensor, *rest: Any) -> None:
        super().expand(tiles, hidden, b.flip(0), *rest)


class BlocksSwapped(KernelLauncher):
    def expand(self, tiles: Any, hidden: torch.Tensor, b: Any, y: Any, rows: Any, columns: Any, r: int) -> None:
        super().expand(tiles, hidden.roll(r, 1), b, y, rows, columns, r)


@pytest.mark.parametrize("fault", [PairSkipped, RowsShifted, SlotsSwapped, BlocksSwapped])
def test_the_bar_is_not_cleared_with(fault: type[KernelLauncher]) -> None:
    batch = small_batch()
    assert violations(batch, computed(batch, layer_of(batch, "three", fault)))
