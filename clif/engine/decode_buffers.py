"""The input of captured decode steps: everything that changes between two replays, in one tensor on the device.

A fill is one copy from pinned memory. Rows beyond those of the step are padding: they read and write a spare block of
the KV cache, use the base alone, and their tokens are not looked at.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from clif.engine.adapter_tables import CapturedTables, Tables
from clif.engine.scheduler import Chunk
from clif.kernels.dual_lora_reference import Segment
from clif.kernels.paged_decode_table import DecodeTable, parts_of, table_words
from clif.kernels.staging import Staged, aligned

FIELDS = 5
"""Integers of a row: token id, position, cache slot, index of its id among the last step's tokens, adapter slot."""
KNOWN = -1
"""The id of a row is known on the host."""
NO_SLOT = -1


@dataclass
class HostRows:
    """What lies in one of the host's copies already: of each row, the list of its blocks and how many of them.

    A list only grows while it is a sequence's: where it is the same one, its new blocks alone are written.
    """

    blocks: list[list[int]] = field(default_factory=list)
    counts: list[int] = field(default_factory=list)

    def resize(self, rows: int) -> None:
        """Forget the rows behind these; nothing lies in new ones."""
        del self.blocks[rows:], self.counts[rows:]
        new = range(len(self.blocks), rows)
        self.blocks += [[] for _ in new]
        self.counts += [0 for _ in new]


class DecodeBuffers:
    """Buffers for steps of up to `capacity` rows with contexts of up to `max_blocks` blocks.

    spare: a block of the KV cache that belongs to no sequence. slots: adapter slots, the shadow's included.
    """

    def __init__(
        self, capacity: int, max_blocks: int, block_size: int, spare: int, slots: int, device: torch.device
    ) -> None:
        self.capacity, self.max_blocks, self.block_size = capacity, max_blocks, block_size
        self._width, self._spare = aligned(capacity), spare
        self._adapters = CapturedTables(capacity, slots)
        self._adapters_at = FIELDS * self._width
        self._table_at = self._adapters_at + self._adapters.size
        words = self._table_at + table_words(capacity, max_blocks)
        self._staged = Staged.zeros(words, torch.int32, device)
        self._hosts = {host.data_ptr(): HostRows() for host in self._staged.hosts}

    def fields(self, size: int) -> torch.Tensor:
        """The integers of the first rows on the device [FIELDS, size], int32."""
        return self._staged.words[: FIELDS * self._width].view(FIELDS, self._width)[:, :size]

    def decode_table(self, size: int) -> DecodeTable:
        """The cache blocks of the first rows."""
        words = self._staged.words[self._table_at :]
        return DecodeTable(words, self.capacity, self.max_blocks, self.block_size).first(size)

    def tables(self, size: int) -> Tables:
        """The adapters of a step of this size."""
        return self._adapters.of_size(self._staged.words[self._adapters_at :], size)

    def keep_used_heights(self) -> None:
        """All steps are captured: see CapturedTables."""
        self._adapters.keep_used_heights()

    def fits(self, chunks: Sequence[Chunk]) -> bool:
        """Whether a step of these chunks can be computed from the buffers: answers only, and not too many or long."""
        most = self.max_blocks * self.block_size
        return len(chunks) <= self.capacity and all(chunk.is_decode and chunk.stop <= most for chunk in chunks)

    def fill(self, chunks: Sequence[Chunk], segments: Sequence[Segment], size: int) -> None:
        """Send a step of these chunks, which lie sorted by adapter slot, as rows 0, 1, 2 and so on of `size`."""
        host = self._staged.write()
        words = host.numpy()
        fields = words[: FIELDS * self._width].reshape(FIELDS, self._width)
        if chunks:
            fields[:, : len(chunks)] = list(zip(*map(self._row, chunks), strict=True))
        fields[:, len(chunks) : size] = [[0], [0], [self._spare * self.block_size], [KNOWN], [NO_SLOT]]
        self._fill_table(host, chunks, size)
        self._adapters.write(words[self._adapters_at :], segments, size)
        self._staged.send()

    def _row(self, chunk: Chunk) -> tuple[int, int, int, int, int]:
        sequence, position = chunk.sequence, chunk.start
        block, offset = divmod(position, self.block_size)
        known = position < len(sequence.tokens)
        return (
            sequence.tokens[position] if known else 0,
            position,
            sequence.blocks[block] * self.block_size + offset,
            KNOWN if known else sequence.sampled_at,
            NO_SLOT if sequence.slot is None else sequence.slot,
        )

    def _fill_table(self, host: torch.Tensor, chunks: Sequence[Chunk], size: int) -> None:
        counts, rows, lengths, blocks = (
            view.numpy() for view in parts_of(host[self._table_at :], self.capacity, self.max_blocks)
        )
        counts[0] = size
        rows[:size] = np.arange(size)
        lengths[: len(chunks)] = [chunk.stop for chunk in chunks]
        lengths[len(chunks) : size] = 1
        blocks[len(chunks) : size, 0] = self._spare
        self._write_blocks(blocks, [chunk.sequence.blocks for chunk in chunks], self._hosts[host.data_ptr()])

    def _write_blocks(self, blocks: Any, held: Sequence[list[int]], known: HostRows) -> None:
        known.resize(len(held))
        for i, own in enumerate(held):
            start = known.counts[i] if known.blocks[i] is own else 0
            if start < len(own):
                blocks[i, start : len(own)] = own[start:]
                known.blocks[i], known.counts[i] = own, len(own)
