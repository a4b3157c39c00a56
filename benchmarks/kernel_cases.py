"""The cases of the kernels' benchmark, the most important first.

Where time is short, the first cases are measured, and the report says which were not.
"""

from __future__ import annotations

from dataclasses import dataclass

from clif.kernels.dual_lora_reference import SHADOW

Lengths = tuple[tuple[int, int | None], ...]


@dataclass(frozen=True)
class Case:
    """One linear layer. lengths: rows of each slot; compiled: with torch.compile, which takes seconds.

    counted: the launches of each form are counted.
    """

    name: str
    sizes: tuple[int, ...]
    depth: int
    r: int
    lengths: Lengths
    backward: bool = False
    compiled: bool = False
    counted: bool = False


@dataclass(frozen=True)
class LayerCase:
    """A whole decoder layer in a decode step. model: in configs/models; lengths: rows of each serving slot."""

    name: str
    model: str
    lengths: tuple[tuple[int, int], ...]
    context: int = 384
    r: int = 16
    layers: int = 4
    """Distinct layers: together more weights than a cache holds."""

    @property
    def rows(self) -> int:
        return sum(count for count, _ in self.lengths)


@dataclass(frozen=True)
class PagedCase:
    """Attention of a decode step: sequences of equal context. d: numbers of a head; fp8: K and V of eight bits."""

    name: str
    sequences: int
    context: int
    heads: int
    kv_heads: int
    d: int
    block_size: int = 16
    fp8: bool = False


AnyCase = Case | LayerCase | PagedCase


def decode(rows: int) -> tuple[tuple[int, int], ...]:
    """Rows of two versions, as after a promotion."""
    old = rows // 4
    return ((rows - old, 0), (old, 1)) if old else ((rows, 0),)


def mixed(training: int) -> Lengths:
    """64 requests beside rows that learn."""
    return ((64, 0), (training, SHADOW))


SQUARE, QKV = ((4096,), 4096), ((4096, 1024, 1024), 4096)
_LINEAR = (
    *(Case(f"{name}, r=64", *SQUARE, 64, decode(n)) for n, name in ((64, "48+16"), (1, "1 row"), (256, "192+64"))),
    *(Case(f"12+4, r={r}", *SQUARE, r, decode(16)) for r in (16, 64)),
    Case("48+16, 2048x2048", (2048,), 2048, 16, decode(64)),
    Case("48+16, 4096x1024", (1024,), 4096, 16, decode(64)),
    *(Case(f"64+{n}, r=64", *SQUARE, 64, mixed(n)) for n in (1984, 2048)),
)
CASES: tuple[AnyCase, ...] = (
    Case("48+16, r=16", *SQUARE, 16, decode(64), counted=True),
    Case("64+2048, r=16", *SQUARE, 16, mixed(2048)),
    LayerCase("layer 1b, 48+16", "llama-1b", decode(64)),
    Case("48+16, q+k+v", *QKV, 16, decode(64)),
    Case("64 bare", *SQUARE, 16, ((64, None),)),
    Case("2112 bare", *SQUARE, 16, ((2112, None),)),
    Case("1 row, r=16", *SQUARE, 16, decode(1)),
    Case("192+64, r=16", *SQUARE, 16, decode(256)),
    PagedCase("paged, heads of 64", 64, 384, 32, 8, 64),
    Case("64+1984, r=16", *SQUARE, 16, mixed(1984)),
    Case("backward 2048, r=16", *SQUARE, 16, ((2048, SHADOW),), backward=True),
    LayerCase("layer 8b, 48+16", "llama-8b", decode(64)),
    PagedCase("paged, heads of 128", 64, 384, 32, 8, 128),
    Case("backward 2048, r=64", *SQUARE, 64, ((2048, SHADOW),), backward=True),
    PagedCase("paged, heads of 64, fp8", 64, 384, 32, 8, 64, fp8=True),
    PagedCase("paged, heads of 128, fp8", 64, 384, 32, 8, 128, fp8=True),
    LayerCase("layer 1b, 1 row", "llama-1b", decode(1)),
    LayerCase("layer 8b, 1 row", "llama-8b", decode(1)),
    *_LINEAR,
    Case("48+16, r=16, compiled", *SQUARE, 16, decode(64), compiled=True),
    Case("64+2048, r=16, compiled", *SQUARE, 16, mixed(2048), compiled=True),
)
DRY_CASES: tuple[AnyCase, ...] = (
    Case("6+2", (32,), 32, 8, decode(8), counted=True),
    Case("8+16", (32, 16), 32, 8, ((8, 0), (16, SHADOW))),
    Case("8 bare", (32,), 32, 8, ((8, None),)),
    Case("backward 16", (32,), 32, 8, ((16, SHADOW),), backward=True),
    LayerCase("layer", "tiny-llama", ((3, 0), (1, 1)), context=20, r=8, layers=1),
    PagedCase("paged", 3, 20, 4, 2, 16),
    PagedCase("paged, fp8", 3, 20, 4, 2, 16, fp8=True),
)
