"""A causal language model as embedding, layers, norm and head, so that a forward can stop between any two."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import transformers

from clif.config import ConfigError
from clif.distributed.collectives import TpGroup
from clif.models.base_weight import Compiled, arena_for, packed, prepacked
from clif.models.causal import CausalSequences
from clif.models.causal_blocks import block_bytes
from clif.models.cpu_training import PackedSequences
from clif.models.dual_linear import DualLinear, LoraRows
from clif.models.expert_linears import FrozenLinear
from clif.models.experts import RoutedMlp
from clif.models.head import Head, LogitChanges
from clif.models.layer import AttentionPlan, DecoderLayer, SubBatch
from clif.models.layer_ops import LayerOps, Rope, TorchOps
from clif.models.layer_spec import UNTURNED, ModelSpec
from clif.models.spec import spec_of
from clif.models.varlen import SequenceSpans, Varlen, VarlenSequences


class CausalStack:
    """The parts of a Llama-style model. Batches are packed: hidden states are [rows, hidden size].

    num_heads, num_kv_heads: of this rank, which with peers holds a part of every linear layer and of the head; the
    embedding is whole on each. varlen: what attends in prompts and training rows; None: padded products. Raises
    ConfigError for another architecture, LayoutError for one that peers cannot share.
    """

    def __init__(
        self,
        model: transformers.PreTrainedModel,
        tp_group: TpGroup | None = None,
        ops: LayerOps | None = None,
        max_context: int | None = None,
    ) -> None:
        """ops: what the layers compute their parts with; torch's if none are given. max_context: positions that there
        are; None: any."""
        ops = ops or TorchOps()
        self.varlen: Varlen | None = None
        self.tp_group = tp_group = tp_group or TpGroup()
        spec = spec_of(model.config)
        self.spec = spec = spec if max_context is None else spec.within(max_context)
        inner = check_model(model, spec)
        self.model, self._inner = model, inner
        self.num_layers = len(inner.layers)
        spec.check_divisible(tp_group.size)
        self.num_heads = spec.layer.attention.heads // tp_group.size
        self.num_kv_heads = max(1, spec.layer.attention.kv_heads // tp_group.size)
        self.head_dim, self.vocab_size = spec.layer.attention.head_dim, spec.vocab_size
        self.decoder_layers = [
            DecoderLayer(m, f"{spec.layers}.{i}", i, spec.layer, tp_group, ops, kind, spec.ropes.index(kind.rope))
            for i, (m, kind) in enumerate(zip(inner.layers, spec.kinds, strict=True))
        ]
        self._norm = ops.norm(inner.norm)
        self._training = ops.training if inner.embed_tokens.weight.dtype == torch.bfloat16 else None
        for linear in self.linears:
            linear.training = self._training
        for experts in (linears for mlp in self.routed for linears in mlp.linears):
            experts.training = self._training
        like = inner.embed_tokens.weight
        rotary = _twice(inner.rotary_emb) if spec.layer.attention.angles == "once" else inner.rotary_emb
        self.angles = tuple(ops.angles(_rotary(rotary, rope), like) for rope in spec.ropes)
        head: Any = model.get_output_embeddings()
        changes = LogitChanges(spec.logits_scale, spec.logits_softcap)
        self.head = Head(head, self.vocab_size, head.weight is inner.embed_tokens.weight, tp_group, changes)
        self.head.training = self._training if changes.nothing else None

    @property
    def plain(self) -> bool:
        """Whether all layers compute plain attention, which most kernels are for."""
        return self.spec.plain

    @property
    def windows(self) -> tuple[int | None, ...]:
        """The windows of the layers, each once."""
        return tuple(dict.fromkeys(kind.window for kind in self.spec.kinds))

    @property
    def linears(self) -> list[DualLinear]:
        """The merged linear layers, in the order of the forward."""
        return [linear for layer in self.decoder_layers for linear in layer.linears]

    @property
    def routed(self) -> list[RoutedMlp]:
        """The MLPs with experts."""
        return [layer.mlp for layer in self.decoder_layers if isinstance(layer.mlp, RoutedMlp)]

    def masters(self, layer: int) -> list[torch.Tensor]:
        """The shadow's factors of a layer, which its backward adds gradients to."""
        loras = [linear.lora for linear in self.decoder_layers[layer].linears]
        return [master for lora in loras if lora is not None for master in (lora.shadow_a, lora.shadow_b)]

    @property
    def device(self) -> torch.device:
        weight: torch.Tensor = self._inner.embed_tokens.weight
        return weight.device

    def embed(self, ids: torch.Tensor) -> torch.Tensor:
        """ids: [rows] -> hidden states [rows, hidden size]."""
        embedded: torch.Tensor = self._inner.embed_tokens(ids)
        return embedded if self.spec.embedding_scale == 1.0 else embedded * self.spec.embedding_scale

    def sub_batch(self, rows: LoraRows, positions: torch.Tensor, plan: AttentionPlan) -> SubBatch:
        """Rows of one kind at positions [rows]."""
        return SubBatch(rows, self.ropes(positions), plan)

    def ropes(self, positions: torch.Tensor) -> tuple[Rope, ...]:
        """The rotary embeddings of rows at positions [rows], as the spec's `ropes` has them."""
        ropes = tuple(angles(positions) for angles in self.angles)
        turned, expected = ropes[0].cos.shape[-1], self.spec.layer.attention.rotary_dim
        if turned != expected:
            raise ConfigError(
                f"{type(self.model).__name__} turns {turned} of the {self.head_dim} numbers of a head instead of "
                f"{expected} (partial rotary embedding), which is not supported: choose another model"
            )
        return ropes

    def sequences(self, lengths: Sequence[int]) -> AttentionPlan:
        """The plan of packed rows that attend within their sequences. Does not wait for the device."""
        if self._training is not None:
            return PackedSequences(lengths, self._training)
        if self.varlen is None:
            return CausalSequences(lengths, self.device)
        return VarlenSequences(SequenceSpans.of(lengths, lengths, self.device), self.varlen)

    @property
    def keeps_squares(self) -> bool:
        """Whether the backward of attention keeps probabilities of each pair of tokens."""
        return self.varlen is None and self._training is None

    def attention_work(self, length: int) -> int:
        """Bytes that attention's backward works in, for one sequence of this length, beside rows of heads."""
        if self._training is not None:
            return self._training.causal_scratch(self.num_heads, self.num_kv_heads, self.head_dim, length)
        return block_bytes(self.num_heads, length) if self.device.type == "cpu" else 0

    def layers(
        self, start: int, stop: int, hidden: Sequence[torch.Tensor], sub_batches: Sequence[SubBatch]
    ) -> list[torch.Tensor]:
        """Decoder layers [start, stop) over hidden states [rows, hidden size] of each sub-batch."""
        added: Sequence[torch.Tensor | None] = [None] * len(hidden)
        for layer in self.decoder_layers[start:stop]:
            hidden, added = layer(hidden, added, sub_batches)
        return [h if x is None else h + x for h, x in zip(hidden, added, strict=True)]

    def norm(self, hidden: torch.Tensor) -> torch.Tensor:
        """The last norm, which comes before the head."""
        return self._norm(hidden)[1]

    def logits(self, normed: torch.Tensor) -> torch.Tensor:
        """Logits [rows, vocabulary] of chosen rows: the head is a tenth to a quarter of the linear work.

        With peers they are put together from the columns of each; self.head has what needs no whole rows.
        """
        return self.head.whole(self.head(normed))

    def group_experts(self) -> None:
        """Compute all experts of a layer as one product from now on, where torch takes their weights."""
        for mlp in self.routed:
            for linears in mlp.linears:
                linears.grouped = linears.can_group

    def prepack(self) -> None:
        """Lay all weights out for the machine's matrix kernels where that pays."""
        for part in self.weighed():
            part.base = prepacked(part.base)

    def weighed(self) -> list[DualLinear | FrozenLinear | Head]:
        """What multiplies with a frozen weight, in the order in which a step reads them."""
        found: list[DualLinear | FrozenLinear | Head] = []
        for layer in self.decoder_layers:
            found += layer.linears
            if isinstance(layer.mlp, RoutedMlp):
                found += [one for linears in layer.mlp.linears for one in linears.each]
        return [*found, self.head]

    def pack(self) -> None:
        """Lay all bfloat16 weights out for the C++ kernels, and the adapters' slots, which no longer move then."""
        arena = arena_for(part.base for part in self.weighed())
        for part in self.weighed():
            part.base = packed(part.base, arena)
        for linear in self.linears:
            if linear.lora is not None and isinstance(linear.base, Compiled):
                linear.lora.pack()


def _rotary(module: Any, rope: str | None) -> Any:
    """One rotary embedding of a model, (like, positions [1, rows]) -> cos and sin [1, rows, numbers]."""
    if rope == UNTURNED:
        return partial(_unturned, module)
    return module if rope is None else partial(module, layer_type=rope)


def _unturned(module: Any, like: torch.Tensor, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Angles of zero."""
    cos, sin = module(like, positions)
    return torch.ones_like(cos), torch.zeros_like(sin)


def _twice(module: Any) -> Any:
    """The same with each angle for both numbers that it turns."""
    return lambda *where, **kind: tuple(torch.cat((t, t), -1) for t in module(*where, **kind))


def check_model(model: transformers.PreTrainedModel, spec: ModelSpec) -> Any:
    """The part of a model that has embedding, layers and norm. Raises ConfigError for another architecture."""
    inner: Any = getattr(model, "model", None)
    name, parts = type(model).__name__, (spec.embedding, spec.layers, spec.norm, spec.rotary)
    missing = [leaf for leaf in (part.rpartition(".")[2] for part in parts) if not hasattr(inner, leaf)]
    if missing:
        raise ConfigError(f"{name} is not a Llama-style model ({', '.join(missing)} not found): choose another")
    known = tuple(f"{part}." for part in (*parts, spec.head))
    more = [n for n, _ in model.named_parameters() if not n.startswith(known)]
    if more:
        raise ConfigError(f"{name} has more than a Llama-style model ({', '.join(more[:3])}): choose another")
    return inner
