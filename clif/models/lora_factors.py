"""The LoRA factors of one merged linear layer: those that serve, one per slot, and those of the shadow, which learn.

Sources: LoRA (Hu et al. 2021) for the factors and how they begin; S-LoRA (Sheng et al. 2023) and Punica (Chen et al.
2023) for several adapters in one batch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from clif.kernels.cpu.products import PackedFactors
from clif.kernels.cpu.training import LearningFactors
from clif.kernels.dual_lora_reference import SHADOW, MergedLinear, Projection
from clif.models.base_weight import BaseWeight, Dense
from clif.models.shard import LinearShards, Shard, ShardSpec

Factors = tuple[torch.Tensor, torch.Tensor]
"""A [r, in] and B [out, r] of one module."""


@dataclass(frozen=True)
class LoraModule:
    """One module of a merged linear layer. name: in the model; size: outputs on this rank; adapted: has an adapter."""

    name: str
    size: int
    adapted: bool


class LoraFactors:
    """Factors of the k adapted modules of a merged layer, of rank r.

    A [k r, in] holds the modules' own A one below the other. B [out, k r] has each module's own B in its own rows and
    columns and zeros elsewhere: one product per factor in place of k.

    serving_a, serving_b [slots, ...] and compute_a, compute_b are in the base's dtype; shadow_a [k r, in] and
    shadow_b [adapted rows, r] are float32 masters, trained. compute_* are what the shadow's rows are multiplied with:
    the masters, rounded (see adapters.rounding).
    """

    def __init__(
        self, modules: Sequence[LoraModule], base: BaseWeight, shards: LinearShards, r: int, scale: float, slots: int
    ) -> None:
        """slots: adapters that serve at a time. The shadow begins as draw() makes it."""
        self.modules, self.shards, self.r, self.scale = tuple(modules), shards, r, scale
        self.adapted = [i for i, module in enumerate(modules) if module.adapted]
        (out, self.width), rank, device = base.shape, r * len(self.adapted), base.device
        shapes = ((rank, self.width), (out, rank))
        self.hold(*(torch.zeros(slots + 1, *shape, dtype=base.dtype, device=device) for shape in shapes))
        rows = sum(modules[i].size for i in self.adapted)
        self.shadow_a = nn.Parameter(torch.empty(rank, self.width, device=device))
        self.shadow_b = nn.Parameter(torch.empty(rows, r, device=device))
        self.packed: PackedFactors | None = None
        self.draw()

    def hold(self, a: torch.Tensor, b: torch.Tensor) -> None:
        """Hold the factors of all slots, the shadow's last, in a [slots + 1, k r, in] and b [slots + 1, out, k r]."""
        self.a, self.b = a, b
        self.serving_a, self.serving_b = a[:SHADOW], b[:SHADOW]
        self.compute_a, self.compute_b = a[SHADOW], b[SHADOW]

    def pack(self) -> None:
        """Keep all slots in the layout of the C++ kernels as well. Their memory no longer moves from now on."""
        self.packed = PackedFactors(self.a, self.b, self.scale)

    def pack_shadow(self) -> None:
        """The shadow's factors have changed."""
        if self.packed is not None:
            self.packed.refresh(len(self.a) - 1)

    def draw(self) -> None:
        """The shadow as it is before any training: A drawn from torch's random numbers like a linear layer, B zero."""
        inputs = self.shards.inputs or Shard(0, self.width, self.width)
        for a in self.shadow_a.data.split(self.r):
            # Drawn whole: the same adapter, however many ranks share it.
            whole = torch.empty(self.r, inputs.total, device=a.device)
            nn.init.kaiming_uniform_(whole, a=math.sqrt(5))
            a.copy_(whole[:, inputs.start : inputs.stop])
        self.shadow_b.data.zero_()

    def learning(self) -> LearningFactors:
        """What the C++ kernels of training read and add to."""
        starts = [sum(module.size for module in self.modules[:i]) for i in self.adapted]
        outputs = [(start, start + self.modules[i].size) for start, i in zip(starts, self.adapted, strict=True)]
        gradients = _gradient(self.shadow_a), _gradient(self.shadow_b)
        return LearningFactors(self.compute_a, self.compute_b, self.r, self.scale, outputs, gradients)

    def in_slot(self, slot: int) -> Factors:
        """Merged A [k r, in] and B [out, k r] of a slot."""
        return self.a[slot], self.b[slot]

    def by_module(self, a: torch.Tensor, b: torch.Tensor) -> dict[str, Factors]:
        """Views of merged masters (shaped like shadow_a, shadow_b) by module name: A [r, in] and B [own rows, r]."""
        parts = zip(a.split(self.r), b.split([self.modules[i].size for i in self.adapted]), strict=True)
        return {self.modules[i].name: part for i, part in zip(self.adapted, parts, strict=True)}

    def shard_specs(self) -> dict[str, tuple[ShardSpec, ShardSpec]]:
        """How A and B of each adapted module lie in the whole ones."""
        return {self.modules[i].name: self.shards.of_factors(i) for i in self.adapted}

    def fill_slot(self, slot: int, factors: dict[str, Factors]) -> None:
        """Copy an adapter into a serving slot, rounding to the base's dtype once."""
        blocks = self.blocks(self.serving_b[slot])
        for i, to_a, to_b in zip(self.adapted, self.serving_a[slot].split(self.r), blocks, strict=True):
            a, b = factors[self.modules[i].name]
            to_a.copy_(a)
            to_b.copy_(b)
        if self.packed is not None:
            self.packed.refresh(slot)

    def gather_b(self, b: torch.Tensor) -> torch.Tensor:
        """The blocks of a merged B [out, k r] one below the other: [adapted rows, r]."""
        blocks = self.blocks(b)
        return blocks[0] if len(blocks) == 1 else torch.cat(blocks)

    def as_merged(self, base: BaseWeight) -> MergedLinear:
        """Base and adapters as the kernels read them: views, no copy. One that is not dense multiplies by itself."""
        projections, start = [], 0
        for i, module in enumerate(self.modules):
            block = self.adapted.index(i) if module.adapted else None
            projections.append(Projection(start, start + module.size, block))
            start += module.size
        adapters = (self.a, self.b, self.r, self.scale, tuple(projections))
        if isinstance(base, Dense):
            return MergedLinear(base.weight, base.bias, *adapters)
        # What would read it as a dense weight computes NaN.
        shape = self.a.new_full((1, self.width), torch.nan).expand(base.shape)
        return MergedLinear(shape, None, *adapters, base)

    def blocks(self, b: torch.Tensor) -> list[torch.Tensor]:
        """The non-zero blocks of merged B [..., out, k r], one per adapted module."""
        rows = b.split([module.size for module in self.modules], -2)
        return [rows[i][..., j * self.r : (j + 1) * self.r] for j, i in enumerate(self.adapted)]


def _gradient(master: nn.Parameter) -> torch.Tensor:
    """What the gradients of a master are added to."""
    if master.grad is None:
        master.grad = torch.zeros_like(master)
    return master.grad
