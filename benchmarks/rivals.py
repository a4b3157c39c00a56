"""Ways to compute a linear layer with two adapters: CLIF's, and the others, each in its strongest known form."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from four_launches import OWN, FourLaunches, RivalTiles, published
from kernel_goals import BASE, DGRAD, FOUR, FOUR_PUBLISHED
from timing import Way
from torch.nn.functional import linear

from clif.kernels.dual_lora_forms import DualLoraLinear
from clif.kernels.dual_lora_host import KernelLauncher
from clif.kernels.dual_lora_reference import SHADOW, add_dual_lora
from clif.kernels.dual_lora_table import StagedRowTable
from clif.kernels.testing.dual_lora_specification import Batch

PER_SEGMENT, ONE_PRODUCT = "cuBLAS per segment", "cuBLAS, one masked product"
AUGMENTED, COMPILED = "K-augmented cuBLAS", "torch.compile of the reference"
PEFT, PEFT_MIXED, PEFT_BACKWARD = "PEFT eager", "PEFT mixed batch", "PEFT autograd"
Launchers = Mapping[str, KernelLauncher]
"""The ways of CLIF, by name: each launches with tiles of its own."""


def forward_ways(batches: Sequence[Batch], launchers: Launchers, compiled: bool = False) -> dict[str, Way]:
    """One way per rival; each takes the number of a layer. All layers have the same shapes and segments."""
    ways: dict[str, Way] = {
        BASE: lambda i: linear(batches[i].x, batches[i].merged.weight),
        **{name: _clif(batches, launcher) for name, launcher in launchers.items()},
    }
    if not batches[0].segments:
        return ways
    ways |= {
        PER_SEGMENT: lambda i: _per_segment(batches[i]),
        ONE_PRODUCT: _with_masks(batches, _one_product),
        FOUR: _four(batches, OWN),
        FOUR_PUBLISHED: _four(batches, published(len(batches[0].x), len(batches[0].merged.projections))),
        AUGMENTED: _augmented(batches),
        PEFT: lambda i: _peft(batches[i]),
        PEFT_MIXED: _peft_mixed(batches),
    }
    if compiled:
        ways[COMPILED] = _compiled(batches)
    return ways


def backward_ways(batches: Sequence[Batch], launchers: Launchers) -> dict[str, Way]:
    """The backward of rows that all use the shadow."""
    return {
        DGRAD: lambda i: batches[i].grad @ batches[i].merged.weight,
        **{name: _clif_backward(batches, launcher) for name, launcher in launchers.items()},
        PEFT_BACKWARD: _peft_backward(batches),
    }


def triton_base(batches: Sequence[Batch], launcher: KernelLauncher) -> Way:
    """The kernel's product alone. With a table on the device it cannot know that no row has an adapter."""
    layers, first = [DualLoraLinear(b.merged, launcher) for b in batches], batches[0]
    rows, slots = len(first.x), len(first.merged.a)
    table = StagedRowTable((), rows, layers[0].height(rows), slots, first.x.device)
    return lambda i: layers[i].forward(batches[i].x, table)


def _clif(batches: Sequence[Batch], launcher: KernelLauncher) -> Way:
    layers = [DualLoraLinear(b.merged, launcher) for b in batches]
    return lambda i: layers[i].forward(batches[i].x, batches[i].segments)


def _clif_backward(batches: Sequence[Batch], launcher: KernelLauncher) -> Way:
    layers = [DualLoraLinear(b.merged, launcher) for b in batches]
    hidden = [layer.forward(b.x, b.segments)[1] for layer, b in zip(layers, batches, strict=True)]
    return lambda i: layers[i].backward(batches[i].grad, batches[i].x, hidden[i], True)


def _per_segment(batch: Batch) -> torch.Tensor:
    """The reference: two products per adapter, on its rows only."""
    p = batch.merged
    y = linear(batch.x, p.weight)
    add_dual_lora(y, batch.x, batch.segments, lambda slot: (p.a[slot], p.b[slot]), p.scale)
    return y


def _compiled(batches: Sequence[Batch]) -> Way:
    segments, scale = batches[0].segments, batches[0].merged.scale

    def reference(x: torch.Tensor, weight: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        y = linear(x, weight)
        add_dual_lora(y, x, segments, lambda slot: (a[slot], b[slot]), scale)
        return y

    fast = torch.compile(reference, dynamic=False)
    return lambda i: fast(batches[i].x, batches[i].merged.weight, batches[i].merged.a, batches[i].merged.b)


def _slots(batch: Batch) -> list[int]:
    return sorted({s.slot % len(batch.merged.a) for s in batch.segments})


def _mask(batch: Batch) -> torch.Tensor:
    """[rows, slots in use * k r]: scale if a row uses the slot, otherwise 0."""
    p, slots = batch.merged, _slots(batch)
    mask = torch.zeros(len(batch.x), len(slots), p.a.shape[1], dtype=p.weight.dtype, device=p.weight.device)
    for start, stop, slot in batch.segments:
        mask[start:stop, slots.index(slot % len(p.a))] = p.scale
    return mask.flatten(1)


def _stacked(batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """A of all slots in use one below the other, B side by side."""
    p, slots = batch.merged, _slots(batch)
    return p.a[slots].flatten(0, 1).contiguous(), torch.cat([p.b[s] for s in slots], 1).contiguous()


def _with_masks(batches: Sequence[Batch], compute: Callable[..., torch.Tensor]) -> Way:
    mask, stacks = _mask(batches[0]), [_stacked(b) for b in batches]
    return lambda i: compute(batches[i], mask, *stacks[i])


def _one_product(batch: Batch, mask: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """All rows through all adapters, with a mask between. A NaN of one adapter reaches all rows."""
    y = linear(batch.x, batch.merged.weight)
    return y.addmm_((batch.x @ a.T).mul_(mask), b.T)


def _augmented(batches: Sequence[Batch]) -> Way:
    """[x | s] [W | B]^T: one product, deeper by the adapters' ranks. x lies in the wide buffer already."""
    mask, stacks = _mask(batches[0]), [_stacked(b) for b in batches]
    wide = [torch.cat([b.x, torch.zeros_like(mask)], 1) for b in batches]
    weights = [torch.cat([b.merged.weight, stack[1]], 1) for b, stack in zip(batches, stacks, strict=True)]
    depth = batches[0].x.shape[1]

    def way(i: int) -> torch.Tensor:
        narrow = wide[i][:, :depth]
        torch.mul(narrow @ stacks[i][0].T, mask, out=wide[i][:, depth:])
        return linear(wide[i], weights[i])

    return way


def _four(batches: Sequence[Batch], tiles: RivalTiles) -> Way:
    compute = FourLaunches(batches[0].merged, batches[0].segments, tiles)
    return lambda i: compute(batches[i].merged, batches[i].x)


def _peft(batch: Batch, slot: int = SHADOW) -> torch.Tensor:
    """The computation of peft's LoRA layer: one adapter for all rows, five kernels."""
    p = batch.merged
    result = linear(batch.x, p.weight)
    return result + linear(linear(batch.x, p.a[slot]), p.b[slot]) * p.scale


def _peft_mixed(batches: Sequence[Batch]) -> Way:
    """peft's path for a batch of several adapters: rows are picked by index and added by index."""
    first = batches[0]
    picks = [
        (slot, torch.cat([torch.arange(s.start, s.stop) for s in first.segments if s.slot == slot]).to(first.x.device))
        for slot in sorted({s.slot for s in first.segments})
    ]

    def way(i: int) -> torch.Tensor:
        p, x = batches[i].merged, batches[i].x
        result = linear(x, p.weight)
        for slot, index in picks:
            result[index] += linear(linear(x[index], p.a[slot]), p.b[slot]) * p.scale
        return result

    return way


def _peft_backward(batches: Sequence[Batch]) -> Way:
    """Autograd through peft's arithmetic, the base frozen; the forward is not counted."""
    graphs: dict[int, tuple[torch.Tensor, list[torch.Tensor]]] = {}

    def forward(b: Batch) -> tuple[torch.Tensor, list[torch.Tensor]]:
        x, a, lora_b = (t.detach().clone().requires_grad_() for t in (b.x, b.merged.a[SHADOW], b.merged.b[SHADOW]))
        return linear(x, b.merged.weight) + linear(linear(x, a), lora_b) * b.merged.scale, [x, a, lora_b]

    def way(i: int) -> Any:
        # In the first call, since a backward runs on the stream of its forward, and captures have their own.
        if i not in graphs:
            graphs[i] = forward(batches[i])
        y, inputs = graphs[i]
        return torch.autograd.grad(y, inputs, batches[i].grad, retain_graph=True)

    return way
