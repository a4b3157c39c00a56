"""What the roofline counts is what the kernels load and store, and its limits are bounds of what was measured."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch

from clif.kernels.testing.roofline import (
    H200,
    LinearShape,
    Machine,
    limit,
    linear_work,
    necessary,
    necessary_backward,
    paged_decode_bytes,
)
from clif.kernels.tiles import LinearTiles

TINY = LinearShape(segments=(5, 13), bare=2, depth=48, outs=(40, 16), rank=8)
TILES = LinearTiles(block_m=16, block_n=32, block_k=32, slices=2, shrinkers=3)


def test_a_layer_needs_each_operand_once() -> None:
    # x 20 x 48, W 56 x 48, y 20 x 56; A 2 x 16 x 48 and B 2 x 56 x 8 of two adapters; 2 bytes each.
    assert necessary(TINY)[0] == 2 * (960 + 2688 + 1120 + 1536 + 896)
    assert necessary(TINY, adapted=False)[0] == 2 * (960 + 2688 + 1120)
    # 2 x 20 x 48 x 56 for the base; of 18 rows 2 x 48 x 16 for h, and 2 x 8 x 56 for what it adds.
    assert necessary(TINY)[1] == 107520 + 18 * (1536 + 896)
    # x, its gradient, that of y, h; W; both factors, and their gradients in float32.
    rows = LinearShape(segments=(4,), depth=48, outs=(56,), rank=8)
    assert necessary_backward(rows)[0] == 2 * (4 * (48 + 48 + 56 + 8) + 56 * 48 + 8 * 104) + 4 * 8 * 104
    assert necessary_backward(rows)[1] == 2 * 4 * 48 * 56 + 2 * (2 * 4 * 8 * 104)


def test_the_launches_of_a_tiny_layer_counted_by_hand() -> None:
    shrink, base = linear_work(TINY, replace(TILES, form="pair", split=2), Machine("tiny", 1.0, 1.0, 4))
    # Rows 0 to 5, 5 to 16 and 16 to 18; two projections, two slices.
    assert (shrink.items, shrink.programs, shrink.waves, shrink.efficiency) == (12, 3, 4, 1.0)
    assert shrink.read == {"x": 2 * 18 * 2 * 48, "a": 2 * 3 * 16 * 48, "planes": 4 * 12 * 16 * 16}
    assert shrink.written == {"hidden": 2 * 18 * 16, "planes": 4 * 12 * 16 * 16}
    # Two row tiles, columns 0 to 32, 32 to 40 and 40 to 56, two parts.
    assert (base.items, base.programs, base.waves, base.efficiency) == (12, 4, 3, 1.0)
    assert base.read["x"] == 2 * 3 * 20 * 48 and base.read["w"] == 2 * 2 * 56 * 48
    assert base.padded == 2 * 32 * 96 * 64 + 2 * 3 * 3 * 16 * 32 * 16
    (fused,) = linear_work(TINY, TILES)
    assert fused.items == 6 and fused.programs == 132 and fused.efficiency == 6 / 132
    with pytest.raises(ValueError, match="separate depend on its segments"):
        linear_work(TINY, LinearTiles(form="separate"))


@pytest.mark.parametrize(("form", "split"), [("fused", 1), ("fused", 2), ("three", 1)])
def test_the_kernels_load_and_store_what_is_counted(monkeypatch: pytest.MonkeyPatch, form: Any, split: int) -> None:
    moved, memory = run_counted(monkeypatch, replace(TILES, form=form, split=split))
    works = [work for work in linear_work(TINY, replace(TILES, form=form, split=split)) if work.name != "cuBLAS"]
    wanted: Counter[tuple[str, bool]] = Counter()
    for work in works:
        for store, counts in ((False, work.read), (True, work.written)):
            for name, count in counts.items():
                # Both kinds of partial sums lie in one piece of memory.
                wanted["planes" if name == "sums" else name, store] += count
    assert {key: count for key, count in moved.items() if key[0] in memory} == {k: v for k, v in wanted.items() if v}


def run_counted(monkeypatch: pytest.MonkeyPatch, tiles: LinearTiles) -> tuple[Counter[tuple[str, bool]], set[str]]:
    """Bytes that the interpreter loads and stores in one forward of TINY: (tensor, whether it stores)."""
    interpreter = pytest.importorskip("triton.runtime.interpreter", reason="Triton is not installed")
    from clif.kernels.dual_lora_forms import DualLoraLinear
    from clif.kernels.dual_lora_host import INTERPRET, KernelLauncher
    from clif.kernels.testing.dual_lora_specification import random_batch, random_layer
    from clif.kernels.tuning import Fixed

    if not INTERPRET:
        pytest.skip("the kernels are compiled in this process")
    seen: list[tuple[Any, bool]] = []

    def watched(name: str, store: bool, mask: int) -> None:
        original = getattr(interpreter.InterpreterBuilder, name)

        def watch(self: Any, pointers: Any, *rest: Any) -> Any:
            seen.append((pointers.data[rest[mask].data], store))
            return original(self, pointers, *rest)

        monkeypatch.setattr(interpreter.InterpreterBuilder, name, watch)

    batch = random_batch(
        random_layer(TINY.outs, TINY.depth, TINY.rank, dtype=torch.bfloat16), ((5, 0), (13, 1), (2, None))
    )
    launcher = KernelLauncher(torch.device("cpu"), Fixed(tiles))
    watched("create_masked_load", False, 0)
    watched("create_masked_store", True, 1)
    y, hidden = DualLoraLinear(batch.merged, launcher).forward(batch.x, batch.segments)
    merged, planes = batch.merged, launcher.workspace().planes
    memory = {
        "x": batch.x,
        "w": merged.weight,
        "a": merged.a,
        "b": merged.b,
        "y": y,
        "hidden": hidden,
        "planes": planes,
    }
    moved: Counter[tuple[str, bool]] = Counter()
    for addresses, store in seen:
        for name, tensor in memory.items():
            start, size = tensor.data_ptr(), tensor.element_size()
            inside = (addresses >= start) & (addresses < start + tensor.numel() * size)
            moved[name, store] += int(inside.sum()) * size
    return +moved, set(memory)


def test_a_limit_is_the_resource_that_takes_longest() -> None:
    machine = Machine("round", 1e12, 1e14, 100)
    assert limit(10**9, 10**10, machine) == limit(10**9, 0, machine)
    assert limit(10**9, 10**10, machine).seconds == 1e-3 and limit(10**9, 10**10, machine).resource == "memory"
    assert limit(10**9, 10**12, machine).seconds == 1e-2 and limit(10**9, 10**12, machine).resource == "arithmetic"


def test_limits_known_from_elsewhere() -> None:
    decode = LinearShape(segments=(48, 16), depth=4096, outs=(4096,), rank=16)
    mixed = replace(decode, segments=(64, 2048))
    # Reading W of 32 MiB, and 2 x 2112 x 4096 x 4096 operations.
    assert 7.8e-6 < limit(*necessary(decode, adapted=False)).seconds < 8.1e-6
    assert limit(*necessary(mixed, adapted=False)) == limit(0, 2 * 2112 * 4096**2)
    assert limit(*necessary(mixed, adapted=False)).seconds == pytest.approx(89.7e-6, rel=1e-3)
    ratio = limit(*necessary(decode)).seconds / limit(*necessary(decode, adapted=False)).seconds
    assert 1.005 < ratio < 1.02
    # 64 sequences of 384 tokens, 8 KV heads of 64: 50 MB.
    assert paged_decode_bytes([384] * 64, 32, 8, 64) == 2 * 64 * 384 * 8 * 64 * 2 + 2 * 64 * 32 * 64 * 2
    assert H200.multiprocessors == 132
