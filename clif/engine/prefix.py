"""Which blocks of the KV cache hold which tokens, so that equal prefixes are computed once. Free of torch.

Sources: PagedAttention (Kwon et al., SOSP 2023), for blocks that sequences share.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence as Seq
from hashlib import sha256


class PrefixTable:
    """Full blocks by what they hold: the adapter version, the block's tokens, and all tokens before them.

    Invariants: no version finds another one's blocks; equal keys mean equal tokens (SHA-256 over version and
    chain, the same on every rank); a block is found under one key at most. Blocks of a retired version stay until
    they age out: no request asks for them again, so that they are the next to go.
    """

    def __init__(self, block_size: int) -> None:
        self._size = block_size
        self._block_of: dict[bytes, int] = {}
        self._key_of: dict[int, bytes] = {}

    def find(self, version: int, tokens: Seq[int]) -> list[int]:
        """Blocks of the longest known prefix of `tokens`, never including the last one: its logits are still needed."""
        found: list[int] = []
        key = _root(version)
        for index in range((len(tokens) - 1) // self._size):
            key = self._next(key, tokens, index)
            block = self._block_of.get(key)
            if block is None:
                break
            found.append(block)
        return found

    def put(self, version: int, tokens: Seq[int], blocks: Seq[int], start: int, stop: int) -> None:
        """Register blocks[start:stop] of a sequence, all full; those before them were registered or found already.

        Of two blocks with equal tokens the first is found. The second keeps its key for the blocks after it.
        """
        key = self._key_of[blocks[start - 1]] if start else _root(version)
        for index in range(start, stop):
            key = self._next(key, tokens, index)
            self._key_of[blocks[index]] = key
            self._block_of.setdefault(key, blocks[index])

    def finds(self, block: int) -> bool:
        """Whether find() can return this block."""
        key = self._key_of.get(block)
        return key is not None and self._block_of.get(key) == block

    def forget(self, block: int) -> None:
        """Forget what the block holds: it is about to be overwritten."""
        if self.finds(block):
            del self._block_of[self._key_of[block]]
        self._key_of.pop(block, None)

    def _next(self, key: bytes, tokens: Seq[int], index: int) -> bytes:
        block = array("q", tokens[index * self._size : (index + 1) * self._size])
        return sha256(key + block.tobytes()).digest()


def _root(version: int) -> bytes:
    return b"version %d" % version
