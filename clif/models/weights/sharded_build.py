"""A model built tensor by tensor, of which a rank gets its part only: the whole never exists in one process.

It is created without memory for its weights, which are then filled in one by one: of linear weights that peers share
this rank's shard, everything else whole.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import transformers
from accelerate import init_empty_weights

from clif.config import ConfigError
from clif.distributed.collectives import TpGroup
from clif.kernels.quantised import QuantisedMatrix
from clif.models.expert_spec import Experts
from clif.models.packed_linear import PackedLinear
from clif.models.shard import Shard, ShardDim, uneven_shard
from clif.models.spec import spec_of
from clif.models.stack import check_model

TensorShard = tuple[ShardDim, Shard] | None
"""This rank's part of a tensor; None: all of it."""
Source = Callable[[str, torch.Size, TensorShard], torch.Tensor]
"""(name, shape of the whole tensor, part wanted) -> that part."""
Kept = tuple[QuantisedMatrix, torch.Tensor | None]
"""A weight as whole numbers and scales, and the input that stands in each of its columns (None: as they lie)."""
KeptSource = Callable[[str, torch.Size, TensorShard], Kept | None]
"""(name, shape of the whole weight, part wanted) -> that part of a linear layer's weight; None: it is plain."""
HEAD = "lm_head"


def build(
    config: Any,
    source: Source,
    dtype: torch.dtype,
    device: torch.device,
    tp_group: TpGroup,
    packed: KeptSource | None = None,
) -> Any:
    """The model of a transformers configuration, with each weight from `source`. Buffers are computed, on the CPU.

    packed: asked first for the weights of linear layers, and where the head is tied for the embedding's: a PackedLinear
    then stands for the layer or the head. Raises ConfigError for a model that cannot be cut, LayoutError for one that
    the peers cannot share.
    """
    with init_empty_weights(include_buffers=False):
        # Its own attention is torch's fused one, except for makes that this does not compute.
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
    tied = getattr(config, "tie_word_embeddings", False)
    parts = dict(_parts(model, tied, tp_group)) if tp_group.size > 1 else {}
    for name, parameter in list(model.named_parameters()):
        if tied and name == f"{HEAD}.weight":
            continue
        if packed is not None and _put_packed(model, name, packed, parts.get(name), dtype, device):
            continue
        _put(model, name, source(name, parameter.shape, parts.get(name)).to(device=device, dtype=dtype))
    model.tie_weights()
    if tied and packed is not None:
        _untie(model, packed, dtype, device, tp_group)
    left = [name for name, parameter in model.named_parameters() if parameter.is_meta]
    if left:
        raise ConfigError(f"{type(model).__name__} ties {', '.join(left[:3])}, which is not supported: choose another")
    return model


def _parts(model: Any, tied: bool, tp_group: TpGroup) -> Iterator[tuple[str, tuple[ShardDim, Shard]]]:
    """Tensor name -> cut side and shard, for every linear weight (and cut bias) that the peers share."""
    spec = spec_of(model.config)
    check_model(model, spec)
    spec.check_divisible(tp_group.size)
    if not tied:
        rows = uneven_shard(spec.vocab_size, tp_group.rank, tp_group.size)
        yield from ((f"{spec.head}.{leaf}", ("out", rows)) for leaf in ("weight", "bias"))
    shards = spec.layer.shards(tp_group.rank, tp_group.size)
    for layer in range(len(model.model.layers)):
        for name, (shard_dim, shard) in shards.items():
            yield f"{spec.layers}.{layer}.{name}.weight", (shard_dim, shard)
            if shard_dim == "out":
                yield f"{spec.layers}.{layer}.{name}.bias", (shard_dim, shard)
        if isinstance(spec.layer.mlp, Experts):
            for name, part in spec.layer.mlp.shards(tp_group.rank, tp_group.size).items():
                yield f"{spec.layers}.{layer}.{name}", part


def _put_packed(
    model: Any, name: str, packed: KeptSource, part: TensorShard, dtype: torch.dtype, device: torch.device
) -> bool:
    """Let a PackedLinear stand for a linear layer whose weight is packed; returns whether it is."""
    parent, _, leaf = name.rpartition(".")
    module = model.get_submodule(parent)
    linear = leaf == "weight" and isinstance(module, torch.nn.Linear)
    found = packed(name, module.weight.shape, part) if linear else None
    if found is None:
        return False
    matrix, order = found
    order = None if order is None else order.to(device)
    model.set_submodule(parent, PackedLinear(matrix.to(device), module.bias, dtype, order))
    return True


def _untie(model: Any, packed: KeptSource, dtype: torch.dtype, device: torch.device, tp_group: TpGroup) -> None:
    """Give a tied head the embedding's packed weight, if it is packed; the embedding stays dense."""
    spec = spec_of(model.config)
    rows = uneven_shard(spec.vocab_size, tp_group.rank, tp_group.size)
    shape = torch.Size((spec.vocab_size, spec.hidden_size))
    found = packed(f"{spec.embedding}.weight", shape, ("out", rows) if tp_group.size > 1 else None)
    if found is not None:
        head = model.get_submodule(spec.head)
        model.set_submodule(spec.head, PackedLinear(found[0].to(device), head.bias, dtype))


def _put(model: Any, name: str, tensor: torch.Tensor) -> None:
    parent, _, leaf = name.rpartition(".")
    module = model.get_submodule(parent)
    setattr(module, leaf, torch.nn.Parameter(tensor, requires_grad=False))
    if leaf == "weight" and isinstance(module, torch.nn.Linear):
        module.out_features, module.in_features = tensor.shape
