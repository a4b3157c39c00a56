"""Fills the table of a step from its chunks: by operations on whole arrays, and for each row only where its blocks
change.

A step that continues the answers of the step before costs a few array operations, whatever the number of its rows.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from itertools import chain
from operator import is_
from typing import Any

import numpy as np
import numpy.typing as npt

from clif.engine.scheduler import Chunk, Sequence
from clif.kernels.step_table import StepTable

Longs = npt.NDArray[np.int64]
KNOWN = -1
"""The id of a row is known on the host."""
NO_SLOT = -1


class HeldBlocks:
    """The blocks of a step's sequences, of which those that lie in the table already are not written again.

    A list only grows while it is a sequence's: where it is the same one, its new blocks alone are written.
    """

    def __init__(self, table: StepTable) -> None:
        self._table, self._view = table, table.blocks.numpy()
        self._lists: list[list[int]] = []
        self._counts: list[int] = []

    def fill(self, lists: list[list[int]]) -> Any:
        """Write what is new of these blocks, one list for each sequence. Returns the view [capacity, max_blocks]."""
        counts = list(map(len, lists))
        if counts != self._counts or not all(map(is_, lists, self._lists)):
            if self._table.make_room(max(counts)):
                self._view, self._lists = self._table.blocks.numpy(), []
            self._write(lists, counts)
            self._lists, self._counts = lists, counts
        return self._view

    def _write(self, lists: list[list[int]], counts: list[int]) -> None:
        same = len(self._lists)
        for i, (own, count) in enumerate(zip(lists, counts, strict=True)):
            start = self._counts[i] if i < same and self._lists[i] is own else 0
            if start < count:
                self._view[i, start:count] = own[start:]


class StepRows:
    """The rows of each step, in one table that every step fills again. capacity: rows; sequences: of a step, at most.

    sources [capacity] int64: which of the last step's tokens is a row's id, KNOWN where the table has it; filled where
    `late` is true: some id is not known yet. ends [sequences] int64: the rows that choose a token, `sampling` of them.
    """

    def __init__(self, capacity: int, sequences: int, block_size: int) -> None:
        self.table = StepTable.zeros(capacity, sequences, block_size)
        self.sources, self.ends = np.zeros(capacity, np.int64), np.zeros(sequences, np.int64)
        self.late, self.sampling = False, 0
        self._blocks = HeldBlocks(self.table)
        table = self.table
        self.ids, self.positions, self.cache_slots = (
            t.numpy() for t in (table.ids, table.positions, table.cache_slots)
        )
        self._adapters, self._sequence, self._context = (
            t.numpy() for t in (table.adapters, table.sequence, table.context)
        )

    def fill(self, chunks: Seq[Chunk]) -> StepTable:
        """The table of these chunks, one behind the other; at least one. Valid until the next fill."""
        table = self.table
        sequences, first, last, samples = zip(*chunks, strict=True)
        starts, stops = np.array(first), np.array(last)
        sizes = stops - starts
        n = table.rows = int(sizes.sum())
        table.sequences = len(chunks)
        owner = np.arange(len(chunks))
        if n > len(chunks):
            owner = owner.repeat(sizes)
            behind = sizes.cumsum()
            positions = np.arange(n) + (stops - behind)[owner]
            ends = behind[list(samples)] - 1
        else:
            positions, ends = starts, owner[list(samples)] if False in samples else owner
        self.positions[:n], self._sequence[:n], self._context[:n] = positions, owner, positions + 1
        self.sampling = len(ends)
        self.ends[: len(ends)] = ends
        block, offset = np.divmod(positions, table.block_size)
        blocks = self._blocks.fill([sequence.blocks for sequence in sequences])
        self.cache_slots[:n] = blocks[owner, block] * table.block_size + offset
        self._fill_adapters(sequences, owner)
        self._fill_ids(chunks, sequences, stops, owner)
        return table

    def _fill_adapters(self, sequences: Seq[Sequence], owner: Longs) -> None:
        slots = [NO_SLOT if sequence.slot is None else sequence.slot for sequence in sequences]
        self.table.adapted = max(slots) > NO_SLOT
        self._adapters[: len(owner)] = np.array(slots)[owner] if self.table.adapted else NO_SLOT

    def _fill_ids(self, chunks: Seq[Chunk], sequences: Seq[Sequence], stops: Longs, owner: Longs) -> None:
        n = len(owner)
        known = np.array([len(sequence.tokens) for sequence in sequences])
        self.late = bool((known < stops).any())
        if n == len(chunks) and not self.late:
            self.ids[:n] = [chunk.sequence.tokens[chunk.start] for chunk in chunks]
            return
        tokens = chain.from_iterable(chunk.sequence.tokens[chunk.start : chunk.stop] for chunk in chunks)
        if not self.late:
            self.ids[:n] = list(tokens)
            return
        unknown = self.positions[:n] >= known[owner]
        self.ids[:n][unknown], self.ids[:n][~unknown] = 0, list(tokens)
        sampled_at = np.array([sequence.sampled_at for sequence in sequences])
        self.sources[:n] = np.where(unknown, sampled_at[owner], KNOWN)
