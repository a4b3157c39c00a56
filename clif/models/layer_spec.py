"""What a model is made of: the sizes and parts of its layers, as data. Free of torch.

clif/models/spec.py derives it from a Hugging Face config.

Sources: Llama (Touvron et al. 2023) for the layer; grouped-query attention (Ainslie et al. 2023) for fewer key/value
heads than query heads; rotary embeddings (Su et al. 2021); Gemma 2 (Gemma Team 2024) for soft caps, norms behind
attention and MLP, and windows in some layers; sliding windows (Beltagy et al. 2020).
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace
from typing import Literal

from clif.distributed.layout import check_divisible
from clif.models.expert_spec import Experts, Pieces
from clif.models.shard import Shard, ShardDim, joined, unit_shard

Shape = tuple[int, ...]
UNTURNED = "unturned"
"""The rotary embedding of layers without one."""


@dataclass(frozen=True)
class Features:
    """Numbers of a row: `units` of `unit` each. A unit is never cut: it is a head of attention, or a single column."""

    units: int
    unit: int = 1

    @property
    def size(self) -> int:
        return self.units * self.unit

    def shard(self, rank: int, size: int) -> Shard:
        """The part of a rank among `size` of them. Several hold the same unit where there are fewer units."""
        return unit_shard(self.units, self.unit, rank, size)


@dataclass(frozen=True)
class LinearModule:
    """A linear layer as weight files have it, which is also what an adapter belongs to.

    name: within the decoder layer. outputs: what its rows are, in order: of one kind, or query, key and value where a
    family keeps them in one weight.
    """

    name: str
    outputs: tuple[Features, ...]

    @property
    def size(self) -> int:
        return sum(features.size for features in self.outputs)


@dataclass(frozen=True)
class LinearGroup:
    """Linear layers that read the same input, computed as one product.

    reads: which input. shard_dim: which side tensor parallelism cuts: the outputs (rows of the weight), or the inputs.
    """

    name: str
    modules: tuple[LinearModule, ...]
    inputs: Features
    shard_dim: ShardDim
    reads: Literal["hidden", "attended", "gated"]

    @property
    def outputs(self) -> tuple[Features, ...]:
        """What the product is split into, whatever modules it is made of."""
        return tuple(features for module in self.modules for features in module.outputs)

    def local_outputs(self, rank: int, size: int) -> list[int]:
        """Sizes of these on a rank among `size` of them."""
        if self.shard_dim == "in":
            return [features.size for features in self.outputs]
        return [features.shard(rank, size).size for features in self.outputs]

    def shards(self, rank: int, size: int) -> tuple[Shard, ...]:
        """The part of each module that a rank among `size` of them holds: some of each kind of its outputs.

        Raises LayoutError where fewer heads than ranks lie in one weight with other outputs.
        """
        if self.shard_dim == "in":
            return (self.inputs.shard(rank, size),) * len(self.modules)
        if size == 1:
            return tuple(Shard(0, module.size, module.size) for module in self.modules)
        return tuple(joined([features.shard(rank, size) for features in module.outputs]) for module in self.modules)


@dataclass(frozen=True)
class AttentionSpec:
    """module: within the decoder layer; its `scaling`, if it has one, is that of the scores.

    norms: of query and key, used where a layer has them; they are over each head, or over all heads of the projection
    at once. rope: kind of rotary embedding. rotary_dim: numbers at the front of each head that it turns. softcap:
    scores s become softcap * tanh(s / softcap); None: they stay. sinks: of the scores of each head; None: there are
    none. angles: how often the rotary embedding's module gives each of them.
    """

    module: str
    heads: int
    kv_heads: int
    head_dim: int
    norms: tuple[str, str]
    rope: str
    rotary_dim: int
    norms_over: Literal["head", "projection"] = "head"
    softcap: float | None = None
    sinks: str | None = None
    angles: Literal["once", "twice"] = "twice"


@dataclass(frozen=True)
class DenseMlp:
    """A gated MLP. inner: its columns; activation: the module that computes the gate."""

    inner: int
    activation: str


@dataclass(frozen=True)
class LayerSpec:
    """A decoder layer.

    norms: before attention and before the MLP, which read the hidden state as it is where there is none. post_norms: of
    what attention and the MLP give, before it is added to the hidden state. residual_scale: what that is multiplied by.
    """

    linears: tuple[LinearGroup, ...]
    attention: AttentionSpec
    mlp: DenseMlp | Experts
    norms: tuple[str | None, str | None]
    post_norms: tuple[str | None, str | None] = (None, None)
    residual_scale: float = 1.0

    @property
    def module_names(self) -> tuple[str, ...]:
        """Of the linear layers, within the layer."""
        return tuple(module.name for group in self.linears for module in group.modules)

    def linear(self, name: str) -> LinearGroup:
        """The group of this name."""
        return next(group for group in self.linears if group.name == name)

    def shards(self, rank: int, size: int) -> dict[str, tuple[ShardDim, Shard]]:
        """Cut side and part of each linear layer, by its name within the layer, on a rank among `size` of them."""
        return {
            module.name: (group.shard_dim, shard)
            for group in self.linears
            for module, shard in zip(group.modules, group.shards(rank, size), strict=True)
        }

    @property
    def needed(self) -> tuple[str, ...]:
        """Names of what a layer must have."""
        own = self.mlp.parts if isinstance(self.mlp, Experts) else (self.mlp.activation,)
        sinks = () if self.attention.sinks is None else (self.attention.sinks,)
        return (*self.all_norms, *self.module_names, *own, *sinks)

    @property
    def all_norms(self) -> tuple[str, ...]:
        """Names of the norms of the hidden size that a layer has."""
        return tuple(norm for norm in (*self.norms, *self.post_norms) if norm is not None)

    @property
    def known(self) -> tuple[str, ...]:
        """Names of what a layer may have; there is no more that would be computed."""
        return (*self.needed, *self.attention.norms)


@dataclass(frozen=True)
class LayerKind:
    """What layers of one model may differ in.

    window: tokens that attention looks back over, the row's own included; None: all. rope: which of the model's rotary
    embeddings, by the name that its module knows; None: it has one only; UNTURNED: the layer turns nothing.
    """

    window: int | None = None
    rope: str | None = None


@dataclass(frozen=True)
class ModelSpec:
    """A stack of layers of equal parts between an embedding and an output head.

    kinds: of each layer. tied: the head is the embedding's weight. embedding_scale: what embeddings are multiplied by
    behind their module. logits_scale: what the head's products are multiplied by; logits_softcap: logits x then become
    softcap * tanh(x / softcap); None: they stay.
    """

    vocab_size: int
    hidden_size: int
    tied: bool
    layer: LayerSpec
    kinds: tuple[LayerKind, ...]
    embedding_scale: float = 1.0
    logits_scale: float = 1.0
    logits_softcap: float | None = None
    embedding: str = "model.embed_tokens"
    layers: str = "model.layers"
    norm: str = "model.norm"
    rotary: str = "model.rotary_emb"
    head: str = "lm_head"

    @property
    def num_layers(self) -> int:
        return len(self.kinds)

    @property
    def ropes(self) -> tuple[str | None, ...]:
        """The model's rotary embeddings, each once."""
        return tuple(dict.fromkeys(kind.rope for kind in self.kinds))

    @property
    def window(self) -> int | None:
        """Tokens that the narrowest layer looks back over; None: all."""
        return min((kind.window for kind in self.kinds if kind.window is not None), default=None)

    @property
    def widest_window(self) -> int | None:
        """Tokens that any layer looks back over at most; None: all."""
        windows = [kind.window for kind in self.kinds if kind.window is not None]
        return max(windows) if len(windows) == self.num_layers else None

    @property
    def plain(self) -> bool:
        """Whether the scores of all layers are products times a scale, of all tokens before a row."""
        attention = self.layer.attention
        return self.window is None and attention.softcap is None and attention.sinks is None

    def within(self, max_context: int) -> ModelSpec:
        """The same without windows that no row of this context looks beyond."""
        wide = tuple(
            replace(kind, window=None) if kind.window is not None and kind.window >= max_context else kind
            for kind in self.kinds
        )
        return replace(self, kinds=wide)

    def check_divisible(self, tp_size: int) -> None:
        """Raises LayoutError for a model that `tp_size` ranks cannot share evenly."""
        attention = self.layer.attention
        check_divisible(attention.heads, attention.kv_heads, self.layer.mlp.inner, tp_size)
        self.layer.shards(0, tp_size)

    def linears(self) -> Iterator[tuple[str, LinearGroup, int]]:
        """Name in the model, group, and index in it, of each linear layer of the decoder layers."""
        for layer in range(self.num_layers):
            for group in self.layer.linears:
                for i, module in enumerate(group.modules):
                    yield f"{self.layers}.{layer}.{module.name}", group, i

    def tensors(self, tied: bool) -> Iterator[tuple[str, Shape]]:
        """Names and shapes of the tensors that every such model has. tied: there is none of the head."""
        yield f"{self.embedding}.weight", (self.vocab_size, self.hidden_size)
        for layer in range(self.num_layers):
            for norm in self.layer.all_norms:
                yield f"{self.layers}.{layer}.{norm}.weight", (self.hidden_size,)
            for group in self.layer.linears:
                for module in group.modules:
                    yield f"{self.layers}.{layer}.{module.name}.weight", (module.size, group.inputs.size)
            if self.layer.attention.sinks is not None:
                yield f"{self.layers}.{layer}.{self.layer.attention.sinks}", (self.layer.attention.heads,)
            if isinstance(self.layer.mlp, Experts):
                for name, shape in self.layer.mlp.tensors(self.hidden_size):
                    yield f"{self.layers}.{layer}.{name}", shape
        yield f"{self.norm}.weight", (self.hidden_size,)
        if not tied:
            yield f"{self.head}.weight", (self.vocab_size, self.hidden_size)

    def pieces(self) -> dict[str, Pieces]:
        """By name of a tensor, those of which files may have it instead."""
        if not isinstance(self.layer.mlp, Experts):
            return {}
        found = self.layer.mlp.pieces()
        return {
            f"{self.layers}.{layer}.{name}": tuple(tuple(f"{self.layers}.{layer}.{n}" for n in one) for one in pieces)
            for layer in range(self.num_layers)
            for name, pieces in found.items()
        }

    def file_shapes(self, tied: bool, have: Collection[str]) -> Iterator[tuple[str, Shape]]:
        """As tensors(), by the names that files have which hold the tensors `have`."""
        pieces = self.pieces()
        for name, shape in self.tensors(tied):
            if name in have or name not in pieces:
                yield name, shape
                continue
            for below in pieces[name]:
                out = shape[-2] // len(below)
                yield from ((one, (out, shape[-1])) for one in below)
