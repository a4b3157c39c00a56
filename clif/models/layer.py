"""One Llama-style decoder layer over a batch of several kinds of rows, built from transformers' own modules.

Norms, activation and weights are those of the loaded model; what is ours is that layers which read the same input
are merged into one product, that a product sees all rows at once, and that attention is the batch's own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn

from clif.config import ConfigError
from clif.distributed.collectives import TpGroup
from clif.models.dual_linear import DualLinear, LoraRows
from clif.models.shard import LinearShards, Shard, ShardDim, shard_linear

LayerShards = Mapping[str, tuple[ShardDim, Shard]]
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")
NEEDED = (
    "input_layernorm",
    "post_attention_layernorm",
    *(f"self_attn.{name}" for name in ATTENTION),
    *(f"mlp.{name}" for name in (*MLP, "act_fn")),
)
KNOWN = tuple(f"{name}." for name in (*NEEDED, "self_attn.q_norm", "self_attn.k_norm"))


class AttentionPlan(Protocol):
    """How rows of one kind attend to each other and to the cache."""

    def attend(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float
    ) -> torch.Tensor:
        """query [rows, heads, head_dim], key and value [rows, kv_heads, head_dim] -> [rows, heads * head_dim]."""
        ...


@dataclass(frozen=True)
class Rope:
    """Rotary embedding of rows: cos and sin [rows, 1, head_dim], sin negative in its first half."""

    cos: torch.Tensor
    sin: torch.Tensor

    def turn(self, x: torch.Tensor) -> torch.Tensor:
        """Rotate x [rows, heads, head_dim]: x cos + rotate_half(x) sin, the halves swapped by a roll."""
        return torch.addcmul(x * self.cos, x.roll(x.shape[-1] // 2, -1), self.sin)


@dataclass(frozen=True)
class SubBatch:
    """Rows of one kind in a batch: their adapters, positions and attention."""

    rows: LoraRows
    rope: Rope
    plan: AttentionPlan


class DecoderLayer:
    """Layer `index` of a model; `module` is transformers' decoder layer, `name` its name in the model.

    Raises ConfigError for a layer of another make.
    """

    def __init__(
        self, module: Any, name: str, index: int, head_dim: int, shards: LayerShards, tp_group: TpGroup
    ) -> None:
        """spans: this rank's parts of the linear layers. With peers the module is left no more than these."""
        check_layer(module)
        attention, mlp = module.self_attn, module.mlp
        self.index, self.head_dim = index, head_dim
        self.qkv = _merged(attention, f"{name}.self_attn", ATTENTION[:3], shards, tp_group)
        self.out = _merged(attention, f"{name}.self_attn", ATTENTION[3:], shards, tp_group)
        self.gate_up = _merged(mlp, f"{name}.mlp", MLP[:2], shards, tp_group)
        self.down = _merged(mlp, f"{name}.mlp", MLP[2:], shards, tp_group)
        self._norm, self._mlp_norm, self._act = module.input_layernorm, module.post_attention_layernorm, mlp.act_fn
        probe = torch.linspace(-4, 4, 64)
        self._is_silu = torch.equal(self._act(probe), nn.functional.silu(probe))
        self._q_norm, self._k_norm = (getattr(attention, n, None) for n in ("q_norm", "k_norm"))
        self._scale: float = getattr(attention, "scaling", head_dim**-0.5)

    @property
    def linears(self) -> tuple[DualLinear, ...]:
        return self.qkv, self.out, self.gate_up, self.down

    def __call__(self, hidden: Sequence[torch.Tensor], sub_batches: Sequence[SubBatch]) -> list[torch.Tensor]:
        """hidden: [rows, hidden size] for each part; a part that learns comes last."""
        rows = [sub_batch.rows for sub_batch in sub_batches]
        qkv = self.qkv([self._norm(h) for h in hidden], rows)
        attended = self.out([self._attend(x, sub_batch) for x, sub_batch in zip(qkv, sub_batches, strict=True)], rows)
        hidden = [h + x for h, x in zip(hidden, attended, strict=True)]
        wide = self.gate_up([self._mlp_norm(h) for h in hidden], rows)
        narrow = self.down([self._gate(x) for x in wide], rows)
        return [h + x for h, x in zip(hidden, narrow, strict=True)]

    def _attend(self, qkv: torch.Tensor, sub_batch: SubBatch) -> torch.Tensor:
        q_size, k_size, v_size = self.qkv.sizes
        turned, value = qkv.split([q_size + k_size, v_size], -1)
        turned = turned.unflatten(-1, (-1, self.head_dim))
        heads = [q_size // self.head_dim, k_size // self.head_dim]
        if self._q_norm is not None and self._k_norm is not None:
            query, key = turned.split(heads, 1)
            turned = torch.cat((self._q_norm(query), self._k_norm(key)), 1)
        query, key = sub_batch.rope.turn(turned).split(heads, 1)
        return sub_batch.plan.attend(self.index, query, key, value.unflatten(-1, (-1, self.head_dim)), self._scale)

    def _gate(self, wide: torch.Tensor) -> torch.Tensor:
        if self._is_silu and wide.requires_grad:
            gated: torch.Tensor = _SwiGLU.apply(wide)
            return gated
        gate, up = wide.split(self.gate_up.sizes, -1)
        return self._act(gate) * up


class _SwiGLU(torch.autograd.Function):
    """silu(gate) * up of [rows, gate and up]: keeps its input alone, and its gradient is written in one piece."""

    @staticmethod
    def forward(ctx: Any, wide: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(wide)
        gate, up = wide.chunk(2, -1)
        return nn.functional.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> torch.Tensor:
        (wide,) = ctx.saved_tensors
        gate, up = wide.chunk(2, -1)
        grad = torch.empty_like(wide)
        grad_gate, grad_up = grad.chunk(2, -1)
        torch.mul(nn.functional.silu(gate), gradients[0], out=grad_up)
        grad_gate.copy_(torch.ops.aten.silu_backward(gradients[0] * up, gate))
        return grad


def check_layer(module: Any) -> None:
    """Raises ConfigError for a decoder layer that is not built like Llama's: parts are missing, or there are more."""
    name, missing = type(module).__name__, [name for name in NEEDED if not _has(module, name)]
    if missing:
        raise ConfigError(f"{name} is not a Llama-style layer ({', '.join(missing)} not found): choose another model")
    more = [n for n, _ in module.named_parameters() if not n.startswith(KNOWN)]
    if more:
        raise ConfigError(f"{name} has more than a Llama-style layer ({', '.join(more[:3])}): choose another model")


def _has(module: Any, path: str) -> bool:
    for leaf in path.split("."):
        module = getattr(module, leaf, None)
    return module is not None


def _merged(parent: Any, name: str, leaves: Sequence[str], shards: LayerShards, tp_group: TpGroup) -> DualLinear:
    linears = [getattr(parent, leaf) for leaf in leaves]
    shard_dim = shards[leaves[0]][0]
    for leaf, linear in zip(leaves, linears, strict=True):
        shard_linear(linear, *shards[leaf], first=tp_group.rank == 0)
    parts = LinearShards(shard_dim, tuple(shards[leaf][1] for leaf in leaves), tp_group)
    return DualLinear([f"{name}.{leaf}" for leaf in leaves], linears, parts)
