"""Models with random weights, drawn tensor by tensor: one tensor does not depend on which others are drawn."""

from __future__ import annotations

import hashlib
from typing import Any

import torch

from clif.distributed.collectives import TpGroup
from clif.models.shard import shard_of
from clif.models.weights.sharded_build import TensorShard, build


def draw_model(config: Any, dtype: torch.dtype, device: torch.device, seed: int, tp_group: TpGroup) -> Any:
    """A model of a transformers configuration; with peers, this rank's part of the one that a single rank draws.

    Each tensor has a generator of its own. At most one tensor is whole at a time, beside the parts that are kept.
    Raises LayoutError for a model that the peers cannot share.
    """
    std: float = getattr(config, "initializer_range", 0.02)

    def source(name: str, shape: torch.Size, part: TensorShard) -> torch.Tensor:
        # On the model's device: billions of numbers take minutes on a CPU.
        whole = _draw(name, torch.empty(shape, dtype=dtype, device=device), std, seed)
        # A copy, so that the whole is freed.
        return whole if part is None else shard_of(whole, *part).clone()

    return build(config, source, dtype, device, tp_group)


def _draw(name: str, tensor: torch.Tensor, std: float, seed: int) -> torch.Tensor:
    """As transformers initialises: matrices normal, biases zero, norms one."""
    if name.endswith(".bias"):
        return tensor.zero_()
    if tensor.dim() == 1:
        return tensor.fill_(1.0)
    digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
    # The CPU's generator takes no more than 32 bits of a seed.
    rng = torch.Generator(tensor.device).manual_seed(int.from_bytes(digest[:4], "little"))
    return tensor.normal_(0.0, std, generator=rng)
