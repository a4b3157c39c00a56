"""A causal language model taken apart into embedding, layers, norm and head, so that a forward can stop in between."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import transformers

from clif.config import ConfigError
from clif.distributed.collectives import TpGroup
from clif.distributed.layout import check_divisible
from clif.models.dual_linear import DualLinear, LoraRows
from clif.models.head import Head
from clif.models.layer import AttentionPlan, DecoderLayer, Rope, SubBatch
from clif.models.shard import layer_shards

PARTS = ("embed_tokens", "layers", "norm", "rotary_emb")


class CausalStack:
    """The parts of a Llama-style model. Batches are packed: hidden states are [rows, hidden size].

    num_heads, num_kv_heads: of this rank, which with peers holds a part of every linear layer and of the head; the
    embedding is whole on each. Raises ConfigError for a model of another make, LayoutError for one that peers cannot
    share.
    """

    def __init__(self, model: transformers.PreTrainedModel, tp_group: TpGroup | None = None) -> None:
        self.tp_group = tp_group = tp_group or TpGroup()
        inner = check_model(model)
        self.model, self._inner = model, inner
        config = model.config
        self.num_layers = len(inner.layers)
        check_divisible(config.num_attention_heads, config.num_key_value_heads, config.intermediate_size, tp_group.size)
        self.num_heads: int = config.num_attention_heads // tp_group.size
        self.num_kv_heads: int = max(1, config.num_key_value_heads // tp_group.size)
        self.head_dim: int = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        self.vocab_size: int = config.vocab_size
        shards = layer_shards(config, tp_group.rank, tp_group.size)
        self._layers = [
            DecoderLayer(m, f"model.layers.{i}", i, self.head_dim, shards, tp_group) for i, m in enumerate(inner.layers)
        ]
        head: Any = model.get_output_embeddings()
        self.head = Head(head, self.vocab_size, head.weight is inner.embed_tokens.weight, tp_group)

    @property
    def linears(self) -> list[DualLinear]:
        """The merged linear layers, in the order of the forward."""
        return [linear for layer in self._layers for linear in layer.linears]

    def embed(self, ids: torch.Tensor) -> torch.Tensor:
        """ids: [rows] -> hidden states [rows, hidden size]."""
        return self._inner.embed_tokens(ids)

    def sub_batch(self, rows: LoraRows, positions: torch.Tensor, plan: AttentionPlan) -> SubBatch:
        """Rows of one kind at positions [rows]."""
        like = self._inner.embed_tokens.weight
        cos, sin = (t[0].unsqueeze(1) for t in self._inner.rotary_emb(like, positions.unsqueeze(0)))
        if cos.shape[-1] != self.head_dim:
            raise ConfigError(
                f"{type(self.model).__name__} turns {cos.shape[-1]} of the {self.head_dim} numbers of a head "
                "(partial rotary embedding), which is not supported: choose another model"
            )
        half = self.head_dim // 2
        return SubBatch(rows, Rope(cos, torch.cat((-sin[..., :half], sin[..., half:]), -1)), plan)

    def layers(
        self, start: int, stop: int, hidden: Sequence[torch.Tensor], sub_batches: Sequence[SubBatch]
    ) -> list[torch.Tensor]:
        """Decoder layers [start, stop) over hidden states [rows, hidden size] of each part."""
        hidden = list(hidden)
        for layer in self._layers[start:stop]:
            hidden = layer(hidden, sub_batches)
        return hidden

    def norm(self, hidden: torch.Tensor) -> torch.Tensor:
        """The last norm, which comes before the head."""
        return self._inner.norm(hidden)

    def logits(self, normed: torch.Tensor) -> torch.Tensor:
        """Logits [rows, vocabulary] of chosen rows: the head is a tenth to a quarter of the linear work.

        With peers they are put together from the columns of each; self.head has what needs no whole rows.
        """
        return self.head.whole(self.head(normed))

    def prepack(self) -> None:
        """Lay all weights out for the machine's matrix kernels where that pays."""
        self.head.prepack()
        for linear in self.linears:
            linear.prepack()


def check_model(model: transformers.PreTrainedModel) -> Any:
    """The part of a model that has embedding, layers and norm. Raises ConfigError for a model of another make."""
    inner: Any = getattr(model, "model", None)
    name = type(model).__name__
    missing = [part for part in PARTS if not hasattr(inner, part)]
    if missing:
        raise ConfigError(f"{name} is not a Llama-style model ({', '.join(missing)} not found): choose another")
    known = tuple(f"model.{part}." for part in PARTS)
    more = [n for n, _ in model.named_parameters() if not n.startswith((*known, "lm_head."))]
    if more:
        raise ConfigError(f"{name} has more than a Llama-style model ({', '.join(more[:3])}): choose another")
    return inner
