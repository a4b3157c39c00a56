"""The sizes of a Llama-style model, and its linear layers. Free of torch."""

from __future__ import annotations

import re
from dataclasses import dataclass

from clif.config import AdapterConfig
from clif.errors import ConfigError
from clif.models.hf_config import Tree


@dataclass(frozen=True)
class Group:
    """Linear layers that read the same input, as in DualLinear. sizes: outputs of each; width: inputs of all.

    by_rows: which side tensor parallelism cuts: the outputs (rows of the weight), or the inputs.
    """

    names: tuple[str, ...]
    sizes: tuple[int, ...]
    width: int
    by_rows: bool


@dataclass(frozen=True)
class Shape:
    """A model's sizes, in numbers per layer or row."""

    vocab: int
    hidden: int
    inner: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    tied: bool

    @property
    def groups(self) -> tuple[Group, ...]:
        """The linear layers of one decoder layer."""
        query, key = self.heads * self.head_dim, self.kv_heads * self.head_dim
        attention, mlp = "self_attn", "mlp"
        qkv = tuple(f"{attention}.{name}_proj" for name in "qkv")
        gate_up = (f"{mlp}.gate_proj", f"{mlp}.up_proj")
        return (
            Group(qkv, (query, key, key), self.hidden, True),
            Group((f"{attention}.o_proj",), (self.hidden,), query, False),
            Group(gate_up, (self.inner, self.inner), self.hidden, True),
            Group((f"{mlp}.down_proj",), (self.hidden,), self.inner, False),
        )


def shape_of(tree: Tree) -> Shape:
    """The sizes in a config.json. Raises KeyError, TypeError or ValueError for one that lacks a size."""
    heads = int(tree["num_attention_heads"])
    return Shape(
        vocab=int(tree["vocab_size"]),
        hidden=int(tree["hidden_size"]),
        inner=int(tree["intermediate_size"]),
        layers=int(tree["num_hidden_layers"]),
        heads=heads,
        kv_heads=int(tree.get("num_key_value_heads") or heads),
        head_dim=int(tree.get("head_dim") or tree["hidden_size"] // heads),
        tied=bool(tree.get("tie_word_embeddings", False)),
    )


def is_target(name: str, config: AdapterConfig) -> bool:
    """Whether a linear layer of a decoder layer gets an adapter: by peft's rules, as in clif/adapters/bank.py."""
    targets = config.target_modules
    if targets == "all-linear":
        return True
    if isinstance(targets, str):
        return re.fullmatch(targets, name) is not None
    return any(name == target or name.endswith(f".{target}") for target in targets)


def check_targets(config: AdapterConfig, shape: Shape) -> None:
    """Raises ConfigError for adapter.target_modules, or a name of its list, that matches no layer of the model."""
    targets = config.target_modules
    names = [f"model.layers.{i}.{leaf}" for i in range(shape.layers) for group in shape.groups for leaf in group.names]
    for target in (targets,) if isinstance(targets, str) else targets:
        one = config.model_copy(update={"target_modules": target if isinstance(targets, str) else (target,)})
        if not any(is_target(name, one) for name in names):
            leaves = ", ".join(name.rpartition(".")[2] for group in shape.groups for name in group.names)
            raise ConfigError(
                f"adapter.target_modules: {target!r} matches no linear layer of the model: there are {leaves}"
            )
