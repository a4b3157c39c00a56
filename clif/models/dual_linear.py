"""The dual LoRA linear layer: one frozen base, several serving adapters and the shadow that learns.

Invariants: rows that serve leave nothing in the autograd graph; serving slots and the base are never trained; one
product with the base sees all rows of a batch, whatever they are there for.

Sources: LoRA (Hu et al. 2021); S-LoRA (Sheng et al. 2023) and Punica (Chen et al. 2023) for segments of rows with
adapters of their own; Megatron-LM (Shoeybi et al. 2019) for where partial results are summed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from clif.distributed.collectives import TpGroup
from clif.kernels.dual_lora_reference import SHADOW as SHADOW
from clif.kernels.dual_lora_reference import (
    Segment,
    add_dual_lora,
    add_dual_lora_by_slot,
    shadow_backward,
    shadow_forward,
)
from clif.models.base_backward import base_backward, multiplies, packed_product
from clif.models.base_weight import BaseWeight, Compiled, merged
from clif.models.lora_factors import LoraFactors, LoraModule
from clif.models.shard import LinearShards, Shard

if TYPE_CHECKING:
    from clif.kernels.cpu.training import TrainingKernels
    from clif.kernels.dual_lora_forms import DualLoraLinear
    from clif.kernels.dual_lora_host import KernelLauncher
    from clif.kernels.dual_lora_table import AdapterTables, RowTables


@dataclass(frozen=True)
class LoraRows:
    """Rows of one kind in a batch: how many, and which adapter slot each segment of them uses.

    Segments are disjoint, in row order, counted from the first of these rows; rows in none use the base alone.
    learns: every row uses the shadow, and gradients are wanted. tables: the segments as the kernels read them.
    on_device: instead of segments, for a captured step.
    """

    count: int
    segments: tuple[Segment, ...] = ()
    learns: bool = False
    tables: RowTables | None = None
    on_device: SlotsOnDevice | None = None


@dataclass(frozen=True)
class SlotsOnDevice:
    """Adapter slots of rows that a captured graph reads.

    slots [rows]: of each row, -1 for none; tables: the same as the kernels read them.
    """

    slots: torch.Tensor
    tables: AdapterTables


class DualLinear:
    """y = x W^T + b + scale * (x A_s^T) B_s^T, with s the adapter slot of each row (none: the base alone).

    It merges layers that read the same input (query, key and value; gate and up): W [out, in] holds their weights one
    below the other. names, sizes: of the merged modules, which are what adapters belong to; into what attention splits
    the output is no concern of this layer. lora: their adapters; None before adapt(). training: what computes the
    backward of rows that learn, in bfloat16 on a CPU; None: torch.
    """

    def __init__(self, names: Sequence[str], linears: Sequence[nn.Linear], shards: LinearShards | None = None) -> None:
        """shards: how each of `linears` is cut over the ranks of a replica, and which part they hold here."""
        self.names, self.sizes = tuple(names), [linear.out_features for linear in linears]
        self.shards = shards or LinearShards("out", tuple(Shard(0, n, n) for n in self.sizes), TpGroup())
        self.base: BaseWeight = merged(linears)
        self.lora: LoraFactors | None = None
        self.training: TrainingKernels | None = None
        self._kernels: DualLoraLinear | None = None
        self._captured: DualLoraLinear | None = None

    def adapt(self, adapted: list[int], r: int, scale: float, slots: int) -> LoraFactors:
        """Give the chosen modules adapters: A like a linear layer and B zero, as peft does."""
        named = enumerate(zip(self.names, self.sizes, strict=True))
        modules = [LoraModule(name, size, i in adapted) for i, (name, size) in named]
        self.lora = LoraFactors(modules, self.base, self.shards, r, scale, slots)
        return self.lora

    def use_kernels(self, launcher: KernelLauncher | None, captured: KernelLauncher | None = None) -> None:
        """Compute adapters by the kernels from now on, where the layer is adapted; and the base, where it is dense.

        launcher: used if its tiling takes layers of such widths; captured: the same for rows of captured steps.
        """
        from clif.kernels.dual_lora_forms import DualLoraLinear

        if self.lora is not None:
            merged = self.lora.as_merged(self.base)
            out, depth = merged.weight.shape
            taken = launcher is not None and launcher.tiling.takes(depth, out, merged.r)
            self._kernels = DualLoraLinear(merged, launcher) if launcher and taken else None
            self._captured = DualLoraLinear(merged, captured) if captured else None

    def held(self) -> tuple[object, ...]:
        """What a captured graph of rows that learn reads beside tensors: to be kept for as long as the graph."""
        return () if self._kernels is None else self._kernels.held()

    def __call__(self, xs: Sequence[torch.Tensor], rows: Sequence[LoraRows]) -> list[torch.Tensor]:
        """xs: [count, in] for each kind of rows, those that learn last. Returns [count, out] for each."""
        if rows[-1].learns and torch.is_grad_enabled():
            a, b = (self.lora.shadow_a, self.lora.shadow_b) if self.lora else (None, None)
            learnt, served = _Learn.apply(xs[-1], a, b, self, list(xs[:-1]), rows)
            return [*served.split([r.count for r in rows[:-1]]), learnt] if len(xs) > 1 else [learnt]
        x = xs[0] if len(xs) == 1 else torch.cat(list(xs))
        if rows[0].on_device is not None:
            y = self._by_slot(x, rows[0].on_device)
        elif self._kernels is not None:
            # Rows of several kinds are concatenated: the tables of one kind do not fit them.
            y, _ = self._kernels.forward(x, _segments(rows), rows[0].tables if len(rows) == 1 else None)
        elif isinstance(self.base, Compiled) and self.lora is not None and self.lora.packed is not None:
            y, _ = packed_product(x, self.base, self.lora.packed, _segments(rows))
        else:
            y = self._add_adapters(self.base.forward(x), x, rows)
        self.shards.sum_outputs(y)
        return list(y.split([r.count for r in rows])) if len(xs) > 1 else [y]

    def _by_slot(self, x: torch.Tensor, rows: SlotsOnDevice) -> torch.Tensor:
        lora = self.lora
        if self._captured is not None:
            table = rows.tables.of(self._captured.height(len(x)), len(self._captured.merged.a))
            return self._captured.forward(x, table)[0]
        y = self.base.forward(x)
        if lora is not None:
            add_dual_lora_by_slot(y, x, rows.slots, lora.serving_a, lora.serving_b, lora.scale)
        return y

    def _add_adapters(self, y: torch.Tensor, x: torch.Tensor, rows: Sequence[LoraRows]) -> torch.Tensor:
        if self.lora is not None:
            add_dual_lora(y, x, _segments(rows), self.lora.in_slot, self.lora.scale)
        return y

    def learn(
        self, x: torch.Tensor, others: list[torch.Tensor], rows: Sequence[LoraRows]
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """The forward of rows that learn, x [count, in], behind rows of other kinds.

        Returns their output [count, out], that of the others [their rows, out], and what the backward needs beside x.
        """
        low: torch.Tensor | None
        together = torch.cat([*others, x]) if others else x
        served = len(together) - len(x)
        if self._kernels is not None:
            y, hidden = self._kernels.forward(together, _segments(rows))
            self.shards.sum_outputs(y)
            return y[served:], y[:served], hidden[served:]
        if isinstance(self.base, Compiled) and self.lora is not None and self.lora.packed is not None:
            y, hidden = packed_product(together, self.base, self.lora.packed, _segments(rows))
            self.shards.sum_outputs(y)
            return y[served:], y[:served], hidden[served:]
        y, low, lora = self.base.forward(together), None, self.lora
        if lora is not None:
            self._add_adapters(y[:served], together[:served], rows[:-1])
            low = shadow_forward(y[served:], x, lora.compute_a, lora.compute_b, lora.scale)
        self.shards.sum_outputs(y)
        return y[served:], y[:served], low

    def gradients(
        self, grad: torch.Tensor, x: torch.Tensor, hidden: torch.Tensor, down: bool
    ) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
        """Of x (None unless down), of shadow_a and of shadow_b, given that of y [count, out].

        None for a factor whose gradient was added to already.

        Those of factors that peers hold as well are partial sums: see AdapterBank.join_gradient.
        """
        assert self.lora is not None
        if self._kernels is not None:
            grad_x, a, b = self._kernels.backward(grad, x, hidden, down)
        elif self.training is not None and multiplies(self.base, len(self.lora.compute_a)):
            weight, factors = self.base.tensors[0], self.lora.learning()
            grad_x, a, b = self.training.learning_backward(weight, factors, grad, x, hidden, down), None, None
        else:
            lora, through_base = self.lora, self.base.backward(grad) if down else None
            grad_x, a, b = shadow_backward(grad, through_base, x, hidden, lora.compute_a, lora.compute_b, lora.scale)
            a, b = a.float(), lora.gather_b(b).float()
        return None if grad_x is None else self.shards.sum_inputs(grad_x), a, b


class _Learn(torch.autograd.Function):
    """All rows through the base at once; the graph holds the learning rows only.

    The base is frozen, so that the backward needs no product for it but the one that carries the gradient down.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        a: torch.Tensor | None,
        b: torch.Tensor | None,
        dual: DualLinear,
        others: list[torch.Tensor],
        rows: Sequence[LoraRows],
    ) -> tuple[torch.Tensor, torch.Tensor]:
        learnt, served, hidden = dual.learn(x, others, rows)
        ctx.dual = dual
        ctx.save_for_backward(None if hidden is None else x, hidden)
        ctx.mark_non_differentiable(served)
        # Otherwise autograd makes zeros for the rows that have no gradient.
        ctx.set_materialize_grads(False)
        return learnt, served

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[Any, ...]:
        dual: DualLinear = ctx.dual
        x, hidden = ctx.saved_tensors
        down = ctx.needs_input_grad[0]
        if hidden is None:
            grad_x = dual.shards.sum_inputs(base_backward(dual.base, gradients[0], dual.training)) if down else None
            return grad_x, None, None, None, None, None
        return *dual.gradients(gradients[0], x, hidden, down), None, None, None


def _segments(rows: Sequence[LoraRows]) -> tuple[Segment, ...]:
    """The segments of all kinds of rows, counted from the first row of the batch."""
    found: list[Segment] = []
    at = 0
    for kind in rows:
        found += [Segment(at + start, at + stop, slot) for start, stop, slot in kind.segments]
        at += kind.count
    return tuple(found)
