"""What a decoder layer computes between its products: norms, the rotation of heads, the gate of the MLP.

A layer makes each part once, from the ops of its device (clif/models/backends.py), and calls it without asking which.
Here are the parts as torch computes them, anywhere.

Sources: rotary embeddings (Su et al. 2021); RMSNorm (Zhang and Sennrich 2019); SwiGLU (Shazeer 2020).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import nn

from clif.kernels.cpu.training import TrainingKernels
from clif.kernels.elementwise_reference import SwiGLU, rms_norm, rotate, rotate_heads, write_rows

Activation = Callable[[torch.Tensor], torch.Tensor]
BEYOND = 256
"""Positions from max_context on that a table of angles has rows for."""


class CacheRows(NamedTuple):
    """Where one layer keeps the keys and values of rows: cache [2 * kv_heads, slots, head_dim], keys first, and the
    slot of each row, slots [rows]."""

    cache: torch.Tensor
    slots: torch.Tensor

    def write(self, key: torch.Tensor, value: torch.Tensor) -> None:
        """key, value: [rows, kv_heads, head_dim]."""
        write_rows(self.cache, self.slots, key, value)


@dataclass(frozen=True)
class Rope:
    """Rotary embedding of rows: cos and sin [rows, 1, head_dim], sin negative in its first half.

    both [rows, 2, head_dim]: the tensor of which these are views; None: they lie apart.
    """

    cos: torch.Tensor
    sin: torch.Tensor
    both: torch.Tensor | None = None

    def turn(self, x: torch.Tensor) -> torch.Tensor:
        """Rotate x [rows, heads, head_dim]: x cos + rotate_half(x) sin, of the numbers that there are angles for."""
        turned = self.cos.shape[-1]
        if turned == x.shape[-1]:
            return rotate(x, self.cos, self.sin)
        return torch.cat((rotate(x[..., :turned], self.cos, self.sin), x[..., turned:]), -1)


@dataclass(frozen=True)
class HeadLayout:
    """How a row of the merged projection is laid out: query heads, KV heads of keys, as many of values.

    norms: modules that normalise each head of query and key; None: neither is normalised. rotary_dim: numbers at the
    front of each head that are rotated; None: all.
    """

    heads: int
    kv_heads: int
    head_dim: int
    norms: tuple[Any, Any] | None
    rotary_dim: int | None = None

    @property
    def turns_all(self) -> bool:
        """Whether all numbers of a head are rotated."""
        return self.rotary_dim in (None, self.head_dim)


class Angles(Protocol):
    """The rotary embedding of a model."""

    def __call__(self, positions: torch.Tensor) -> Rope:
        """positions: [rows], each below model.max_context."""
        ...


class Norm(Protocol):
    """A norm, and the residual add before it."""

    def __call__(self, hidden: torch.Tensor, added: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """hidden and added [rows, hidden size] -> their sum, or hidden without `added`, and that normalised."""
        ...


class Rotary(Protocol):
    """The heads of a merged projection, rotated and written to the cache."""

    def __call__(
        self, qkv: torch.Tensor, rope: Rope, to: CacheRows | None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """qkv [rows, (heads + 2 kv_heads) * head_dim] -> query [rows, heads, head_dim], and key and value [rows,
        kv_heads, head_dim]. Query and key are rotated, and key and value are in the cache, if there is one."""
        ...


class LayerOps(Protocol):
    """Makes the parts of a layer, and the angles of all, for one type of device.

    training: what else computes for rows that learn, in bfloat16 on a CPU; None: torch alone.
    """

    training: TrainingKernels | None

    def angles(self, rotary: Any, like: torch.Tensor) -> Angles:
        """rotary: transformers' rotary embedding; like: of the type and on the device that are wanted."""
        ...

    def norm(self, module: Any) -> Norm:
        """module: transformers' norm."""
        ...

    def rotary(self, layout: HeadLayout) -> Rotary: ...

    def gate(self, activation: Activation) -> Activation:
        """[rows, gate | up] -> activation(gate) * up [rows, inner]."""
        ...


class TorchOps:
    """Every part by torch's operators, on any device."""

    training = None

    def angles(self, rotary: Any, like: torch.Tensor) -> Angles:
        return TorchAngles(rotary, like)

    def norm(self, module: Any) -> Norm:
        return TorchNorm(module)

    def rotary(self, layout: HeadLayout) -> Rotary:
        return TorchRotary(layout)

    def gate(self, activation: Activation) -> Activation:
        return TorchGate(activation)


@dataclass(frozen=True, eq=False)
class TorchAngles:
    """Angles as the model's own rotary embedding computes them."""

    rotary: Any
    like: torch.Tensor

    def __call__(self, positions: torch.Tensor) -> Rope:
        # Some models leave them in float32.
        cos, sin = (t[0].unsqueeze(1).to(self.like.dtype) for t in self.rotary(self.like, positions.unsqueeze(0)))
        half = sin.shape[-1] // 2
        return Rope(cos, torch.cat((-sin[..., :half], sin[..., half:]), -1))


class AngleTable:
    """The same, computed beforehand for all positions below max_context: one look-up for each batch.

    They depend on the position alone, which is what limits max_context. Rows that only pad, and those of a token that
    no answer has, may stand a little beyond.
    """

    def __init__(self, angles: TorchAngles, max_context: int) -> None:
        """table [positions, 2, head_dim]: cosines and sines of each."""
        positions = torch.arange(max_context, device=angles.like.device)
        rope = angles(positions)
        table = torch.cat((rope.cos, rope.sin), 1)
        self.table = torch.cat((table, table[-1:].expand(BEYOND, -1, -1)))

    def __call__(self, positions: torch.Tensor) -> Rope:
        chosen = self.table.index_select(0, positions)
        return Rope(chosen[:, :1], chosen[:, 1:], chosen)


@dataclass(frozen=True)
class TorchNorm:
    """Any norm: `module` computes it."""

    module: Any

    def __call__(self, hidden: torch.Tensor, added: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        if added is not None:
            hidden = hidden + added
        return hidden, self.module(hidden)


class Unnormed:
    """The residual add where a layer has no norm."""

    def __call__(self, hidden: torch.Tensor, added: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        summed = hidden if added is None else hidden + added
        return summed, summed


@dataclass(frozen=True)
class TorchRotary:
    """Any rotation: `Rope.turn` computes it."""

    layout: HeadLayout

    def __call__(
        self, qkv: torch.Tensor, rope: Rope, to: CacheRows | None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        layout = self.layout
        query, key, value = rotate_heads(qkv, layout.heads, layout.kv_heads, rope.turn, layout.norms)
        if to is not None:
            to.write(key, value)
        return query, key, value


class TorchGate:
    """Any activation; the gradient of silu is written in one piece."""

    def __init__(self, activation: Activation) -> None:
        self.activation, self.is_silu = activation, is_silu(activation)

    def __call__(self, wide: torch.Tensor) -> torch.Tensor:
        if self.is_silu and wide.requires_grad:
            gated: torch.Tensor = SwiGLU.apply(wide)
            return gated
        gate, up = wide.chunk(2, -1)
        return self.activation(gate) * up


def is_silu(activation: Activation) -> bool:
    """Whether an activation computes x / (1 + exp(-x))."""
    probe = torch.linspace(-4, 4, 64)
    return torch.equal(activation(probe), nn.functional.silu(probe))


def is_gelu(activation: Activation) -> bool:
    """Whether an activation computes GELU with tanh."""
    probe = torch.linspace(-4, 4, 64)
    return torch.equal(activation(probe), nn.functional.gelu(probe, approximate="tanh"))


@torch.no_grad()
def as_rms_norm(module: Any) -> tuple[torch.Tensor, float] | None:
    """Weight [n] and epsilon of a module that computes rms_norm; None for any other, whatever its name is."""
    parts = _norm_parts(module)
    return parts if parts is not None and _computes(module, *parts, parts[0].dtype) else None


@torch.no_grad()
def as_offset_norm(module: Any) -> tuple[torch.Tensor, float] | None:
    """1 + weight [n], float32, and epsilon of a module that multiplies by these before it rounds; None for any other.

    As transformers' norms of Gemma compute it.
    """
    parts = _norm_parts(module)
    if parts is None:
        return None
    weight, eps = 1.0 + parts[0].float(), parts[1]
    return (weight, eps) if _computes(module, weight, eps, parts[0].dtype) else None


def _norm_parts(module: Any) -> tuple[torch.Tensor, float] | None:
    """Weight [n] and epsilon of a module that may be a norm."""
    weight, eps = getattr(module, "weight", None), getattr(module, "variance_epsilon", getattr(module, "eps", None))
    if not isinstance(weight, torch.Tensor) or weight.dim() != 1 or not isinstance(eps, float):
        return None
    return weight.detach(), eps


def _computes(module: Any, weight: torch.Tensor, eps: float, dtype: torch.dtype) -> bool:
    """Whether a module computes rms_norm of rows of this type."""
    probe = torch.linspace(-3, 5, 2 * len(weight), device=weight.device).to(dtype).view(2, -1)
    # The second row is so small that epsilon shows.
    probe[1] *= eps**0.5
    found, expected = module(probe), rms_norm(probe, weight, eps)
    near = 4 * torch.finfo(dtype).eps
    return found.dtype == dtype and torch.allclose(found.float(), expected.float(), rtol=near, atol=near)
