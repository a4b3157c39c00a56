"""What the shadow's rows are multiplied with: its float32 masters, rounded to the base's dtype, many layers at once.

Layers of the same shape whose masters lie at equal distances in the flat shadow hold their factors side by side. One
copy then rounds a factor of all of them: as many copies as one decoder layer has factors, however deep the model is.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence

import torch

from clif.models.lora_factors import LoraFactors

Copy = tuple[torch.Tensor, torch.Tensor]
"""(to, from): of the same shape."""


class Rounding:
    """The copies that round a bank's masters."""

    def __init__(self, layers: Sequence[LoraFactors], shadow: torch.Tensor) -> None:
        """shadow [n]: the masters of all layers, one after the other. The layers' slots, zeros, move to new memory."""
        self._copies: list[Copy] = []
        starts_of, at = defaultdict[object, list[int]](list), dict[int, LoraFactors]()
        start = 0
        for layer in layers:
            at[start] = layer
            sizes = tuple((module.size, module.adapted) for module in layer.modules)
            starts_of[layer.a.shape, sizes].append(start)
            start += layer.shadow_a.numel() + layer.shadow_b.numel()
        for run in (run for starts in starts_of.values() for run in equal_distances(starts)):
            self._copies += _copies([at[start] for start in run], run, shadow)

    @torch.no_grad()
    def apply(self) -> None:
        """Round all masters as they are now. Does not wait for the device."""
        for to, masters in self._copies:
            to.copy_(masters)


def equal_distances(numbers: Sequence[int]) -> list[list[int]]:
    """Rising numbers, cut into runs of equal distances."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and (len(runs[-1]) < 2 or number - runs[-1][-1] == runs[-1][1] - runs[-1][0]):
            runs[-1].append(number)
        else:
            runs.append([number])
    return runs


def _copies(layers: list[LoraFactors], starts: list[int], shadow: torch.Tensor) -> Iterator[Copy]:
    """Copies for layers of one shape, whose masters begin at these coordinates of the shadow."""
    first, step = layers[0], starts[1] - starts[0] if len(starts) > 1 else 1
    a, b = (one.new_zeros(len(layers), *one.shape) for one in (first.a, first.b))
    for layer, of_a, of_b in zip(layers, a, b, strict=True):
        layer.hold(of_a, of_b)
    at = starts[0]
    for to in (a[:, -1], *first.blocks(b[:, -1])):
        _, rows, columns = to.shape
        yield to, shadow.as_strided(to.shape, (step, columns, 1), shadow.storage_offset() + at)
        at += rows * columns
