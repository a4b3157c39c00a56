"""The parts of a layer between its products by the C++ kernels. Rows that learn take those of cpu_training.py in
bfloat16, and torch's otherwise."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import silu

from clif.kernels.cpu import host
from clif.kernels.cpu.host import HeadShape, RmsNorm
from clif.kernels.cpu.library import GELU, SILU
from clif.kernels.cpu.training import TrainingKernels
from clif.kernels.elementwise_reference import rms_norm
from clif.models.cpu_training import LearningNorm, LearningRotary, learning_gate
from clif.models.layer_ops import (
    Activation,
    Angles,
    AngleTable,
    CacheRows,
    HeadLayout,
    Norm,
    Rope,
    Rotary,
    TorchAngles,
    TorchGate,
    TorchNorm,
    TorchRotary,
    as_offset_norm,
    as_rms_norm,
    is_gelu,
    is_silu,
)


class CpuOps:
    """Parts that the kernels compute; torch's for modules that are no RMSNorm, and gates of other activations."""

    def __init__(self, max_context: int) -> None:
        """max_context: the positions that there are."""
        self._max_context = max_context
        self.training = TrainingKernels()

    def angles(self, rotary: Any, like: torch.Tensor) -> Angles:
        return AngleTable(TorchAngles(rotary, like), self._max_context)

    def norm(self, module: Any) -> Norm:
        norm = _norm_of(module)
        if norm is None:
            return TorchNorm(module)
        learns = module.weight.dtype == torch.bfloat16
        return CpuNorm(norm, LearningNorm(self.training, norm) if learns else TorchNorm(module))

    def rotary(self, layout: HeadLayout) -> Rotary:
        sizes = layout.heads, layout.kv_heads, layout.head_dim
        if layout.norms is None:
            shape = HeadShape(*sizes, rotary_dim=layout.rotary_dim)
            return CpuRotary(shape, LearningRotary(self.training, shape, TorchRotary(layout)))
        query, key = (_norm_of(module) for module in layout.norms)
        if query is None or key is None:
            return TorchRotary(layout)
        return CpuRotary(HeadShape(*sizes, (query, key), layout.rotary_dim), TorchRotary(layout))

    def gate(self, activation: Activation) -> Activation:
        for code, matches in ((SILU, is_silu), (GELU, is_gelu)):
            if matches(activation):
                return CpuGate(activation, code, self.training)
        return TorchGate(activation)


def _norm_of(module: Any) -> RmsNorm | None:
    """What the kernels compute of a module; None where it is no RMSNorm."""
    parts = as_rms_norm(module) or as_offset_norm(module)
    return None if parts is None else RmsNorm(*parts)


@dataclass(frozen=True, eq=False)
class CpuNorm:
    """RMSNorm of rows, and the residual add before it."""

    norm: RmsNorm
    learning: Norm

    def __call__(self, hidden: torch.Tensor, added: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        if hidden.requires_grad or (added is not None and added.requires_grad):
            return self.learning(hidden, added)
        return host.add_rms_norm(hidden, added, self.norm)


@dataclass(frozen=True, eq=False)
class CpuRotary:
    """Norms of heads, rotation and write to the cache, in the memory of the projection."""

    shape: HeadShape
    learning: Rotary

    def __call__(
        self, qkv: torch.Tensor, rope: Rope, to: CacheRows | None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        if qkv.requires_grad or rope.both is None or (to is not None and to.cache.dtype != qkv.dtype):
            return self.learning(qkv, rope, to)
        # The caller has the product's fresh memory and reads only what is returned of it.
        qkv = qkv.contiguous()
        cache, slots = to or (None, None)
        host.rotate_(qkv, self.shape, rope.both, torch.arange(len(qkv)), cache, slots)
        heads = qkv.view(len(qkv), -1, self.shape.head_dim)
        query, key, value = heads.split([self.shape.heads, self.shape.kv_heads, self.shape.kv_heads], 1)
        return query, key, value


class CpuGate:
    """activation(gate) * up of [rows, gate | up]."""

    def __init__(self, activation: Activation, code: int = SILU, training: TrainingKernels | None = None) -> None:
        """code: of the activation. training: for rows that learn, in bfloat16; None: torch's operators."""
        self.code, self._learning, self._training = code, TorchGate(activation), training

    def __call__(self, wide: torch.Tensor) -> torch.Tensor:
        if not wide.requires_grad:
            return host.gated(wide, self.code)
        if self._training is not None and wide.dtype == torch.bfloat16:
            return learning_gate(wide, self.code, self._training)
        return self._learning(wide)


@torch.no_grad()
def kernel_fault(dtype: torch.dtype) -> str | None:
    """What the kernels compute otherwise than torch on this machine; None: nothing."""
    rng, eps, near = torch.Generator().manual_seed(0), 1e-5, 4 * torch.finfo(dtype).eps
    hidden, added, weight, wide = (torch.randn(n, generator=rng).to(dtype) for n in ((5, 96), (5, 96), (96,), (5, 256)))
    both = torch.randn(5, 2, 16, generator=rng).to(dtype)
    layout, rope = HeadLayout(4, 1, 16, None), Rope(both[:, :1], both[:, 1:], both)
    norm = CpuNorm(RmsNorm(weight, eps), TorchNorm(None))
    kernels = norm, CpuRotary(HeadShape(4, 1, 16), TorchRotary(layout)), CpuGate(silu)
    torchs = TorchNorm(lambda x: rms_norm(x, weight, eps)), TorchRotary(layout), TorchGate(silu)
    for name, parts in (("norm", 0), ("rotation", 1), ("gate", 2)):
        arguments: Any = ((hidden, added), (hidden.clone(), rope, None), (wide,))[parts]
        got, wanted = (
            torch.cat([torch.as_tensor(t).flatten() for t in part[parts](*arguments)]) for part in (torchs, kernels)
        )
        if not torch.allclose(got.float(), wanted.float(), rtol=near, atol=near):
            return f"the {name} of the C++ kernels computes something else here"
    return None
