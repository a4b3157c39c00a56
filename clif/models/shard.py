"""How the linear layers of a model are cut over the ranks of a replica, as Megatron-LM does: arithmetic and slices.

Layers that read the hidden state are cut by outputs: query, key and value by heads, gate and up by columns. Layers that
write to it are cut by inputs, and their partial results are summed: one all-reduce per attention and one per MLP.
Where there are fewer KV heads than ranks, several ranks hold the same one. The output head is cut by rows, not evenly.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

Split = Literal["out", "in"]
"""Which side of a weight [out, in] is cut."""


@dataclass(frozen=True)
class Span:
    """[start, stop) of `total` outputs or inputs."""

    start: int
    stop: int
    total: int

    @property
    def size(self) -> int:
        return self.stop - self.start

    @property
    def whole(self) -> bool:
        return self.size == self.total


def even_span(total: int, rank: int, size: int) -> Span:
    """An equal share; `total` is a multiple of `size`."""
    return Span(total // size * rank, total // size * (rank + 1), total)


def share(total: int, rank: int, size: int) -> Span:
    """A share of rows that `size` need not divide: some have one more than others. Vocabularies are of any size."""
    return Span(total * rank // size, total * (rank + 1) // size, total)


def kv_span(kv_heads: int, head_dim: int, rank: int, size: int) -> Span:
    """An equal share of KV heads, or the one head that this rank's query heads read, which others hold as well."""
    if kv_heads >= size:
        return even_span(kv_heads * head_dim, rank, size)
    head = rank * kv_heads // size
    return Span(head * head_dim, (head + 1) * head_dim, kv_heads * head_dim)


def layer_spans(config: Any, rank: int, size: int) -> dict[str, tuple[Split, Span]]:
    """Side and span of every linear layer of a decoder layer, by its last name. config: of the transformers model."""
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    query, key = even_span(heads * head_dim, rank, size), kv_span(kv_heads, head_dim, rank, size)
    inner = even_span(config.intermediate_size, rank, size)
    return {
        "q_proj": ("out", query),
        "k_proj": ("out", key),
        "v_proj": ("out", key),
        "o_proj": ("in", query),
        "gate_proj": ("out", inner),
        "up_proj": ("out", inner),
        "down_proj": ("in", inner),
    }


def part_of(whole: torch.Tensor, split: Split, span: Span) -> torch.Tensor:
    """A view of a whole weight [out, in], or of a bias [out]."""
    return whole.narrow(0 if split == "out" else 1, span.start, span.size)


def cut(linear: nn.Linear, split: Split, span: Span, first: bool) -> None:
    """Leave a linear layer this rank's part of its weight only, if it was loaded whole.

    first: this rank adds the bias of summed outputs.
    """
    weight = linear.weight.data
    if weight.shape[0 if split == "out" else 1] != span.size:
        # Copies, so that the whole is freed.
        linear.weight.data = part_of(weight, split, span).clone()
        linear.out_features, linear.in_features = linear.weight.shape
        if linear.bias is not None and split == "out":
            linear.bias.data = part_of(linear.bias.data, split, span).clone()
    if linear.bias is not None and split == "in" and not first:
        linear.bias.data.zero_()
