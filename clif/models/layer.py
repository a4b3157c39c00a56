"""One decoder layer over a batch of several kinds of rows, built from transformers' own modules.

Norms, activation and weights are those of the loaded model. Here, layers that read the same input are one product, a
product sees all rows at once, and each kind of rows brings its own attention.

Sources: rotary embeddings (Su et al. 2021); grouped-query attention (Ainslie et al. 2023); batching rows of all kinds
in the linear layers and attending separately is Orca's selective batching (Yu et al. 2022).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch

from clif.config import ConfigError
from clif.distributed.collectives import TpGroup
from clif.models.dual_linear import DualLinear, LoraRows
from clif.models.expert_spec import Experts
from clif.models.experts import routed_mlp
from clif.models.layer_ops import CacheRows, HeadLayout, LayerOps, Norm, Rope, Unnormed
from clif.models.layer_spec import Features, LayerKind, LayerSpec, LinearGroup
from clif.models.mlp import GatedMlp
from clif.models.qk_norm import ProjectionNorms, projection_norms
from clif.models.scores import Scores
from clif.models.shard import LinearShards, shard_linear


class AttentionPlan(Protocol):
    """How rows of one kind attend to each other and to the cache."""

    def cache_rows(self, layer: int) -> CacheRows | None:
        """Where a layer is to write the keys and values of these rows before they attend; None: nowhere."""
        ...

    def attend(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scores: Scores
    ) -> torch.Tensor:
        """query [rows, heads, head_dim], key and value [rows, kv_heads, head_dim] -> [rows, heads * head_dim].

        Query and key are rotated, and what belongs to the cache is there. What cannot compute such scores raises
        ValueError.
        """
        ...


@dataclass(frozen=True)
class SubBatch:
    """Rows of one kind in a batch: their adapters, positions and attention.

    ropes: each of the model's rotary embeddings at their positions, as ModelSpec.ropes has them.
    """

    rows: LoraRows
    ropes: Sequence[Rope]
    plan: AttentionPlan


class DecoderLayer:
    """Layer `index` of a model; `module` is transformers' decoder layer, `name` its name in the model.

    Raises ConfigError for a layer of another architecture than the spec's.
    """

    def __init__(
        self,
        module: Any,
        name: str,
        index: int,
        spec: LayerSpec,
        tp_group: TpGroup,
        ops: LayerOps,
        kind: LayerKind | None = None,
        rope: int = 0,
    ) -> None:
        """kind: what it has of its own. rope: which of a sub-batch's rotary embeddings is the layer's.

        With peers, the module is left no more than this rank's parts of its linear layers.
        """
        check_layer(module, spec)
        groups = {group.name: _merged(module, name, group, tp_group) for group in spec.linears}
        self.linears: tuple[DualLinear, ...] = tuple(groups.values())
        self.index, head_dim = index, spec.attention.head_dim
        self.qkv, self.out = groups["qkv"], groups["out"]
        part = partial(_part_of, module)
        self.mlp = (
            routed_mlp(spec.mlp, part, ops.gate, tp_group)
            if isinstance(spec.mlp, Experts)
            else GatedMlp(groups["gate_up"], groups["down"], ops.gate(part(spec.mlp.activation)))
        )
        self.norm, self.mlp_norm = (
            Unnormed() if norm is None else ops.norm(_part_of(module, norm)) for norm in spec.norms
        )
        self.post_norm, self.post_mlp_norm = (
            None if norm is None else ops.norm(_part_of(module, norm)) for norm in spec.post_norms
        )
        self.residual_scale, self.rope = spec.residual_scale, rope
        q_norm, k_norm = (_part_of(module, norm) for norm in spec.attention.norms)
        heads, kv_heads, _ = (
            size // head_dim for size in spec.linear("qkv").local_outputs(tp_group.rank, tp_group.size)
        )
        norms = None if q_norm is None or k_norm is None else (q_norm, k_norm)
        self.projection_norms: ProjectionNorms | None = None
        if norms is not None and spec.attention.norms_over == "projection":
            query, key, *_ = spec.linear("qkv").outputs
            self.projection_norms, norms = projection_norms(norms, (query, key), tp_group), None
        self.rotary = ops.rotary(HeadLayout(heads, kv_heads, head_dim, norms, spec.attention.rotary_dim))
        scale: float = getattr(_part_of(module, spec.attention.module), "scaling", head_dim**-0.5)
        sinks = None if spec.attention.sinks is None else part(spec.attention.sinks).data
        if sinks is not None:
            sinks = Features(spec.attention.heads).shard(tp_group.rank, tp_group.size).take(sinks, 0)
        self.scores = Scores(scale, None if kind is None else kind.window, spec.attention.softcap, sinks)

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
        attended = self._added(self.out(attended, rows), self.post_norm)
        hidden, normed = zip(*[self.mlp_norm(h, x) for h, x in zip(hidden, attended, strict=True)], strict=True)
        return hidden, self._added(self.mlp(normed, rows), self.post_mlp_norm)

    def _added(self, outputs: Sequence[torch.Tensor], norm: Norm | None) -> Sequence[torch.Tensor]:
        """What attention or the MLP gives, as it is added to the hidden state."""
        if norm is not None:
            outputs = [norm(x)[1] for x in outputs]
        return outputs if self.residual_scale == 1.0 else [x * self.residual_scale for x in outputs]

    def attend(self, qkv: torch.Tensor, sub_batch: SubBatch) -> torch.Tensor:
        """The merged projection [rows, outputs] -> what the plan makes of its heads [rows, heads * head_dim]."""
        plan = sub_batch.plan
        if self.projection_norms is not None:
            qkv = self.projection_norms(qkv)
        query, key, value = self.rotary(qkv, sub_batch.ropes[self.rope], plan.cache_rows(self.index))
        return plan.attend(self.index, query, key, value, self.scores)


def check_layer(module: Any, spec: LayerSpec) -> None:
    """Raises ConfigError for a decoder layer of another architecture: parts are missing, or there are more."""
    name, missing = type(module).__name__, [part for part in spec.needed if _part_of(module, part) is None]
    if missing:
        raise ConfigError(f"{name} is not a Llama-style layer ({', '.join(missing)} not found): choose another model")
    known = tuple(f"{part}." for part in spec.known)
    more = [n for n, _ in module.named_parameters() if not f"{n}.".startswith(known)]
    if more:
        raise ConfigError(f"{name} has more than a Llama-style layer ({', '.join(more[:3])}): choose another model")


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
