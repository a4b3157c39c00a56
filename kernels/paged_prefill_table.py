"""The prompt tokens of a step in tiles, as the paged prefill kernel reads them. Free of Triton."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from clif.kernels.paged_decode_config import power_of_two
from clif.kernels.staging import ALIGNED, aligned

TILE = 4
"""Integers of a tile: its first row, its rows, the position of the first one in its sequence, and its sequence."""


@dataclass(frozen=True)
class PrefillConfig:
    """How paged_prefill is computed. rows: of a product, tokens times query heads of a KV head; block_kv: tokens of a
    step. Both are powers of two of at least 16."""

    rows: int
    block_kv: int
    warps: int
    stages: int

    def tile_tokens(self, group: int) -> int:
        """Tokens of a tile, where `group` query heads share a KV head."""
        return self.rows // group


def prefill_config(group: int, head_dim: int, itemsize: int) -> PrefillConfig:
    """By reasoning: products of 64 rows or more use Hopper's instructions; what a tile keeps fits the registers.

    itemsize: bytes of a number of q. float32 has no product of tensor cores that is exact, and small tiles. Heads that
    are padded have masks, which take registers as well.
    """
    if itemsize == 4:
        return PrefillConfig(max(16, power_of_two(group)), 16, 4, 2)
    rows = max(128 if head_dim <= 128 else 64, power_of_two(group))
    narrow = head_dim > 128 or head_dim != power_of_two(head_dim)
    return PrefillConfig(rows, 32 if narrow else 64, 4 if head_dim <= 64 else 8, 3)


@dataclass(frozen=True)
class PrefillTable:
    """counts [1]: tiles; tiles [capacity, 4], see TILE; blocks [sequences, max_blocks]: those of each sequence. All
    int32, on the device. tile_tokens: rows of a tile, at most; block_size: tokens of a block."""

    counts: torch.Tensor
    tiles: torch.Tensor
    blocks: torch.Tensor
    tile_tokens: int
    block_size: int


def most_tiles(rows: int, sequences: int, tile_tokens: int) -> int:
    """Tiles of any prompts of so many rows together: each may end with a tile that is not full, and has two rows."""
    return rows // tile_tokens + min(sequences, rows // 2)


def tile_words(capacity: int) -> int:
    """int32 words of the counts and tiles of a table."""
    return ALIGNED + aligned(TILE * capacity)


def tile_parts(words: Any, capacity: int) -> tuple[Any, Any]:
    """counts and tiles in the words of a table, a tensor or a numpy array."""
    return words[:1], words[ALIGNED : ALIGNED + TILE * capacity].reshape(capacity, TILE)


def write_tiles(parts: tuple[Any, Any], rows: Any, starts: Any, stops: Any, tile_tokens: int) -> None:
    """Write the tiles of chunks of more than one token into the parts of a table, numpy arrays.

    rows: the first row of each chunk; starts, stops: its tokens. Chunk i is sequence i. The tiles that read the most
    come first: programs begin in this order, and the last ones are short.
    """
    counts, tiles = parts
    chunks = np.flatnonzero(stops - starts > 1)
    cut = -(-(stops - starts)[chunks] // tile_tokens)
    owner = chunks.repeat(cut)
    offsets = (np.arange(len(owner)) - (cut.cumsum() - cut).repeat(cut)) * tile_tokens
    first = starts[owner] + offsets
    sizes = np.minimum(tile_tokens, stops[owner] - first)
    order = np.argsort(-(first + sizes), kind="stable")
    counts[0] = len(owner)
    tiles[: len(owner)] = np.stack((rows[owner] + offsets, sizes, first, owner), 1)[order]
