"""The dual LoRA linear layer: one frozen base, several serving adapters and the shadow that learns.

Invariants: rows that serve leave nothing in the autograd graph; serving slots and the base are never trained; one
product with the base sees all rows of a batch, whatever they are there for.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from clif.distributed.collectives import TpGroup
from clif.kernels.dual_lora_reference import SHADOW as SHADOW
from clif.kernels.dual_lora_reference import (
    MergedLinear,
    Projection,
    Segment,
    add_dual_lora,
    shadow_backward,
    shadow_forward,
)
from clif.models.backends import Linear, prepacked_linear
from clif.models.shard import Shard, ShardDim

if TYPE_CHECKING:
    from clif.kernels.dual_lora_host import FusedLinear, KernelLauncher
    from clif.kernels.dual_lora_table import RowTables


@dataclass(frozen=True)
class ShardSpec:
    """Which part of a factor this rank holds: `span` of its dimension `dim`; without a span all of it."""

    dim: int = 0
    shard: Shard | None = None

    def holders(self, tp_size: int) -> int:
        """How many of the peers hold this part."""
        return tp_size if self.shard is None else tp_size * self.shard.size // self.shard.total

    def of_rank(self, rank: int, tp_size: int) -> ShardSpec:
        """The part that another peer holds."""
        if self.shard is None:
            return self
        start = rank // self.holders(tp_size) * self.shard.size
        return ShardSpec(self.dim, Shard(start, start + self.shard.size, self.shard.total))

    def take(self, whole: torch.Tensor) -> torch.Tensor:
        """This rank's part of a whole factor."""
        return whole if self.shard is None else whole.narrow(self.dim, self.shard.start, self.shard.size)


@dataclass(frozen=True)
class LoraRows:
    """Rows of one kind in a batch: how many, and which adapter slot each segment of them uses.

    Segments are disjoint, in row order, counted from the first of these rows; rows in none use the base alone.
    learns: every row uses the shadow, and gradients are wanted. tables: the segments as the fused kernel reads them.
    """

    count: int
    segments: tuple[Segment, ...] = ()
    learns: bool = False
    tables: RowTables | None = None


class DualLinear:
    """y = x W^T + b + scale * (x A_s^T) B_s^T, with s the adapter slot of each row (none: the base alone).

    It merges the layers that read the same input (query, key and value; gate and up): W [out, in] holds their
    weights one below the other. A [k r, in] holds the factors of the k adapted ones likewise, and B [out, k r] has
    each one's factor in its own rows and columns, zero elsewhere: one product per factor instead of k.

    serving_a, serving_b [slots, ...] and compute_a, compute_b are in the base dtype; shadow_a [k r, in] and
    shadow_b [adapted rows, r] are float32 masters, trained. compute_* are what the shadow's rows are multiplied with:
    call refresh() after the masters have changed.
    """

    def __init__(
        self,
        names: Sequence[str],
        linears: Sequence[nn.Linear],
        shard_dim: ShardDim = "out",
        shards: Sequence[Shard] | None = None,
        tp_group: TpGroup | None = None,
    ) -> None:
        """split, spans: which side of each weight is cut over the peers, and this rank's parts, as in `linears`."""
        self.names, self.sizes = tuple(names), [linear.out_features for linear in linears]
        self.shard_dim, self.tp_group = shard_dim, tp_group or TpGroup()
        self.shards = list(shards or (Shard(0, size, size) for size in self.sizes))
        self.weight, self.bias = _stack(linears)
        self.adapted: list[int] = []
        self._prepacked: Linear | None = None
        self._fused: FusedLinear | None = None

    def adapt(self, adapted: list[int], r: int, scale: float, slots: int) -> None:
        """Give the chosen members adapters: A like a linear layer and B zero, as peft does."""
        out, width = self.weight.shape
        rank = r * len(adapted)
        self.adapted, self.r, self.scale = adapted, r, scale
        self._a, self._b = (self.weight.new_zeros(slots + 1, *shape) for shape in ((rank, width), (out, rank)))
        self.serving_a, self.serving_b = self._a[:SHADOW], self._b[:SHADOW]
        self.compute_a, self.compute_b = self._a[SHADOW], self._b[SHADOW]
        rows, device = sum(self.sizes[i] for i in adapted), self.weight.device
        self.shadow_a = nn.Parameter(torch.empty(rank, width, device=device))
        self.shadow_b = nn.Parameter(torch.empty(rows, r, device=device))
        self.draw()

    def draw(self) -> None:
        """The shadow as it is before any training: A drawn from torch's random numbers, B zero."""
        width = self.weight.shape[1]
        inputs = self.shards[0] if self.shard_dim == "in" else Shard(0, width, width)
        for a in self.shadow_a.data.split(self.r):
            # Drawn whole: the same adapter, however many ranks share it.
            whole = torch.empty(self.r, inputs.total, device=self.weight.device)
            nn.init.kaiming_uniform_(whole, a=math.sqrt(5))
            a.copy_(whole[:, inputs.start : inputs.stop])
        self.shadow_b.data.zero_()

    def prepack(self) -> None:
        """Lay the base weight out for the machine's matrix kernels where that pays."""
        self._prepacked = prepacked_linear(self.weight, self.bias)

    def fuse(self, launcher: KernelLauncher) -> None:
        """Compute base and adapters in one launch from now on; only for an adapted layer."""
        from clif.kernels.dual_lora_host import FusedLinear

        ends = list(itertools.accumulate(self.sizes))
        blocks = [self.adapted.index(i) if i in self.adapted else None for i in range(len(self.sizes))]
        projections = (Projection(e - n, e, j) for e, n, j in zip(ends, self.sizes, blocks, strict=True))
        merged = MergedLinear(self.weight, self.bias, self._a, self._b, self.r, self.scale, tuple(projections))
        self._fused = FusedLinear(merged, launcher)

    def factors(self, a: torch.Tensor, b: torch.Tensor) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
        """Views of merged masters (shaped like shadow_a, shadow_b) by module name: A [r, in] and B [own rows, r]."""
        parts = zip(a.split(self.r), b.split([self.sizes[i] for i in self.adapted]), strict=True)
        return {self.names[i]: part for i, part in zip(self.adapted, parts, strict=True)}

    def shard_specs(self) -> dict[str, tuple[ShardSpec, ShardSpec]]:
        """How A and B of each adapted module lie in the whole ones: cut by inputs, cut by outputs, or not at all."""
        found = {}
        for i in self.adapted:
            part = ShardSpec(1 if self.shard_dim == "in" else 0, self.shards[i])
            found[self.names[i]] = (ShardSpec(), part) if self.shard_dim == "out" else (part, ShardSpec())
        return found

    def fill_slot(self, slot: int, factors: dict[str, tuple[torch.Tensor, torch.Tensor]]) -> None:
        """Copy an adapter into a serving slot, rounding to the base dtype once."""
        self._spread(factors, self.serving_a[slot], self.serving_b[slot])

    def refresh(self) -> None:
        """Round the shadow's masters to what its rows are multiplied with."""
        self._spread(self.factors(self.shadow_a.data, self.shadow_b.data), self.compute_a, self.compute_b)

    def _spread(
        self, factors: dict[str, tuple[torch.Tensor, torch.Tensor]], to_a: torch.Tensor, to_b: torch.Tensor
    ) -> None:
        blocks = self._blocks(to_b)
        for i, a, block in zip(self.adapted, to_a.split(self.r), blocks, strict=True):
            from_a, from_b = factors[self.names[i]]
            a.copy_(from_a)
            block.copy_(from_b)

    def _blocks(self, b: torch.Tensor) -> list[torch.Tensor]:
        """The non-zero blocks of a merged B [out, k r], one per adapted member."""
        rows = b.split(self.sizes)
        return [rows[i][:, j * self.r : (j + 1) * self.r] for j, i in enumerate(self.adapted)]

    def __call__(self, xs: Sequence[torch.Tensor], rows: Sequence[LoraRows]) -> list[torch.Tensor]:
        """xs: [count, in] for each kind of rows, those that learn last. Returns [count, out] for each."""
        if rows[-1].learns and torch.is_grad_enabled():
            a, b = (self.shadow_a, self.shadow_b) if self.adapted else (None, None)
            learnt, served = _Learn.apply(xs[-1], a, b, self, list(xs[:-1]), rows)
            return [*served.split([r.count for r in rows[:-1]]), learnt] if len(xs) > 1 else [learnt]
        x = xs[0] if len(xs) == 1 else torch.cat(list(xs))
        if self._fused is not None:
            # Rows of several kinds lie behind each other: their tables are made anew.
            y, _ = self._fused.forward(x, _segments(rows), rows[0].tables if len(rows) == 1 else None)
        else:
            y = self._add_adapters(self._base(x), x, rows)
        self._join(y)
        return list(y.split([r.count for r in rows])) if len(xs) > 1 else [y]

    def _join(self, y: torch.Tensor) -> torch.Tensor:
        """Sum the partial results of ranks that hold parts of the inputs, base and low-rank part at once."""
        return self.tp_group.all_reduce_(y) if self.shard_dim == "in" else y

    def _base(self, x: torch.Tensor) -> torch.Tensor:
        return self._prepacked(x) if self._prepacked is not None else nn.functional.linear(x, self.weight, self.bias)

    def _add_adapters(self, y: torch.Tensor, x: torch.Tensor, rows: Sequence[LoraRows]) -> torch.Tensor:
        if self.adapted:
            add_dual_lora(y, x, _segments(rows), lambda slot: (self._a[slot], self._b[slot]), self.scale)
        return y

    def learn(
        self, x: torch.Tensor, others: list[torch.Tensor], rows: Sequence[LoraRows]
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """The forward of rows that learn, x [count, in], behind rows of other kinds.

        Returns their output [count, out], that of the others [their rows, out], and what the backward needs beside x.
        """
        together = torch.cat([*others, x]) if others else x
        served = len(together) - len(x)
        if self._fused is not None:
            y, hidden = self._fused.forward(together, _segments(rows))
            self._join(y)
            return y[served:], y[:served], hidden[served:]
        y, low = self._base(together), None
        if self.adapted:
            self._add_adapters(y[:served], together[:served], rows[:-1])
            low = shadow_forward(y[served:], x, self.compute_a, self.compute_b, self.scale)
        self._join(y)
        return y[served:], y[:served], low

    def gradients(
        self, grad: torch.Tensor, x: torch.Tensor, hidden: torch.Tensor, down: bool
    ) -> tuple[torch.Tensor | None, torch.Tensor, torch.Tensor]:
        """Of x (None unless down), of shadow_a and of shadow_b, given that of y [count, out].

        Those of factors that peers hold as well are partial sums: see AdapterBank.join_gradient.
        """
        if self._fused is not None:
            grad_x, a, b = self._fused.backward(grad, x, hidden, down)
        else:
            grad_x = grad @ self.weight if down else None
            grad_x, a, b = shadow_backward(grad, grad_x, x, hidden, self.compute_a, self.compute_b, self.scale)
            a, b = a.float(), self.gather_b(b).float()
        return None if grad_x is None else self.join_down(grad_x), a, b

    def join_down(self, grad_x: torch.Tensor) -> torch.Tensor:
        """Sum what comes down from ranks that hold parts of the outputs."""
        return self.tp_group.all_reduce_(grad_x) if self.shard_dim == "out" else grad_x

    def gather_b(self, b: torch.Tensor) -> torch.Tensor:
        """The blocks of a merged B [out, k r] one below the other: [adapted rows, r]."""
        blocks = self._blocks(b)
        return blocks[0] if len(blocks) == 1 else torch.cat(blocks)


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
        return learnt, served

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[Any, ...]:
        dual: DualLinear = ctx.dual
        x, hidden = ctx.saved_tensors
        down = ctx.needs_input_grad[0]
        if hidden is None:
            grad_x = dual.join_down(gradients[0] @ dual.weight) if down else None
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


def _stack(linears: Sequence[nn.Linear]) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Weights (and biases) one below the other; the layers become views of them, so that nothing is held twice."""
    biases = [linear.bias for linear in linears]
    bias = None
    if any(b is not None for b in biases):
        filled = [
            linear.weight.new_zeros(linear.out_features) if linear.bias is None else linear.bias.data
            for linear in linears
        ]
        bias = torch.cat(filled)
    if len(linears) == 1:
        return linears[0].weight.data, bias
    weight = torch.cat([linear.weight.data for linear in linears])
    for linear, part in zip(linears, weight.split([linear.out_features for linear in linears]), strict=True):
        linear.weight.data = part
    return weight, bias
