"""The input of captured steps with prompts: everything that changes between two replays, in one tensor on the device.

As clif/engine/decode_buffers.py, for rows of all kinds: those of prompts, in tiles of one sequence each, and those that
continue an answer. A fill is a few operations on whole arrays and one copy from pinned memory. Rows beyond those of the
step are padding: they write to a spare block of the KV cache, attend to nothing and use the base alone.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from clif.engine.adapter_tables import CapturedTables, Tables
from clif.engine.decode_buffers import FIELDS
from clif.engine.scheduler import Chunk
from clif.engine.step_rows import KNOWN, NO_SLOT, StepRows
from clif.kernels.dual_lora_reference import Segment
from clif.kernels.paged_decode_table import DecodeTable, parts_of, table_words
from clif.kernels.paged_prefill_table import PrefillTable, most_tiles, tile_parts, tile_words, write_tiles
from clif.kernels.staging import Staged, aligned


class PromptBuffers:
    """Buffers for steps of up to `rows` rows of up to `sequences` requests, with contexts of up to `max_blocks` blocks.

    spare: a block of the KV cache that belongs to no sequence. slots: adapter slots, the shadow's included.
    tile_tokens: rows of a tile, as attention takes them.
    """

    def __init__(
        self,
        rows: int,
        sequences: int,
        max_blocks: int,
        block_size: int,
        spare: int,
        slots: int,
        tile_tokens: int,
        device: torch.device,
    ) -> None:
        self.rows, self.sequences, self.max_blocks, self.block_size = rows, sequences, max_blocks, block_size
        self.tile_tokens = tile_tokens
        self._padding = 0, 0, spare * block_size, KNOWN, NO_SLOT
        self._filled = StepRows(rows, sequences, block_size)
        self._adapters = CapturedTables(rows, slots)
        self._tiles = most_tiles(rows, sequences, tile_tokens)
        self._width = aligned(rows)
        parts = FIELDS * self._width, aligned(sequences), self._adapters.size, tile_words(self._tiles)
        _, self._ends_at, self._adapters_at, self._tiles_at, self._table_at = np.cumsum([0, *parts]).tolist()
        self._staged = Staged.zeros(self._table_at + table_words(sequences, max_blocks), torch.int32, device)

    def fields(self, size: int) -> torch.Tensor:
        """The integers of the first rows on the device [FIELDS, size], int32, as DecodeBuffers has them."""
        return self._staged.words[: FIELDS * self._width].view(FIELDS, self._width)[:, :size]

    def ends(self, size: int) -> torch.Tensor:
        """The rows that choose a token in a step of this size, padded with any row [most requests], int32."""
        return self._staged.words[self._ends_at : self._ends_at + self.requests(size)]

    def requests(self, size: int) -> int:
        """Requests of a step of this size, at most."""
        return min(self.sequences, size)

    def adapters(self, size: int) -> Tables:
        """The adapters of a step of this size."""
        return self._adapters.of_size(self._staged.words[self._adapters_at :], size)

    def decode_table(self, size: int) -> DecodeTable:
        """The cache blocks of all sequences; those with rows of a prompt have no length, which leaves them out."""
        words = self._staged.words[self._table_at :]
        return DecodeTable(words, self.sequences, self.max_blocks, self.block_size).first(self.requests(size))

    def prefill_table(self, size: int) -> PrefillTable:
        """The tiles of the prompts in a step of this size."""
        counts, tiles = tile_parts(self._staged.words[self._tiles_at :], self._tiles)
        most = most_tiles(size, self.requests(size), self.tile_tokens)
        return PrefillTable(counts, tiles[:most], self.decode_table(size).blocks, self.tile_tokens, self.block_size)

    def keep_used_heights(self) -> None:
        """All steps are captured: see CapturedTables."""
        self._adapters.keep_used_heights()

    def fill(self, chunks: Sequence[Chunk], segments: Sequence[Segment], size: int) -> None:
        """Send a step of these chunks, which lie sorted by adapter slot, as the first rows of `size`."""
        words = self._staged.write().numpy()
        fields = words[: FIELDS * self._width].reshape(FIELDS, self._width)
        ends = words[self._ends_at : self._ends_at + self.sequences]
        count = self._fill_rows(chunks, fields, ends) if chunks else 0
        fields[:, count:size] = np.array(self._padding)[:, None]
        self._fill_tables(chunks, words)
        self._adapters.write(words[self._adapters_at :], segments, size)
        self._staged.send()

    def _fill_rows(self, chunks: Sequence[Chunk], fields: np.ndarray, ends: np.ndarray) -> int:
        filled = self._filled
        filled.fill(chunks)
        n = filled.table.rows
        fields[0, :n], fields[1, :n], fields[2, :n] = filled.ids[:n], filled.positions[:n], filled.cache_slots[:n]
        fields[3, :n] = filled.sources[:n] if filled.late else KNOWN
        fields[4, :n] = filled.table.adapters[:n].numpy()
        # A row of a larger step would lie behind those of this one.
        ends[: filled.sampling], ends[filled.sampling :] = filled.ends[: filled.sampling], 0
        return n

    def _fill_tables(self, chunks: Sequence[Chunk], words: np.ndarray) -> None:
        counts, rows, lengths, blocks = (
            view.numpy()
            for view in parts_of(torch.from_numpy(words[self._table_at :]), self.sequences, self.max_blocks)
        )
        n = counts[0] = len(chunks)
        starts, stops = np.array([c.start for c in chunks], np.int64), np.array([c.stop for c in chunks], np.int64)
        sizes = stops - starts
        rows[:n] = sizes.cumsum() - sizes
        lengths[:n] = np.where(sizes > 1, 0, stops)
        if n:
            held = self._filled.table.blocks.numpy()[:n, : self.max_blocks]
            blocks[:n, : held.shape[1]] = held
        write_tiles(tile_parts(words[self._tiles_at :], self._tiles), rows[:n], starts, stops, self.tile_tokens)
