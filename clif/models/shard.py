"""How the linear layers of a model are cut over the ranks of a replica: arithmetic and slices.

Layers that read the hidden state are cut by outputs: query, key and value by heads, gate and up by columns. Layers that
write to it are cut by inputs, and their partial results are summed: one all-reduce per attention and one per MLP.
Where there are fewer KV heads than ranks, several ranks hold the same one. The output head is cut by rows, not evenly.

Sources: Megatron-LM (Shoeybi et al. 2019).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from clif.distributed.layout import LayoutError

if TYPE_CHECKING:
    import torch
    from torch import nn

    from clif.distributed.collectives import TpGroup

ShardDim = Literal["out", "in"]
"""Which side of a weight [out, in] is cut."""


@dataclass(frozen=True)
class Shard:
    """[start, stop) of `total` outputs or inputs.

    more: further ranges, behind the first: of a weight with several kinds of outputs a rank holds some of each.
    """

    start: int
    stop: int
    total: int
    more: tuple[tuple[int, int], ...] = ()

    @property
    def ranges(self) -> tuple[tuple[int, int], ...]:
        """[start, stop) of each."""
        return ((self.start, self.stop), *self.more)

    @property
    def size(self) -> int:
        return sum(stop - start for start, stop in self.ranges)

    def take(self, whole: torch.Tensor, dim: int) -> torch.Tensor:
        """This part of a dimension of a whole tensor: a view where it is one range, otherwise a copy."""
        parts = [whole.narrow(dim, start, stop - start) for start, stop in self.ranges]
        if len(parts) == 1:
            return parts[0]
        sizes = list(whole.shape)
        sizes[dim] = self.size
        together = whole.new_empty(sizes)
        for to, part in zip(together.split([part.shape[dim] for part in parts], dim), parts, strict=True):
            to.copy_(part)
        return together

    def put(self, whole: torch.Tensor, dim: int, part: torch.Tensor) -> None:
        """Write what take() returns to a whole tensor."""
        parts = part.split([stop - start for start, stop in self.ranges], dim)
        for (start, stop), one in zip(self.ranges, parts, strict=True):
            whole.narrow(dim, start, stop - start).copy_(one)


@dataclass(frozen=True)
class ShardSpec:
    """Which part of a tensor this rank holds: `shard` of its dimension `dim`; without a shard all of it."""

    dim: int = 0
    shard: Shard | None = None

    def holders(self, tp_size: int) -> int:
        """How many of the tp_size ranks hold this part."""
        return tp_size if self.shard is None else tp_size * self.shard.size // self.shard.total

    def of_rank(self, rank: int, tp_size: int) -> ShardSpec:
        """The part that another rank holds."""
        if self.shard is None:
            return self
        shares, first = tp_size // self.holders(tp_size), rank // self.holders(tp_size)
        ranges, at = [], 0
        for start, stop in self.shard.ranges:
            size = stop - start
            ranges.append((at + first * size, at + (first + 1) * size))
            at += shares * size
        return ShardSpec(self.dim, Shard(*ranges[0], self.shard.total, tuple(ranges[1:])))

    def take(self, whole: torch.Tensor) -> torch.Tensor:
        """This part of a whole tensor: a view where it is one range, otherwise a copy."""
        return whole if self.shard is None else self.shard.take(whole, self.dim)

    def put(self, whole: torch.Tensor, part: torch.Tensor) -> None:
        """Write this part to a whole tensor."""
        if self.shard is None:
            whole.copy_(part)
        else:
            self.shard.put(whole, self.dim, part)


@dataclass(frozen=True)
class LinearShards:
    """This rank's parts of the modules of a merged linear layer, and the ranks that hold the others.

    shards: one for each module, all along the same dimension.
    """

    dim: ShardDim
    shards: tuple[Shard, ...]
    tp_group: TpGroup

    @property
    def inputs(self) -> Shard | None:
        """The part of the inputs that this rank reads; None: all of them."""
        return self.shards[0] if self.dim == "in" else None

    def of_factors(self, module: int) -> tuple[ShardSpec, ShardSpec]:
        """How A [r, in] and B [out, r] of a module lie in the whole ones: one of them is cut, the other is not."""
        if self.dim == "out":
            return ShardSpec(), ShardSpec(0, self.shards[module])
        return ShardSpec(1, self.shards[module]), ShardSpec()

    def sum_outputs(self, y: torch.Tensor) -> torch.Tensor:
        """Sum the partial results of ranks that hold parts of the inputs, in place: base and low-rank part at once."""
        return self.tp_group.all_reduce_(y) if self.dim == "in" else y

    def sum_inputs(self, grad_x: torch.Tensor) -> torch.Tensor:
        """Sum the gradient of the input over ranks that hold parts of the outputs, in place."""
        return self.tp_group.all_reduce_(grad_x) if self.dim == "out" else grad_x


def even_shard(total: int, rank: int, size: int) -> Shard:
    """An equal share; `total` is a multiple of `size`."""
    return Shard(total // size * rank, total // size * (rank + 1), total)


def uneven_shard(total: int, rank: int, size: int) -> Shard:
    """A share of rows that `size` need not divide: some have one more than others. Vocabularies are of any size."""
    return Shard(total * rank // size, total * (rank + 1) // size, total)


def unit_shard(units: int, unit: int, rank: int, size: int) -> Shard:
    """An equal share of units (heads, columns) of `unit` numbers each; where they are too few, the one to share.

    Of fewer KV heads than ranks, a rank holds the one that its query heads read, and others hold it as well.
    """
    if units >= size:
        return even_shard(units * unit, rank, size)
    first = rank * units // size
    return Shard(first * unit, (first + 1) * unit, units * unit)


def joined(shards: Sequence[Shard]) -> Shard:
    """The part of outputs of several kinds, one kind behind the other, given that of each.

    Raises LayoutError where several ranks hold the same unit of one kind, but not of another.
    """
    if any(shard.size * shards[0].total != shards[0].size * shard.total for shard in shards):
        raise LayoutError(
            "the ranks of a replica outnumber the key/value heads of this model, which has them in one weight with the "
            "query heads: lower layout.tp_size"
        )
    ranges, at = [], 0
    for shard in shards:
        ranges += [(at + start, at + stop) for start, stop in shard.ranges]
        at += shard.total
    return Shard(*ranges[0], at, tuple(ranges[1:]))


def shard_of(whole: torch.Tensor, shard_dim: ShardDim, shard: Shard) -> torch.Tensor:
    """This part of a whole weight [..., out, in], or of a bias [out]."""
    return shard.take(whole, axis_of(shard_dim, whole.dim()))


def axis_of(shard_dim: ShardDim, dims: int) -> int:
    """Which dimension of a weight [..., out, in], or of a bias [out], is cut."""
    return dims - 1 if shard_dim == "in" else max(0, dims - 2)


def shard_linear(linear: nn.Linear, shard_dim: ShardDim, shard: Shard, first: bool) -> None:
    """Leave a linear layer this rank's part of its weight only, if it was loaded whole; a packed one never is.

    first: this rank adds the bias of summed outputs.
    """
    if (linear.out_features if shard_dim == "out" else linear.in_features) != shard.size:
        # Copies, so that the whole is freed.
        linear.weight.data = shard_of(linear.weight.data, shard_dim, shard).clone()
        linear.out_features, linear.in_features = linear.weight.shape
        if linear.bias is not None and shard_dim == "out":
            linear.bias.data = shard_of(linear.bias.data, shard_dim, shard).clone()
    if linear.bias is not None and shard_dim == "in" and not first:
        linear.bias.data.zero_()
