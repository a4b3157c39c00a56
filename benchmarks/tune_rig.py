"""The layers of one task of the tuner on a device, every way to compute them, and whether a result is right."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from checkout import use_checkout

use_checkout()

import torch
from timing import Way, prepared
from torch.nn.functional import linear
from tune_plan import Task, Tiles

from clif.kernels.dual_lora_forms import DualLoraLinear
from clif.kernels.dual_lora_host import KernelLauncher
from clif.kernels.dual_lora_reference import SHADOW, MergedLinear, add_dual_lora
from clif.kernels.testing.dual_lora_specification import Batch, Expected, faults, gathered, random_batch
from clif.kernels.tiles import GradTiles
from clif.kernels.tuning import Fixed

BASE, TORCH = "base", "torch"
"""Torch's ways beside the forms: the base product alone, and the whole as plain products."""


class Rig:
    """Times and checks candidates of one task. layers: of its shape, with more weights than the cache holds."""

    def __init__(self, task: Task, layers: Sequence[MergedLinear], device: torch.device) -> None:
        self.task, self.device = task, device
        self.batches = [random_batch(layer, task.lengths) for layer in layers]
        # One for all candidates: tables and workspaces are made once.
        self._launcher = KernelLauncher(device, Fixed())
        self._layers = [DualLoraLinear(b.merged, self._launcher) for b in self.batches]
        self._stream = torch.cuda.Stream() if device.type == "cuda" else None
        self._runs: dict[Tiles | str, Callable[[], float]] = {}
        self._expected: Expected | None = None
        self._low = [_low_rank(b) if task.what == "grads" else None for b in self.batches]

    @property
    def beside(self) -> tuple[str, ...]:
        """Torch's ways of this task."""
        return (TORCH,) if self.task.what == "grads" else (BASE, TORCH)

    def cost(self, candidate: Tiles | str, count: int) -> Sequence[float]:
        """So many samples, microseconds per layer. The first call captures a graph."""
        if candidate not in self._runs:
            torchs = isinstance(candidate, str)
            way = self._by_torch(candidate) if torchs else self._launches(candidate, self._launcher, self._layers)
            self._runs[candidate] = prepared(way, len(self.batches), self.device, self._stream)
        return [self._runs[candidate]() for _ in range(count)]

    def wrong(self, candidate: Tiles | str) -> str | None:
        """Why the results of a candidate violate the specification; None: they do not."""
        if isinstance(candidate, str):
            return None
        batch = self.batches[0]
        self._expected = self._expected or Expected.of(batch)
        self._poison()
        found: list[str] = []
        for name, value in self._results(candidate).items():
            found += faults(batch, self._expected, name, value)
        return "; ".join(found) or None

    def _launches(self, candidate: Tiles, launcher: KernelLauncher, layers: Sequence[DualLoraLinear]) -> Way:
        tiling = Fixed(of_factors=candidate) if isinstance(candidate, GradTiles) else Fixed(candidate)

        def launch(i: int) -> tuple[Any, ...]:
            launcher.tiling = tiling
            batch, layer, low = self.batches[i], layers[i], self._low[i]
            if low is not None:
                return layer.factor_gradients(batch.grad, batch.x, *low)
            return layer.through(batch.grad, True) if self._backward else layer.forward(batch.x, batch.segments)

        return launch

    @property
    def _backward(self) -> bool:
        return self.task.what == "backward"

    def _by_torch(self, name: str) -> Way:
        def base(i: int) -> torch.Tensor:
            batch, p = self.batches[i], self.batches[i].merged
            return batch.grad @ p.weight if self._backward else linear(batch.x, p.weight)

        def whole(i: int) -> Any:
            batch, p, y = self.batches[i], self.batches[i].merged, self._low[i] or base(i)
            if isinstance(y, tuple):
                return y[1].T @ batch.x, batch.grad.T @ y[0]
            if self._backward:
                return y.addmm_((batch.grad @ p.b[SHADOW]).mul_(p.scale), p.a[SHADOW])
            add_dual_lora(y, batch.x, batch.segments, lambda slot: (p.a[slot], p.b[slot]), p.scale)
            return y

        return base if name == BASE else whole

    def _results(self, candidate: Tiles) -> dict[str, torch.Tensor]:
        """What a candidate computes; h and its gradient by the factors' gradients that torch makes of them."""
        batch = self.batches[0]
        # With a workspace of its own: what an earlier candidate may have left in one must not count.
        launcher = KernelLauncher(self.device, Fixed())
        first, second = self._launches(candidate, launcher, [DualLoraLinear(batch.merged, launcher)])(0)
        if self.task.what == "grads":
            return {"grad_a": first, "grad_b": second}
        if self._backward:
            return {"grad_x": first, "grad_a": second.T.float() @ batch.x.float()}
        hidden = second[batch.learns :].float()
        return {"y": first, "grad_b": gathered(batch.merged, batch.grad.T.float() @ hidden)}

    def _poison(self) -> None:
        """Leave NaN in memory that results are about to get: a tile that no program writes must not look right."""
        batch, p = self.batches[0], self.batches[0].merged
        shapes = ((len(batch.x), len(p.weight)), (len(batch.x), p.weight.shape[1]), (len(batch.x), p.a.shape[1]))
        for shape in shapes:
            batch.x.new_full(shape, float("nan"))


def _low_rank(batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """h = scale * x A^T of the rows that learn, and its gradient: what the gradients of the factors are made of."""
    p = batch.merged
    return p.scale * (batch.x @ p.a[SHADOW].T), p.scale * (batch.grad @ p.b[SHADOW])
