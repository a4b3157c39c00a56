"""The dual LoRA kernels on a GPU, at the shapes of 1B and 8B models, against the interpreter tests' specification.

Needs torch, Triton and pytest only.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any, get_args

import pytest
import torch
from torch.nn.functional import linear

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU here")]
pytest.importorskip("triton")

from clif.kernels.dual_lora_forms import DualLoraLinear
from clif.kernels.dual_lora_host import KernelLauncher
from clif.kernels.dual_lora_reference import SHADOW, Segment
from clif.kernels.dual_lora_table import RowTable, StagedRowTable
from clif.kernels.testing.dual_lora_specification import Batch, computed, random_batch, random_layer, violations
from clif.kernels.tiles import Form, LinearTiles
from clif.kernels.tuning import Defaults, Fixed

DECODE = ((48, 0), (16, 1))
MIXED = ((64, 0), (3, None), (1984, SHADOW))
EVERY = pytest.mark.parametrize("form", get_args(Form))
ALL_KINDS = ((13, 0), (5, None), (40, 1), (71, SHADOW))


def capability() -> int:
    major, minor = torch.cuda.get_device_capability()
    return 10 * major + minor


@pytest.fixture
def defaults() -> Defaults:
    return Defaults(torch.cuda.get_device_properties(0).multi_processor_count, capability())


@pytest.fixture
def launcher(defaults: Defaults) -> KernelLauncher:
    return KernelLauncher(torch.device("cuda"), defaults)


def batch_of(sizes: Any, depth: int, r: int, lengths: Any, dtype: torch.dtype = torch.bfloat16, **layer: Any) -> Batch:
    return random_batch(random_layer(sizes, depth, r, dtype=dtype, device="cuda", **layer), lengths)


def launcher_of(form: Form, defaults: Defaults, rows: int, depth: int, out: int, r: int = 16) -> KernelLauncher:
    """A launcher of one form, with tiles for this shape."""
    if form == "pair" and defaults.capability < 90:
        pytest.skip("needs compute capability 9.0")
    return KernelLauncher(torch.device("cuda"), Fixed(defaults.tiles(form, rows, depth, out, r)))


def assert_good(batch: Batch, launcher: KernelLauncher) -> None:
    assert violations(batch, computed(batch, DualLoraLinear(batch.merged, launcher))) == []


@pytest.mark.parametrize("r", [8, 16, 48, 64])
@pytest.mark.parametrize("lengths", [((1, 0),), ((16, 1),), DECODE, ((256, 0),), MIXED], ids=str)
def test_results_are_as_near_to_float64_as_torch_s(r: int, lengths: Any, launcher: KernelLauncher) -> None:
    assert_good(batch_of([4096], 4096, r, lengths), launcher)


@pytest.mark.parametrize(
    "sizes, depth",
    [((4096, 1024, 1024), 4096), ((14336, 14336), 4096), ((4096,), 14336), ((2048, 512, 512), 2048), ((1024,), 4096)],
)
@pytest.mark.parametrize("lengths", [DECODE, MIXED], ids=["decode", "mixed"])
def test_so_they_are_for_the_packed_layers_of_models(
    sizes: Any, depth: int, lengths: Any, launcher: KernelLauncher
) -> None:
    assert_good(batch_of(sizes, depth, 16, lengths), launcher)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_so_they_are_in_other_types(dtype: torch.dtype, launcher: KernelLauncher) -> None:
    assert_good(batch_of([512, 256], 1024, 16, ALL_KINDS, dtype, bias=True), launcher)


@pytest.mark.parametrize("sizes, depth", [((1000,), 1000), ((250, 90), 1032), ((97,), 77)])
@pytest.mark.parametrize("r", [3, 8, 48])
def test_so_they_are_for_sizes_that_no_tile_divides(sizes: Any, depth: int, r: int, launcher: KernelLauncher) -> None:
    assert_good(batch_of(sizes, depth, r, ALL_KINDS, bias=True), launcher)
    assert_good(batch_of(sizes, depth, r, ALL_KINDS, adapted=[len(sizes) - 1]), launcher)


@pytest.mark.parametrize("lengths", [((0, None),), ((1, None),), ((1, SHADOW),), ((7, None), (0, 2))], ids=str)
def test_any_number_of_rows_of_any_kind_will_do(lengths: Any, launcher: KernelLauncher) -> None:
    assert_good(batch_of([512, 256], 512, 16, lengths), launcher)


@EVERY
@pytest.mark.parametrize("r", [8, 16, 64])
@pytest.mark.parametrize("lengths", [((1, 0),), DECODE, MIXED], ids=["1", "decode", "mixed"])
def test_every_form_is_within_the_specification_with_its_default_tiles(
    form: Form, r: int, lengths: Any, defaults: Defaults
) -> None:
    batch = batch_of([4096, 1024], 2048, r, lengths)
    assert_good(batch, launcher_of(form, defaults, len(batch.x), 2048, 5120, r))


def every_tiling() -> Iterator[LinearTiles]:
    for form in ("three", "branches", "separate"):
        for block_m, block_n, block_k, warps in ((16, 128, 128, 4), (64, 128, 64, 4), (128, 128, 64, 8)):
            for early in (False, True):
                if form != "branches" or not early:
                    yield LinearTiles(form, block_m, block_n, block_k, slices=4, warps=warps, stages=3, early=early)
    for tma in (False, True):
        for form in ("fused", "pair"):
            for block_m, block_n, block_k, warps in ((16, 32, 64, 4), (64, 64, 64, 4), (128, 128, 32, 8)):
                yield LinearTiles(form, block_m, block_n, block_k, slices=4, warps=warps, stages=3, tma=tma)


@pytest.mark.parametrize(
    "tiles", every_tiling(), ids=lambda t: f"{t.form}-{t.block_m}-{'tma' if t.tma else 'pointers'}{'-early' * t.early}"
)
def test_every_form_of_launch_computes_the_same_function(tiles: LinearTiles) -> None:
    if capability() < 90 and (tiles.tma or tiles.early or tiles.form == "pair"):
        pytest.skip("needs compute capability 9.0")
    launcher = KernelLauncher(torch.device("cuda"), Fixed(tiles))
    assert_good(batch_of([512, 256], 1024, 16, ALL_KINDS, bias=True), launcher)


@EVERY
def test_an_adapter_with_nan_reaches_no_row_of_another(form: Form, defaults: Defaults) -> None:
    batch = batch_of([4096], 4096, 16, MIXED)
    layer = DualLoraLinear(batch.merged, launcher_of(form, defaults, len(batch.x), 4096, 4096))
    healthy = computed(batch, layer)
    held = batch.merged.a[SHADOW].clone()
    batch.merged.a[SHADOW] = float("nan")
    poisoned, _ = layer.forward(batch.x, batch.segments)
    assert torch.equal(poisoned[: batch.learns], healthy.y[: batch.learns])
    assert poisoned[batch.learns :].isnan().all()
    batch.merged.a[SHADOW] = held
    batch.merged.b[0] = float("inf")
    again = computed(batch, layer)
    assert torch.equal(again.y[64:], healthy.y[64:]) and not again.y[:64].isfinite().any()
    assert torch.equal(again.grad_a, healthy.grad_a) and torch.equal(again.grad_b, healthy.grad_b)


@EVERY
def test_rows_without_adapter_compute_what_they_do_where_no_row_has_one(form: Form, defaults: Defaults) -> None:
    """In a form of one kernel: in a launch whose table has no pairs. Otherwise by torch's product."""
    batch = batch_of([4096], 4096, 16, MIXED)
    rows, p = len(batch.x), batch.merged
    using = launcher_of(form, defaults, rows, 4096, 4096)
    layer = DualLoraLinear(p, using)
    with_others, _ = layer.forward(batch.x, batch.segments)
    if form in ("fused", "pair"):
        nothing = StagedRowTable((), rows, layer.height(rows), len(p.a), torch.device("cuda"))
        alone, _ = layer.forward(batch.x, nothing)
    else:
        alone = linear(batch.x, p.weight, p.bias)
    assert torch.equal(with_others[64:67], alone[64:67])


@EVERY
def test_equal_input_gives_equal_bits(form: Form, defaults: Defaults) -> None:
    batch = batch_of([4096, 1024, 1024], 4096, 16, MIXED)
    using = launcher_of(form, defaults, len(batch.x), 4096, 6144)
    layer = DualLoraLinear(batch.merged, using)
    first = computed(batch, layer)
    for _ in range(20):
        again = computed(batch, layer)
        for name in ("y", "grad_x", "grad_a", "grad_b"):
            assert torch.equal(getattr(again, name), getattr(first, name))
    torch.cuda.synchronize()
    assert not using.workspace().tickets.any()


def captured(layer: DualLoraLinear, x: torch.Tensor, table: RowTable) -> tuple[torch.cuda.CUDAGraph, torch.Tensor]:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        layer.forward(x, table)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        y, _ = layer.forward(x, table)
    return graph, y


@pytest.mark.parametrize("form", ["fused", "pair", "three", "early", "branches"])
def test_a_captured_graph_serves_other_segments_ten_thousand_times(form: str, defaults: Defaults) -> None:
    if form in ("pair", "early") and defaults.capability < 90:
        pytest.skip("needs compute capability 9.0")
    batch = batch_of([1024, 256], 2048, 16, ((128, 0),))
    tiles = defaults.tiles("three" if form == "early" else form, 128, 2048, 1280, 16)  # type: ignore[arg-type]
    layer = DualLoraLinear(
        batch.merged, KernelLauncher(torch.device("cuda"), Fixed(replace(tiles, early=form == "early")))
    )
    table = StagedRowTable((), 128, layer.height(128), 4, torch.device("cuda"))
    graph, y = captured(layer, batch.x, table)
    splits = [((Segment(0, n, 0), Segment(n, n + 20, 2), Segment(n + 20, 128, SHADOW))) for n in (1, 17, 64, 100)]
    splits += [(), (Segment(5, 128, 1),)]
    # Not of segments that the host knows: none of them would be torch's product in every form.
    own = [StagedRowTable(split, 128, table.block_m, 4, torch.device("cuda")) for split in splits]
    expected = [layer.forward(batch.x, one)[0].clone() for one in own]
    for i in range(10_000):
        table.refill(splits[i % len(splits)], 128)
        graph.replay()
        if i % 100 < len(splits):
            assert torch.equal(y, expected[i % len(splits)]), f"replay {i}"


def test_branches_of_captured_layers_share_a_side_stream_and_their_memory(defaults: Defaults) -> None:
    """Several layers in one graph, each of whose h may lie where an earlier one's was."""
    batch = batch_of([512], 512, 16, ((48, 0), (16, 1)))
    layer = DualLoraLinear(batch.merged, launcher_of("branches", defaults, 64, 512, 512))
    table = StagedRowTable(batch.segments, 64, layer.height(64), 4, torch.device("cuda"))

    def six() -> torch.Tensor:
        x = batch.x
        for _ in range(6):
            y, hidden = layer.forward(x, table)
            del hidden
            x = (y / 64).contiguous()
        return x

    expected, stream = six(), torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        six()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        found = six()
    for _ in range(1000):
        graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(found, expected)


def test_no_call_waits_for_the_gpu(launcher: KernelLauncher) -> None:
    batch = batch_of([2048], 2048, 16, MIXED)
    layer = DualLoraLinear(batch.merged, launcher)
    computed(batch, layer)
    torch.cuda.set_sync_debug_mode("error")
    try:
        computed(batch, layer)
    finally:
        torch.cuda.set_sync_debug_mode("default")
