"""The rows of a step and their sequences, as the kernels for CPUs read them. Free of Triton."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

INITIAL_BLOCKS = 16


@dataclass
class StepTable:
    """All rows of a step, those of prompts and those that continue an answer alike, and their sequences.

    Each step fills the same memory: what is here is valid until the next one is filled. All tensors are contiguous and
    on the CPU, and addresses never change, except for that of `blocks` where a sequence needs more of them.

    Of rows, [capacity] each, of which the first `rows` count. Those of one sequence lie together, in order:
    ids, positions, cache_slots: int64; the token, where it stands in its sequence, and which slot of the KV cache the
    row writes. An id that the host does not know yet is 0.
    adapters: int32; the adapter slot, -1 for none. adapted: whether any row has one.
    sequence: int32; the index of the row's sequence among those of the step.
    context: int32; how many tokens of its sequence in the cache the row sees, itself included: its position + 1.

    Of sequences, the first `sequences` count:
    blocks: int32 [capacity, max_blocks]; the cache blocks in order, each of block_size slots. Behind those that the
    contexts need lies anything.
    """

    ids: torch.Tensor
    positions: torch.Tensor
    cache_slots: torch.Tensor
    adapters: torch.Tensor
    sequence: torch.Tensor
    context: torch.Tensor
    blocks: torch.Tensor
    block_size: int
    rows: int = 0
    sequences: int = 0
    adapted: bool = False

    @classmethod
    def zeros(cls, rows: int, sequences: int, block_size: int) -> StepTable:
        """An empty table for steps of at most so many rows and sequences."""
        longs = (torch.zeros(rows, dtype=torch.int64) for _ in range(3))
        ints = (torch.zeros(rows, dtype=torch.int32) for _ in range(3))
        blocks = torch.zeros(sequences, INITIAL_BLOCKS, dtype=torch.int32)
        return cls(*longs, *ints, blocks, block_size)

    @property
    def max_blocks(self) -> int:
        """Blocks from the row of one sequence to that of the next."""
        return self.blocks.shape[1]

    def make_room(self, blocks: int) -> bool:
        """Let each sequence have so many blocks. Returns whether `blocks` is a new tensor, without any of them."""
        if blocks <= self.max_blocks:
            return False
        width = 1 << (blocks - 1).bit_length()
        # Pages that no sequence is long enough for are never touched.
        self.blocks = torch.from_numpy(np.zeros((len(self.blocks), width), np.int32))
        return True
