"""Blocks of the KV cache: which sequences hold which, and where a sequence's tokens lie. Free of torch.

Sources: PagedAttention (Kwon et al., "Efficient Memory Management for Large Language Model Serving with
PagedAttention", SOSP 2023).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence as Seq

from clif.engine.prefix import PrefixTable


class BlockPool:
    """Hands out blocks of `block_size` tokens.

    Invariants: a block is free, or has readers, or is cached: full, without readers, found by its tokens. Only a
    full block ever has several readers, so that no sequence writes what another one reads.
    """

    def __init__(self, tokens: int, block_size: int) -> None:
        self.block_size = block_size
        self.total = tokens // block_size
        self._free = list(range(self.total - 1, -1, -1))
        self._ref_counts = [0] * self.total
        self._cached: OrderedDict[int, None] = OrderedDict()
        self._table = PrefixTable(block_size)

    @property
    def used_tokens(self) -> int:
        """Tokens in blocks that have readers; a shared block counts once."""
        return (self.total - self.available) * self.block_size

    @property
    def available(self) -> int:
        """Blocks that can be allocated: free ones, and cached ones, which then lose their tokens."""
        return len(self._free) + len(self._cached)

    def ref_count(self, block: int) -> int:
        """Sequences that hold this block."""
        return self._ref_counts[block]

    def blocks_for(self, tokens: int) -> int:
        """Blocks that hold this many tokens."""
        return -(-tokens // self.block_size)

    def allocate(self, blocks: list[int], tokens: int) -> bool:
        """Extend a sequence's blocks to hold `tokens` tokens. False, with nothing allocated, when too few are left."""
        count = self.blocks_for(tokens) - len(blocks)
        if count > self.available:
            return False
        blocks.extend(self._take() for _ in range(count))
        return True

    def acquire_cached(self, version: int, tokens: Seq[int]) -> list[int]:
        """The blocks of the longest cached prefix of `tokens`, short of the last token; each gets one reader more."""
        blocks = self._table.find(version, tokens)
        for block in blocks:
            self._cached.pop(block, None)
            self._ref_counts[block] += 1
        return blocks

    def register(self, version: int, tokens: Seq[int], blocks: list[int], start: int, stop: int) -> None:
        """Let other sequences find the full blocks of tokens [start, stop): these and all before them are computed."""
        self._table.put(version, tokens, blocks, start // self.block_size, stop // self.block_size)

    def free(self, blocks: list[int]) -> None:
        """Take one reader off all blocks of a sequence. A registered block without readers stays cached."""
        # A prefix serves more requests than what follows it, so the last block is the first to be evicted.
        for block in reversed(blocks):
            self._ref_counts[block] -= 1
            if self._ref_counts[block]:
                continue
            if self._table.finds(block):
                self._cached[block] = None
            else:
                self._free.append(block)

    def free_below(self, blocks: list[int], released: int, num_computed_tokens: int, window: int) -> int:
        """Take one reader off the blocks that no row of a sequence looks back to any more; the list keeps its length.

        released: how many of its first blocks were given back before. num_computed_tokens: those whose steps are done.
        window: tokens that a row sees at most, its own included. Returns how many are given back now.
        """
        # The last full block has the key that registers the one after it.
        stop = min((num_computed_tokens + 1 - window) // self.block_size, num_computed_tokens // self.block_size - 1)
        if stop <= released:
            return released
        self.free(blocks[released:stop])
        return stop

    def _take(self) -> int:
        block = self._free.pop() if self._free else self._cached.popitem(last=False)[0]
        self._table.forget(block)
        self._ref_counts[block] = 1
        return block
