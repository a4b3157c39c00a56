"""In which forms weights of files stay packed, and what a matrix of each takes. Free of torch."""

from __future__ import annotations

from dataclasses import dataclass

PADDED = 32
"""The C++ kernels for CPUs pad outputs and inputs of a matrix to multiples of it; 4 bits lie in as long rows anyway."""
ORDER = 8
"""Bytes of the number of an input."""


@dataclass(frozen=True)
class Form:
    """Whole numbers of `bits` with a scale for each `group` inputs; None: one for all inputs of an output.

    scale, added: bytes of a scale, and of the least number or zero point beside it. ordered: columns stand in another
    order than the inputs.
    """

    bits: int
    group: int | None
    scale: int = 2
    added: int = 0
    ordered: bool = False

    def bytes(self, out: int, width: int, padded: bool) -> int:
        """Of a matrix [out, width]. padded: as the C++ kernels read it."""
        long = -(-width // PADDED) * PADDED
        out, long = (-(-out // PADDED) * PADDED, long) if padded else (out, long if self.bits == 4 else width)
        order = ORDER * width if self.ordered else 0
        return order + out * (long * self.bits // 8 + self._groups(width, padded) * (self.scale + self.added))

    def _groups(self, width: int, padded: bool) -> int:
        if self.group is None or self.group >= width:
            return 1
        if not padded:
            return -(-width // self.group)
        # The kernels' groups are halves of a tile, tiles, or 2, 4, 8 of them.
        unit = self.group & -self.group
        return 2 * -(-width // PADDED) if unit < PADDED else -(-width // unit)


GGUF_FORMS = {
    "Q4_0": Form(4, 32), "Q4_1": Form(4, 32, 2, 2), "Q8_0": Form(8, 32),
    "Q5_0": Form(8, 32), "Q5_1": Form(8, 32, 2, 2),
    "Q4_K": Form(4, 32, 4, 4), "Q5_K": Form(8, 32, 4, 4), "Q6_K": Form(8, 16, 4),
}  # fmt: skip
"""By a GGUF file's types: those whose numbers a packed form holds as they are. A scale of the K types is the product of
two, which float32 holds; 5 and 6 bits lie in 8."""
