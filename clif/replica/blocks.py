"""Blocks of the KV cache: which are free, and where a sequence's tokens lie. Free of torch."""

from __future__ import annotations


class BlockPool:
    """Hands out blocks of `block_size` tokens. Invariant: a block is free or owned by exactly one sequence."""

    def __init__(self, tokens: int, block_size: int) -> None:
        self.block_size = block_size
        self.total = tokens // block_size
        self._free = list(range(self.total - 1, -1, -1))

    @property
    def used_tokens(self) -> int:
        return (self.total - len(self._free)) * self.block_size

    def blocks_for(self, tokens: int) -> int:
        """Blocks that hold this many tokens."""
        return -(-tokens // self.block_size)

    def take(self, tokens: int) -> list[int] | None:
        """Blocks for a sequence of up to `tokens` tokens, or None when there are not enough."""
        count = self.blocks_for(tokens)
        if count > len(self._free):
            return None
        return [self._free.pop() for _ in range(count)]

    def give_back(self, blocks: list[int]) -> None:
        self._free.extend(reversed(blocks))


def places(blocks: list[int], block_size: int, start: int, stop: int) -> list[int]:
    """Cache places of a sequence's tokens [start, stop)."""
    return [blocks[i // block_size] * block_size + i % block_size for i in range(start, stop)]
