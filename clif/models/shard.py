"""How the linear layers of a model are cut over the ranks of a replica: arithmetic and slices.

Layers that read the hidden state are cut by outputs: query, key and value by heads, gate and up by columns. Layers that
write to it are cut by inputs, and their partial results are summed: one all-reduce per attention and one per MLP.
Where there are fewer KV heads than ranks, several ranks hold the same one. The output head is cut by rows, not evenly.

Sources: Megatron-LM (Shoeybi et al. 2019).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    import torch
    from torch import nn

    from clif.distributed.collectives import TpGroup

ShardDim = Literal["out", "in"]
"""Which side of a weight [out, in] is cut."""


@dataclass(frozen=True)
class Shard:
    """[start, stop) of `total` outputs or inputs."""

    start: int
    stop: int
    total: int

    @property
    def size(self) -> int:
        return self.stop - self.start


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
        start = rank // self.holders(tp_size) * self.shard.size
        return ShardSpec(self.dim, Shard(start, start + self.shard.size, self.shard.total))

    def take(self, whole: torch.Tensor) -> torch.Tensor:
        """This part of a whole tensor, as a view."""
        return whole if self.shard is None else whole.narrow(self.dim, self.shard.start, self.shard.size)


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


def shard_of(whole: torch.Tensor, shard_dim: ShardDim, shard: Shard) -> torch.Tensor:
    """A view of a whole weight [out, in], or of a bias [out]."""
    return whole.narrow(0 if shard_dim == "out" else 1, shard.start, shard.size)


def shard_linear(linear: nn.Linear, shard_dim: ShardDim, shard: Shard, first: bool) -> None:
    """Leave a linear layer this rank's part of its weight only, if it was loaded whole.

    first: this rank adds the bias of summed outputs.
    """
    weight = linear.weight.data
    if weight.shape[0 if shard_dim == "out" else 1] != shard.size:
        # Copies, so that the whole is freed.
        linear.weight.data = shard_of(weight, shard_dim, shard).clone()
        linear.out_features, linear.in_features = linear.weight.shape
        if linear.bias is not None and shard_dim == "out":
            linear.bias.data = shard_of(linear.bias.data, shard_dim, shard).clone()
    if linear.bias is not None and shard_dim == "in" and not first:
        linear.bias.data.zero_()
