"""What a model is made of, said once: derived from its Hugging Face config, read by whatever loads, cuts, draws,
estimates and runs it. Free of torch.

A further family of models is one more function here, in FAMILIES.

Sources: Llama (Touvron et al. 2023) for the layer; grouped-query attention (Ainslie et al. 2023) for fewer key/value
heads than query heads; rotary embeddings (Su et al. 2021).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from clif.distributed.layout import check_divisible
from clif.models.hf_config import Tree, window_of
from clif.models.shard import Shard, ShardDim, unit_shard

SIZES = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
)  # fmt: skip
"""Fields of a Hugging Face config that every family has here."""
FIELDS = (
    *SIZES, "model_type", "head_dim", "tie_word_embeddings", "sliding_window", "use_sliding_window", "layer_types",
    "attention_chunk_size", "rope_parameters", "rope_scaling",
)  # fmt: skip
Shape = tuple[int, ...]


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
        """The part of each module that a rank among `size` of them holds.

        Raises ValueError for a module of several kinds of outputs among several ranks: its part is no one range.
        """
        if self.shard_dim == "in":
            return (self.inputs.shard(rank, size),) * len(self.modules)
        if size == 1:
            return tuple(Shard(0, module.size, module.size) for module in self.modules)
        if any(len(module.outputs) > 1 for module in self.modules):
            raise ValueError(f"{self.name} has modules of several kinds of outputs: they cannot be cut")
        return tuple(module.outputs[0].shard(rank, size) for module in self.modules)


@dataclass(frozen=True)
class AttentionSpec:
    """window: tokens that the narrowest layer looks back over; None: all. rope: kind of rotary embedding.

    module: within the decoder layer; its `scaling`, if it has one, is that of the scores. norms: of query and key, used
    where a layer has them.
    """

    module: str
    heads: int
    kv_heads: int
    head_dim: int
    window: int | None
    norms: tuple[str, str]
    rope: str


@dataclass(frozen=True)
class DenseMlp:
    """A gated MLP. inner: its columns; activation: the module that computes the gate."""

    inner: int
    activation: str


@dataclass(frozen=True)
class Experts:
    """Gated MLPs of which each token takes some. inner: columns of each."""

    count: int
    per_token: int
    inner: int
    activation: str


@dataclass(frozen=True)
class LayerSpec:
    """A decoder layer. norms: before attention, and before the MLP."""

    linears: tuple[LinearGroup, ...]
    attention: AttentionSpec
    mlp: DenseMlp | Experts
    norms: tuple[str, str]

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
        return (*self.norms, *self.module_names, self.mlp.activation)

    @property
    def known(self) -> tuple[str, ...]:
        """Names of what a layer may have; there is no more that would be computed."""
        return (*self.needed, *self.attention.norms)


@dataclass(frozen=True)
class ModelSpec:
    """A stack of equal layers between an embedding and an output head. tied: the head is the embedding's weight."""

    vocab_size: int
    hidden_size: int
    num_layers: int
    tied: bool
    layer: LayerSpec
    embedding: str = "model.embed_tokens"
    layers: str = "model.layers"
    norm: str = "model.norm"
    rotary: str = "model.rotary_emb"
    head: str = "lm_head"

    def check_divisible(self, tp_size: int) -> None:
        """Raises LayoutError for a model that `tp_size` ranks cannot share evenly."""
        attention = self.layer.attention
        check_divisible(attention.heads, attention.kv_heads, self.layer.mlp.inner, tp_size)

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
            for norm in self.layer.norms:
                yield f"{self.layers}.{layer}.{norm}.weight", (self.hidden_size,)
            for group in self.layer.linears:
                for module in group.modules:
                    yield f"{self.layers}.{layer}.{module.name}.weight", (module.size, group.inputs.size)
        yield f"{self.norm}.weight", (self.hidden_size,)
        if not tied:
            yield f"{self.head}.weight", (self.vocab_size, self.hidden_size)


def spec_of(config: Any) -> ModelSpec:
    """The description of a model from a config.json's fields, or from a transformers configuration.

    Raises KeyError, TypeError, ValueError or ZeroDivisionError for one that lacks a size.
    """
    tree = config if isinstance(config, Mapping) else {field: getattr(config, field, None) for field in FIELDS}
    return FAMILIES.get(str(tree.get("model_type")), llama)(dict(tree))


def narrow_fields(spec: ModelSpec) -> dict[str, int]:
    """Fields of a Hugging Face config for a narrow model with as many layers, and heads of the same size."""
    # Rotary embeddings may depend on the size of a head.
    return {
        "num_attention_heads": 2, "num_key_value_heads": 1, "hidden_size": 2 * spec.layer.attention.head_dim,
        "intermediate_size": 64, "vocab_size": 64,
    }  # fmt: skip


def llama(tree: Tree) -> ModelSpec:
    """Llama, and what is built like it: grouped-query attention with rotary embeddings, and a gated MLP."""
    heads, vocab_size = int(tree["num_attention_heads"]), int(tree["vocab_size"])
    hidden, inner = Features(int(tree["hidden_size"])), Features(int(tree["intermediate_size"]))
    kv_heads = int(tree.get("num_key_value_heads") or heads)
    head_dim = int(tree.get("head_dim") or tree["hidden_size"] // heads)
    query, key = Features(heads, head_dim), Features(kv_heads, head_dim)
    norms = ("self_attn.q_norm", "self_attn.k_norm")
    return ModelSpec(
        vocab_size=vocab_size,
        hidden_size=hidden.size,
        num_layers=int(tree["num_hidden_layers"]),
        tied=bool(tree.get("tie_word_embeddings", False)),
        layer=LayerSpec(
            linears=(
                LinearGroup("qkv", _modules("self_attn", q=query, k=key, v=key), hidden, "out", "hidden"),
                LinearGroup("out", _modules("self_attn", o=hidden), query, "in", "attended"),
                LinearGroup("gate_up", _modules("mlp", gate=inner, up=inner), hidden, "out", "hidden"),
                LinearGroup("down", _modules("mlp", down=hidden), inner, "in", "gated"),
            ),
            attention=AttentionSpec("self_attn", heads, kv_heads, head_dim, window_of(tree), norms, _rope(tree)),
            mlp=DenseMlp(inner.size, "mlp.act_fn"),
            norms=("input_layernorm", "post_attention_layernorm"),
        ),
    )


def _modules(block: str, **outputs: Features) -> tuple[LinearModule, ...]:
    return tuple(LinearModule(f"{block}.{name}_proj", (features,)) for name, features in outputs.items())


def _rope(tree: Tree) -> str:
    rope = tree.get("rope_parameters") or tree.get("rope_scaling")
    return str(rope.get("rope_type", rope.get("type", "default"))) if isinstance(rope, Mapping) else "default"


FAMILIES: dict[str, Callable[[Tree], ModelSpec]] = {"llama": llama, "mistral": llama, "qwen2": llama, "qwen3": llama}
"""By model_type: families that CLIF's own tests prove to be computed rightly. Any other is tried as one built like
Llama, and has to prove it by computing before weights are read (clif/models/proof.py)."""
