"""Fills the table of a step from its chunks: by operations on whole arrays, and for each row only where its blocks
change.

A step that continues the answers of the step before costs a few array operations, whatever the number of its rows.
"""

from __future__ import annotations

from array import array
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
        self._table, self.view = table, table.blocks.numpy()
        self.lists: list[list[int]] = []
        self._counts: list[int] = []

    def fill(self, lists: list[list[int]]) -> None:
        """Write what is new of these blocks, one list for each sequence, to `view` [capacity, max_blocks]."""
        counts = list(map(len, lists))
        if self._table.make_room(max(counts)):
            self.view, self.lists = self._table.blocks.numpy(), []
        same = len(self.lists)
        for i, (own, count) in enumerate(zip(lists, counts, strict=True)):
            start = self._counts[i] if i < same and self.lists[i] is own else 0
            if start < count:
                self.view[i, start:count] = own[start:]
        self.lists, self._counts = lists, counts


class StepRows:
    """The rows of each step, in one table that every step fills again. capacity: rows; sequences: of a step, at most.

    sources [capacity] int64: which of the last step's tokens is a row's id, KNOWN where the table has it; filled where
    `late` is true: some id is not known yet. ends [sequences] int64: the rows that choose a token, `sampling` of them.
    """

    def __init__(self, capacity: int, sequences: int, block_size: int) -> None:
        self.table = table = StepTable.zeros(capacity, sequences, block_size)
        self.sources, self.ends = np.zeros(capacity, np.int64), np.zeros(sequences, np.int64)
        self.late, self.sampling = False, 0
        self._blocks = HeldBlocks(table)
        self.ids, self.positions, self.cache_slots = (
            t.numpy() for t in (table.ids, table.positions, table.cache_slots)
        )
        self._adapters, self._sequence, self._context = (
            t.numpy() for t in (table.adapters, table.sequence, table.context)
        )
        # Of the last step, if it had one row of each sequence, which chose a token: these, their ends and cache slots.
        self._sequences: tuple[Sequence, ...] = ()
        self._stops: tuple[int, ...] = ()
        self._slots: list[int] = []
        # What moves on. After a forward nothing of numpy is in the caches, and this takes half the time of its ways.
        longs = [memoryview(words).cast("B").cast("q") for words in (self.ids, self.positions, self.cache_slots)]
        self._words = (*longs, memoryview(self._context).cast("B").cast("i"))

    def fill(self, chunks: Seq[Chunk]) -> bool:
        """Fill the table with these chunks, one behind the other; at least one. Valid until the next fill.

        Returns whether all but ids, positions, cache slots, contexts and blocks is as in the step before: each row
        continues the answer of the row in its place.
        """
        sequences, starts, stops, samples = zip(*chunks, strict=True)
        if starts == self._stops and sequences == self._sequences and self._advance(starts, stops, samples):
            return True
        self._fill(chunks, sequences, np.array(starts), np.array(stops), np.array(samples))
        alone = self.sampling == self.table.rows and not self.late
        self._sequences, self._stops = (sequences, stops) if alone else ((), ())
        self._slots = self.cache_slots[: len(chunks)].tolist() if alone else []
        return False

    def _advance(self, starts: tuple[int, ...], stops: tuple[int, ...], samples: tuple[bool, ...]) -> bool:
        """Move each row on by one token. False, with nothing changed, if that is not what they do."""
        tokens = [sequence.tokens for sequence in self._sequences]
        lists = [sequence.blocks for sequence in self._sequences]
        grow_by_one = sum(stops) - sum(starts) == len(stops) and all(samples) and tuple(map(len, tokens)) == stops
        if not grow_by_one or not all(map(is_, lists, self._blocks.lists)):
            return False
        size, slots = self.table.block_size, [slot + 1 for slot in self._slots]
        first = [row for row, start in enumerate(starts) if not start % size]
        if first:
            self._blocks.fill(lists)
        for row in first:
            slots[row] = lists[row][starts[row] // size] * size
        n, (ids, positions, cache_slots, context) = len(slots), self._words
        ids[:n], positions[:n] = array("q", [known[-1] for known in tokens]), array("q", starts)
        cache_slots[:n], context[:n] = array("q", slots), array("i", stops)
        self._stops, self._slots = stops, slots
        return True

    def _fill(self, chunks: Seq[Chunk], sequences: Seq[Sequence], starts: Longs, stops: Longs, samples: Any) -> None:
        """Fill all of the table."""
        sizes, table = stops - starts, self.table
        behind = sizes.cumsum()
        n, table.rows, table.sequences = int(behind[-1]), int(behind[-1]), len(chunks)
        owner = np.arange(len(chunks)).repeat(sizes)
        positions = np.arange(n) + (stops - behind)[owner]
        self.positions[:n], self._sequence[:n], self._context[:n] = positions, owner, positions + 1
        ends = behind[samples] - 1
        self.ends[: len(ends)], self.sampling = ends, len(ends)
        self._blocks.fill([sequence.blocks for sequence in sequences])
        block, offset = np.divmod(positions, table.block_size)
        self.cache_slots[:n] = self._blocks.view[owner, block] * table.block_size + offset
        self._fill_adapters(sequences, owner)
        self._fill_ids(chunks, sequences, stops, owner)

    def _fill_adapters(self, sequences: Seq[Sequence], owner: Longs) -> None:
        slots = [NO_SLOT if sequence.slot is None else sequence.slot for sequence in sequences]
        self.table.adapted = max(slots) > NO_SLOT
        self._adapters[: len(owner)] = np.array(slots)[owner] if self.table.adapted else NO_SLOT

    def _fill_ids(self, chunks: Seq[Chunk], sequences: Seq[Sequence], stops: Longs, owner: Longs) -> None:
        n = len(owner)
        counts = np.array([len(sequence.tokens) for sequence in sequences])
        self.late = bool((counts < stops).any())
        known = list(chain.from_iterable(chunk.sequence.tokens[chunk.start : chunk.stop] for chunk in chunks))
        if not self.late:
            self.ids[:n] = known
            return
        unknown = self.positions[:n] >= counts[owner]
        self.ids[:n][unknown], self.ids[:n][~unknown] = 0, known
        sampled_at = np.array([sequence.sampled_at for sequence in sequences])
        self.sources[:n] = np.where(unknown, sampled_at[owner], KNOWN)
