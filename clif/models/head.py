"""The output head. Each rank of a replica computes its own columns of the logits.

Sources: vocabulary-parallel output of Megatron-LM (Shoeybi et al. 2019).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from clif.distributed.collectives import TpGroup
from clif.kernels.cpu.training import TrainingKernels
from clif.models.base_backward import base_backward
from clif.models.base_weight import BaseWeight, Dense, merged
from clif.models.packed_linear import PackedLinear
from clif.models.scores import cap_, cap_gradient_
from clif.models.shard import shard_linear, uneven_shard
from clif.types import NO_TOKEN


@dataclass(frozen=True)
class LogitChanges:
    """What becomes of the head's products: they are multiplied by scale and then, with a softcap, capped."""

    scale: float = 1.0
    softcap: float | None = None

    @property
    def nothing(self) -> bool:
        return self.scale == 1.0 and self.softcap is None

    def __call__(self, products: torch.Tensor) -> torch.Tensor:
        scaled = products if self.scale == 1.0 else products * self.scale
        return scaled if self.softcap is None else cap_(scaled, self.softcap)

    def backward(self, grad: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        """The gradient of the products, from that of the logits that they became."""
        if self.softcap is not None:
            grad = cap_gradient_(grad, logits, self.softcap)
        return grad if self.scale == 1.0 else grad * self.scale


class Head:
    """This rank's rows [shard] of the head [vocabulary, hidden size]; all of them with one rank.

    training: what computes losses and their gradient, in bfloat16 on a CPU; None: torch.

    Each rank reads and multiplies its share only; the communication that this costs is small beside it. A greedy token
    costs one collective, which the ranks would need anyway to agree on it.

    The embedding is whole on every rank: looking up rows costs nothing, and a cut one would cost an all-reduce per
    forward. A head that is tied to the embedding is therefore a view of it.
    """

    def __init__(
        self,
        module: nn.Linear,
        vocab_size: int,
        tied: bool,
        tp_group: TpGroup,
        changes: LogitChanges | None = None,
    ) -> None:
        """tied: the weight is the embedding's. Otherwise the module keeps this rank's rows only. changes: of the
        products, none by default."""
        self.changes = changes or LogitChanges()
        self.tp_group, self.shard = tp_group, uneven_shard(vocab_size, tp_group.rank, tp_group.size)
        if not tied:
            shard_linear(module, "out", self.shard, first=True)
        self.training: TrainingKernels | None = None
        if isinstance(module, PackedLinear):
            self.base: BaseWeight = merged([module])
            return
        rows = slice(self.shard.start, self.shard.stop) if tied else slice(None)
        bias = None if module.bias is None else module.bias.data[rows]
        self.base = Dense(module.weight.data[rows], bias)

    def __call__(self, normed: torch.Tensor) -> torch.Tensor:
        """normed [rows, hidden size] -> this rank's columns of the logits [rows, shard]."""
        return self.changes(self.base.forward(normed))

    def backward(self, grad: torch.Tensor, logits: torch.Tensor | None = None) -> torch.Tensor:
        """Gradient of this rank's logits [rows, shard], in place -> what it adds to that of `normed` [rows, hidden
        size]. logits [rows, shard]: what the gradient is of; needed where the head's products are changed."""
        if not self.changes.nothing:
            assert logits is not None
            grad = self.changes.backward(grad, logits)
        return base_backward(self.base, grad, self.training)

    def whole(self, logits: torch.Tensor) -> torch.Tensor:
        """Logits [rows, vocabulary], equal bits on all peers, from the columns of each. Collective."""
        return self.tp_group.all_gather_columns(logits, self.shard.start, self.shard.total)

    def best(self, logits: torch.Tensor) -> torch.Tensor:
        """Tokens [rows] with the largest logit, equal on all peers, from the columns of each. Collective.

        Ties go to the first, as argmax over whole rows decides. NO_TOKEN where the largest is not finite.
        """
        if not len(logits):
            return logits.new_zeros(0, dtype=torch.int64)
        largest, index = top(logits)
        if self.tp_group.size == 1:
            return or_none(largest, index)
        # float64 holds any index exactly: one collective for both.
        pair = torch.stack((largest.double(), (index + self.shard.start).double()), 1)
        pairs = self.tp_group.all_gather_columns(pair, 2 * self.tp_group.rank, 2 * self.tp_group.size).unflatten(
            1, (-1, 2)
        )
        # Ranks are in the order of their columns: the first of equal ranks has the first column.
        largest, rank = top(pairs[..., 0])
        return or_none(largest, pairs[..., 1].gather(1, rank[:, None])[:, 0].long())


def top(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The largest number of each row, or NaN if there is one, and its first index."""
    # In float32: exact, and several times as fast as the argmax of bfloat16 on a CPU.
    rows = rows if rows.dtype is torch.float64 else rows.float()
    index = rows.argmax(-1)
    return rows.gather(1, index[:, None])[:, 0], index


def or_none(largest: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Tokens [rows], NO_TOKEN where the largest logit is not finite."""
    return tokens.masked_fill(~largest.isfinite(), NO_TOKEN)
