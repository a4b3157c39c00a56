"""Norms of query and key over the whole projection, of which each rank of a replica holds some heads.

Sources: OLMo 2 (OLMo Team 2024); RMSNorm (Zhang and Sennrich 2019).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from clif.distributed.collectives import TpGroup
from clif.errors import ConfigError
from clif.models.layer_ops import as_rms_norm
from clif.models.layer_spec import Features


@dataclass(frozen=True, eq=False)
class ProjectionNorm:
    """RMSNorm of rows [rows, local] that are parts of rows of `total` numbers. Collective over the peers.

    weight [local]: of this rank's part. holders: ranks that hold the same part.
    """

    weight: torch.Tensor
    eps: float
    total: int
    holders: int
    tp_group: TpGroup

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        normed: torch.Tensor = _Normed.apply(x, self)
        return normed

    def mean(self, x: torch.Tensor) -> torch.Tensor:
        """Mean over the whole rows [rows, 1] of float32 parts [rows, local]."""
        return self.tp_group.all_reduce_(x.sum(-1, keepdim=True).div_(self.total * self.holders))


class _Normed(torch.autograd.Function):
    """In float32, as the model's own norm; a backward sums what all ranks know of a row, as the forward does."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, norm: ProjectionNorm) -> torch.Tensor:
        wide = x.float()
        rate = torch.rsqrt(norm.mean(wide.square()) + norm.eps)
        ctx.norm = norm
        ctx.save_for_backward(x, rate)
        return (norm.weight.float() * (wide * rate)).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[Any, ...]:
        x, rate = ctx.saved_tensors
        norm: ProjectionNorm = ctx.norm
        unit, grad = x.float() * rate, gradients[0].float() * norm.weight.float()
        return ((grad - unit * norm.mean(grad * unit)) * rate).to(x.dtype), None


@dataclass(frozen=True, eq=False)
class ProjectionNorms:
    """The merged projection [rows, query | key | value] with query and key normalised."""

    query: ProjectionNorm
    key: ProjectionNorm

    def __call__(self, qkv: torch.Tensor) -> torch.Tensor:
        sizes = len(self.query.weight), len(self.key.weight)
        query, key, value = qkv.split([*sizes, qkv.shape[1] - sum(sizes)], 1)
        return torch.cat((self.query(query), self.key(key), value), 1)


def projection_norms(modules: tuple[Any, Any], parts: tuple[Features, Features], tp_group: TpGroup) -> ProjectionNorms:
    """modules: transformers' norms of query and key, whole on each rank; parts: what they normalise.

    Raises ConfigError for norms that are no plain RMSNorm.
    """
    query, key = (_norm(module, part, tp_group) for module, part in zip(modules, parts, strict=True))
    return ProjectionNorms(query, key)


def _norm(module: Any, part: Features, tp_group: TpGroup) -> ProjectionNorm:
    plain = as_rms_norm(module)
    if plain is None or len(plain[0]) != part.size:
        raise ConfigError(f"{type(module).__name__} is not a norm of whole projections: choose another model")
    shard = part.shard(tp_group.rank, tp_group.size)
    holders = tp_group.size * shard.size // shard.total
    return ProjectionNorm(plain[0][shard.start : shard.stop], plain[1], part.size, holders, tp_group)
