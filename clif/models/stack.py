"""A causal language model taken apart into embedding, layers, norm and head, so that a forward can stop in between.

The modules are transformers' own. Attention goes through transformers' attention interface to the batch's
AttentionPlan, which travels as an extra keyword argument of every decoder layer.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
import transformers
from torch import nn

from clif.config import ConfigError
from clif.ops import Linear, frozen_linear

ATTENTION_NAME = "clif"


class AttentionPlan(Protocol):
    """How the rows of one packed batch attend to each other and to the cache."""

    def attend(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float
    ) -> torch.Tensor:
        """query [heads, rows, head_dim], key and value [kv_heads, rows, head_dim] -> [rows, heads, head_dim]."""
        ...


def _attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    clif_plan: AttentionPlan | None = None,
    sliding_window: int | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    if clif_plan is None:
        raise RuntimeError("the model was called without an attention plan: go through CausalStack")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    out = clif_plan.attend(module.layer_idx, query[0], key[0], value[0], scale)  # type: ignore[arg-type]
    return out.unsqueeze(0), None


transformers.AttentionInterface.register(ATTENTION_NAME, _attention)


class CausalStack:
    """The parts of a Llama-style model. Batches are packed: hidden states are [1, rows, hidden]."""

    def __init__(self, model: transformers.PreTrainedModel) -> None:
        inner: Any = getattr(model, "model", None)
        missing = [n for n in ("embed_tokens", "layers", "norm", "rotary_emb") if not hasattr(inner, n)]
        if missing:
            raise ConfigError(
                f"{type(model).__name__} is not a Llama-style model ({', '.join(missing)} not found): choose another"
            )
        if _window(model.config):
            raise ConfigError(f"{type(model).__name__} uses sliding-window attention, which is not supported")
        self.model, self._inner = model, inner
        self.num_layers = len(inner.layers)
        config = model.config
        self.num_kv_heads: int = config.num_key_value_heads
        self.head_dim: int = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        self.vocab_size: int = config.vocab_size
        self._head = model.get_output_embeddings()
        self._packed_head: Linear | None = None

    def embed(
        self, ids: torch.Tensor, positions: torch.Tensor
    ) -> tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor]]:
        """ids, positions: [rows]. Returns hidden states [1, rows, hidden] and the rotary (cos, sin)."""
        hidden = self._inner.embed_tokens(ids.unsqueeze(0))
        return hidden, self._inner.rotary_emb(hidden, positions.unsqueeze(0))

    def layers(
        self, start: int, stop: int, hidden: torch.Tensor, rope: tuple[torch.Tensor, torch.Tensor], plan: AttentionPlan
    ) -> torch.Tensor:
        """Decoder layers [start, stop)."""
        for layer in self._inner.layers[start:stop]:
            hidden = layer(
                hidden,
                attention_mask=None,
                position_embeddings=rope,
                past_key_values=None,
                use_cache=False,
                clif_plan=plan,
            )
        return hidden

    def logits(self, hidden: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """Logits [len(rows), vocabulary] of chosen rows only: the head is a tenth to a quarter of the linear work."""
        head = self._head if self._packed_head is None or torch.is_grad_enabled() else self._packed_head
        return head(self._inner.norm(hidden[0, rows]))

    def pack_head(self) -> None:
        """Lay the head's weight out for serving where that pays."""
        self._packed_head = frozen_linear(self._head.weight, self._head.bias)

    def take_over(self) -> None:
        """Route the model's attention to the plans from now on."""
        self.model.config._attn_implementation = ATTENTION_NAME


def check_stack(stack: CausalStack, plan: AttentionPlan, ids: torch.Tensor, expected: torch.Tensor) -> None:
    """Compare the stack with the model's own forward: models that scale embeddings or logits would differ.

    expected: [rows, vocabulary] from the untouched model. Raises ConfigError.
    """
    rows = torch.arange(len(ids), device=ids.device)
    hidden, rope = stack.embed(ids, rows)
    got = stack.logits(stack.layers(0, stack.num_layers, hidden, rope, plan), rows)
    error = (got - expected).float().norm() / expected.float().norm()
    if not error < 0.05:
        raise ConfigError(
            f"{type(stack.model).__name__} computes more than embedding, layers, norm and head "
            f"(relative difference {error:.2g}): it is not supported"
        )


def _window(config: Any) -> bool:
    window = getattr(config, "sliding_window", None)
    if not window or getattr(config, "use_sliding_window", True) is False:
        return False
    return window < getattr(config, "max_position_embeddings", window)
