"""One decoder layer over a batch of several kinds of rows, built from transformers' own modules.

Norms, activation and weights are those of the loaded model. Here, layers that read the same input are one product, a
product sees all rows at once, and each kind of rows brings its own attention.

Sources: rotary embeddings (Su et al. 2021); grouped-query attention (Ainslie et al. 2023); batching rows of all kinds
in the linear layers and attending separately is Orca's selective batching (Yu et al. 2022).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from clif.config import ConfigError
from clif.distributed.collectives import TpGroup
from clif.models.dual_linear import DualLinear, LoraRows
from clif.models.layer_ops import CacheRows, HeadLayout, LayerOps, Rope
from clif.models.mlp import GatedMlp
from clif.models.shard import LinearShards, shard_linear
from clif.models.spec import Experts, LayerSpec, LinearGroup


class AttentionPlan(Protocol):
    """How rows of one kind attend to each other and to the cache."""

    def cache_rows(self, layer: int) -> CacheRows | None:
        """Where a layer is to write the keys and values of these rows before they attend; None: nowhere."""
        ...

    def attend(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float
    ) -> torch.Tensor:
        """query [rows, heads, head_dim], key and value [rows, kv_heads, head_dim] -> [rows, heads * head_dim].

        Query and key are rotated, and what belongs to the cache is there.
        """
        ...


@dataclass(frozen=True)
class SubBatch:
    """Rows of one kind in a batch: their adapters, positions and attention."""

    rows: LoraRows
    rope: Rope
    plan: AttentionPlan


class DecoderLayer:
    """Layer `index` of a model; `module` is transformers' decoder layer, `name` its name in the model.

    Raises ConfigError for a layer of another architecture than the spec's.
    """

    def __init__(self, module: Any, name: str, index: int, spec: LayerSpec, tp_group: TpGroup, ops: LayerOps) -> None:
        """With peers, the module is left no more than this rank's parts of its linear layers."""
        check_layer(module, spec)
        groups = {group.name: _merged(module, name, group, tp_group) for group in spec.linears}
        self.linears: tuple[DualLinear, ...] = tuple(groups.values())
        self.index, head_dim = index, spec.attention.head_dim
        self.qkv, self.out = groups["qkv"], groups["out"]
        self.mlp = GatedMlp(groups["gate_up"], groups["down"], ops.gate(_part_of(module, spec.mlp.activation)))
        self.norm, self.mlp_norm = (ops.norm(_part_of(module, norm)) for norm in spec.norms)
        q_norm, k_norm = (_part_of(module, norm) for norm in spec.attention.norms)
        heads, kv_heads, _ = (
            size // head_dim for size in spec.linear("qkv").local_outputs(tp_group.rank, tp_group.size)
        )
        norms = None if q_norm is None or k_norm is None else (q_norm, k_norm)
        self.rotary = ops.rotary(HeadLayout(heads, kv_heads, head_dim, norms))
        self.scale: float = getattr(_part_of(module, spec.attention.module), "scaling", head_dim**-0.5)

    def __call__(
        self,
        hidden: Sequence[torch.Tensor],
        added: Sequence[torch.Tensor | None],
        sub_batches: Sequence[SubBatch],
    ) -> tuple[Sequence[torch.Tensor], Sequence[torch.Tensor]]:
        """hidden + added -> the same for the next layer, whose norm does the sum.

        hidden, added: [rows, hidden size] for each sub-batch; one that learns comes last. None: nothing is added.
        """
        rows = [sub_batch.rows for sub_batch in sub_batches]
        hidden, qkv = self.project(hidden, added, rows)
        attended = [self.attend(x, sub_batch) for x, sub_batch in zip(qkv, sub_batches, strict=True)]
        return self.finish(hidden, attended, rows)

    def project(
        self, hidden: Sequence[torch.Tensor], added: Sequence[torch.Tensor | None], rows: Sequence[LoraRows]
    ) -> tuple[Sequence[torch.Tensor], Sequence[torch.Tensor]]:
        """What comes before attention, row by row: hidden + added, and the merged projection of that."""
        hidden, normed = zip(*[self.norm(h, x) for h, x in zip(hidden, added, strict=True)], strict=True)
        return hidden, self.qkv(normed, rows)

    def finish(
        self, hidden: Sequence[torch.Tensor], attended: Sequence[torch.Tensor], rows: Sequence[LoraRows]
    ) -> tuple[Sequence[torch.Tensor], Sequence[torch.Tensor]]:
        """What comes behind attention, row by row: what the layer returns."""
        attended = self.out(attended, rows)
        hidden, normed = zip(*[self.mlp_norm(h, x) for h, x in zip(hidden, attended, strict=True)], strict=True)
        return hidden, self.mlp(normed, rows)

    def attend(self, qkv: torch.Tensor, sub_batch: SubBatch) -> torch.Tensor:
        """The merged projection [rows, outputs] -> what the plan makes of its heads [rows, heads * head_dim]."""
        plan = sub_batch.plan
        query, key, value = self.rotary(qkv, sub_batch.rope, plan.cache_rows(self.index))
        return plan.attend(self.index, query, key, value, self.scale)


def check_layer(module: Any, spec: LayerSpec) -> None:
    """Raises ConfigError for a decoder layer of another architecture: parts are missing, or there are more."""
    name, missing = type(module).__name__, [part for part in spec.needed if _part_of(module, part) is None]
    if missing:
        raise ConfigError(f"{name} is not a Llama-style layer ({', '.join(missing)} not found): choose another model")
    known = tuple(f"{part}." for part in spec.known)
    more = [n for n, _ in module.named_parameters() if not n.startswith(known)]
    if more:
        raise ConfigError(f"{name} has more than a Llama-style layer ({', '.join(more[:3])}): choose another model")
    if isinstance(spec.mlp, Experts):
        raise ConfigError(f"{name} is not a Llama-style layer (it has experts): choose another model")


def _part_of(module: Any, path: str) -> Any:
    """What lies at a dotted path within a module; None where there is nothing."""
    for leaf in path.split("."):
        module = getattr(module, leaf, None)
    return module


def _merged(module: Any, name: str, group: LinearGroup, tp_group: TpGroup) -> DualLinear:
    shards = group.shards(tp_group.rank, tp_group.size)
    linears = [_part_of(module, one.name) for one in group.modules]
    for linear, shard in zip(linears, shards, strict=True):
        shard_linear(linear, group.shard_dim, shard, first=tp_group.rank == 0)
    return DualLinear(
        [f"{name}.{one.name}" for one in group.modules], linears, LinearShards(group.shard_dim, shards, tp_group)
    )
