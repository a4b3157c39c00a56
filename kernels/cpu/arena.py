"""Memory in huge pages for packed weights: a serving step reads all of them, and small pages cost it a quarter."""

from __future__ import annotations

import mmap

import torch

ALIGNMENT = 64
"""Bytes of a cache line, which no two tensors share."""
HUGE_PAGE = 2 << 20


class Arena:
    """One stretch of memory out of which tensors are cut, in the order in which a step reads them.

    Its pages are huge where the system gives them for the asking (transparent_hugepage "madvise" or "always"), and
    ordinary otherwise. The memory lives as long as a tensor of it does.
    """

    def __init__(self, size: int) -> None:
        """size: numbers of bfloat16 that fit, each tensor rounded up to whole cache lines (see Arena.rounded)."""
        self._memory = mmap.mmap(-1, size * 2 + HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        if hasattr(mmap, "MADV_HUGEPAGE"):
            try:
                self._memory.madvise(mmap.MADV_HUGEPAGE)
            except OSError:
                pass  # a kernel without huge pages: the memory serves all the same
        whole = torch.frombuffer(self._memory, dtype=torch.bfloat16)
        # The first huge page begins where an address is a multiple of its size.
        skipped = -whole.data_ptr() % HUGE_PAGE // 2
        self._free = whole[skipped : skipped + size]

    @staticmethod
    def rounded(numbers: int) -> int:
        """Numbers that a tensor of so many takes in an arena."""
        unit = ALIGNMENT // 2
        return -(-numbers // unit) * unit

    def cut(self, numbers: int) -> torch.Tensor:
        """The next so many numbers. Raises ValueError where they do not fit any more."""
        taken = self.rounded(numbers)
        if taken > len(self._free):
            raise ValueError(f"the arena has {len(self._free)} numbers left, and {taken} are asked for")
        cut, self._free = self._free[:numbers], self._free[taken:]
        return cut


def aligned(numbers: int) -> torch.Tensor:
    """So many numbers of bfloat16 in ordinary memory that begins at a cache line."""
    whole = torch.empty(numbers + ALIGNMENT // 2, dtype=torch.bfloat16)
    skipped = -whole.data_ptr() % ALIGNMENT // 2
    return whole[skipped : skipped + numbers]
